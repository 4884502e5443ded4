"""Tar archives and packs that mean harm: listed or refused in one line, and nothing of them ever leaves its archive."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import ODD, damaged, frugal, fuzz, refusal, twisted
from maxact import packed
from maxact.catalog import Catalog
from maxact.pack import pack
from support import write_photographs

DATA = b"no image, but bytes" * 40


def header(name: bytes = b"a.jpg", size: bytes = b"0" * 11, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """One block as tar writes it, with a checksum that is right."""
    block = bytearray(512)
    for place, field in ((0, name[:100]), (100, b"0000644"), (124, size), (136, b"0" * 11), (157, link[:100])):
        block[place : place + len(field)] = field
    block[156:157], block[257:265], block[148:156] = kind, b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o" % size


def number(size: int) -> bytes:
    """A size as GNU tar writes what does not fit octal digits."""
    return (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)


def member(data: bytes = DATA, **fields: Any) -> bytes:
    return header(size=octal(len(data)), **fields) + data + bytes(-len(data) % 512)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    text = b""
    for name, value in records:
        rest = b" %s=%s\n" % (name, value)
        length = len(rest) + 1
        while length < len(rest) + len(str(length)):
            length += 1
        text += b"%d" % length + rest
    return member(text, name=b"pax", kind=kind)


END = bytes(1024)
WHOLE = (
    member(name=b"cats/a.jpg") + member(b"cat", name=b"cats/a.cls") + pax((b"path", b"b" * 120 + b".jpg")) + member()
)
CONTENTS: dict[str, bytes] = {
    "negative size": member() + header(size=number(-512)) + member(),
    "a size that leads back to itself": member() + header(size=number(-1024)) + member(),
    "endless, by a pax header": member() + pax((b"size", b"-1536")) + member(),
    "a size beyond everything": header(size=number(1 << 62)) + DATA,
    "a size beyond the file": header(size=octal(1 << 30)) + DATA,
    "a long name of many gigabytes": header(b"././@LongLink", number(1 << 40), b"L") + DATA,
    "a long name beyond everything": header(b"././@LongLink", number(1 << 62), b"L") + DATA,
    "a negative long name": header(b"././@LongLink", number(-5), b"L") + DATA,
    "a pax header of many gigabytes": header(b"pax", number(1 << 36), b"x") + DATA,
    "long names of long names": (header(b"././@LongLink", octal(4), b"L") + b"a".ljust(512, b"\0")) * 3000 + member(),
    "pax headers of pax headers": pax((b"path", b"a")) * 3000 + member(),
    "a wrong length": member(b"999999999 path=a.jpg\n", name=b"pax", kind=b"x") + member(),
    "no length": member(b"0 path=a.jpg\n", name=b"pax", kind=b"x") + member(),
    "a length of digits": member(b"9" * 5000 + b" path=a.jpg\n", name=b"pax", kind=b"x") + member(),
    "only digits": member(b"9" * 9000, name=b"pax", kind=b"x") + member(),
    "a pax size that is none": pax((b"size", b"nan")) + member(),
    "a pax size beyond everything": pax((b"size", b"9" * 40)) + member(),
    "a sparse file of holes": pax((b"GNU.sparse.size", b"999999999999"), (b"GNU.sparse.map", b"0,x,7")) + member(),
    "a sparse map of letters": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + member(b"x\n" * 300),
    "sparse, and cut": header(kind=b"S")[:482] + b"\1" + header(kind=b"S")[483:],
    "a link": header(kind=b"2", link=b"/etc/passwd"),
    "a hard link": header(kind=b"1", link=b"../../etc/passwd"),
    "a device": header(kind=b"4"),
    "a pipe": header(kind=b"6"),
    "a kind that is none": header(kind=b"\xff"),
    "a global header": pax((b"path", b"x.jpg"), kind=b"g") + member() + member(name=b"b.jpg"),
    "a name with a zero": pax((b"path", b"a\0b.jpg")) + member(),
    "a name of a megabyte": pax((b"path", b"a" * (1 << 20) + b".jpg")) + member(),
    "a name beyond what is taken": pax((b"path", b"a" * 5000 + b".jpg")) + member(),
    "a label that is a link": header(b"a.cls", kind=b"2", link=b"/etc/passwd") + member(),
    "a thousand of one name": member() * 1000,
}
TAKEN = {"a link": 0, "a global header": 2, "a thousand of one name": 1000, "a label that is a link": 1}


def listed(path: Path) -> list[Any]:
    """The images of an archive, each of which lies in it, and can be read or not."""
    catalog = Catalog.build(path)
    entries = catalog.entries(0, len(catalog))
    size = path.stat().st_size
    for entry in entries:
        assert entry.key.isprintable() and entry.label.isprintable()
        assert os.fsdecode(entry.source) == str(path)
        assert entry.offset >= 512 and entry.length >= 0 and entry.offset + entry.length <= size
        data = catalog.read(entry)
        assert isinstance(data, bytes) and len(data) == entry.length
    catalog.close()
    return entries


@pytest.mark.parametrize("name", CONTENTS)
def test_archives_that_mean_harm(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(CONTENTS[name] + END)
    found: list[Any] = []
    with frugal(100):
        said = refusal(lambda: found.extend(listed(path)))
    assert sorted(tmp_path.iterdir()) == [path]
    if TAKEN.get(name):
        assert said is None and len(found) == TAKEN[name] and len({entry.key for entry in found}) == len(found)
    elif name not in ("a pax size that is none", "a name with a zero", "no length", "a wrong length", "only digits"):
        assert said is not None and "x.tar" in said


@fuzz(50)
@given(data=damaged(WHOLE + END, 3000))
def test_damaged_archives(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    refusal(lambda: listed(path))
    assert sorted(tmp_path.iterdir()) == [path]


@fuzz(20)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"S", b"x", b"g", b"X", b"V"]
            ),
            st.sampled_from([-(1 << 70), -513, -1, 0, 1, 20, 511, 512, 70_000, 1 << 33, 1 << 62]),
            st.sampled_from([b"a.jpg", b"a.cls", b"../../a.jpg", b"/a.jpg", b".a.jpg", b"", b"/", b"\xff.jpg", b"a/"]),
            st.binary(max_size=60)
            | st.sampled_from([b"12 path=a.jp\n", b"18 size=111111111\n", b"21 GNU.sparse.size=1\n"]),
        ),
        max_size=6,
    )
)
def test_headers_of_any_kind(tmp_path: Path, blocks: list[tuple[bytes, int, bytes, bytes]]) -> None:
    path = tmp_path / "x.tar"
    content = b""
    for kind, size, name, data in blocks:
        size = max(-(1 << 87), size)
        content += header(name, number(size), kind) + data + bytes(-len(data) % 512)
    path.write_bytes(content + END)
    with frugal(100):
        refusal(lambda: listed(path))


@pytest.mark.parametrize("odd", ODD)
def test_names_are_keys_and_labels(tmp_path: Path, odd: str) -> None:
    raw = odd.encode("utf-8", "surrogateescape")
    path = tmp_path / "x.tar"
    path.write_bytes(pax((b"path", raw + b"/" + raw[:50] + b".jpg")) + member() + END)
    (entry,) = listed(path)
    assert packed.plain(entry.key).endswith(".jpg") and len(entry.key) <= 10 * 4096
    assert sorted(tmp_path.iterdir()) == [path]


# Packs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    write_photographs(folder / "photos", 3)
    pack(folder / "photos", folder / "pack", readers=2, workers=1)
    return folder / "pack"


@fuzz(10)
@given(data=st.data())
def test_what_a_pack_says_of_itself(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.copytree(made, tmp_path / "pack", dirs_exist_ok=True)
    place = tmp_path / "pack" / "pack.json"
    place.write_text(json.dumps(data.draw(twisted(json.loads((made / "pack.json").read_text())))))
    refusal(lambda: Catalog.build(tmp_path / "pack"))
    refusal(lambda: pack(made.parent / "photos", tmp_path / "pack", readers=2, workers=1))


def test_a_pack_that_is_no_json(made: Path, tmp_path: Path) -> None:
    for text in (b"[" * 100_000, b"\xff\xfe", b"", b'{"maxact": "pack", "format": 1}'):
        shutil.copytree(made, tmp_path / "pack", dirs_exist_ok=True)
        (tmp_path / "pack" / "pack.json").write_bytes(text)
        refusal(lambda: Catalog.build(tmp_path / "pack"))
    (tmp_path / "pack" / "pack.json").write_bytes(b'{"maxact": "pack"' + b" " * (1 << 20) + b"}")
    assert packed.read_pack(os.fsencode(tmp_path / "pack")) is None  # no more than a beginning of it is read


COLUMNS = st.sampled_from(packed.SCHEMA.names)


@fuzz(13)
@given(COLUMNS, st.sampled_from([None, -1, 0, 511, 1 << 62, -(1 << 63), "", "../../x", "\\", b"\xff", [1], 0.5]))
def test_an_index_with_other_values(made: Path, tmp_path: Path, column: str, value: Any) -> None:
    shutil.copytree(made, tmp_path / "pack", dirs_exist_ok=True)
    place = tmp_path / "pack" / "000000.tar.index"
    table = pq.read_table(made / "000000.tar.index")
    rows = table.to_pylist()
    rows[1][column] = value
    where = table.schema.get_field_index(column)
    try:
        changed = table.set_column(
            where, table.schema.field(column), pa.array([row[column] for row in rows], table.schema.field(column).type)
        )
    except (pa.ArrowException, OverflowError):
        changed = table.set_column(where, column, pa.array([value] * 3))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), place)
    refusal(lambda: listed_pack(tmp_path / "pack"))


def listed_pack(folder: Path) -> None:
    catalog = Catalog.build(folder)
    for entry in catalog.entries(0, len(catalog)):
        assert entry.key.isprintable()
        assert Path(os.fsdecode(entry.source)).parent == folder
        catalog.read(entry)
    catalog.close()


@fuzz(10)
@given(data=st.data())
def test_damaged_indexes(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.copytree(made, tmp_path / "pack", dirs_exist_ok=True)
    place = tmp_path / "pack" / "000000.tar.index"
    place.write_bytes(data.draw(damaged((made / "000000.tar.index").read_bytes(), 400)))
    refusal(lambda: listed_pack(tmp_path / "pack"))


def test_a_tarfile_of_our_own_is_right(tmp_path: Path) -> None:
    """What the tests above take for whole, tarfile does too."""
    with tarfile.open(fileobj=io.BytesIO(WHOLE + END)) as archive:
        assert [each.name for each in archive] == ["cats/a.jpg", "cats/a.cls", "b" * 120 + ".jpg"]
