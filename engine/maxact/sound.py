"""Whether what a file of a store says can be: it may come from anywhere, so it is looked at before it is used.

Each function raises ValueError, or TypeError, with a reason for what cannot be; whoever reads the file says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxact.config import ScanConfig
from maxact.errors import UsageError
from maxact.manifest import Manifest
from maxact.preprocess import Preprocess

LARGEST = 4 << 30  # bytes of an array that is read at once
_COUNTED = ("images", "scanned", "bad", "grey")


def expect(good: bool, what: str) -> None:
    """Raises ValueError, which says what it is about."""
    if not good:
        raise ValueError(what)


def check_manifest(manifest: Manifest) -> None:
    """How a store was made: the kinds of its parts, and settings that can be."""
    for name in ("model", "preprocessing", "images", "settings", "versions"):
        expect(isinstance(getattr(manifest, name), dict), name)
    expect(all(isinstance(manifest.model.get(name), str) for name in ("name", "weights", "sha256")), "model")
    expect(is_count(manifest.images.get("count")) and "source" in manifest.images, "images")
    expect(all(isinstance(word, str) for pair in manifest.versions.items() for word in pair), "versions")
    names = [tap.name for tap in manifest.taps]
    expect(len(set(names)) == len(names) > 0, "taps")
    try:
        Preprocess.from_json(manifest.preprocessing)
        settings = ScanConfig.from_json(manifest.settings)
    except UsageError as error:
        raise ValueError(str(error)) from error
    for name in ("top", "bottom", "batch", "shard"):
        expect(is_count(manifest.settings.get(name)), name)
    expect(bool(settings.precision) and math.isfinite(settings.max_megapixels), "settings")
    expect(isinstance(manifest.finished, bool), "finished")
    summary, projected = manifest.summary, manifest.projected
    if manifest.finished:
        expect(isinstance(summary, dict) and all(is_count(summary.get(name)) for name in _COUNTED), "summary")
    if projected is not None:
        expect(isinstance(projected, dict) and is_words(projected.get("methods", [])), "projected")


def is_count(value: object) -> bool:
    """Whether it is a whole number, not below 0, that fits 64 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def is_words(value: object) -> bool:
    """Whether it is a list of text."""
    return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)


def check_array(
    array: Any, kind: Any, shape: Sequence[int | None], start: int | None = None, stop: int | None = None
) -> None:
    """An array of Zarr before it is read, its rows from `start` to `stop`: a kind, and a shape whose None may be any
    length."""
    found, chunks = array.shape, array.chunks
    rows = len(range(*slice(start, stop).indices(found[0]))) if found else 0
    expect(array.dtype == np.dtype(kind), f"{array.path} holds {array.dtype} instead of {np.dtype(kind)}")
    same = len(found) == len(shape) and all(b is None or a == b for a, b in zip(found, shape, strict=True))
    expect(same, f"{array.path} has the shape {found}")
    expect(rows * math.prod(found[1:]) * array.dtype.itemsize <= LARGEST, f"{array.path} is too large")
    # a chunk is unpacked whole, however little of it is wanted
    expect(all(b <= max(a, 1) for a, b in zip(found, chunks, strict=True)), f"{array.path} has chunks of {chunks}")


def check_columns(columns: Mapping[str, NDArray[Any]], kinds: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Arrays by name: just these names, each of its kind, and all of one shape."""
    expect(columns.keys() == kinds.keys(), f"columns {', '.join(sorted(columns))}")
    for name, kind in kinds.items():
        expect(columns[name].dtype == np.dtype(kind) and columns[name].shape == shape, f"column {name}")
