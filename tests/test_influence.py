"""Fields by measuring, against ones worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maxact.errors import MaxactError
from maxact.field import Field
from maxact.fields.influence import guess, hulls, measure


def pairs(values: Any) -> list[tuple[int, int]]:
    return [tuple(each) for each in values.tolist()]


def conv(images: torch.Tensor) -> torch.Tensor:
    return F.conv2d(images, torch.zeros(4, 3, 3, 5), stride=(2, 1), padding=(1, 0))


def test_a_convolution_whatever_its_weights() -> None:
    field: Field = measure(conv, (8, 7))
    assert pairs(field.rows) == pairs(field.local_rows) == [(0, 2), (1, 4), (3, 6), (5, 8)]
    assert pairs(field.cols) == [(0, 5), (1, 6), (2, 7)]
    assert pairs(field.outer_rows) == [(-1, 2), (1, 4), (3, 6), (5, 8)]
    assert (field.shape, field.step[0], field.stride[0]) == ((8, 7), 2, 2.0)


def test_batches_do_not_matter() -> None:
    fields = [measure(conv, (9, 7), batch) for batch in (1, 4, 100)]
    assert all(pairs(field.rows) == pairs(fields[0].rows) and len(field.rows) == 5 for field in fields)


def test_tiles_of_fast_kernels_do_not_spread() -> None:
    """3 x 3 with stride 1 and many channels is what Winograd's algorithm is for."""
    first, second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    field = measure(lambda images: second(first(images)), (24, 24), 24)
    expected = [(max(0, row - 2), min(24, row + 3)) for row in range(24)]
    assert pairs(field.rows) == pairs(field.cols) == expected


def test_the_structure_of_the_result_is_kept() -> None:
    def several(images: torch.Tensor) -> dict[str, Any]:
        maps = F.avg_pool2d(images, 2)
        return {"maps": maps, "more": [maps.flatten(2).transpose(1, 2), (maps.mean((2, 3)), "text")]}

    found = measure(several, (6, 4))
    assert pairs(found["maps"].rows) == [(0, 2), (2, 4), (4, 6)]
    tokens, (vector, text) = found["more"]
    assert pairs(tokens.rows) == [(0, 2), (0, 2), (2, 4), (2, 4), (4, 6), (4, 6)] and pairs(tokens.cols) == [(0, 4)]
    assert vector.is_global and text == "text"


def test_units_that_see_nothing() -> None:
    field = measure(lambda images: F.pad(images, (0, 0, 2, 0)), (4, 4))
    assert pairs(field.rows) == [(0, 0), (0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]
    assert pairs(field.outer_rows) == [(-2, -1), (-1, 0), (0, 1), (1, 2), (2, 3), (3, 4)]


def test_a_repetition_that_is_longer_than_a_unit() -> None:
    """Each row twice: the step is 1 row and the stride a half."""
    field = measure(
        lambda images: F.conv2d(images.repeat_interleave(2, 2), torch.ones(1, 3, 3, 1), padding=(1, 0)), (8, 8)
    )
    assert pairs(field.rows)[:5] == [(0, 1), (0, 2), (0, 2), (1, 3), (1, 3)]
    assert (field.step[0], field.stride[0]) == (1, 0.5)
    assert pairs(field.outer_rows)[:2] == [(-1, 1), (0, 2)]


def test_hulls_have_no_holes() -> None:
    seen = np.array([[0, 1, 0], [0, 0, 1], [0, 1, 1]], bool)
    assert pairs(hulls(seen)) == [(0, 0), (0, 3), (1, 3)]


def test_no_repetition_is_no_step() -> None:
    irregular = np.array([(0, 3), (1, 4), (3, 5), (4, 9)], np.int32)
    outer, step, stride = guess(irregular, 12)
    assert pairs(outer) == pairs(irregular) and (step, stride) == (12, 3.0)


def test_mistakes_are_named() -> None:
    with pytest.raises(MaxactError, match=r"cannot run on images of .* RuntimeError"):
        measure(lambda images: F.conv2d(images, torch.ones(1, 4, 3, 3)), (8, 8))
    with pytest.raises(MaxactError, match="is not the 2 images'"):
        measure(lambda images: images.sum(0), (2, 2))
