"""Placement against torchvision itself, and what a Preprocess refuses."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision.transforms import functional

from maxact.errors import UsageError
from maxact.preprocess import Placement, Preprocess, import_callable

sides = st.one_of(st.integers(1, 1_000), st.integers(1, 100_000))


def torchvision_start(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """Where torchvision's centre crop begins, read off a picture whose pixels say where they are."""
    rows = torch.arange(1, size[0] + 1).view(1, -1, 1)
    cols = torch.arange(1, size[1] + 1).view(1, 1, -1)
    starts = []
    for axis, numbered in enumerate((rows, cols)):
        # One axis at a time: the other is as long as its crop.
        shape = [1, *crop]
        shape[1 + axis] = size[axis]
        cut = functional.center_crop(numbered.expand(shape), list(crop)).movedim(1 + axis, -1)[0, 0]
        at = int(torch.nonzero(cut)[0])
        starts.append(int(cut[at]) - 1 - at)
    return starts[0], starts[1]


@given(sides, sides, st.integers(1, 600))
@example(1, 100_000, 256)
@example(100_000, 1, 256)
@example(375, 500, 256)
def test_short_side_is_resized_by_torchvisions_rule(height: int, width: int, resize: int) -> None:
    size = Preprocess(resize=resize).placement(height, width).size
    assert list(size) == functional._compute_resized_output_size((height, width), [resize])


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
@example(375, 500, 256, 224, 224)
@example(255, 255, 225, 224, 224)  # a spare pixel: the half goes to the even neighbour
@example(227, 227, 227, 224, 224)
@example(100, 100, 101, 224, 224)  # smaller than the crop: padding
def test_centre_crop_is_torchvisions(height: int, width: int, resize: int, rows: int, cols: int) -> None:
    size, start = Preprocess(resize=resize, crop=(rows, cols)).placement(height, width)
    if max(size) <= 20_000:
        assert start == torchvision_start(size, (rows, cols))


def test_a_whole_picture_meets_the_same_pixels_as_in_torchvision() -> None:
    picture = torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8)
    size, (top, left) = Preprocess(resize=256, crop=(224, 200)).placement(375, 500)
    resized = functional.resize(picture, list(size), antialias=True)
    expected = functional.center_crop(functional.resize(picture, [256], antialias=True), [224, 200])
    assert torch.equal(resized[:, top : top + 224, left : left + 200], expected)


@given(sides, sides)
def test_squash_fills_the_crop(height: int, width: int) -> None:
    assert Preprocess(fit="squash", crop=(64, 96)).placement(height, width) == Placement((64, 96), (0, 0))


@given(sides, sides, st.integers(1, 300), st.integers(1, 300))
def test_pad_holds_the_whole_picture_centred(height: int, width: int, rows: int, cols: int) -> None:
    size, start = Preprocess(fit="pad", crop=(rows, cols)).placement(height, width)
    scale = min(rows / height, cols / width)
    assert size[0] == rows or size[1] == cols
    for length, old, room, begin in zip(size, (height, width), (rows, cols), start, strict=True):
        assert 1 <= length <= room
        assert abs(length - old * scale) <= 0.5 + 1e-6 or length == 1
        assert -begin == (room - length) // 2


def test_fill_is_the_mean_in_levels() -> None:
    assert Preprocess().fill == (124, 116, 104)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("resize", 0, "resize: expected 1 to 8,192 pixels, got 0"),
        ("resize", 25.6, "resize: expected"),
        ("resize", True, "resize: expected"),
        ("crop", 224, "crop: expected height and width, 1 to 8,192 pixels, got 224"),
        ("crop", (224, -1), "crop: expected"),
        ("crop", (224.5, 224), "crop: expected"),
        ("interpolation", "lanczos", "interpolation: expected nearest or bilinear or bicubic, got 'lanczos'"),
        ("mean", (123.7, 116.3, 103.5), "mean: expected three numbers from 0 to 1"),
        ("mean", (0.5, 0.5), "mean: expected"),
        ("mean", "0.5", "mean: expected"),
        ("std", (0.2, 0.0, 0.2), "std: expected three numbers above 0"),
        ("std", (0.2, float("nan"), 0.2), "std: expected"),
        ("fit", "stretch", "fit: expected crop or squash or pad, got 'stretch'"),
        ("function", "no_colon", "preprocess: expected package.module:callable, got 'no_colon'"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(field: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Preprocess(**{field: value})
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_json_gives_an_equal_object_back() -> None:
    whole = Preprocess(232, (224, 192), "bicubic", (0.5, 0.5, 0), (1, 1, 1), "pad", "os.path:join")
    assert Preprocess.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    assert isinstance(whole.mean[2], float)
    with pytest.raises(UsageError, match="preprocess: expected only crop, fit"):
        Preprocess.from_json({"size": 224})


def test_functions_are_imported_by_name() -> None:
    assert import_callable("json:JSONDecoder.decode") is json.JSONDecoder.decode
    assert Preprocess(function="json:loads").load_function() is json.loads


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("json", "expected package.module:callable, got 'json'"),
        ("nowhere_at_all:f", "nowhere_at_all:f: cannot import nowhere_at_all (ModuleNotFoundError"),
        ("json:laods", "json:laods: json has no laods (near: loads"),
        ("json:__name__", "json:__name__: expected something that can be called, got str"),
    ],
)
def test_names_that_lead_nowhere(name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        import_callable(name)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_no_function() -> None:
    with pytest.raises(UsageError, match="got None"):
        Preprocess().load_function()
