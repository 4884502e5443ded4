"""Contact sheets: the right images in the right places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import maxact
from maxact.render.sheet import _CAPTION, _GAP, _MARK, _PAPER, contact_sheet, telling_channels
from stores import scan


def cells(sheet: Image.Image, rows: int, ranks: int, side: int) -> dict[tuple[int, int], np.ndarray]:
    """The images on a sheet by row and rank, [side, side, 3]."""
    array = np.asarray(sheet)
    found = {}
    for row in range(rows):
        top = _GAP + row * (side + _CAPTION + _GAP) + _CAPTION
        for rank in range(ranks):
            left = _GAP + rank * (side + _GAP)
            found[row, rank] = array[top : top + side, left : left + side]
    return found


def test_every_image_is_where_it_belongs(finished: maxact.Store) -> None:
    """At the model input's own size, so pixel for pixel; a linear layer has no position to mark."""
    channels = [("fc", 3), ("fc", 0)]
    sheet = contact_sheet(finished, channels, ranks=4, side=32)
    assert sheet.mode == "RGB"
    assert sheet.size == (4 * (32 + _GAP) + _GAP, 2 * (32 + _CAPTION + _GAP) + _GAP)
    shown = cells(sheet, 2, 4, 32)
    for row, (tap, channel) in enumerate(channels):
        numbers = finished[tap].top(channel)["image"].to_pylist()[:4]
        for rank, pixels in enumerate(finished.pixels(numbers).numpy()):
            assert np.array_equal(shown[row, rank], pixels)


def test_the_mark_is_at_the_winner(finished: maxact.Store) -> None:
    sheet = contact_sheet(finished, [("bn2", 2)], ranks=3, side=32)  # a map of 16 x 16: two pixels each, marked as four
    table = finished["bn2"].top(2).to_pylist()
    shown = cells(sheet, 1, 3, 32)
    pixels = finished.pixels([row["image"] for row in table[:3]]).numpy()
    for rank in range(3):
        marked = (shown[0, rank] == _MARK).all(-1)
        changed = (shown[0, rank] != pixels[rank]).any(-1)
        rows, columns = np.nonzero(marked)
        assert marked.any() and not (changed & ~marked).any()
        y, x = 2 * table[rank]["row"], 2 * table[rank]["column"]
        assert (rows.min(), columns.min()) == (y, x)
        assert rows.max() <= y + 5 and columns.max() <= x + 5


def test_it_is_scaled_to_a_side(finished: maxact.Store) -> None:
    sheet = contact_sheet(finished, [("fc", 1)], ranks=2, side=64)
    assert sheet.size == (2 * (64 + _GAP) + _GAP, 64 + _CAPTION + 2 * _GAP)
    (number, _, *_) = finished["fc"].top(1)["image"].to_pylist()
    wanted = Image.fromarray(finished.pixels([number])[0].numpy()).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(cells(sheet, 1, 2, 64)[0, 0], np.asarray(wanted))


def test_wide_inputs_keep_their_shape(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", crop=(24, 32), limit=4)
    sheet = contact_sheet(store, [("fc", 0)], ranks=2, side=32)
    assert sheet.size == (2 * (32 + _GAP) + _GAP, 24 + _CAPTION + 2 * _GAP)


def test_lists_that_are_short_leave_paper(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", limit=2)
    shown = cells(contact_sheet(store, [("fc", 0)], ranks=4, side=32), 1, 4, 32)
    assert (shown[0, 2] == _PAPER).all() and (shown[0, 3] == _PAPER).all()
    assert not (shown[0, 1] == _PAPER).all()


def test_a_bad_first_image_does_not_matter(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(b"")
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:3], 1):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(path.read_bytes())
    store = scan(tmp_path / "photos", tmp_path / "x")
    assert contact_sheet(store, [("fc", 0)], ranks=2, side=32).size[0] == 76


def test_telling_channels(finished: maxact.Store) -> None:
    chosen = telling_channels(finished, taps=2, each=3)
    assert [tap for tap, _ in chosen] == ["bn2"] * 3 + ["fc"] * 3
    assert len(set(chosen)) == 6
    stats = finished["fc"].stats
    spread = (finished["fc"].lists["max", "top"][1].mean(1) - stats["mean"]) / stats["std"]
    spread[finished["fc"].dead] = -np.inf
    assert [channel for tap, channel in chosen if tap == "fc"] == np.argsort(-spread, kind="stable")[:3].tolist()


def test_a_channel_that_is_not_there(finished: maxact.Store) -> None:
    with pytest.raises(maxact.MaxactError, match="expected a channel from 0 to 4, got 5"):
        contact_sheet(finished, [("fc", 5)])
