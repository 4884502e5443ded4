"""The arrays of every image's values (`dense.py` writes what is in them): started, and read. Imports zarr."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

from maxact.arrays import DAMAGE, open_group
from maxact.config import Score
from maxact.dense import COMPRESSOR, FOLDER, Grid, file_name, place
from maxact.errors import MaxactError
from maxact.files import leftovers
from maxact.tap import Tap


def missing(path: Path, taps: Sequence[Tap], kind: Score) -> list[Tap]:
    """The taps that have no array in the store at `path`."""
    return [tap for tap in taps if not (path / place(tap.name, kind) / "zarr.json").exists()]


def create(group: Any, taps: Sequence[Tap], kind: Score, images: int, shard: int) -> None:
    """Starts the arrays of some taps in the root group of a store, all NaN."""
    for tap in taps:
        grid = Grid(shard, tap.channels)
        # xarray wants what bears the same dimensions in one group to be as long: so each tap has a group
        group.require_group(f"{FOLDER}/{tap.name}").create_array(
            kind,
            shape=(images, tap.channels),
            dtype=np.float16,
            shards=(shard, grid.columns * grid.across),
            chunks=(grid.rows, grid.columns),
            filters=TransposeCodec(order=(1, 0)),
            compressors=[BloscCodec(**COMPRESSOR), Crc32cCodec()],
            # all files of an array in one folder: each then takes one name to sync and not two
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("image", "channel"),
            fill_value=np.nan,
            overwrite=True,
        )


def tidy(path: Path) -> None:
    """Deletes what writes that were cut short left in the store at `path`."""
    for left in leftovers((path / FOLDER).rglob("*")):
        left.unlink()


def disk_bytes(path: Path, shards: Collection[int] | None = None) -> int:
    """The bytes that the values in the store at `path` take on the disk: all of them, or those of some shards."""
    names = None if shards is None else {file_name(shard) for shard in shards}
    files = (file for file in (path / FOLDER).rglob("c.*") if names is None or file.name in names)
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclass(frozen=True, repr=False)
class Pooled:
    """Every image's value of every channel of one tap, float16 [images, channels]; `pooled[a:b]` reads some of them.

    `kind` says what the values are: each map's maximum, or its mean. NaN where an image is bad, was left out as grey
    or is not scanned yet (`done` holds the shards that are, None for all), or where the map held NaN or infinity.
    A value beyond float16 (65504) is infinite. `bad` are the numbers of the bad images.
    """

    path: Path
    tap: Tap
    kind: Score
    images: int
    shard: int
    done: Collection[int] | None
    bad: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """Images and channels."""
        return self.images, self.tap.channels

    def __len__(self) -> int:
        return self.images

    def __repr__(self) -> str:
        return f"<maxact.Pooled {self.tap.name!r}: {self.kind}, {self.images} images, {self.tap.channels} channels>"

    def _array(self) -> zarr.Array[Any]:
        """As `create` made it. Raises one of DAMAGE where it is another: whose chunks may be of any size, say."""
        array: zarr.Array[Any] = open_group(self.path, f"{FOLDER}/{self.tap.name}")[self.kind]
        grid = Grid(self.shard, self.tap.channels)
        chunks, shards = (grid.rows, grid.columns), (self.shard, grid.columns * grid.across)
        found = (array.dtype, array.shape, array.chunks, array.shards)
        if found != (np.dtype(np.float16), self.shape, chunks, shards):
            raise ValueError(f"{array.path} is {found}")
        return array

    def __getitem__(self, key: slice | tuple[slice, slice]) -> NDArray[np.float16]:
        """`pooled[a:b]` or `pooled[a:b, c:d]`: the images a to b, and of those the channels c to d.

        Raises IndexError for anything else, and MaxactError where the values are missing or damaged.
        """
        rows, across = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        if not (isinstance(rows, slice) and isinstance(across, slice)) or {rows.step, across.step} - {None, 1}:
            raise IndexError(f"{self.tap.name}: expected [a:b] or [a:b, c:d] without steps, got {key!r}")
        start, stop, _ = rows.indices(self.images)
        first, last, _ = across.indices(self.tap.channels)
        found = np.full((max(0, stop - start), max(0, last - first)), np.nan, np.float16)
        if not found.size:
            return found
        try:
            array = self._array()
            for shard in range(start // self.shard, (stop - 1) // self.shard + 1):
                if self.done is not None and shard not in self.done:
                    continue
                file = self.path / place(self.tap.name, self.kind) / file_name(shard)
                if not file.stat().st_size:  # gone or empty, Zarr takes it for a shard without values
                    raise ValueError(f"{file} is empty")
                low, high = max(start, shard * self.shard), min(stop, (shard + 1) * self.shard)
                found[low - start : high - start] = array[low:high, first:last]
        except DAMAGE as error:
            where = f"{self.path}/{place(self.tap.name, self.kind)}"
            raise MaxactError(f"{where}: is missing or damaged; scan again with --overwrite") from error
        found[self.bad[(self.bad >= start) & (self.bad < stop)] - start] = np.nan
        return found
