"""The model inputs of the images that were projected, as pictures, one Parquet file in the store."""

from __future__ import annotations

import heapq
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from maxact.archives import reading
from maxact.config import cores
from maxact.crops import visible
from maxact.errors import MaxactError
from maxact.fetch import Unreadable, check_readable
from maxact.files import replace_file
from maxact.inputs import Inputs
from maxact.partial import BadImage

_SCHEMA = pa.schema([("image", pa.int64()), ("webp", pa.binary())])
_GROUP = 32  # pictures in a row group, which is read as a whole
_AT_ONCE = 256  # images that are read together
_QUALITY = 85


class Thumbs:
    """Image numbers -> WebP files of the model input, read as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises MaxactError where there is no such file, or a damaged one."""
        if not path.exists():
            raise MaxactError(f"{path}: is not there; run `maxact project` on the store")
        with reading(os.fsencode(path)):
            self._file = pq.ParquetFile(pa.OSFile(os.fsencode(path)))
            groups = [self._file.metadata.row_group(index) for index in range(self._file.num_row_groups)]
            short = [group for group in groups[:-1] if group.num_rows != _GROUP]
            if self._file.schema_arrow != _SCHEMA or short or any(group.num_rows > _GROUP for group in groups):
                raise pa.ArrowInvalid("it is no file of pictures made by maxact")
            self.numbers = self._file.read(["image"])["image"].to_numpy()
            if self.numbers.dtype != np.int64 or (np.diff(self.numbers) <= 0).any():
                raise pa.ArrowInvalid("its images are not in order")
        self._last: tuple[int, pa.ChunkedArray] | None = None

    def __contains__(self, number: int) -> bool:
        return self._place(number) is not None

    def __getitem__(self, number: int) -> bytes:
        """The file's bytes. Raises KeyError for an image that was not projected."""
        place = self._place(number)
        if place is None:
            raise KeyError(number)
        group, row = divmod(place, _GROUP)
        if self._last is None or self._last[0] != group:
            self._last = group, self._file.read_row_group(group, ["webp"])["webp"]
        data: bytes = self._last[1][row].as_py()
        return data

    def _place(self, number: int) -> int | None:
        place = int(np.searchsorted(self.numbers, number))
        return place if place < len(self.numbers) and self.numbers[place] == number else None


def update(
    path: Path, numbers: Sequence[int], inputs: Inputs, stop: threading.Event, report: Callable[[int, int], None]
) -> list[BadImage]:
    """Makes the file hold the pictures of some images, ascending, beside those that it has, and gives those that
    cannot be had. `report` is told how many of how many are done.

    Setting `stop` ends it early; a later call goes on from there, as it does after an error. Raises OSError where the
    file cannot be written, and Unreadable where too many images cannot be read.
    """
    old = Thumbs(path) if path.exists() else None
    missing = [number for number in numbers if old is None or number not in old]
    bad: list[BadImage] = []
    failure: Unreadable | None = None
    if not missing and old is not None:
        return bad

    def made() -> Iterator[tuple[int, bytes]]:
        nonlocal failure
        with ThreadPoolExecutor(cores(), "maxact-webp") as pool:
            for start in range(0, len(missing), _AT_ONCE):
                part = missing[start : start + _AT_ONCE]
                found, refused = inputs.get(part)
                try:
                    check_readable("pictures", len(part), refused)
                except Unreadable as error:
                    failure = error
                if stop.is_set() or failure:
                    return
                bad.extend(refused)
                there = [number for number in part if number in found]
                yield from zip(there, pool.map(_webp, [found[number].pixels for number in there]), strict=True)
                report(min(start + _AT_ONCE, len(missing)), len(missing))

    kept = ((int(number), old[number]) for number in old.numbers) if old else iter(())
    write_thumbs(path, heapq.merge(kept, made(), key=lambda row: row[0]))
    if failure:
        raise failure
    return bad


def _webp(pixels: torch.Tensor) -> bytes:
    picture = visible(pixels).round().byte().permute(1, 2, 0).contiguous().numpy()
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "WEBP", quality=_QUALITY)
    return data.getvalue()


def write_thumbs(path: Path, pictures: Iterator[tuple[int, bytes]]) -> None:
    """Writes the file: numbers ascending, and a WebP file each. Raises OSError where that cannot be done."""

    def write(aside: Path) -> None:
        with open(aside, "wb") as file, pq.ParquetWriter(file, _SCHEMA, compression="none") as writer:
            rows: list[tuple[int, bytes]] = []
            for row in pictures:
                rows.append(row)
                if len(rows) == _GROUP:
                    _append(writer, rows)
            if rows:
                _append(writer, rows)

    replace_file(path, write)


def _append(writer: pq.ParquetWriter, rows: list[tuple[int, bytes]]) -> None:
    writer.write_table(pa.table({"image": [n for n, _ in rows], "webp": [data for _, data in rows]}, _SCHEMA))
    rows.clear()
