"""Images on an object store and on web servers: the same catalog, bytes and results as from the files themselves."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import maxact
from maxact import fetch, limits, parts, remote, schedule
from maxact.catalog import Catalog, Changed, Entry
from maxact.errors import MaxactError
from maxact.urls import beside, folder, inside, resolve
from servers import Server, Store, Web, store, web
from stores import scan


@pytest.fixture(scope="module")
def files(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in every form that may be scanned."""
    folder = tmp_path_factory.mktemp("files")
    pictures = sorted(photos.rglob("*.jpg"))
    for path in pictures:
        copy = folder / "train" / path.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for name in ("train/.hidden/x.jpg", "train/notes.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "shards").mkdir()
    for number in range(3):
        with tarfile.open(folder / "shards" / f"{number:03}.tar", "w") as archive:
            for path in pictures[number::3]:
                archive.add(path, f"{path.parent.name}/{path.name}")
    (folder / "parquet").mkdir()
    for number in range(2):
        table = pa.table({"image": [path.read_bytes() for path in pictures[number::2]]})
        labels = [path.parent.name for path in pictures[number::2]]
        table = table.append_column("label", pa.array(labels))
        pq.write_table(table, folder / "parquet" / f"{number}.parquet", row_group_size=4)
    (folder / "lists").mkdir()
    relative = [f"../train/{path.relative_to(photos)}" for path in pictures]
    (folder / "lists" / "all.txt").write_text("# all\n" + "\n".join(relative))
    (folder / "lists" / "all.csv").write_text(
        "path,label\n" + "\n".join(f"{name},l{i}" for i, name in enumerate(relative))
    )
    pq.write_table(pa.table({"path": relative}), folder / "lists" / "all.parquet")
    return folder


@pytest.fixture(scope="module")
def s3(files: Path) -> Iterator[Store]:
    with store() as server:
        server.copy(files, "data")
        yield server


@pytest.fixture(scope="module")
def served(files: Path) -> Iterator[Server]:
    with web(files) as server:
        yield server


@pytest.fixture(scope="module")
def near(files: Path, tmp_path_factory: pytest.TempPathFactory) -> maxact.Store:
    """The scan of the files here."""
    return scan(files / "train", tmp_path_factory.mktemp("near") / "store.zarr")


def everything(catalog: Catalog) -> list[tuple[str, str, int, int, object]]:
    """What a catalog holds but for where and when, and the bytes."""
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(catalog.read, catalog.entries(0, len(catalog)))
        return [
            (entry.key, entry.label, entry.offset, entry.length, data)
            for entry, data in zip(catalog.entries(0, len(catalog)), read, strict=True)
        ]


def refused(images: object, *words: str) -> None:
    with pytest.raises(MaxactError) as caught:
        Catalog.build(images)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def says(page: str) -> Any:
    """The behaviour of a web server that answers everything with one page."""

    def answer(self: Web, whole: Any) -> None:
        data = page.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    return answer


SOURCES = (
    "train/",
    "train/*/0*.jpg",
    "train/{coffee,rocket}",
    "t*/**/*[05].jpg",
    "train/coffee/*",
    "shards",
    "shards/{000..002}.tar",
    "shards/00[12].tar",
    "parquet/*.parquet",
    "lists/all.csv",
    "lists/all.parquet",
    "train/coffee/002.jpg",
)


@pytest.mark.parametrize("source", SOURCES)
def test_the_catalog_and_the_bytes_are_those_of_the_files(files: Path, s3: Store, served: Server, source: str) -> None:
    expected = everything(Catalog.build(f"{files}/{source}"))
    assert expected
    for place in (f"s3://{s3.bucket}/data", served.url):
        catalog = Catalog.build(f"{place}/{source}")
        assert everything(catalog) == expected
        assert all(entry.source.startswith(place.encode()) for entry in catalog.entries(0, len(catalog)))


def test_lists_here_of_files_there(files: Path, s3: Store, served: Server, tmp_path: Path) -> None:
    near = sorted((files / "train" / "coffee").iterdir())
    rows = [f"s3://{s3.bucket}/data/train/coffee/{near[0].name}", f"{served.url}/train/coffee/{near[1].name}", near[2]]
    (tmp_path / "list.txt").write_text("\n".join([*map(str, rows), f"s3://{s3.bucket}/none/x.jpg"]))
    catalog = Catalog.build(tmp_path / "list.txt")
    entries = catalog.entries(0, 4)
    assert [catalog.read(entry) for entry in entries[:3]] == [path.read_bytes() for path in near]
    assert [entry.label for entry in entries] == ["coffee", "coffee", "coffee", "none"]
    assert (entries[3].length, entries[3].modified) == (0, 0)
    with pytest.raises(FileNotFoundError):
        catalog.read(entries[3])
    s3.put("none/x.jpg", b"now it is here")
    with pytest.raises(Changed, match="missing"):
        catalog.read(entries[3])
    (tmp_path / "list.txt").write_text(f"s3://{s3.bucket}/no/x.jpg\ns3://{s3.bucket}/no/y.jpg")
    refused(tmp_path / "list.txt", "no/x.jpg", "no such file")


def test_a_pack(photos: Path, s3: Store, served: Server, files: Path, tmp_path: Path) -> None:
    maxact.pack(photos, files / "pack", short_side=32, shard_images=8, workers=1)
    place = s3.copy(files / "pack", "pack")
    expected = everything(Catalog.build(files / "pack"))
    far = f"{served.url}/pack"
    for source in (place, f"{place}/*.tar", far, f"{far}?a=b/c", f"{far}/000000.tar", f"{far}/000000.tar?a=b/c"):
        assert everything(Catalog.build(source)) == (expected if "000000" not in source else expected[:8])
    s3.delete("pack/000001.tar")
    refused(place, "unfinished pack")


def test_a_scan_from_a_store_is_the_scan_of_the_files(near: maxact.Store, s3: Store, tmp_path: Path) -> None:
    far = scan(f"s3://{s3.bucket}/data/train", tmp_path / "far")
    assert len(near) == len(far) > 0
    for tap in near:
        ours, theirs = near[tap].top(0).to_pydict(), far[tap].top(0).to_pydict()
        assert {name: column for name, column in ours.items() if name != "source"} == {
            name: column for name, column in theirs.items() if name != "source"
        }
    assert far.manifest.images["source"] == f"s3://{s3.bucket}/data/train"
    again = scan(f"s3://{s3.bucket}/data/train", tmp_path / "far")  # only opened
    assert len(again.catalog) == 21


def test_what_changed_and_what_is_gone(photos: Path, s3: Store, tmp_path: Path) -> None:
    place = s3.copy(photos, "changing")
    paths = sorted(photos.rglob("*.jpg"))
    names = [str(path.relative_to(photos)) for path in paths]
    catalog = Catalog.build(place)
    entries = {entry.key: entry for entry in catalog.entries(0, len(catalog))}
    s3.put(f"changing/{names[0]}", b"shorter")
    same_length = bytearray(paths[1].read_bytes())
    same_length[-1] ^= 1
    s3.put(f"changing/{names[1]}", bytes(same_length))  # in the same second, perhaps
    s3.delete(f"changing/{names[2]}")
    for name in names[:2]:
        with pytest.raises(Changed, match=name):
            catalog.read(entries[name])
    with pytest.raises(FileNotFoundError):
        catalog.read(entries[names[2]])
    assert catalog.read(entries[names[3]]) == paths[3].read_bytes()


def test_archives_that_changed(files: Path, s3: Store, served: Server, tmp_path: Path) -> None:
    for kind, name in (("shards", "000.tar"), ("parquet", "0.parquet")):
        data = (files / kind / name).read_bytes()
        catalog = Catalog.build(s3.put(f"replaced/{name}", data))
        s3.put(f"replaced/{name}", data + b"\0")
        with pytest.raises(Changed, match=name):
            catalog.read(catalog.entry(0))
        s3.put(f"replaced/{name}", data[:600])
        with pytest.raises(Changed, match=name):
            catalog.read(catalog.entry(len(catalog) - 1))
        s3.delete(f"replaced/{name}")
        with pytest.raises(FileNotFoundError):
            catalog.read(catalog.entry(1))


def test_a_web_server_says_it_by_the_time(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"123")
    os.utime(path, (1000, 1000))
    with web(tmp_path) as server:
        catalog = Catalog.build(f"{server.url}/x.jpg")
        entry = catalog.entry(0)
        assert (entry.length, entry.modified) == (3, 1000 * 10**9)
        before = server.said.copy()
        assert catalog.read(entry) == b"123"
        assert server.said - before == {"GET": 1}  # nothing else is asked for an image
        path.write_bytes(b"124")
        with pytest.raises(Changed, match="modified"):
            catalog.read(entry)
        path.write_bytes(b"1" * 1_000_000)
        with pytest.raises(Changed, match="1000000 bytes"):
            catalog.read(entry)


def test_an_image_of_a_store_is_one_request(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog.build(f"s3://{s3.bucket}/data/shards/000.tar")
    asked: list[str] = []
    fs, _ = remote._filesystem(f"s3://{s3.bucket}")
    fs._s3.meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    catalog.read(catalog.entry(0))
    assert asked == ["GetObject"]


@pytest.mark.parametrize("start", [0, 100])
def test_a_store_that_sends_whole_files_for_parts(s3: Store, start: int) -> None:
    path = f"s3://{s3.bucket}/data/shards/000.tar".encode()
    events = remote._filesystem(path.decode())[0]._s3.meta.events

    def forget_range(params: dict[str, Any], **_: object) -> None:
        params["headers"].pop("Range")

    events.register("before-call.s3.GetObject", forget_range)
    try:
        with pytest.raises(OSError, match="no parts of files") as caught:
            remote.read(path, start, 100)
    finally:
        events.unregister("before-call.s3.GetObject", forget_range)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert len(remote.read(path, start, 100).data) == 100


class TestWeb:
    def test_another_part_than_was_asked_for(self, files: Path) -> None:
        def first(self: Web, whole: Any) -> None:
            if "Range" in self.headers:
                self.headers.replace_header("Range", "bytes=0-99")
            Web._answer(self, whole)

        with web(files, _answer=first) as server:
            path = f"{server.url}/shards/000.tar".encode()
            assert len(remote.read(path, 0, 100).data) == 100
            with pytest.raises(OSError, match="another part of the file") as caught:
                remote.read(path, 512, 100)
            assert caught.value.errno == errno.EOPNOTSUPP

    def test_folders_without_an_end(self, tmp_path: Path) -> None:
        with web(tmp_path, _answer=says('<a href="./a/">a</a>')) as server:
            refused(f"{server.url}/train", "lies in more than 200 folders, one in the other")

    def test_a_page_that_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "PAGE", 5000)
        page = '<a href="1.jpg">1</a>' + " " * 4970
        with web(tmp_path, _answer=says(page)) as server:
            assert [item.name for item in remote.listing(server.url.encode())] == ["1.jpg"]
        with web(tmp_path, _answer=says(page + " " * 100)) as server:
            refused(f"{server.url}/train", f"cannot read {server.url}/train: its page of links", "give a list")

    def test_what_links_mean(self, tmp_path: Path) -> None:
        page = """<a href="1.jpg"> <A class=x\nHREF='./2.jpg'> <a href=3.jpg?a=b&amp;c> <a href="/x/y/4.jpg">
            <a href="5/"> <a href="../6.jpg"> <a href="http://[/7.jpg"> <a href="8/9.jpg"> <a href="?C=N">
            <a href="#end"> <a data-href=n> <a href="http://other/x/y/10.jpg"> <img href="no.jpg"> <a href="">
            <a href="mailto:x"> <a href="%C3%A4.jpg">"""
        with web(tmp_path, _answer=says(page)) as server:
            for place in ("x/y", "x/./y/"):
                found = {item.name: item.path.decode() for item in remote.listing(f"{server.url}/{place}".encode())}
                assert sorted(found) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5", "ä.jpg"]
                assert found["3.jpg"] == f"{server.url}/x/y/3.jpg?a=b&c" and found["5"] == f"{server.url}/x/y/5/"

    @pytest.mark.parametrize("kind", ["txt", "csv"])
    def test_large_lists_without_parts_of_files(
        self, files: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = (files / "lists" / f"all.{kind}").read_text() + f"\n# {'x' * 1000},no" * 5000
        (tmp_path / "lists").mkdir()
        (tmp_path / "lists" / f"all.{kind}").write_text(text)
        (tmp_path / "train").symlink_to(files / "train")
        expected = everything(Catalog.build(tmp_path / "lists" / f"all.{kind}"))
        with web(tmp_path, parts=False) as server:
            assert everything(Catalog.build(f"{server.url}/lists/all.{kind}")) == expected
            monkeypatch.setattr(limits, "LIST", 5_000_000)
            refused(f"{server.url}/lists/all.{kind}", f"all.{kind}", "no parts of files")
        with web(tmp_path) as server:
            assert everything(Catalog.build(f"{server.url}/lists/all.{kind}")) == expected

    def test_without_lists_of_folders(self, files: Path) -> None:
        with web(files, lists=False) as server:
            refused(f"{server.url}/train", "/train", "access denied", "give a list")
            refused(f"{server.url}/train/*/*.jpg", "access denied")
            assert len(Catalog.build(f"{server.url}/shards/{{000..002}}.tar")) == 21

    def test_a_page_without_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "index.html").write_text('<a href="a.html">no</a> <a href="?C=N;O=D">picture</a>')
        with web(tmp_path) as server:
            refused(f"{server.url}/", "shows no images", "give a list")

    def test_without_parts_of_files(self, files: Path) -> None:
        with web(files, parts=False) as server:
            refused(f"{server.url}/shards/000.tar", "000.tar", "no parts of files")
            assert len(everything(Catalog.build(f"{server.url}/lists/all.txt"))) == 21

    def test_without_head(self, files: Path) -> None:
        with web(files, heads=False) as server:
            assert everything(Catalog.build(f"{server.url}/train")) == everything(Catalog.build(files / "train"))

    def test_names_that_are_escaped_and_queries(self, tmp_path: Path) -> None:
        names = ["a b#c/ä%20?.jpg", "a b#c/[1].jpg", "a b#c/&amp;.jpg"]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
        near = everything(Catalog.build(tmp_path))
        with web(tmp_path) as server:
            assert everything(Catalog.build(server.url)) == near
            assert everything(Catalog.build(f"{server.url}/*/*.jpg")) == near
            assert everything(Catalog.build(f"{server.url}/a%20b%23c/%5B1%5D.jpg?key=%2Fa/b"))[0][:2] == (
                "[1].jpg",
                "a b#c",
            )


def test_odd_keys_of_a_store(s3: Store, tmp_path: Path) -> None:
    names = ["odd/a b#c/ä%20?.jpg", "odd/a b#c/[1].jpg", "odd/<b>&'\".jpg", "odd/x\u202e.jpg", "odd/*.jpg"]
    for name in names:
        s3.put(name, name.encode())
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    s3.put("odd/", b"")  # what some tools make for a folder
    s3.put("odd/a b#c/", b"")
    for source in ("odd", "odd/a b#c/[1].jpg", "odd/*.jpg", "odd/*/*.jpg"):
        assert everything(Catalog.build(f"s3://{s3.bucket}/{source}")) == everything(
            Catalog.build(f"{tmp_path}/{source}")
        )


def test_refusals(s3: Store, served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    s3.put("empty/x.md", b"x")
    refused(f"s3://{s3.bucket}/absent", f"s3://{s3.bucket}/absent", "no such file, folder or bucket")
    refused("s3://no-such-bucket/train", "no-such-bucket", "no such file, folder or bucket")
    refused(f"s3://{s3.bucket}/data/shards/{{000..009}}.tar", "003.tar", "no such file")
    refused(f"s3://{s3.bucket}/empty", "holds no images")
    refused(f"s3://{s3.bucket}/data/none*/x.jpg", "holds no images")
    refused("s3://", "names no bucket")
    refused("s3://no bucket/train", "s3://no bucket/train", "cannot be asked for")
    refused("http://[/train", "http://[/train")
    refused("s3://*/x.jpg", "cannot stand for a bucket")
    refused(f"{served.url}/none.tar", "none.tar", "no such file")
    refused(f"{served.url}/none", "none", "no such file")
    refused("http://127.0.0.1:9/train", "127.0.0.1:9", "cannot be reached")
    refused("ftp://host/train", "ftp://host/train", "s3://, gs:// and http(s)://")


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_what_a_server_answers_instead(files: Path, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OSErrors with a number, so that reading is tried again as with a disk; a busy server gets more time."""
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    with web(files) as server:
        catalog = Catalog.build(f"{server.url}/train/coffee")
        entry = catalog.entry(0)
        server.fails["jpg"] = status
        before = server.said["GET"]
        with pytest.raises(OSError) as caught:
            catalog.read(entry)
        kind = {403: PermissionError, 404: FileNotFoundError}.get(status, OSError)
        assert type(caught.value) is kind and caught.value.errno and caught.value.strerror
        assert server.said["GET"] - before == (3 if status == 503 else 1)
        reason = fetch.failure(entry, caught.value)
        assert reason.stage == "read" and "\n" not in reason.error
        server.fails.clear()
        assert catalog.read(entry)


def test_a_server_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    monkeypatch.setattr(remote, "PAUSES", ())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"//127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http:{url}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        remote.forget()
        for source in (f"http:{url}/x.jpg", "s3://bucket/x.jpg"):
            with pytest.raises(TimeoutError, match="in time"):
                remote.read(source.encode(), None, 10)
        remote.forget()


def test_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    remote.forget()
    refused("s3://bucket/train", "s3://bucket/train", "no credentials", "AWS_ACCESS_KEY_ID", "FSSPEC_S3_ANON")
    remote.forget()


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    remote.forget()
    refused("gs://bucket/train", "gs://bucket/train", "pip install 'maxact[remote]'")


def test_another_process_and_a_fork_connect_for_themselves(s3: Store) -> None:
    catalog = Catalog.build(f"s3://{s3.bucket}/data/shards")
    expected = catalog.read(catalog.entry(5))
    catalog.read(Catalog.build(f"s3://{s3.bucket}/data/parquet").entry(0))
    code = "import sys, pickle; c = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(c.read(c.entry(5)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], input=cloudpickle.dumps(catalog), capture_output=True, check=True
    )
    assert (run.stdout, run.stderr) == (expected, b"")
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(catalog.read(catalog.entry(5)) != expected)
    assert os.waitpid(child, 0)[1] == 0


def test_a_server_that_is_lost_and_comes_back(
    near: maxact.Store, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a disk: what is finished is committed, the run waits and goes on, and gives what it would have given."""
    monkeypatch.setattr(fetch._again, "sleep", lambda seconds: None)
    with web(files) as server:
        catalog = Catalog.build(f"{server.url}/train")
        reads = itertools.count()
        lost: list[str] = []
        read = Catalog.read

        def until(self: Catalog, entry: Entry) -> object:
            if next(reads) == 9:
                server.stop()
            return read(self, entry)

        def back(self: schedule.Patience, error: Any, commit: Any) -> None:
            lost.append(str(error))
            server.start()
            commit()

        monkeypatch.setattr(Catalog, "read", until)
        monkeypatch.setattr(schedule.Patience, "wait", back)
        far = scan(f"{server.url}/train", tmp_path / "far", readers=1)
    assert len(lost) == 1 and "cannot be read" in lost[0] and len(catalog) == 21
    assert not len(far.errors())
    for tap in near:
        assert np.array_equal(near[tap].top(0)["score"], far[tap].top(0)["score"])


@pytest.mark.parametrize("piece", [7000, 1 << 20])
def test_files_are_read_in_order_and_anywhere(
    files: Path, s3: Store, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", piece)
    data = (files / "shards" / "000.tar").read_bytes()
    with remote.File(f"s3://{s3.bucket}/data/shards/000.tar".encode()) as file:
        assert file.read(5) == data[:5] and file.tell() == 5
        assert file.seek(-7, os.SEEK_END) == len(data) - 7 and file.read(100) == data[-7:] and file.read(1) == b""
        assert file.seek(100) == 100 and file.readall() == data[100:]


def test_ahead_keeps_the_order_and_the_first_error() -> None:
    assert list(remote.ahead(lambda n: n * n, range(1000))) == [n * n for n in range(1000)]
    begun = []

    def some(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    given = remote.ahead(some, itertools.count())
    assert list(itertools.islice(given, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(given)
    assert len(begun) <= 4 * remote.AT_ONCE


@pytest.mark.parametrize(
    ("place", "path", "expected"),
    [
        ("s3://b/lists/x.txt", "a/1.jpg", "s3://b/lists/a/1.jpg"),
        ("s3://b/x.txt", "1.jpg", "s3://b/1.jpg"),
        ("s3://b/lists/x.txt", "../1.jpg", "s3://b/1.jpg"),
        ("s3://b/lists/x.txt", "../../../1.jpg", "s3://b/1.jpg"),
        ("s3://b/lists/x.txt", "a//1.jpg", "s3://b/lists/a//1.jpg"),
        ("s3://b/lists/x.txt", "gs://c/1.jpg", "gs://c/1.jpg"),
        ("s3://b/lists/x.txt", "/data/1.jpg", "/data/1.jpg"),
        ("https://h/l/x.txt?key=a/b", "1.jpg", "https://h/l/1.jpg"),
        ("/l/x.txt", "1.jpg", "/l/1.jpg"),
    ],
)
def test_what_a_row_of_a_list_means(place: str, path: str, expected: str) -> None:
    assert resolve(place.encode(), path.encode()) == expected.encode()


@pytest.mark.parametrize(
    ("path", "index", "where"),
    [
        ("/l/x.tar", "/l/x.tar.index", "/l"),
        ("/l/a?b#c/x.tar", "/l/a?b#c/x.tar.index", "/l/a?b#c"),
        ("s3://b/l/x?.tar", "s3://b/l/x?.tar.index", "s3://b/l"),
        ("https://h/l/x.tar", "https://h/l/x.tar.index", "https://h/l"),
        ("https://h/l/x.tar?key=a/b#c?d", "https://h/l/x.tar.index?key=a/b#c?d", "https://h/l"),
    ],
)
def test_files_beside_one(path: str, index: str, where: str) -> None:
    assert beside(path.encode(), ".index") == index.encode()
    assert folder(path.encode()) == where.encode()
    assert inside(where.encode(), "x") == f"{where}/x".encode()


class TestParts:
    """Of a file of 1,000 parts of 1,000 bytes, with blocks of 10,000."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, bytes, bytes]]:
        monkeypatch.setattr(parts, "BLOCK", 10_000)
        data = np.random.default_rng(0).bytes(1_000_000)
        (tmp_path / "x.tar").write_bytes(data)
        with web(tmp_path) as server:
            yield server, f"{server.url}/x.tar".encode(), data

    def test_in_a_row_they_cost_few_requests(self, file: tuple[Server, bytes, bytes]) -> None:
        server, path, data = file
        reader = parts.Parts()
        with ThreadPoolExecutor(16) as pool:
            read = list(pool.map(lambda number: reader.read(path, 1000 * number, 1000), range(1000)))
        assert b"".join(got.data for got in read) == data
        assert {got.size for got in read} == {len(data)} and len({got.modified for got in read}) == 1
        assert server.said["GET"] < 150
        assert len(reader._blocks) <= parts.KEPT
        reader.close()
        assert reader.read(path, 5, 7).data == data[5:12]
        reader.close()

    def test_here_and_there_each_is_one_request(self, file: tuple[Server, bytes, bytes]) -> None:
        server, path, data = file
        places = np.random.default_rng(0).integers(0, 999_000, 100)
        reader = parts.Parts()
        assert all(reader.read(path, place, 999).data == data[place : place + 999] for place in places.tolist())
        assert server.said["GET"] == 100 and not reader._blocks

    @pytest.mark.parametrize("length", [0, 1, 9_999, 10_001, 25_000])
    def test_any_length_across_blocks_and_beyond_the_end(self, file: tuple[Server, bytes, bytes], length: int) -> None:
        _, path, data = file
        reader = parts.Parts()
        for start in (*range(0, 40_000, 3_333), 995_000, *[996_001] * 8):
            assert reader.read(path, start, length).data == data[start : start + length]
        reader.close()

    def test_errors_are_not_kept(self, file: tuple[Server, bytes, bytes]) -> None:
        server, path, data = file
        reader = parts.Parts()
        for number in range(5):
            reader.read(path, number, 1)
        server.stop()
        for _ in range(3):
            with pytest.raises(ConnectionError):
                reader.read(path, 15_000, 100)
        server.start()
        assert reader.read(path, 15_000, 100).data == data[15_000:15_100]
        reader.close()
