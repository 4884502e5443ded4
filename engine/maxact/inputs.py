"""The model inputs of chosen images: read, decoded as the scan decoded them, and the last ones kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maxact.catalog import Catalog, Entry
from maxact.config import cores
from maxact.decode import make_decoder
from maxact.errors import MaxactError
from maxact.fetch import failure, fetch
from maxact.partial import BadImage
from maxact.pictures import as_picture, open_picture
from maxact.preprocess import Preprocess

_KEPT = 1 << 30  # bytes of decoded images that are kept
_BATCH = 32


@dataclass(frozen=True)
class Input:
    """One image: its pixels as the loader gives them (uint8 [H, W, 3], or float32 [3, H, W] from a preprocess
    function), and the height and width of the picture that they were made from."""

    pixels: torch.Tensor
    original: tuple[int, int]


class Inputs:
    """Reads images by their numbers. A context manager; one thread at a time uses it."""

    def __init__(
        self, catalog: Catalog, preprocess: Preprocess, *, decoder: str, max_pixels: int, readers: int = 16
    ) -> None:
        self._catalog = catalog
        self._decoder = make_decoder(
            decoder,
            preprocess,
            batch=_BATCH,
            threads=cores(),
            max_pixels=max_pixels,
            pictures=catalog.dataset is not None,
        )
        self._pool = ThreadPoolExecutor(readers, "maxact-read")
        self._kept: OrderedDict[int, Input] = OrderedDict()
        self._bad: dict[int, BadImage] = {}
        self._bytes = 0

    def __enter__(self) -> Inputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self._catalog.close()

    def get(self, numbers: Iterable[int]) -> tuple[dict[int, Input], list[BadImage]]:
        """The inputs of some images, and those that cannot be had, with the reason."""
        wanted = list(dict.fromkeys(numbers))
        found = {number: self._kept[number] for number in wanted if number in self._kept}
        bad = [self._bad[number] for number in wanted if number in self._bad]
        for number in found:
            self._kept.move_to_end(number)
        missing = [number for number in wanted if number not in found and number not in self._bad]
        for start in range(0, len(missing), _BATCH):
            entries = [self._catalog.entry(number) for number in missing[start : start + _BATCH]]
            good, refused = self._decode(entries)
            found |= good
            bad += refused
            self._bad |= {image.image: image for image in refused}
            for number, image in good.items():
                self._keep(number, image)
        return found, bad

    def retry(self) -> None:
        """Forgets what could not be had: the next `get` tries again."""
        self._bad.clear()

    def _decode(self, entries: list[Entry]) -> tuple[dict[int, Input], list[BadImage]]:
        files: list[Any] = []
        read: list[Entry] = []
        bad = []
        for entry, future in [(entry, self._pool.submit(fetch, self._catalog, entry)) for entry in entries]:
            try:
                files.append(future.result())
                read.append(entry)
            except MaxactError:
                raise
            except Exception as error:  # whatever a file system or a user's Dataset may raise
                bad.append(failure(entry, error))
        if not files:
            return {}, bad
        self._decoder.submit(files)
        decoded = self._decoder.collect()
        good = {}
        for place, (entry, file) in enumerate(zip(read, files, strict=True)):
            if place in decoded.errors:
                bad.append(BadImage(entry.number, entry.key, "decode", decoded.errors[place]))
            else:
                good[entry.number] = Input(decoded.images[place].clone(), _size(file))
        return good, bad

    def _keep(self, number: int, image: Input) -> None:
        self._kept[number] = image
        self._bytes += image.pixels.nbytes
        while self._bytes > _KEPT:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.pixels.nbytes


def _size(file: Any) -> tuple[int, int]:
    """Height and width of a picture that could be decoded, from its header."""
    picture = open_picture(file) if isinstance(file, bytes) else as_picture(file)
    return picture.height, picture.width


def source_box(box: NDArray[np.int32], preprocess: Preprocess, original: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes [..., 4] (y0, x0, y1, x1) of the model input as boxes of the original picture, in its pixels.

    NaN where a preprocess function made the input, since nobody knows what it does.
    """
    if preprocess.function:
        return np.full(box.shape, np.nan, np.float32)
    size, start = preprocess.placement(*original)
    scale = np.array(original, np.float64) / size
    boxes: NDArray[np.float32] = ((box + np.tile(start, 2)) * np.tile(scale, 2)).astype(np.float32)
    return boxes
