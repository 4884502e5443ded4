"""Pages of pictures and words: laid out once in units, painted for a screen (PNG) or for print (PDF, A4 at 300 dpi)."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

from PIL import Image, ImageDraw, ImageFont

from maxact.errors import UsageError
from maxact.files import replace_file, writing
from maxact.render.labels import plain

Format = Literal["png", "pdf"]
Align = Literal["left", "centre", "right"]
Colour = tuple[int, int, int]

PAPER, INK, GREY, FAINT = (255, 255, 255), (25, 25, 25), (120, 120, 120), (236, 236, 236)
MARGIN = 30
_DPI = 300
_A4 = (3508, 2480)  # 297 x 210 mm at 300 dpi
_WORDS = 500  # characters that no line has room for
_BORDER = 59  # 5 mm, where many printers do not reach


@dataclass(frozen=True)
class Medium:
    """How a page is painted: `scale` pixels for a unit, in a sheet of so many pixels; on a screen a page that is not
    full is as small as what is on it."""

    scale: float
    sheet: tuple[int, int] | None = None

    width: ClassVar = 2000  # units of a full page
    height: ClassVar = 1414

    @classmethod
    def of(cls, format: Format) -> Medium:
        """A screen's page has 2000 x 1414 pixels, a printed one is an A4 sheet on its side. Raises UsageError for
        another format."""
        if format not in get_args(Format):
            raise UsageError(f"format: expected png or pdf, got {format!r}")
        return cls(1.0) if format == "png" else cls((_A4[1] - 2 * _BORDER) / cls.height, _A4)

    def px(self, units: float) -> int:
        """Units as pixels."""
        return round(units * self.scale)


class Page:
    """A white page. Places are in units from its top left; pictures have the size in pixels that they have."""

    def __init__(self, medium: Medium, width: float | None = None, height: float | None = None) -> None:
        """A full page, or on a screen one of `width` x `height`."""
        self.medium = medium
        size = medium.sheet or (medium.px(width or medium.width), medium.px(height or medium.height))
        self.width = width if width and not medium.sheet else medium.width
        self._border = _BORDER if medium.sheet else 0
        self.image = Image.new("RGB", size, PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 16,
        ink: Colour = INK,
        width: float | None = None,
        align: Align = "left",
    ) -> None:
        """Writes one line, its top at `y`, from, around or up to `x`; shortened with an ellipsis to `width`."""
        px, font = self.medium.px, _font(self.medium.px(size))
        words = plain(words)
        if width is not None:
            words = shorten(words, px(width), font)
        # from the line's ascender, so that lines of one size stand level whatever letters they have
        anchor = {"left": "la", "centre": "ma", "right": "ra"}[align]
        self._draw.text(self._at(x, y), words, ink, font, anchor=anchor)

    def length(self, words: str, size: float) -> float:
        """How wide a line is."""
        return _font(self.medium.px(size)).getlength(plain(words)) / self.medium.scale

    def paste(self, picture: Image.Image, x: float, y: float) -> None:
        """Puts a picture at a place."""
        self.image.paste(picture, self._at(x, y))

    def _at(self, x: float, y: float) -> tuple[int, int]:
        """A place in pixels."""
        return self._border + self.medium.px(x), self._border + self.medium.px(y)

    def blank(self, x: float, y: float, size: tuple[int, int], words: str, text: float = 14) -> None:
        """A faint rectangle of `size` pixels in a picture's place, with a word where it has room."""
        left, top = self._at(x, y)
        self._draw.rectangle((left, top, left + size[0] - 1, top + size[1] - 1), fill=FAINT)
        font = _font(self.medium.px(text))
        if font.getlength(words) + 4 <= size[0]:
            self._draw.text((left + size[0] / 2, top + size[1] / 2), words, GREY, font, anchor="mm")

    def heading(self, title: str, notes: Sequence[str], right: str) -> None:
        """The lines at the page's top: a title with what stands at the right edge, and notes in grey."""
        room = self.width - 2 * MARGIN
        aside = self.length(right, 18)
        self.text(MARGIN, MARGIN - 8, title, 30, width=room - aside - 20)
        self.text(self.width - MARGIN, MARGIN + 2, right, 18, GREY, align="right")
        for line, note in enumerate(notes):
            self.text(MARGIN, MARGIN + 32 + line * NOTE, note, 18, GREY, width=room)


NOTE = 23  # a note's line in a heading
HEADING = MARGIN + 46 + 2 * NOTE  # where what follows a heading with two notes begins


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow has a font built in where it has FreeType: in every wheel
    return font


def shorten(words: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """As many characters as fit `width` pixels, with an ellipsis where that is not all."""
    if len(words) <= _WORDS and font.getlength(words) <= width:
        return words
    words = words[:_WORDS]
    # the most characters that fit: a label of thousands would be measured thousands of times
    fit = bisect_left(range(len(words)), True, key=lambda count: font.getlength(words[: count + 1] + "…") > width)
    return words[:fit].rstrip() + "…"


def write_pages(
    pages: Sequence[str], images: Iterator[Image.Image], out: Path, stem: str, format: Format
) -> list[Path]:
    """Writes `images` one at a time: a PNG each, called `stem` and what `pages` says, or all into one PDF.

    Gives the files. Numbered pages of the same stem that an earlier run left are deleted.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if format == "pdf":
            path = out / f"{stem}.pdf"
            replace_file(path, lambda aside: _write_pdf(images, aside))
            return [path]
        paths = [out / f"{stem}{page}.png" for page in pages]
        for path, image in zip(paths, images, strict=True):
            replace_file(path, partial(image.save, format="PNG", compress_level=4))
        for old in out.iterdir():
            if re.fullmatch(re.escape(stem) + r"-[0-9]{2,}\.png", old.name) and old not in paths:
                old.unlink()
    return paths


def numbers(count: int) -> list[str]:
    """What tells `count` pages apart in the names of files: -01, -02, …"""
    return [f"-{page:02}" for page in range(1, count + 1)]


def _write_pdf(images: Iterator[Image.Image], path: Path) -> None:
    """Page by page, since PIL itself would keep them all."""
    path.unlink(missing_ok=True)
    for number, image in enumerate(images):
        # JPEG inside, with colours as fine as greys: thin coloured lines and small letters stay clean
        image.save(path, "PDF", resolution=_DPI, append=number > 0, quality=95, subsampling=0, title="")
