"""Winners as pictures: a crop, a projection or a whole image, as an RGB tile of the wanted size.

All pixels come from the store: crops and projections from the arrays of the second pass, whole images and what
surrounds a small field from the thumbs, which are the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maxact.errors import MaxactError
from maxact.field import Box
from maxact.pictures import open_thumb, rgb
from maxact.store import Store
from maxact.thumbs import Thumbs
from maxact.topk import List
from maxact.winners import Layout

Kind = Literal["crop", "projection"]
Size = tuple[int, int]  # width, height: as PIL has them

SMALL = 32  # model-input pixels: a field that is smaller is shown with what surrounds it
_AROUND = 1.5  # how much larger than such a field that is, at least
_COARSE = 20  # projections of as many pixels, or fewer, are enlarged as squares
MARK, _EDGE = (255, 210, 0), (30, 30, 30)


class Tiles:
    """The winners of one list of one tap, as pictures. One chunk of channels of each array is kept at a time."""

    def __init__(self, store: Store, tap: str, wanted: List = ("max", "top"), method: str | None = None) -> None:
        """`method` is the projection to show; the first that there is, unless told. Raises MaxactError where the list
        has not been projected, or not by that method."""
        self.store, self.which = store, wanted
        self.results = store[tap]
        self._winners = store.winners(tap, *wanted)
        self.tap, self.layout = self.results.tap, self._winners.layout
        self.peaks = self.results.lists[wanted]
        methods = self.layout.methods
        if method is not None and method not in methods:
            has = ", ".join(methods) or "none"
            raise MaxactError(f"{store.path}: {tap} has no projections by {method!r} (it has {has})")
        self.method = method or next(iter(methods), None)
        self._chunks: dict[str, tuple[int, NDArray[Any]]] = {}

    @property
    def shown(self) -> int:
        """How many ranks were projected."""
        return self.layout.shown

    @cached_property
    def projected(self) -> NDArray[np.bool_]:
        """[C]: the channels that were projected."""
        return self._winners.projected()

    @cached_property
    def available(self) -> NDArray[np.bool_]:
        """[C]: the channels that were projected, and the dead ones among them: those that share a block with one."""
        chunk = self.layout.chunk
        near = np.repeat(np.logical_or.reduceat(self.projected, np.arange(0, self.tap.channels, chunk)), chunk)
        found: NDArray[np.bool_] = self.projected | (near[: self.tap.channels] & self.results.dead)
        return found

    @cached_property
    def _thumbs(self) -> Thumbs | None:
        try:
            return self.store.thumbs()
        except MaxactError:  # the second pass has not come to an end
            return None

    def describe(self) -> tuple[str, str]:
        """The list in two lines: the network and the layer; what the ranks are by and what a crop shows."""
        tap, (score, end) = self.tap, self.which
        layer = tap.kind if tap.layer == tap.name else f"{tap.kind} {tap.layer}"
        maps = f", maps of {tap.map[0]} x {tap.map[1]}" if tap.positions > 1 else ""
        by = "maximum" if score == "max" else "mean"
        ranks = f"ranked by {by} over positions, {'highest' if end == 'top' else 'lowest'} first"
        if self.layout.cut == "focus":
            crops = "crops around the focus"
        elif self.layout.scale:
            height, width = (round(length / self.layout.scale) for length in self.layout.frame)
            crops = f"fields of {height} x {width} pixels"
        else:
            crops = "crops of the field"
        return f"{self.store.manifest.model['name']} · {layer} · {tap.channels} channels{maps}", f"{ranks} · {crops}"

    def image(self, channel: int, rank: int) -> int:
        """The image's number; -1 where the list is shorter."""
        return int(self.peaks.image[channel, rank])

    def score(self, channel: int, rank: int) -> float:
        """NaN where the list is shorter."""
        return float(self.peaks.score[channel, rank])

    def fit(self, side: int) -> Size:
        """The size of crops and projections whose longer side is `side`."""
        height, width = self.layout.frame
        return _within(width, height, side)

    def fit_whole(self, side: int) -> Size:
        """The size of whole images whose longer side is `side`."""
        height, width = self.store.manifest.preprocessing["crop"]
        return _within(width, height, side)

    def draw(self, kind: Kind, channel: int, rank: int, size: Size) -> Image.Image | None:
        """`crop` or `projection`."""
        draw: Callable[[int, int, Size], Image.Image | None] = self.crop if kind == "crop" else self.projection
        return draw(channel, rank, size)

    def crop(self, channel: int, rank: int, size: Size) -> Image.Image | None:
        """What the winner's field, or its focus, holds; a small one outlined in what surrounds it. None where it was
        not projected."""
        box = self._box("crop_box", channel, rank)
        if box is None:
            return None
        around = surroundings(self.layout)
        thumb = self._thumb(channel, rank) if around else None
        if around is None or thumb is None:
            return scale(Image.fromarray(self._read("crop", channel)[rank]), size)
        window = y0, x0, y1, x1 = box[0] - around[0], box[1] - around[1], box[2] + around[0], box[3] + around[1]
        tile = scale(thumb.crop((x0, y0, x1, y1)), size)  # black beyond the image, as in the store's own crops
        return outline(tile, box, window)

    def projection(self, channel: int, rank: int, size: Size) -> Image.Image | None:
        """What drove the winner, middle grey where nothing did. None where there is none."""
        if self.method is None or not np.isfinite(self._read(f"projection_scale/{self.method}", channel)[rank]):
            return None
        levels = self._read(f"projection/{self.method}", channel)[rank]
        return scale_weights(Image.fromarray(stretch(levels)), size)

    def whole(self, channel: int, rank: int, size: Size) -> Image.Image | None:
        """The model's input, with the crop's box on it. None where it is not kept."""
        thumb = self._thumb(channel, rank)
        if thumb is None:
            return None
        tile = scale(thumb, size)
        box = self._box("crop_box", channel, rank)
        return tile if box is None else outline(tile, box, (0, 0, thumb.height, thumb.width))

    def _thumb(self, channel: int, rank: int) -> Image.Image | None:
        image = self.image(channel, rank)
        if self._thumbs is None or image not in self._thumbs:
            return None
        try:
            return rgb(open_thumb(self._thumbs[image]))
        except Exception as error:  # what a codec may raise
            raise MaxactError(f"{self.store.path}/thumbs.parquet: image {image} is damaged; project again") from error

    def _box(self, name: str, channel: int, rank: int) -> Box | None:
        """One box; None where the winner was not projected: `box`, which is clipped, is then -1."""
        if (self._read("box", channel)[rank] < 0).any():
            return None
        y0, x0, y1, x1 = self._read(name, channel)[rank].tolist()
        return (y0, x0, y1, x1) if y1 > y0 and x1 > x0 else None

    def _read(self, name: str, channel: int) -> NDArray[Any]:
        """One array's values of a channel, [R, ...]."""
        start = channel - channel % self.layout.chunk
        if name not in self._chunks or self._chunks[name][0] != start:
            stop = min(start + self.layout.chunk, self.tap.channels)
            self._chunks[name] = start, self._winners.read(name, start, stop)
        values: NDArray[Any] = self._chunks[name][1][channel - start]
        return values


def stretch(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A projection [h, w, 3] with more contrast: what differs from 128 is multiplied by a whole number.

    One in fifty of its pixels is cut off at most. The store scales by the largest value, which often stands alone.
    """
    signal = levels.astype(np.int16) - 128
    strength = np.abs(signal).max(-1)
    if not strength.any():
        return levels
    gain = max(1, int(127 // np.percentile(strength[strength > 0], 98)))
    return np.clip(128 + gain * signal, 1, 255).astype(np.uint8)


def scale(picture: Image.Image, size: Size) -> Image.Image:
    """`picture` at another size, smoothly."""
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.LANCZOS if size[0] < picture.width else Image.Resampling.BICUBIC)


def scale_weights(picture: Image.Image, size: Size) -> Image.Image:
    """The same, but a few pixels that are enlarged stay to be seen as such: they are numbers, not a photograph."""
    coarse = max(picture.size) <= _COARSE and size[0] > picture.width
    return picture.resize(size, Image.Resampling.NEAREST) if coarse else scale(picture, size)


def outline(tile: Image.Image, box: Box, window: Box) -> Image.Image:
    """Draws the outline of `box` around it on a tile that shows `window`; at the tile's edges inside them."""
    across, down = tile.width / (window[3] - window[1]), tile.height / (window[2] - window[0])
    y0, y1 = (round((edge - window[0]) * down) for edge in (box[0], box[2]))
    x0, x1 = (round((edge - window[1]) * across) for edge in (box[1], box[3]))
    width = max(1, round(max(tile.size) / 80))
    draw = ImageDraw.Draw(tile)
    for colour, away, line in ((_EDGE, width + 1, width + 1), (MARK, width, width)):
        left, top = max(0, x0 - away), max(0, y0 - away)
        right, bottom = min(tile.width, x1 + away) - 1, min(tile.height, y1 + away) - 1
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
    return tile


def surroundings(layout: Layout) -> tuple[int, int] | None:
    """How many pixels above and below, and left and right, of a small field are shown with it: the longer
    side becomes SMALL at least, the proportions stay. None where the crop is shown as it is."""
    height, width = layout.frame
    if layout.cut != "field" or layout.scale != 1 or max(layout.frame) >= SMALL:
        return None
    extra = (max(SMALL / max(layout.frame), _AROUND) - 1) / 2
    return math.ceil(height * extra), math.ceil(width * extra)


def _within(width: int, height: int, side: int) -> Size:
    longer = max(width, height)
    return max(1, round(width * side / longer)), max(1, round(height * side / longer))
