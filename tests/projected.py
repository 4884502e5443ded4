"""A second pass written by hand, for tests of what reads one: small, quick, and known to the pixel."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from PIL.PdfParser import PdfParser

import maxact
from maxact.thumbs import write_thumbs
from maxact.winners import Layout


def copy_store(store: maxact.Store, place: Path) -> maxact.Store:
    """A copy of a store, for tests that write into it, with the model inputs of all images as lossless thumbs."""
    shutil.copytree(store.path, place)
    write_thumbs(place / "thumbs.parquet", _thumbs(store))
    return maxact.Store(place)


def project(
    store: maxact.Store,
    tap: str,
    *,
    score: str = "max",
    end: str = "top",
    channels: Sequence[int] | None = None,
    shown: int = 4,
    size: int = 9,
    frame: tuple[int, int] | None = None,
    cut: Literal["field", "focus"] = "field",
    methods: tuple[str, ...] = ("deconvnet",),
    missing: Sequence[tuple[int, int]] = (),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes the winners of one list: for `channels` (all, unless told) and the first `shown` ranks.

    A field is `size` pixels high and wide around the middle of its unit, and cut out at its own scale unless `frame`
    says otherwise. Projections are noise that is drawn from `seed`, other for every method. The winners (channel,
    rank) in `missing` are left out as if their files had gone. Gives what was written, [C, shown, ...] each.
    """
    results = store[tap]
    peaks = results.lists[score, end]  # type: ignore[index]
    height, width = store.manifest.preprocessing["crop"]
    own = {"frame": frame or (size, size), "cut": cut, "scale": None if cut == "focus" or frame else 1.0}
    kept = results.tap.map if max(results.tap.map) <= 32 else None
    layout = Layout(results.tap.channels, peaks.image.shape[1], shown, map=kept, methods=methods, seed="one", **own)  # type: ignore[arg-type]
    arrays = {
        name: np.full((layout.channels, shown, *rest), fill, kind)
        for name, (rest, kind, _, fill) in layout.arrays().items()
    }
    draw = np.random.default_rng(seed)
    inputs = store.pixels(range(store.catalog.table.num_rows)).numpy()  # type: ignore[arg-type]
    for channel in range(layout.channels) if channels is None else channels:
        for rank in range(shown):
            image = int(peaks.image[channel, rank])
            if image < 0 or (channel, rank) in missing:
                continue
            middle = np.array((height / 2, width / 2))
            if peaks.position is not None:
                middle = (peaks.position[channel, rank] + 0.5) * (height, width) / results.tap.map
            y0, x0 = (int(value) for value in middle - size / 2)
            outer = np.array((y0, x0, y0 + size, x0 + size))
            limits = np.array((height, width, height, width))
            found: dict[str, Any] = {"crop_box": outer, "source_box": outer * 2.0, "box": outer.clip(0, limits)}
            found["focus_box"] = (outer + np.array((1, 1, -1, -1))).clip(0, limits)
            padded = np.pad(inputs[image], ((size, size), (size, size), (0, 0)))  # black beyond the image
            crop = Image.fromarray(padded[y0 + size : y0 + 2 * size, x0 + size : x0 + 2 * size])
            found["crop"] = np.asarray(crop.resize(layout.frame[::-1], Image.Resampling.BICUBIC))
            for method in methods:
                found[f"projection/{method}"] = draw.integers(1, 256, (*layout.frame, 3))
                found[f"projection_scale/{method}"] = 0.5 + rank
            if layout.map:
                found["map"] = draw.random(layout.map)
            for name, values in found.items():
                arrays[name][channel, rank] = values
    winners = store.start_winners(tap, score, end, layout)
    for start in range(0, layout.channels, layout.chunk):
        winners.write(start, {name: values[start : start + layout.chunk] for name, values in arrays.items()})
    return arrays


def _thumbs(store: maxact.Store) -> Iterator[tuple[int, bytes]]:
    numbers = range(store.catalog.table.num_rows)
    for number, pixels in zip(numbers, store.pixels(numbers).numpy(), strict=True):  # type: ignore[arg-type]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "WEBP", lossless=True)
        yield number, file.getvalue()


def pdf_pages(path: Path) -> list[tuple[float, float]]:
    """Width and height in points of every page of a PDF file."""
    with PdfParser(path) as file:
        boxes = [file.read_indirect(page)[b"MediaBox"] for page in file.pages]
    return [(float(box[2]), float(box[3])) for box in boxes]


def find(page: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Every place (y, x) of a page [H, W, 3] where a tile [h, w, 3] is, to the pixel."""
    height, width = tile.shape[:2]
    inside = page[: len(page) - height + 1, : page.shape[1] - width + 1]
    corner = (inside == tile[0, 0]).all(2)
    corner &= (page[height - 1 :, width - 1 :] == tile[-1, -1]).all(2)
    places = zip(*(axis.tolist() for axis in np.nonzero(corner)), strict=True)
    return [(y, x) for y, x in places if np.array_equal(page[y : y + height, x : x + width], tile)]


def damage_thumbs(store: maxact.Store) -> None:
    """Makes the pictures unreadable, and leaves their numbers."""
    path = store.path / "thumbs.parquet"
    start = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 64)  # the head of a page: numbers stay readable
