"""The smallest box that holds a share of the energy, against trying all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from maxact_kernels.boxes import smallest_boxes


def held(energy: np.ndarray, box: tuple[int, ...]) -> float:
    y0, x0, y1, x1 = box
    return float(energy[y0:y1, x0:x1].sum(dtype=np.float64))


def every_box(energy: np.ndarray, share: float) -> list[tuple[int, ...]]:
    """All boxes that hold the share."""
    height, width = energy.shape
    rows = [(a, b) for a, b in product(range(height), range(height + 1)) if a < b]
    cols = [(a, b) for a, b in product(range(width), range(width + 1)) if a < b]
    wanted = share * energy.sum(dtype=np.float64)
    return [
        (y0, x0, y1, x1)
        for (y0, y1), (x0, x1) in product(rows, cols)
        if held(energy, (y0, x0, y1, x1)) >= wanted * (1 - 1e-7)
    ]


def area(box: tuple[int, ...]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


# whole numbers, whose sums have no rounding, so that ties are ties
IMAGES = arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 7)), elements=st.integers(0, 9))


@settings(max_examples=120, deadline=None)
@given(IMAGES, st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]))
def test_it_is_the_first_of_the_smallest(energy: np.ndarray, share: float) -> None:
    (box,) = smallest_boxes(energy[None], share).tolist()
    if not energy.any():
        assert box == [0, 0, 0, 0]
        return
    boxes = every_box(energy, share)
    best = min(map(area, boxes))
    first = min((box for box in boxes if area(box) == best), key=lambda box: (box[0], box[2], box[1]))
    assert tuple(box) == first


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_floats_of_a_projection(share: float) -> None:
    energy = np.random.default_rng(0).normal(size=(5, 9, 11)).astype(np.float32) ** 4
    for image, box in zip(energy, smallest_boxes(energy, share).tolist(), strict=True):
        assert held(image, tuple(box)) >= share * image.sum(dtype=np.float64) * (1 - 1e-6)
        assert area(tuple(box)) == min(map(area, every_box(image, share)))


def test_images_do_not_meet() -> None:
    energy = np.zeros((3, 8, 9), np.float32)
    energy[0, 2, 3] = 5
    energy[2, 7, 8], energy[2, 0, 0] = 96, 4
    boxes = smallest_boxes(energy, 0.95)
    assert boxes.dtype == np.int32
    assert boxes.tolist() == [[2, 3, 3, 4], [0, 0, 0, 0], [7, 8, 8, 9]]
    assert smallest_boxes(energy[::-1, :, ::-1], 0.97).tolist()[0] == [0, 0, 8, 9]
    assert smallest_boxes(np.empty((0, 8, 9), np.float32), 0.95).shape == (0, 4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_however_large(scale: float) -> None:
    energy = np.full((1, 3, 3), scale, np.float32)
    assert smallest_boxes(energy, 0.6).tolist() == [[0, 0, 2, 3]]
