"""What the machine offers: processors, of which a container may have a part of one, and GPUs of several kinds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kd.app import jobs
from kd.app.parsing import parse
from kd.core import hardware
from kd.core.spec import KnownError
from kd.training import forecast
from kd.training.workplace import RuntimeSpec
from tests.conftest import ROOT, composed

# processors ---------------------------------------------------------------------------------------------------------


def test_processors_of_one_name_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One has bf16 in hardware. Its results have other bits, so it uses no cache and no checkpoint of the other."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    names = []
    for flags in ("fpu avx512f", "fpu amx_bf16 avx512f avx512_bf16"):
        monkeypatch.setattr(
            hardware, "_bf16_flags", lambda flags=flags: sorted({*flags.split()} & hardware._BF16_FLAGS)
        )
        hardware.announce.cache_clear()
        hardware.announce("cpu", 2)
        names.append(hardware.processor("cpu"))
    assert names == ["AVX512", "AVX512, amx_bf16, avx512_bf16"]
    assert capsys.readouterr().out == 2 * "device: cpu (AVX512, 2 threads)\n"
    hardware.announce.cache_clear()


V1 = "12:cpuset:/\n4:cpu,cpuacct:{}\n1:name=systemd:/x\n0::/\n"


def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    """A machine of eight processors with these control groups."""
    (tmp_path / "own").write_text(own, encoding="utf-8")
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(hardware, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(hardware, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # docker run --cpus=0.5
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),  # more than there are
        ("0::/\n", {}, 8),
        ("0::/a/b c\n", {"a/cpu.max": "200000 100000\n", "a/b c/cpu.max": "max 100000\n"}, 2),  # of the group above
        ("0::/a/b\n", {"cpu.max": "400000 100000", "a/cpu.max": "max 100000", "a/b/cpu.max": "100000 100000"}, 1),
        ("0::/docker/7f3a\n", {"cpu.max": "150000 100000\n"}, 2),  # the host's name, which the container does not see
        ("0::/../../other\n", {"cpu.max": "150000 100000\n"}, 2),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (
            V1.format("/docker/7f3a"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_period_us": "50000\n"},
            3,
        ),
        (V1.format("/a"), {"cpu/a/cpu.cfs_quota_us": "20000\n", "cpu/a/cpu.cfs_period_us": "10000\n"}, 2),
    ],
)
def test_quotas_count(
    own: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups(tmp_path, monkeypatch, own, files)
    assert hardware.cpu_count() == expected


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/\n", {"memory.max": "1000000\n", "memory.current": "900000\n"}, [100_000]),
        (
            "0::/\n",
            {"memory.max": "1000000\n", "memory.current": "900000\n", "memory.stat": "anon 100\ninactive_file 70000\n"},
            [170_000],
        ),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "900000\n"}, []),
        ("0::/\n", {}, []),
        # SLURM's and systemd's limits are of a group below the root
        ("0::/slurm/job_7\n", {"slurm/job_7/memory.max": "500\n", "slurm/job_7/memory.current": "100\n"}, [400]),
        (
            "9:memory:/a/b\n0::/\n",
            {
                "memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/a/b/memory.usage_in_bytes": "100\n",
                "memory/a/memory.limit_in_bytes": "700\n",
                "memory/a/memory.usage_in_bytes": "600\n",
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            [9_223_372_036_854_771_612, 150],
        ),
    ],
)
def test_the_memory_that_control_groups_leave(
    own: str, files: dict[str, str], left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups(tmp_path, monkeypatch, own, files)
    assert [*hardware.memory_left()] == left
    free = forecast.free_memory("cpu")
    assert free is not None
    assert free <= min(left, default=free)


def test_a_quota_and_an_affinity_both_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "300000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5, 7})  # taskset, docker --cpuset-cpus, SLURM
    assert hardware.cpu_count() == 2


def test_where_there_are_no_groups_all_processors_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups(tmp_path, monkeypatch, "0::/\n", {})
    (tmp_path / "own").unlink()
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert hardware.cpu_count() == 6


# GPUs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A Linux machine where torch is not imported yet, with these device files, GPUs of CUDA or ROCm, and mps."""

    def have(files: Sequence[str] = (), gpus: int = 0, mps: bool = False) -> None:
        found = {pattern: [pattern] for pattern in files}
        monkeypatch.setattr(hardware, "glob", lambda pattern: found.get(pattern, []))
        monkeypatch.setattr(hardware, "_gpus", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    monkeypatch.setattr(hardware, "sys", SimpleNamespace(modules={}))
    hardware.announce.cache_clear()
    yield have
    hardware.announce.cache_clear()


@pytest.mark.parametrize("file", ["/proc/driver/nvidia/version", "/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/nvgpu"])
def test_torch_is_asked_where_there_may_be_a_gpu(file: str, machine: Callable[..., None]) -> None:
    machine([file], gpus=1)
    assert hardware.resolve_device("auto") == "cuda"
    machine([file], gpus=0)
    assert hardware.resolve_device("auto") == "cpu"


def test_once_torch_is_imported_it_decides(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine([], gpus=1)
    assert hardware.resolve_device("auto") == "cpu"  # a dry run does not import torch to learn this
    monkeypatch.setattr(hardware, "sys", sys)
    assert hardware.resolve_device("auto") == "cuda"


def test_other_systems_have_no_such_files(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine([], gpus=1)
    monkeypatch.setattr(hardware.platform, "system", lambda: "Windows")
    assert hardware.resolve_device("auto") == "cuda"


@pytest.mark.parametrize(
    ("typed", "device"),
    [("0", "cuda:0"), ("1", "cuda:1"), ("'2'", "cuda:2"), ("cuda:1", "cuda:1"), ("CUDA", "cuda"), ("mps", "mps")],
)
def test_a_gpu_has_several_spellings(typed: str, device: str, machine: Callable[..., None]) -> None:
    machine(gpus=3, mps=True)
    config = parse(composed(f"runtime.device={typed}"))
    assert config.runtime.device == device
    assert hardware.resolve_device(config.runtime.device) == device


@pytest.mark.parametrize("typed", ["[0,1]", "gpu", "-1", "1.5", "true", "null", "cuda:", "cuda:x", "''", "'0,1'"])
def test_what_is_no_device_is_refused_in_a_line(typed: str) -> None:
    with pytest.raises(KnownError, match=r"runtime.device: should be auto, cpu, mps, cuda, or the number") as problem:
        parse(composed(f"runtime.device={typed}"))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("3", "torch sees 3 GPUs of NVIDIA or AMD here; cpu and auto always work (got 'cuda:3')"),
        ("mps", "torch sees no GPU of Apple here; cpu and auto always work (got 'mps')"),
    ],
)
def test_a_gpu_that_is_not_there_is_a_line(typed: str, line: str, machine: Callable[..., None]) -> None:
    machine(gpus=3)
    with pytest.raises(KnownError, match=re.escape(f"runtime.device: {line}")):
        hardware.resolve_device(RuntimeSpec.model_validate({"device": typed}).device)


def test_apples_gpu_computes_in_fp32(machine: Callable[..., None]) -> None:
    machine(mps=True)
    assert hardware.resolve_precision("auto", "mps") == hardware.resolve_precision("fp32", "mps") == "fp32"
    assert hardware.widest_float(torch.device("mps")) == torch.float32
    assert hardware.home_of(10**9, "mps") == "cpu"
    for precision in ("bf16", "fp16", "fp64"):
        with pytest.raises(KnownError, match=r"train.precision: should be fp32 or auto with runtime.device=mps"):
            parse(composed("runtime.device=mps", f"train.precision={precision}"))


def test_a_line_says_the_device_once(machine: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    machine(mps=True)
    for _ in range(2):
        hardware.announce("cpu", 2)
    assert re.fullmatch(
        r"device: cpu \(\w+, 2 threads\); runtime.device=mps takes Apple's GPU\n", capsys.readouterr().out
    )
    machine()
    hardware.announce("cpu", 1)
    assert re.fullmatch(r"device: cpu \(\w+, 1 thread\)\n", capsys.readouterr().out)


# a busy machine -------------------------------------------------------------------------------------------------------

BIND = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from kd.core import hardware
hardware.bind_threads({threads}, "{device}")
bound = os.sched_getaffinity(0)
with ThreadPoolExecutor(1, initializer=hardware.unbind) as pool:
    helper = pool.submit(os.sched_getaffinity, 0).result()
print(len(bound), len(helper), hardware.cpu_count(), "OMP_PROC_BIND" in os.environ, "torch" in sys.modules)
"""
HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def bound(threads: object, device: str = "cpu", **variables: str) -> list[int | bool]:
    """After bind_threads() in a new process: the processors of its main thread, of a helper's and of cpu_count();

    whether the variable is left, and whether torch is imported.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", BIND.format(threads=threads, device=device)]
    done = subprocess.run(
        command, env={**environment, **variables}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [each == "True" if each in ("True", "False") else int(each) for each in done.stdout.split()]


@pytest.mark.skipif(HERE < 2, reason="needs two processors that a process may use")
def test_threads_on_every_processor_stay_on_their_own() -> None:
    everything = bound(HERE)
    assert everything == [1, HERE, hardware.cpu_count(), False, True]


@pytest.mark.skipif(HERE < 2, reason="needs two processors that a process may use")
@pytest.mark.parametrize(
    ("threads", "device", "variables"),
    [
        (1, "cpu", {}),
        (HERE - 1, "cpu", {}),  # another process would have the same processors
        (HERE, "cuda", {}),
        (HERE, "cpu", {"OMP_NUM_THREADS": "2"}),
        (HERE, "cpu", {"OMP_PLACES": "cores"}),
        (HERE, "cpu", {"GOMP_CPU_AFFINITY": "0-1"}),
        (HERE, "cpu", {"KMP_AFFINITY": "none"}),
    ],
    ids=str,
)
def test_other_threads_are_left_alone(threads: int, device: str, variables: dict[str, str]) -> None:
    assert bound(threads, device, **variables) == [HERE, HERE, hardware.cpu_count(), False, False]


def test_without_affinities_nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "sys", SimpleNamespace(modules={}))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
    hardware.bind_threads(8, "cpu")
    hardware.unbind()
    assert not hardware._BEFORE


def test_a_quota_binds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight processors' time: each container would have the first two."""
    groups(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "200000 100000\n"})
    monkeypatch.setattr(hardware, "sys", SimpleNamespace(modules={}))
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_"))]:
        monkeypatch.delenv(name)
    hardware.bind_threads(None, "cpu")
    assert not hardware._BEFORE


def test_a_run_binds_before_it_imports_torch_and_a_dry_run_does_not(
    job: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for networks of a library, for which reading the configuration imports torch, and whose steps are timed."""
    done = list[object]()
    monkeypatch.setattr("kd.app.jobs.bind_threads", lambda *asked: done.append(asked))
    parse = jobs.parse
    monkeypatch.setattr("kd.app.jobs.parse", lambda *given: done.append("parse") or parse(*given))
    job("train.epochs=1", "method=scratch", "runtime.threads=1")
    assert done == [(1, "cpu"), "parse"]
    done.clear()
    job("dry_run=true")
    assert done == ["parse"]
    done.clear()
    job("dry_run=true", "method=scratch", "model=torchvision", "model.arch=resnet18", "runtime.threads=1")
    assert done == [(1, "cpu"), "parse"]
