"""Settling the order of a 16-bit scan: its candidates' peaks again, in float32.

The scan's own loop runs over the images that are candidates; `Exact` is what a shard of them gives, in the place of
a Partial. Image numbers are those of the catalog of these images, which lie in it in the order of the whole one, so
that ties fall as they would there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from maxact.catalog import Shard
from maxact.errors import MaxactError
from maxact.partial import DAMAGED, BadImage
from maxact.results import Peaks
from maxact.sound import expect
from maxact.topk import List
from maxact_kernels.peaks import Peaks as Batch

# Deviations beyond these shares of a score (or of its channel's standard deviation) are not rounding's. Errors of
# 2 ** -11 and 2 ** -8 a layer add up over a deep network.
_EXPLAINED = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}
_DECODED = 0.1  # likewise, where a GPU's decoder made the scan's pixels: those of a CPU differ by some levels
_STEP = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}  # between neighbouring numbers, as a share


def explained(precision: str, on_gpu: bool) -> float:
    """Up to which deviation a score may differ from that of the scan; `on_gpu` says where its images were decoded."""
    return max(_EXPLAINED[precision], _DECODED if on_gpu else 0.0)


def considered(ranks: int) -> int:
    """How many of the first candidates of a channel are looked at to settle its first ranks."""
    return max(2 * ranks, ranks + 32)


@dataclass(frozen=True)
class Exact:
    """Exact peaks of the candidates that some shards hold: score float32 [C, m], NaN where an image is in another
    shard or has no peak; position int32 [C, m], -1 there, for lists of maxima."""

    shards: frozenset[int]
    score: dict[List, NDArray[np.float32]]
    position: dict[List, NDArray[np.int32]]
    bad: tuple[BadImage, ...] = ()
    grey: dict[int, int] = field(default_factory=dict)
    held: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    @property
    def touched(self) -> frozenset[int]:
        """The shards of which it holds anything."""
        return self.shards

    def merge(self, other: Exact) -> Exact:
        """The result of both. Raises ValueError where they have a shard in common."""
        if self.shards & other.shards:
            raise ValueError(f"expected different shards, got {min(self.shards & other.shards)} twice")
        return Exact(
            self.shards | other.shards,
            {key: np.where(np.isnan(score), other.score[key], score) for key, score in self.score.items()},
            {key: np.maximum(place, other.position[key]) for key, place in self.position.items()},
            tuple(sorted((*self.bad, *other.bad), key=lambda bad: bad.image)),
        )

    def without(self, shard: Shard) -> Exact:
        """Raises ValueError: settling scans no shard twice, so nothing is `held`."""
        raise ValueError(f"{shard} cannot be taken out")

    def save(self, path: Path, about: str) -> None:
        """Writes everything, and what it is about, to one file. Raises OSError where that cannot be done."""
        arrays: dict[str, NDArray[np.generic]] = {"shards": np.array(sorted(self.shards), np.int64)}
        arrays |= {f"score/{score}/{end}": values for (score, end), values in self.score.items()}
        arrays |= {f"position/{score}/{end}": values for (score, end), values in self.position.items()}
        notes = {"about": about, "bad": [asdict(bad) for bad in self.bad]}
        arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        try:
            safetensors.numpy.save_file(arrays, path)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path, about: str) -> Exact | None:
        """What `save` wrote about the same thing, or None. Raises MaxactError where the file is damaged."""
        if not path.exists():
            return None
        parts: dict[str, dict[List, NDArray[np.generic]]] = {"score": {}, "position": {}}
        try:
            arrays = safetensors.numpy.load_file(path)
            notes = json.loads(arrays.pop("notes").tobytes())
            shards = frozenset(arrays.pop("shards").tolist())
            for name, array in arrays.items():
                part, score, end = name.split("/")
                expect(array.dtype == (np.float32 if part == "score" else np.int32) and array.ndim == 2, name)
                parts[part][score, end] = array  # type: ignore[index]
            bad = tuple(BadImage.from_json(each) for each in notes["bad"])
        except DAMAGED as error:
            raise MaxactError(f"{path}: is damaged ({error}); delete it and project again") from error
        return cls(shards, parts["score"], parts["position"], bad) if notes["about"] == about else None  # type: ignore[arg-type]

    @staticmethod
    def about(path: Path) -> str | None:
        """What the file that `save` wrote is about; None where there is none, or a damaged one."""
        try:
            with safetensors.safe_open(path, "numpy") as file:
                about = json.loads(file.get_tensor("notes").tobytes())["about"]
                return about if isinstance(about, str) else None
        except DAMAGED:
            return None


class Candidates:
    """The candidates [C, m] of every list, side by side over taps, by the images that they are on; -1 where empty."""

    def __init__(self, images: Mapping[List, NDArray[np.int64]], count: int) -> None:
        """`count` is how many images there are."""
        self.shapes = {key: (image.shape[0], image.shape[1]) for key, image in images.items()}
        self._order, self._bounds = {}, {}
        for key, image in images.items():
            flat = image.ravel()
            self._order[key] = np.argsort(flat, kind="stable")
            self._bounds[key] = np.searchsorted(flat[self._order[key]], np.arange(count + 1))

    def on(self, key: List, image: int) -> NDArray[np.int64]:
        """Where the candidates on an image lie in the flat array of a list."""
        first, last = self._bounds[key][image], self._bounds[key][image + 1]
        return self._order[key][first:last]


class Picker:
    """Picks the candidates' peaks of one shard out of its batches, in the place of a Tally."""

    def __init__(self, shard: Shard, candidates: Candidates) -> None:
        self._shard, self._candidates = shard, candidates
        shapes = candidates.shapes
        self._score = {key: np.full(shape, np.nan, np.float32) for key, shape in shapes.items()}
        self._position = {key: np.full(shape, -1, np.int32) for key, shape in shapes.items() if key[0] == "max"}

    def add(self, peaks: Batch, numbers: NDArray[np.int64]) -> None:
        """Adds the next batch: peaks [N, C], image numbers [N], negative where a row is masked."""
        for row in np.flatnonzero(numbers >= 0):
            for key, scores in self._score.items():
                places = self._candidates.on(key, int(numbers[row]))
                channels = places // scores.shape[1]
                scores.ravel()[places] = getattr(peaks, key[0])[row, channels]
                if key in self._position:
                    self._position[key].ravel()[places] = peaks.position[row, channels]

    def close(self, bad: Sequence[BadImage] = (), grey: int = 0) -> Exact:
        """The shard's result."""
        return Exact(frozenset({self._shard.index}), self._score, self._position, tuple(bad))


@dataclass(frozen=True)
class Settled:
    """One list of a tap with its first ranks settled.

    `certain` [C] says that no image that was not looked at can belong there. `deviation` is the largest difference
    between an exact score and the stored one, as a share of the stored one or of the channel's standard deviation,
    whichever is larger.
    """

    peaks: Peaks
    certain: NDArray[np.bool_]
    deviation: float


def settle(
    stored: Peaks,
    candidates: Peaks,
    exact: NDArray[np.float32],
    position: NDArray[np.int32] | None,
    *,
    ranks: int,
    end: str,
    spread: NDArray[np.float32],
    precision: str,
) -> Settled:
    """Puts the first `ranks` of a list in the order of their exact scores; the later ones keep their order.

    stored: the list [C, k]; candidates: the first m of them, as the scan scored them; exact, position: [C, m] and
    [C, m, 2], what float32 gave, not finite where an image could not be had again: there the stored score stands in.
    A channel is certain where its last settled score exceeds what an image that is no candidate can have: the lowest
    candidate's stored score, by the largest deviation of the tap and a step of the precision; or where every image
    is a candidate. spread [C]: standard deviations.
    """
    sign = np.float32(1 if end == "top" else -1)
    known = np.isfinite(exact)
    score = np.where(known, exact, candidates.score)
    filled = candidates.image >= 0
    order = np.lexsort((candidates.image, np.where(filled, -sign * score, np.inf)), axis=1)[:, :ranks]
    first = _take(Peaks(candidates.image, score, _exact_position(candidates, position, known)), order)
    difference = np.where(known & filled, np.abs(exact - candidates.score), 0)
    largest = float(difference.max(initial=0))
    scale = np.maximum(np.abs(candidates.score), spread[:, None])
    relative = np.divide(difference, scale, out=np.zeros_like(difference), where=scale > 0)
    lowest = candidates.score[:, -1]  # NaN where there are fewer images than candidates
    margin = largest + np.abs(lowest) * _STEP[precision]
    last = first.score[:, -1]
    certain = ~filled[:, -1] | (sign * last > sign * lowest + margin)
    certain &= (known | ~filled).all(1)
    return Settled(_rest(first, stored), certain, float(np.nanmax(relative, initial=0)))


def _exact_position(
    candidates: Peaks, position: NDArray[np.int32] | None, known: NDArray[np.bool_]
) -> NDArray[np.int32] | None:
    if candidates.position is None or position is None:
        return None
    return np.where(known[..., None], position, candidates.position)


def _take(peaks: Peaks, order: NDArray[np.int64]) -> Peaks:
    position = peaks.position
    return Peaks(
        np.take_along_axis(peaks.image, order, 1),
        np.take_along_axis(peaks.score, order, 1),
        None if position is None else np.take_along_axis(position, order[..., None], 1),
    )


def _rest(first: Peaks, stored: Peaks) -> Peaks:
    """The list that begins with `first` and goes on with what else was stored, in its order, as long as before."""
    length = stored.image.shape[1]
    taken = (stored.image[:, :, None] == first.image[:, None, :]).any(2) & (stored.image >= 0)
    order = np.argsort(taken, axis=1, kind="stable")[:, : length - first.image.shape[1]]
    others = _take(stored, order)
    position = None
    if first.position is not None and others.position is not None:
        position = np.concatenate([first.position, others.position], 1)
    image, score = np.concatenate([first.image, others.image], 1), np.concatenate([first.score, others.score], 1)
    return Peaks(image, score, position)
