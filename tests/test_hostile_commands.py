"""The command line, given anything at all: it ends with 0, 1 or 2, and says what is wrong in one line."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import maxact
from hostile import ODD, fuzz
from maxact import cli
from stores import ARGUMENTS, scan

NUMBERS = (
    *(
        "",
        " ",
        "0",
        "1",
        "2",
        "-1",
        "3",
        "1e9",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "1e308",
        "1e-308",
        "0.5",
        "1_0",
        "\u0663",
    ),
    *(
        "100000",
        "2147483647",
        "2147483648",
        "9223372036854775808",
        "9" * 30,
        "-" + "9" * 30,
        "9" * 400,
        "9" * 5000,
        "0x10",
    ),
    *("8193", "100000x100000", "0x0", "-1x5", "1x", "x", "64X32", "9" * 4000 + "x1"),
)
WORDS = (
    *("", ".", "..", "-", "--", "~nobody", "*", "**", "[", "[!", "{", "{a,b", "{0..3}", "a,b", ",", ",,", "a:b", ":"),
    *(
        "0-5",
        "5-0",
        "0-",
        "0-99999999999",
        "1,,2",
        "none",
        "auto",
        "cpu",
        "cuda:99",
        "cuda:-1",
        "cpu:x",
        "vgg16,",
        "timm:",
        "timm:x",
    ),
    *(
        "x" * 300,
        "x" * 5000,
        "nul.pth",
        "x.safetensors",
        "photos",
        "x.zarr",
        "bn*",
        "fc",
        "x.png",
        "x.unknown",
        "/dev/null",
        "/dev/full/x",
    ),
    *(word for word in ODD if not word.startswith("/etc")),
)
# demo takes minutes; what comes after a bench began measures
COMMANDS: dict[str, list[str]] = {
    "layers": ["tiny:network"],
    "scan": ["tiny:network", "photos", "new.zarr", *ARGUMENTS, "--quiet"],
    "project": ["x.zarr", "--quiet"],
    "render": ["x.zarr", "out", "--quiet"],
    "export": ["x.zarr", "out.parquet"],
    "info": ["x.zarr"],
    "pack": ["photos", "packed", "--quiet"],
    "bench": ["tiny:network", "nowhere", "--quiet"],
}


def options(command: str) -> list[Any]:
    """The options of a command, as argparse has them."""
    (subcommands,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return [
        action for action in subcommands.choices[command]._actions if action.option_strings and action.dest != "help"
    ]


@pytest.fixture(scope="module")
def place(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(photos / "chelsea", folder / "photos" / "chelsea")
    store = scan(folder / "photos", folder / "x.zarr", layers=("bn2",), top=3)
    maxact.project(store, ranks=2, channels=[0, 1])
    return folder


def check(words: list[str], capfd: pytest.CaptureFixture[str]) -> int:
    """Runs a command; gives its code."""
    capfd.readouterr()
    try:
        code = cli.main(words)
    except SystemExit as end:
        assert end.code is None or isinstance(end.code, int)
        code = end.code or 0
    err = capfd.readouterr().err
    assert code in (0, 1, 2), (code, err)
    if code:
        assert err.startswith("maxact: ") and err.count("\n") == 1 and len(err) < 9000, err
        assert err[:-1].isprintable(), err
    assert "Traceback" not in err
    return code


value = st.sampled_from(NUMBERS) | st.sampled_from(WORDS)


@st.composite
def given_options(draw: st.DrawFn, command: str) -> list[str]:
    words = []
    for action in draw(st.lists(st.sampled_from(options(command)), min_size=1, max_size=2)):
        count = {None: 1, 0: 0}.get(action.nargs, action.nargs)
        pool = value | st.sampled_from(sorted(action.choices)) if action.choices else value
        words.append(action.option_strings[0])
        words += draw(st.lists(pool, min_size=count, max_size=count))
    return words


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
@fuzz(5)
@given(data=st.data())
def test_options_of_any_value(
    command: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.chdir(place)
    before = set(os.listdir(place))
    check([command, *COMMANDS[command], *data.draw(given_options(command))], capfd)
    _clear(place, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
@fuzz(4)
@given(data=st.data())
def test_arguments_of_any_value(
    command: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.chdir(place)
    before = set(os.listdir(place))
    words = list(COMMANDS[command])
    count = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
    # what OUT and STORE are called must stay in this folder, and a bench must not begin to measure
    pool = [word for word in WORDS if ".." not in word and (command != "bench" or not os.path.exists(word))]
    words[data.draw(st.integers(0, count - 1))] = data.draw(st.sampled_from(pool))
    check([command, *words], capfd)
    _clear(place, before)


@fuzz(20)
@given(
    st.lists(st.sampled_from([*COMMANDS, "--version", "--help", "-h", "--quiet", "--json", "--to", *WORDS]), max_size=4)
)
def test_words_in_any_order(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(place)
    before = set(os.listdir(place))
    check(words, capfd)
    _clear(place, before)


def _clear(place: Path, before: set[str]) -> None:
    for name in set(os.listdir(place)) - before:
        path = place / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


FOUND = {
    "a crop beyond measure": (
        ["layers", "tiny:network", "--crop", "100000"],
        "crop: expected height and width, 1 to 8,192 pixels",
    ),
    "a resize beyond measure": (["layers", "tiny:network", "--resize", "9" * 30], "resize: expected 1 to 8,192 pixels"),
    "a drawing of no kind": (
        ["layers", "tiny:network", "--draw", "bn1", "--out", "x.unknown"],
        "out: expected a file such as field.png",
    ),
    "a drawing without a name": (
        ["layers", "tiny:network", "--draw", "bn1", "--out", ""],
        "expected a file such as field.png",
    ),
    "an export without a name": (["export", "x.zarr", ""], "Is a directory"),
    "a line's end": (["info", "a\nb"], r"a\nb: not a maxact store"),
    "a line's end in an option": (["info", "x.zarr", "--a\nb"], r"unrecognized arguments: --a\nb"),
    "a mark that turns the line": (["info", "\u202egnp"], r"\u202egnp: not a maxact store"),
    "infinite megapixels": (
        ["pack", "photos", "packed", "--max-megapixels", "inf"],
        "max_megapixels: expected more than 0",
    ),
    "a million threads": (["pack", "photos", "packed", "--workers", "1000000"], "workers: expected 1 to 1024"),
}


@pytest.mark.parametrize("name", FOUND)
def test_mistakes_that_were_found(
    name: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, said = FOUND[name]
    monkeypatch.chdir(place)
    before = set(os.listdir(place))
    try:
        code = cli.main(words)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    err = capfd.readouterr().err
    assert code in (1, 2) and said in err and err.count("\n") == 1, err
    assert set(os.listdir(place)) == before


def test_label_names_of_one_long_line(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "names.csv").write_text("a," + "x" * 200_000)
    assert check(["render", "x.zarr", "out", "--label-names", "names.csv"], capfd) == 1
    (place / "names.csv").unlink()
