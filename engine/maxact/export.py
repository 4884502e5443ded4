"""A store as one Parquet file, for DuckDB, pandas, Polars and whatever else reads tables."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maxact.errors import MaxactError
from maxact.files import replace_file, writing
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
