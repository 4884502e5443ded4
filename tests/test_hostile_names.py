"""Labels and keys of every kind, all the way from a list or an archive to the pictures and pages that show them."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import maxact
from hostile import ODD, frugal
from maxact import cli, packed
from maxact.archives import printable
from maxact.catalog import Catalog
from maxact.render.gallery import write_gallery
from maxact.render.mosaic import write_mosaics
from maxact.render.page import shorten
from stores import scan
from support import photograph
from test_hostile_archives import END, member, pax

LABELS = [word for word in ODD if word]
KEPT = [printable(label) for label in LABELS]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> maxact.Store:
    """Of a list that gives each image an odd label."""
    folder = tmp_path_factory.mktemp("odd")
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["path", "label"])
    for number, label in enumerate(LABELS):
        photograph(number, 32).save(folder / f"{number}.png")
        writer.writerow([f"{number}.png", label])
    (folder / "list.csv").write_bytes(rows.getvalue().encode("utf-8", "surrogateescape"))
    made = scan(folder / "list.csv", folder / "x.zarr", layers=("bn1",), top=len(LABELS))
    return maxact.project(made, ranks=len(LABELS), channels=[0, 1])


def test_they_come_through_a_scan(store: maxact.Store) -> None:
    assert store.catalog.table["label"].to_pylist() == KEPT
    assert [packed.plain(label) for label in KEPT] == LABELS
    found = store["bn1"].top(0)
    assert sorted(found["label"].to_pylist()) == sorted(KEPT)


def test_info_and_export(store: maxact.Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(store.path)]) == 0
    assert cli.main(["info", "--json", str(store.path)]) == 0
    assert cli.main(["export", str(store.path), str(tmp_path / "x.parquet")]) == 0
    assert capfd.readouterr().err == ""
    labels = pq.read_table(tmp_path / "x.parquet")["label"].to_pylist()
    assert set(labels) == set(KEPT)


class Tags(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(name for name, _ in attributes)]


def test_the_gallery_has_them_as_text(store: maxact.Store, tmp_path: Path) -> None:
    words = {label: f"</script><b onload=x>{label}" for label in KEPT}
    write_gallery(store, tmp_path / "out", label_names=words)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert all(re.fullmatch(r"[A-Za-z0-9._/-]+", name) for name in names), names
    assert not any(label in name for name in names for label in KEPT)
    tags = Tags()
    tags.feed((tmp_path / "out" / "index.html").read_text("utf-8"))
    assert "b" not in tags.found and not any(name.startswith("on") for name in tags.found)
    seen: set[str] = set()
    for path in sorted((tmp_path / "out" / "data").glob("*.js")):
        script = path.read_bytes()
        # nothing but ASCII, one line, and nothing that ends a script
        assert script.isascii() and script.count(b"\n") == 1 and b"<" not in script and b"\r" not in script
        literal = re.search(rb'JSON\.parse\((".*")\)\);\n$', script)
        assert literal is not None
        content = json.loads(json.loads(literal[1]))
        seen |= {label[0] for label in content.get("labels", [])}
    assert seen == set(KEPT)


@pytest.mark.parametrize("format", ["png", "pdf"])
def test_mosaics_and_figures(store: maxact.Store, tmp_path: Path, format: str) -> None:
    with frugal(500):
        files = write_mosaics(store, tmp_path, channels=[0], format=format)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    assert all(re.fullmatch(r"bn1[A-Za-z0-9-]*\.(png|pdf)", path.name) for path in files)


def test_long_words_are_measured_a_few_times() -> None:
    class Font:
        calls = 0

        def getlength(self, words: str) -> float:
            self.calls += 1
            return 10 * len(words)

    font = Font()
    assert shorten("x" * 4000, 105, font) == "x" * 9 + "…"  # type: ignore[arg-type]
    assert font.calls < 20
    assert shorten("four", 40, font) == "four"  # type: ignore[arg-type]
    assert shorten("fourteen", 45, font) == "fou…"  # type: ignore[arg-type]
    assert shorten("fourteen", 5, font) == "…"  # type: ignore[arg-type]


def test_keys_of_an_archive(tmp_path: Path) -> None:
    content = b""
    for number, word in enumerate(LABELS):
        raw = word.encode("utf-8", "surrogateescape")
        picture = io.BytesIO()
        photograph(number, 32).save(picture, "PNG")
        content += pax((b"path", b"%d/" % number + raw[:4000] + b".png")) + member(picture.getvalue())
        content += pax((b"path", b"%d/" % number + raw[:4000] + b".cls")) + member(raw[:1000])
    (tmp_path / "x.tar").write_bytes(content + END)
    catalog = Catalog.build(tmp_path / "x.tar")
    keys = catalog.table["key"].to_pylist()
    assert len(set(keys)) == len(keys) and all(key.isprintable() for key in keys)
    made = scan(tmp_path / "x.tar", tmp_path / "x.zarr", layers=("bn1",), top=3)
    maxact.project(made, ranks=3, channels=[0])
    write_gallery(made, tmp_path / "out")
    write_mosaics(made, tmp_path / "sheets", channels=[0])
    assert {path.name for path in tmp_path.iterdir()} == {"x.tar", "x.zarr", "out", "sheets"}
