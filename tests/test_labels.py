"""Names of classes from the files that there are, and the characters of the built-in font."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import ImageFont

from maxact.errors import MaxactError
from maxact.render.labels import plain, read_label_names

TENCH = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n", TENCH),
        (
            "windows.txt",
            "\ufeffn01440764 tench\r\n\r\nn01443537  gold  fish\r\n",
            {"n01440764": "tench", "n01443537": "gold fish"},
        ),
        ("names.csv", 'n01440764,"tench, Tinca tinca"\nn01443537,"goldfish, Carassius auratus"\n', TENCH),
        ("names.csv", "0;tench\n1;gold fish\n", {"0": "tench", "1": "gold fish"}),
        ("names.tsv", "a b\ttench, fish\nc d\tgoldfish\n", {"a b": "tench, fish", "c d": "goldfish"}),
        ("tabs.txt", "0\ttench, Tinca tinca\n1\tgoldfish\n", {"0": "tench, Tinca tinca", "1": "goldfish"}),
        ("commas.txt", "0,great white shark\n1,tench\n", {"0": "great white shark", "1": "tench"}),
        ("plain.json", json.dumps(TENCH), TENCH),
        ("braces.txt", json.dumps(TENCH), TENCH),
        (
            "imagenet_class_index.json",
            '{"0": ["n01440764", "tench"], "2": ["n01484850", "great_white_shark"]}',
            {"0": "tench", "n01440764": "tench", "2": "great white shark", "n01484850": "great white shark"},
        ),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str, expected: dict[str, str]) -> None:
    (tmp_path / name).write_text(text, newline="")
    assert read_label_names(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.txt", b"n01440764 tench\nn01443537\n", r"x\.txt: line 2: expected a code and words, got 'n01443537'"),
        ("x.csv", b"0,tench\n\n1,gold,fish\n", r"x\.csv: line 3: expected a code and words"),
        ("x.csv", b"0,\n", "line 1: expected a code and words"),
        ("x.txt", b" \n\n", r"x\.txt: names no class; expected lines"),
        ("x.json", b"{", r"x\.json: is not JSON \(Expecting property name"),
        ("x.json", b"[1, 2]", "expected a JSON object {code: words}, got list"),
        ("x.json", b'{"0": 7}', "'0': expected words or \\[code, words\\], got 7"),
        ("x.json", b'{"0": ["a", "b", "c"]}', "'0': expected words or"),
        ("x.txt", b"\xff\xfe\x00", r"x\.txt: is not UTF-8 text"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MaxactError, match=says) as caught:
        read_label_names(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MaxactError, match=r"none\.txt: cannot be read \(No such file or directory\)"):
        read_label_names(tmp_path / "none.txt")
    with pytest.raises(MaxactError, match="Is a directory"):
        read_label_names(tmp_path)


def test_plain_is_what_the_font_has() -> None:
    font = ImageFont.load_default(20)
    lacking = bytes(font.getmask("\uffff"))
    every = "".join(map(chr, range(32, 0x3000)))
    shown = plain(every)
    assert all(bytes(font.getmask(character)) != lacking for character in set(shown) - {" "})
    assert (
        plain("Löwe \N{EN DASH} crème  brûlée 3\N{MULTIPLICATION SIGN}3\nStraße") == "Lowe - creme brulee 3x3 Strasse"
    )
    assert plain("tench · 中") == "tench · ?"
