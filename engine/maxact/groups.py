"""Parquet files that hold encoded images, or paths of such: indexed once, then read image by image.

A row group is read whole, and kept for the images that are in it.
"""

import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import repeat

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maxact import limits, remote
from maxact.archives import Changed, Row, arrow_file, printable, reading, show, status, text
from maxact.errors import MaxactError
from maxact.urls import is_remote

GROUP_LIMIT = 1 << 30  # bytes of images in a row group, which is read whole
CACHE = 256 << 20  # bytes of row groups that are kept, though never fewer than two groups


def holds_images(path: bytes) -> bool:
    """Whether a Parquet file holds encoded images and not their paths. MaxactError: neither."""
    with reading(path), pq.ParquetFile(arrow_file(path)) as file:
        schema = file.schema_arrow
        if "image" in schema.names and _bytes_column(schema) is not None:
            return True
        if "path" in schema.names:
            return False
        raise MaxactError(
            f"{show(path)} has neither a column path nor a column image with bytes; its columns are "
            f"{printable(', '.join(schema.names))}"
        )


def _bytes_column(schema: pa.Schema) -> str | None:
    kind = schema.field("image").type
    if _binary(kind):
        return "image"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _binary(kind.field("bytes").type):
        return "image.bytes"
    return None


def _binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def parquet_rows(path: bytes, key: str) -> Iterator[Row]:
    """The rows of a Parquet file with encoded images: the row is the offset, the length -1."""
    with reading(path), _with_words(path) as file:
        size, modified = status(path)
        _check_count(file.metadata, size)
        _refuse_large_groups(file.metadata, path)
        for row, label in enumerate(_labels(file)):
            yield f"{key}/{row}", label, path, row, -1, modified


def parquet_paths(path: bytes) -> Iterator[tuple[bytes, str | None]]:
    """Path and label, None where there is no such column, of a Parquet list."""
    with reading(path), _with_words(path) as file:
        _check_count(file.metadata, status(path)[0])
        labels = _labels(file) if "label" in file.schema_arrow.names else repeat(None)
        paths = _values(file, "path")
        for row, (item, label) in enumerate(zip(paths, labels, strict=False)):
            if not isinstance(item, str | bytes) or not item:
                what = repr(item)[:60]
                raise MaxactError(f"{show(path)}, row {row}: the column path holds {what} instead of a path")
            item = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item
            if b"\0" in item:
                raise MaxactError(f"{show(path)}, row {row}: the path holds a zero byte")
            yield item, label


@contextmanager
def _with_words(path: bytes) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose paths and labels come as they are kept, and are not written out for every row."""
    with pq.ParquetFile(arrow_file(path)) as file:
        metadata, names = file.metadata, {"path", "label"} & set(file.schema_arrow.names)
    with pq.ParquetFile(arrow_file(path), metadata=metadata, read_dictionary=sorted(names)) as file:
        yield file


def _labels(file: pq.ParquetFile) -> Iterator[str]:
    """The column label as text, "" without one; numbers become the names that Hugging Face datasets keep with them."""
    if "label" not in file.schema_arrow.names:
        yield from repeat("", file.metadata.num_rows)
        return
    names = _class_names(file.schema_arrow)
    for value in _values(file, "label"):
        if isinstance(value, int) and names:
            yield names[value] if 0 <= value < len(names) else ""  # -1: a test set without labels
        else:
            yield "" if value is None else str(value)


def _values(file: pq.ParquetFile, column: str) -> Iterator[object]:
    """The values of a column that holds paths or labels. ValueError: one is too long.

    One value that is kept once can stand in all rows: it is looked at before it is written out for each.
    """
    for batch in file.iter_batches(columns=[column]):
        values = batch.column(0)
        if pa.types.is_dictionary(values.type):
            words = values.dictionary
            if (pc.max(pc.binary_length(words)).as_py() or 0) > 4 * limits.LONGEST:
                raise ValueError(f"a {column} of more than {limits.LONGEST:,} characters")
            is_text = not pa.types.is_binary(words.type)
            values = pa.DictionaryArray.from_arrays(values.indices, words.cast(pa.binary())).cast(pa.binary())
            yield from (text(each) if is_text and each is not None else each for each in values.to_pylist())
        else:
            yield from values.to_pylist()


def _check_count(metadata: pq.FileMetaData, size: int) -> None:
    """ValueError: a file of so many bytes cannot hold as many rows as it says."""
    groups = sum(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if not 0 <= metadata.num_rows == groups <= size:
        raise ValueError(f"it says that it has {metadata.num_rows} rows")


def _class_names(schema: pa.Schema) -> Sequence[str]:
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in about["info"]["features"]["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _refuse_large_groups(metadata: pq.FileMetaData, path: bytes) -> None:
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(i) for i in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == "image")
        if size > GROUP_LIMIT:
            raise MaxactError(
                f"{show(path)} has a row group with {size / 2**30:.1f} GiB of images, which would be read at once: "
                "write it again with smaller row groups, as pyarrow.parquet.write_table(…, row_group_size=1000)"
            )


class RowGroupReader:
    """Reads images by row; the row groups used last stay in memory. For many threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[bytes, tuple[pq.FileMetaData, list[int]]] = {}
        self._groups: OrderedDict[tuple[bytes, int], Future[pa.ChunkedArray]] = OrderedDict()

    def read(self, path: bytes, row: int, modified: int) -> bytes:
        """The encoded image, b"" for an empty cell. OSError; Changed: the file is not the one that was indexed."""
        with self._lock:
            known = self._files.get(path)
        if known is None:
            known = self._open(path, modified)
        starts = known[1]
        if row >= starts[-1]:
            raise Changed(f"changed: {show(path)} has fewer rows than were catalogued")
        index = bisect_right(starts, row) - 1
        group = self._group(path, index, known[0], modified)
        if row - starts[index] >= len(group):
            raise OSError(f"{show(path)} is damaged: row {row} is not there")
        return group[row - starts[index]].as_py() or b""

    def _open(self, path: bytes, modified: int) -> tuple[pq.FileMetaData, list[int]]:
        with _arrow_errors(path), _unchanged(path, modified) as source:
            metadata = pq.read_metadata(source)
        starts = [0]
        for index in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(index).num_rows)
        with self._lock:
            return self._files.setdefault(path, (metadata, starts))

    def _group(self, path: bytes, index: int, metadata: pq.FileMetaData, modified: int) -> pa.ChunkedArray:
        with self._lock:
            group = self._groups.get((path, index))
            if group is not None:
                self._groups.move_to_end((path, index))
            else:
                mine: Future[pa.ChunkedArray] = Future()
                self._groups[path, index] = mine
        if group is not None:
            return group.result()  # another thread may still be reading it
        try:
            with (
                _arrow_errors(path),
                _unchanged(path, modified) as source,
                pq.ParquetFile(source, metadata=metadata) as file,
            ):
                column = _bytes_column(file.schema_arrow)
                images = _read_group(file, index, column)
            if column == "image.bytes":
                images = pa.chunked_array([pc.struct_field(chunk, "bytes") for chunk in images.chunks])
            mine.set_result(images)
        except BaseException as error:
            with self._lock:  # so that a retry reads it again
                self._groups.pop((path, index), None)
                self._files.pop(path, None)
            mine.set_exception(error)
            raise
        self._shrink()
        return images

    def _shrink(self) -> None:
        with self._lock:
            sizes = {k: group.result().nbytes for k, group in self._groups.items() if group.done()}
            total = sum(sizes.values())
            for key, size in sizes.items():  # the one used longest ago first
                if total <= CACHE or len(self._groups) <= 2:
                    break
                del self._groups[key]
                total -= size

    def close(self) -> None:
        with self._lock:
            self._groups.clear()
            self._files.clear()


def _read_group(file: pq.ParquetFile, index: int, column: str | None) -> pa.ChunkedArray:
    """The images of a row group, a few at a time: what stands once in the file may stand in every row. OSError."""
    group = file.metadata.row_group(index)
    size = max(group.column(i).total_uncompressed_size for i in range(group.num_columns))
    few = max(1, min(64, GROUP_LIMIT // max(1, size)))
    parts, total = [], 0
    for batch in file.iter_batches(batch_size=few, row_groups=[index], columns=[column], use_threads=False):
        parts.append(batch.column(0))
        total += parts[-1].nbytes
        if total > GROUP_LIMIT:
            raise OSError("a row group has more than 1 GiB of images, which would be kept at once")
    return pa.chunked_array(parts, file.schema_arrow.field("image").type if not parts else None)


@contextmanager
def _unchanged(path: bytes, modified: int) -> Iterator[pa.NativeFile]:
    """The file for Arrow, if it is the one that was indexed. OSError, Changed."""
    far = remote.File(path, patient=False) if is_remote(path) else None  # who reads tries again
    if (far.status.modified if far else os.stat(path).st_mtime_ns) != modified:
        raise Changed(f"changed: {show(path)} was modified after it was catalogued")
    with pa.PythonFile(far, "r") if far else pa.OSFile(path) as file:
        yield file


@contextmanager
def _arrow_errors(path: bytes) -> Iterator[None]:
    """Arrow's errors as OSError, so that a reader has one kind to think of."""
    try:
        yield
    except pa.ArrowException as error:
        raise OSError(f"{show(path)} is damaged: {printable(str(error).splitlines()[0])}") from error
