"""The catalog as a whole: numbers, keys, selection, saving, and reading from every kind of source."""

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maxact.archives import printable
from maxact.catalog import SCHEMA, Catalog, Changed, Entry, Shard, select, unique
from maxact.errors import MaxactError, UsageError

NAMES = st.text(st.characters() | st.characters(categories=["Cs"]) | st.sampled_from('a\\#2"\n/'), max_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten files in each of three folders; a file holds its own name."""
    for label in ("cat", "cow", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "data" / label / f"{number}.jpg").write_bytes(f"{label}/{number}.jpg".encode())
    return tmp_path / "data"


def keys(catalog: Catalog) -> list[str]:
    return [entry.key for entry in catalog.entries(0, len(catalog))]


class TestKeys:
    @given(NAMES, NAMES)
    def test_escapes_are_printable_and_injective(self, one: str, other: str) -> None:
        assert printable(one).isprintable()
        assert (printable(one) == printable(other)) == (one == other)

    @given(st.lists(st.lists(st.text("a#23", max_size=4)), max_size=5))
    def test_unique(self, chunks: list[list[str]]) -> None:
        names = [name for chunk in chunks for name in chunk]
        made = unique(pa.chunked_array(chunks, pa.string())).to_pylist()
        assert len(set(made)) == len(made) == len(names)
        assert all(new.startswith(old) for old, new in zip(names, made, strict=True))
        if len(set(names)) == len(names):
            assert made == names

    def test_repeats_are_numbered(self) -> None:
        array = pa.chunked_array([["a", "b", "a"], ["a", "a#2"]], pa.string())
        assert unique(array).to_pylist() == ["a", "b", "a#2", "a#3", "a#2#2"]

    def test_repeated_paths_in_a_list(self, folder: Path) -> None:
        (folder / "list.txt").write_text("cat/1.jpg\ncat/2.jpg\ncat/1.jpg\n")
        catalog = Catalog.build(folder / "list.txt")
        assert keys(catalog) == ["cat/1.jpg", "cat/2.jpg", "cat/1.jpg#2"]
        assert catalog.read(catalog.entry(2)) == b"cat/1.jpg"

    def test_odd_file_names(self, tmp_path: Path) -> None:
        names = [b"\xff.jpg", b"\\udcff.jpg", b"a\nb.jpg", b"\xe2\x80\x8b.jpg", b"\xc3\xa9.jpg", b"<b>&.jpg"]
        for name in names:
            (tmp_path / os.fsdecode(b"d/" + name)).parent.mkdir(exist_ok=True)
            (tmp_path / os.fsdecode(b"d/" + name)).write_bytes(name)
        catalog = Catalog.build(tmp_path / "d")
        assert all(key.isprintable() for key in keys(catalog))
        assert "é.jpg" in keys(catalog)
        read = {catalog.read(entry) for entry in catalog.entries(0, len(catalog))}
        assert read == set(names)
        catalog.save(tmp_path / "images.parquet")
        assert Catalog.load(tmp_path / "images.parquet").table.equals(catalog.table)


class TestSelection:
    def test_where(self, folder: Path) -> None:
        assert {entry.label for entry in Catalog.build(folder, where=["c*"]).entries(0, 20)} == {"cat", "cow"}
        assert len(Catalog.build(folder, where=["ca?", "dog"])) == 20
        assert len(Catalog.build(folder, where="dog")) == 10
        with pytest.raises(
            MaxactError, match=r"no label matches bird or Cat; of 3 labels the first are 'cat', 'cow', 'dog'"
        ):
            Catalog.build(folder, where=["bird", "Cat"])

    def test_order_of_the_three(self, folder: Path) -> None:
        catalog = Catalog.build(folder, where=["c*"], sample=12, seed=3, limit=5)
        sampled = Catalog.build(folder, where=["c*"], sample=12, seed=3)
        assert keys(catalog) == keys(sampled)[:5]
        assert len(sampled) == 12
        assert [entry.number for entry in catalog.entries(0, 5)] == list(range(5))

    @given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5), st.integers(1, 70))
    def test_sample_and_limit(self, n: int, sample: int, seed: int, limit: int) -> None:
        table = pa.table({"label": pa.array([str(i % 3) for i in range(n)]), "row": pa.array(range(n))})
        rows = select(table, (), sample, seed, None)["row"].to_pylist()
        assert rows == sorted(set(rows))
        assert len(rows) == min(sample, n)
        assert select(table, (), sample, seed, limit)["row"].to_pylist() == rows[:limit]
        some = select(table, ["0"], sample, seed, None)["row"].to_pylist()
        assert len(some) == min(sample, (n + 2) // 3)
        assert all(row % 3 == 0 for row in some)

    def test_seeds_differ(self, folder: Path) -> None:
        samples = [tuple(keys(Catalog.build(folder, sample=10, seed=seed))) for seed in (0, 0, 1)]
        assert samples[0] == samples[1] != samples[2]

    def test_keys_do_not_depend_on_the_selection(self, folder: Path) -> None:
        (folder / "list.txt").write_text("cat/1.jpg\n" * 5)
        sample = keys(Catalog.build(folder / "list.txt", sample=3))
        assert set(sample) < set(keys(Catalog.build(folder / "list.txt")))

    @pytest.mark.parametrize("wrong", [{"limit": 0}, {"sample": -1}, {"seed": -1}])
    def test_what_cannot_be_meant(self, folder: Path, wrong: dict[str, int]) -> None:
        with pytest.raises(UsageError, match="must be at least"):
            Catalog.build(folder, **wrong)  # type: ignore[arg-type]


class TestEntries:
    def test_schema_and_numbers(self, folder: Path) -> None:
        catalog = Catalog.build(str(folder))
        assert catalog.table.schema.equals(SCHEMA)
        assert len(catalog) == 30
        path = folder / "cow/0.jpg"
        expected = Entry(10, "cow/0.jpg", "cow", os.fsencode(path), 0, 9, path.stat().st_mtime_ns)
        assert catalog.entry(10) == expected
        assert catalog.entries(9, 12)[1] == expected
        assert catalog.entries(30, 30) == []
        for start, stop in ((-1, 3), (4, 3), (0, 31)):
            with pytest.raises(IndexError):
                catalog.entries(start, stop)

    def test_several_sources(self, folder: Path) -> None:
        catalog = Catalog.build([folder / "dog", str(folder / "cat/3.jpg"), f"{folder}/cow/[12].jpg"])
        assert keys(catalog) == [*(f"{i}.jpg" for i in range(10)), "3.jpg#2", "1.jpg#2", "2.jpg#2"]
        with pytest.raises(MaxactError, match="no images"):
            Catalog.build([])
        with pytest.raises(MaxactError, match="nowhere does not exist"):
            Catalog.build([folder, folder / "nowhere"])

    @given(st.integers(0, 40), st.integers(1, 50))
    def test_shards(self, n: int, size: int) -> None:
        table = pa.table({"image": np.arange(n)})
        shards = Catalog(table).shards(size)
        assert [number for shard in shards for number in range(shard.start, shard.stop)] == list(range(n))
        assert [shard.index for shard in shards] == list(range(len(shards)))
        assert all(shard.stop - shard.start == size for shard in shards[:-1])
        assert all(isinstance(shard, Shard) and shard.stop > shard.start for shard in shards)

    def test_shards_hold_at_least_one(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            Catalog.build(folder).shards(0)


class TestSaving:
    def test_round_trip(self, folder: Path, tmp_path: Path) -> None:
        catalog = Catalog.build(folder)
        path = tmp_path / "images.parquet"
        path.write_bytes(b"old")
        catalog.save(path)
        assert pq.read_schema(path).equals(SCHEMA)
        assert Catalog.load(path).table.equals(catalog.table)
        assert sorted(os.listdir(tmp_path)) == ["data", "images.parquet"]

    def test_what_cannot_be_loaded(self, tmp_path: Path) -> None:
        path = tmp_path / "images.parquet"
        with pytest.raises(MaxactError, match=r"cannot read .*images.parquet: "):
            Catalog.load(path)
        path.write_bytes(b"PAR1 no")
        with pytest.raises(MaxactError, match="damaged"):
            Catalog.load(path)
        for table in (pa.table({"image": [0]}), SCHEMA.empty_table().drop_columns(["key"])):
            pq.write_table(table, path)
            with pytest.raises(MaxactError, match="not a catalog"):
                Catalog.load(path)

    def test_numbers_are_checked(self, folder: Path, tmp_path: Path) -> None:
        pq.write_table(Catalog.build(folder).table.slice(1), tmp_path / "images.parquet")
        with pytest.raises(MaxactError, match="not a catalog"):
            Catalog.load(tmp_path / "images.parquet")

    def test_what_cannot_be_written(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(MaxactError, match=r"cannot write .*none/images.parquet: No such file"):
            Catalog.build(folder).save(tmp_path / "none/images.parquet")
        (tmp_path / "images.parquet").mkdir()
        with pytest.raises(MaxactError, match="cannot write"):
            Catalog.build(folder).save(tmp_path / "images.parquet")
        assert sorted(os.listdir(tmp_path)) == ["data", "images.parquet"]


class TestReading:
    def test_every_kind_of_source_after_loading(self, folder: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            member = tarfile.TarInfo("t/1.jpg")
            member.size = 3
            archive.addfile(member, io.BytesIO(b"tar"))
        pq.write_table(pa.table({"image": [b"zero", b"row"]}), tmp_path / "x.parquet")
        catalog = Catalog.build([folder, tmp_path / "x.tar", tmp_path / "x.parquet"])
        catalog.save(tmp_path / "images.parquet")
        catalog = Catalog.load(tmp_path / "images.parquet")
        expected = [f"{label}/{i}.jpg".encode() for label in ("cat", "cow", "dog") for i in range(10)]
        entries = catalog.entries(0, len(catalog))
        for _ in range(2):
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(catalog.read, entries)) == [*expected, b"tar", b"zero", b"row"]
            catalog.close()

    def test_changed_files(self, folder: Path) -> None:
        (folder / "list.txt").write_text("cat/0.jpg\ncat/1.jpg\ncat/2.jpg\ncat/3.jpg\nnew.jpg\ngone.jpg\n")
        catalog = Catalog.build(folder / "list.txt")
        entries = catalog.entries(0, 6)
        (folder / "cat/1.jpg").write_bytes(b"longer than it was")
        os.utime(folder / "cat/2.jpg", ns=(1, 1))
        (folder / "cat/3.jpg").unlink()
        (folder / "new.jpg").write_bytes(b"")
        assert catalog.read(entries[0]) == b"cat/0.jpg"
        with pytest.raises(Changed, match=r"^changed: .*cat/1.jpg has 18 bytes, but had 9"):
            catalog.read(entries[1])
        with pytest.raises(Changed, match=r"^changed: .*cat/2.jpg was modified"):
            catalog.read(entries[2])
        with pytest.raises(FileNotFoundError):
            catalog.read(entries[3])
        with pytest.raises(Changed, match=r"^changed: .*new.jpg was missing"):
            catalog.read(entries[4])
        with pytest.raises(FileNotFoundError):
            catalog.read(entries[5])

    @pytest.mark.timeout(20)
    def test_what_is_not_a_file_does_not_block(self, tmp_path: Path) -> None:
        (tmp_path / "d.jpg").write_bytes(b"")
        os.mkfifo(tmp_path / "pipe.jpg")
        catalog = Catalog.build(tmp_path)
        assert catalog.read(catalog.entry(0)) == b""
        with pytest.raises(OSError, match="not a regular file"):
            catalog.read(catalog.entry(1))


class Pictures:
    """A map-style Dataset, with or without a label beside the picture."""

    classes = ("cat", "dog")

    def __init__(self, n: int, labelled: bool) -> None:
        self.targets = [i % 2 for i in range(n)]
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> object:
        picture = Image.new("RGB", (4, 4), (index, 0, 0))
        return (picture, self.targets[index]) if self.labelled else picture


class TestDataset:
    @pytest.mark.parametrize("labelled", [True, False])
    def test_pictures(self, tmp_path: Path, labelled: bool) -> None:
        dataset = Pictures(10, labelled)
        catalog = Catalog.build(dataset, where=["dog"], limit=3)
        assert keys(catalog) == ["item/1", "item/3", "item/5"]
        catalog.save(tmp_path / "images.parquet")
        loaded = Catalog.load(tmp_path / "images.parquet", dataset)
        for each in (catalog, loaded):
            picture = each.read(each.entry(2))
            assert isinstance(picture, Image.Image)
            assert picture.getpixel((0, 0)) == (5, 0, 0)

    def test_without_or_with_another(self, tmp_path: Path) -> None:
        Catalog.build(Pictures(10, True)).save(tmp_path / "images.parquet")
        loaded = Catalog.load(tmp_path / "images.parquet")
        with pytest.raises(MaxactError, match="item/0 is an item of a Dataset"):
            loaded.read(loaded.entry(0))
        with pytest.raises(MaxactError, match=r"9 items, .* at least 10"):
            Catalog.load(tmp_path / "images.parquet", Pictures(9, True))

    def test_a_list_of_pictures(self) -> None:
        pictures = [np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)]
        catalog = Catalog.build(pictures)
        assert catalog.read(catalog.entry(1)) is pictures[1]

    def test_what_is_no_dataset(self) -> None:
        with pytest.raises(UsageError, match="not int"):
            Catalog.build(3)


def test_how_many_images_have_been_found_is_told_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("a.jpg\n" * 2500)
    told: list[int] = []
    assert len(Catalog.build(tmp_path / "list.txt", report=told.append)) == 2500
    assert told and told == sorted(set(told)) and told[-1] <= 2500 and len(told) >= 2
