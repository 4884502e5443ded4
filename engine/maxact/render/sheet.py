"""Contact sheets: one row per channel, its strongest images side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maxact.store import Store

_GAP = 4
_CAPTION = 16
_PAPER, _INK, _MARK = (255, 255, 255), (30, 30, 30), (255, 215, 0)


def contact_sheet(store: Store, channels: Sequence[tuple[str, int]], ranks: int = 9, side: int = 112) -> Image.Image:
    """The first `ranks` images of some channels, (tap, channel) each, a row per channel.

    An image is the model input, at most `side` pixels wide and high; the square on it marks the part of it that
    the winning position stands for in the tap's map.
    """
    height, width = store.manifest.preprocessing["crop"]
    scale = side / max(height, width)
    cell = (round(width * scale), round(height * scale))
    sheet = Image.new(
        "RGB",
        (ranks * (cell[0] + _GAP) + _GAP, len(channels) * (cell[1] + _CAPTION + _GAP) + _GAP),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for line, (tap, channel) in enumerate(channels):
        results = store[tap]
        table = results.top(channel).slice(0, ranks)
        top = _GAP + line * (cell[1] + _CAPTION + _GAP)
        scores = ", ".join(f"{score:.1f}" for score in table["score"].to_pylist()[:3])
        draw.text((_GAP, top), f"{tap} · channel {channel} · {scores}, …", _INK, font)
        if not len(table):
            continue
        pixels = store.pixels(table["image"].to_pylist())
        for rank, (image, row, column) in enumerate(
            zip(pixels.numpy(), table["row"].to_pylist(), table["column"].to_pylist(), strict=True)
        ):
            left = _GAP + rank * (cell[0] + _GAP)
            sheet.paste(Image.fromarray(image).resize(cell, Image.Resampling.LANCZOS), (left, top + _CAPTION))
            step = np.array(cell) / np.array(results.tap.map[::-1])  # x, y
            corner = np.array([column, row]) * step + (left, top + _CAPTION)
            if results.tap.positions > 1:
                draw.rectangle((*corner, *(corner + np.maximum(step, 4))), outline=_MARK, width=2)
    return sheet


def telling_channels(store: Store, taps: int = 4, each: int = 2) -> list[tuple[str, int]]:
    """Channels that make a good picture: of some taps spread over the depth of the network, those that stand out
    most, by how many standard deviations their nine strongest peaks lie above their mean."""
    names = list(store)
    chosen = []
    for index in np.linspace(0, len(names) - 1, taps + 1).astype(int)[1:]:
        results = store[names[index]]
        stats = results.stats
        _, score, _ = results.lists["max", "top"]
        spread = (score[:, :9].mean(1) - stats["mean"]) / np.where(stats["std"] > 0, stats["std"], np.inf)
        spread = np.where(results.dead | np.isnan(spread), -np.inf, spread)
        chosen += [(names[index], int(channel)) for channel in np.argsort(-spread, kind="stable")[:each]]
    return chosen
