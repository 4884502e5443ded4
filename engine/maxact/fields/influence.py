"""Receptive fields by measuring: which units change when a row, or a column, of the input is spoilt.

One row of pixels of an otherwise blank image is NaN, and the units that come out as NaN depend on that row: a NaN
survives every sum and product, whatever the weights are (0 * NaN is NaN), rectifiers, pools and normalisations. So the
measured intervals are those of pixels that enter a unit's computation, also with a weight that happens to be zero,
and know nothing of how the network is made. One image for every row and every column: as many forward passes.

What a NaN does not survive is not seen: comparisons and what is chosen by them (`x > 0`, `where` on such a mask,
argmax, sorting, an index), nan_to_num, nanmean, conversions to integers, and code that tests for NaN itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_flatten, tree_unflatten

from maxact.errors import MaxactError
from maxact.field import Field, Intervals

_BUDGET = 1 << 22  # input pixels in a batch: 83 images of 224 x 224, as far as BATCH lets it
BATCH = 16

Rows = NDArray[np.bool_]  # [input rows, map rows]: which units see which row


def measure(function: Callable[[torch.Tensor], Any], size: tuple[int, int], batch: int = BATCH) -> Any:
    """The fields of what `function` gives for float images [N, 3, H, W]: a Field for every tensor in its result.

    Tensors are maps [N, C, rows, columns], tokens [N, T, features] (as T rows) or vectors [N, features], the first
    axis being the images'. The result has the structure of the function's own, tuples, lists and dicts; what is no
    tensor stays as it is. At most `batch` images run at once, fewer where they are large.

    Only exact intervals can be measured, so the local ones equal them. The stride and the step are the ones that
    the intervals show, among units that do not touch the border: where they repeat. A larger step that
    leaves no trace in them is not seen. The outer intervals carry that repetition on to the border.

    Raises MaxactError where the function fails, or gives a tensor whose first axis is not the images'.
    """
    (rows, spec), (columns, _) = (influence(function, size, axis, batch) for axis in range(2))
    leaves = []
    for on_rows, on_columns in zip(rows, columns, strict=True):
        leaves.append(_field(size, on_rows, on_columns) if isinstance(on_rows, np.ndarray) else on_rows)
    return tree_unflatten(leaves, spec)


def influence(
    function: Callable[[torch.Tensor], Any], size: tuple[int, int], axis: int, batch: int = BATCH
) -> tuple[list[Any], Any]:
    """For every tensor that `function` gives, which units [rows, columns] see which row (axis 0) or column (axis 1)
    of the input: bool [H or W, rows, columns]. With them, the structure of the result."""
    found: list[list[Any]] = []
    spec: Any = None
    for images in _spoilt(size, axis, batch):
        outputs, spec = tree_flatten(_run(function, images))
        found.append([_seen(output, len(images)) if isinstance(output, torch.Tensor) else output for output in outputs])
    parts = zip(*found, strict=True)
    return [np.concatenate(each) if isinstance(each[0], np.ndarray) else each[0] for each in parts], spec


def _spoilt(size: tuple[int, int], axis: int, batch: int) -> Iterator[torch.Tensor]:
    """Batches of blank images [N, 3, H, W], each with the next row (or column) of NaN. All have the same length but
    the last."""
    height, width = size
    count = max(2, min(batch, _BUDGET // (height * width)))
    for first in range(0, size[axis], count):
        images = torch.zeros((min(count, size[axis] - first), 3, height, width))
        for number, image in enumerate(images):
            image.select(axis + 1, first + number).fill_(math.nan)
        yield images


def _run(function: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Any:
    with torch.no_grad(), _plain_kernels():
        try:
            return function(images)
        except Exception as error:  # whatever the caller's code may raise
            shape = " x ".join(map(str, images.shape))
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise MaxactError(f"fields: the function cannot run on images of {shape}: {reason}") from error


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Faster kernels work on tiles (Winograd), and spoil a whole tile where one unit is."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _seen(output: torch.Tensor, images: int) -> NDArray[np.bool_]:
    """Which units are spoilt, in any channel: [N, rows, columns]."""
    if output.ndim not in (2, 3, 4) or output.shape[0] != images:
        raise MaxactError(
            f"fields: the first axis of an output {list(output.shape)} is not the {images} images', or it is no "
            "map [N, C, rows, columns], tokens [N, T, features] or vector [N, features]"
        )
    spoilt = output.isnan()
    channel = {4: 1, 3: 2, 2: 1}[output.ndim]
    units: NDArray[np.bool_] = spoilt.any(channel).cpu().numpy()
    return units.reshape(images, *(*units.shape[1:], 1, 1)[:2])


def hulls(seen: NDArray[np.bool_]) -> Intervals:
    """Which of n units see which of p pixels, [p, n] -> the hulls [n, 2]; empty at 0 where none is seen."""
    some = seen.any(0)
    starts = np.where(some, seen.argmax(0), 0)
    stops = np.where(some, len(seen) - seen[::-1].argmax(0), 0)
    return np.stack((starts, stops), -1).astype(np.int32)


def _field(size: tuple[int, int], on_rows: NDArray[np.bool_], on_columns: NDArray[np.bool_]) -> Field:
    rows, columns = hulls(np.any(on_rows, 2)), hulls(np.any(on_columns, 1))
    guesses = [guess(each, length) for each, length in zip((rows, columns), size, strict=True)]
    (outer_rows, row_step, row_stride), (outer_columns, column_step, column_stride) = guesses
    return Field(
        size,
        rows,
        columns,
        rows.copy(),
        columns.copy(),
        outer_rows,
        outer_columns,
        (row_step, column_step),
        (row_stride, column_stride),
    )


def guess(intervals: Intervals, length: int) -> tuple[Intervals, int, float]:
    """The outer intervals, the step and the stride that measured intervals [n, 2] in `length` pixels show.

    Among the units that touch no border, the shortest repetition: m units further on, all intervals are the same but
    for a shift; that is the step, and step / m the stride. Where there is none, the outer intervals are the measured
    ones, the step is the whole length, and the stride length / n.
    """
    count = len(intervals)
    free = np.flatnonzero((intervals[:, 0] > 0) & (intervals[:, 1] < length) & (intervals[:, 1] > intervals[:, 0]))
    if len(free):
        low, high = int(free[0]), int(free[-1]) + 1
        inner = intervals[low:high]
        for period in range(1, len(inner)):
            shifts = inner[period:] - inner[:-period]
            if len(shifts) >= period and shifts[0, 0] > 0 and bool((shifts == shifts[0, 0]).all()):
                step = int(shifts[0, 0])
                index = np.arange(count) - low
                turns, within = np.divmod(index, period)
                outer = (inner[within] + turns[:, None] * step).astype(np.int32)
                if bool((np.clip(outer, 0, length) == intervals)[intervals[:, 1] > intervals[:, 0]].all()):
                    return outer, step, step / period
                break
    return intervals.copy(), length, length / count
