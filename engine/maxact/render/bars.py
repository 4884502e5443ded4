"""What `maxact bench` has measured as a picture: a bar for each stage, as long as an image takes in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from maxact.files import replace_file, writing
from maxact.render.page import GREY, HEADING, INK, MARGIN, NOTE, Colour, Medium, Page
from maxact.verdict import Bench

_WIDTH, _ROW, _BAR = 1400, 46, 30  # units of the page, of a row, of the bar in it
_LEFT, _RIGHT = 230, 380  # room for the names and for the words behind a bar
_GAP = 18  # above what all stages give together
COLOURS: dict[str, Colour] = {
    "read": (150, 160, 172),
    "decode": (217, 141, 58),
    "copy": (165, 130, 190),
    "forward": (52, 107, 148),
    "compiled forward": (36, 132, 132),
    "taps": (110, 160, 205),
    "heaps": (190, 100, 110),
    "scan": INK,
}


def draw_bars(result: Bench) -> Image.Image:
    """The picture. The limit's bar is made of the stages that it follows from: where they share the cores, of what each
    takes of those. Writing the result, which is done once, is not in it."""
    stages = [stage for stage in result.stages if stage.name in COLOURS]
    rows = [(stage.name, [(stage.name, stage.wall)]) for stage in stages]
    rows.insert(len(rows) - 1, ("limit", [*result.parts.items()]))
    longest = max(sum(wall for _, wall in parts) for _, parts in rows)
    top = HEADING + NOTE
    page = Page(Medium.of("png"), _WIDTH, top + len(rows) * _ROW + _GAP + MARGIN)
    page.heading(f"{result.model}: milliseconds for an image", _notes(result), f"{result.images:,} images")
    draw = ImageDraw.Draw(page.image)
    unit = (_WIDTH - MARGIN - _LEFT - _RIGHT) / longest  # for a second
    for place, (name, parts) in enumerate(rows):
        y = top + place * _ROW + (_GAP if name in ("limit", "scan") else 0)
        page.text(MARGIN, y + 4, name, 20, width=_LEFT - MARGIN - 10)
        total = 0.0
        for part, wall in parts:
            start, total = total, total + wall
            left, right = _LEFT + round(start * unit), _LEFT + max(round(total * unit), round(start * unit) + 1)
            draw.rectangle((left, y, right - 1, y + _BAR - 1), fill=COLOURS[part])
        words = f"{1000 * total:.3g} ms · {1 / total:,.{0 if total < 0.1 else 1}f} img/s"
        if name == "scan":
            words += f" · {result.share:.0%} of the limit"
        page.text(_LEFT + total * unit + 12, y + 5, words, 18, INK if name == "scan" else GREY, width=_RIGHT - 12)
        if name == result.bottleneck:
            page.text(_LEFT + total * unit + 18 + page.length(words, 18), y + 5, "· the bottleneck", 18)
    return page.image


def write_bars(result: Bench, path: Path) -> None:
    """Writes the picture as a PNG file. Raises MaxactError where that cannot be done."""
    image = draw_bars(result)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, partial(image.save, format="PNG"))


def _notes(result: Bench) -> tuple[str, str, str]:
    settings, machine = result.settings, result.machine
    threads = f", {settings['threads']} threads" if result.rule.shared else ""
    compiled = ", compiled" if settings["compile"] else ""
    how = f"{settings['precision']}, batches of {settings['batch']}{compiled}{threads}"
    reading = f"{settings['decoder']} with {settings['decode_threads']} threads, {settings['readers']} readers"
    return (
        f"{machine['device']} · {machine['cores']} cores of {machine['cpu']}",
        f"{how} · {reading} · {result.taps} taps, {result.channels:,} channels",
        f"the limit is {result.rule}",
    )
