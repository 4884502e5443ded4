"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maxact.errors import MaxactError
from maxact.files import is_aside, leftovers, replace_file, sync_tree, writing
from stores import names


def test_replace_file_makes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("first", "second"):
        replace_file(path, lambda aside, text=text: aside.write_text(text))
        assert path.read_text() == text
    assert names(tmp_path) == {"file"}


def test_an_error_leaves_the_old_file_and_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        assert is_aside(aside)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_nothing_is_visible_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(aside: Path) -> None:
        aside.write_text("half")
        assert not path.exists()
        aside.write_text("whole")

    replace_file(path, write)
    assert path.read_text() == "whole"


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MaxactError) as caught, writing(tmp_path / "x", "do that"):
        (tmp_path / "missing" / "x").write_text("")
    assert str(caught.value) == f"{tmp_path}/x: cannot be written (No such file or directory); do that"
    with pytest.raises(MaxactError, match="plain words"), writing(tmp_path):
        raise OSError("plain words")
    with pytest.raises(ValueError, match="not the system"), writing(tmp_path):
        raise ValueError("not the system")


def test_sync_tree_takes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_text(name)
    synced = []

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", fsync)
    sync_tree(tmp_path)
    assert sorted(synced) == sorted(str(tmp_path / name) for name in (".", "x", "a", "a/y", "a/b", "a/b/z"))


def test_is_aside() -> None:
    assert is_aside(Path(".state-3.part")) and is_aside(Path("zarr.0123abcd.partial"))
    assert not any(map(is_aside, map(Path, ("state-3", "zarr.json", "part", "notes.part", ".hidden"))))


def test_leftovers_are_files(tmp_path: Path) -> None:
    for name in (".state-3.part", "zarr.0123abcd.partial", "notes.part"):
        (tmp_path / name).touch()
    (tmp_path / "features.partial").mkdir()
    assert {path.name for path in leftovers(tmp_path.iterdir())} == {".state-3.part", "zarr.0123abcd.partial"}
