"""Every image's value of every channel, written shard by shard as the scan goes.

Of each tap and each shard of the catalog there is one file, which is one Zarr shard: whoever scans the shard writes
it, whole and at once, and nobody else does. So it can be made here without Zarr and what Zarr has open: a Zarr shard
is its compressed chunks, one after the other, then where each of them lies, all with their CRC32C
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed). `pooled.py` starts the arrays and reads them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numcodecs import blosc
from numpy.typing import NDArray

from maxact.catalog import Shard
from maxact.config import Score, cores
from maxact.files import replace_file, writing
from maxact.partial import BadImage, Partial, Tally
from maxact.process import show_bytes
from maxact.tap import Tap, columns
from maxact.topk import List
from maxact_kernels.peaks import Peaks

FOLDER = "pooled"
COMPRESSOR: dict[str, Any] = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": 2, "blocksize": 0}
_ROWS = 1024  # images that a chunk has at least, where its shard has so many
_CHUNK = 1 << 19  # bytes that a chunk may have: a channel by itself is read with few others
_BLOCK = 64  # images that are looked at at once: what they take stays in the cache
_THREADS = 8  # that compress and write at most
_NOWHERE = 2**64 - 1  # where a chunk lies that was not written
_UNSIGNED, _INFINITY = np.uint16(0x7FFF), np.uint16(0x7C00)  # float16, as its bits

log = logging.getLogger("maxact")
_told: set[str] = set()  # taps whose infinities this process has told of


def place(tap: str, kind: Score) -> str:
    """Where in a store the values of a tap are."""
    return f"{FOLDER}/{tap}/{kind}"


def file_name(shard: int) -> str:
    """The file of a shard, in its array's folder."""
    return f"c.{shard}.0"


def size(images: int, channels: int) -> int:
    """The bytes that so many values take, but for what compression saves."""
    return images * channels * np.dtype(np.float16).itemsize


@dataclass(frozen=True)
class Grid:
    """How the values [n, channels] of a shard are cut into chunks; n is `images`, or less in the last shard."""

    images: int
    channels: int

    @cached_property
    def rows(self) -> int:
        """Images in a chunk: a divisor of the shard, the first one that is large enough."""
        least = min(self.images, _ROWS)
        return next(rows for rows in range(least, self.images + 1) if self.images % rows == 0)

    @property
    def across(self) -> int:
        """Chunks side by side."""
        return math.ceil(self.channels / max(1, _CHUNK // size(self.rows, 1)))

    @property
    def columns(self) -> int:
        """Channels in a chunk."""
        return math.ceil(self.channels / self.across)


def encode(values: NDArray[np.float16], grid: Grid) -> Iterator[bytes]:
    """The parts of the file that holds the values [n, channels] of a shard.

    Not in the main thread: there Blosc takes several threads of its own, whose order shows in what they give.
    """
    index = np.full((grid.images // grid.rows, grid.across, 2), _NOWHERE, "<u8")
    offset = 0
    for row in range(math.ceil(len(values) / grid.rows)):
        for column in range(grid.across):
            part = values[row * grid.rows : (row + 1) * grid.rows, column * grid.columns : (column + 1) * grid.columns]
            # channel by channel: what stands side by side is alike, and takes a tenth less room
            chunk = np.full((grid.columns, grid.rows), np.nan, np.float16)
            # from a copy and in blocks, for rows that are a power of two apart have one place in the cache
            rows = np.ascontiguousarray(part)
            for first in range(0, len(rows), _BLOCK):
                turned = rows[first : first + _BLOCK].T
                chunk[: turned.shape[0], first : first + turned.shape[1]] = turned
            data = _with_sum(blosc.compress(chunk, b"lz4", COMPRESSOR["clevel"], blosc.BITSHUFFLE))
            index[row, column] = offset, len(data)
            offset += len(data)
            yield data
    yield _with_sum(index.tobytes())


def _with_sum(data: bytes) -> bytes:
    """As Zarr's codec crc32c has it."""
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(4, "little")


@dataclass(frozen=True)
class Target:
    """Where the values of a scan go: the store at `path`, whose catalog has so many images and whose shards have
    `shard` of them."""

    path: Path
    kind: Score
    taps: Sequence[Tap]
    images: int
    shard: int

    def write(self, shard: int, values: NDArray[np.float16]) -> None:
        """Writes the values [images of the shard, channels of all taps] so that they survive anything.

        Raises MaxactError where the system refuses.
        """
        need = show_bytes(size(self.images, values.shape[1]))
        advice = (
            f"the {FOLDER} values of all images take up to {need}; "
            "make room there and run the same again (without --overwrite) to go on"
        )
        with writing(self.path, advice), ThreadPoolExecutor(min(_THREADS, cores()), "maxact-write") as pool:
            each = [
                pool.submit(self._write, tap, shard, values[:, start:stop]) for tap, start, stop in columns(self.taps)
            ]
            for written in each:
                written.result()

    def _write(self, tap: Tap, shard: int, values: NDArray[np.float16]) -> None:
        path = self.path / place(tap.name, self.kind) / file_name(shard)

        def put(aside: Path) -> None:
            with open(aside, "wb") as file:
                file.writelines(encode(values, Grid(self.shard, tap.channels)))

        replace_file(path, put, shared=True)  # with a worker that was given up but lives
        bits = values.view(np.uint16)
        blocks = (bits[first : first + _BLOCK] for first in range(0, len(bits), _BLOCK))
        infinite = sum(np.count_nonzero((block & _UNSIGNED) == _INFINITY) for block in blocks)
        if infinite and str(path.parent) not in _told:
            _told.add(str(path.parent))
            log.warning(
                "%s: %d values in shard %d are beyond float16 and infinite in %s", tap.name, infinite, shard, FOLDER
            )


class Dense(Tally):
    """A Tally that also keeps every image's values, and writes them when it closes.

    An image that is not counted (bad, or left out as grey) has NaN. A value beyond float16 becomes infinite. Holds
    the values of the whole shard: its images x channels x 2 bytes.

    `before` are the images that were bad when the shard was scanned before, where it was (`--retry-errors`). Where
    another one is bad now, the shard stays as it was (`Schedule`), and so do its values.
    """

    def __init__(
        self,
        shard: Shard,
        channels: int,
        kept: dict[List, int],
        target: Target,
        before: frozenset[int] | None = None,
    ) -> None:
        super().__init__(shard, channels, kept)
        self._target = target
        self._before = before
        self._values = torch.empty((shard.stop - shard.start, channels), dtype=torch.float16)

    def add(self, peaks: Peaks, numbers: NDArray[np.int64]) -> None:
        """Adds the next batch, as a Tally does."""
        first = self._batches * len(numbers)  # a bad image has its place in the batch, too
        super().add(peaks, numbers)
        found = torch.from_numpy(getattr(peaks, self._target.kind))
        # torch, for NumPy takes ten times as long; row by row, for it takes several threads to more than that
        for row, number, values in zip(self._values[first:], numbers.tolist(), found, strict=False):
            row.copy_(values) if number >= 0 else row.fill_(torch.nan)

    def close(self, bad: Sequence[BadImage] = (), grey: int = 0) -> Partial:
        """The shard's result, when its values are on the disk. Raises MaxactError where they cannot be written."""
        if self._before is None or self._before.issuperset(image.image for image in bad):
            self._target.write(self._shard.index, self._values.numpy())
        return super().close(bad, grey)
