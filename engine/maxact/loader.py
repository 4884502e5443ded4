"""From shards to batches: reading threads, then the decoder, always ahead of whoever takes the batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from maxact.catalog import Catalog, Entry, Shard
from maxact.decode import Decoder
from maxact.errors import MaxactError
from maxact.fetch import FEW, Unreadable, failure, fetch, was_missing
from maxact.partial import BadImage

# A picture whose colour channels nowhere differ by more than this many levels of 255 counts as grey: JPEG's
# rounding alone makes a few levels.
GREY_LEVELS = 8


@dataclass(frozen=True)
class Batch:
    """One batch of one shard.

    `images` is uint8 [N, H, W, 3], or float32 [N, 3, H, W] from a preprocess function, N always the same: places
    without an image are 0. `numbers` int64 [N] are the images' numbers, -1 where the place is empty or its image is
    left out. `bad` are those that could not be read or decoded, `grey` counts those left out for having no colour.
    """

    images: torch.Tensor
    numbers: NDArray[np.int64]
    shard: Shard
    bad: tuple[BadImage, ...]
    grey: int
    ends_shard: bool

    @property
    def present(self) -> int:
        """How many images of the catalog the batch stands for, those left out among them."""
        return int((self.numbers >= 0).sum()) + len(self.bad) + self.grey


@dataclass
class _Slot:
    """A batch on its way: what is to be read, then what failed, then what is being decoded."""

    shard: Shard
    entries: list[Entry]
    files: list[Future[object]]
    bad: list[BadImage] = field(default_factory=list)  # that could not be read
    good: list[int] = field(default_factory=list)  # places in the batch of what the decoders have


def load(
    catalog: Catalog,
    shards: Iterator[Shard],
    decoders: Sequence[Decoder],
    *,
    batch: int,
    readers: int,
    skip_grey: bool = False,
) -> Generator[tuple[Batch, ...], None, None]:
    """The batches of some shards, in order: each as every one of the decoders gives it, from one reading.

    Reading and decoding go on in the background while the caller works; they do not stop between shards, for the
    next shard is asked for while the last one is still on its way. A file that cannot be read or decoded leaves its
    place empty and changes nothing for the others.

    Raises Unreadable where more than a tenth of a shard's images, and more than a few, cannot be read.
    """
    plan = _plan(catalog, shards, batch)
    ahead = 2 + 2 * readers // batch  # batches to read at once, so that every reader has work
    depth = min(decoder.depth for decoder in decoders)
    reading: deque[_Slot] = deque()
    decoding: deque[_Slot] = deque()
    unread: dict[int, int] = {}
    pool = ThreadPoolExecutor(readers, "maxact-read")
    try:
        while True:
            while len(reading) < ahead and (planned := next(plan, None)):
                shard, entries = planned
                files = [pool.submit(fetch, catalog, entry) for entry in entries]
                reading.append(_Slot(shard, entries, files))
            # wait for a file only when there is nothing decoded to wait for
            while reading and len(decoding) < depth and (not decoding or _is_read(reading[0])):
                slot = reading.popleft()
                _start(slot, decoders)
                decoding.append(slot)
            if not decoding:
                return
            slot = decoding.popleft()
            _check_readable(slot, unread)  # not earlier: the shards before this one can still be finished
            yield tuple(_finish(slot, decoder, batch, skip_grey) for decoder in decoders)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _plan(catalog: Catalog, shards: Iterator[Shard], batch: int) -> Iterator[tuple[Shard, list[Entry]]]:
    for shard in shards:
        for start in range(shard.start, shard.stop, batch):
            yield shard, catalog.entries(start, min(start + batch, shard.stop))


def _is_read(slot: _Slot) -> bool:
    return all(file.done() for file in slot.files)


def _start(slot: _Slot, decoders: Sequence[Decoder]) -> None:
    """Waits for a batch's files and gives them to every decoder."""
    files = []
    for place, (entry, file) in enumerate(zip(slot.entries, slot.files, strict=True)):
        try:
            files.append(file.result())
            slot.good.append(place)
        except MaxactError:
            raise
        except Exception as error:  # whatever a file system or a user's Dataset may raise is that image's error
            slot.bad.append(failure(entry, error))
    slot.files.clear()
    if files:
        for decoder in decoders:
            decoder.submit(files)


def _check_readable(slot: _Slot, unread: dict[int, int]) -> None:
    """Raises Unreadable once too many images of a shard that were there once cannot be read."""
    missing = {entry.number for entry in slot.entries if was_missing(entry)}
    unread_now = [bad for bad in slot.bad if bad.stage == "read" and not bad.error.startswith("changed")]
    failed = [bad for bad in unread_now if bad.image not in missing]
    shard = slot.shard
    unread[shard.index] = unread.get(shard.index, 0) + len(failed)
    if unread[shard.index] > max(FEW, (shard.stop - shard.start) // 10):
        raise Unreadable(
            f"{unread[shard.index]} of the {shard.stop - shard.start} images from {slot.entries[0].key} on cannot be "
            f"read, the last of them {failed[-1].key}: {failed[-1].error}; "
            "see that the disk is there, then run the same again"
        )


def _finish(slot: _Slot, decoder: Decoder, size: int, skip_grey: bool) -> Batch:
    """Waits for a batch's pixels and puts them in their places."""
    first, count = slot.entries[0].number, len(slot.entries)
    numbers = np.full(size, -1, np.int64)
    numbers[:count] = np.arange(first, first + count)
    bad = list(slot.bad)
    numbers[[image.image - first for image in bad]] = -1
    images: torch.Tensor | None = None
    if slot.good:
        decoded = decoder.collect()
        images = decoded.images
        for index, reason in decoded.errors.items():
            place = slot.good[index]
            bad.append(BadImage(first + place, slot.entries[place].key, "decode", reason))
            numbers[place] = -1
    if images is None or len(slot.good) < size:
        whole = decoder.blank(size)
        if images is not None:
            whole[slot.good] = images
        images = whole
    grey = 0
    if skip_grey:
        colourless = _is_grey(images) & (numbers >= 0)
        grey = int(colourless.sum())
        numbers[colourless] = -1
    ends = first + count == slot.shard.stop
    return Batch(images, numbers, slot.shard, tuple(bad), grey, ends)


def _is_grey(images: torch.Tensor) -> NDArray[np.bool_]:
    """[N]: which uint8 images [N, H, W, 3] have no colour."""
    red, green, blue = images.unbind(-1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    return ((high - low).flatten(1).amax(1) <= GREY_LEVELS).cpu().numpy()
