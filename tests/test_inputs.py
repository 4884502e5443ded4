"""The model inputs of chosen images: which come, which do not, and where they lie in the original pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maxact import fetch, inputs
from maxact.catalog import Catalog
from maxact.errors import MaxactError
from maxact.inputs import Inputs, source_box
from maxact.preprocess import Preprocess
from support import photograph, pixels, write_photographs

SMALL = Preprocess(resize=40, crop=(32, 32))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot be read are tried again at once."""
    monkeypatch.setattr(fetch._again, "sleep", lambda seconds: None)


def opened(images: object, preprocess: Preprocess = SMALL, decoder: str = "torchvision") -> Inputs:
    return Inputs(Catalog.build(images), preprocess, decoder=decoder, max_pixels=10**8, readers=3)


@pytest.mark.parametrize("decoder", ["torchvision", "dali"])
def test_they_are_what_torchvision_makes(photos: Path, decoder: str) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    wanted = pixels(paths, SMALL).int()
    with opened(photos, decoder=decoder) as source:
        for numbers in ([7, 0, 20], [3, 7, 3, 4], [*range(21)], []):
            found, bad = source.get(numbers)
            assert set(found) == set(numbers) and not bad
            for number, image in found.items():
                assert image.pixels.dtype == torch.uint8 and image.pixels.shape == (32, 32, 3)
                assert (image.pixels.int() - wanted[number]).abs().max() <= (1 if decoder == "dali" else 0)
                with Image.open(paths[number]) as picture:
                    assert image.original == (picture.height, picture.width)


def test_the_last_ones_are_kept(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(photos) as source:
        first, _ = source.get([1, 2])
        again, _ = source.get([2, 1])
        assert all(again[number] is first[number] for number in (1, 2))
    monkeypatch.setattr(inputs, "_KEPT", 3 * 32 * 32 * 3)
    with opened(photos) as source:
        first, _ = source.get([1, 2, 3])
        source.get([1])  # now 2 is the one that was asked for longest ago
        source.get([4])
        again, _ = source.get([1, 2, 3, 4])
        assert again[1] is first[1] and again[2] is not first[2] and again[3] is first[3]
        assert torch.equal(again[2].pixels, first[2].pixels)
        assert sum(image.pixels.nbytes for image in source._kept.values()) == source._bytes == inputs._KEPT


def test_what_cannot_be_had(tmp_path: Path) -> None:
    paths = write_photographs(tmp_path / "photos", 8)
    source = opened(tmp_path / "photos")
    paths[1].unlink()
    paths[4].write_bytes(paths[4].read_bytes() + b"x")
    data = bytearray(paths[6].read_bytes())
    os.utime(paths[5], ns=(1, 1))
    status = paths[6].stat()
    paths[6].write_bytes(bytes(len(data)))
    os.utime(paths[6], ns=(status.st_atime_ns, status.st_mtime_ns))
    with source:
        for _ in range(2):
            found, bad = source.get(range(8))
            assert sorted(found) == [0, 2, 3, 7]
            assert {(each.image, each.stage) for each in bad} == {(1, "read"), (4, "read"), (5, "read"), (6, "decode")}
        reasons = {each.image: each.error for each in bad}
        assert "No such file" in reasons[1] and "bytes, but had" in reasons[4] and "was modified" in reasons[5]
        assert [each.key for each in bad if each.image == 1] == [str(paths[1].relative_to(tmp_path / "photos"))]
        assert torch.equal(found[7].pixels, pixels([paths[7]], SMALL)[0])
        assert source.get([1, 6])[0] == {}


def test_more_than_one_batch(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 5)
    paths = sorted((tmp_path / "photos").rglob("*.jpg")) * 15
    paths[40] = tmp_path / "gone.jpg"
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    with opened(tmp_path / "list.txt") as source:
        found, bad = source.get(range(75))
        assert len(found) == 74 and [each.image for each in bad] == [40]
        wanted = pixels(paths[:5], SMALL)
        assert all(torch.equal(image.pixels, wanted[number % 5]) for number, image in found.items())


def test_pictures_of_a_dataset() -> None:
    pictures: list[Any] = [photograph(number, 50) for number in range(4)]
    pictures[2] = (np.asarray(pictures[2]), "label")
    with opened(pictures) as source:
        found, bad = source.get([0, 2, 3])
        assert not bad
        assert [found[number].original for number in (0, 2, 3)] == [(50, 50), (69, 50), (50, 50)]
        assert found[2].pixels.shape == (32, 32, 3)
    catalog = Catalog(Catalog.build(pictures).table)
    with (
        Inputs(catalog, SMALL, decoder="torchvision", max_pixels=10**8) as source,
        pytest.raises(MaxactError, match="item/1 is an item of a Dataset: give that again"),
    ):
        source.get([1])


def constant(picture: Image.Image) -> torch.Tensor:
    return torch.full((3, 32, 32), float(picture.width))


def test_a_preprocess_function(photos: Path) -> None:
    preprocess = Preprocess(crop=(32, 32), function="test_inputs:constant")
    with opened(photos, preprocess) as source:
        image = source.get([2])[0][2]
    assert image.pixels.dtype == torch.float32 and image.pixels.shape == (3, 32, 32)
    assert float(image.pixels[0, 0, 0]) == image.original[1]
    assert np.isnan(source_box(np.zeros((2, 4), np.int32), preprocess, image.original)).all()


FITS = [
    Preprocess(resize=60, crop=(48, 48)),
    Preprocess(resize=64, crop=(64, 40)),
    Preprocess(crop=(48, 56), fit="squash"),
    Preprocess(crop=(64, 64), fit="pad"),
    Preprocess(resize=40, crop=(56, 56)),  # larger than the resized picture: black around it
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two pictures of other shapes, one wide and one tall."""
    folder = tmp_path_factory.mktemp("wide")
    photograph(1, 150).save(folder / "0.png")
    photograph(2, 130).save(folder / "1.png")
    yield folder


@pytest.mark.parametrize("preprocess", FITS)
@pytest.mark.parametrize("number", [0, 1])
def test_source_boxes_show_the_same(preprocess: Preprocess, number: int, wide: Path) -> None:
    """The original picture, cut there and scaled, is what the input shows."""
    height, width = preprocess.crop
    with opened(wide, preprocess) as source, Image.open(wide / f"{number}.png") as picture:
        image = source.get([number])[0][number]
        assert image.original == (picture.height, picture.width)
        place = preprocess.placement(*image.original)
        top, left = (max(0, -start) for start in place.start)  # padding, of which the original has nothing
        boxes = np.array(
            [
                [top, left, height - top - 1, width - left - 1],
                [top + 2, left + 3, top + 18, left + 21],
                [height // 2, width // 2 - 5, height // 2 + 11, width // 2 + 9],
            ],
            np.int32,
        )
        found = source_box(boxes, preprocess, image.original)
        assert found.dtype == np.float32 and found.shape == boxes.shape
        assert np.array_equal(source_box(boxes[1], preprocess, image.original), found[1])
        for (y0, x0, y1, x1), theirs in zip(boxes.tolist(), found.tolist(), strict=True):
            mine = image.pixels.numpy()[y0:y1, x0:x1].astype(float)

            def differs(by: float, theirs: Any = theirs, mine: Any = mine, size: Any = (x1 - x0, y1 - y0)) -> float:
                a, b, c, d = (value + by for value in theirs)
                if min(a, b) < 0 or c > picture.height or d > picture.width:
                    return float("inf")
                cut = picture.resize(size, Image.Resampling.BILINEAR, (b, a, d, c))
                return float(np.abs(np.asarray(cut, float) - mine).mean())

            assert differs(0) < 2.5
            assert differs(0) < min(differs(-3), differs(3))
