"""Which part of an image a picture of a winner shows, and cutting it out.

Two kinds of cut. `field`: the unit's whole field as it lies before clipping, so that all crops of a tap have one size
and one scale, with nothing where it reaches beyond the image. `focus`: a square around the focus box, for taps whose
field is most of the image. Boxes are (y0, x0, y1, x1) in pixels of the model input, half-open (see field.py).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from maxact.field import Field
from maxact.winners import Cut

Boxes = NDArray[np.int32]  # [N, 4]

SHARE = 0.95  # of the energy that the focus box holds
_MARGIN = 0.1  # of the focus box's longer side, around it
_LEAST = 32  # pixels of a square at least


def boxes(field: Field, positions: NDArray[np.int32] | None, count: int) -> tuple[Boxes, Boxes]:
    """The local fields of some units, clipped to the input, and as they lie before clipping.

    `positions` [N, 2] are rows and columns in the tap's map; None stands for `count` times all units together, whose
    box before clipping is the input.
    """
    if positions is None:
        rows, cols = field.local_rows, field.local_cols
        whole = [rows[:, 0].min(), cols[:, 0].min(), rows[:, 1].max(), cols[:, 1].max()]
        return tuple(np.tile(np.array(box, np.int32), (count, 1)) for box in (whole, (0, 0, *field.shape)))  # type: ignore[return-value]
    row, column = positions.T
    clipped, outer = (
        np.stack([rows[row, 0], cols[column, 0], rows[row, 1], cols[column, 1]], 1).astype(np.int32)
        for rows, cols in ((field.local_rows, field.local_cols), (field.outer_rows, field.outer_cols))
    )
    return clipped, outer


def choose_cut(field: Field, crop: str, whole: bool) -> Cut:
    """The kind of cut of a tap: what `crop` says, or for `auto` the focus where the field covers over half of the
    input. `whole` says that the signal starts at every position, so that the field is that of the whole map."""
    if crop != "auto":
        return "focus" if crop == "focus" else "field"
    height, width = field.shape if whole else np.minimum(field.size, field.shape)
    return "focus" if 2 * height * width > field.shape[0] * field.shape[1] else "field"


def frame_of(size: tuple[int, int], largest: int) -> tuple[tuple[int, int], float]:
    """Height and width of the pictures of boxes of a size, at most `largest`, and their scale."""
    scale = min(1.0, largest / max(size))
    return (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), scale


def squares(focus: Boxes, shape: tuple[int, int]) -> Boxes:
    """Squares around focus boxes, with a margin, at least _LEAST pixels wide, moved into the input where they fit."""
    size = focus[:, 2:] - focus[:, :2]
    side = np.ceil(size.max(1) * (1 + 2 * _MARGIN)).astype(np.int32)
    side = np.minimum(np.maximum(side, _LEAST), max(shape))[:, None]
    start = (focus[:, :2] + focus[:, 2:] - side) // 2
    start = np.clip(start, 0, np.maximum(np.array(shape) - side, 0))
    start = np.where(side > np.array(shape), (np.array(shape) - side) // 2, start)
    return np.concatenate([start, start + side], 1).astype(np.int32)


def visible(pixels: torch.Tensor) -> torch.Tensor:
    """A model input as a picture [3, H, W] from 0 to 255.

    uint8 [H, W, 3] as it is; the floats of a preprocess function, whose range nobody knows, stretched to fill it.
    """
    if pixels.dtype == torch.uint8:
        return pixels.permute(2, 0, 1)
    low, high = pixels.amin(), pixels.amax()
    return (pixels - low) * (255 / (high - low).clamp_min(1e-12))


def cut_out(image: torch.Tensor, box: NDArray[np.int32], frame: tuple[int, int]) -> torch.Tensor:
    """What an image [C, H, W] has inside a box, as float32 [C, h, w]; 0 outside the image.

    Where the frame has the size of the box, the values are the image's own; else they are interpolated, antialiased.
    """
    y0, x0, y1, x1 = box.tolist()
    height, width = image.shape[1:]
    inside = image[:, max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)].float()
    if inside.shape[1:] != (y1 - y0, x1 - x0):
        inside = F.pad(inside, (max(-x0, 0), max(x1 - max(width, x0), 0), max(-y0, 0), max(y1 - max(height, y0), 0)))
    if inside.shape[1:] != frame:
        inside = F.interpolate(inside[None], frame, mode="bilinear", antialias=True, align_corners=False)[0]
    return inside


def quantise(signal: torch.Tensor) -> tuple[NDArray[np.uint8], float]:
    """A projection [3, h, w] as uint8 [h, w, 3] around 128, and the scale: (uint8 - 128) / 127 * scale."""
    scale = float(signal.abs().max())
    if not 0 < scale < math.inf:
        return np.full((*signal.shape[1:], 3), 128, np.uint8), 0.0
    levels = (signal / scale * 127).round_() + 128  # 127 / scale may be infinite
    return levels.to(torch.uint8).permute(1, 2, 0).numpy(), scale
