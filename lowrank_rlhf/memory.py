"""The most memory that this process held since a run began: resident, and allocated by torch on the GPU."""

import ctypes
import gc
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
GLIBC = platform.libc_ver()[0] == "glibc"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux

_supposed: int | None = None
_highest_vram = 0  # bytes; what torch counted before its count was last set back


def begin() -> None:
    """Count anew, as a run does that is not the first of its process; resident memory only where the system can. What
    the last one left is freed and given back to the system first."""
    global _highest_vram
    gc.collect()
    if GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
    forget_vram_peak()
    _highest_vram = 0
    if CLEAR.exists():
        CLEAR.write_text("5")


def peak_memory_gib() -> dict[str, float]:
    """The most since `begin`: `ram` resident, `vram` allocated by torch."""
    peak = {"ram": highest_ram() / GIB}
    if torch.cuda.is_available():
        peak["vram"] = highest_vram() / GIB
    return {name: round(value, 2) for name, value in peak.items()}


def highest_ram() -> int:
    """Bytes."""
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    # Kilobytes, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def highest_vram() -> int:
    """Bytes; also what was allocated before a phase set torch's own count back."""
    return max(_highest_vram, torch.cuda.max_memory_allocated())


def keep_freed() -> None:
    """Let glibc keep what is freed for the next tensor instead of giving it back to the system.

    Given back, each page costs a fault when it is wanted again: a fifth of the time of a training step in a small
    virtual machine.
    """
    if GLIBC:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes: larger tensors have mappings of their own
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated there without swapping."""
    if _supposed is not None:
        return _supposed
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


@contextmanager
def suppose_free(count: int) -> Iterator[None]:
    """Inside the block `free_bytes` says this, wherever: to plan for another machine."""
    global _supposed
    before, _supposed = _supposed, count
    try:
        yield
    finally:
        _supposed = before


def forget_vram_peak() -> None:
    """Set torch's count back, for the peak of a phase; `highest_vram` remembers."""
    global _highest_vram
    if torch.cuda.is_available():
        _highest_vram = highest_vram()
        torch.cuda.reset_peak_memory_stats()
