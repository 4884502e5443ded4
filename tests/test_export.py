"""The table of a store, read with whatever reads Parquet."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import maxact
from maxact.errors import MaxactError
from maxact.export import export
from stores import interrupted, names, scan

COLUMNS = ["tap", "channel", "score", "end", "rank", "value", "row", "column", "image", "key", "label"]
ROWS = 2 * (5 + 3) * (6 + 7 + 5)  # scores, ranks at both ends, channels


@pytest.fixture(scope="module")
def table(finished: maxact.Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out.parquet"
    assert export(finished, out) == ROWS
    return out


def test_columns_and_metadata(table: Path) -> None:
    file = pq.ParquetFile(table)
    schema = file.schema_arrow
    assert schema.names == COLUMNS
    word = "dictionary<values=string, indices=int32, ordered=0>"
    assert [str(field.type) for field in schema] == [
        *(word, "int32", word, word, "int32", "float", "int32", "int32", "int64", word, word)
    ]
    assert all(len(field.metadata[b"description"]) > 5 for field in schema)
    assert file.num_row_groups == 3  # one for each tap
    for group in range(3):
        order = file.metadata.row_group(group).sorting_columns
        assert [COLUMNS[column.column_index] for column in order] == ["tap", "channel", "score", "end", "rank"]
        assert not any(column.descending for column in order)
    assert names(table.parent) == {"out.parquet"}


def test_rows_are_the_store_s_values(table: Path, finished: maxact.Store) -> None:
    rows = iter(pq.read_table(table).to_pylist())
    keys, labels = (finished.catalog.table[name].to_pylist() for name in ("key", "label"))
    for tap in sorted(finished):  # and in the order that the file declares
        results = finished[tap]
        for channel in range(results.tap.channels):
            for score, end in (("max", "bottom"), ("max", "top"), ("mean", "bottom"), ("mean", "top")):
                image, value, position = results.lists[score, end]  # type: ignore[index]
                for rank, number in enumerate(image[channel].tolist()):
                    row, column = (None, None) if position is None else position[channel, rank].tolist()
                    assert next(rows) == {
                        "tap": tap,
                        "channel": channel,
                        "score": score,
                        "end": end,
                        "rank": rank,
                        "value": value[channel, rank],
                        "row": row,
                        "column": column,
                        "image": number,
                        "key": keys[number],
                        "label": labels[number],
                    }
    assert next(rows, None) is None


def test_duckdb(table: Path, finished: maxact.Store) -> None:
    found = duckdb.sql(
        f"select key, value from '{table}' where tap = 'bn2' and channel = 3 and score = 'max' and \"end\" = 'top' "
        "order by rank"
    ).fetchall()
    top = finished["bn2"].top(3)
    assert found == list(zip(top["key"].to_pylist(), top["score"].to_pylist(), strict=True))
    assert duckdb.sql(f"select count(*), count(row), count(label) from '{table}'").fetchall() == [
        (ROWS, ROWS // 2, ROWS)
    ]


def test_pandas(table: Path, finished: maxact.Store) -> None:
    frame = pandas.read_parquet(table)
    assert list(frame.columns) == COLUMNS and len(frame) == ROWS
    assert isinstance(frame["tap"].dtype, pandas.CategoricalDtype)
    best = frame[(frame["score"] == "max") & (frame["end"] == "top") & (frame["rank"] == 0) & (frame["tap"] == "fc")]
    assert np.array_equal(best["value"].to_numpy(), finished["fc"].stats["max"])
    assert frame[frame["score"] == "mean"]["row"].isna().all()


def test_polars(table: Path, finished: maxact.Store) -> None:
    frame = polars.scan_parquet(table).filter(
        (polars.col("tap") == "bn1") & (polars.col("end") == "bottom") & (polars.col("score") == "mean")
    )
    found = frame.collect()
    assert found.columns == COLUMNS and len(found) == 18
    assert found["value"].to_list() == finished["bn1"].lists["mean", "bottom"][1].ravel().tolist()
    assert found["row"].null_count() == 18


def test_places_that_are_empty_have_no_row(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", limit=2, layers=("bn1",))
    assert export(store.path, tmp_path / "out.parquet") == 6 * 2
    assert pq.read_table(tmp_path / "out.parquet")["rank"].to_pylist() == [0, 1] * 6


def test_an_unfinished_store_gives_its_last_commit(photos: Path, tmp_path: Path) -> None:
    interrupted(photos, tmp_path / "x")
    store = maxact.open(tmp_path / "x")
    assert export(store, tmp_path / "out.parquet") == 5 * 18
    found = pq.read_table(tmp_path / "out.parquet", filters=[("tap", "=", "bn2")])
    assert found["image"].to_pylist() == store["bn2"].lists["max", "top"][0].ravel().tolist()


def test_nothing_is_committed_yet(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", limit=2)
    store.reopen()
    with pytest.raises(MaxactError, match="nothing is committed yet"):
        export(store, tmp_path / "out.parquet")
    assert names(tmp_path) == {"x"}


def test_it_replaces_a_file_and_nothing_else(finished: maxact.Store, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("old")
    export(finished, out)
    assert pq.read_table(out).num_rows == ROWS
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reasons = {
        tmp_path / "missing" / "x": "cannot be written (No such file or directory",
        tmp_path: "is not a file",
        fifo: "is not a file",  # nor is a device such as /dev/full, which must not be replaced
    }
    for place, reason in reasons.items():
        with pytest.raises(MaxactError) as caught:
            export(finished, place)
        assert str(caught.value).startswith(f"{place}: {reason}")
    fifo.unlink()
    with pytest.raises(MaxactError, match="not a maxact store"):
        export(tmp_path / "none", out)
    assert names(tmp_path) == {"out.parquet"}


def test_the_table_is_a_plain_one_in_memory(table: Path) -> None:
    """Dictionaries are only in the file's interest: a cast gives words."""
    words = pq.read_table(table)["label"].cast(pa.string())
    assert set(words.to_pylist()) <= {"astronaut", "brick", "chelsea", "coffee", "ihc", "motorcycle_left", "rocket"}
