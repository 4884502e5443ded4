"""The peaks of a layer's output, on the device where it is: one operation for every kind of output and device.

On the CPU it runs the numba kernels of `peaks`, as an operator of torch's, so that `torch.compile` takes it into a
graph as it is. On CUDA inside a graph that is being compiled it is the plain torch of `peaks.fused`, which
Inductor fuses into the kernels that make the maps; in eager mode the Triton kernel of `peaks_cuda`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from math import prod

import numpy as np
import torch

from maxact_kernels import peaks as kernel
from maxact_kernels import peaks_cuda
from maxact_kernels.peaks import Peaks

_SHARE = 1 << 20  # values of an output for which waking another thread is worth it
_helpers: tuple[ThreadPoolExecutor, int] | None = None  # what shares the work on a CPU, and how many


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block, `count` threads share every output that is on the CPU. Such blocks may be nested."""
    global _helpers
    before = _helpers
    with ThreadPoolExecutor(max(1, count - 1), "maxact-peaks") as pool:
        _helpers = pool, count - 1
        try:
            yield
        finally:
            _helpers = before


def peaks(output: torch.Tensor, axis: int) -> torch.Tensor:
    """float32 [6, N, C]: the six numbers of `Peaks`, the integers as their bits, of an output [N, ...].

    axis: the channel axis, 1 or -1; all axes but it and the first are positions. An output [N, C] has one position.
    """
    if output.device.type == "cpu":
        compiling = torch.compiler.is_compiling()
        numbers: torch.Tensor = _peaks(output, axis) if compiling else _on_cpu(output, axis)
        return numbers
    if not torch.compiler.is_compiling() and output.dtype in peaks_cuda.DTYPES and _in_triton(output.device):
        maps, last = _lay(output, axis)
        numbers = torch.empty((6, len(output), output.shape[axis]), device=output.device)
        peaks_cuda.peaks(maps, last, numbers)
        return numbers
    maps = output.movedim(axis, 1) if output.ndim > 2 else output.unsqueeze(2)
    form = kernel.fused if torch.compiler.is_compiling() else _reference
    return torch.stack([numbers.view(torch.float32) for numbers in form(maps)])


def _reference(maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return kernel.reference(maps.flatten(2))


@cache
def _in_triton(device: torch.device) -> bool:
    """Whether the Triton kernel can be used on a device; where it cannot, plain torch takes its place."""
    trouble = peaks_cuda.trouble(device)
    if trouble:
        warnings.warn(f"peaks are found in plain torch, which is slower: {trouble}", stacklevel=2)
    return trouble is None


def _lay(output: torch.Tensor, axis: int) -> tuple[torch.Tensor, bool]:
    """The maps as [N, P, C] or [N, C, P], contiguous, without a copy where that can be; and whether C is last."""
    if output.ndim == 4 and axis == 1 and output.is_contiguous(memory_format=torch.channels_last):
        output, last = output.permute(0, 2, 3, 1), True  # the same memory
    else:
        output, last = output.contiguous(), axis == -1 or output.ndim == 2
    if last:
        return output.view(len(output), prod(output.shape[1:-1]), output.shape[-1]), True
    return output.view(*output.shape[:2], prod(output.shape[2:])), False


def _on_cpu(output: torch.Tensor, axis: int, bounds: tuple[float, float] | None = None) -> torch.Tensor:
    output = output.detach()
    maps, last = _lay(output if output.dtype == torch.bfloat16 else output.float(), axis)
    array = maps.view(torch.uint16).numpy() if maps.dtype == torch.bfloat16 else maps.numpy()
    numbers = torch.empty(6, len(output), output.shape[axis])
    out, turn = Peaks.of(numbers), np.zeros(1, np.int64)
    copied = maps.data_ptr() != output.data_ptr()
    reduce = partial(kernel.reduce, array, last, out, turn, None if copied else bounds)
    others = []
    if _helpers:
        pool, most = _helpers
        count = min(most, array.size // _SHARE)
        others = [pool.submit(reduce) for _ in range(count)]
    reduce()
    for other in others:
        if not other.cancel():  # one that has not begun by now has nothing to do
            other.result()
    if copied and bounds:
        output.clamp_(*bounds)
    return numbers


@torch.library.custom_op("maxact::peaks", mutates_args=())
def _peaks(output: torch.Tensor, axis: int) -> torch.Tensor:
    return _on_cpu(output, axis)


@torch.library.custom_op("maxact::peaks_then_clamp", mutates_args=("output",))
def _peaks_then_clamp(output: torch.Tensor, axis: int, low: float, high: float) -> torch.Tensor:
    return _on_cpu(output, axis, (low, high))


@_peaks.register_fake
@_peaks_then_clamp.register_fake
def _(output: torch.Tensor, axis: int, *bounds: float) -> torch.Tensor:
    return output.new_empty((6, output.shape[0], output.shape[axis]), dtype=torch.float32)


# `peaks` as a graph names it, and what also clamps the output in place: (output, axis, low, high); NaN stays
PEAKS = torch.ops.maxact.peaks.default
PEAKS_THEN_CLAMP = torch.ops.maxact.peaks_then_clamp.default
