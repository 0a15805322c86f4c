"""What the machine can do. torch is imported only where it is needed, because that takes two seconds."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import glob
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from kd.core.spec import KnownError

if TYPE_CHECKING:
    import torch

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # two flags of x86, one of arm
# What Linux has where torch can see a GPU: NVIDIA's driver, also in containers, WSL2, ROCm, Jetson.
_GPU_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/nvgpu", "/dev/nvhost-gpu")
_OPENMP = ("OMP_", "GOMP_", "KMP_")  # its variables
_BEFORE = set[int]()  # the processors of this process before OpenMP was imported, which may leave its main thread one
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def may_have_gpu() -> bool:
    """Whether torch may see a GPU. A wrong yes costs a dry run only the time to import torch, which then decides."""
    return "torch" in sys.modules or platform.system() != "Linux" or any(map(glob, _GPU_FILES))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; False if the system does not say (no /proc/cpuinfo)."""
    return bool(_bf16_flags())


@cache
def _bf16_flags() -> list[str]:
    return sorted(_BF16_FLAGS.intersection(_text(Path("/proc/cpuinfo")).split()))


def processor(device: str) -> str:
    """The GPU's name, or the CPU instruction sets that torch uses. Others change the last bits of results.

    torch names one of them, such as AVX512. Those for bf16 differ between processors of that name.
    """
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device == "mps":
        return f"Apple's GPU, {platform.machine()}"
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *_bf16_flags()])


def resolve_device(device: str, job: int | None = None) -> str:
    """`auto` becomes cuda if torch sees a GPU (of NVIDIA, or of AMD by ROCm), otherwise cpu. Any other value stays.

    Jobs that run at the same time get the GPUs in turn, by their number `job`. Raises KnownError for a GPU that does
    not exist.
    """
    if device == "auto":
        return _turn(gpu_count(), job)
    if device == "cpu":
        return device
    if device == "mps":
        there, seen = _has_mps(), "no GPU of Apple"
    else:
        there, seen = int(device.partition(":")[2] or 0) < _gpus(), f"{_gpus()} GPUs of NVIDIA or AMD"
    if not there:
        raise KnownError(f"runtime.device: torch sees {seen} here; cpu and auto always work (got {device!r})")
    return device


def _turn(gpus: int, job: int | None) -> str:
    if gpus == 0:
        return "cpu"
    return "cuda" if job is None or gpus == 1 else f"cuda:{job % gpus}"


def gpu_count() -> int:
    """The number of GPUs of NVIDIA or AMD that torch sees."""
    return _gpus() if may_have_gpu() else 0


@cache
def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


@cache
def announce(device: str, threads: int) -> None:
    """Say, once in a process, where networks are trained."""
    count = f", {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else ""
    other = "; runtime.device=mps takes Apple's GPU" if device == "cpu" and _has_mps() else ""
    name, *_ = processor(device).split(", ")
    print(f"device: {device} ({name}{count}){other}", flush=True)


def resolve_precision(precision: str, device: str) -> str:
    """`auto` becomes bf16 if the device has bf16 hardware, otherwise fp32. Any other value stays.

    Raises KnownError for what Apple's GPU does not compute, or was never tried there.
    """
    if device == "mps":
        if precision not in ("auto", "fp32"):
            raise KnownError(f"train.precision: should be fp32 or auto with runtime.device=mps (got {precision!r})")
        return "fp32"
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def widest_float(device: torch.device) -> torch.dtype:
    """The type for long sums: float64, which Apple's GPU does not have."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def cpu_count() -> int:
    """The number of processors that this process may use: by taskset, a cpuset, or a quota of time, rounded up."""
    affinity = len(_allowed()) or os.cpu_count() or 1
    return min([affinity, *(max(1, ceil(quota)) for quota in _quotas())])


def _allowed() -> set[int]:
    """The processors on which this process may run; empty if the system does not say."""
    return _BEFORE or _affinity()


def _affinity() -> set[int]:
    """The processors on which this thread may run now; empty if the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def bind_threads(threads: int | None, device: str) -> None:
    """Import torch so that each of its threads stays on a processor of its own, if they are to use every processor.

    Otherwise two of them share a processor as soon as another process is busy, and each spins while it waits for the
    other: a hundredth of the speed. Fewer threads stay free, because other processes would be bound to the same
    processors. So they do if the user has set variables of OpenMP, which reads them when torch is imported.
    https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fPROC_005fBIND.html
    """
    allowed = _allowed()
    whole = device == "cpu" and 1 < len(allowed) <= (threads or cpu_count())
    if not whole or "torch" in sys.modules or any(name.startswith(_OPENMP) for name in os.environ):
        return
    _BEFORE.update(allowed)
    os.environ["OMP_PROC_BIND"] = "true"
    try:
        import torch  # noqa: F401, it reads the variable
    finally:
        del os.environ["OMP_PROC_BIND"]  # processes that are started from here are not to be bound


def unbind(*worker: int) -> None:
    """Let this thread, or process that decodes images, run on each processor: it inherits the main thread's."""
    if _BEFORE:
        os.sched_setaffinity(0, _BEFORE)


@contextmanager
def processors_kept() -> Iterator[None]:
    """A block after which this thread may run on the processors as before.

    If torch is imported in the block, and the user has set OMP_PROC_BIND, OpenMP leaves this thread one processor.
    Processes that are started later would inherit that.
    """
    before, known = _affinity(), {*_BEFORE}
    _BEFORE.update(before)  # cpu_count() would see one processor
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)
        _BEFORE.intersection_update(known)


def _quotas() -> Iterator[float]:
    """The processors that Linux's control groups allow this process."""
    for group, first in _control_groups("cpu"):
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first else ("cpu.max",)
        with suppress(ValueError):  # no such files, or `max`
            quota, period = (int(word) for name in files for word in _text(group / name).split())
            if quota > 0:  # -1: no limit
                yield quota / period


def memory_left() -> Iterator[int]:
    """The bytes that Linux's control groups leave to this process.

    Files that were read count as used, and are given back when memory is needed: read photographs are among them.
    """
    for group, first in _control_groups("memory"):
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        rows = dict(line.split() for line in _text(group / "memory.stat").splitlines())
        with suppress(ValueError):
            limit, used = (int(_text(group / name)) for name in files)
            yield limit - used + int(rows.get("total_inactive_file" if first else "inactive_file", 0))


def _control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The control group of this process and each group above it, and whether they are of version 1.

    A container sees the host's names of its groups, of which only the topmost exists there, as the root.
    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html
    """
    for line in _text(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)  # of version 2 there is one line, without controllers
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / (controllers if (_GROUPS / controllers).is_dir() else controller) if controllers else _GROUPS
        group = root / path.strip("/")
        for place in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            yield place, bool(controllers)


def _text(path: Path) -> str:
    """The text of a small file of the system; "" if there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def describe() -> str:
    """The operating system, the type of machine and its number of processors, in a phrase for records."""
    return f"{platform.system()} {platform.machine()}, {cpu_count()} processors"


def home_of(images: int, device: str) -> str:
    """Where to keep this many bytes of images: on the device, or in main memory if they need half of a GPU's memory.

    Apple's GPU has no memory of its own.
    """
    if not device.startswith("cuda"):
        return "cpu"
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    if images < free / 2:
        return device
    print(f"the images ({images / 1e9:.1f} GB) stay in main memory: {device} has {free / 1e9:.1f} GB free", flush=True)
    return "cpu"


def bring(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. A copy from main memory runs while the GPU still computes the last batch."""
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def autocast(precision: str, device: str) -> torch.autocast:
    """The autocast context of every forward pass of a stage, of the trained network and of the guide."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.partition(":")[0], dtype, enabled=dtype is not None)


def make_deterministic(threads: int | None, device: str = "cpu") -> None:
    """Use deterministic algorithms, and a thread count that does not depend on the launcher's OMP_NUM_THREADS.

    Both change the last bits of a result. If `device` names one of several GPUs, it becomes torch's current GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA needs it for deterministic matrix products
    import torch

    # use_deterministic_algorithms() does the same, and imports torch.compile's code for a flag of it: a second.
    torch.set_deterministic_debug_mode("error")
    # In this mode torch also fills new memory, to expose reads of uninitialised values. That costs 4 to 8 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(threads or cpu_count())
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


@contextmanager
def settings_kept() -> Iterator[None]:
    """A block after which what make_deterministic() changes in this process is as before."""
    import torch

    variable = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    debug_mode = torch.get_deterministic_debug_mode()
    fill, threads = torch.utils.deterministic.fill_uninitialized_memory, torch.get_num_threads()  # type: ignore[attr-defined]
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(debug_mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_num_threads(threads)
        if current is not None:
            torch.cuda.set_device(current)
        if variable is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
