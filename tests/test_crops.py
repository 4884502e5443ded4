"""What a picture of a winner shows, and cutting it out, against plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from maxact import crops
from maxact.field import Field
from maxact.fields import fields
from support import photograph


@pytest.fixture(scope="module")
def strided() -> Field:
    """11 x 15 units of an input of 32 x 44, each 3 x 3 pixels, every third one, one pixel beyond the border."""
    network = nn.Sequential(nn.Conv2d(3, 2, 3, stride=3, padding=1)).eval()
    found: Field = fields(network, (32, 44))["0"]
    return found


def flat(rows: Any, cols: Any, shape: tuple[int, int]) -> Field:
    """A field of hand-made outer intervals."""
    outer = [np.array(each, np.int32) for each in (rows, cols)]
    inner = [each.clip(0, size) for each, size in zip(outer, shape, strict=True)]
    return Field(shape, *inner, *inner, *outer, (1, 1), (1.0, 1.0))


def test_boxes(strided: Field) -> None:
    positions = np.array([[0, 0], [10, 14], [5, 0], [3, 7]], np.int32)
    clipped, outer = crops.boxes(strided, positions, 4)
    assert clipped.tolist() == [[0, 0, 2, 2], [29, 41, 32, 44], [14, 0, 17, 2], [8, 20, 11, 23]]
    assert outer.tolist() == [[-1, -1, 2, 2], [29, 41, 32, 44], [14, -1, 17, 2], [8, 20, 11, 23]]
    assert clipped.dtype == outer.dtype == np.int32


def test_boxes_of_whole_maps(strided: Field) -> None:
    clipped, outer = crops.boxes(strided, None, 3)
    assert clipped.tolist() == outer.tolist() == [[0, 0, 32, 44]] * 3
    some = flat([[4, 9], [7, 12]], [[-2, 3], [1, 6]], (20, 30))
    clipped, outer = crops.boxes(some, None, 1)
    assert clipped.tolist() == [[4, 0, 12, 6]] and outer.tolist() == [[0, 0, 20, 30]]


@pytest.mark.parametrize(
    ("size", "whole", "wanted"),
    [
        ((10, 10), False, "field"),  # of 200: exactly half
        ((10, 11), False, "focus"),
        ((35, 5), False, "field"),  # clipped to 10 x 5
        ((35, 45), False, "focus"),
        ((2, 2), True, "focus"),
    ],
)
def test_auto_is_the_field_up_to_half_of_the_input(size: tuple[int, int], whole: bool, wanted: str) -> None:
    found = flat([[-3, size[0] - 3]], [[0, size[1]]], (10, 20))
    assert crops.choose_cut(found, "auto", whole) == wanted
    for crop in ("field", "focus"):
        assert crops.choose_cut(found, crop, whole) == crop


def test_frames() -> None:
    assert crops.frame_of((11, 7), 128) == ((11, 7), 1.0)
    assert crops.frame_of((256, 100), 128) == ((128, 50), 0.5)
    assert crops.frame_of((1, 400), 100) == ((1, 100), 0.25)


box = st.tuples(st.integers(0, 59), st.integers(0, 39), st.integers(1, 60), st.integers(1, 40)).map(
    lambda b: (b[0], b[1], min(60, b[0] + b[2]), min(40, b[1] + b[3]))
)


@given(st.lists(box, min_size=1, max_size=5))
def test_squares(focus: list[tuple[int, int, int, int]]) -> None:
    boxes = np.array(focus, np.int32)
    found = crops.squares(boxes, (60, 40))
    sides = found[:, 2:] - found[:, :2]
    assert found.dtype == np.int32 and (sides[:, 0] == sides[:, 1]).all()
    longest = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert (sides[:, 0] >= np.minimum(np.maximum(32, 1.2 * longest), 60)).all()
    assert (sides[:, 0] <= np.minimum(np.maximum(32, np.ceil(1.2 * longest)), 60)).all()
    # around its focus, also where it was moved
    assert (found[:, :2] <= boxes[:, :2]).all() and (found[:, 2:] >= boxes[:, 2:]).all()
    for axis, size in enumerate((60, 40)):
        fits = sides[:, axis] <= size
        assert (found[fits, axis] >= 0).all() and (found[fits, 2 + axis] <= size).all()
        middle = found[~fits, axis] + found[~fits, 2 + axis]  # too long: centred
        assert (abs(middle - size) <= 1).all()


def test_a_focus_of_nothing_has_a_square_too() -> None:
    assert crops.squares(np.zeros((1, 4), np.int32), (60, 40)).tolist() == [[0, 0, 32, 32]]


def by_numpy(image: np.ndarray, box: list[int]) -> np.ndarray:
    """[H, W, C] inside a box, 0 outside the image."""
    y0, x0, y1, x1 = box
    found = np.zeros((y1 - y0, x1 - x0, image.shape[2]), np.float32)
    for y in range(max(y0, 0), min(y1, image.shape[0])):
        for x in range(max(x0, 0), min(x1, image.shape[1])):
            found[y - y0, x - x0] = image[y, x]
    return found


@pytest.mark.parametrize(
    "box",
    [
        [2, 3, 7, 9],
        [0, 0, 12, 10],
        [-3, -2, 2, 4],
        [9, 6, 15, 14],
        [-2, -5, 20, 17],
        [-1, 4, 1, 6],
        [-9, -9, -2, -3],
        [14, 3, 16, 8],
        [3, 12, 6, 15],
        [-4, 13, -1, 15],
    ],
)
def test_cutting_out(box: list[int]) -> None:
    image = np.random.default_rng(0).normal(size=(12, 10, 3)).astype(np.float32)
    frame = (box[2] - box[0], box[3] - box[1])
    found = crops.cut_out(torch.from_numpy(image).permute(2, 0, 1), np.array(box, np.int32), frame)
    assert found.dtype == torch.float32
    assert np.array_equal(found.permute(1, 2, 0).numpy(), by_numpy(image, box))


@pytest.mark.parametrize("box", [[8, 8, 56, 40], [-20, 30, 44, 94]])
@pytest.mark.parametrize("scale", [0.25, 0.5, 2.0])
def test_scaling_is_antialiased(box: list[int], scale: float) -> None:
    """As PIL does it, which knows nothing of torch."""
    picture = np.asarray(photograph(0))
    frame = round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale)
    found = crops.cut_out(torch.from_numpy(picture.copy()).permute(2, 0, 1), np.array(box, np.int32), frame)
    cut = Image.fromarray(by_numpy(picture, box).astype(np.uint8))
    wanted = np.asarray(cut.resize(frame[::-1], Image.Resampling.BILINEAR), np.float32)
    assert np.abs(found.permute(1, 2, 0).numpy() - wanted).max() <= 1.01  # PIL rounds


def test_pictures_of_inputs() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 4, 3)
    assert torch.equal(crops.visible(pixels), pixels.permute(2, 0, 1))
    floats = torch.tensor([-2.0, 0.0, 3.0]).view(3, 1, 1)
    assert crops.visible(floats).flatten().tolist() == pytest.approx([0, 102, 255])
    assert crops.visible(torch.full((3, 2, 2), 7.0)).tolist() == torch.zeros(3, 2, 2).tolist()


@pytest.mark.parametrize("scale", [1.0, 1e-42, 1e-30, 3e30])
def test_levels_give_the_signal_back_within_half_a_step(scale: float) -> None:
    signal = torch.randn((3, 6, 5), generator=torch.Generator().manual_seed(1)) * scale
    levels, largest = crops.quantise(signal)
    assert levels.shape == (6, 5, 3) and levels.dtype == np.uint8
    assert largest == float(signal.abs().max())
    back = (levels.astype(np.float64) - 128) / 127 * largest
    step = largest / 127
    assert np.abs(back - signal.permute(1, 2, 0).double().numpy()).max() <= 0.51 * step + 1e-45
    assert {1, 255} & set(levels.ravel().tolist())  # the strongest value uses all of the range


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_no_signal(value: float) -> None:
    levels, scale = crops.quantise(torch.full((3, 2, 2), value))
    assert scale == 0 and (levels == 128).all()
