"""The picture of one unit's field."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from maxact import fields
from maxact.field import Field
from maxact.render.field import COLOUR, DIMMED, SIDE, draw


def made(side: int = 32) -> tuple[NDArray[np.uint8], Field]:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return image, fields(nn.Sequential(nn.Conv2d(3, 4, 5, padding=2, stride=2)), side)["0"]


def test_pixels_of_the_field_stay_and_the_rest_is_dimmed() -> None:
    image, field = made()
    picture = np.asarray(draw(image, field, (8, 8)))  # sees [14, 19) of both
    times = SIDE // 32
    assert picture.shape == (SIDE, SIDE, 3)
    middle = picture[times // 2 :: times, times // 2 :: times]
    inside = np.zeros((32, 32), bool)
    inside[14:19, 14:19] = True
    assert np.array_equal(middle[inside], image[inside])
    assert np.array_equal(middle[~inside], (image[~inside] * DIMMED).astype(np.uint8))
    lines = np.argwhere((picture == COLOUR).all(-1))
    assert lines.min(0).tolist() == [14 * times - 2] * 2 and lines.max(0).tolist() == [19 * times + 1] * 2


def test_a_box_at_the_corner_stays_in_the_picture() -> None:
    image, field = made()
    picture = np.asarray(draw(image, field, (15, 0)))
    assert (picture[-1, :10] == COLOUR).all() and (picture[-10:, 0] == COLOUR).all()


def test_a_large_image_keeps_its_size_and_a_unit_that_sees_nothing_has_no_box() -> None:
    image = np.zeros((500, 500, 3), np.uint8)
    field = fields(nn.Sequential(nn.Conv2d(3, 1, 1, padding=1)), 500)["0"]
    picture = draw(image, field, (0, 5))
    assert picture.size == (500, 500) and picture.getcolors() == [(250_000, (0, 0, 0))]


def test_mistakes_are_named() -> None:
    image, field = made()
    with pytest.raises(ValueError, match="map of 16 x 16, got"):
        draw(image, field, (16, 0))
    with pytest.raises(ValueError, match=r"expected uint8 \[32, 32, 3\]"):
        draw(image[:30], field, (0, 0))
