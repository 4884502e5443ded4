"""How quickly the gallery opens in a browser: a site of ResNet-50's size, 53 taps and 26,560 channels of 9 winners.

The statistics, keys and labels are invented, the pictures real photographs in sprites of the real size, 64 of them
linked under every channel's name. A browser is started anew for each visit, and the time ends when everything that is
in sight has been drawn. With --store, also how long the sprites of that store take to be written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from common import arguments, finish, interleaved, median, photographs
from maxact.render.gallery import write_gallery
from maxact.render.site import ListPage, TapPage, write_site
from maxact.render.sprites import Sheet, encode
from maxact.store import Store
from maxact.winners import Layout

SHOWN, DRAWN, LABELS, IMAGES = 9, 64, 1000, 100_000
INPUT = 224
# whether all that is in sight is there
READY = """
const inside = (each) => {
  const box = each.getBoundingClientRect();
  return box.bottom > 0 && box.top < innerHeight && box.width > 0;
};
window.inSight = [...document.images].filter(inside);
return document.querySelector("main").dataset.ready !== undefined && inSight.length > 3
  && inSight.every((each) => each.complete && each.naturalWidth > 0);
"""
# the milliseconds since the page was asked for, once that has been decoded and drawn
DRAWN_AT = """
const done = arguments[0];
const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
Promise.all(inSight.map((each) => each.decode())).then(frame).then(frame).then(() => done(performance.now()));
"""


def main() -> None:
    """Measures and reports."""
    args = arguments(__doc__ or "", rounds=5, images="", store="")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        index = write_synthetic(Path(folder), photographs(args.images))
        written = time.perf_counter() - begun
        visits = {
            "all taps": "#/",
            "a tap of 2,048 channels": "#/tap/layer4.2.bn3",
            "the same, sorted, by label": "#/tap/layer4.2.bn3?sort=max&label=n0",
            "a channel of it": "#/tap/layer4.2.bn3/1171",
        }
        runs = {name: (lambda route=route: visit(f"{index.as_uri()}{route}")) for name, route in visits.items()}
        measured = interleaved(runs, args.rounds)
        size = sum(path.stat().st_size for path in (Path(folder) / "data").iterdir())
    rows: list[tuple[str, float]] = [(name, median(values)) for name, values in measured.items()]
    details: dict[str, Any] = {"measured": measured, "data_bytes": size, "data_written": written}
    if args.store:
        seconds, count = write(Path(args.store))
        rows.append((f"writing {count} sprites", seconds))
    finish("gallery", ("what", "seconds"), rows, details, args.json)


def write_synthetic(out: Path, images: Path) -> Path:
    """A site of ResNet-50's size; gives its first page."""
    draw = np.random.default_rng(0)
    layout = Layout(1, 50, SHOWN, (128, 128), "focus", None, (7, 7), ("deconvnet",), "one")
    sheet = Sheet.of(layout, (INPUT, INPUT))
    files = [encode(sprite(sheet, sorted(images.rglob("*.jpg")), draw)) for _ in range(DRAWN)]
    stamp = hashlib.blake2b(digest_size=6)
    about = {"title": "resnet50", "images": 1_281_167, "facts": [("synthetic", "yes")]}
    return write_site(out, about, pages(out, sheet, files, draw), stamp)


def pages(out: Path, sheet: Sheet, files: list[bytes], draw: np.random.Generator) -> Iterator[tuple[TapPage, int]]:
    """Every tap, its pictures put in place."""
    originals = out / "img" / "originals"
    originals.mkdir(parents=True)
    for index, data in enumerate(files):
        (originals / f"{index}.webp").write_bytes(data)
    for name, channels in taps():
        folder = out / "img" / name / "max-top"
        folder.mkdir(parents=True)
        for channel in range(channels):
            os.link(originals / f"{channel % len(files)}.webp", folder / f"{channel}.webp")
        os.link(originals / "0.webp", out / "img" / name / "cover.webp")
        yield page(name, channels, sheet, draw), 8


def taps() -> Iterator[tuple[str, int]]:
    """ResNet-50's convolutions, by the norms that follow them."""
    yield "bn1", 64
    for stage, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            for number, channels in ((1, planes), (2, planes), (3, 4 * planes)):
                yield f"layer{stage}.{block}.bn{number}", channels
            if block == 0:
                yield f"layer{stage}.0.downsample.1", 4 * planes


def page(name: str, channels: int, sheet: Sheet, draw: np.random.Generator) -> TapPage:
    """One tap with invented winners."""
    stats = {each: draw.normal(size=channels).astype(np.float32) for each in ("mean", "std", "min", "max", "active")}
    stats["count"] = np.full(channels, 1_281_167)
    images = np.unique(draw.integers(0, IMAGES, channels * SHOWN))
    shape = (channels, SHOWN)
    place, label = draw.integers(0, len(images), shape), draw.integers(0, LABELS, shape)
    numbers = draw.integers(0, INPUT, (*shape, 14)).tolist()
    winners = [
        [
            [int(place[c, r]), int(label[c, r]), 12.345, *row[:2], row[2:6], row[6:10], row[10:]]
            for r, row in enumerate(rows)
        ]
        for c, rows in enumerate(numbers)
    ]
    keys = [[int(number), f"train/n{number % LABELS:08}/n{number % LABELS:08}_{number}.JPEG"] for number in images]
    facts = {
        "name": name,
        "file": name,
        "kind": "Conv2d",
        "layer": name.replace("bn", "conv"),
        "channels": channels,
        "map": [7, 7],
        "dead": int((stats["max"] <= 0).sum()),
        "unfit": 0,
        "pictured": channels,
        "field": {"size": [427, 427], "stride": [32, 32]},
    }
    labels = [[f"n{number:08}", f"some class of number {number}"] for number in range(LABELS)]
    lists = {"max/top": ListPage(sheet, [True] * channels, label.tolist(), winners)}
    return TapPage(facts, stats, range(channels), labels, keys, lists)


def sprite(sheet: Sheet, images: list[Path], draw: np.random.Generator) -> NDArray[np.uint8]:
    """Photographs in every tile."""
    canvas = Image.new("RGB", sheet.size[::-1])
    for tiles in sheet.blocks.values():
        for rank in range(tiles.count):
            with Image.open(images[int(draw.integers(len(images)))]) as opened:
                y, x = tiles.place(rank)
                canvas.paste(ImageOps.fit(opened.convert("RGB"), (tiles.width, tiles.height)), (x, y))
    return np.asarray(canvas)


def visit(address: str) -> float:
    """Seconds from asking for a page until all that is in sight is there, in a browser that knows nothing of it."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.add_argument("--window-size=1400,1000")
    driver = shutil.which("chromedriver")
    with webdriver.Chrome(options, Service(driver) if driver else None) as browser:
        browser.get(address)
        WebDriverWait(browser, 60, 0.02).until(lambda each: each.execute_script(READY))
        spent: float = browser.execute_async_script(DRAWN_AT)
        return spent / 1000


def write(path: Path) -> tuple[float, int]:
    """Seconds for the gallery of a store, and how many sprites it has."""
    count = 0

    def report(done: int, total: int) -> None:
        nonlocal count
        count = total

    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        write_gallery(Store(path), Path(folder), report=report)
        return time.perf_counter() - begun, count


if __name__ == "__main__":
    main()
