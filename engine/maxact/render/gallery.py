"""The gallery: a store's taps, channels and winners, and their pictures, as a site (site.py)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps

from maxact.choose import choose_taps, file_names
from maxact.config import cores
from maxact.errors import MaxactError, UsageError
from maxact.files import writing
from maxact.render.site import BOXES, GENERATOR, ListPage, TapPage, number, write_site
from maxact.render.sprites import Pictures, Sprites, encode
from maxact.results import TapResults
from maxact.store import Store
from maxact.topk import List

log = logging.getLogger("maxact")
_PLAIN = 9  # winners that are listed of a channel that was not projected
_SAMPLE = 16  # sprites that are made to know the size of all
_LINE, _BOXES = 50, 60  # bytes of data for a winner, and for its boxes
_COVER, _TILE = 8, 80  # crops on a tap's cover, and their side in pixels


@dataclass(frozen=True)
class Need:
    """What a gallery will hold: channels, sprites, and about how many bytes."""

    channels: int
    sprites: int
    bytes: int


def measure(store: Store, *, layers: Sequence[str] = (), channels: Sequence[int] | None = None) -> Need:
    """How large the gallery of a store becomes, from a few sprites that are made and thrown away.

    Raises MaxactError and UsageError as `write_gallery`.
    """
    chosen = _choose(store, layers, channels)
    works = [(sprites, work) for sprites in _all_sprites(store, chosen) for work in sprites.work(chosen[sprites.tap])]
    total = sum(len(rows) for _, (_, rows) in works)
    pixels = sum(len(rows) * math.prod(sprites.sheet.size) for sprites, (_, rows) in works)
    drawn = written = 0
    for sprites, (block, rows) in works[:: math.ceil(len(works) / _SAMPLE) or 1]:
        for _, sprite in sprites.draw(sprites.read(block), rows[len(rows) // 2 :][:1]):
            drawn += math.prod(sprite.shape[:2])
            written += len(encode(sprite))
    count = sum(map(len, chosen.values()))
    ranks = max((sprites.layout.shown for sprites, _ in works), default=_PLAIN)
    data = count * len(store.manifest.lists()) * ranks * _LINE + total * ranks * _BOXES
    return Need(count, total, round(pixels * written / max(drawn, 1)) + data)


def write_gallery(
    store: Store,
    out: Path,
    *,
    layers: Sequence[str] = (),
    channels: Sequence[int] | None = None,
    label_names: Mapping[str, str] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the gallery of a store into the folder `out` and gives the path of its first page.

    layers: the taps to show, by name or layer or as globs; all of them unless told. channels: these of each tap.
    label_names: label as the catalog has it -> words. report: is told sprites done, and all of them. Sprites that are
    there already and would become the same are left as they are. Of a scan that goes on it shows the last commit, which
    has no pictures.

    Raises UsageError where nothing is chosen, MaxactError where a finished scan has not been projected, where nothing
    is committed yet, where `out` holds a page that is none of ours, and where it cannot be written.
    """
    chosen = _choose(store, layers, channels)
    all_sprites = _all_sprites(store, chosen)
    if not store.manifest.finished:
        log.warning("%s: the scan goes on; this is its last commit, without pictures (`maxact project`)", store.path)
    index = out / "index.html"
    with writing(out):
        if index.exists() and GENERATOR not in index.read_text(errors="replace"):
            raise MaxactError(f"{index}: is not a gallery; choose another folder")
    names = file_names(list(chosen))
    total = sum(len(rows) for sprites in all_sprites for _, rows in sprites.work(chosen[sprites.tap]))
    done, stamp = 0, hashlib.blake2b(digest_size=6)
    pool = ThreadPoolExecutor(cores(), "maxact-sprites")  # PIL and numpy let go of the interpreter
    try:
        for sprites in all_sprites:
            folder = out / "img" / names[sprites.tap] / "-".join(sprites.list)
            for count in _write_sprites(sprites, chosen[sprites.tap], out, folder, pool, stamp):
                done += count
                report(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    pages = _pages(store, chosen, names, {(each.tap, each.list): each for each in all_sprites}, label_names or {})
    covered = ((page, _write_cover(out, page)) for page in pages)
    return write_site(out, _about(store), covered, stamp)


def _choose(store: Store, layers: Sequence[str], channels: Sequence[int] | None) -> dict[str, list[int]]:
    """The channels to show, by tap; no tap without any."""
    counts = {tap.name: tap.channels for tap in store.manifest.taps}
    chosen = {}
    for name in choose_taps(store, layers):
        numbers = range(counts[name]) if channels is None else sorted(set(channels))
        if found := [number for number in numbers if 0 <= number < counts[name]]:
            chosen[name] = found
    if not chosen:
        raise UsageError(f"channels: none of the chosen taps of {store.path} has channels {list(channels or ())}")
    return chosen


def _all_sprites(store: Store, chosen: Mapping[str, Sequence[int]]) -> list[Sprites]:
    """Of every list of the chosen taps that has been projected. Raises MaxactError where none has, though it could."""
    pictures, found = Pictures(store), []
    for tap in chosen:
        for wanted in store.manifest.lists():
            with suppress(MaxactError):  # this list has not been projected
                found.append(Sprites(store, tap, wanted, pictures))
    if store.manifest.finished and not any(sprites.work(chosen[sprites.tap]) for sprites in found):
        raise MaxactError(f"{store.path}: nothing of it has been projected; run `maxact project` on it first")
    return found


def _write_sprites(
    sprites: Sprites, channels: Sequence[int], out: Path, folder: Path, pool: ThreadPoolExecutor, stamp: Any
) -> Iterator[int]:
    """Writes the sprites of one list that are not there yet; gives how many each of its blocks has, as they are done.

    `made.json` says what each channel's sprite was made from.
    """
    record = folder / "made.json"
    made: dict[str, str] = {}
    with suppress(OSError, ValueError):
        made = dict(json.loads(record.read_text()))
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)  # cut short, nobody knows which of the sprites are new

    def write(block: range, rows: list[int]) -> dict[str, str]:
        values = sprites.read(block)
        digests = {row: sprites.digest(values, row) for row in rows}
        there = {row for row in rows if (folder / f"{block[row]}.webp").exists()}
        left = [row for row in rows if row not in there or made.get(str(block[row])) != digests[row]]
        for row, sprite in sprites.draw(values, left):
            data = encode(sprite)
            path = folder / f"{block[row]}.webp"
            aside = path.with_suffix(".part")
            with writing(out):
                aside.write_bytes(data)
                aside.replace(path)
        return {str(block[row]): digest for row, digest in digests.items()}

    tasks = [pool.submit(write, *work) for work in sprites.work(channels)]
    now: dict[str, str] = {}
    for task in as_completed(tasks):
        now |= task.result()
        yield len(task.result())
    stamp.update(json.dumps(sorted(now.items())).encode())
    with writing(out):
        record.write_text(json.dumps(made | now))


def _pages(
    store: Store,
    chosen: Mapping[str, Sequence[int]],
    names: Mapping[str, str],
    all_sprites: Mapping[tuple[str, List], Sprites],
    label_names: Mapping[str, str],
) -> Iterator[TapPage]:
    for tap, channels in chosen.items():
        results = store[tap]
        found = {key: all_sprites.get((tap, key)) for key in results.lists}
        yield _page(results, channels, names[tap], found, label_names, _attributes(store, tap))


def _attributes(store: Store, tap: str) -> dict[str, Any]:
    """What the store says of a tap's field: `field` and `global`, where it is known."""
    with suppress(OSError, ValueError, KeyError):
        values = json.loads((store.path / tap / "zarr.json").read_text())["attributes"]
        return {name: values[name] for name in ("field", "global") if name in values}
    return {}


def _page(
    results: TapResults,
    channels: Sequence[int],
    name: str,
    found: Mapping[List, Sprites | None],
    label_names: Mapping[str, str],
    attributes: Mapping[str, Any],
) -> TapPage:
    tap, catalog = results.tap, results.catalog.table
    shown = {key: sprites.layout.shown if sprites else _PLAIN for key, sprites in found.items()}
    images = {key: results.lists[key].image[channels, : shown[key]] for key in found}
    numbers = np.unique(np.concatenate([each.ravel() for each in images.values()]))
    numbers = numbers[numbers >= 0]
    named = catalog.select(["key", "label"]).take(pa.array(numbers))
    codes, of_image = np.unique(np.array(named["label"].to_pylist(), object), return_inverse=True)
    lists = {}
    for key, sprites in found.items():
        places = np.searchsorted(numbers, images[key])
        labels = np.where(images[key] >= 0, np.append(of_image, -1)[places], -1)
        pictured = sprites.projected[channels].tolist() if sprites else [False] * len(channels)
        winners = _winners(results, key, channels, shown[key], places, labels, sprites)
        lists["/".join(key)] = ListPage(sprites.sheet if sprites else None, pictured, labels.tolist(), winners)
    facts = {
        "name": tap.name,
        "file": name,
        "kind": tap.kind,
        "layer": tap.layer,
        "channels": tap.channels,
        "map": list(tap.map),
        "dead": int(results.dead.sum()),
        "unfit": results.unfit,
        "pictured": sum(map(any, zip(*(each.pictured for each in lists.values()), strict=True))),
        **attributes,
    }
    words = [[code, label_names[code]] if code in label_names else [code] for code in codes.tolist()]
    keys = [list(pair) for pair in zip(numbers.tolist(), named["key"].to_pylist(), strict=True)]
    return TapPage(facts, results.stats, channels, words, keys, lists)


def _winners(
    results: TapResults,
    key: List,
    channels: Sequence[int],
    shown: int,
    places: NDArray[np.int64],
    labels: NDArray[np.int64],
    sprites: Sprites | None,
) -> list[list[list[Any]]]:
    """As `ListPage.winners`."""
    peaks = results.lists[key]
    where = np.full((*places.shape, 2), -1) if peaks.position is None else peaks.position[channels, :shown]
    boxes = sprites.boxes()[channels] if sprites else np.full((*places.shape, 3, 4), -1)
    columns = (places, labels, peaks.score[channels, :shown], where, boxes)
    return [
        [
            [place, label, number(score), *position, *(three if three[0][0] >= 0 else ())]
            for place, label, score, position, three in zip(*row, strict=True)
            if label >= 0
        ]
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _write_cover(out: Path, page: TapPage) -> int:
    """Puts the best crops of the channels that stand out most side by side; gives how many there are."""
    folder = out / "img" / page.facts["file"]
    name, each = next(((name, each) for name, each in page.lists.items() if any(each.pictured)), ("", None))
    if each is None or each.sheet is None:
        return 0
    cells = each.sheet.blocks["crop"]
    found: list[Image.Image] = []
    for place, rank in _telling(page, each)[:_COVER]:
        y, x = cells.place(rank)
        with Image.open(folder / name.replace("/", "-") / f"{page.shown[place]}.webp") as sprite:
            tile = sprite.convert("RGB").crop((x, y, x + cells.width, y + cells.height))
        found.append(ImageOps.fit(tile, (_TILE, _TILE), Image.Resampling.LANCZOS))
    cover = Image.new("RGB", (_TILE * max(len(found), 1), _TILE))
    for index, tile in enumerate(found):
        cover.paste(tile, (index * _TILE, 0))
    data = encode(np.asarray(cover))
    with writing(out):
        (folder / "cover.webp").write_bytes(data)
    return len(found)


def _telling(page: TapPage, each: ListPage) -> list[tuple[int, int]]:
    """Channels that make a good picture, as places and the ranks to show: by how many standard deviations their
    winners lie above the mean; first those with a crop that lies inside its image, and no image twice."""
    assert each.sheet is not None
    height, width = each.sheet.whole
    scores = [np.mean([winner[2] for winner in row if winner[2] is not None] or [-np.inf]) for row in each.winners]
    deviation = np.where(page.stats["std"] > 0, page.stats["std"], np.inf)[page.shown]
    telling = np.nan_to_num((np.array(scores) - page.stats["mean"][page.shown]) / deviation, nan=-np.inf)
    images: set[int] = set()
    inside: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for place in np.argsort(-telling, kind="stable").tolist():
        ranks = [rank for rank, winner in enumerate(each.winners[place]) if len(winner) > BOXES]
        if not ranks or len(inside) == _COVER:
            continue
        for rank in ranks:
            image, (y0, x0, y1, x1) = each.winners[place][rank][0], each.winners[place][rank][BOXES + 2]
            if image not in images and y0 >= 0 and x0 >= 0 and y1 <= height and x1 <= width:
                images.add(image)
                inside.append((place, rank))
                break
        else:
            others.append((place, ranks[0]))
    return inside + others


def _about(store: Store) -> dict[str, Any]:
    """What the first page says of the whole."""
    manifest = store.manifest
    model, settings, summary = manifest.model, manifest.settings, manifest.summary or {}
    pre, projected = manifest.preprocessing, manifest.projected or {}
    input_size = " x ".join(map(str, pre["crop"]))
    count, scanned = int(manifest.images["count"]), store.scanned()
    facts = [
        ("unfinished", "" if manifest.finished else f"{scanned:,} of {count:,} images are scanned"),
        ("weights", model.get("weights")),
        ("sha256", model.get("sha256")),
        ("images", manifest.images.get("source")),
        ("input", pre["function"] or f"{input_size} pixels, {pre['fit']}, {pre['interpolation']}"),
        ("recorded at", settings.get("at")),
        ("precision", settings.get("precision")),
        ("projections", ", ".join(projected.get("methods", ()))),
        ("seed", projected.get("seed")),
        ("bad images", summary.get("bad")),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    return {
        "title": model["name"],
        "images": scanned,
        "input": pre["crop"],
        "facts": [(name, str(value)) for name, value in facts if value not in (None, "", 0)],
    }
