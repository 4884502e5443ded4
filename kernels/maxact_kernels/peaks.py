"""Maximum, position, minimum, mean, mean square and active positions of every map, in one read of the map.

The same six numbers three ways: `reference` in plain torch (any device, any precision, the definition), `fused`, its
form for torch.compile on CUDA, and `reduce` on numba kernels for float32 and bfloat16 maps on the CPU. A map is the
values of one channel on one image over its P positions, numbered row by row. A map that holds NaN or infinity has
maximum, minimum, mean and square NaN, position -1 and no active positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from maxact_kernels.machine import prefetch, take, widen

# The channels_last kernel takes this many positions at a time, so that the running values of a channel stay in
# registers between them.
_BLOCK = 8
# Sums and sums of squares are float32 over this many positions and float64 beyond.
_FLUSH = 64
# The channels_last kernel asks for values so many places ahead, 4 KB: a quarter to a half faster where a map is in
# no near cache, for the processor foresees neither this order of reading nor the next page.
_AHEAD = 4096  # bytes
_LINE = 64  # bytes in a line of the cache
# The channels_first kernel runs this many interleaved lanes along the positions.
_LANES = 16


@dataclass(frozen=True)
class Peaks:
    """Six arrays [N, C], one row per image and one column per channel; see the module."""

    max: NDArray[np.float32]
    position: NDArray[np.int32]
    min: NDArray[np.float32]
    mean: NDArray[np.float32]
    square: NDArray[np.float32]
    active: NDArray[np.int32]

    @classmethod
    def empty(cls, images: int, channels: int) -> Peaks:
        """Uninitialised arrays [images, channels]."""
        shape = (images, channels)
        top, low, mean, square = (np.empty(shape, np.float32) for _ in range(4))
        position, active = (np.empty(shape, np.int32) for _ in range(2))
        return cls(top, position, low, mean, square, active)

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Peaks:
        """Views of float32 [6, N, C] in host memory, in which the integers lie as their bits."""
        top, position, low, mean, square, active = numbers.numpy()
        return cls(top, position.view(np.int32), low, mean, square, active.view(np.int32))

    def columns(self, start: int, stop: int) -> Peaks:
        """Views of the channels `start` to `stop`."""
        return Peaks(*(getattr(self, field.name)[:, start:stop] for field in fields(self)))

    def rows(self, start: int, stop: int) -> Peaks:
        """Views of the images `start` to `stop`."""
        return Peaks(*(getattr(self, field.name)[start:stop] for field in fields(self)))


def reference(maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The six tensors [N, C], in the order of `Peaks`, of maps [N, C, P]; computed in float32 on the maps' device."""
    maps = maps.float()
    top = maps.amax(-1)
    low = maps.amin(-1)
    square = (maps * maps).mean(-1)
    finite = torch.isfinite(top) & torch.isfinite(low) & ~torch.isnan(square)
    nan = torch.full_like(top, torch.nan)
    return (
        torch.where(finite, top, nan),
        # of equal values torch.argmax gives the first, on every device
        torch.where(finite, maps.argmax(-1), -1).int(),
        torch.where(finite, low, nan),
        torch.where(finite, maps.mean(-1), nan),
        torch.where(finite, square, nan),
        torch.where(finite, (maps > 0).sum(-1), 0).int(),
    )


# Fewer maps than this `fused` reduces row by row first. Inductor would split each of them among programs, to keep the
# device busy (below 64 times the number of multiprocessors, 8,448 on an H200), and what it splits it does not fuse.
_FEW = 10_000


def fused(maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`reference` for maps [N, C, ...], in the form that torch.compile fuses on CUDA into the kernel that makes them.

    bench/fusion.py shows it. Three things would make a second kernel that reads the maps again: to flatten the
    positions, argmax (which Inductor does not split as it does the others), and few maps. So the positions keep
    their axes, and a value and its place are one integer, whose maximum is the highest value at its lowest place.
    """
    count = math.prod(maps.shape[2:])
    maps = maps if maps.element_size() == 2 else maps.float()
    half = 8 * maps.element_size()
    integer = torch.int16 if half == 16 else torch.int32
    sign = -1 << (half - 1)
    bits = maps.view(integer).int()
    # integers in the order of the values: 0 and -0 are equal, NaN is beyond infinity, on the side of its sign
    order = torch.where(bits < 0, -(bits & ~sign), bits)
    wide = half == 32 or count > 1 << 16
    shift = 32 if wide else 16
    behind = (1 << shift) - 1 - torch.arange(count, device=maps.device).view(maps.shape[2:])  # of the lowest most
    key = order.long() << shift | behind if wide else order << shift | behind.int()
    values = maps.float()
    rows = maps.ndim == 4 and maps.shape[0] * maps.shape[1] < _FEW

    def over(x: torch.Tensor, reduce: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
        x = reduce(x, dim=-1, **options) if rows else x
        return reduce(x, dim=tuple(range(2, x.ndim)), **options)

    def value(order: torch.Tensor) -> torch.Tensor:
        return torch.where(order < 0, -order | sign, order).to(integer).view(maps.dtype).float()

    best = over(key, torch.amax)
    top, low = value((best >> shift).int()), value(over(order, torch.amin))
    finite = torch.isfinite(top) & torch.isfinite(low)
    return (
        torch.where(finite, top, torch.nan),
        torch.where(finite, ((1 << shift) - 1 - (best & (1 << shift) - 1)).int(), -1),
        torch.where(finite, low, torch.nan),
        torch.where(finite, over(values, torch.sum) / count, torch.nan),
        torch.where(finite, over(values * values, torch.sum) / count, torch.nan),
        torch.where(finite, over(order > 0, torch.sum, dtype=torch.int32), 0),
    )


def reduce(
    maps: NDArray[Any],
    channels_last: bool,
    out: Peaks,
    turn: NDArray[np.int64] | None = None,
    bounds: tuple[float, float] | None = None,
) -> None:
    """The peaks of maps [N, P, C] (`channels_last`) or [N, C, P] into `out`.

    The maps are float32, or the bits of bfloat16 as uint16. All arrays are C-contiguous: what is written through a
    strided view is not vectorised. Holds no GIL. Threads that call this with the same `turn`, a zero [1], share the
    images: each takes the next one that nobody has taken.

    bounds: what the maps are clamped to once their peaks are found, the work of a rectifier while the values are at
    hand; NaN stays.
    """
    kernel: Any = _channels_last if channels_last else _channels_first
    turn = np.zeros(1, np.int64) if turn is None else turn
    limits = torch.tensor(bounds or (), dtype=torch.float32)
    ends = limits.numpy() if maps.dtype == np.float32 else limits.bfloat16().view(torch.uint16).numpy()
    kernel(maps, turn, ends, out.max, out.position, out.min, out.mean, out.square, out.active)


@njit(nogil=True, cache=True)
def _clamp(values: NDArray[Any], ends: NDArray[Any]) -> None:
    low, high = ends[0], ends[1]
    for i in range(values.size):  # vectorised, for it begins at 0
        value = low if widen(values[i]) < widen(low) else values[i]
        values[i] = high if widen(value) > widen(high) else value


@njit(nogil=True, cache=True, fastmath={"contract"})
def _channels_last(
    maps: NDArray[Any],
    turn: NDArray[np.int64],
    ends: NDArray[Any],
    top: NDArray[np.float32],
    position: NDArray[np.int32],
    low: NDArray[np.float32],
    mean: NDArray[np.float32],
    square: NDArray[np.float32],
    active: NDArray[np.int32],
) -> None:
    images, positions, channels = maps.shape
    # the running values of one image
    best = np.empty(channels, np.float32)
    at = np.empty(channels, np.int32)
    least = np.empty(channels, np.float32)
    count = np.empty(channels, np.int32)
    total = np.empty(channels, np.float64)
    squares = np.empty(channels, np.float64)
    some = np.empty(channels, np.float32)
    some_squares = np.empty(channels, np.float32)
    whole = positions - positions % _BLOCK
    flat = maps.reshape(-1)
    far, line = _AHEAD // maps.itemsize, _LINE // maps.itemsize
    n = take(turn)
    while n < images:
        best[:], least[:], at[:], count[:] = -np.inf, np.inf, 0, 0
        total[:], squares[:], some[:], some_squares[:] = 0, 0, 0, 0
        for start in range(0, whole, _BLOCK):
            block = maps[n, start : start + _BLOCK]
            begin = (n * positions + start) * channels
            for i in range(begin + far, begin + far + _BLOCK * channels, line):  # beyond the end it does no harm
                prefetch(flat, i)
            for c in range(channels):  # vectorised; the loop inside is unrolled
                b, p, m, k = best[c], at[c], least[c], count[c]
                s = q = np.float32(0)
                for i in range(_BLOCK):
                    x = widen(block[i, c])
                    p = np.int32(start + i) if x > b else p
                    b = x if x > b else b
                    m = x if x < m else m
                    k += np.int32(x > 0)
                    s += x
                    q += x * x
                best[c], at[c], least[c], count[c] = b, p, m, k
                some[c] += s
                some_squares[c] += q
            if ends.size:
                _clamp(flat[begin : begin + _BLOCK * channels], ends)
            if start % _FLUSH == _FLUSH - _BLOCK:
                for c in range(channels):
                    total[c] += some[c]
                    squares[c] += some_squares[c]
                    some[c] = some_squares[c] = 0
        for c in range(channels):
            total[c] += some[c]
            squares[c] += some_squares[c]
        for i in range(whole, positions):
            for c in range(channels):
                x = widen(maps[n, i, c])
                at[c] = np.int32(i) if x > best[c] else at[c]
                best[c] = x if x > best[c] else best[c]
                least[c] = x if x < least[c] else least[c]
                count[c] += np.int32(x > 0)
                total[c] += x
                squares[c] += x * x
        if ends.size:
            _clamp(flat[(n * positions + whole) * channels : (n + 1) * positions * channels], ends)
        share = 1.0 / positions
        for c in range(channels):
            # comparisons pass over NaN, but a sum of squares is NaN exactly if one of its terms is
            fit = (best[c] < np.inf) & (least[c] > -np.inf) & (squares[c] == squares[c])
            top[n, c] = best[c] if fit else np.nan
            position[n, c] = at[c] if fit else np.int32(-1)
            low[n, c] = least[c] if fit else np.nan
            mean[n, c] = total[c] * share if fit else np.nan
            square[n, c] = squares[c] * share if fit else np.nan
            active[n, c] = count[c] if fit else np.int32(0)
        n = take(turn)


@njit(nogil=True, cache=True)
def _channels_first(
    maps: NDArray[Any],
    turn: NDArray[np.int64],
    ends: NDArray[Any],
    top: NDArray[np.float32],
    position: NDArray[np.int32],
    low: NDArray[np.float32],
    mean: NDArray[np.float32],
    square: NDArray[np.float32],
    active: NDArray[np.int32],
) -> None:
    images, channels, positions = maps.shape
    best = np.empty(_LANES, np.float32)
    at = np.empty(_LANES, np.int32)
    least = np.empty(_LANES, np.float32)
    count = np.empty(_LANES, np.int32)
    total = np.empty(_LANES, np.float64)
    squares = np.empty(_LANES, np.float64)
    whole = positions - positions % _LANES
    n = take(turn)
    while n < images:
        for c in range(channels):
            row = maps[n, c]
            for i in range(_LANES):
                best[i], at[i], least[i], count[i] = -np.inf, 0, np.inf, 0
                total[i] = squares[i] = 0.0
            for start in range(0, whole, _LANES):
                for i in range(_LANES):  # vectorised, for its count of steps is fixed
                    x = widen(row[start + i])
                    at[i] = np.int32(start + i) if x > best[i] else at[i]
                    best[i] = x if x > best[i] else best[i]
                    least[i] = x if x < least[i] else least[i]
                    count[i] += np.int32(x > 0)
                    total[i] += x
                    squares[i] += x * x
            for i in range(positions - whole):
                x = widen(row[whole + i])
                at[i] = np.int32(whole + i) if x > best[i] else at[i]
                best[i] = x if x > best[i] else best[i]
                least[i] = x if x < least[i] else least[i]
                count[i] += np.int32(x > 0)
                total[i] += x
                squares[i] += x * x
            for i in range(1, _LANES):
                if best[i] > best[0] or (best[i] == best[0] and at[i] < at[0]):
                    best[0], at[0] = best[i], at[i]
                least[0] = min(least[0], least[i])
                count[0] += count[i]
                total[0] += total[i]
                squares[0] += squares[i]
            fit = np.isfinite(best[0]) and np.isfinite(least[0]) and not np.isnan(squares[0])
            top[n, c] = best[0] if fit else np.nan
            position[n, c] = at[0] if fit else -1
            low[n, c] = least[0] if fit else np.nan
            mean[n, c] = total[0] / positions if fit else np.nan
            square[n, c] = squares[0] / positions if fit else np.nan
            active[n, c] = count[0] if fit else 0
            if ends.size:
                _clamp(row, ends)
        n = take(turn)
