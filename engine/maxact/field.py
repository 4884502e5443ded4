"""A field: which input pixels can influence a unit. `fields` finds them, the store keeps them, crops follow them.

Coordinates, here and everywhere: (y, x) in pixels from the top left of the model input, half-open. A convolution of
3 x 3 with padding 1 and stride 2 on 8 rows has 4 rows of units; unit 0 sees the input rows -1, 0 and 1, of which the
first is padding: its interval is [0, 2), its outer interval [-1, 2). Unit 3 sees [5, 8), which is also its outer one.
Intervals of rows and of columns are independent of each other: the field of the unit (row, column) is the box
rows[row] x cols[column].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Intervals = NDArray[np.int32]  # [positions, 2]: start and stop
Box = tuple[int, int, int, int]  # y0, x0, y1, x1


@dataclass(frozen=True)
class Field:
    """The fields of the units of one map of H x W units, in an input of `shape` pixels.

    `rows` [H, 2] and `cols` [W, 2] are the hulls of all pixels that can influence a unit, clipped to the input; empty
    (start == stop) where none can. `local_rows` and `local_cols` are the same ignoring multiplicative global gates
    (squeeze-excite). `outer_rows` and `outer_cols` are the local ones before clipping: where a unit at the border would
    see beyond it.

    `step` (rows, columns) is the least common multiple of the strides that were reached on the way to this map: an
    input that is shifted by a whole multiple of it gives the same maps, shifted. `stride` is the pixels from a unit
    to the next, as floats (0.5 in a map of twice the input's size).
    """

    shape: tuple[int, int]
    rows: Intervals
    cols: Intervals
    local_rows: Intervals
    local_cols: Intervals
    outer_rows: Intervals
    outer_cols: Intervals
    step: tuple[int, int]
    stride: tuple[float, float]

    @property
    def is_global(self) -> bool:
        """Whether every unit sees the whole input."""
        return all(
            bool((each[:, 0] == 0).all() and (each[:, 1] == size).all())
            for each, size in zip((self.rows, self.cols), self.shape, strict=True)
        )

    @property
    def is_gated(self) -> bool:
        """Whether the local field is smaller: a global gate multiplies what a unit sees."""
        return not (np.array_equal(self.rows, self.local_rows) and np.array_equal(self.cols, self.local_cols))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the largest local field, before clipping."""
        return tuple(int((each[:, 1] - each[:, 0]).max(initial=0)) for each in (self.outer_rows, self.outer_cols))  # type: ignore[return-value]

    @property
    def regular(self) -> dict[str, list[int]] | None:
        """{size, start, stride}, each [rows, columns], where the outer interval of unit i is
        [start + i * stride, start + i * stride + size) throughout; None elsewhere."""
        found: dict[str, list[int]] = {"size": [], "start": [], "stride": []}
        for each, stride in zip((self.outer_rows, self.outer_cols), self.stride, strict=True):
            start, size = int(each[0, 0]), int(each[0, 1] - each[0, 0])
            expected = start + np.arange(len(each)) * stride
            if stride != int(stride) or not (
                np.array_equal(each[:, 0], expected) and np.ptp(each[:, 1] - expected) == 0
            ):
                return None
            for name, value in (("size", size), ("start", start), ("stride", int(stride))):
                found[name].append(value)
        return found

    def box(self, row: int, column: int) -> Box:
        """The local field of one unit, clipped to the input."""
        (y0, y1), (x0, x1) = self.local_rows[row].tolist(), self.local_cols[column].tolist()
        return y0, x0, y1, x1

    def to_json(self) -> dict[str, Any]:
        """The attributes that a tap has in the store."""
        return {"field": self.regular, "global": self.is_global}
