"""What there is to say of a store: finished, unfinished, not begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import maxact
from maxact import schedule
from maxact.info import describe
from stores import interrupted, scan


def strictly(facts: dict[str, Any]) -> Any:
    """Through JSON as the standard has it: without NaN."""
    return json.loads(json.dumps(facts, allow_nan=False))


def test_a_finished_store(finished: maxact.Store) -> None:
    facts = strictly(describe(finished))
    assert facts["store"] == str(finished.path)
    assert (facts["finished"], facts["format"]) == (True, 1)
    assert facts["summary"] == {"images": 21, "scanned": 21, "bad": 0, "grey": 0}
    assert facts["model"]["name"] == "tiny:network" and facts["settings"]["bottom"] == 3
    assert facts["images"]["count"] == 21 and "torch" in facts["versions"]
    assert facts["errors"] == []
    first, _, last = facts["taps"]
    assert {name: first[name] for name in ("tap", "layer", "kind", "channels", "map", "dead", "unfit")} == {
        "tap": "bn1",
        "layer": "conv1",
        "kind": "Conv2d",
        "channels": 6,
        "map": "32 x 32",
        "dead": 0,
        "unfit": 0,
    }
    assert last["map"] == "1 x 1"
    stats = finished["bn1"].stats
    assert first["highest"] == pytest.approx(stats["max"].max()) and 0 < first["active"] < 1
    assert first["mean"] == pytest.approx(stats["mean"].mean())


def test_an_unfinished_store(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)
    shutil.copytree(photos, tmp_path / "photos")
    (path,) = (tmp_path / "photos").rglob("000.jpg")
    path.write_bytes(path.read_bytes()[:-2])

    interrupted(tmp_path / "photos", tmp_path / "x")
    store = maxact.open(tmp_path / "x")
    state = store.state()
    assert state is not None
    facts = strictly(describe(store))
    shards = len(state.shards)
    assert facts["summary"] == f"unfinished: {4 * shards} of 21 images, {shards} of 6 shards"
    assert facts["taps"][0]["dead"] == 0
    (error,) = facts["errors"]
    assert error["key"] == "astronaut/000.jpg" and error["stage"] == "decode"


def test_a_store_without_a_commit(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", limit=2)
    store.reopen()
    facts = strictly(describe(store))
    assert facts["summary"] == "unfinished: 0 of 2 images, 0 of 1 shards"
    assert [tap["tap"] for tap in facts["taps"]] == ["bn1", "bn2", "fc"]
    assert "mean" not in facts["taps"][0] and facts["errors"] == []


def test_a_tap_that_never_had_a_number(photos: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            nn.init.constant_(self.conv.weight, torch.nan)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(images)
            return result

    (tap,) = strictly(describe(scan(photos, tmp_path / "x", Broken(), limit=2, crop=16)))["taps"]
    assert (tap["mean"], tap["active"], tap["highest"], tap["dead"], tap["unfit"]) == (None, None, None, 2, 4)


def test_a_channel_that_never_had_a_number(photos: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            nn.init.zeros_(self.conv.weight)
            self.conv.bias.data[:] = torch.tensor([1.0, torch.nan, 3.0, -1.0])  # type: ignore[union-attr]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(images)
            return result

    (tap,) = strictly(describe(scan(photos, tmp_path / "x", Broken(), limit=2, crop=16)))["taps"]
    assert (tap["mean"], tap["active"], tap["highest"]) == (1, pytest.approx(2 / 3), 3)
    assert (tap["dead"], tap["unfit"]) == (2, 2)
