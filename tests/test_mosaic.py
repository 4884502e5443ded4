"""Mosaics: every winner in its place, on as many pages as it takes, under names that say what is on them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import maxact
import tiny
from maxact.errors import MaxactError, UsageError
from maxact.preprocess import Preprocess
from maxact.render.mosaic import write_mosaics
from maxact.render.page import FAINT, GREY, PAPER
from projected import copy_store, find, pdf_pages, project
from stores import scan


def load(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        assert opened.mode == "RGB"
        return np.asarray(opened)


def scaled(pixels: np.ndarray, side: int, method: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), method))


def place(page: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """Where the one and only such tile of a page is."""
    (found,) = find(page, tile)
    return found


def at(page: np.ndarray, where: tuple[int, int], tile: np.ndarray) -> bool:
    y, x = where
    return np.array_equal(page[y : y + len(tile), x : x + len(tile)], tile)


def blanks(page: np.ndarray) -> tuple[int, int, int, int]:
    """The hull of the grey areas of a page: y0, x0, y1, x1."""
    faint = (page == FAINT).all(2)
    rows, columns = (np.flatnonzero(faint.sum(axis) > 100) for axis in (1, 0))  # and not the edges of letters
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def names(paths: list[Path]) -> list[str]:
    assert all(path.exists() for path in paths)
    return [path.name for path in paths]


class Wide(nn.Module):
    """One layer of many channels, for several pages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.preprocess = Preprocess(resize=32, crop=(32, 32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.conv(images)
        return maps


@pytest.fixture(scope="module")
def store(finished: maxact.Store, tmp_path_factory: pytest.TempPathFactory) -> maxact.Store:
    """bn2 projected in full, of bn1 two channels of another list, fc not at all."""
    copy = copy_store(finished, tmp_path_factory.mktemp("projected") / "x")
    project(copy, "bn2", size=40, shown=5)
    project(copy, "bn1", score="mean", end="bottom", size=40, shown=2, channels=[1, 4])
    return copy


def test_squares(store: maxact.Store, tmp_path: Path) -> None:
    """Three winners in a row, rank after rank, the channels in rows of three; crops lie where projections do."""
    paths = write_mosaics(store, tmp_path, layers=["bn2"])
    assert names(paths) == ["bn2-crops-01.png", "bn2-projections-01.png"]
    crops, projections = map(load, paths)
    assert crops.shape == projections.shape
    winners = store.winners("bn2")
    corners = []
    for channel in range(7):
        noise = winners.read("projection/deconvnet", channel, channel + 1)[0]
        pixels = winners.read("crop", channel, channel + 1)[0]
        y, x = place(projections, scaled(noise[0], 160))
        corners.append((y, x))
        for rank in range(5):
            row, column = divmod(rank, 3)
            there = y + row * 162, x + column * 162
            assert at(projections, there, scaled(noise[rank], 160))
            assert at(crops, there, scaled(pixels[rank], 160))
    rows, columns = sorted({y for y, _ in corners}), sorted({x for _, x in corners})
    assert corners == [(y, x) for y in rows for x in columns][:7] and len(columns) == 3
    assert np.ptp(np.diff(columns)) == 0 and columns[1] - columns[0] > 3 * 162
    assert crops.shape[1] <= 2000 and crops.shape[0] <= 1414


def test_rows(store: maxact.Store, tmp_path: Path) -> None:
    page = load(write_mosaics(store, tmp_path, layers=["bn2"], layout="rows")[1])
    noise = store.winners("bn2").read("projection/deconvnet", 0, 7)
    side = next(side for side in (200, 160, 128, 92) if find(page, scaled(noise[0, 0], side)))
    for channel in range(7):
        y, x = place(page, scaled(noise[channel, 0], side))
        for rank in range(5):
            assert at(page, (y, x + rank * (side + 2)), scaled(noise[channel, rank], side))


def test_the_strongest_of_a_tap(store: maxact.Store, tmp_path: Path) -> None:
    """Pairs of a channel and an image, by raw score; nine of them stand in a square."""
    paths = write_mosaics(store, tmp_path, layers=["bn2"], across=9)
    assert names(paths) == ["bn2-across-crops-01.png", "bn2-across-projections-01.png"]
    page = load(paths[1])
    image, score, _ = store["bn2"].lists["max", "top"]
    pairs = [(-score[c, r], image[c, r], c, r) for c in range(7) for r in range(5)]
    noise = store.winners("bn2").read("projection/deconvnet", 0, 7)
    places = [place(page, scaled(noise[c, r], 200)) for _, _, c, r in sorted(pairs)[:9]]
    assert places == sorted(places)
    assert len({y for y, _ in places}) == len({x for _, x in places}) == 3
    assert not any(find(page, scaled(noise[c, r], 200)) for _, _, c, r in sorted(pairs)[9:])


def test_the_lowest_of_a_tap(finished: maxact.Store, tmp_path: Path) -> None:
    copy = copy_store(finished, tmp_path / "x")
    project(copy, "fc", end="bottom", size=40, shown=3)
    (_, path) = write_mosaics(copy, tmp_path / "out", across=2)
    assert path.name == "fc-max-bottom-across-projections-01.png"
    _, score, _ = copy["fc"].lists["max", "bottom"]
    pairs = sorted((score[c, r], c, r) for c in range(5) for r in range(3))
    noise = copy.winners("fc", "max", "bottom").read("projection/deconvnet", 0, 5)
    page = load(path)
    places = [place(page, scaled(noise[c, r], 200)) for _, c, r in pairs[:2]]
    assert places[0][0] == places[1][0] and places[0][1] < places[1][1]


def test_all_that_was_projected_is_drawn(store: maxact.Store, tmp_path: Path) -> None:
    paths = write_mosaics(store, tmp_path)
    assert names(paths) == [
        "bn1-mean-bottom-crops-01.png",
        "bn1-mean-bottom-projections-01.png",
        "bn2-crops-01.png",
        "bn2-projections-01.png",
    ]
    assert names(write_mosaics(store, tmp_path, lists=[("mean", "bottom")])) == names(paths)[:2]
    page = load(paths[1])
    noise = store.winners("bn1", "mean", "bottom").read("projection/deconvnet", 0, 6)
    assert len({place(page, scaled(noise[c, r], 200)) for c in (1, 4) for r in range(2)}) == 4
    assert (page == FAINT).all(2).sum() < 200  # channels that were not projected have no place here


def test_chosen_channels(tmp_path: Path, photos: Path) -> None:
    """Dead ones, and those that were not projected, are grey and say so; each has a figure besides."""
    network = tiny.network()
    with torch.no_grad():
        network.bn2.bias[3] = -100  # type: ignore[union-attr,index]
    copy = copy_store(scan(photos, tmp_path / "a", network), tmp_path / "b")
    project(copy, "bn2", channels=[0, 2], size=40, shown=4)
    assert copy["bn2"].dead.tolist() == [channel == 3 for channel in range(7)]
    paths = write_mosaics(copy, tmp_path / "out", channels=[0, 3, 5, 800])
    assert names(paths)[:2] == ["bn2-crops-01.png", "bn2-projections-01.png"]
    assert names(paths)[2:] == ["bn2-0.png", "bn2-3.png", "bn2-5.png"]
    page = load(paths[1])
    y, x = place(page, scaled(copy.winners("bn2").read("projection/deconvnet", 0, 1)[0, 0], 200))
    columns = [column for column in range(x, page.shape[1]) if (page[y, column] == FAINT).all()]
    edges = [column for column in columns if column - 1 not in columns]
    assert len(edges) == 2 and len(columns) == 2 * 402
    blanks = [page[y : y + 402, edge : edge + 402] for edge in edges]
    assert all((blank == GREY).all(2).any() for blank in blanks)  # a word
    assert not np.array_equal(*blanks)
    # not chosen, a dead channel stands among those that were projected with it
    again = load(write_mosaics(copy, tmp_path / "all")[1])
    assert place(again, blanks[0])
    assert not find(again, blanks[1])
    assert not any((tmp_path / "all").glob("bn2-?.png"))


def test_missing_winners_and_short_lists(tmp_path: Path, photos: Path) -> None:
    copy = copy_store(scan(photos, tmp_path / "a", limit=3), tmp_path / "b")
    project(copy, "bn2", size=40, shown=5, missing=[(1, 1)])
    for page in map(load, write_mosaics(copy, tmp_path / "out", channels=[1, 4])[:2]):
        y, x, bottom, right = blanks(page)
        assert (bottom - y, right - x) == (200, 200)
        assert (page[y + 202 : y + 402, x - 202 : x + 402] == PAPER).all()  # ranks that the lists do not have
    noise = copy.winners("bn2").read("projection/deconvnet", 1, 2)[0, 0]
    assert place(page, scaled(noise, 200)) == (y, x - 202)


def test_pages(tmp_path: Path, photos: Path) -> None:
    copy = copy_store(scan(photos, tmp_path / "a", Wide(95), limit=5), tmp_path / "b")
    wrote = project(copy, "conv", size=40, frame=(72, 72), cut="focus", shown=5)  # their own size on a full page
    paths = write_mosaics(copy, tmp_path / "out")
    assert names(paths) == [f"conv-{kind}-{page:02}.png" for kind in ("crops", "projections") for page in (1, 2)]
    pages = [load(path) for path in paths[2:]]
    where = {}
    for channel in range(0, 95, 6):
        (where[channel],) = [
            (number, *found)
            for number, page in enumerate(pages)
            for found in find(page, wrote["projection/deconvnet"][channel, 0])
        ]
    assert list(where.values()) == sorted(where.values()) and {page for page, _, _ in where.values()} == {0, 1}
    assert all(page.shape[1] <= 2000 and page.shape[0] <= 1414 for page in pages)
    assert pages[1].shape[0] < pages[0].shape[0] > 1200 and pages[1].shape[1] == pages[0].shape[1]
    # fewer of them leave no old page behind, nor anything half written; more than 16 have no figures
    (tmp_path / "out" / "conv-crops-02.txt").write_text("mine")
    assert len(write_mosaics(copy, tmp_path / "out", channels=range(20))) == 2
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"conv-crops-01.png", "conv-projections-01.png", "conv-crops-02.txt"}


def test_pdf(tmp_path: Path, photos: Path) -> None:
    copy = copy_store(scan(photos, tmp_path / "a", Wide(95), limit=5), tmp_path / "b")
    project(copy, "conv", size=40, shown=5)
    paths = write_mosaics(copy, tmp_path / "out", format="pdf")
    assert names(paths) == ["conv-crops.pdf", "conv-projections.pdf"]
    a4 = pytest.approx((297 / 25.4 * 72, 210 / 25.4 * 72), abs=0.1)
    assert [pdf_pages(path) for path in paths] == [[a4] * 2] * 2
    figures = write_mosaics(copy, tmp_path / "out", channels=[3, 90], format="pdf")[2]
    assert figures.name == "conv-channels.pdf" and pdf_pages(figures) == [a4] * 2
    assert b"/Width 3508" in figures.read_bytes()  # 300 dpi


def test_methods(finished: maxact.Store, tmp_path: Path) -> None:
    """The first one, unless told; none makes crops alone."""
    copy = copy_store(finished, tmp_path / "x")
    project(copy, "bn2", size=40, shown=1, methods=("guided", "gradient"))
    for method, name in ((None, "guided"), ("guided", "guided"), ("gradient", "gradient")):
        path = write_mosaics(copy, tmp_path / "out", method=method)[1]
        assert path.name == ("bn2-projections-gradient-01.png" if name == "gradient" else "bn2-projections-01.png")
        assert place(load(path), scaled(copy.winners("bn2").read(f"projection/{name}", 4, 5)[0, 0], 200))
    with pytest.raises(MaxactError, match=r"no projections by 'deconvnet' \(it has guided, gradient\)"):
        write_mosaics(copy, tmp_path / "out", method="deconvnet")
    copy = copy_store(finished, tmp_path / "y")
    project(copy, "fc", size=40, shown=1, methods=())
    assert names(write_mosaics(copy, tmp_path / "none")) == ["fc-crops-01.png"]


def test_classes_in_words(store: maxact.Store, tmp_path: Path) -> None:
    """They are in the figures."""
    labels = store["bn2"].top(2)["label"].to_pylist()
    given = write_mosaics(store, tmp_path / "a", channels=[2], label_names={labels[0]: "a word"})
    plain = write_mosaics(store, tmp_path / "b", channels=[2])
    changed = {one.name for one, other in zip(given, plain, strict=True) if one.read_bytes() != other.read_bytes()}
    assert changed == {"bn2-2.png"}


def test_mistakes(store: maxact.Store, finished: maxact.Store, tmp_path: Path) -> None:
    def fails(says: str, kind: type[MaxactError], **options: object) -> None:
        with pytest.raises(kind, match=says):
            write_mosaics(store, tmp_path, **options)  # type: ignore[arg-type]

    fails("layout: expected square or rows, got 'round'", UsageError, layout="round")
    fails("format: expected png or pdf, got 'gif'", UsageError, format="gif")
    fails("across: expected at least 1, got 0", UsageError, across=0)
    fails("channels: expected some from 0 to 6, got 7, 900", UsageError, channels=[7, 900])
    fails("channels: expected some from 0 to 6, got none", UsageError, channels=[])
    fails("has no list max/middle; it has max/top, max/bottom, mean/top, mean", UsageError, lists=[("max", "middle")])
    fails("no tap that matches 'bn9'", UsageError, layers=["bn9"])
    fails("nothing of these layers, channels and lists has been projected; run", MaxactError, layers=["fc"])
    fails("nothing of these layers, channels and lists", MaxactError, layers=["bn1"], channels=[0])
    with pytest.raises(MaxactError, match=re.escape(f"{finished.path}: nothing of it has been projected; run")):
        write_mosaics(finished, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MaxactError, match="file: cannot be written"):
        write_mosaics(store, tmp_path / "file")
