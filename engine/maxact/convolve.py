"""A convolution that works out a window of each map only, there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Window = tuple[NDArray[np.int64], tuple[int, int]]  # the first row and column [N, 2], and height and width
Windows = Mapping[tuple[str, int], Window]  # by the path and call of a convolution


def convolve(
    window: Window,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch.conv2d, but for zeros outside the window [N, C, h, w] of each sample."""
    if isinstance(padding, str) or input.ndim != 4:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    pairs = [list(_pair(each)) for each in (stride, padding, dilation)]
    result: torch.Tensor = _Windowed.apply(input, weight, bias, *pairs, groups, *window)
    return result


class _Windowed(torch.autograd.Function):
    """A convolution inside windows, with the gradient of its input; weights have none."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        starts: NDArray[np.int64],
        size: tuple[int, int],
    ) -> torch.Tensor:
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        axes = list(zip(images.shape[2:], stride, padding, spans, strict=True))
        whole = [(length + 2 * p - span) // s + 1 for length, s, p, span in axes]
        reads = [(length - 1) * s + span for length, (_, s, _, span) in zip(size, axes, strict=True)]
        sources = (starts * stride - padding).tolist()  # where what a window reads begins; may be in the padding
        ctx.geometry = images.shape, stride, dilation, groups, starts.tolist(), size, sources, reads
        ctx.save_for_backward(weight)
        taken = _cut_out(images, sources, reads)
        made = torch.conv2d(taken, weight, bias, stride, 0, dilation, groups)
        return _paste(made, starts.tolist(), (len(images), weight.shape[0], *whole))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        shape, stride, dilation, groups, starts, size, sources, reads = ctx.geometry
        (weight,) = ctx.saved_tensors
        signal = _cut_out(grads[0], starts, size)
        like = _empty((*shape[:2], *reads), signal)
        back, _, _ = torch.ops.aten.convolution_backward(
            signal, like, weight, None, stride, [0, 0], dilation, False, [0, 0], groups, [True, False, False]
        )
        return _paste(back, sources, shape), *(None for _ in range(8))


def _cut_out(maps: torch.Tensor, starts: list[list[int]], size: Sequence[int]) -> torch.Tensor:
    """A window [N, C, h, w] of each map [N, C, H, W]; zeros where it reaches beyond."""
    out = _empty((*maps.shape[:2], *size), maps)
    for mine, theirs, start in zip(out, maps, starts, strict=True):
        inside, there = _overlap(start, size, maps.shape[2:])
        if theirs[(slice(None), *there)].shape != mine.shape:
            mine.zero_()
        mine[(slice(None), *inside)] = theirs[(slice(None), *there)]
    return out


def _paste(windows: torch.Tensor, starts: list[list[int]], shape: Sequence[int]) -> torch.Tensor:
    """The way back: maps of `shape` [N, C, H, W] with zeros around the windows, whose parts beyond the map are lost."""
    out = _empty(shape, windows).zero_()
    for mine, theirs, start in zip(out, windows, starts, strict=True):
        inside, there = _overlap(start, windows.shape[2:], shape[2:])
        mine[(slice(None), *there)] = theirs[(slice(None), *inside)]
    return out


def _overlap(
    start: Sequence[int], size: Sequence[int], whole: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a window lies inside a map: in the window's own rows and columns, and in the map's."""
    first = [max(0, -at) for at in start]
    last = [min(length, limit - at) for at, length, limit in zip(start, size, whole, strict=True)]
    inside = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    there = tuple(slice(at + a, at + b) for at, a, b in zip(start, first, last, strict=True))
    return inside, there


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def _empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
