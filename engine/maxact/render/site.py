"""The gallery's site: pages of taps as files that a browser opens, from the file system or from a web server.

    OUT/index.html, static/         the page, its scripts and its style
    OUT/data/index.js               what there is, and every tap's facts
    OUT/data/<tap>.js               statistics of all channels of a tap, and the labels of their winners
    OUT/data/<tap>-<part>.js        the winners of _PART channels
    OUT/img/<tap>/cover.webp        some crops of the tap
    OUT/img/<tap>/<score>-<end>/<channel>.webp   a channel's pictures (sprites.py)

Data files are scripts that hand their content to the page, because browsers refuse to fetch files that lie beside a
page which was opened from the file system.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from numpy.typing import NDArray

from maxact.files import writing
from maxact.render.sprites import Sheet

_PART = 128  # channels whose winners are in one data file
_STATS = ("max", "mean", "std", "min", "active")
BOXES = 5  # where the boxes begin in what is said of a winner
GENERATOR = '<meta name="generator" content="maxact">'


@dataclass(frozen=True)
class ListPage:
    """One list of a tap's N shown channels.

    `pictured` [N] says whether there is a sprite, which lies as `sheet` says; `labels` [N][R] are places among the
    tap's labels, -1 where the list is shorter. `winners` [N][R] have an image's place among the tap's images, its
    label's, score, row, column (-1 for mean scores) and, from BOXES on and only where it was projected, the boxes of
    the field, the focus and the crop, each y0, x0, y1, x1.
    """

    sheet: Sheet | None
    pictured: list[bool]
    labels: list[list[int]]
    winners: list[list[list[Any]]]


@dataclass(frozen=True)
class TapPage:
    """All that the site says of one tap.

    `facts` are plain values, `stats` is by channel [C], `shown` has the N channels that have pages, `labels` the labels
    of their winners (code, or code and words), `images` the winning images (number and key).
    """

    facts: dict[str, Any]
    stats: Mapping[str, NDArray[Any]]
    shown: Sequence[int]
    labels: list[list[str]]
    images: list[list[Any]]
    lists: dict[str, ListPage]


def write_site(out: Path, about: Mapping[str, Any], pages: Iterable[tuple[TapPage, int]], stamp: Any) -> Path:
    """Writes all but the pictures: data, scripts, style and, last, the page itself, whose path it gives.

    about: title, images, input (its height and width) and facts (name, value) of the whole. pages: taps in order, with
    the number of crops on the cover; may be read while others are written. stamp: a hash of the pictures, which grows
    by the data; browsers keep files for as long as it stays.

    Raises MaxactError where it cannot be written.
    """
    taps = []
    for place, (page, cover) in enumerate(pages):
        with writing(out):
            (out / "data").mkdir(parents=True, exist_ok=True)
            for name, text in _tap_files(place, page):
                stamp.update(text.encode())
                (out / "data" / f"{name}.js").write_text(text)
        taps.append(page.facts | {"cover": cover, "shown": len(page.shown)})
    package = files("maxact.render")
    static = {each.name: each.read_bytes() for each in package.joinpath("static").iterdir()}
    text = _script("index", {**about, "taps": taps, "part": _PART})
    for content in (text.encode(), *static.values()):
        stamp.update(content)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        package.joinpath("templates/index.html.j2").read_text("utf-8")
    )
    index = out / "index.html"
    with writing(out):
        (out / "data" / "index.js").write_text(text)
        (out / "static").mkdir(exist_ok=True)
        for name, content in static.items():
            (out / "static" / name).write_bytes(content)
        index.write_text(template.render(about=about, taps=taps, stamp=stamp.hexdigest()), "utf-8")
    return index


def _tap_files(place: int, page: TapPage) -> Iterator[tuple[str, str]]:
    """The data files of the tap at a place among all: name and content."""
    name = page.facts["file"]
    lists = {
        key: {
            "sheet": each.sheet and each.sheet.to_json(),
            "pictured": [int(value) for value in each.pictured],
            "labels": each.labels,
            "best": [row[0][2] if row else None for row in each.winners],
        }
        for key, each in page.lists.items()
    }
    content = {
        "stats": {each: [number(value) for value in page.stats[each].tolist()] for each in _STATS},
        "count": page.stats["count"].tolist(),
        "shown": None if len(page.shown) == page.facts["channels"] else list(page.shown),
        "labels": page.labels,
        "lists": lists,
    }
    yield name, _script("tap", content, place)
    for part, start in enumerate(range(0, len(page.shown), _PART)):
        rows = {key: each.winners[start : start + _PART] for key, each in page.lists.items()}
        used = sorted({winner[0] for each in rows.values() for row in each for winner in row})
        own = {image: index for index, image in enumerate(used)}
        moved = {key: [[[own[image], *rest] for image, *rest in row] for row in each] for key, each in rows.items()}
        yield f"{name}-{part}", _script("part", {"images": [page.images[i] for i in used], "lists": moved}, place, part)


def _script(function: str, content: object, *before: int) -> str:
    """A script that hands over its content: as text, which browsers parse faster than code. Nothing in it can end a
    script element or a line, whatever characters there are in names."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    literal = json.dumps(text).replace("<", "\\u003c")
    arguments = "".join(f"{value}, " for value in before)
    return f"maxact.{function}({arguments}JSON.parse({literal}));\n"


def number(value: float) -> float | int | None:
    """With five digits, which is what is shown; None for what is no number."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short
