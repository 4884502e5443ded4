"""What the second pass keeps of the winners of one list: where they lie, their crops and their projections.

The arrays lie in the store beside the list itself, `<tap>/<score>/<end>/`, and have its ranks, of which the first
`Layout.shown` are filled in. With arrays.py all that imports zarr.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import zarr
from numpy.typing import NDArray

from maxact.config import Method, Seed
from maxact.errors import MaxactError
from maxact.sound import check_array, expect, is_count

Cut = Literal["field", "focus"]
_CHUNK = 4 << 20  # bytes that a chunk may have
_MOST = 64  # channels that one may have
_SIDE = 1 << 14  # pixels of a crop's side, or units of a map's, at most
_NAMES = ("box", "focus_box", "crop_box", "source_box", "crop", "map", "projection", "projection_scale")


@dataclass(frozen=True)
class Layout:
    """What the arrays of one list hold, kept as the attribute `winners` of its group.

    `frame` is the height and width of a crop in pixels, `cut` what it shows (the field, or a square around the focus
    box), `scale` how many pixels of it stand for one of the model input (None where every crop has its own), `map`
    the size of the activation maps, where they are kept; `seed` where the signal of a projection starts.
    """

    channels: int
    ranks: int
    shown: int
    frame: tuple[int, int]
    cut: Cut
    scale: float | None
    map: tuple[int, int] | None
    methods: tuple[Method, ...]
    seed: Seed

    @property
    def chunk(self) -> int:
        """Channels in a chunk of every array: a block of the second pass."""
        return max(1, min(_MOST, self.channels, _CHUNK // (self.shown * self.frame[0] * self.frame[1] * 3)))

    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any, tuple[str, ...], float]]:
        """Name -> what follows channel and rank in its shape, type, names of those dimensions, fill value."""
        pixels = ((*self.frame, 3), np.uint8, ("y", "x", "colour"))
        found: dict[str, tuple[tuple[int, ...], Any, tuple[str, ...], float]] = {
            "box": ((4,), np.int32, ("edge",), -1),
            "focus_box": ((4,), np.int32, ("edge",), -1),
            "crop_box": ((4,), np.int32, ("edge",), -1),
            "source_box": ((4,), np.float32, ("edge",), np.nan),
            "crop": (*pixels, 0),
        }
        if self.map:
            found["map"] = (self.map, np.float16, ("row", "column"), np.nan)
        for method in self.methods:
            found[f"projection/{method}"] = (*pixels, 128)
            found[f"projection_scale/{method}"] = ((), np.float32, (), np.nan)
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """What `to_json` gave, also after a round through JSON. Raises one of several errors for what is no layout."""
        tuples = {name: tuple(values[name]) if values[name] is not None else None for name in _TUPLES}
        layout = cls(**({**values} | tuples))
        sides = (*layout.frame, *(layout.map or (1, 1)))
        numbers = (layout.channels, layout.ranks, layout.shown, *sides)
        expect(all(map(is_count, numbers)) and min(numbers) > 0 and len(sides) == 4, "layout: numbers")
        expect(layout.shown <= layout.ranks and max(sides) <= _SIDE, "layout: sizes")
        scale = layout.scale is None or (isinstance(layout.scale, int | float) and 0 < layout.scale <= 1)
        known = (
            layout.cut in get_args(Cut)
            and layout.seed in get_args(Seed)
            and set(layout.methods) <= set(get_args(Method))
        )
        expect(scale and known, "layout: words")
        return layout


_TUPLES = ("frame", "map", "methods")


class Winners:
    """The arrays of one list, for reading and for writing by blocks.

    `read` gives, for a range of channels and the ranks that are shown: `box`, `focus_box`, `crop_box` (int32
    [C, R, 4]: y0, x0, y1, x1 in the model input), `source_box` (float32, in the original image's pixels), `crop`
    (uint8 [C, R, h, w, 3]), `map` (float16 [C, R, H, W]), `projection/METHOD` (uint8, 128 is zero) and
    `projection_scale/METHOD` (float32 [C, R]). What was not projected has boxes of -1.
    """

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self.layout = Layout.from_json(group.attrs["winners"])  # type: ignore[arg-type]

    @classmethod
    def create(cls, group: zarr.Group, layout: Layout) -> Winners:
        """Starts the arrays in the list's group, all fill values. Those of the same layout stay as they are."""
        if group.attrs.get("winners") != _plain(layout):
            for name, (rest, kind, dimensions, fill) in layout.arrays().items():
                group.create_array(
                    name,
                    shape=(layout.channels, layout.ranks, *rest),
                    chunks=(layout.chunk, layout.shown, *rest),
                    dtype=kind,
                    dimension_names=("channel", "rank", *dimensions),
                    fill_value=fill,
                    overwrite=True,
                )
            group.attrs["winners"] = _plain(layout)  # last: with it the arrays count as made
        return cls(group)

    @staticmethod
    def remove(group: zarr.Group) -> None:
        """Deletes the arrays from the list's group, if they are there."""
        if "winners" in group.attrs:
            del group.attrs["winners"]  # first: without it they do not count
        for name in _NAMES:  # whatever the attribute says: a removal may have been cut short
            if name in group:
                del group[name]

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """One array's channels from `start` to `stop`, the ranks that are shown. Raises MaxactError for a name that
        is not there, or where it is damaged."""
        arrays = self.layout.arrays()
        if name not in arrays:
            raise MaxactError(f"{self._group.path}: has no {name}; it has {', '.join(arrays)}")
        rest, kind, *_ = arrays[name]
        try:
            check_array(self._group[name], kind, (self.layout.channels, self.layout.ranks, *rest), start, stop)
            values: NDArray[Any] = self._group[name][start:stop, : self.layout.shown]  # type: ignore[index,assignment]
            return values
        except (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError) as error:
            raise MaxactError(f"{self._group.path}/{name}: is missing or damaged; project again") from error

    def projected(self) -> NDArray[np.bool_]:
        """[C]: which channels have been projected."""
        found: NDArray[np.bool_] = np.any(self.read("box", 0, self.layout.channels) >= 0, axis=(1, 2))
        return found

    def write(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes one block: for each array the values of a chunk's channels [chunk, shown, ...] from `start` on."""
        for name, values in arrays.items():
            self._group[name][start : start + len(values), : values.shape[1]] = values  # type: ignore[index]


def _plain(layout: Layout) -> dict[str, Any]:
    """As it comes back from JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in layout.to_json().items()}
