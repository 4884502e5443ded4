"""Sprites: every tile where the sheet says, with the store's own pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import maxact
from maxact.render.sprites import Cells, Pictures, Sheet, Sprites, encode
from maxact.thumbs import write_thumbs
from maxact.winners import Layout
from projected import copy_store, damage_thumbs, project

TAP = "bn1"


@pytest.fixture
def store(finished: maxact.Store, tmp_path: Path) -> maxact.Store:
    return copy_store(finished, tmp_path / "store.zarr")


def layout(shown: int = 9, frame: tuple[int, int] = (40, 50), **changes: object) -> Layout:
    values = {"cut": "field", "scale": 1.0, "map": (7, 7), "methods": ("deconvnet", "guided"), "seed": "one"} | changes
    return Layout(16, 50, shown, frame, **values)  # type: ignore[arg-type]


def draw(sprites: Sprites, channel: int) -> np.ndarray:
    """One channel's sprite."""
    block, rows = next(work for work in sprites.work([channel]))
    drawn = dict(sprites.draw(sprites.read(block), rows))
    return drawn[channel - block.start]


def tile(sprite: np.ndarray, tiles: Cells, rank: int) -> np.ndarray:
    y, x = tiles.place(rank)
    return sprite[y : y + tiles.height, x : x + tiles.width]


@pytest.mark.parametrize("shown", [1, 2, 4, 5, 9, 12])
@pytest.mark.parametrize("frame", [(3, 3), (11, 7), (40, 50), (128, 128)])
def test_tiles_and_their_edges_never_overlap(shown: int, frame: tuple[int, int]) -> None:
    sheet = Sheet.of(layout(shown, frame), (224, 200))
    taken = np.zeros(sheet.size, int)
    for tiles in sheet.blocks.values():
        for rank in range(shown):
            y, x = tiles.place(rank)
            taken[y - 1 : y + tiles.height + 1, x - 1 : x + tiles.width + 1] += 1
    assert taken.max() == 1
    assert sheet.size == (max(b.size[0] for b in sheet.blocks.values()), sum(b.size[1] for b in sheet.blocks.values()))


def test_a_sheet_has_what_its_list_has() -> None:
    names = ["crop", "projection/deconvnet", "projection/guided", "whole", "map"]
    assert list(Sheet.of(layout(), (224, 224)).blocks) == names
    assert list(Sheet.of(layout(map=None), (224, 224)).blocks) == names[:-1]
    assert list(Sheet.of(layout(map=(1, 1)), (224, 224)).blocks) == names[:-1], "one unit is no map"


@pytest.mark.parametrize(("side", "window"), [(3, 33), (11, 33), (22, 34), (31, 47)])
def test_a_small_field_is_shown_in_its_surroundings(side: int, window: int) -> None:
    sheet = Sheet.of(layout(frame=(side, side)), (224, 224))
    assert sheet.field == (side, side)
    assert sheet.window == (window, window)
    assert (window - side) % 2 == 0, "the field is in the middle"


def test_a_larger_field_and_a_focus_are_shown_as_they_are() -> None:
    assert Sheet.of(layout(frame=(32, 32)), (224, 224)).window is None
    assert Sheet.of(layout(frame=(20, 20), cut="focus", scale=None), (224, 224)).window is None


def test_crops_and_projections_are_the_stores_own(store: maxact.Store) -> None:
    arrays = project(store, TAP, size=33, methods=("deconvnet", "gradient"))
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    for channel in range(store[TAP].tap.channels):
        sprite = draw(sprites, channel)
        for name in ("crop", "projection/deconvnet", "projection/gradient"):
            for rank in range(4):
                found = tile(sprite, sprites.sheet.blocks[name], rank)
                np.testing.assert_array_equal(found, arrays[name][channel, rank])


def test_tiny_projections_are_enlarged_to_squares(store: maxact.Store) -> None:
    arrays = project(store, TAP, size=9)
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    found = tile(draw(sprites, 2), sprites.sheet.blocks["projection/deconvnet"], 1)
    assert found.shape == (36, 36, 3)
    np.testing.assert_array_equal(found[2::4, 1::4], arrays["projection/deconvnet"][2, 1])


def test_surroundings_come_from_the_model_input(store: maxact.Store) -> None:
    arrays = project(store, TAP, size=9)
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    inputs = np.pad(store.pixels(range(21)).numpy(), ((0, 0), (64, 64), (64, 64), (0, 0)))
    tiles = sprites.sheet.blocks["crop"]
    around = (tiles.height - 9) // 2
    for rank in range(4):
        y, x = arrays["crop_box"][3, rank, :2] + 64 - around
        image = store[TAP].lists["max", "top"].image[3, rank]
        expected = inputs[image, y : y + tiles.height, x : x + tiles.width]
        np.testing.assert_array_equal(tile(draw(sprites, 3), tiles, rank), expected)


def test_whole_images_are_the_model_input(store: maxact.Store) -> None:
    project(store, TAP)
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    for rank, image in enumerate(store[TAP].lists["max", "top"].image[0, :4].tolist()):
        found = tile(draw(sprites, 0), sprites.sheet.blocks["whole"], rank)
        np.testing.assert_array_equal(found, store.pixels([image])[0].numpy())


def test_a_tile_repeats_its_own_edge(store: maxact.Store) -> None:
    project(store, TAP, size=40)
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    sprite, tiles = draw(sprites, 0), sprites.sheet.blocks["crop"]
    y, x = tiles.place(3)
    framed = sprite[y - 1 : y + tiles.height + 1, x - 1 : x + tiles.width + 1]
    np.testing.assert_array_equal(framed, np.pad(tile(sprite, tiles, 3), ((1, 1), (1, 1), (0, 0)), "edge"))


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_maps_are_bright_where_it_was_decided(store: maxact.Store, end: str) -> None:
    project(store, "bn2", end=end, shown=3)
    winners = store.start_winners("bn2", "max", end, store.winners("bn2", "max", end).layout)
    values = np.zeros((7, 3, 16, 16), np.float16)
    values[:, :, 12, 3] = -2 if end == "bottom" else 2
    values[:, :, 2, 2] = -4 if end == "top" else 4
    winners.write(0, {"map": values})
    sprites = Sprites(store, "bn2", ("max", end), Pictures(store))  # type: ignore[arg-type]
    found = tile(draw(sprites, 0), sprites.sheet.blocks["map"], 1)[..., 0]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert (row // 4, column // 4) == (12, 3)
    assert found[10, 10] < 64, "what counts against it is dark"


def test_winners_that_are_missing_stay_blank(store: maxact.Store) -> None:
    project(store, TAP, channels=[1, 2], missing=[(1, 0), (1, 2)])
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    assert [(list(block), rows) for block, rows in sprites.work(range(6))] == [([0, 1, 2, 3, 4, 5], [1, 2])]
    sprite = draw(sprites, 1)
    for tiles in sprites.sheet.blocks.values():
        assert (tile(sprite, tiles, 0) == 128).all()
        assert (tile(sprite, tiles, 2) == 128).all()
        assert (tile(sprite, tiles, 1) != 128).any()


def test_without_thumbs_there_are_crops_still(store: maxact.Store) -> None:
    arrays = project(store, TAP, size=9)
    (store.path / "thumbs.parquet").unlink()
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    sprite = draw(sprites, 0)
    assert (tile(sprite, sprites.sheet.blocks["whole"], 0) == 128).all()
    crop = Image.fromarray(arrays["crop"][0, 0]).resize((33, 33), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(tile(sprite, sprites.sheet.blocks["crop"], 0), np.asarray(crop))


def test_a_list_that_was_not_projected(store: maxact.Store) -> None:
    with pytest.raises(maxact.MaxactError, match="maxact project"):
        Sprites(store, TAP, ("mean", "top"), Pictures(store))


def test_a_damaged_picture_is_named(store: maxact.Store) -> None:
    project(store, TAP)
    write_thumbs(store.path / "thumbs.parquet", iter([(number, b"no picture") for number in range(21)]))
    with pytest.raises(maxact.MaxactError, match="image 0 is damaged"):
        Pictures(store)


def test_a_damaged_file_of_pictures_is_named(store: maxact.Store) -> None:
    damage_thumbs(store)
    with pytest.raises(maxact.MaxactError, match=r"thumbs\.parquet: the picture of image 0 is damaged"):
        Pictures(store)


def test_the_digest_follows_the_content(store: maxact.Store) -> None:
    project(store, TAP)
    sprites = Sprites(store, TAP, ("max", "top"), Pictures(store))
    values = sprites.read(range(6))
    digests = [sprites.digest(values, row) for row in range(6)]
    assert digests == [sprites.digest(sprites.read(range(row, 6)), 0) for row in range(6)], "its own alone"
    for name in values:
        changed = values[name].copy()
        changed[4].flat[-1] += 1
        found = [sprites.digest(values | {name: changed}, row) for row in range(6)]
        assert [row for row in range(6) if found[row] != digests[row]] == [4], name


def test_the_digest_follows_the_thumbs(store: maxact.Store) -> None:
    project(store, TAP)
    whole, images = Pictures(store), store[TAP].lists["max", "top"].image[:, :4]
    lost = int(images[2, 1])
    kept = [number for number in range(21) if number != lost]
    there = whole.get(np.array(kept))

    def webp(number: int) -> bytes:
        file = io.BytesIO()
        there[number].save(file, "WEBP", lossless=True)
        return file.getvalue()

    before = Sprites(store, TAP, ("max", "top"), whole)
    values = before.read(range(6))
    write_thumbs(store.path / "thumbs.parquet", ((number, webp(number)) for number in kept))
    after = Sprites(store, TAP, ("max", "top"), Pictures(store))
    changed = [row for row in range(6) if before.digest(values, row) != after.digest(values, row)]
    assert changed == np.flatnonzero((images == lost).any(1)).tolist()


def test_encoding_keeps_the_picture(store: maxact.Store) -> None:
    project(store, TAP, size=40)
    sprite = draw(Sprites(store, TAP, ("max", "top"), Pictures(store)), 0)
    with Image.open(io.BytesIO(encode(sprite))) as opened:
        assert opened.format == "WEBP"
        assert np.abs(np.asarray(opened).astype(int) - sprite).mean() < 12  # lossy, and the projections are noise
