"""The kernels of a network's first convolution, the one that sees colours, as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from maxact.errors import MaxactError
from maxact.render.page import HEADING, MARGIN, Format, Medium, Page, numbers, write_pages
from maxact.render.tiles import scale_weights

_SIDES = (160, 128, 96)  # units of a kernel's longer side: the largest with which all fit a page, or the last
_GAP, _LINE = 10, 20
_MOST = 100  # pages


def write_filters(network: nn.Module, out: Path, *, title: str = "", format: Format = "png") -> list[Path]:
    """Draws the first convolution's kernels into the folder `out`, as `filters.png` (or numbered pages of it) or
    `filters.pdf`. Raises MaxactError where the network has no convolution, or more kernels than can be looked at."""
    medium = Medium.of(format)
    path, convolution = first_convolution(network)
    tiles = kernels(convolution)
    pages = _pages(tiles, path, convolution, title, medium)
    count = math.ceil(len(tiles) / _grid(tiles, medium)[1])
    if count > _MOST:
        raise MaxactError(f"{path}: its {len(tiles)} kernels would fill {count} pages; there is no first layer to draw")
    return write_pages(numbers(count) if count > 1 else [""], pages, out, "filters", format)


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """The path and module of the first convolution that sees three channels; of the first at all where none does.

    The first in the order in which the network holds its modules, which is that in which networks run them. Raises
    MaxactError where there is none.
    """
    found = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    if not found:
        raise MaxactError("filters: the network has no convolution whose kernels could be drawn")
    return next(((path, module) for path, module in found if module.in_channels == 3), found[0])


def kernels(convolution: nn.Conv2d) -> dict[str, NDArray[np.uint8]]:
    """Label -> picture [h, w, 3] of every kernel.

    A kernel of three channels is one picture in colour, labelled with its output channel; another one a grey picture
    for each channel that it sees, labelled `5` where that is only one and `5:0`, `5:1`, … elsewhere. 128 is zero, and
    the kernel's largest absolute weight, of all its channels, is 1 or 255: each is normalised by itself.
    """
    weights = convolution.weight.detach().float().cpu().numpy()  # [O, I, h, w]
    largest = np.abs(weights).max((1, 2, 3), keepdims=True)
    shown = np.round(128 + 127 * weights / np.where(largest > 0, largest, 1)).astype(np.uint8)
    if shown.shape[1] == 3:
        return {str(number): kernel.transpose(1, 2, 0) for number, kernel in enumerate(shown)}
    alone = shown.shape[1] == 1
    return {
        f"{number}" if alone else f"{number}:{channel}": np.repeat(part[:, :, None], 3, 2)
        for number, kernel in enumerate(shown)
        for channel, part in enumerate(kernel)
    }


def _grid(tiles: dict[str, NDArray[np.uint8]], medium: Medium) -> tuple[int, int, tuple[int, int]]:
    """How many columns, how many tiles on a page, and a tile's size in pixels."""
    height, width = next(iter(tiles.values())).shape[:2]
    for side in _SIDES:
        longer = max(height, width)
        w, h = (max(1, round(medium.px(side) * length / longer)) for length in (width, height))
        columns = int((medium.width - 2 * MARGIN + _GAP) // (w / medium.scale + _GAP))
        rows = int((medium.height - HEADING - MARGIN + _GAP) // (h / medium.scale + _LINE + _GAP))
        if columns * rows >= len(tiles):
            columns = math.ceil(len(tiles) / math.ceil(len(tiles) / columns))  # rows of one length
            break
    return columns, columns * rows, (w, h)


def _pages(
    tiles: dict[str, NDArray[np.uint8]], path: str, convolution: nn.Conv2d, title: str, medium: Medium
) -> Iterator[Image.Image]:
    columns, each, size = _grid(tiles, medium)
    width, height = (length / medium.scale for length in size)
    items = list(tiles.items())
    rows = math.ceil(min(each, len(items)) / columns)
    note = f"{convolution.out_channels} kernels of {_by(convolution.kernel_size)}, stride {_by(convolution.stride)}"
    for start in range(0, len(items), each):
        page = Page(
            medium,
            max(900, 2 * MARGIN + columns * (width + _GAP) - _GAP),
            HEADING + rows * (height + _LINE + _GAP) - _GAP + MARGIN,
        )
        right = f"page {start // each + 1} of {math.ceil(len(items) / each)}" if len(items) > each else ""
        page.heading(f"{path} · kernels", [title, note] if title else [note], right)
        for place, (label, pixels) in enumerate(items[start : start + each]):
            row, column = divmod(place, columns)
            x, y = MARGIN + column * (width + _GAP), HEADING + row * (height + _LINE + _GAP)
            page.text(x, y, label, 14)
            page.paste(scale_weights(Image.fromarray(pixels), size), x, y + _LINE)
        yield page.image


def _by(lengths: tuple[int, ...]) -> str:
    return " x ".join(map(str, lengths))
