"""Lists and Parquet files of images that mean harm, and folders and globs that stand for too much."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import ODD, damaged, frugal, fuzz, refusal
from maxact import groups
from maxact.archives import Changed
from maxact.catalog import Catalog
from maxact.errors import MaxactError
from maxact.limits import LONGEST


def parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def readable(source: object) -> list[str]:
    """The keys of what a source lists, all of which can be tried."""
    catalog = Catalog.build(source)
    entries = catalog.entries(0, len(catalog))
    for entry in entries[:50]:
        assert entry.key.isprintable() and entry.label.isprintable()
        try:
            catalog.read(entry)
        except (OSError, Changed):
            continue
    catalog.close()
    return [entry.key for entry in entries]


PATHS = pa.table({"path": ["1.jpg", "2.jpg", "3.jpg"], "label": ["a", "b", "a"]})
IMAGES = pa.table({"image": [b"one", b"two", None], "label": pa.array([1, 0, 2])})
WHOLE = {
    "paths.parquet": parquet(PATHS),
    "images.parquet": parquet(IMAGES),
    "plain.parquet": parquet(PATHS, use_dictionary=False, compression="none"),
    "list.csv": b'path,label\n1.jpg,"a, b"\n2.jpg,c\n',
    "list.txt": b"1.jpg\n2.jpg\n# no more\n",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "1.jpg").write_bytes(b"one")
    return tmp_path


@fuzz(53)
@given(st.sampled_from(sorted(WHOLE)).flatmap(lambda name: st.tuples(st.just(name), damaged(WHOLE[name], 300))))
def test_damaged_lists(place: Path, given: tuple[str, bytes]) -> None:
    name, data = given
    (place / name).write_bytes(data)
    with frugal(200):
        refusal(lambda: readable(place / name))


KINDS: dict[str, Callable[[], pa.Array]] = {
    "null": lambda: pa.nulls(3),
    "some null": lambda: pa.array(["1.jpg", None, "2.jpg"]),
    "numbers": lambda: pa.array([1, 2, 3]),
    "nan": lambda: pa.array([float("nan"), 1e300, -0.0]),
    "bool": lambda: pa.array([True, False, None]),
    "large text": lambda: pa.array(["1.jpg", "2.jpg", "3.jpg"], pa.large_string()),
    "text view": lambda: pa.array(["1.jpg", "2.jpg", "3.jpg"], pa.string_view()),
    "dictionary": lambda: pa.array(["1.jpg", "1.jpg", None]).dictionary_encode(),
    "dictionary of numbers": lambda: pa.array([1, 1, 2]).dictionary_encode(),
    "bytes": lambda: pa.array([b"\xff.jpg", b"1.jpg", b""]),
    "bytes that are fixed": lambda: pa.array([b"1.jpg", b"2.jpg", b"3.jpg"], pa.binary(5)),
    "no UTF-8": lambda: pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"\xff\xfe\x80a\xc3(")
    ),
    "zero": lambda: pa.array(["1\0.jpg", "\0", "a"]),
    "list": lambda: pa.array([["1.jpg"], [], None]),
    "struct": lambda: pa.array([{"a": 1}, None, {"a": 2}]),
    "struct of bytes": lambda: pa.array([{"bytes": b"x"}, None, {"bytes": None}]),
    "struct of text": lambda: pa.array([{"bytes": "x"}, None, {"bytes": None}]),
    "map": lambda: pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
    "time": lambda: pa.array([1, 2, 1 << 62], pa.timestamp("ns")),
    "date": lambda: pa.array([1, 2, 1 << 30], pa.date32()),
    "duration": lambda: pa.array([1, 2, 1 << 62], pa.duration("ns")),
    "odd": lambda: pa.array([*ODD[:2], ODD[7]]),
    "long": lambda: pa.array(["x" * LONGEST, "1.jpg", "x"]),
    "too long": lambda: pa.array(["x" * (LONGEST + 1), "1.jpg", "x"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["path", "label", "image"])
def test_columns_of_every_kind(place: Path, column: str, kind: str) -> None:
    for other in ("path", "image"):
        columns = {other: pa.array(["1.jpg", "2.jpg", "3.jpg"] if other == "path" else [b"1", b"2", b"3"])}
        (place / "x.parquet").write_bytes(parquet(pa.table(columns | {column: KINDS[kind]()})))
        refusal(lambda: readable(place / "x.parquet"))


def test_text_that_is_no_utf8_is_taken_as_it_is(place: Path) -> None:
    (place / "x.parquet").write_bytes(parquet(pa.table({"path": ["1.jpg"] * 3, "label": KINDS["no UTF-8"]()})))
    labels = Catalog.build(place / "x.parquet").table["label"].to_pylist()
    assert labels == [r"\udcff\udcfe", r"\udc80a", r"\udcc3("]


def test_one_value_in_every_row(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept once, a megabyte in a million rows is a file of a megabyte, and a terabyte in memory."""
    rows = 3000
    indices = pa.array([0] * rows, pa.int32())
    big = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * (1 << 20)]))
    small = pa.DictionaryArray.from_arrays(indices, pa.array(["1.jpg"]))
    for columns in ({"path": big}, {"path": small, "label": big}):
        (place / "x.parquet").write_bytes(parquet(pa.table(columns), compression="none"))
        with frugal(200):
            assert "characters" in str(refusal(lambda: readable(place / "x.parquet")))
    monkeypatch.setattr(groups, "GROUP_LIMIT", 16 << 20)
    (place / "x.parquet").write_bytes(parquet(pa.table({"image": [bytes(1 << 20)] * 40}), compression="none"))
    assert (place / "x.parquet").stat().st_size < 4 << 20
    catalog = Catalog.build(place / "x.parquet")
    with pytest.raises(OSError, match="more than 1 GiB of images"):
        catalog.read(catalog.entry(3))


def rows_said(data: bytes, rows: int, said: int) -> bytes:
    """A Parquet file whose footer says that it has another number of rows: as Thrift writes numbers."""

    def varint(value: int) -> bytes:
        value, found = value << 1, b""
        while value > 127:
            found += bytes([value & 127 | 128])
            value >>= 7
        return found + bytes([value])

    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8].replace(varint(rows), varint(said))
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize("columns", [{"image": [b"x"] * 5003}, {"path": ["1.jpg"] * 5003}])
def test_a_footer_that_says_that_there_is_more(place: Path, columns: dict[str, Any]) -> None:
    data = rows_said(parquet(pa.table(columns)), 5003, 1 << 50)
    (place / "x.parquet").write_bytes(data)
    with frugal(200):
        assert refusal(lambda: readable(place / "x.parquet"))


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x"])
def test_lines_without_an_end(place: Path, name: str) -> None:
    with open(place / name, "wb") as file:
        file.write(b"path\n")
        file.truncate(1 << 36)  # takes no room
    with frugal(100):
        assert "line 2 has more than" in str(refusal(lambda: readable(place / name)))


@fuzz(20)
@given(
    st.sampled_from(["x.txt", "x.csv"]), st.lists(st.sampled_from([*ODD, "path", "label", ",", '"', ";", "1.jpg", "#"]))
)
def test_lists_of_odd_words(place: Path, name: str, words: list[str]) -> None:
    for mark in (",", "\n", ""):
        (place / name).write_bytes(b"path\n1.jpg\n" + mark.join(words).encode("utf-8", "surrogateescape"))
        refusal(lambda: readable(place / name))


def test_labels_of_4000_characters_are_taken(place: Path) -> None:
    (place / "x.csv").write_text("path,label\n1.jpg," + "猫" * 4000)
    assert Catalog.build(place / "x.csv").table["label"].to_pylist() == ["猫" * 4000]
    (place / "x.csv").write_text("path,label\n1.jpg," + "x" * 5000)
    said = refusal(lambda: readable(place / "x.csv"))
    assert said is not None and "1.jpg: has a name of 5,000 characters, and more than 4,096 are not taken: xxx" in said


@pytest.mark.parametrize(
    "name", ["{0..999999999}.jpg", "{0..100000}{0..9}.jpg", "{-9..99999999999999999999}", "{a,b}" * 20, "{0..9}" * 9]
)
def test_braces_that_stand_for_too_much(place: Path, name: str) -> None:
    with frugal(400):
        said = refusal(lambda: readable(f"{place}/{name}"))
    assert said is not None and "more than 100,000 names" in said


@fuzz(26)
@given(
    st.lists(st.sampled_from([*"{},.*?[]!-\\~/", "..", "0", "9", "a", "**", "\u202e", "\udcff", "x.jpg"]), max_size=12)
)
def test_names_of_any_kind(place: Path, parts: list[str]) -> None:
    refusal(lambda: readable(f"{place}/{''.join(parts)}"))


def test_folders_in_folders(place: Path) -> None:
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(place)
        for _ in range(300):
            os.mkdir("a")
            os.chdir("a")
        Path("1.jpg").write_bytes(b"x")
    finally:
        os.fchdir(before)
        os.close(before)
    said = refusal(lambda: readable(place))
    assert said is not None and said.endswith("lies in more than 200 folders, one in the other")


# images.parquet of a store


def changed(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def test_a_catalog_that_cannot_be(place: Path) -> None:
    table = Catalog.build(place).table
    broken = [
        changed(table, "key", pa.nulls(1, pa.string())),
        changed(table, "label", pa.array([None], pa.string())),
        changed(table, "key", KINDS["no UTF-8"]()[:1]),
        changed(table, "offset", pa.array([-1])),
        changed(table, "length", pa.array([-2])),
        changed(table, "image", pa.array([None], pa.int64())),
        changed(table, "source", pa.array(["1.jpg"])),
        table.append_column("key", pa.array(["twice"])),
        table.drop_columns(["modified"]),
    ]
    for each in broken:
        pq.write_table(each, place / "images.parquet")
        with pytest.raises(MaxactError, match=r"is not a catalog of images made by maxact|Multiple matches"):
            Catalog.load(place / "images.parquet")


@fuzz(20)
@given(data=st.data())
def test_a_damaged_catalog(place: Path, data: st.DataObject) -> None:
    catalog = Catalog.build(place / "1.jpg")
    catalog.save(place / "images.parquet")
    raw = data.draw(damaged((place / "images.parquet").read_bytes(), 600))
    (place / "images.parquet").write_bytes(raw)
    refusal(lambda: Catalog.load(place / "images.parquet"))
