"""What a field says of itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from maxact.field import Field


def intervals(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, np.int32)


# A convolution of 3 with padding 1 and stride 2 on 8 rows; and one of 1 with stride 4 on 8 columns.
ROWS, OUTER = intervals((0, 2), (1, 4), (3, 6), (5, 8)), intervals((-1, 2), (1, 4), (3, 6), (5, 8))
COLS = intervals((0, 1), (4, 5))
FIELD = Field((8, 8), ROWS, COLS, ROWS, COLS, OUTER, COLS, (2, 4), (2.0, 4.0))
WHOLE = intervals((0, 8), (0, 8))


def test_a_regular_field() -> None:
    assert FIELD.size == (3, 1)
    assert FIELD.regular == {"size": [3, 1], "start": [-1, 0], "stride": [2, 4]}
    assert FIELD.box(0, 1) == (0, 4, 2, 5)
    assert not FIELD.is_global and not FIELD.is_gated
    assert json.loads(json.dumps(FIELD.to_json())) == {"field": FIELD.regular, "global": False}


def test_what_is_not_regular() -> None:
    uneven = intervals((-1, 2), (1, 4), (3, 7), (5, 8))
    assert replace(FIELD, outer_rows=uneven).regular is None
    assert replace(FIELD, outer_rows=uneven).size == (4, 1)
    half = replace(FIELD, outer_cols=intervals((0, 1), (0, 1)), stride=(2.0, 0.5))
    assert half.regular is None


def test_a_gate_makes_a_field_global_and_leaves_its_box() -> None:
    gated = replace(FIELD, rows=intervals(*[(0, 8)] * 4), cols=WHOLE)
    assert gated.is_global and gated.is_gated
    assert gated.box(3, 0) == (5, 0, 8, 1)
    assert replace(gated, cols=COLS).is_global is False
