"""Files here and far away, and tar archives that hold encoded images: indexed once, then read image by image.

Nothing in an archive is ever unpacked; the names of its members are used as keys and labels only.
"""

import io
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import BinaryIO, cast

import pyarrow as pa

from maxact import limits, remote
from maxact.errors import MaxactError
from maxact.limits import Headers
from maxact.parts import Parts
from maxact.urls import is_remote

# key, label, source (absolute path, or URL), offset, length, modification time in nanoseconds
Row = tuple[str, str, bytes, int, int, int]

BLOCK = 512  # a tar archive is made of these
OPEN_ARCHIVES = 64
FAR_BLOCK = 4 << 20  # bytes asked of a server at a time where a file is read from its beginning

# What readers raise for files that lie
DAMAGE = (
    *(pa.ArrowException, tarfile.TarError),
    *(ValueError, LookupError, ArithmeticError, RecursionError, MemoryError),
)


class Changed(Exception):
    """A file is not the one that was catalogued: its length or its modification time differs."""


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """The name with all that does not print escaped, so that no two names become one: a backslash is doubled."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(
        letter if letter.isprintable() and letter != "\\" else letter.encode("unicode_escape").decode()
        for letter in name
    )


def show(path: bytes) -> str:
    return printable(text(path))


def suffix(name: str) -> str:
    """What follows the last dot of the last component, in lower case; "" where there is none."""
    _, dot, end = name.rpartition("/")[2].rpartition(".")
    return end.lower() if dot else ""


@contextmanager
def reading(path: bytes) -> Iterator[None]:
    """MaxactError, one line with the path, for what goes wrong in reading it."""
    try:
        yield
    except OSError as error:
        raise MaxactError(f"cannot read {show(path)}: {error.strerror or error}") from None
    except DAMAGE as error:
        reason = printable(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise MaxactError(f"{show(path)} is damaged, or not what its name says: {reason}") from None


# Files here and far away


def open_file(path: bytes, whole: int = 0) -> BinaryIO:
    """A file to read from its beginning. At a URL one of at most `whole` bytes is read at once, so that no server needs
    to send parts of it. OSError."""
    if not is_remote(path):
        return open(path, "rb")
    file = remote.File(path)
    if file.status.size <= whole:
        return io.BytesIO(file.whole())
    return cast(BinaryIO, io.BufferedReader(file, FAR_BLOCK))


def arrow_file(path: bytes) -> pa.NativeFile:
    """A file as Arrow reads it. OSError."""
    return pa.PythonFile(remote.File(path), "r") if is_remote(path) else pa.OSFile(path)


def status(path: bytes) -> tuple[int, int]:
    """Size and modification time in nanoseconds (`remote.Status`). OSError."""
    if is_remote(path):
        far = remote.stat(path)
        return far.size, far.modified
    near = os.stat(path)
    return near.st_size, near.st_mtime_ns


def exists(path: bytes) -> bool:
    """MaxactError: the server cannot be asked."""
    if not is_remote(path):
        return os.path.exists(path)
    with reading(path):
        return remote.exists(path)


def read_far(path: bytes, length: int, modified: int) -> bytes:
    """A file of `length` bytes at a URL, in one request. OSError, Changed (`unchanged`)."""
    got = remote.read(path, None, length)
    if got.size not in (None, length):
        raise Changed(f"changed: {show(path)} has {got.size} bytes, but had {length} when it was catalogued")
    return unchanged(got, path, length, modified)


def unchanged(got: remote.Got, path: bytes, length: int, modified: int) -> bytes:
    """What was read of a file at a URL. Changed: the answer says that the file has another `modified`
    (`remote.Status`) than it had when it was catalogued; a web server that says neither time nor ETag can only be
    found to have a file of another length."""
    if got.modified not in (None, modified):
        raise Changed(f"changed: {show(path)} was modified after it was catalogued")
    if len(got.data) < length:
        raise Changed(f"changed: {show(path)} ends inside an image")
    return got.data


# Tar archives


def tar_rows(path: bytes, key: str, suffixes: frozenset[str]) -> Iterator[Row]:
    """The image members of an uncompressed archive.

    WebDataset's convention: members in a row that are named alike up to the first dot are one sample, and its member
    `.cls` holds the label. Without one the label is the name of the member's folder.
    """
    with reading(path):
        size, modified = status(path)
        with open_file(path) as file:
            if size == 0:
                raise MaxactError(f"{show(path)} is empty")
            if _compressed(file.read(6)):
                raise MaxactError(f"{show(path)} is compressed, so its images cannot be read one by one: decompress it")
            file.seek(0)
            headers = cast(BinaryIO, Headers(file))
            with tarfile.open(fileobj=headers, mode="r:", errors="surrogateescape", encoding="utf-8") as archive:
                for sample, group in groupby(_members(archive), key=lambda member: _sample(member.name)):
                    members = list(group)
                    classes = {
                        member.name[:-4]: _class(archive, member) for member in members if member.name.endswith(".cls")
                    }
                    for member in members:
                        if suffix(member.name) in suffixes:
                            _refuse_indirect(member, path)
                            label = classes.get(member.name.rpartition(".")[0], classes.get(sample))
                            if label is None:
                                label = member.name.rpartition("/")[0].rpartition("/")[2].lstrip(".")
                            yield (
                                f"{key}/{member.name}",
                                label,
                                path,
                                member.offset_data,
                                member.size,
                                modified,
                            )
                # tarfile takes a damaged header for the end of the archive.
                file.seek(archive.offset)
                if file.read(BLOCK).strip(b"\0"):
                    raise MaxactError(f"{show(path)} is damaged at byte {archive.offset}: no member starts there")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members but for folders and hidden ones."""
    for member in limits.members(archive):
        hidden = any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/"))
        if not hidden and not member.isdir():
            yield member


def _sample(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _class(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member) if member.isreg() else None
    return text(file.read(1024)).strip() if file else ""


def _refuse_indirect(member: tarfile.TarInfo, path: bytes) -> None:
    if member.issparse() or not member.isreg():
        raise MaxactError(
            f"{show(path)} holds {printable(member.name)} as a link or with holes: make the archive again with "
            "tar --dereference --hard-dereference and without --sparse"
        )


def _compressed(start: bytes) -> bool:
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


class _Open:
    """A file descriptor that closes with the last reference, so that dropping it never cuts off a reader."""

    def __init__(self, path: bytes) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class TarReader:
    """Reads members by their place; the archives used last stay open. For many threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[bytes, _Open] = OrderedDict()
        self._parts = Parts()

    def read(self, path: bytes, offset: int, length: int, modified: int) -> bytes:
        """OSError; Changed: the archive is not the one that was indexed."""
        if is_remote(path):
            return unchanged(self._parts.read(path, offset, length), path, length, modified)
        with self._lock:
            archive = self._open.get(path)
            if archive is not None:
                self._open.move_to_end(path)
        if archive is None:
            archive = _Open(path)  # outside the lock: a slow mount must not hold up the others
            with self._lock:
                self._open[path] = archive
                if len(self._open) > OPEN_ARCHIVES:
                    self._open.popitem(last=False)
        try:
            if os.fstat(archive.fd).st_mtime_ns != modified:
                raise Changed(f"changed: {show(path)} was modified after it was catalogued")
            data = os.pread(archive.fd, length, offset)
            while len(data) < length:
                more = os.pread(archive.fd, length - len(data), offset + len(data))
                if not more:
                    raise Changed(f"changed: {show(path)} ends inside an image")
                data += more
            return data
        except (OSError, Changed):
            with self._lock:  # so that a retry opens what is there by then
                self._open.pop(path, None)
            raise

    def close(self) -> None:
        self._parts.close()
        with self._lock:
            self._open.clear()
