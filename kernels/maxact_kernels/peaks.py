"""Maximum, position, minimum, mean, mean square and active positions of every map, in one read of the map.

The same six numbers three ways: `reference` in plain torch (any device, any precision, the definition),
`reduce` on numba kernels for float32 maps on the CPU. A map is the values of one channel on one image over its P
positions, numbered row by row. A map that holds NaN or infinity has maximum, minimum, mean and square NaN,
position -1 and no active positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

# The channels_last kernel takes this many positions at a time, so that the running values of a channel stay in
# registers between them; squares and sums are float32 inside a block and float64 across blocks.
_BLOCK = 8
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


def reduce(maps: NDArray[np.float32], channels_last: bool, out: Peaks) -> None:
    """The peaks of maps [N, P, C] (`channels_last`) or [N, C, P], C-contiguous, into `out` [N, C]. Holds no GIL."""
    kernel: Any = _channels_last if channels_last else _channels_first
    kernel(maps, out.max, out.position, out.min, out.mean, out.square, out.active)


@njit(nogil=True, cache=True, inline="always")
def _finite(best: float, least: float, squares: float) -> bool:
    """Whether a map held only finite values: comparisons pass over NaN, but a sum of squares is NaN exactly if one
    of its terms is."""
    return np.isfinite(best) and np.isfinite(least) and not np.isnan(squares)


@njit(nogil=True, cache=True)
def _channels_last(
    maps: NDArray[np.float32],
    top: NDArray[np.float32],
    position: NDArray[np.int32],
    low: NDArray[np.float32],
    mean: NDArray[np.float32],
    square: NDArray[np.float32],
    active: NDArray[np.int32],
) -> None:
    images, positions, channels = maps.shape
    # the running values of one image: contiguous, as the results need not be, or nothing is vectorised
    best = np.empty(channels, np.float32)
    at = np.empty(channels, np.int32)
    least = np.empty(channels, np.float32)
    count = np.empty(channels, np.int32)
    total = np.empty(channels, np.float64)
    squares = np.empty(channels, np.float64)
    whole = positions - positions % _BLOCK
    for n in range(images):
        for c in range(channels):
            best[c], at[c], least[c], count[c] = -np.inf, 0, np.inf, 0
            total[c] = squares[c] = 0.0
        for start in range(0, whole, _BLOCK):
            block = maps[n, start : start + _BLOCK]
            for c in range(channels):  # vectorised; the loop inside is unrolled
                b, p, m, k = best[c], at[c], least[c], count[c]
                s = q = np.float32(0)
                for i in range(_BLOCK):
                    x = block[i, c]
                    p = np.int32(start + i) if x > b else p
                    b = x if x > b else b
                    m = x if x < m else m
                    k += np.int32(x > 0)
                    s += x
                    q += x * x
                best[c], at[c], least[c], count[c] = b, p, m, k
                total[c] += s
                squares[c] += q
        for i in range(whole, positions):
            for c in range(channels):
                x = maps[n, i, c]
                at[c] = np.int32(i) if x > best[c] else at[c]
                best[c] = x if x > best[c] else best[c]
                least[c] = x if x < least[c] else least[c]
                count[c] += np.int32(x > 0)
                total[c] += x
                squares[c] += x * x
        for c in range(channels):
            if _finite(best[c], least[c], squares[c]):
                top[n, c], position[n, c], low[n, c], active[n, c] = best[c], at[c], least[c], count[c]
                mean[n, c], square[n, c] = total[c] / positions, squares[c] / positions
            else:
                top[n, c] = low[n, c] = mean[n, c] = square[n, c] = np.nan
                position[n, c], active[n, c] = -1, 0


@njit(nogil=True, cache=True)
def _channels_first(
    maps: NDArray[np.float32],
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
    for n in range(images):
        for c in range(channels):
            row = maps[n, c]
            for i in range(_LANES):
                best[i], at[i], least[i], count[i] = -np.inf, 0, np.inf, 0
                total[i] = squares[i] = 0.0
            for start in range(0, whole, _LANES):
                for i in range(_LANES):  # vectorised, for its count of steps is fixed
                    x = row[start + i]
                    at[i] = np.int32(start + i) if x > best[i] else at[i]
                    best[i] = x if x > best[i] else best[i]
                    least[i] = x if x < least[i] else least[i]
                    count[i] += np.int32(x > 0)
                    total[i] += x
                    squares[i] += x * x
            for i in range(positions - whole):
                x = row[whole + i]
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
            if _finite(best[0], least[0], squares[0]):
                top[n, c], position[n, c], low[n, c], active[n, c] = best[0], at[0], least[0], count[0]
                mean[n, c], square[n, c] = total[0] / positions, squares[0] / positions
            else:
                top[n, c] = low[n, c] = mean[n, c] = square[n, c] = np.nan
                position[n, c], active[n, c] = -1, 0
