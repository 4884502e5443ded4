"""A store as Parquet, for DuckDB, pandas, Polars and whatever else reads tables: its lists as one file, and the values
of every image as a file for each tap and shard."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maxact.archives import reading
from maxact.choose import choose_taps
from maxact.dense import file_name, place, size
from maxact.errors import MaxactError
from maxact.files import is_aside, replace_file, writing
from maxact.pooled import Pooled
from maxact.results import TapResults
from maxact.store import Store

_WORD = pa.dictionary(pa.int32(), pa.string())
_COLUMNS = (
    ("tap", _WORD, "where in the network: the path of the module whose output was recorded"),
    ("channel", pa.int32(), "the channel of the tap, from 0"),
    ("score", _WORD, "what ranks an image in a channel: max or mean over its positions"),
    ("end", _WORD, "top: highest first; bottom: lowest first"),
    ("rank", pa.int32(), "the place in the list, from 0"),
    ("value", pa.float32(), "the score"),
    ("row", pa.int32(), "row of the peak in the tap's map; null for mean"),
    ("column", pa.int32(), "column of the peak in the tap's map; null for mean"),
    ("image", pa.int64(), "the image's number in the catalog"),
    ("key", _WORD, "the image's key in the catalog"),
    ("label", _WORD, "the image's label in the catalog"),
)
SCHEMA = pa.schema([pa.field(name, kind, metadata={"description": text}) for name, kind, text in _COLUMNS])
_SORTED_BY = ("tap", "channel", "score", "end", "rank")
_GROUP = 64 << 20  # bytes of values in a row group, at most
_ABOUT = b"maxact"  # the key of a file's metadata that says what it was made from


def export(store: Store | str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Writes one row for every tap, channel, score, end and filled rank; gives the number of rows.

    Sorted by tap (by name), channel, score, end and rank, and the file says so; one row group per tap, which is all
    that is in memory at a time. The file is there whole or not at all. An unfinished store gives its last commit.
    Raises MaxactError where the file cannot be written.
    """
    store = store if isinstance(store, Store) else Store(store)
    order = [pq.SortingColumn(SCHEMA.get_field_index(name)) for name in _SORTED_BY]
    rows = 0

    def write(aside: Path) -> None:
        nonlocal rows
        with (
            open(aside, "wb") as file,  # Arrow itself takes no path that is not UTF-8
            pq.ParquetWriter(file, SCHEMA, compression="zstd", sorting_columns=order) as writer,
        ):
            for name in sorted(store):
                table = _rows(store, store[name])
                writer.write_table(table, row_group_size=max(1, len(table)))
                rows += len(table)

    if os.path.exists(out) and not os.path.isfile(out):
        raise MaxactError(f"{out}: is not a file; name the Parquet file to write")
    with writing(out):
        replace_file(Path(out), write)
    return rows


def _rows(store: Store, results: TapResults) -> pa.Table:
    """The rows of one tap, sorted."""
    parts = []
    for (score, end), (image, value, position) in results.lists.items():
        channel, rank = np.nonzero(image >= 0)
        count = len(channel)
        place = position[channel, rank] if position is not None else np.zeros((count, 2), np.int32)
        absent = np.full(count, position is None)
        parts.append(
            pa.table(
                {
                    "tap": pa.array([results.tap.name] * count, pa.string()),
                    "channel": pa.array(channel, pa.int32()),
                    "score": pa.array([score] * count, pa.string()),
                    "end": pa.array([end] * count, pa.string()),
                    "rank": pa.array(rank, pa.int32()),
                    "value": pa.array(value[channel, rank]),
                    "row": pa.array(place[:, 0], mask=absent),
                    "column": pa.array(place[:, 1], mask=absent),
                    "image": pa.array(image[channel, rank]),
                }
            )
        )
    table = pa.concat_tables(parts).sort_by([(name, "ascending") for name in _SORTED_BY])
    named = store.catalog.table.take(table["image"])
    for column in ("key", "label"):
        table = table.append_column(column, named[column])
    return table.cast(SCHEMA)


def export_pooled(
    store: Store | str | os.PathLike[str],
    out: str | os.PathLike[str],
    layers: Sequence[str] = (),
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes every image's value of every channel (`Store.pooled`) into the folder `out`; gives the number of files.

    `out/images.parquet` has image, key and label; `out/tap=NAME/part-00000.parquet` the values of one tap and one shard
    of the catalog: image and a column for each channel, `c0` and on, float16, null where there is no value. What is
    there already from the same store stays, so that what was cut short goes on; each file is there whole or not at all.
    Of an unfinished store the shards of its last commit. In memory are a shard's values of one tap, or 64 MB of them.

    layers: which taps (`choose.choose_taps`). report: called with how many files are there, and will be.
    Raises MaxactError where the store has no such values, or `out` holds something else or cannot be written.
    """
    store = store if isinstance(store, Store) else Store(store)
    folder = Path(out)
    taps = [store.pooled(tap) for tap in choose_taps(store, layers)]
    images = store.catalog.table.select(["image", "key", "label"])
    about = {part: getattr(store.manifest, part) for part in ("model", "preprocessing", "images", "settings")}
    about["catalog"] = _sha256(store.path / "images.parquet")
    _check_folder(folder, about)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "images.parquet", about, images.schema, lambda writer: writer.write_table(images))
    committed = taps[0].done
    shards = [shard for shard in store.catalog.shards(store.shard) if committed is None or shard.index in committed]
    done, total = 0, len(taps) * len(shards)
    for pooled in taps:
        with writing(folder):
            part = folder / f"tap={quote(pooled.tap.name, safe='')}"
            part.mkdir(exist_ok=True)
            for shard in shards:
                _export_shard(pooled, part / f"part-{shard.index:05}.parquet", shard.start, shard.stop, about)
                done += 1
                report(done, total)
    return total + 1


def _export_shard(pooled: Pooled, path: Path, start: int, stop: int, about: dict[str, Any]) -> None:
    """The values of one tap and the images of one shard, unless they are there already."""
    source = pooled.path / place(pooled.tap.name, pooled.kind) / file_name(start // pooled.shard)
    found = source.stat() if source.exists() else None
    of = about | {"rows": [start, stop], "source": [found.st_size, found.st_mtime_ns] if found else None}
    if found and _about(path) == of:
        return
    channels = pooled.tap.channels
    names = [f"c{channel}" for channel in range(channels)]
    schema = pa.schema([("image", pa.int64()), *((name, pa.float16()) for name in names)])
    step = max(1, _GROUP // size(1, channels))

    def rows(writer: pq.ParquetWriter) -> None:
        for first in range(start, stop, step):
            last = min(stop, first + step)
            values = np.ascontiguousarray(pooled[first:last].T)  # [channels, images]: a column each
            each = [pa.array(column, from_pandas=True) for column in values]  # NaN as null: sums pass it by
            writer.write_table(pa.table([pa.array(np.arange(first, last)), *each], schema=schema), row_group_size=step)

    _write(path, of, schema, rows)


def _write(path: Path, about: dict[str, Any], schema: pa.Schema, rows: Callable[[pq.ParquetWriter], object]) -> None:
    """One file, whole or not at all; its metadata say what it was made from."""

    def write(aside: Path) -> None:
        kept = schema.with_metadata({_ABOUT: json.dumps(about)})
        with (
            open(aside, "wb") as file,  # Arrow itself takes no path that is not UTF-8
            pq.ParquetWriter(file, kept, compression="zstd", use_dictionary=["label"]) as writer,
        ):
            rows(writer)

    replace_file(path, write)


def _sha256(path: Path) -> str:
    with reading(os.fsencode(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _about(path: Path) -> Any:
    """What a file that `_write` wrote was made from; None where there is no such file. Raises MaxactError where it
    cannot be read."""
    if not path.exists():
        return None
    with reading(os.fsencode(path)):
        metadata = pq.read_schema(pa.OSFile(os.fsencode(path))).metadata or {}
        return json.loads(metadata.get(_ABOUT, b"null"))


def _check_folder(folder: Path, about: dict[str, Any]) -> None:
    """Raises MaxactError where a folder holds anything but the beginnings of the same export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise MaxactError(f"{folder}: is not a folder; name one for the files of --pooled")
    others = [item for item in folder.iterdir() if not is_aside(item)]
    if others and _about(folder / "images.parquet") != about:
        raise MaxactError(f"{folder}: there is something else here; choose another place for the files of --pooled")
