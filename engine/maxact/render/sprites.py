"""A channel's pictures in one WebP file: its crops, its projections, the whole images and the activation maps.

Each kind is a block of tiles in reading order, as near to a square as it goes, and the blocks lie side by side. So a
block is by itself the classic arrangement of nine crops beside nine projections, and a page shows any of it by moving
one picture behind a frame.
"""

from __future__ import annotations

import hashlib
import io
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maxact.errors import MaxactError
from maxact.pictures import Refused, open_thumb, rgb
from maxact.render.tiles import SMALL, stretch, surroundings
from maxact.store import Store
from maxact.thumbs import Thumbs
from maxact.topk import List
from maxact.winners import Layout, Winners

Pixels = NDArray[np.uint8]  # [h, w, 3]
Size = tuple[int, int]  # height, width

VERSION = 1  # of what is drawn and how: another one makes every sprite anew
_WHOLE = 128  # pixels of a whole image's longer side
_MAP = 64  # of an activation map's, which is smooth
_EDGE = 1  # pixels around each tile that repeat its own, so that neighbours never show when it is scaled
_BLANK = 128  # the grey of a tile that is not there
_DARKEST = 56  # of an activation map, which darkens the image below it
_QUALITY, _EFFORT = 78, 2


@dataclass(frozen=True)
class Cells:
    """One block of a sheet: tiles of `height` by `width` pixels, `across` in a row, from pixel (x, 0) on."""

    x: int
    height: int
    width: int
    across: int
    count: int

    def place(self, rank: int) -> tuple[int, int]:
        """The top left pixel (y, x) of a tile."""
        row, column = divmod(rank, self.across)
        return row * (self.height + 2 * _EDGE) + _EDGE, self.x + column * (self.width + 2 * _EDGE) + _EDGE

    @property
    def size(self) -> Size:
        """Height and width of the block with the edges of its tiles."""
        rows = math.ceil(self.count / self.across)
        return rows * (self.height + 2 * _EDGE), self.across * (self.width + 2 * _EDGE)


@dataclass(frozen=True)
class Sheet:
    """How the sprites of one list lie: `blocks` by name (`crop`, `projection/METHOD`, `whole`, `map`).

    `window` is the part of the model input that a crop shows, in pixels, where the field is small and something
    around it is shown; `field` the size of the field in it, and None elsewhere.
    """

    blocks: dict[str, Cells]
    window: Size | None
    field: Size | None
    whole: Size  # of the model input

    @classmethod
    def of(cls, layout: Layout, whole: Size) -> Sheet:
        """The sheet for one list, whose thumbs have the size `whole`."""
        across = math.ceil(math.sqrt(layout.shown))
        height, width = layout.frame
        scale = min(1.0, _WHOLE / max(whole))
        sizes = {"crop": layout.frame}
        window = field = None
        if around := surroundings(layout):
            field = layout.frame
            window = sizes["crop"] = (height + 2 * around[0], width + 2 * around[1])
        times = math.ceil(SMALL / max(layout.frame))  # colours are kept at half the resolution, and blur in tiny tiles
        sizes |= {f"projection/{method}": (height * times, width * times) for method in layout.methods}
        sizes["whole"] = (max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale)))
        if layout.map and layout.map != (1, 1):
            scale = _MAP / max(whole)
            sizes["map"] = (max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale)))
        blocks, x = {}, 0
        for name, (tall, wide) in sizes.items():
            blocks[name] = Cells(x, tall, wide, across, layout.shown)
            x += blocks[name].size[1]
        return cls(blocks, window, field, whole)

    @property
    def size(self) -> Size:
        """Height and width of a sprite."""
        sizes = [block.size for block in self.blocks.values()]
        return max(height for height, _ in sizes), sum(width for _, width in sizes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"size": self.size, "edge": _EDGE}


class Sprites:
    """The sprites of one list of one tap. May be used by many threads; `pictures` is shared by all lists."""

    def __init__(self, store: Store, tap: str, wanted: List, pictures: Pictures) -> None:
        """Raises MaxactError where the list has not been projected."""
        self.tap, self.list = tap, wanted
        self._winners: Winners = store.winners(tap, *wanted)
        self._images = store[tap].lists[wanted].image
        self._pictures = pictures
        self._bottom = wanted[1] == "bottom"
        self.layout = self._winners.layout
        self.sheet = Sheet.of(self.layout, pictures.size)
        self.projected = self._winners.projected()  # [C]

    def work(self, channels: Sequence[int]) -> list[tuple[range, list[int]]]:
        """For each chunk of the store in which some of `channels` were projected: its channels, and which rows of it
        those are."""
        wanted = np.zeros(self.layout.channels, bool)
        wanted[channels] = True
        wanted &= self.projected
        found = []
        for start in range(0, self.layout.channels, self.layout.chunk):
            stop = min(start + self.layout.chunk, self.layout.channels)
            if rows := np.flatnonzero(wanted[start:stop]).tolist():
                found.append((range(start, stop), rows))
        return found

    def read(self, channels: range) -> dict[str, NDArray[Any]]:
        """All arrays of some channels, and `image` beside them."""
        values = {name: self._winners.read(name, channels.start, channels.stop) for name in self.layout.arrays()}
        return values | {"image": self._images[channels.start : channels.stop, : self.layout.shown]}

    def boxes(self) -> NDArray[np.int32]:
        """[C, R, 3, 4]: of each winner the field's box, the focus box and the crop's; -1 where it was not projected."""
        names = ("box", "focus_box", "crop_box")
        boxes = np.stack([self._winners.read(name, 0, self.layout.channels) for name in names], 2)
        boxes[~self.projected] = -1  # those that were projected since have no sprite
        return boxes

    def digest(self, values: Mapping[str, NDArray[Any]], row: int) -> str:
        """Stands for all that the sprite of a row of what `read` gave is made from."""
        there = [number in self._pictures for number in values["image"][row].tolist()]
        whole = hashlib.blake2b(f"{VERSION} {_QUALITY} {_EFFORT} {self.sheet} {there}".encode(), digest_size=12)
        for name, value in values.items():
            whole.update(f"{name} {value[row].shape}".encode())
            whole.update(np.ascontiguousarray(value[row]).data)
        return whole.hexdigest()

    def draw(self, values: Mapping[str, NDArray[Any]], chosen: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """The sprites of the rows `chosen` of what `read` gave: the row and its pixels."""
        boxes: NDArray[np.int32] = values["box"]
        there = np.all(boxes >= 0, axis=2)  # [C, R]
        rows = [row for row in chosen if there[row].any()]
        images = self._pictures.get(values["image"][rows][there[rows]])
        for row in rows:
            sprite = np.full((*self.sheet.size, 3), _BLANK, np.uint8)
            for rank in np.flatnonzero(there[row]).tolist():
                image = images.get(int(values["image"][row, rank]))
                for name, cells in self.sheet.blocks.items():
                    tile = self._tile(name, cells, values, row, rank, image)
                    if tile is not None:
                        _put(sprite, tile, cells.place(rank))
            yield row, sprite

    def _tile(
        self,
        name: str,
        cells: Cells,
        values: Mapping[str, NDArray[Any]],
        row: int,
        rank: int,
        image: Image.Image | None,
    ) -> Pixels | None:
        size = (cells.width, cells.height)
        if name == "whole":
            return None if image is None else _pixels(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))
        if name == "map":
            return _shade(-values[name][row, rank] if self._bottom else values[name][row, rank], size)
        if name == "crop" and self.sheet.window and image is not None:
            y0, x0 = values["crop_box"][row, rank, :2].tolist()
            y0 -= (cells.height - self.layout.frame[0]) // 2
            x0 -= (cells.width - self.layout.frame[1]) // 2
            return _pixels(image.crop((x0, y0, x0 + cells.width, y0 + cells.height)))  # black beyond the image
        if name != "crop" and not np.isfinite(values[name.replace("projection", "projection_scale")][row, rank]):
            return None
        found: Pixels = values[name][row, rank] if name == "crop" else stretch(values[name][row, rank])
        if found.shape[:2] == (cells.height, cells.width):
            return found
        if name == "crop":  # the thumb is missing, and with it what lies around the field
            return _pixels(Image.fromarray(found).resize(size, Image.Resampling.BICUBIC))
        times = cells.height // found.shape[0]
        return found.repeat(times, 0).repeat(times, 1)


class Pictures:
    """The model inputs of winners. May be used by many threads."""

    def __init__(self, store: Store) -> None:
        height, width = store.manifest.preprocessing["crop"]
        self.size: Size = (height, width)  # of all of them
        self._path = store.path / "thumbs.parquet"
        self._lock = threading.Lock()  # a Parquet file is read by one thread at a time
        self._thumbs: Thumbs | None = None
        with suppress(MaxactError):  # the second pass has not come to its end: crops and projections are there
            self._thumbs = store.thumbs()
        if self._thumbs is not None and len(self._thumbs.numbers):
            width, height = self._open(self._thumbs, int(self._thumbs.numbers[0])).size
            self.size = (height, width)  # a preprocess function has a size of its own

    def __contains__(self, number: int) -> bool:
        return self._thumbs is not None and number in self._thumbs

    def get(self, numbers: NDArray[np.int64]) -> dict[int, Image.Image]:
        """Those of `numbers` that are there, each once; in their order in the file, which is read in groups."""
        thumbs = self._thumbs
        if thumbs is None:
            return {}
        return {number: self._open(thumbs, number) for number in np.unique(numbers).tolist() if number in thumbs}

    def _open(self, thumbs: Thumbs, number: int) -> Image.Image:
        try:
            with self._lock:
                data = thumbs[number]
            return rgb(open_thumb(data))
        except (OSError, ValueError, Refused, LookupError, TypeError) as error:  # Arrow's are among them
            raise MaxactError(f"{self._path}: the picture of image {number} is damaged; project again") from error


def encode(pixels: Pixels) -> bytes:
    """As a WebP file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=_QUALITY, method=_EFFORT)
    return file.getvalue()


def _put(sprite: Pixels, tile: Pixels, place: tuple[int, int]) -> None:
    """Puts a tile into a sprite, with its outermost pixels repeated around it."""
    (y, x), (height, width) = place, tile.shape[:2]
    framed = sprite[y - _EDGE : y + height + _EDGE, x - _EDGE : x + width + _EDGE]
    framed[_EDGE:-_EDGE, _EDGE:-_EDGE] = tile
    framed[:_EDGE], framed[-_EDGE:] = framed[_EDGE], framed[-_EDGE - 1]
    framed[:, :_EDGE], framed[:, -_EDGE:] = framed[:, _EDGE, None], framed[:, -_EDGE - 1, None]


def _shade(values: NDArray[np.float16], size: tuple[int, int]) -> Pixels | None:
    """An activation map as grey: white where it is highest, dark where it is zero or less. None where it is not."""
    levels = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    most = levels.max()
    if not most > 0:
        return None
    grey = _DARKEST + np.clip(levels / most, 0, 1) * (255 - _DARKEST)
    smooth = Image.fromarray(grey.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return _pixels(smooth.convert("RGB"))


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture)
