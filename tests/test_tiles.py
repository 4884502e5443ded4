"""Tiles hold the store's own pixels; small fields stand outlined in what surrounds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maxact
import tiny
from maxact.errors import MaxactError
from maxact.render.tiles import MARK, Tiles
from maxact.thumbs import write_thumbs
from projected import copy_store, project
from stores import scan


def resized(pixels: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, method))


def marked(tile: Image.Image | None) -> tuple[int, int, int, int]:
    """The outline's outer box: y0, x0, y1, x1."""
    assert tile is not None
    rows, columns = np.nonzero((np.asarray(tile) == MARK).all(2))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def test_crops_and_projections_are_the_stores(finished: maxact.Store, tmp_path: Path) -> None:
    """A field of 40 pixels needs nothing around it. Chunks are read one at a time, in whatever order."""
    store = copy_store(finished, tmp_path / "x")
    wrote = project(store, "bn2", size=40, shown=3, frame=(20, 40), methods=("deconvnet", "guided"))
    tiles, guided = Tiles(store, "bn2"), Tiles(store, "bn2", method="guided")
    assert tiles.fit(80) == (80, 40) and tiles.fit(25) == (25, 12)
    for channel in (6, 0, 3):
        for rank in range(3):
            crop, projection = tiles.crop(channel, rank, (40, 20)), tiles.projection(channel, rank, (40, 20))
            assert np.array_equal(np.asarray(crop), wrote["crop"][channel, rank])
            assert np.array_equal(np.asarray(projection), wrote["projection/deconvnet"][channel, rank])
            other = guided.draw("projection", channel, rank, (40, 20))
            assert np.array_equal(np.asarray(other), wrote["projection/guided"][channel, rank])
            larger = resized(wrote["crop"][channel, rank], (80, 40), Image.Resampling.BICUBIC)
            assert np.array_equal(np.asarray(tiles.draw("crop", channel, rank, (80, 40))), larger)
            smaller = resized(wrote["projection/deconvnet"][channel, rank], (20, 10), Image.Resampling.LANCZOS)
            assert np.array_equal(np.asarray(tiles.projection(channel, rank, (20, 10))), smaller)
    assert (tiles.image(2, 1), tiles.score(2, 1)) == (
        finished["bn2"].top(2)["image"][1].as_py(),
        finished["bn2"].top(2)["score"][1].as_py(),
    )


def test_small_fields_have_context(finished: maxact.Store, tmp_path: Path) -> None:
    """9 x 9 pixels, with 12 around them, black beyond the image; but for the outline the model's own input."""
    store = copy_store(finished, tmp_path / "x")
    wrote = project(store, "bn1", size=9, shown=5)
    tiles = Tiles(store, "bn1")
    for channel in range(6):
        for rank in range(5):
            y, x = wrote["crop_box"][channel, rank, :2] - 12
            whole = np.pad(store.pixels([tiles.image(channel, rank)])[0].numpy(), ((40, 40), (40, 40), (0, 0)))
            window = whole[y + 40 : y + 73, x + 40 : x + 73]
            tile = tiles.crop(channel, rank, (99, 99))  # three pixels for one
            pixels = np.asarray(tile)
            wanted = resized(window, (99, 99), Image.Resampling.BICUBIC)
            assert np.array_equal(pixels[36:63, 36:63], wanted[36:63, 36:63])  # the field itself
            away = np.ones((99, 99), bool)
            away[33:66, 33:66] = False
            assert np.array_equal(pixels[away], wanted[away])
            y0, x0, y1, x1 = marked(tile)
            assert (y0, x0) == (x0, y0) and (y1, x1) == (x1, y1) and 33 <= y0 < 36 and 63 < y1 <= 66
            squares = wrote["projection/deconvnet"][channel, rank].repeat(4, 0).repeat(4, 1)
            assert np.array_equal(np.asarray(tiles.projection(channel, rank, (36, 36))), squares)


def test_whole_images_have_the_box_on_them(finished: maxact.Store, tmp_path: Path) -> None:
    store = copy_store(finished, tmp_path / "x")
    wrote = project(store, "bn2", size=11, shown=2)
    tiles = Tiles(store, "bn2")
    assert tiles.fit_whole(96) == (96, 96)
    for channel in range(7):
        image = store.pixels([tiles.image(channel, 1)])[0].numpy()
        tile = tiles.whole(channel, 1, (96, 96))
        changed = (np.asarray(tile) != resized(image, (96, 96), Image.Resampling.BICUBIC)).any(2)
        box = wrote["box"][channel, 1] * 3  # clipped to the image, as is the outline
        found = np.array(marked(tile))
        assert np.abs(found - box).max() <= 1
        rows, columns = np.nonzero(changed)
        assert rows.min() >= box[0] - 2 and columns.min() >= box[1] - 2
        assert rows.max() < box[2] + 2 and columns.max() < box[3] + 2
        assert not changed[box[0] + 3 : box[2] - 3, box[1] + 3 : box[3] - 3].any()


def test_what_is_not_there(finished: maxact.Store, tmp_path: Path) -> None:
    store = copy_store(finished, tmp_path / "x")
    project(store, "bn2", channels=[1, 4], missing=[(4, 1)], shown=3)
    tiles = Tiles(store, "bn2")
    assert np.flatnonzero(tiles.projected).tolist() == [1, 4]
    for channel, rank in ((0, 0), (4, 1)):
        assert tiles.crop(channel, rank, (20, 20)) is None
        assert tiles.projection(channel, rank, (20, 20)) is None
        assert tiles.whole(channel, rank, (32, 32)) is not None  # without a box
    (store.path / "thumbs.parquet").unlink()
    tiles = Tiles(store, "bn2")
    assert tiles.whole(1, 0, (32, 32)) is None
    assert tiles.crop(1, 0, (9, 9)) is not None  # no context, but the crop itself
    with pytest.raises(MaxactError, match=r"bn2 has no projections by 'guided' \(it has deconvnet\)"):
        Tiles(store, "bn2", method="guided")
    with pytest.raises(MaxactError, match="bn1/max/top has not been projected"):
        Tiles(store, "bn1")


def test_damaged_thumbs(finished: maxact.Store, tmp_path: Path) -> None:
    store = copy_store(finished, tmp_path / "x")
    project(store, "fc", size=40, shown=1)
    write_thumbs(store.path / "thumbs.parquet", ((number, b"RIFF....WEBP") for number in range(21)))
    with pytest.raises(MaxactError, match=r"thumbs\.parquet: image \d+ is damaged; project again"):
        Tiles(store, "fc").whole(0, 0, (32, 32))


def test_lists_without_projections(finished: maxact.Store, tmp_path: Path) -> None:
    store = copy_store(finished, tmp_path / "x")
    project(store, "bn2", score="mean", end="bottom", methods=(), shown=2)
    tiles = Tiles(store, "bn2", ("mean", "bottom"))
    assert tiles.method is None and tiles.projection(0, 0, (9, 9)) is None and tiles.crop(0, 0, (9, 9)) is not None
    assert tiles.describe() == (
        "tiny:network · Conv2d conv2 · 7 channels, maps of 16 x 16",
        "ranked by mean over positions, lowest first · fields of 9 x 9 pixels",
    )


def test_dead_channels_are_available_beside_projected_ones(photos: Path, tmp_path: Path) -> None:
    """In a block of the second pass, here of three channels, in which one was projected."""
    network = tiny.network()
    with torch.no_grad():
        network.bn2.bias[[2, 5]] = -100  # type: ignore[union-attr,index]
    store = copy_store(scan(photos, tmp_path / "a", network), tmp_path / "b")
    project(store, "bn2", channels=[0], size=40, frame=(600, 600), shown=1)
    tiles = Tiles(store, "bn2")
    assert np.flatnonzero(tiles.results.dead).tolist() == [2, 5] and tiles.layout.chunk == 3
    assert np.flatnonzero(tiles.available).tolist() == [0, 2]
