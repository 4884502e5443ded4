"""Tar archives and Parquet files: what is indexed is what is read, and damage never goes unseen."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxact import archives, groups
from maxact.archives import Changed, Row, TarReader, printable
from maxact.errors import MaxactError
from maxact.groups import RowGroupReader
from maxact.sources import find


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read_all(rows: list[Row]) -> dict[str, bytes]:
    tars, tables = TarReader(), RowGroupReader()
    result = {}
    for key, _, source, offset, length, modified in rows:
        read = tars.read(source, offset, length, modified) if length >= 0 else tables.read(source, offset, modified)
        result[key] = read
    tars.close()
    tables.close()
    return result


def refused(source: str | Path, *words: str) -> None:
    with pytest.raises(MaxactError) as caught:
        list(find(source))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


class TestTar:
    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_what_is_indexed_is_what_is_read(self, tmp_path: Path, form: int) -> None:
        members = {f"{'d' * 60}/{i}{'n' * 60}.jpg": os.urandom(i * 300) for i in range(1, 5)}
        path = write_tar(tmp_path / "x.tar", {**members, "readme.txt": b"x"}, form)
        assert read_all(list(find(path))) == {f"x.tar/{name}": data for name, data in members.items()}

    def test_labels(self, tmp_path: Path) -> None:
        members = {
            "s/1.jpg": b"1",
            "s/1.cls": b"7\n",
            "s/1.json": b"{}",
            "s/2.cls": b"cat",
            "s/2.left.png": b"l",
            "s/2.right.PNG": b"r",
            "s/3.v.jpg": b"3",
            "s/3.v.cls": b"own",
            "s/3.cls": b"sample",
            "s/4.jpg": b"4",
            "./t/5.jpg": b"5",
            "6.jpg": b"6",
            "./7.jpg": b"7",
        }
        rows = list(find(write_tar(tmp_path / "x.tar", members)))
        labels = {row[0].removeprefix("x.tar/"): row[1] for row in rows}
        assert labels == {
            "s/1.jpg": "7",
            "s/2.left.png": "cat",
            "s/2.right.PNG": "cat",
            "s/3.v.jpg": "own",
            "s/4.jpg": "s",
            "./t/5.jpg": "t",
            "6.jpg": "",
            "./7.jpg": "",
        }

    def test_brace_ranges_and_globs(self, tmp_path: Path) -> None:
        for i in range(12):
            write_tar(tmp_path / f"shards/{i:03}.tar", {f"{i}.jpg": b"x"})
        expected = [f"{i:03}.tar/{i}.jpg" for i in range(12)]
        for source in ("shards/{000..011}.tar", "shards/*.tar", "shards", "shards/{000..009}.tar"):
            keys = [row[0] for row in find(f"{tmp_path}/{source}")]
            assert keys == (expected[:10] if "009" in source else expected)
        refused(f"{tmp_path}/shards/{{000..012}}.tar", "012.tar does not exist")

    def test_names_are_keys_and_nothing_else(self, tmp_path: Path) -> None:
        names = ["../../escape.jpg", "/etc/root.jpg", "a\nb.jpg", "\udcff.jpg", "./.hid/x.jpg", "._x.jpg"]
        rows = list(find(write_tar(tmp_path / "x.tar", dict.fromkeys(names, b"x"), tarfile.GNU_FORMAT)))
        # tarfile takes the slash off the front
        assert [row[0].removeprefix("x.tar/").lstrip("/") for row in rows] == [
            "../../escape.jpg",
            "etc/root.jpg",
            "a\nb.jpg",
            "\udcff.jpg",
        ]
        assert {row[2] for row in rows} == {os.fsencode(tmp_path / "x.tar")}

    def test_damage_is_seen(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", {f"{i}.jpg": b"x" * 600 for i in range(4)}, tarfile.USTAR_FORMAT)
        whole = path.read_bytes()
        for cut in (100, 512, 700, 1536 * 2 + 100, 1536 * 2 + 800, 1536 * 4 - 1):
            path.write_bytes(whole[:cut])
            refused(path, "x.tar", "damaged")
        path.write_bytes(whole[:1536] + b"\xff" * 512 + whole[2048:])
        refused(path, "damaged at byte 1536")
        path.write_bytes(b"\x89PNG" * 1000)
        refused(path, "damaged")
        path.write_bytes(b"")
        refused(path, "empty")
        path.write_bytes(whole[: 1536 * 4])  # without the blocks that mark the end, as some writers leave it
        assert len(list(find(path))) == 4

    @pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
    def test_compressed_archives_are_refused(self, tmp_path: Path, mode: str) -> None:
        with tarfile.open(str(tmp_path / "x.tar"), f"w:{mode}"):  # type: ignore[call-overload]
            pass
        refused(tmp_path / "x.tar", "compressed")

    def test_links_are_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            member = tarfile.TarInfo("a/x.jpg")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
        refused(tmp_path / "x.tar", "a/x.jpg", "link")

    def test_changes_are_noticed(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", {"1.jpg": b"1" * 600, "2.jpg": b"2" * 600})
        (*_, source, offset, length, modified) = list(find(path))[1]
        reader = TarReader()
        assert reader.read(source, offset, length, modified) == b"2" * 600
        os.truncate(path, offset + 10)
        os.utime(path, ns=(modified, modified))
        with pytest.raises(Changed, match="ends inside"):
            reader.read(source, offset, length, modified)
        os.utime(path, ns=(1, 1))
        with pytest.raises(Changed, match="modified"):
            reader.read(source, offset, length, modified)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            reader.read(source, offset, length, modified)

    def test_a_descriptor_that_went_stale_is_not_used_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (row,) = find(write_tar(tmp_path / "x.tar", {"1.jpg": b"1" * 600}))
        reader, pread, stale = TarReader(), os.pread, set[int]()

        def read(fd: int, length: int, offset: int) -> bytes:
            if fd in stale:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return pread(fd, length, offset)

        monkeypatch.setattr(os, "pread", read)
        assert reader.read(*row[2:]) == b"1" * 600
        old = reader._open[row[2]]
        stale.add(old.fd)
        with pytest.raises(OSError, match="Stale"):
            reader.read(*row[2:])
        assert reader.read(*row[2:]) == b"1" * 600

    def test_many_threads_and_more_archives_than_stay_open(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(archives, "OPEN_ARCHIVES", 2)
        members = {f"{i}.jpg": f"{i}".encode() * 100 for i in range(8)}
        for i in range(8):
            write_tar(tmp_path / f"{i}.tar", {name: f"{i}:".encode() + data for name, data in members.items()})
        rows = list(find(tmp_path)) * 20
        before = len(os.listdir("/proc/self/fd"))
        reader = TarReader()

        def check(row: Row) -> bool:
            archive, name = row[0].split(".tar/")
            return reader.read(*row[2:]) == f"{archive}:".encode() + members[name]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(check, rows))
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before


def struct_table(images: list[bytes | None], **columns: object) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [None if image is None else {"bytes": image, "path": "x.jpg"} for image in images]
    return pa.table({"image": pa.array(cells, kind), **columns})


class TestParquet:
    @pytest.mark.parametrize(
        "make",
        [
            lambda images: pa.table({"image": images}),
            lambda images: pa.table({"image": pa.array(images, pa.large_binary())}),
            lambda images: pa.table({"n": pa.array(range(len(images))), "image": pa.array(images, pa.binary_view())}),
            struct_table,
        ],
    )
    def test_what_is_indexed_is_what_is_read(
        self, tmp_path: Path, make: Callable[[list[bytes | None]], pa.Table]
    ) -> None:
        images = [f"image {i}".encode() * i for i in range(1, 30)]
        for name in ("a", "b"):
            pq.write_table(
                make([name.encode() + image for image in images]),
                tmp_path / f"{name}.parquet",
                row_group_size=4,
            )
        rows = list(find(tmp_path))
        expected = {f"{n}.parquet/{i}": n.encode() + image for n in ("a", "b") for i, image in enumerate(images)}
        assert [row[0] for row in rows] == list(expected)
        assert {row[4] for row in rows} == {-1}
        assert read_all(rows) == expected
        assert [row[0] for row in find(f"{tmp_path}/*.parquet")] == list(expected)

    def test_labels_of_hugging_face(self, tmp_path: Path) -> None:
        features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = struct_table([b"x"] * 4, label=pa.array([1, 0, -1, None]))
        path = tmp_path / "x.parquet"
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path
        )
        assert [row[1] for row in find(path)] == ["dog", "cat", "", ""]
        pq.write_table(table.replace_schema_metadata({"huggingface": "no JSON"}), path)
        assert [row[1] for row in find(path)] == ["1", "0", "-1", ""]
        pq.write_table(struct_table([b"x"] * 2, label=["tree", None]), path)
        assert [row[1] for row in find(path)] == ["tree", ""]

    def test_empty_cells_read_as_empty(self, tmp_path: Path) -> None:
        pq.write_table(struct_table([b"x", None]), tmp_path / "x.parquet")
        assert read_all(list(find(tmp_path))) == {"x.parquet/0": b"x", "x.parquet/1": b""}

    def test_a_path_that_is_not_utf8(self, tmp_path: Path) -> None:
        raw = os.fsencode(tmp_path) + b"/\xff.parquet"
        with open(raw, "wb") as file:
            pq.write_table(pa.table({"image": [b"x"]}), file)
        assert list(read_all(list(find(tmp_path))).values()) == [b"x"]

    def test_changes_are_noticed_and_a_retry_reads_again(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"image": [b"a", b"b"]}), path, row_group_size=1)
        (*_, source, _, _, modified) = next(iter(find(path)))
        reader = RowGroupReader()
        assert reader.read(source, 0, modified) == b"a"
        os.utime(path, ns=(1, 1))
        with pytest.raises(Changed):
            reader.read(source, 1, modified)
        os.utime(path, ns=(modified, modified))
        assert reader.read(source, 1, modified) == b"b"
        with pytest.raises(Changed, match="fewer rows"):
            reader.read(source, 2, modified)

    def test_damage_is_an_oserror(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"image": [os.urandom(5000)]}), path, compression="gzip", use_dictionary=False)
        (*_, source, _, _, modified) = next(iter(find(path)))
        with open(path, "r+b") as file:
            file.write(b"\xff" * 4000)
        os.utime(path, ns=(modified, modified))
        with pytest.raises(OSError):
            RowGroupReader().read(source, 0, modified)

    def test_few_row_groups_stay_and_each_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(groups, "CACHE", 1)
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"image": [f"{i}".encode() for i in range(400)]}), path, row_group_size=50)
        rows = list(find(path))
        reader = RowGroupReader()
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda row: reader.read(row[2], row[3], row[5]), rows))
        assert read == [f"{i}".encode() for i in range(400)]
        assert len(reader._groups) <= 8
        reader.read(rows[0][2], 0, rows[0][5])
        assert len(reader._groups) <= 2

    def test_large_row_groups_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(groups, "GROUP_LIMIT", 3000)
        path = tmp_path / "x.parquet"
        pq.write_table(struct_table([os.urandom(600)] * 8), path, use_dictionary=False)
        refused(path, "row group", "row_group_size")
        pq.write_table(struct_table([os.urandom(600)] * 8), path, use_dictionary=False, row_group_size=1)
        assert len(list(find(path))) == 8


def test_printable() -> None:
    assert printable("größe/猫 1.jpg") == "größe/猫 1.jpg"
    assert printable("a\\b\n\u200b\udcff\U000e0001") == r"a\\b\n\u200b\udcff\U000e0001"
