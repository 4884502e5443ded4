"""The catalog: a numbered list of the images of a dataset, and the way from a number to the image's bytes."""

import fnmatch
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maxact import remote, sources
from maxact.archives import Changed, Row, TarReader, printable, read_far, reading, show
from maxact.errors import MaxactError, UsageError
from maxact.files import replace_file
from maxact.groups import RowGroupReader
from maxact.limits import LARGEST, LONGEST
from maxact.urls import is_remote

__all__ = ["Catalog", "Changed", "Entry", "Shard"]

SCHEMA = pa.schema(
    [
        ("image", pa.int64()),
        ("key", pa.string()),
        ("label", pa.string()),
        ("source", pa.binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("modified", pa.int64()),
    ]
)
BATCH = 32_768  # rows that exist as Python objects at a time
TOLD = 1024  # rows from one report to the next: a second where a look at a file takes a millisecond

# Arrow's own allocator keeps twice the memory that the columns take while they grow batch by batch.
POOL = pa.system_memory_pool()

# Not to wait at a named pipe for someone to write to it.
OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

PATH = (str, bytes, os.PathLike)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of the catalog.

    `source`, `offset` and `length` say where its bytes are: a whole file (offset 0, length its size; length and
    modified 0 if it was missing), a member of a tar archive (offset of its data, at least 512), a row of a Parquet file
    (offset its row, length -1), or an item of a Dataset (source empty, offset its index, length -1).
    """

    number: int
    key: str  # printable and unique
    label: str
    source: bytes  # absolute path, or URL
    offset: int
    length: int
    modified: int  # of the source, in nanoseconds; of a URL see remote.Status


@dataclass(frozen=True, slots=True)
class Shard:
    """The images start..stop-1."""

    index: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"shard {self.index} (images {self.start} to {self.stop - 1})"


class Catalog:
    """The images of a dataset, numbered from 0. Immutable; `read` may be called by many threads at once."""

    def __init__(self, table: pa.Table, dataset: object | None = None) -> None:
        self.table = table  # columns as in SCHEMA
        self.dataset = dataset  # the map-style Dataset that it was made from, if any
        self._tars = TarReader()
        self._groups = RowGroupReader()

    def __reduce__(self) -> tuple[type["Catalog"], tuple[pa.Table, object]]:
        """Another process opens archives for itself."""
        return type(self), (self.table, self.dataset)

    @classmethod
    def build(
        cls,
        images: object,
        *,
        where: Sequence[str] = (),
        sample: int | None = None,
        seed: int = 0,
        limit: int | None = None,
        report: Callable[[int], None] = lambda count: None,
    ) -> "Catalog":
        """List and number images.

        images: a path, a sequence of paths, or a map-style Dataset whose items are pictures or tuples that start with
            one. A path is a folder, a glob, a list (.txt, .csv, .parquet), tar archives, Parquet files or a picture,
            here or at an s3://, gs:// or http(s):// URL.
            Images of a pack (`maxact pack`) have the keys and labels that they had in its source.
        where: globs over labels, of which any may match; then a random `sample`, the same for the same seed, in the
            order of the list; then the first `limit`.
        report: called now and then with how many images have been found.

        MaxactError: a source is missing, empty, unreadable or cannot be indexed, or no label matches. A missing file
        in a list is none: it stays in the catalog with length and modified 0, and reading it fails.
        UsageError: an argument cannot be meant.
        """
        for name, value in (("sample", sample), ("limit", limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if seed < 0:
            raise UsageError(f"seed must be at least 0, not {seed}")
        if is_dataset(images):
            table = _tabulate(_told(sources.items(images), report))
        else:
            paths = [images] if isinstance(images, PATH) else images
            table = _tabulate(_told(chain.from_iterable(map(sources.find, paths)), report))  # type: ignore[call-overload]
        if not len(table):
            raise MaxactError("no images were given")
        # Keys are settled before anything is left out, so that an image keeps its key in every selection.
        table = table.set_column(table.schema.get_field_index("key"), "key", unique(table["key"]))
        table = select(table, [where] if isinstance(where, str) else where, sample, seed, limit)
        table = table.add_column(0, "image", pa.array(np.arange(len(table))))
        return cls(table, images if is_dataset(images) else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dataset: object | None = None) -> "Catalog":
        """Read what `save` wrote; nothing is listed again. dataset: the one that it was made from, to read from it.

        MaxactError: the file is missing, damaged or no catalog, or the dataset has become too short for it.
        """
        with reading(os.fsencode(path)):
            table = pq.read_table(pa.OSFile(os.fsencode(path)))
            good = _is_catalog(table)
        if not good:
            raise MaxactError(f"{printable(str(path))} is not a catalog of images made by maxact")
        if dataset is not None and len(table):
            needed = pc.max(table["offset"]).as_py() + 1
            if len(dataset) < needed:  # type: ignore[arg-type]
                raise MaxactError(
                    f"the dataset has {len(dataset)} items, "  # type: ignore[arg-type]
                    f"but {printable(str(path))} was made from one with at least {needed}: give the same one"
                )
        return cls(table.select(SCHEMA.names), dataset)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the catalog as one Parquet file, all or nothing, and durably. MaxactError: it cannot be written."""

        def write(aside: Path) -> None:
            with open(aside, "wb") as file:
                pq.write_table(self.table, file, compression="zstd", use_dictionary=["label"], row_group_size=4 * BATCH)

        try:
            replace_file(Path(path), write)
        except OSError as error:
            raise MaxactError(f"cannot write {printable(str(path))}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def entries(self, start: int, stop: int) -> list[Entry]:
        """The images start..stop-1. IndexError: there are not so many."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"images {start}..{stop} of a catalog of {len(self)}")
        columns = self.table.slice(start, stop - start).to_pydict()
        return [Entry(*row) for row in zip(*(columns[name] for name in SCHEMA.names), strict=True)]

    def entry(self, number: int) -> Entry:
        """IndexError: there is no such image."""
        return self.entries(number, number + 1)[0]

    def take(self, numbers: Sequence[int] | np.ndarray) -> "Catalog":
        """A catalog of some of the images, numbered anew in the order of `numbers`."""
        table = self.table.take(pa.array(numbers, pa.int64()))
        table = table.set_column(0, "image", pa.array(np.arange(len(table))))
        return Catalog(table, self.dataset)

    def shards(self, size: int) -> list[Shard]:
        """All images in contiguous ranges of `size`, the last one shorter. ValueError: the size is below 1."""
        if size < 1:
            raise ValueError(f"a shard must hold at least 1 image, not {size}")
        starts = range(0, len(self), size)
        return [Shard(index, start, min(start + size, len(self))) for index, start in enumerate(starts)]

    def read(self, entry: Entry) -> object:
        """The encoded image as bytes, or the picture that the Dataset returns.

        OSError: it cannot be read, now; Changed: it is not what was catalogued; for pictures whatever the Dataset
        raises. MaxactError: the image is an item of a Dataset and this catalog has none.
        """
        if entry.length > LARGEST:
            raise OSError(f"{entry.length / 2**30:,.0f} GiB: no image is so large")
        if entry.length < 0:
            if entry.source:
                return self._groups.read(entry.source, entry.offset, entry.modified)
            return self._picture(entry)
        if entry.offset:
            return self._tars.read(entry.source, entry.offset, entry.length, entry.modified)
        if is_remote(entry.source):
            return _read_url(entry)
        return _read_file(entry)

    def _picture(self, entry: Entry) -> object:
        if self.dataset is None:
            raise MaxactError(f"{entry.key} is an item of a Dataset: give that again")
        item = self.dataset[entry.offset]  # type: ignore[index]
        return item[0] if isinstance(item, tuple | list) else item

    def close(self) -> None:
        """Let go of open archives and of row groups in memory; a later `read` opens them again."""
        self._tars.close()
        self._groups.close()


def _is_catalog(table: pa.Table) -> bool:
    """Whether a table has the columns of a catalog, and in them what a catalog can have."""
    if len(set(table.column_names)) < len(table.column_names) or not set(SCHEMA.names) <= set(table.column_names):
        return False
    table = table.select(SCHEMA.names)
    if table.schema.types != SCHEMA.types or any(column.null_count for column in table.columns):
        return False
    try:
        table.select(["key", "label"]).validate(full=True)
    except pa.ArrowInvalid:  # text that is no UTF-8
        return False
    least = [pc.min(table[name]).as_py() for name in ("offset", "length")] if len(table) else [0, 0]
    return least[0] >= 0 and least[1] >= -1 and np.array_equal(table["image"].to_numpy(), np.arange(len(table)))


def is_dataset(images: object) -> bool:
    """Whether `images` is to be taken as a map-style Dataset, and not as a path or a sequence of paths."""
    if isinstance(images, list | tuple):
        return not all(isinstance(image, PATH) for image in images)
    return not isinstance(images, PATH)


def _read_file(entry: Entry) -> bytes:
    fd = os.open(entry.source, OPEN)
    try:
        status = os.fstat(fd)
        if status.st_size != entry.length or status.st_mtime_ns != entry.modified:
            raise Changed(_change(entry, status))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{show(entry.source)} is not a regular file")
        data = os.read(fd, entry.length)
        while len(data) < entry.length:
            more = os.read(fd, entry.length - len(data))
            if not more:
                raise Changed(f"changed: {show(entry.source)} became shorter while it was read")
            data += more
        return data
    finally:
        os.close(fd)


def _read_url(entry: Entry) -> bytes:
    if entry.length or entry.modified:
        return read_far(entry.source, entry.length, entry.modified)
    remote.stat(entry.source, patient=False)  # as a rule it is missing still
    raise Changed(f"changed: {show(entry.source)} was missing when it was catalogued")


def _change(entry: Entry, status: os.stat_result) -> str:
    path = show(entry.source)
    if not entry.length and not entry.modified:
        return f"changed: {path} was missing when it was catalogued"
    if status.st_size != entry.length:
        return f"changed: {path} has {status.st_size} bytes, but had {entry.length} when it was catalogued"
    return f"changed: {path} was modified after it was catalogued"


def _told(rows: Iterator[Row], report: Callable[[int], None]) -> Iterator[Row]:
    """The same rows; every so many of them are reported."""
    for count, row in enumerate(rows, start=1):
        if count % TOLD == 0:
            report(count)
        if len(row[0]) > LONGEST or len(row[1]) > LONGEST:
            name = max(row[:2], key=len)
            raise MaxactError(
                f"{show(row[2])}: has a name of {len(name):,} characters, and more than {LONGEST:,} are not taken: "
                f"{printable(name[:60])}…"
            )
        yield row


def _tabulate(rows: Iterator[Row]) -> pa.Table:
    """All columns but `image`. Rows become Arrow as they come: as Python objects, 1.28 million take 600 MB."""
    schema = pa.schema(list(SCHEMA)[1:])
    batches = []
    while chunk := list(islice(rows, BATCH)):
        keys, labels, *others = zip(*chunk, strict=True)
        columns: list[Iterable[object]] = [[*map(printable, keys)], [*map(printable, labels)], *others]
        arrays = [pa.array(column, kind, memory_pool=POOL) for column, kind in zip(columns, schema.types, strict=True)]
        batches.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema)


def unique(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """The first of equal keys stays, the others get #2, #3, …; again, as long as that makes one that is in use."""
    while True:
        # 64-bit hashes stand for the keys, because sorting or hashing these in Arrow takes 250 MB for 1.28 million.
        # Two keys with the same hash would be renamed without need, no more.
        hashes = [np.fromiter(map(hash, chunk.to_pylist()), np.int64, len(chunk)) for chunk in keys.chunks]
        rank = _rank_among_equals(np.concatenate([*hashes, np.empty(0, np.int64)]))
        if not rank.any():
            return keys
        chunks, start = [], 0
        for chunk in keys.chunks:
            ranks = rank[start : start + len(chunk)]
            numbered = pc.binary_join_element_wise(chunk, pa.array(ranks + 1).cast(pa.string()), "#", memory_pool=POOL)
            chunks.append(pc.if_else(pa.array(ranks > 0), numbered, chunk, memory_pool=POOL))
            start += len(chunk)
        keys = pa.chunked_array(chunks, pa.string())


def _rank_among_equals(values: np.ndarray) -> np.ndarray:
    """How many equal values come before each: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(values)])
    counts = np.diff(starts, append=len(values))
    rank = np.empty(len(values), np.int32)
    rank[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return rank


def select(table: pa.Table, where: Sequence[str], sample: int | None, seed: int, limit: int | None) -> pa.Table:
    if not where and sample is None and limit is None:
        return table
    rows = np.arange(len(table))
    if where:
        labels = table["label"].unique().to_pylist()
        chosen = [label for label in labels if any(fnmatch.fnmatchcase(label, glob) for glob in where)]
        if not chosen:
            raise MaxactError(
                f"no label matches {printable(' or '.join(where))}; of {len(labels)} labels the first are "
                f"{', '.join(repr(label) for label in labels[:5])}"
            )
        rows = np.flatnonzero(pc.is_in(table["label"], value_set=pa.array(chosen, pa.string())).to_numpy())
    if sample is not None and sample < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, sample, replace=False))
    rows = rows[:limit]
    keep = np.zeros(len(table), bool)
    keep[rows] = True
    return table.filter(pa.array(keep))
