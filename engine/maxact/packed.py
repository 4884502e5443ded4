"""What `maxact pack` leaves on disk, and how it is read: tar archives, an index beside each, and pack.json.

    pack.json              format, settings, images (the source), versions, finished, summary
    000000.tar             images in WebDataset's convention
    000000.tar.index       Parquet, one row for each image of the source that the archive stands for (SCHEMA)
    errors.parquet         the bad ones, as in a store
    run/                   the source's catalog, the lock and the log

With its index an archive is listed without reading its headers, under the keys that its images had in the source; an
archive whose index is left behind is an archive like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maxact import remote, urls
from maxact.archives import Row, arrow_file, exists, open_file, reading, show, status
from maxact.errors import MaxactError
from maxact.files import replace_file
from maxact.urls import is_remote

FORMAT = 1
BEGINNING = {"maxact": "pack", "format": FORMAT, "finished": False}  # of pack.json
PACK, ERRORS, SUFFIX = "pack.json", "errors.parquet", ".index"
# Number, key and label in the source's catalog, and where the image's bytes are in the archive; or why it is not
# there: stage and error, with offset and length 0.
SCHEMA = pa.schema(
    [
        ("image", pa.int64()),
        ("key", pa.string()),
        ("label", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)
_BYTES = b"maxact.bytes"  # metadata of an index: the length of its archive
_LONGEST = 1 << 20  # bytes of a pack.json: it holds a few paths
_ESCAPED = re.compile(r"\\(\\|[nrt]|x..|u....|U........)")


def rows(path: bytes) -> Iterator[Row] | None:
    """The images of an archive by its index; None where it has none.

    MaxactError: the pack that it belongs to is unfinished, or the archive is not the one that was indexed.
    """
    name = urls.beside(path, SUFFIX)
    if not exists(name):
        return None
    check_finished(urls.folder(path))
    index = load_index(path)
    if index is None:
        raise MaxactError(
            f"{show(path)} is not the archive that {show(name)} was made for: pack again, or delete that index"
        )
    return _rows(path, index)


def _rows(path: bytes, index: pa.Table) -> Iterator[Row]:
    with reading(path):
        _, modified = status(path)
    good = index.filter(pc.is_null(index["error"]))
    columns = (good[name].to_pylist() for name in ("key", "label", "offset", "length"))
    for key, label, offset, length in zip(*columns, strict=True):
        yield plain(key), plain(label), path, offset, length, modified


def load_index(path: bytes) -> pa.Table | None:
    """The index of an archive, columns as in SCHEMA; None where it or the archive is missing, or where they do not
    belong together. MaxactError: it is damaged."""
    name = urls.beside(path, SUFFIX)
    if not (exists(name) and exists(path)):
        return None
    with reading(name):
        table = pq.read_table(arrow_file(name))
        size = (table.schema.metadata or {}).get(_BYTES)
        if table.schema.remove_metadata() != SCHEMA or size is None or not _is_sound(table, int(size)):
            raise MaxactError(f"{show(name)} is damaged, or not what its name says: pack again, or delete it")
        return table if int(size) == status(path)[0] else None


def _is_sound(table: pa.Table, size: int) -> bool:
    """Whether an index has words for every image, and places that lie in an archive of so many bytes."""
    table.validate(full=True)  # ArrowInvalid: text that is no UTF-8
    if any(table[name].null_count for name in ("image", "key", "label", "offset", "length")):
        return False
    good = table.filter(pc.is_null(table["error"]))
    if not len(good):
        return True
    least, longest = pc.min(good["offset"]).as_py(), pc.max(good["length"]).as_py()
    last = np.max(good["offset"].to_numpy().astype(object) + good["length"].to_numpy().astype(object))
    return bool(least >= 512 and pc.min(good["length"]).as_py() >= 0 and longest <= size and last <= size)


def write_index(path: Path, images: Sequence[dict[str, Any]]) -> None:
    """Writes the index of the archive at `path`, all or nothing: what makes the archive count. OSError."""
    schema = SCHEMA.with_metadata({_BYTES: str(path.stat().st_size).encode()})
    table = pa.Table.from_pylist(images, schema=schema)

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            pq.write_table(table, file, compression="zstd")

    replace_file(path.with_name(path.name + SUFFIX), write)


def read_pack(folder: bytes) -> dict[str, Any] | None:
    """What a folder's pack.json says; None where it is no pack. MaxactError: it is one of another format."""
    path = urls.inside(folder, PACK)
    if not exists(path):
        return None
    try:
        with reading(path), open_file(path, _LONGEST) as file:
            raw = file.read(_LONGEST + 1)
        about = json.loads(raw) if len(raw) <= _LONGEST else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or about.get("maxact") != "pack":
        return None
    if about.get("format") != FORMAT:
        raise MaxactError(
            f"{show(path)}: expected a pack of format {FORMAT}, got {about.get('format')!r}; "
            "read it with the version of maxact that wrote it"
        )
    if not _can_be(about):
        raise MaxactError(f"{show(path)} is damaged: delete it, and pack again")
    return about


def _can_be(about: dict[str, Any]) -> bool:
    """Whether the parts of a pack.json are of their kinds; one that is being started anew has few of them."""
    settings, images, summary = (about.get(name) for name in ("settings", "images", "summary"))
    whole = isinstance(settings, dict) and isinstance(images, dict) and {"count", "packed"} <= images.keys()
    if settings is not None:
        whole = whole and type(settings.get("short_side")) is int
    if about.get("finished"):
        counts = ("images", "packed", "bad", "archives", "bytes")
        whole = whole and isinstance(summary, dict) and all(type(summary.get(name)) is int for name in counts)
    return isinstance(about.get("finished"), bool) and (whole or (settings is None and not about["finished"]))


def check_finished(folder: bytes, whole: bool = False) -> None:
    """Raises MaxactError where a folder is an unfinished pack: half of the images would go for all of them.

    whole: also where one of its archives is not there.
    """
    about = read_pack(folder)
    if about is None:
        return
    count = about["summary"]["archives"] if about["finished"] and whole else 0
    paths = [archive(folder, index) for index in range(count)]
    if not about["finished"] or not all((remote.ahead if is_remote(folder) else map)(exists, paths)):
        raise MaxactError(f"{show(folder)} is an unfinished pack: run the same `maxact pack` again to finish it")


def archive(folder: bytes, index: int) -> bytes:
    """The path of an archive of a pack."""
    return urls.inside(folder, f"{index:06}.tar")


def is_record(path: bytes) -> bool:
    """Whether a Parquet file is a pack's list of errors, and holds no images."""
    folder = urls.folder(path)
    return path == urls.inside(folder, ERRORS) and read_pack(folder) is not None


def describe(catalog: pa.Table) -> list[dict[str, Any]]:
    """What a store says of the packs that a catalog's images are in, `[]` where no pixels were repacked.

    For each its folder, its settings, its source and the versions that made it.
    """
    folders = sorted({urls.folder(path) for path in archives(catalog)})
    found = ((folder, read_pack(folder)) for folder in folders)
    parts = ("settings", "images", "versions")
    return [{"folder": show(folder)} | {part: about.get(part) for part in parts} for folder, about in found if about]


def archives(catalog: pa.Table) -> list[bytes]:
    """The tar archives that a catalog's images are in."""
    members = pc.and_(pc.greater(catalog["offset"], 0), pc.greater_equal(catalog["length"], 0))
    paths: list[bytes] = catalog["source"].filter(members).unique().to_pylist()
    return paths


def plain(text: str) -> str:
    """The inverse of `archives.printable`."""
    if "\\" not in text:
        return text
    return _ESCAPED.sub(lambda found: found[0].encode("ascii").decode("unicode_escape"), text)
