"""What a second pass has done so far, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from maxact.errors import MaxactError
from maxact.ledger import Ledger
from maxact.partial import BadImage


def test_a_round_through_the_file(tmp_path: Path) -> None:
    path = tmp_path / "projected.json"
    assert Ledger.load(path) is None
    ledger = Ledger({"ranks": 9, "methods": ["guided"]})
    ledger.add("bn1/max/top", [4, 2])
    ledger.add("bn1/max/top", [2, 0])
    ledger.bad[7] = BadImage(7, "a.jpg", "project", "gone\n'\"")
    ledger.deviation, ledger.settled, ledger.whole = 1e-5, 0.25, ["bn1"]
    ledger.save(path)
    found = Ledger.load(path)
    assert found == ledger and found.done == {"bn1/max/top": [0, 2, 4]}
    assert [file.name for file in tmp_path.iterdir()] == ["projected.json"]
    assert found.facts() == {
        "ranks": 9,
        "methods": ["guided"],
        "deviation": 1e-5,
        "settled": 0.25,
        "whole": ["bn1"],
    }


def test_what_is_left() -> None:
    ledger = Ledger({})
    assert ledger.left("bn1/max/top", range(3)) == [0, 1, 2]
    ledger.add("bn1/max/top", [1])
    assert ledger.left("bn1/max/top", range(3)) == [0, 2]
    assert ledger.left("bn1/max/bottom", [1]) == [1]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"bad": []}', '{"bad": [{"image": 3}], "settings": {}}', "ÿ"]
)
def test_a_damaged_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "projected.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(MaxactError, match=r"projected\.json: is damaged .*; project again with --overwrite"):
        Ledger.load(path)
