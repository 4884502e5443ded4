"""Peaks, fields and other arrays in the groups of a store, and its manifest. With winners.py all that imports zarr."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.errors
from numpy.typing import NDArray

from maxact.errors import MaxactError
from maxact.field import Field
from maxact.files import sync_file, sync_folder, writing
from maxact.manifest import Manifest
from maxact.results import Peaks
from maxact.sound import check_array, check_manifest
from maxact.topk import List

# what reading a broken store raises: nearly anything
DAMAGE = (
    *(OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, RuntimeError),
    zarr.errors.BaseZarrError,
)
_CHUNK = 2 << 20  # bytes that a chunk may have


def read_manifest(path: Path) -> Manifest:
    """How the store at `path` was made. Raises MaxactError where there is none."""
    try:
        values: Any = open_group(path).attrs["maxact"]
    except DAMAGE as error:
        raise MaxactError(f"{path}: not a maxact store (make one with `maxact scan`)") from error
    manifest = Manifest.from_json(values, path)
    try:
        check_manifest(manifest)
    except (ValueError, TypeError, OverflowError) as error:
        raise MaxactError(f"{path}: its attribute maxact is damaged ({error})") from error
    return manifest


def open_group(path: Path, place: str = "") -> Any:
    """A group of the store at `path`, for reading: the root, or without a look at that, the one at `place`."""
    # the consolidated metadata would make empty arrays of files that are gone
    # and an older format of Zarr may have pickles in it, which run code
    return zarr.open_group(path, path=place, mode="r", zarr_format=3, use_consolidated=False)


@contextmanager
def changing(path: Path, advice: str) -> Iterator[Any]:
    """The root group of the store at `path`, for writing; what the system refuses is a MaxactError with `advice`."""
    with writing(path, advice), warnings.catch_warnings():
        # Zarr 3 calls consolidated metadata an extension, and the Parquet files beside the arrays unknown
        warnings.simplefilter("ignore")
        yield zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)


def create_group(path: Path, manifest: Manifest) -> None:
    """Makes a folder a store: its group with its attributes."""
    zarr.create_group(path, attributes={"maxact": manifest.to_json()})
    sync_attributes(path)


def consolidate(path: Path) -> Any:
    """Gathers the metadata of all arrays in the root group, which is given."""
    return zarr.consolidate_metadata(path)


def read_peaks(place: Any, key: List, channels: int) -> Peaks:
    """One list of peaks. Raises one of DAMAGE where it is not there, or no such list of so many channels."""
    image = read_array(place, "image", np.int64, (channels, None))
    score = read_array(place, "score", np.float32, image.shape)
    position = read_array(place, "position", np.int32, (*image.shape, 2)) if key[0] == "max" else None
    return Peaks(image, score, position)


def read_array(group: Any, name: str, kind: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """One array of a group, looked at before it is read. Raises one of DAMAGE."""
    check_array(group[name], kind, shape)
    values: NDArray[Any] = group[name][:]
    return values


def write_peaks(node: zarr.Group, place: str, peaks: Peaks, dimension: str) -> None:
    """One list of peaks, whose ranks bear the name `dimension`."""
    write_array(node, f"{place}/image", peaks.image, ("channel", dimension), -1)
    write_array(node, f"{place}/score", peaks.score, ("channel", dimension), np.nan)
    if peaks.position is not None:
        write_array(node, f"{place}/position", peaks.position, ("channel", dimension, "axis"), -1)


def write_field(node: Any, field: Field) -> None:
    node.attrs.update(field.to_json())
    for name in ("rows", "cols", "local_rows", "local_cols"):
        write_array(node, f"field/{name}", getattr(field, name), ("unit_" + name[-4:], "edge"), -1)


def write_array(group: zarr.Group, name: str, values: NDArray[Any], dimensions: tuple[str, ...], fill: float) -> None:
    """One array, in chunks of whole channels of at most _CHUNK bytes."""
    row = values[:1].nbytes or 1
    chunk = max(1, min(len(values), _CHUNK // row))
    group.create_array(
        name,
        data=np.ascontiguousarray(values),
        chunks=(chunk, *values.shape[1:]),
        dimension_names=dimensions,
        fill_value=fill,
        overwrite=True,
    )


def sync_attributes(folder: Path) -> None:
    """Zarr does not see to it that what it writes survives a loss of power."""
    sync_file(folder / "zarr.json")
    sync_folder(folder)
