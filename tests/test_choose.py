"""What is drawn: channels, taps, and the names of files."""

from __future__ import annotations

import pytest

import maxact
from maxact.choose import choose_taps, file_names, parse_channels
from maxact.errors import UsageError


@pytest.mark.parametrize(
    ("text", "channels"),
    [
        ("171", [171]),
        ("0-3,171", [0, 1, 2, 3, 171]),
        (" 5 , 2 - 4,3", [2, 3, 4, 5]),
        ("7-7", [7]),
    ],
)
def test_channels(text: str, channels: list[int]) -> None:
    assert parse_channels(text) == channels


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "-1", "1-", "1-2-3", "1.5", "٣", "0-9999999999"])
def test_no_channels(text: str) -> None:
    with pytest.raises(UsageError, match="channels: expected numbers and ranges such as 0-63,171, got"):
        parse_channels(text)


@pytest.mark.parametrize("text", ["5-4", "0-999999999"])
def test_ranges_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError, match=f"expected a range from low to high such as 0-63, got '{text}'"):
        parse_channels(f"3,{text}")


def test_taps(finished: maxact.Store) -> None:
    """By their own names and those of their layers, in the network's order."""
    assert choose_taps(finished) == ["bn1", "bn2", "fc"]
    assert choose_taps(finished, ["fc", "bn1"]) == ["bn1", "fc"]
    assert choose_taps(finished, ["bn*"]) == ["bn1", "bn2"]
    assert choose_taps(finished, ["conv2"]) == ["bn2"]
    assert choose_taps(finished, ["conv?", "fc"]) == ["bn1", "bn2", "fc"]
    with pytest.raises(UsageError, match=r"has no tap that matches 'bn3'; close to it: bn., bn. \(`maxact info` lists"):
        choose_taps(finished, ["fc", "bn3"])


def test_file_names_are_safe_and_unique() -> None:
    taps = [
        "features.0",
        "a:1",
        "a_1",
        "A:1",
        "a_1_2",
        "../etc",
        ".hidden",
        "x-y",
        "ü/ö",
        "n" * 300,
        "n" * 299,
        "Index",
    ]
    names = file_names(taps)
    assert list(names) == taps and names["features.0"] == "features.0"
    assert names["a:1"] == "a_1" and names["a_1"] == "a_1_2"
    assert len({name.lower() for name in names.values()} - {"index"}) == len(taps), "the list of them has that name"
    for name in names.values():
        assert 0 < len(name) < 140 and not name.startswith(".") and "/" not in name and "-" not in name
        assert name.isascii()
