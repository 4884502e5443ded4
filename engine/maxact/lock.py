"""Whose a folder is: a store, or free to become one, and held by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maxact.arrays import read_manifest
from maxact.errors import MaxactError
from maxact.files import leftovers, writing

log = logging.getLogger("maxact")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # what network file systems without locks say


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the store at `path` for one run: see `hold`. Raises MaxactError where there is something that is no
    store."""
    check_place(path)
    with hold(path):
        yield


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Holds a folder for one run, by a file in it. The system lets go when the process ends, however it does.

    Raises MaxactError where another process holds it. A file system that has no locks is only warned of.
    """
    folder = path / "run"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "lock", "ab+", buffering=0, opener=_no_link)  # noqa: SIM115 (open as long as it is held)
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read(200).decode(errors="backslashreplace").strip() or "another process"
            raise MaxactError(f"{path}: in use by {holder}; wait for it or stop it first") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: cannot be locked here; see to it that no second run uses it", path)
        with writing(path):
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _no_link(path: str, flags: int) -> int:
    """Opens a file, but not what a link leads to: the lock is truncated."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def check_place(folder: Path) -> None:
    """Raises MaxactError where a folder holds anything but a store, or the beginnings of one."""
    if not os.path.exists(folder):
        return
    if not folder.is_dir():
        raise MaxactError(f"{folder}: is a file, not a folder; choose another place for the store")
    if (folder / "zarr.json").exists():
        read_manifest(folder)
        return
    with writing(folder):
        run = folder / "run"
        begun = [*run.iterdir()] if run.is_dir() else []
        # where nobody has begun a store, images.parquet is a file of the user's
        ours = {"run", "images.parquet"} if run / "lock" in begun else {"run"}
        others = [item for item in folder.iterdir() if item.name not in ours]
        others += [item for item in begun if item.name not in ("lock", "log") and not is_state(item)]
    if leftovers(others) != others:
        raise MaxactError(f"{folder}: there is something else here; choose another place for the store")


def is_state(path: Path) -> bool:
    return path.name.startswith("state-") and path.name[6:].isdecimal()
