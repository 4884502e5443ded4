"""The numbers and the memory of a pass: IEEE float32, repeatable algorithms, pages that stay."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@contextmanager
def numerics(threads: int) -> Iterator[None]:
    """float32 that is IEEE float32, the same algorithms every time, and `threads` CPU threads; then as before."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags


def has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16; on others that is slower than float32."""
    return any(value is True for name, value in torch.cpu.get_capabilities().items() if "bf16" in name)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, a CUDA device is the current one of this thread: what libraries do without naming a device would
    otherwise be done on the first one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_current(device: torch.device) -> None:
    """Makes a CUDA device the current one of this thread, for good."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keeps freed memory in the process while the scan runs, where the C library is glibc.

    It hands every large block back to the system, and the next batch's maps meet pages that have to be cleared
    again: a quarter of a ResNet-18's time on a CPU. Afterwards all of it goes back, and glibc's first thresholds
    stand, without their growing by themselves.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    if not libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # as much as an older one takes
    libc.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(-1))
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 10)
        libc.malloc_trim(0)


def give_back() -> None:
    """Gives unused memory of the devices back to them, for others than torch, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
