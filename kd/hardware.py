"""What the machine can do, asked without importing torch (two seconds) unless there is a GPU to ask about."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kd.spec import KnownError

if TYPE_CHECKING:
    import torch

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86's two, and arm's


@cache
def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded; a GPU may still be hidden from torch."""
    return Path("/proc/driver/nvidia/version").exists()


@cache
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; False where the system does not tell (no /proc/cpuinfo)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool(words & _BF16_FLAGS)


def processor(device: str) -> str:
    """What computes: a GPU's name, or the instructions that torch uses of the CPU. Other ones give other last bits."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


def resolve_device(device: str, job: int | None = None) -> str:
    """`auto` becomes cuda where torch sees a GPU and cpu elsewhere; anything else stays.

    Of jobs that run side by side, number `job` takes its turn at the GPUs. Raises KnownError for a GPU that is not
    there.
    """
    if device == "auto":
        return _turn(_gpus() if has_nvidia_driver() else 0, job)
    if device == "cpu":
        return device
    gpus = _gpus()
    if int(device.partition(":")[2] or 0) >= gpus:
        raise KnownError(
            f"runtime.device: torch sees {gpus} NVIDIA GPUs here; cpu and auto always work (got {device!r})"
        )
    return device


def _turn(gpus: int, job: int | None) -> str:
    if gpus == 0:
        return "cpu"
    return "cuda" if job is None or gpus == 1 else f"cuda:{job % gpus}"


@cache
def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def resolve_precision(precision: str, device: str) -> str:
    """`auto` becomes bf16 where the resolved device computes in it, fp32 elsewhere; anything else stays."""
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def cpu_count() -> int:
    """The processors this process may use, which a container or taskset may have made fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> str:
    """One phrase for records: the system, the machine's kind and its processors."""
    return f"{platform.system()} {platform.machine()}, {cpu_count()} processors"


def home_of(images: int, device: str) -> str:
    """Where so many bytes of images are kept: on the device, or in main memory where it would fill half of a GPU."""
    if device == "cpu":
        return device
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    if images < free / 2:
        return device
    print(f"the images ({images / 1e9:.1f} GB) stay in main memory: {device} has {free / 1e9:.1f} GB free", flush=True)
    return "cpu"


def bring(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. One from main memory travels while the GPU is still at work on the last batch."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast(precision: str, device: str) -> torch.autocast:
    """The context in which every forward of a stage runs, student's and guide's alike."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.partition(":")[0], dtype, enabled=dtype is not None)


def prepare(threads: int | None, device: str = "cpu") -> None:
    """Deterministic algorithms, and a thread count that does not depend on who started the process.

    Both move the last bits of a result: launchers set OMP_NUM_THREADS each in its own way. Of several GPUs, what
    does not say which one means the given `device`.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's condition for deterministic matrix products
    import torch

    torch.use_deterministic_algorithms(True)
    # Along with it torch fills new memory, to show whoever reads what nobody wrote; that costs 4 to 8 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(threads or cpu_count())
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
