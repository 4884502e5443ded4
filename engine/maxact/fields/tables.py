"""Which inputs each of the outputs of an operation reads along one dimension: a Table for every kind of operation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOWHERE = -(1 << 40)  # in a table: no element, not even beyond the border
Table = NDArray[np.int64]  # [outputs, reads]; indices below 0 and past the end are beyond the border


def kernel_table(outputs: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Table:
    """A convolution or a pool."""
    return np.arange(outputs)[:, None] * stride - padding + np.arange(kernel) * dilation


def transposed_table(outputs: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Table:
    """A transposed convolution: input i adds to the outputs i * stride - padding + k * dilation."""
    reach = np.arange(outputs)[:, None] + padding - np.arange(kernel) * dilation
    return np.where(reach % stride == 0, reach // stride, NOWHERE)


def adaptive_table(inputs: int, outputs: int) -> Table:
    """An adaptive pool: output i reads floor(i * inputs / outputs) up to ceil((i + 1) * inputs / outputs)."""
    start = np.arange(outputs) * inputs // outputs
    stop = -(-(np.arange(1, outputs + 1) * inputs) // outputs)
    table = start[:, None] + np.arange((stop - start).max(initial=1))
    return np.where(table < stop[:, None], table, NOWHERE)


def shifted_table(inputs: int, before: int, after: int) -> Table:
    """A padding: output i reads input i - before."""
    return np.arange(-before, inputs + after)[:, None]


def reflected(table: Table, inputs: int) -> Table:
    """Positions beyond a border, mirrored at the outermost element."""
    last = max(inputs - 1, 1)
    return last - np.abs(last - np.mod(table, 2 * last)) if inputs > 1 else np.zeros_like(table)


def interpolation_table(
    inputs: int, outputs: int, scale: float | None, corners: bool, reads: tuple[int, int], clamp: bool
) -> Table:
    """An interpolation that reads the elements from floor(x) + reads[0] to floor(x) + reads[1], before clamping.

    x is worked out in float32, as torch does. An element whose weight happens to be 0 counts as read.
    """
    f = np.float32
    index = np.arange(outputs, dtype=np.float32)
    if corners:
        x = index * (f(inputs - 1) / f(outputs - 1) if outputs > 1 else f(0))
    else:
        ratio = f(1 / scale) if scale else f(inputs) / f(outputs)
        x = ratio * (index + f(0.5)) - f(0.5)
    base = np.floor(np.maximum(x, 0) if clamp else x).astype(np.int64)
    table: Table = base[:, None] + np.arange(reads[0], reads[1] + 1)
    return table


def nearest_table(inputs: int, outputs: int, scale: float | None, centred: bool) -> Table:
    """The nearest element: floor(i * ratio), in float32 as torch does; `centred` is nearest-exact."""
    f = np.float32
    ratio = f(1 / scale) if scale else f(inputs) / f(outputs)
    x = (np.arange(outputs, dtype=np.float32) + f(0.5 if centred else 0)) * ratio
    table: Table = np.minimum(np.floor(x).astype(np.int64), inputs - 1)[:, None]
    return table
