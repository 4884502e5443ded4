"""Mosaics: the winners of many channels on a sheet, crops on one and projections on another.

The arrangement is that of figure 2 in Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014):
a square of 3 x 3 winners for every channel, in rank order from its top left, and the channels in a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from maxact.choose import choose_taps, file_names
from maxact.errors import MaxactError, UsageError
from maxact.render.figure import draw_figure, figure_pages
from maxact.render.page import GREY, HEADING, MARGIN, Format, Medium, Page, numbers, write_pages
from maxact.render.tiles import Kind, Tiles
from maxact.store import Store
from maxact.topk import List

Arrangement = Literal["square", "rows"]
FIGURES = 16  # as many chosen channels, or fewer, have a figure each besides

_SIDES = (200, 160, 128, 92, 72)  # units of a tile's longer side: the largest with which all channels fit a page
_FULL = {"square": 72, "rows": 92, "across": 92}  # the smallest, for which there are as many pages as it takes
_GAP = 2  # between the tiles of a block
_BESIDE, _BELOW = 22, 10  # between blocks
_LINE = 24  # a block's label above it
_COLUMN = 74  # or to the left of it
_NARROW = 900  # pages are at least as wide, or their heading does not fit

Cell = tuple[int, int]  # channel, rank


@dataclass(frozen=True)
class Block:
    """Some winners that stand together under a label, `note` in grey after it; `empty` says why there are none."""

    label: str
    note: str
    cells: tuple[Cell, ...]
    empty: str = ""


@dataclass(frozen=True)
class Grid:
    """Where blocks of `across` x `down` tiles lie on pages of `columns` x `rows` blocks. `tile` is in pixels."""

    medium: Medium
    tile: tuple[int, int]
    across: int
    down: int
    columns: int
    rows: int
    beside: bool  # the label is to the left of the tiles, not above them

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of a block's tiles in units."""
        width, height = (length / self.medium.scale for length in self.tile)
        return self.across * (width + _GAP) - _GAP, self.down * (height + _GAP) - _GAP

    def page(self, blocks: int, of: int) -> tuple[float, float]:
        """Width and height of a page with so many blocks of all."""
        step = self._step
        columns, rows = min(of, self.columns), math.ceil(blocks / self.columns)
        width = 2 * MARGIN + columns * step[0] - _BESIDE
        return max(_NARROW, width), HEADING + rows * step[1] - _BELOW + MARGIN

    def block(self, index: int) -> tuple[float, float]:
        """The top left of a block of a page, where its label stands."""
        row, column = divmod(index, self.columns)
        return MARGIN + column * self._step[0], HEADING + row * self._step[1]

    def cell(self, block: int, index: int) -> tuple[float, float]:
        """The top left of a tile of a block."""
        x, y = self.block(block)
        row, column = divmod(index, self.across)
        x, y = (x + _COLUMN, y) if self.beside else (x, y + _LINE)
        width, height = (length / self.medium.scale for length in self.tile)
        return x + column * (width + _GAP), y + row * (height + _GAP)

    @property
    def _step(self) -> tuple[float, float]:
        width, height = self.size
        return (width + _COLUMN * self.beside + _BESIDE, height + _LINE * (not self.beside) + _BELOW)


def write_mosaics(
    store: Store,
    out: Path,
    *,
    layers: Sequence[str] = (),
    channels: Sequence[int] | None = None,
    lists: Sequence[List] = (),
    method: str | None = None,
    layout: Arrangement = "square",
    across: int | None = None,
    format: Format = "png",
    label_names: Mapping[str, str] | None = None,
) -> list[Path]:
    """Draws what the second pass kept, into the folder `out`; gives the files.

    For every tap that `layers` chooses (names or globs) and every list that was projected (or those in `lists`):
    `TAP-crops-01.png`, `TAP-crops-02.png`, … and `TAP-projections-01.png`, … with the chosen `channels`, or all that
    were projected. A list other than max/top is named after the tap, and so is a `method` other than the tap's first.
    Where at most FIGURES channels are chosen, each has a figure besides: `TAP-171.png` (see figure.py). As `pdf` the
    pages of a kind are one file, the figures `TAP-channels.pdf`.

    `layout` square puts up to 3 x 3 winners of a channel into a square; rows shows all that were projected in a row.
    `across` draws instead of all that the so many strongest (channel, image) pairs of the whole tap, by their raw
    scores: strong is what the network computes, and a channel with large values takes most places. A channel may
    come more than once, and so may an image, for other channels. Pairs are from the ranks and channels that were
    projected.

    Raises UsageError for a choice that cannot be meant, MaxactError where nothing chosen was projected, or it cannot
    be read or written.
    """
    if layout not in get_args(Arrangement):
        raise UsageError(f"layout: expected square or rows, got {layout!r}")
    if across is not None and across < 1:
        raise UsageError(f"across: expected at least 1, got {across}")
    medium, names = Medium.of(format), file_names(list(store))
    taps = choose_taps(store, layers)
    largest = max(tap.channels for tap in store.manifest.taps if tap.name in taps)
    if channels is not None and not any(0 <= channel < largest for channel in channels):
        raise UsageError(
            f"channels: expected some from 0 to {largest - 1}, got {', '.join(map(str, channels)) or 'none'}"
        )
    written: list[Path] = []
    for tap in taps:
        for which in _lists(store, tap, lists):
            tiles = Tiles(store, tap, which, method)
            chosen = _channels(tiles, channels)
            if not chosen:
                continue
            stem = names[tap] + ("" if which == ("max", "top") else f"-{'-'.join(which)}")
            sheets = _Sheets(tiles, medium, layout if across is None else "across")
            blocks = channel_blocks(tiles, chosen, sheets.shown) if across is None else strongest(tiles, chosen, across)
            for kind, words in _kinds(tiles, across).items() if blocks else ():
                pages = numbers(sheets.count(len(blocks)))
                written += write_pages(pages, sheets.draw(kind, blocks), out, f"{stem}-{words}", format)
            if across is None and channels is not None and len(channels) <= FIGURES:
                written += _write_figures(tiles, chosen, medium, label_names or {}, out, stem, format)
    if not written:
        what = "these layers, channels and lists" if layers or channels is not None or lists else "it"
        raise MaxactError(f"{store.path}: nothing of {what} has been projected; run `maxact project` first")
    return written


def channel_blocks(tiles: Tiles, channels: Sequence[int], shown: int) -> list[Block]:
    """A block per channel: its first `shown` ranks."""
    blocks = []
    for channel in channels:
        dead, there = tiles.results.dead[channel], tiles.projected[channel]
        empty = "dead" if dead else "" if there else "not projected"
        score = tiles.score(channel, 0)
        note = "" if dead or math.isnan(score) else f"{score:.3g}"
        cells = () if empty else tuple((channel, rank) for rank in range(shown))
        blocks.append(Block(str(channel), note, cells, empty))
    return blocks


def strongest(tiles: Tiles, channels: Sequence[int], count: int) -> list[Block]:
    """A block per (channel, image) pair, the strongest of some channels: by score, then image, then channel."""
    usable = np.array([channel for channel in channels if tiles.projected[channel]], dtype=np.int64)
    image = tiles.peaks.image[usable, : tiles.shown].ravel()
    score = tiles.peaks.score[usable, : tiles.shown].ravel()
    order = np.lexsort((image, score if tiles.which[1] == "bottom" else -score))
    order = order[image[order] >= 0][:count]
    cells = [(int(usable[place // tiles.shown]), int(place % tiles.shown)) for place in order]
    return [Block(str(cell[0]), f"{tiles.score(*cell):.3g}", (cell,)) for cell in cells]


class _Sheets:
    """Draws blocks of one tap's winners on pages."""

    def __init__(self, tiles: Tiles, medium: Medium, layout: Literal["square", "rows", "across"]) -> None:
        self._tiles, self._medium, self._layout = tiles, medium, layout
        side = min(3, math.ceil(math.sqrt(tiles.shown)))
        self.shown = {"square": min(side * side, tiles.shown), "rows": tiles.shown, "across": 1}[layout]

    def count(self, blocks: int) -> int:
        """How many pages so many blocks take."""
        grid = self.grid(blocks)
        return math.ceil(blocks / (grid.columns * grid.rows))

    def grid(self, blocks: int) -> Grid:
        """With the largest tiles for which a page is enough; or the smallest, and more pages."""
        sides = [side for side in _SIDES if side >= _FULL[self._layout]]
        grids = [self._grid(side, blocks) for side in sides]
        return next((grid for grid in grids if grid.columns * grid.rows >= blocks), grids[-1])

    def _grid(self, side: int, blocks: int) -> Grid:
        medium, beside = self._medium, self._layout == "rows"
        tile = self._tiles.fit(medium.px(side))
        room = medium.width - 2 * MARGIN, medium.height - HEADING - MARGIN
        fit = int((room[0] - _COLUMN + _GAP) // (tile[0] / medium.scale + _GAP))
        across = min(self.shown, fit) if beside else math.ceil(math.sqrt(self.shown))
        one = Grid(medium, tile, across, math.ceil(self.shown / across), 1, 1, beside)
        width, height = one._step
        columns = max(1, int((room[0] + _BESIDE) // width))
        rows = max(1, int((room[1] + _BELOW) // height))
        if self._layout == "across":  # nine are to stand in a square
            columns = min(columns, math.ceil(math.sqrt(blocks)))
        elif blocks <= columns * rows:
            columns = math.ceil(blocks / math.ceil(blocks / columns))  # rows of one length
        return Grid(medium, tile, across, one.down, columns, rows, beside)

    def draw(self, kind: Kind, blocks: Sequence[Block]) -> Iterator[Image.Image]:
        """The pages, one at a time."""
        grid = self.grid(len(blocks))
        each = grid.columns * grid.rows
        for number, start in enumerate(range(0, len(blocks), each), 1):
            part = blocks[start : start + each]
            page = Page(self._medium, *grid.page(len(part), len(blocks)))
            pages = self.count(len(blocks))
            self._head(page, kind, part, f" · page {number} of {pages}" if pages > 1 else "")
            # blocks of one chunk of channels one after the other: it is read once
            for index in sorted(range(len(part)), key=lambda index: part[index].cells):
                self._draw_block(page, grid, kind, index, part[index])
            yield page.image

    def _head(self, page: Page, kind: Kind, part: Sequence[Block], number: str) -> None:
        tiles = self._tiles
        words = "crops" if kind == "crop" else f"projections ({tiles.method})"
        if self._layout == "across":
            right = f"the strongest of {tiles.projected.sum()} projected channels{number}"
        else:
            right = f"{_range([int(block.label) for block in part])}{number}"
        page.heading(f"{tiles.tap.name} · {words}", tiles.describe(), right)

    def _draw_block(self, page: Page, grid: Grid, kind: Kind, index: int, block: Block) -> None:
        x, y = grid.block(index)
        if grid.beside:
            page.text(x + _COLUMN - 10, y, block.label, 18, align="right")
            page.text(x + _COLUMN - 10, y + 22, block.note, 14, GREY, align="right")
        else:
            page.text(x, y + 2, block.label, 17)
            page.text(x + grid.size[0], y + 4, block.note, 14, GREY, align="right")
        if block.empty:
            size = self._medium.px(grid.size[0]), self._medium.px(grid.size[1])
            page.blank(*grid.cell(index, 0), size, block.empty, 18)
        for place, (channel, rank) in enumerate(block.cells):
            if self._tiles.image(channel, rank) < 0:
                continue
            tile = self._tiles.draw(kind, channel, rank, grid.tile)
            if tile is None:
                page.blank(*grid.cell(index, place), grid.tile, "missing")
            else:
                page.paste(tile, *grid.cell(index, place))


def _range(channels: Sequence[int]) -> str:
    """Some ascending channels in words."""
    first, last = channels[0], channels[-1]
    if len(channels) == 1:
        return f"channel {first}"
    if last - first == len(channels) - 1:
        return f"channels {first}-{last}"
    return f"{len(channels)} channels from {first} to {last}"


def _write_figures(
    tiles: Tiles,
    channels: Sequence[int],
    medium: Medium,
    names: Mapping[str, str],
    out: Path,
    stem: str,
    format: Format,
) -> list[Path]:
    if format == "pdf":
        images = (image for channel in channels for image in draw_figure(tiles, channel, medium, names))
        return write_pages([], images, out, f"{stem}-channels", format)
    written = []
    for channel in channels:
        pages = figure_pages(tiles)
        drawn = draw_figure(tiles, channel, medium, names)
        written += write_pages(numbers(pages) if pages > 1 else [""], drawn, out, f"{stem}-{channel}", format)
    return written


def _lists(store: Store, tap: str, lists: Sequence[List]) -> list[List]:
    """The wanted lists of a tap, all unless told, that were projected. Raises UsageError for one that the store
    does not have."""
    known = store.manifest.lists()
    for which in lists:
        if which not in known:
            raise UsageError(f"{store.path}: has no list {'/'.join(which)}; it has {', '.join(map('/'.join, known))}")
    return [which for which in lists or known if _is_projected(store, tap, which)]


def _is_projected(store: Store, tap: str, which: List) -> bool:
    try:
        store.winners(tap, *which)
    except MaxactError:
        return False
    return True


def _channels(tiles: Tiles, channels: Sequence[int] | None) -> list[int]:
    """Those that were chosen, as far as the tap has them; or those that were projected. None where none of them was."""
    if channels is None:
        return np.flatnonzero(tiles.available).tolist()
    chosen = [channel for channel in channels if 0 <= channel < tiles.tap.channels]
    return chosen if tiles.available[chosen].any() else []


def _kinds(tiles: Tiles, across: int | None) -> dict[Kind, str]:
    """What is drawn, and what it is called in the names of files."""
    kinds: dict[Kind, str] = {"crop": "crops"}
    if tiles.method is not None:
        first = tiles.method == tiles.layout.methods[0]
        kinds["projection"] = "projections" if first else f"projections-{tiles.method}"
    return {kind: f"across-{words}" if across is not None else words for kind, words in kinds.items()}
