"""What happens to a picture before the network sees it: sizes, interpolation, normalisation.

The arithmetic is torchvision's (`Resize` of the short side, then `CenterCrop`), so that a network meets the
pixels that its weights were evaluated with. Nothing here touches pixels: decode.py does, by these numbers.
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from maxact.errors import UsageError

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Fit = Literal["crop", "squash", "pad"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST = 8192  # pixels of a model input's side, or of a resized picture's short one


class Placement(NamedTuple):
    """Where the model input lies in one picture: resize to `size`, then cut from `start`. Pixels, (y, x)."""

    size: tuple[int, int]
    """Height and width of the resized picture."""
    start: tuple[int, int]
    """Row and column of the resized picture where the model input begins; negative where that is padding."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the model input, in pixels. Raises UsageError for values that cannot be meant."""

    resize: int = 256
    """Short side after resizing (fit "crop"; "squash" and "pad" ignore it)."""
    crop: tuple[int, int] = (224, 224)
    """Height and width of the model input."""
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of pixels scaled to 0..1, red, green, blue."""
    std: tuple[float, float, float] = IMAGENET_STD
    fit: Fit = "crop"
    """crop: short side to `resize`, centre cut out. squash: both sides to `crop`, whatever the aspect ratio.
    pad: the whole picture inside `crop`, centred, the rest filled."""
    function: str | None = None
    """package.module:callable, picture -> float tensor [3, H, W]; replaces all of the above."""

    def __post_init__(self) -> None:
        # Lists become tuples and integers floats: settings from a file equal those from the command line.
        for name, kind in (("crop", int), ("mean", float), ("std", float)):
            value = getattr(self, name)
            numbers = isinstance(value, (list, tuple)) and all(_is_number(v) for v in value)
            if numbers and (kind is float or all(isinstance(v, int) for v in value)):
                object.__setattr__(self, name, tuple(kind(v) for v in value))
        _expect(_is_size(self.resize), "resize", f"1 to {LARGEST:,} pixels", self.resize)
        good = isinstance(self.crop, tuple) and len(self.crop) == 2 and all(_is_size(side) for side in self.crop)
        _expect(good, "crop", f"height and width, 1 to {LARGEST:,} pixels", self.crop)
        choices = get_args(Interpolation)
        _expect(self.interpolation in choices, "interpolation", " or ".join(choices), self.interpolation)
        _expect(self.fit in get_args(Fit), "fit", " or ".join(get_args(Fit)), self.fit)
        good = _is_triple(self.mean) and all(0 <= value <= 1 for value in self.mean)
        _expect(good, "mean", "three numbers from 0 to 1 (of pixels scaled to 0..1)", self.mean)
        good = _is_triple(self.std) and all(value > 0 for value in self.std)
        _expect(good, "std", "three numbers above 0 (of pixels scaled to 0..1)", self.std)
        good = self.function is None or (
            isinstance(self.function, str) and re.fullmatch(r"[^:]+:[^:]+", self.function) is not None
        )
        _expect(good, "preprocess", "package.module:callable", self.function)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour of padding, 0..255: the mean, which the network sees as about zero."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    @property
    def shape(self) -> tuple[int, int, int]:
        """An image as the loader gives it: uint8 [H, W, 3], or float32 [3, H, W] from `function`."""
        height, width = self.crop
        return (3, height, width) if self.function else (height, width, 3)

    def without_normalisation(self) -> Preprocess:
        """The same but for the normalisation: networks for which this is equal see the same pixels."""
        mean = self.mean if self.fit == "pad" else IMAGENET_MEAN  # which padding is filled with
        return replace(self, mean=mean, std=IMAGENET_STD)

    def placement(self, height: int, width: int) -> Placement:
        """The resized size and the first row and column of the model input, for a picture of height x width.

        Once per picture in the loader, hence plain integers. The long side truncates, as torchvision's does
        (DALI's own `resize_shorter` rounds).
        """
        crop_height, crop_width = self.crop
        if self.fit == "squash":
            return Placement(self.crop, (0, 0))
        if self.fit == "crop":
            if width <= height:
                size = (self.resize * height // width, self.resize)
            else:
                size = (self.resize, self.resize * width // height)
        elif crop_height * width <= crop_width * height:  # pad, the height binds
            size = (crop_height, max(1, round(width * crop_height / height)))
        else:
            size = (max(1, round(height * crop_width / width)), crop_width)
        return Placement(size, (_centre(size[0], crop_height), _centre(size[1], crop_width)))

    def load_function(self) -> Callable[[Any], Any]:
        """Import `function` (picture -> float tensor [3, H, W]). Raises UsageError where that fails."""
        if self.function is None:
            raise UsageError("preprocess: expected package.module:callable, got None")
        found: Callable[[Any], Any] = import_callable(self.function)
        return found

    def to_json(self) -> dict[str, Any]:
        """A plain dict of what json can hold; `from_json` gives an equal object."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_json`. Raises UsageError for unknown names."""
        known = {field.name for field in fields(cls)}
        _expect(set(values) <= known, "preprocess", "only " + ", ".join(sorted(known)), sorted(values))
        return cls(**values)


def import_callable(name: str) -> Any:
    """The object that `package.module:callable` names, which can be called.

    The current directory is searched last: a file of the user's own is found, and shadows nothing installed.
    Raises UsageError, in one line, where it cannot be imported.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UsageError(f"expected package.module:callable, got {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # an import runs the user's code, which can raise anything
        raise UsageError(f"{name}: cannot import {module_name} ({one_line(error)})") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{name}: {module_name} has no {path}{near(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{name}: expected something that can be called, got {type(found).__name__}")
    return found


def near(name: str, known: list[str]) -> str:
    """Near misses as the tail of a message, or nothing."""
    found = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    return f" (near: {', '.join(found)})" if found else ""


def one_line(error: BaseException) -> str:
    """An error as one short line: its type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _centre(size: int, crop: int) -> int:
    """torchvision's centre crop along one axis; negative where the picture is the smaller one."""
    spare = size - crop
    if spare < 0:
        return -(-spare // 2)
    half = spare // 2
    return half + (spare & half & 1)  # int(round(spare / 2.0)): a half goes to the even neighbour


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _is_triple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_number(v) and math.isfinite(v) for v in value)


def _expect(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise UsageError(f"{name}: expected {expected}, got {got!r}")
