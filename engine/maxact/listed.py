"""Lists of images, as text and as CSV: what their lines name, each as a row."""

import csv
import errno
import io
import os
from collections.abc import Iterable, Iterator
from itertools import chain

from maxact import limits, remote, urls
from maxact.archives import Row, open_file, reading, show, suffix, text
from maxact.errors import MaxactError
from maxact.urls import is_remote

MISSING = frozenset([errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG])


def rows(path: bytes, lines: Iterable[tuple[bytes, str | None]]) -> Iterator[Row]:
    """The rows of a list of paths, or URLs, and labels, None for the folder's name. At least one file must be there."""
    folder, far, lines = os.path.dirname(path) + b"/", is_remote(path), iter(lines)
    beginning = next(lines, None)
    if beginning is None:
        return

    def row(item: tuple[bytes, str | None]) -> Row:
        line, label = item
        key = text(line)
        if far or b"://" in line:
            source = urls.resolve(path, line)
            name = "".join(urls.names(text(source))[-2:-1]) if label is None and is_remote(source) else label
        else:
            source, name = line if line.startswith(b"/") else folder + line, label
        return key, parent(key, source) if name is None else name, source, 0, *length_and_modified(source)

    several = far or is_remote(beginning[0])
    exists = False
    for found in (remote.ahead if several else map)(row, chain([beginning], lines)):
        exists = exists or found[4] > 0 or found[5] != 0
        yield found
    if not exists:
        first = urls.resolve(path, beginning[0])
        if is_remote(first):
            with reading(first):  # says why
                remote.stat(first)
        raise MaxactError(
            f"none of the files that {show(path)} lists can be found, the first of them {show(first)}: relative paths "
            "start at the folder of the list"
        )


def parent(key: str, source: bytes) -> str:
    name = key.rpartition("/")[0].rpartition("/")[2]
    if name in ("", ".", ".."):
        name = text(os.path.basename(os.path.dirname(os.path.normpath(source))))
    return name


def text_lines(path: bytes) -> Iterator[tuple[bytes, None]]:
    with reading(path), open_file(path, limits.LIST) as file:
        for number, line in enumerate(limits.lines(file), start=1):
            line = line.rstrip(b"\r\n")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in line:
                raise MaxactError(f"{show(path)} is not a list of paths: line {number} holds a zero byte")
            if line and not line.isspace() and not line.startswith(b"#"):
                yield line, None


def csv_lines(path: bytes, images: frozenset[str]) -> Iterator[tuple[bytes, str | None]]:
    with (
        reading(path),
        open_file(path, limits.LIST) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        table = csv.reader(limits.lines(file), strict=True)
        try:
            header = next(table, [])
            names = [name.strip().lower() for name in header]
            if names and suffix(names[0]) in images:
                raise MaxactError(f"{show(path)} has no header: its first line must name its columns, as in path,label")
            column = names.index("path") if "path" in names else 0
            label = names.index("label") if "label" in names else None
            for row in table:
                if len(row) <= max(column, label or 0) and any(row):
                    raise MaxactError(f"{show(path)}, line {table.line_num}: {len(row)} columns are too few")
                if any(row) and not row[0].startswith("#") and row[column]:
                    where = row[column].encode("utf-8", "surrogateescape")
                    if b"\0" in where:
                        raise MaxactError(f"{show(path)}, line {table.line_num}: the path holds a zero byte")
                    yield where, None if label is None else row[label]
        except csv.Error as error:
            raise MaxactError(f"{show(path)}, line {table.line_num}: {error}") from None


def length_and_modified(path: bytes) -> tuple[int, int]:
    """Size and modification time in nanoseconds; 0 and 0 for a file that is missing, which reading reports as bad."""
    try:
        if b"://" in path and is_remote(path):
            return remote.stat(path)[:2]
        status = os.stat(path)
    except OSError as error:
        if error.errno in MISSING:
            return 0, 0
        # A mount that has gone away must not turn the rest of the list into missing files.
        raise MaxactError(f"cannot read {show(path)}: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns
