"""What the machine can do. torch is imported only where it is needed, because that takes two seconds."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kd.core.spec import KnownError

if TYPE_CHECKING:
    import torch

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # two flags of x86, one of arm


@cache
def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded; a GPU may still be hidden from torch."""
    return Path("/proc/driver/nvidia/version").exists()


@cache
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; False if the system does not say (no /proc/cpuinfo)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool(words & _BF16_FLAGS)


def processor(device: str) -> str:
    """The GPU's name, or the CPU instruction set that torch uses. Another one changes the last bits of results."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


def resolve_device(device: str, job: int | None = None) -> str:
    """`auto` becomes cuda if torch sees a GPU, otherwise cpu. Any other value stays.

    Jobs that run at the same time get the GPUs in turn, by their number `job`. Raises KnownError for a GPU that does
    not exist.
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
    """`auto` becomes bf16 if the device has bf16 hardware, otherwise fp32. Any other value stays."""
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def cpu_count() -> int:
    """The number of processors that this process may use. A container or taskset can restrict it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> str:
    """The operating system, the type of machine and its number of processors, in a phrase for records."""
    return f"{platform.system()} {platform.machine()}, {cpu_count()} processors"


def home_of(images: int, device: str) -> str:
    """Where to keep this many bytes of images: on the device, or in main memory if they need half of a GPU's memory."""
    if device == "cpu":
        return device
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
    return tensor.pin_memory().to(device, non_blocking=True)


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

    torch.use_deterministic_algorithms(True)
    # In this mode torch also fills new memory, to expose reads of uninitialised values. That costs 4 to 8 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(threads or cpu_count())
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
