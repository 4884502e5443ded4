"""One unit's field, drawn on the model input."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maxact.field import Field

SIDE = 448  # pixels of the picture's longer side, at least
DIMMED = 0.35  # how bright the rest is
COLOUR = (255, 80, 0)
WIDTH = 2


def draw(image: NDArray[np.uint8], field: Field, unit: tuple[int, int]) -> Image.Image:
    """The model input [H, W, 3] with the box of the local field of the unit at (row, column); the rest is dimmed.

    Small inputs are enlarged by a whole number of times, each pixel a square, so that the box can be counted. The
    box is drawn around its pixels, and nothing where the unit sees none. Raises ValueError for an image that is not
    of the field's size, and a unit that its map does not have.
    """
    if image.shape != (*field.shape, 3) or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 {[*field.shape, 3]}, got {image.dtype} {list(image.shape)}")
    rows, columns = len(field.rows), len(field.cols)
    if not (0 <= unit[0] < rows and 0 <= unit[1] < columns):
        raise ValueError(f"unit: expected one of a map of {rows} x {columns}, got {unit}")
    y0, x0, y1, x1 = field.box(*unit)
    shown = (image * DIMMED).astype(np.uint8)
    shown[y0:y1, x0:x1] = image[y0:y1, x0:x1]
    times = max(1, math.ceil(SIDE / max(field.shape)))
    picture = Image.fromarray(shown.repeat(times, 0).repeat(times, 1))
    if y1 > y0 and x1 > x0:
        # outside of the pixels where there is room: PIL's rectangle includes both corners
        corners = (x0 * times - WIDTH, y0 * times - WIDTH, x1 * times + WIDTH - 1, y1 * times + WIDTH - 1)
        inside = (max(corners[0], 0), max(corners[1], 0))
        limit = (min(corners[2], picture.width - 1), min(corners[3], picture.height - 1))
        ImageDraw.Draw(picture).rectangle((*inside, *limit), outline=COLOUR, width=WIDTH)
    return picture
