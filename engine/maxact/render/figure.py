"""A channel's figure: its winners in rank order, each as the whole image, the crop and the projection side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from PIL import Image

from maxact.render.page import GREY, HEADING, MARGIN, NOTE, Medium, Page
from maxact.render.tiles import Tiles

_COLUMNS, _ROWS = 3, 3  # winners on a page
_SIDE = 196  # units of a picture's longer side
_GAP, _BESIDE, _BELOW = 6, 44, 18  # between a winner's pictures; between winners
_TOP = HEADING + NOTE  # below a heading with three notes
_LINES = 50  # the two lines above a winner's pictures


def figure_pages(tiles: Tiles) -> int:
    """How many pages the figure of a channel has."""
    return math.ceil(tiles.shown / (_COLUMNS * _ROWS))


def draw_figure(tiles: Tiles, channel: int, medium: Medium, label_names: Mapping[str, str]) -> Iterator[Image.Image]:
    """The pages of the figure of one channel, nine winners each.

    Above the pictures stand rank (from 1), score and label, in the words of `label_names` where it has any, and the
    image's key. The whole image is the model's input, with the box of the crop on it.
    """
    pages, each = figure_pages(tiles), _COLUMNS * _ROWS
    pictures = 2 if tiles.method is None else 3
    width = pictures * (_SIDE + _GAP) - _GAP
    table = tiles.results.top(channel, *tiles.which)
    labels, keys = table["label"].to_pylist(), table["key"].to_pylist()
    for number in range(1, pages + 1):
        ranks = range((number - 1) * each, min(number * each, tiles.shown))
        columns, rows = min(len(ranks), _COLUMNS), math.ceil(len(ranks) / _COLUMNS)
        height = _TOP + rows * (_LINES + _SIDE + _BELOW) - _BELOW + MARGIN
        page = Page(medium, max(1000, 2 * MARGIN + columns * (width + _BESIDE) - _BESIDE), height)
        head(page, tiles, channel, f"page {number} of {pages}" if pages > 1 else "")
        for place, rank in enumerate(ranks):
            x = MARGIN + place % _COLUMNS * (width + _BESIDE)
            y = _TOP + place // _COLUMNS * (_LINES + _SIDE + _BELOW)
            if rank < len(table):
                label = labels[rank] or ""
                draw_winner(page, tiles, channel, rank, label_names.get(label, label), keys[rank], x, y)
        yield page.image


def head(page: Page, tiles: Tiles, channel: int, right: str) -> None:
    """The lines at the top: what the channel is, and its statistics."""
    stats = {name: float(values[channel]) for name, values in tiles.results.stats.items()}
    facts = "dead: never above zero · " if tiles.results.dead[channel] else ""
    facts += f"above zero at {stats['active']:.1%} of all positions · mean {stats['mean']:.3g}, std {stats['std']:.3g}"
    facts += f" · from {stats['min']:.3g} to {stats['max']:.3g}"
    page.heading(f"{tiles.tap.name} · channel {channel}", (*tiles.describe(), facts), right)


def draw_winner(page: Page, tiles: Tiles, channel: int, rank: int, label: str, key: str, x: float, y: float) -> None:
    """One winner: two lines of words, and its pictures side by side."""
    medium = page.medium
    side = medium.px(_SIDE)
    sizes = {"whole": tiles.fit_whole(side), "crop": tiles.fit(side)}
    found = {"whole": tiles.whole(channel, rank, sizes["whole"]), "crop": tiles.crop(channel, rank, sizes["crop"])}
    if tiles.method is not None:
        sizes["projection"] = sizes["crop"]
        found["projection"] = tiles.projection(channel, rank, sizes["crop"])
    width = len(sizes) * (_SIDE + _GAP) - _GAP
    words = [str(rank + 1), f"{tiles.score(channel, rank):.4g}", *([label] if label else [])]
    page.text(x, y, " · ".join(words), 20, width=width)
    page.text(x, y + 26, key, 14, GREY, width=width)
    for place, (name, picture) in enumerate(found.items()):
        size = sizes[name]
        left = x + place * (_SIDE + _GAP) + (_SIDE - size[0] / medium.scale) / 2
        top = y + _LINES + (_SIDE - size[1] / medium.scale) / 2
        if picture is None:
            page.blank(left, top, size, "missing")
        else:
            page.paste(picture, left, top)
