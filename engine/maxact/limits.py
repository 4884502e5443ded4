"""How much is taken from a file that may come from anywhere: what is beyond is a bomb, or no file of its kind."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol, TypeVar

LONGEST = 4096  # characters of a key or a label: a path has no more
LINE = 1 << 17  # characters of a line in a list, as many as Python's CSV reader takes in a column
LARGEST = 1 << 30  # bytes of an encoded image
NAMES = 100_000  # that braces may stand for
DEEP = 200  # folders in folders
LIST = 256 << 20  # bytes of a list at a URL that is kept in memory: a larger one is read in parts
PAGE = 64 << 20  # bytes of a page that a web server shows for a folder
_HEADER = 1 << 16  # bytes that one member of a tar archive says of itself

Line = TypeVar("Line", str, bytes, covariant=True)

_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?[0-9]+)?\}")


class _Lines(Protocol[Line]):
    def readline(self, size: int, /) -> Line: ...


def lines(file: _Lines[Line]) -> Iterator[Line]:
    """The lines of a file. ValueError: one is too long to be a path."""
    number = 0
    while line := file.readline(LINE):
        number += 1
        if len(line) == LINE and line[-1:] not in ("\n", b"\n", "\r", b"\r"):
            raise ValueError(f"line {number} has more than {LINE:,} characters")
        yield line


def check_ranges(name: str) -> None:
    """ValueError: a range in braces, such as {0..999}, stands for too many names; they would be made all at once."""
    for start, stop in _RANGE.findall(name):
        if max(len(start), len(stop)) > 18 or abs(int(stop) - int(start)) >= NAMES:
            raise ValueError(f"{{{start[:20]}..{stop[:20]}}} stands for more than {NAMES:,} names")


class Headers:
    """A tar archive as tarfile sees it: what it reads at a time is a header, or a piece of a short member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, none of which is kept. tarfile.ReadError, or nearly anything else, for headers that
    lie."""
    last = -1
    while member := archive.next():
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        if member.size < 0 or member.offset <= last:  # for ever
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        last = member.offset
        member.pax_headers = {}  # each has a copy of the whole archive's
        yield member
