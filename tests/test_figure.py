"""A channel's figure: whole image, crop and projection of every rank, under words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import maxact
from maxact.render.figure import draw_figure, figure_pages
from maxact.render.page import FAINT, PAPER, Format, Medium
from maxact.render.tiles import Tiles
from projected import copy_store, find, project
from stores import scan

SIDE = 196


def figure(tiles: Tiles, channel: int, names: dict[str, str] | None = None, format: Format = "png") -> list[np.ndarray]:
    return [np.asarray(page) for page in draw_figure(tiles, channel, Medium.of(format), names or {})]


def scaled(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> maxact.Store:
    """Eleven ranks of every channel of bn2."""
    folder = tmp_path_factory.mktemp("figures")
    copy = copy_store(scan(photos, folder / "a", top=12), folder / "b")
    project(copy, "bn2", size=40, shown=11, missing=[(4, 1)])
    return copy


def test_every_rank_side_by_side(store: maxact.Store) -> None:
    """Three ranks in a row, nine on a page; the box of a field that is larger than the image is at its edge."""
    tiles = Tiles(store, "bn2")
    assert figure_pages(tiles) == 2
    pages = figure(tiles, 3)
    places = []
    for rank in range(11):
        page = pages[rank // 9]
        noise = store.winners("bn2").read("projection/deconvnet", 3, 4)[0, rank]
        crop = store.winners("bn2").read("crop", 3, 4)[0, rank]
        image = store.pixels([tiles.image(3, rank)])[0].numpy()
        ((y, x),) = find(page, scaled(noise))
        places.append((rank // 9, y, x))
        assert (y, x - SIDE - 6) in find(page, scaled(crop))
        shown = page[y : y + SIDE, x - 2 * SIDE - 12 : x - SIDE - 12]
        y0, x0, y1, x1 = store.winners("bn2").read("crop_box", 3, 4)[0, rank] * SIDE / 32
        down, across = np.mgrid[:SIDE, :SIDE]
        beyond = np.maximum.reduce([y0 - down, down - y1, x0 - across, across - x1])  # pixels outside of the box
        edge = np.minimum.reduce([down, across, SIDE - 1 - down, SIDE - 1 - across])  # pixels from the image's edge
        line = (np.abs(beyond) <= 5) | (edge <= 5)
        assert np.array_equal(shown[~line], scaled(image)[~line]) and not np.array_equal(shown, scaled(image))
        assert (page[y - 50 : y, x - 2 * SIDE - 12 : x + SIDE] != PAPER).any()  # words
    assert places == sorted(places)
    assert len({x for _, _, x in places}) == 3 and len({(page, y) for page, y, _ in places}) == 4
    assert pages[0].shape[1] <= 2000 and pages[0].shape[0] <= 1414 and len(pages[1]) < len(pages[0])


def test_words(store: maxact.Store) -> None:
    """A class's name, and nothing else, depends on the names that are given."""
    tiles = Tiles(store, "bn2")
    labels = store["bn2"].top(0)["label"].to_pylist()[:9]
    (before, _), (after, _) = figure(tiles, 0), figure(tiles, 0, {labels[0]: "another word", "none of these": "x"})
    rows, columns = np.nonzero((before != after).any(2))
    ((y, x),) = find(before, scaled(store.winners("bn2").read("projection/deconvnet", 0, 1)[0, 0]))
    renamed = [rank for rank in range(9) if labels[rank] == labels[0]]
    height, width = SIDE + 50 + 18, 3 * (SIDE + 6) - 6 + 44
    cells = {
        3 * int((row - (y - 50)) // height) + int((column - (x - 2 * SIDE - 12)) // width)
        for row, column in zip(rows, columns, strict=True)
    }
    assert cells == set(renamed)
    assert all((row - (y - 50)) % height < 26 for row in rows)  # the first line above the pictures


def test_a_missing_winner(store: maxact.Store) -> None:
    """Its image is still there; its crop and projection are grey."""
    tiles = Tiles(store, "bn2")
    page = figure(tiles, 4)[0]
    image = store.pixels([tiles.image(4, 1)])[0].numpy()
    assert find(page, scaled(image))
    assert 0.9 * 2 * SIDE**2 < (page == FAINT).all(2).sum() <= 2 * SIDE**2


def test_short_lists_end(photos: Path, tmp_path: Path) -> None:
    copy = copy_store(scan(photos, tmp_path / "a", limit=2), tmp_path / "b")
    project(copy, "fc", size=40, shown=5)
    (page,) = figure(Tiles(copy, "fc"), 0)
    noise = copy.winners("fc").read("projection/deconvnet", 0, 1)[0]
    ((y, x),) = find(page, scaled(noise[1]))
    assert (page[y - 50 :, x + SIDE :] == PAPER).all() and (page[y + SIDE :] == PAPER).all()


def test_without_projections_and_without_thumbs(finished: maxact.Store, tmp_path: Path) -> None:
    copy = copy_store(finished, tmp_path / "x")
    project(copy, "fc", size=40, shown=1, methods=())
    (copy.path / "thumbs.parquet").unlink()
    (page,) = figure(Tiles(copy, "fc"), 1)
    ((y, x),) = find(page, scaled(copy.winners("fc").read("crop", 1, 2)[0, 0]))
    assert (page[y, x - SIDE - 6] == FAINT).all() and (page[y : y + SIDE, x + SIDE :] == PAPER).all()


def test_for_print(store: maxact.Store) -> None:
    """A4 on its side at 300 dpi, with room at the edges for printers that do not reach them."""
    pages = figure(Tiles(store, "bn2"), 1, format="pdf")
    assert [page.shape for page in pages] == [(2480, 3508, 3)] * 2
    edge = round(8 / 25.4 * 300)
    for page in pages:
        framed = page.copy()
        framed[edge:-edge, edge:-edge] = PAPER
        assert (framed == PAPER).all()
    noise = store.winners("bn2").read("projection/deconvnet", 1, 2)[0, 0]
    side = round(SIDE * (2480 - 118) / 1414)
    assert len(find(pages[0], scaled(noise, side))) == 1
