"""The arrays of the winners of one list: their layout, and reading and writing them by blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from maxact.errors import MaxactError
from maxact.winners import Layout, Winners

LAYOUT = Layout(5, 6, 4, (7, 9), "field", 1.0, (3, 2), ("guided", "gradient"), "one")


@pytest.fixture
def group(tmp_path: Path) -> Any:
    return zarr.open_group(tmp_path / "x", mode="w").create_group("list", attributes={"settled": 9})


def members(group: Any) -> set[str]:
    return {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def block(layout: Layout, channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        name: draw.integers(0, 200, (channels, layout.shown, *rest)).astype(kind)
        for name, (rest, kind, _, _) in layout.arrays().items()
    }


def test_a_layout_goes_through_json() -> None:
    for layout in (LAYOUT, replace(LAYOUT, scale=None, map=None, cut="focus")):
        assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_what_there_is_and_how_it_is_cut(group: Any) -> None:
    Winners.create(group, LAYOUT)
    assert (
        members(group)
        == set(LAYOUT.arrays())
        == {
            *("box", "focus_box", "crop_box", "source_box", "crop", "map"),
            *("projection/guided", "projection/gradient", "projection_scale/guided", "projection_scale/gradient"),
        }
    )
    assert "map" not in replace(LAYOUT, map=None).arrays()
    for name in members(group):
        array = group[name]
        assert array.shape[:2] == (5, 6) and array.chunks == (LAYOUT.chunk, 4, *array.shape[2:])
        assert array.metadata.dimension_names[:2] == ("channel", "rank")
    wanted = {
        "box": ("int32", -1),
        "crop": ("uint8", 0),
        "projection/guided": ("uint8", 128),
        "map": ("float16", np.nan),
    }
    for name, (kind, fill) in wanted.items():
        assert group[name].dtype == kind and np.array_equal(group[name].fill_value, fill, equal_nan=True)


def test_chunks_are_small_and_no_more_than_64_channels() -> None:
    large = replace(LAYOUT, channels=2048, frame=(128, 128), shown=9)
    assert large.chunk == 9  # 9 * 128 * 128 * 3 bytes a channel in 4 MiB
    assert replace(large, frame=(1024, 1024)).chunk == 1
    assert replace(large, frame=(3, 3)).chunk == 64
    assert LAYOUT.chunk == 5


def test_blocks(group: Any) -> None:
    winners = Winners.create(group, LAYOUT)
    assert not winners.projected().any()
    parts = block(LAYOUT, 2), block(LAYOUT, 1, 1)
    winners.write(1, parts[0])
    winners.write(4, parts[1])
    assert winners.projected().tolist() == [False, True, True, False, True]
    for name, (_, _, _, fill) in LAYOUT.arrays().items():
        assert np.array_equal(winners.read(name, 1, 3), parts[0][name])
        assert np.array_equal(winners.read(name, 4, 5), parts[1][name])
        for empty in (winners.read(name, 0, 1), group[name][:, 4:]):  # and the ranks that are not shown
            assert np.array_equal(empty, np.full_like(empty, fill), equal_nan=empty.dtype.kind == "f")


def test_the_same_layout_again_keeps_what_is_there(group: Any) -> None:
    winners = Winners.create(group, LAYOUT)
    winners.write(0, block(LAYOUT, 5))
    again = Winners.create(group, LAYOUT)
    assert again.layout == LAYOUT and again.projected().all()
    other = Winners.create(group, replace(LAYOUT, shown=2, frame=(3, 3)))
    assert other.layout.frame == (3, 3) and not other.projected().any()
    assert other.read("crop", 0, 5).shape == (5, 2, 3, 3, 3)


def test_removing(group: Any) -> None:
    Winners.remove(group)  # nothing is there
    group.create_array("score", data=np.ones(3))
    Winners.create(group, LAYOUT).write(0, block(LAYOUT, 5))
    Winners.remove(group)
    assert set(dict(group.members())) == {"score"}
    assert dict(group.attrs) == {"settled": 9}
    with pytest.raises(KeyError):
        Winners(group)


def test_a_removal_that_was_cut_short_is_finished_by_the_next(group: Any) -> None:
    Winners.create(group, LAYOUT)
    del group.attrs["winners"]
    Winners.remove(group)
    assert dict(group.members()) == {}


def test_messages(group: Any, tmp_path: Path) -> None:
    winners = Winners.create(group, LAYOUT)
    with pytest.raises(MaxactError, match="list: has no projection/deconvnet; it has box, focus_box, "):
        winners.read("projection/deconvnet", 0, 1)
    winners.write(0, block(LAYOUT, 5))
    for chunk in (tmp_path / "x" / "list" / "crop" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"half")
    with pytest.raises(MaxactError, match="list/crop: is missing or damaged; project again"):
        winners.read("crop", 0, 1)
