"""From pictures to an archive: one picture as the JPEG that is packed, many at once, and the tar file they go into.

Pictures are decoded by PIL, as `decode_torchvision` does: what that refuses is bad here, for the same reason. The
short side comes to `short_side` by torchvision's rule, with antialiased bilinear interpolation; EXIF rotation is not
applied and colour profiles are dropped, as in a scan. A picture that is not larger is never enlarged: if it is a
JPEG, its own bytes go into the archive, without a second loss; otherwise it is encoded at its own size. JPEGs are
written with their colour at half the resolution (4:2:0), as nearly all are: at 4:4:4 they decode a third slower.
"""

from __future__ import annotations

import io
import math
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from maxact.catalog import Catalog, Entry, Shard
from maxact.config import RunConfig
from maxact.decoder import Settings
from maxact.errors import MaxactError, UsageError
from maxact.fetch import check_readable, failure, fetch, was_missing
from maxact.packed import plain
from maxact.partial import BadImage
from maxact.pictures import Refused, alone, as_picture, line, open_picture, rgb
from maxact.preprocess import Preprocess

LONGEST = 65_500  # pixels of a JPEG's side, in libjpeg


class Stopped(Exception):
    """A signal came in the middle of an archive."""


@dataclass(frozen=True)
class PackConfig:
    """The settings of a pack, saved in it; it is only ever continued with the same ones."""

    short_side: int = 256
    quality: int = 95
    shard_images: int = 4096
    max_megapixels: float = 200.0

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot be."""
        for name, good, expected in (
            ("short_side", 1 <= self.short_side <= LONGEST, f"1 to {LONGEST} pixels"),
            ("quality", 1 <= self.quality <= 100, "1 to 100"),
            ("shard_images", self.shard_images >= 1, "at least 1"),
            ("max_megapixels", 0 < self.max_megapixels < math.inf, "more than 0"),
        ):
            if not good:
                raise UsageError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


def smaller(file: object, config: PackConfig) -> bytes:
    """A file's bytes, or a picture of a Dataset, as the JPEG that is packed. Raises Refused as the scan's decoder."""
    source = ""
    preprocess = Preprocess(resize=config.short_side)
    limits = Settings(preprocess, 1, 1, torch.device("cpu"), int(config.max_megapixels * 1e6), 1)
    try:
        if isinstance(file, bytes):
            picture = open_picture(file)
            source = f"{picture.format}: "
        else:
            picture = as_picture(file)
        height, width = limits.place(picture.height, picture.width).size
        fits = min(picture.size) <= config.short_side
        with alone(picture):
            picture = rgb(picture)
            if not fits:
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{source}{line(error)}") from error
    if fits and isinstance(file, bytes) and source == "JPEG: ":
        return file
    if max(picture.size) > LONGEST:
        raise Refused(f"{picture.width} x {picture.height} pixels: a JPEG has at most {LONGEST:,} on a side")
    picture.info.clear()  # a comment would be written again
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=config.quality, subsampling="4:2:0")
    return encoded.getvalue()


class Packers:
    """Threads that read, and threads that make images smaller. PIL works outside of the GIL: processes gain nothing."""

    def __init__(self, catalog: Catalog, config: PackConfig, run: RunConfig) -> None:
        assert run.decode_threads
        self._catalog, self._config = catalog, config
        self._ahead = 4 * run.decode_threads + 2 * run.readers
        self._reading = ThreadPoolExecutor(run.readers, "maxact-read")
        self._packing = ThreadPoolExecutor(run.decode_threads, "maxact-pack")

    def __enter__(self) -> Packers:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._reading, self._packing):
            pool.shutdown(wait=False, cancel_futures=True)
        self._catalog.close()

    def pack(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | BadImage]]:
        """What goes into an archive for each image, in order, or why nothing can."""
        flights: deque[tuple[Entry, Future[bytes | BadImage]]] = deque()
        for entry in entries:
            file = self._reading.submit(fetch, self._catalog, entry)
            flights.append((entry, self._packing.submit(self._one, entry, file)))
            if len(flights) == self._ahead:
                entry, made = flights.popleft()
                yield entry, made.result()
        while flights:
            entry, made = flights.popleft()
            yield entry, made.result()

    def _one(self, entry: Entry, file: Future[object]) -> bytes | BadImage:
        try:
            data = file.result()
        except MaxactError:
            raise
        except Exception as error:  # whatever a file system or a user's Dataset may raise
            return failure(entry, error)
        try:
            return smaller(data, self._config)
        except Refused as refused:
            return BadImage(entry.number, entry.key, "decode", line(refused))


@dataclass
class Archive:
    """One archive on its way, and the rows of its index.

    `allow` is asked at every bad image, with those of this archive so far, and may raise; `note` is told of every
    image whether it is bad; `stop` ends it with Stopped.
    """

    shard: Shard
    allow: Callable[[Sequence[BadImage]], None] = lambda bad: None
    note: Callable[[bool], None] = lambda bad: None
    stop: threading.Event = field(default_factory=threading.Event)
    rows: list[dict[str, Any]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def write(self, images: Iterator[tuple[Entry, bytes | BadImage]], path: Path) -> None:
        """Takes this archive's images from `images` and writes it.

        Raises Unreadable where more than a tenth of them, and more than a few, cannot be read, though they were there.
        """
        bad: list[BadImage] = []
        failed: list[BadImage] = []
        count = self.shard.stop - self.shard.start
        with open(path, "wb") as file:
            for _ in range(count):
                entry, made = next(images)
                row = {"image": entry.number, "key": entry.key, "label": entry.label, "offset": 0, "length": 0}
                if isinstance(made, BadImage):
                    bad.append(made)
                    if not was_missing(entry):
                        failed.append(made)
                    check_readable(self._what, count, failed)
                    if made.stage != "read":  # where the storage is gone, nothing is to be blamed on the files
                        self.allow(bad)
                    row |= {"stage": made.stage, "error": made.error}
                else:
                    row |= {"offset": self._add(file, entry, made), "length": len(made)}
                self.rows.append(row)
                self.note(isinstance(made, BadImage))
                if self.stop.is_set():
                    raise Stopped
            self.allow(bad)
            file.write(bytes(2 * tarfile.BLOCKSIZE))

    @property
    def _what(self) -> str:
        return f"images {self.shard.start} to {self.shard.stop - 1}"

    def _add(self, file: BinaryIO, entry: Entry, data: bytes) -> int:
        """Adds an image, and its label where its folder does not tell it. Gives the offset of the data."""
        name = member_name(entry)
        while name in self.names:
            name += f"~{entry.number}"
        self.names.add(name)
        offset = _add_member(file, f"{name}.jpg", data)
        label = plain(entry.label)
        if label and name.rpartition("/")[0].rpartition("/")[2] != label:
            _add_member(file, f"{name}.cls", label.encode("utf-8", "surrogateescape"))
        return offset


def _add_member(file: BinaryIO, name: str, data: bytes) -> int:
    """Writes a member, and nothing of when or by whom; gives the offset of its data."""
    member = tarfile.TarInfo(name)  # time, user and group 0
    member.size = len(data)
    file.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


def member_name(entry: Entry) -> str:
    """A member's name without its suffix, after the image's key: relative, nothing hidden, no dot in its last part.

    (WebDataset takes what follows the first dot for the kind of a member.) Without a label it has no folder, which
    would be taken for one.
    """
    *folders, base = [part.lstrip(".") for part in plain(entry.key).split("/") if part.strip(".")] or ["image"]
    stem = (base.rpartition(".")[0] or base).replace(".", "_")
    if not entry.label:
        return "_".join([*(folder.replace(".", "_") for folder in folders), stem])
    return "/".join([*folders, stem])
