"""What each kind of source lists: keys, labels, places and order; and what is refused."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxact.archives import Row
from maxact.errors import MaxactError, UsageError
from maxact.sources import find, items


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def keys(source: str | Path) -> list[str]:
    return [row[0] for row in find(source)]


def labels(source: str | Path) -> dict[str, str]:
    return {row[0]: row[1] for row in find(source)}


def refused(source: str | Path, *words: str) -> None:
    with pytest.raises(MaxactError) as caught:
        list(find(source))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply; in a container the tests may run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TestFolder:
    def test_natural_order_with_files_and_folders_in_one(self, tmp_path: Path) -> None:
        make(tmp_path, "a10/x.jpg", "a9/x10.jpg", "a9/x9.jpg", "a9.jpg", "b/c/1.jpg", "a2/1.jpg", "a2/01.jpg")
        expected = ["a2/01.jpg", "a2/1.jpg", "a9/x9.jpg", "a9/x10.jpg", "a9.jpg", "a10/x.jpg", "b/c/1.jpg"]
        assert keys(tmp_path) == expected

    def test_order_does_not_depend_on_the_order_of_creation(self, tmp_path: Path) -> None:
        names = [f"f{i % 3}/{prefix}{i}.jpg" for i in range(12) for prefix in ("", "0", "é", "E\u0301", "²")]
        one, other = make(tmp_path / "one", *names), make(tmp_path / "other", *reversed(names))
        assert keys(one) == keys(other)
        assert len(keys(one)) == len(names)

    def test_label_is_the_folder_that_holds_the_file(self, tmp_path: Path) -> None:
        make(tmp_path, "x.jpg", "cat/x.jpg", "cat/tabby/x.jpg")
        assert labels(tmp_path) == {"x.jpg": "", "cat/x.jpg": "cat", "cat/tabby/x.jpg": "tabby"}

    def test_only_pictures_in_any_case_and_nothing_hidden(self, tmp_path: Path) -> None:
        pictures = ["a.JPEG", "b.Png", "c.webp", "d.gif", "e.tar.bmp"]
        make(tmp_path, *pictures, "README.md", "x.tar", "jpg", ".hidden.jpg", ".cache/x.jpg", "._a.jpg")
        assert keys(tmp_path) == pictures

    def test_place_length_and_time(self, tmp_path: Path) -> None:
        path = make(tmp_path, "cat/x.jpg") / "cat/x.jpg"
        row: Row = ("cat/x.jpg", "cat", os.fsencode(path), 0, len("cat/x.jpg"), path.stat().st_mtime_ns)
        assert list(find(tmp_path)) == [row]

    def test_relative_folders_give_absolute_sources(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make(tmp_path, "data/x.jpg")
        monkeypatch.chdir(tmp_path)
        assert [row[2] for row in find("./data/")] == [os.fsencode(tmp_path / "data/x.jpg")]
        monkeypatch.chdir(tmp_path / "data")
        assert keys(".") == ["x.jpg"]

    def test_links_are_followed_but_not_for_ever(self, tmp_path: Path) -> None:
        make(tmp_path, "root/a/1.jpg", "elsewhere/2.jpg")
        (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
        (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "root/knot").symlink_to(tmp_path / "root/knot")
        assert keys(tmp_path / "root") == ["a/1.jpg", "b/2.jpg"]
        assert keys(f"{tmp_path}/root/**/*.jpg") == ["a/1.jpg", "b/2.jpg"]

    def test_a_link_to_nothing_stays_as_missing(self, tmp_path: Path) -> None:
        make(tmp_path, "a.jpg")
        (tmp_path / "b.jpg").symlink_to("nothing")
        assert [row[4:] for row in find(tmp_path)][1] == (0, 0)

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        raw = os.fsencode(tmp_path) + b"/\xff\xe9.jpg"
        with open(raw, "wb"):
            pass
        assert [row[2] for row in find(tmp_path)] == [raw]

    def test_archives_where_there_are_no_pictures(self, tmp_path: Path) -> None:
        for number in (10, 9):
            pq.write_table(pa.table({"image": [b"x"]}), make(tmp_path, "data/x.md") / f"data/{number}.parquet")
        assert keys(tmp_path) == ["data/9.parquet/0", "data/10.parquet/0"]

    def test_refusals(self, tmp_path: Path) -> None:
        refused(tmp_path / "none", "none does not exist")
        refused(make(tmp_path / "empty", "x.md"), "empty holds no images")
        refused(f"{tmp_path}/a\nb\0", "does not exist")
        locked = make(tmp_path / "locked", "x.jpg")
        locked.chmod(0)
        with unprivileged():
            refused(locked, "cannot read", "Permission denied")
        locked.chmod(0o700)


class TestGlob:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return make(
            tmp_path / "p",
            "1.jpg",
            "a/2.jpg",
            "a/b/10.jpg",
            "a/b/9.png",
            "a/b/c/x.jpg",
            "z/n.txt",
            ".h/x.jpg",
        )

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*.jpg", ["1.jpg"]),
            ("*/*.jpg", ["a/2.jpg"]),
            ("**/*.jpg", ["1.jpg", "a/2.jpg", "a/b/10.jpg", "a/b/c/x.jpg"]),
            ("**", ["1.jpg", "a/2.jpg", "a/b/9.png", "a/b/10.jpg", "a/b/c/x.jpg"]),
            ("a/**/b/**/[x0-9]*.*", ["b/9.png", "b/10.jpg", "b/c/x.jpg"]),
            ("**/**/x.jpg", ["a/b/c/x.jpg"]),
            ("?/b", ["a/b/9.png", "a/b/10.jpg", "a/b/c/x.jpg"]),
            ("{a,.}/[0-9].jpg", ["a/2.jpg", "1.jpg"]),
            ("a/b/{9..10}.{png,jpg}", None),
            ("a/b/{9.png,10.jpg}", ["9.png", "10.jpg"]),
        ],
    )
    def test_patterns(self, root: Path, pattern: str, expected: list[str] | None) -> None:
        if expected is None:
            refused(f"{root}/{pattern}", "9.jpg does not exist")
        else:
            assert keys(f"{root}/{pattern}") == expected

    def test_label_is_the_folder(self, root: Path) -> None:
        assert labels(f"{root}/*.jpg") == {"1.jpg": "p"}
        assert labels(f"{root}/*/b/c") == {"a/b/c/x.jpg": "c"}

    def test_a_name_that_exists_is_no_pattern(self, tmp_path: Path) -> None:
        make(tmp_path, "[1]/{a,b}.jpg", "1/x.jpg")
        assert keys(f"{tmp_path}/[1]") == ["{a,b}.jpg"]
        assert keys(f"{tmp_path}/[1]/{{a,b}}.jpg") == ["{a,b}.jpg"]

    def test_refusals(self, root: Path) -> None:
        refused(f"{root}/*.webp", "*.webp holds no images")
        refused(f"{root}/{{a,b", "braces do not pair up")
        refused(f"{root}/nowhere/*.jpg", "cannot read", "nowhere")

    def test_home(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(root))
        assert keys("~/*.jpg") == ["1.jpg"]


class TestList:
    def test_text(self, tmp_path: Path) -> None:
        make(tmp_path, "a/1.jpg", "l/2.xyz")
        listing = tmp_path / "l/list.txt"
        listing.write_bytes(f"\ufeff# comment\n../a/1.jpg\r\n\n  \n2.xyz\n{tmp_path}/a/1.jpg\n2.xyz".encode())
        rows = list(find(listing))
        assert [row[0] for row in rows] == ["../a/1.jpg", "2.xyz", f"{tmp_path}/a/1.jpg", "2.xyz"]
        assert [row[1] for row in rows] == ["a", "l", "a", "l"]
        assert all(os.path.isabs(row[2]) and row[4] == os.stat(row[2]).st_size for row in rows)

    def test_missing_files_stay(self, tmp_path: Path) -> None:
        make(tmp_path, "a.jpg")
        (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\na.jpg/c.jpg\n" + "x" * 300 + "\n")
        assert [row[4:] == (0, 0) for row in find(tmp_path / "list.txt")] == [False, True, True, True]

    def test_csv(self, tmp_path: Path) -> None:
        make(tmp_path, "a/1.jpg", "a/2,3.jpg")
        listing = tmp_path / "list.csv"
        with open(listing, "w", newline="") as file:
            csv.writer(file).writerows([["label", " Path"], ["cat", "a/1.jpg"], [], ["", "a/2,3.jpg"], ["dog", ""]])
        assert labels(listing) == {"a/1.jpg": "cat", "a/2,3.jpg": ""}
        listing.write_text("file,size\na/1.jpg,3\n")
        assert labels(listing) == {"a/1.jpg": "a"}

    def test_parquet(self, tmp_path: Path) -> None:
        make(tmp_path, "a/1.jpg", "b/2.jpg")
        paths = ["a/1.jpg", str(tmp_path / "b/2.jpg")]
        pq.write_table(pa.table({"label": [3, None], "path": paths}), tmp_path / "list.parquet", row_group_size=1)
        assert labels(tmp_path / "list.parquet") == dict(zip(paths, ["3", ""], strict=True))
        pq.write_table(pa.table({"path": [os.fsencode(path) for path in paths]}), tmp_path / "list.parquet")
        assert labels(tmp_path / "list.parquet") == dict(zip(paths, ["a", "b"], strict=True))

    def test_paths_that_are_not_utf8(self, tmp_path: Path) -> None:
        raw = os.fsencode(tmp_path) + b"/\xff.jpg"
        with open(raw, "wb") as file:
            file.write(b"x")
        (tmp_path / "list.txt").write_bytes(b"\xff.jpg\n")
        (tmp_path / "list.csv").write_bytes(b"path\n\xff.jpg\n")
        for name in ("list.txt", "list.csv"):
            assert [(row[2], row[4]) for row in find(tmp_path / name)] == [(raw, 1)]

    def test_refusals(self, tmp_path: Path) -> None:
        files = {
            "empty.txt": b"# nothing\n",
            "wrong.txt": b"a.jpg\nb.jpg\n",
            "binary.txt": b"a.jpg\n\x89PNG\0\n",
            "headless.csv": b"a.jpg,cat\nb.jpg,dog\n",
            "short.csv": b"path,label\na.jpg\n",
            "quotes.csv": b'path\n"a.jpg" b\n',
            "zero.csv": b"path\na\0.jpg\n",
            "void.csv": b"",
            "x.zip": b"PK",
            "x.parquet": b"PAR1",
            "x.tar.gz": b"",
        }
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        refused(tmp_path / "empty.txt", "holds no images")
        refused(tmp_path / "wrong.txt", "none of the files", "wrong.txt", "a.jpg")
        refused(tmp_path / "binary.txt", "line 2", "zero byte")
        refused(tmp_path / "headless.csv", "no header")
        refused(tmp_path / "short.csv", "line 2")
        refused(tmp_path / "quotes.csv", "line 2")
        refused(tmp_path / "zero.csv", "zero byte")
        refused(tmp_path / "void.csv", "holds no images")
        refused(tmp_path / "x.zip", "x.zip cannot be indexed")
        refused(tmp_path / "x.parquet", "damaged")
        refused(tmp_path / "x.tar.gz", "compressed")
        pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
        refused(tmp_path / "other.parquet", "neither", "columns are a")
        pq.write_table(pa.table({"path": [None, "a"]}), tmp_path / "null.parquet")
        refused(tmp_path / "null.parquet", "row 0")


def test_one_picture(tmp_path: Path) -> None:
    make(tmp_path, "cat/x.jpg")
    assert labels(tmp_path / "cat/x.jpg") == {"x.jpg": "cat"}


class TestDataset:
    def test_rows(self) -> None:
        assert list(items(["a", "b"])) == [("item/0", "", b"", 0, -1, 0), ("item/1", "", b"", 1, -1, 0)]

    @pytest.mark.parametrize(
        ("targets", "classes", "expected"),
        [
            ([1, 0], ["cat", "dog"], ["dog", "cat"]),
            (pa.array([1, 0]).to_numpy(), [("cat", "kitty"), ("dog",)], ["dog", "cat, kitty"]),
            ([1, 7], ["cat", "dog"], ["1", "7"]),
            ([1, 7], None, ["1", "7"]),
            ([1], ["cat", "dog"], ["", ""]),
        ],
    )
    def test_labels(self, targets: object, classes: object, expected: list[str]) -> None:
        class Pictures(list[str]):
            pass

        pictures = Pictures(["a", "b"])
        pictures.targets = targets  # type: ignore[attr-defined]
        if classes:
            pictures.classes = classes  # type: ignore[attr-defined]
        assert [row[1] for row in items(pictures)] == expected

    def test_refusals(self) -> None:
        for thing in (3, iter("ab"), {1, 2}):
            with pytest.raises(UsageError, match=type(thing).__name__):
                list(items(thing))
        with pytest.raises(MaxactError, match="no images"):
            list(items([]))
