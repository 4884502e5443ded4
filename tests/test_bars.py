"""The bars of `maxact bench`: as long as what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxact.errors import MaxactError
from maxact.render.bars import COLOURS, draw_bars, write_bars
from maxact.render.page import INK, PAPER
from maxact.verdict import Bench
from test_bench import made

WALLS = {"read": 0.5, "decode": 2.0, "forward": 8.0, "taps": 8.4, "heaps": 0.02, "store": 900.0, "scan": 10.5}
THICK = 30


def bars(page: np.ndarray) -> list[dict[str, int]]:
    """From the top down: the colours of each bar, and how many pixels long each is."""
    found: dict[int, dict[str, int]] = {}
    for name, colour in COLOURS.items():
        seen = np.pad((page == colour).all(2).cumsum(0), ((1, 0), (0, 0)))
        full = seen[THICK:] - seen[:-THICK] == THICK  # [rows, columns]: where so many rows from here on have the colour
        for y in np.flatnonzero(full.any(1)):
            found.setdefault(int(y), {})[name] = int(full[y].sum())
    return [found[y] for y in sorted(found)]


@pytest.mark.parametrize("cuda", [False, True])
def test_lengths(cuda: bool) -> None:
    """In the order of the stages, then the limit made of its parts, then the scan; writing the result is left out."""
    found = bars(np.asarray(draw_bars(made(WALLS, cuda=cuda))))
    limit = {"forward": 8.0} if cuda else {"forward": 8.0, "decode": 2.0}
    expected = [
        *({name: wall} for name, wall in WALLS.items() if name not in ("store", "scan")),
        limit,
        {"scan": WALLS["scan"]},
    ]
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    unit = found[-1]["scan"] / WALLS["scan"]
    for row, walls in zip(found, expected, strict=True):
        for name, wall in walls.items():
            assert row[name] == pytest.approx(max(1, wall * unit), abs=1)


def test_the_longest_bar_leaves_room_for_its_words() -> None:
    """Whatever is longest: also a stage that the scan does not have to wait for."""
    for longest in ("read", "taps", "scan"):
        page = np.asarray(draw_bars(made(WALLS | {longest: 40.0})))
        assert (page[:, -20:] == PAPER).all() and (page[:, :20] == PAPER).all()
        *alone, _, whole = bars(page)
        lengths = {name: length for row in (*alone, whole) for name, length in row.items()}
        assert max(lengths, key=lambda name: lengths[name]) == longest


def test_reading_can_be_the_limit() -> None:
    found = bars(np.asarray(draw_bars(made(WALLS | {"read": 30.0, "scan": 31.0}))))
    assert found[-2].keys() == {"read"} and found[-2]["read"] == found[0]["read"]


@pytest.mark.parametrize(
    ("cpus", "limit"),
    [
        ({"decode": 2.0}, {"forward": 8.0, "decode": 1.0}),  # on two cores
        ({"decode": 2.0, "forward": 8.0}, {"forward": 8.0}),  # 5 ms of both cores, but no faster than alone
    ],
)
def test_the_limit_is_made_of_what_stages_take_of_the_cores(cpus: dict[str, float], limit: dict[str, float]) -> None:
    found = bars(np.asarray(draw_bars(made(WALLS, cpus=cpus))))
    unit = found[-1]["scan"] / WALLS["scan"]
    assert found[-2].keys() == limit.keys()
    assert all(found[-2][name] == pytest.approx(ms * unit, abs=1) for name, ms in limit.items())


def test_the_bottleneck_is_named() -> None:
    """Two results that differ in nothing that is drawn but which stage is the slowest."""

    def words(result: Bench) -> int:
        page = np.asarray(draw_bars(result))
        top = np.flatnonzero((page == COLOURS["heaps"]).all(2).any(1))[0]
        return int((page[top : top + THICK, 700:] == INK).all(2).sum())

    fast = made({**WALLS, "heaps": 7.9})
    slow = made({**WALLS, "heaps": 8.1})
    assert (fast.bottleneck, slow.bottleneck) == ("forward", "heaps")
    assert words(slow) > words(fast)


def test_written(tmp_path: Path) -> None:
    place = tmp_path / "new" / "bars.png"
    write_bars(made(WALLS), place)
    with Image.open(place) as opened:
        assert opened.format == "PNG" and opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(draw_bars(made(WALLS))))
    (tmp_path / "file").touch()
    with pytest.raises(MaxactError, match="cannot be written"):
        write_bars(made(WALLS), tmp_path / "file" / "bars.png")
