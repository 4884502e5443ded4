"""How a store was made: written, read, compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maxact.errors import MaxactError
from maxact.manifest import FORMAT, Manifest, shorten
from maxact.tap import Tap

TAP = Tap("bn1", "bn1", 0, "conv1", "Conv2d", 6, (32, 32), 1)
MANIFEST = Manifest(
    model={"name": "resnet18", "weights": "none (random)", "sha256": "00ff"},
    preprocessing={"resize": 256, "crop": (224, 224), "mean": (0.5, 0.5, 0.5)},
    images={"source": "/data", "where": [], "limit": None, "count": 10},
    settings={
        "scores": ("max", "mean"),
        "top": 5,
        "bottom": 0,
        "batch": 2,
        "compile": False,
        "pooled": None,
        "hardware_share": None,
    },
    taps=(TAP,),
    versions={"torch": "2.15"},
)


def test_it_comes_back_from_json() -> None:
    values = json.loads(json.dumps(MANIFEST.to_json()))
    back = Manifest.from_json(values, Path("x"))
    assert back.taps == MANIFEST.taps
    assert back.differences(MANIFEST) == MANIFEST.differences(back) == []  # tuples and lists are the same
    assert json.loads(json.dumps(back.to_json())) == values
    assert not back.finished and back.format == FORMAT


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("model", {"sha256": "11ee"}, "sha256: 00ff, not 11ee"),
        ("preprocessing", {"crop": (224, 192)}, "crop: [224, 224], not [224, 192]"),
        ("images", {"limit": 4, "count": 4}, "limit: null, not 4; count: 10, not 4"),
        ("settings", {"new": 1}, "new: null, not 1"),
        ("taps", (TAP, TAP), "taps: 1, not 2 or in other places"),
        ("taps", (replace(TAP, map=(16, 16)),), "taps: 1, not 1 or in other places"),
        ("versions", {"torch": "3.0"}, ""),
        ("finished", True, ""),
    ],
)
def test_differences_are_named(part: str, changes: Any, named: str) -> None:
    new = getattr(MANIFEST, part) | changes if isinstance(changes, dict) else changes
    assert "; ".join(MANIFEST.differences(replace(MANIFEST, **{part: new}))) == named


def test_lists() -> None:
    assert MANIFEST.lists() == [("max", "top"), ("mean", "top")]
    both = replace(MANIFEST, settings=MANIFEST.settings | {"scores": ["mean"], "bottom": 2})
    assert both.lists() == [("mean", "top"), ("mean", "bottom")]


def test_another_format_is_refused() -> None:
    values = MANIFEST.to_json() | {"format": 7}
    with pytest.raises(MaxactError, match=r"^a\.zarr: expected a store of format 1, got 7; read it with the version"):
        Manifest.from_json(values, Path("a.zarr"))


@pytest.mark.parametrize("change", [{"taps": None}, {"taps": [{"name": "bn1"}]}, {"unknown": 1}, {"taps": [{}]}])
def test_a_damaged_one_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MaxactError, match=r"^a\.zarr: its attribute maxact is damaged"):
        Manifest.from_json(MANIFEST.to_json() | change, Path("a.zarr"))


def test_shorten() -> None:
    assert shorten("a" * 60) == "a" * 60
    assert shorten("a" * 61) == "a" * 57 + "..."
    assert shorten([1, None]) == "[1, null]"
