"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from maxact.errors import MaxactError

_SYNCING = 16  # files at a time


@contextmanager
def writing(path: str | os.PathLike[str], advice: str | None = None) -> Iterator[None]:
    """Inside, what the system refuses is a MaxactError that names `path` and gives advice."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # Arrow's own text is a paragraph
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        usual = f"make {'its folder first,' if missing else 'room there'} or choose another place"
        raise MaxactError(f"{path}: cannot be written ({reason}); {advice or usual}") from error


def replace_file(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Puts what `write` writes at `path`: written aside, synced, renamed, the folder synced.

    Cut short at any point, the file at `path` is the old one or the new one. Nothing is left aside on an error.
    `shared`: another process may be writing the same file, so the one aside has a name that no other has.
    """
    if path.name in ("", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    aside = path.with_name(f".{path.name}.{uuid4().hex}.part" if shared else f".{path.name}.part")
    if aside.is_symlink():  # or what is written would land where somebody else wants it
        aside.unlink()
    try:
        write(aside)
        sync_file(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Puts plain values at `path`, for people too. Raises MaxactError where that cannot be done."""
    with writing(path):
        replace_file(path, lambda aside: aside.write_text(json.dumps(values, indent=2) + "\n"))


def is_aside(path: Path) -> bool:
    """Whether a file is what a write that was cut short left: one of `replace_file`'s, or one of Zarr's."""
    return (path.name.startswith(".") and path.suffix == ".part") or path.suffix == ".partial"


def leftovers(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` that writes that were cut short left. A folder may bear such a name: that of a module."""
    return [path for path in paths if is_aside(path) and path.is_file()]


def sync_tree(path: Path) -> None:
    """Makes every file in a folder, and in those below it, survive a loss of power: many at a time, for a disk makes
    many safe in about the time of one."""
    found = list(os.walk(path))
    with ThreadPoolExecutor(_SYNCING, "maxact-sync") as pool:
        for _ in pool.map(sync_file, (Path(folder, name) for folder, _, names in found for name in names)):
            pass
        for _ in pool.map(sync_folder, (Path(folder) for folder, *_ in found)):
            pass


def sync_file(path: Path) -> None:
    """Makes what is in a file survive a loss of power."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a loss of power."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
