"""Encoded files and whatever a dataset calls a picture -> 8-bit RGB pictures of PIL.

JPEG, JPEG 2000, PNG, WebP, BMP, TIFF and PNM are taken under any file name, with grey, CMYK, palette, alpha
(dropped) and 16-bit pixels (scaled to 8 and rounded): what DALI takes, and the pixels that it makes of them.
"""

from __future__ import annotations

import io
import re
import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM")
THUMB = 1 << 26  # pixels of a model input that a store keeps, at most
_LARGE = 50_000_000  # pixels of a picture that is decoded alone
_large = threading.Lock()
# First bytes of what people also keep under .jpg, so that the reason can name it.
OTHERS = {
    rb"GIF8": "GIF",
    rb"....ftypavi[fs]": "AVIF",
    rb"....ftyp(hei|hev|mif|msf)": "HEIF",
    rb"\xff\x0a|....JXL ": "JPEG XL",
    rb"\x00\x00\x01\x00": "ICO",
    rb"8BPS": "PSD",
    rb"%PDF": "PDF",
    rb"\s*(<\?xml[^>]*>\s*)?<svg": "SVG",
    rb"\s*<(!doctype html|html|head|body)": "HTML",
}


class Refused(Exception):
    """Why one image cannot be used, in one line."""


def line(text: object) -> str:
    """One line, of at most 200 characters, of an exception or a message."""
    if isinstance(text, BaseException):
        name, message = type(text).__name__, str(text)
        plain = isinstance(text, (OSError, SyntaxError, Refused)) and message  # PIL's messages need no name
        text = message if plain else f"{name}: {message}" if message else name
    return " ".join(str(text).split())[:200]


def open_picture(data: bytes) -> Image.Image:
    """The picture in `data`, with its header read and no more; Refused where it is none of FORMATS.

    PIL's plugins are called directly, because Image.open applies a limit of pixels that is PIL's, process-wide.
    """
    if not data:
        raise Refused("the file is empty")
    Image.init()
    for name in FORMATS:
        plugin, accepts = Image.OPEN.get(name, (None, None))
        if plugin is not None and accepts is not None and accepts(data[:16]) is True:
            try:
                return plugin(io.BytesIO(data), "")
            except Exception as error:  # its parsers raise all kinds: SyntaxError, struct.error, KeyError, ...
                raise Refused(f"{name}: {line(error)}") from error
    for pattern, name in OTHERS.items():
        if re.match(pattern, data[:256], re.DOTALL | re.IGNORECASE):
            raise Refused(f"{name} is not supported")
    raise Refused(f"not an image: begins with {data[:16]!r}")


def alone(picture: Image.Image) -> AbstractContextManager[object]:
    """Inside, no other thread decodes a picture as large: a bomb takes its memory once, not once for every thread."""
    return _large if picture.width * picture.height > _LARGE else nullcontext()


def open_thumb(data: bytes) -> Image.Image:
    """The picture in `data`, of a store, with its header read and no more; Refused where it is too large for one."""
    picture = open_picture(data)
    if picture.width * picture.height > THUMB:
        raise Refused(f"{picture.width} x {picture.height} pixels: no model input is so large")
    return picture


def rgb(picture: Image.Image) -> Image.Image:
    """The picture's pixels as 8-bit RGB. They are decoded here, where that has not happened yet."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        # PIL's own conversion cuts values off at 255. (Of 16-bit colour PIL keeps the upper 8 bits by itself.)
        values = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        picture = Image.fromarray(_eight_bits(np.nan_to_num(np.asarray(picture)).clip(0, 1)))
    elif picture.mode == "I":
        raise Refused("32-bit integer pixels are not supported")
    picture.load()
    picture.info.pop("transparency", None)  # converting a palette with alpha makes PIL warn
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def as_picture(item: object) -> Image.Image:
    """A PIL picture of a PIL picture, an array [H, W] or [H, W, C], or a tensor [C, H, W]; uint8, or 0..1."""
    if isinstance(item, Image.Image):
        return item.copy()  # it may be shared, and decoding it is not safe from two threads
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu().float() if item.is_floating_point() else item.detach().cpu()
        item = (item.permute(1, 2, 0) if item.ndim == 3 else item).numpy()
    if not isinstance(item, np.ndarray):
        raise Refused(f"{type(item).__name__} is not a picture: expected PIL, an array or a tensor")
    if item.size == 0 or not (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (1, 3, 4))):
        raise Refused(f"a picture of shape {item.shape}: expected array [H, W, 3] or tensor [3, H, W]")
    if np.issubdtype(item.dtype, np.floating):
        if not (item.min() >= 0 and item.max() <= 1):  # NaN fails both
            raise Refused("a floating-point picture with values outside 0..1")
        item = _eight_bits(item)
    elif item.dtype != np.uint8:
        raise Refused(f"a picture of {item.dtype}: expected uint8, or floating point from 0 to 1")
    if item.ndim == 3 and item.shape[2] == 1:
        item = item[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(item))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """0..1 -> 0..255, rounded."""
    return (values * 255 + 0.5).astype(np.uint8)
