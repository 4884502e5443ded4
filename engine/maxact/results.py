"""What one tap gave, whether it is read from a store's arrays or from the state of an unfinished run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maxact.catalog import Catalog
from maxact.errors import MaxactError
from maxact.partial import Partial
from maxact.stats import Stats
from maxact.tap import Tap
from maxact.topk import ENDS, List


class Peaks(NamedTuple):
    """The peaks of C channels in rank order: image int64 [C, k], -1 where empty; score float32 [C, k], NaN where
    empty; position int32 [C, k, 2], row and column in the tap's map, or None for mean scores."""

    image: NDArray[np.int64]
    score: NDArray[np.float32]
    position: NDArray[np.int32] | None

    def first(self, k: int) -> Peaks:
        """The first k ranks."""
        position = None if self.position is None else self.position[:, :k]
        return Peaks(self.image[:, :k], self.score[:, :k], position)


@dataclass(frozen=True, repr=False)
class TapResults:
    """What one tap gave: `lists` of peaks by score and end, the statistics of its channels, and how many of its maps
    held NaN or infinity (`unfit`).

    `stats` has count, mean, std, min, max and active, each [C].
    """

    catalog: Catalog
    tap: Tap
    lists: dict[List, Peaks]
    stats: dict[str, NDArray[Any]]
    unfit: int

    def __repr__(self) -> str:
        lists = ", ".join(map("/".join, self.lists))
        return f"<maxact.TapResults {self.tap.name!r}: {self.tap.kind}, {self.tap.channels} channels, {lists}>"

    @property
    def dead(self) -> NDArray[np.bool_]:
        """[C]: channels that are never above zero."""
        return ~(self.stats["max"] > 0)

    def check(self) -> None:
        """Raises ValueError where a peak is on no image of the catalog or at no place of the map."""
        for (score, _), (image, _, position) in self.lists.items():
            if image.min(initial=-1) < -1 or image.max(initial=-1) >= len(self.catalog):
                raise ValueError(f"{score}: an image that the catalog does not have")
            if position is not None and not ((position[image >= 0] >= 0) & (position[image >= 0] < self.tap.map)).all():
                raise ValueError(f"{score}: a position outside of the map")

    def first(self, ranks: dict[str, int]) -> TapResults:
        """The same with as many ranks as `ranks` says for each end."""
        return replace(self, lists={key: peaks.first(ranks[key[1]]) for key, peaks in self.lists.items()})

    def top(self, channel: int, score: str = "max", end: str = "top") -> pa.Table:
        """One channel's list as a table: rank, image, key, label, score and, for maxima, row and column.

        Raises MaxactError for a list or a channel that is not there.
        """
        if (score, end) not in self.lists:
            raise MaxactError(f"{self.tap.name}: has no {score}/{end}; it has {', '.join(map('/'.join, self.lists))}")
        if not 0 <= channel < self.tap.channels:
            raise MaxactError(f"{self.tap.name}: expected a channel from 0 to {self.tap.channels - 1}, got {channel}")
        image, value, position = self.lists[score, end]  # type: ignore[index]
        filled = image[channel] >= 0
        numbers = image[channel][filled]
        named = self.catalog.table.take(pa.array(numbers))
        table = {
            "rank": pa.array(np.arange(len(numbers))),
            "image": pa.array(numbers),
            "key": named["key"],
            "label": named["label"],
            "score": pa.array(value[channel][filled]),
        }
        if position is not None:
            table["row"], table["column"] = (pa.array(position[channel][filled][:, axis]) for axis in (0, 1))
        return pa.table(table)


def of_partial(catalog: Catalog, tap: Tap, partial: Partial, total: Stats, start: int, stop: int) -> TapResults:
    """A tap's part, the columns `start` to `stop`, of what shards gave; `total` is the partial's. All ranks kept."""
    lists: dict[List, Peaks] = {}
    for score, end in sorted(partial.tops, key=lambda key: (key[0], ENDS.index(key[1]))):
        top = partial.tops[score, end]
        position = _unravel(top.position[start:stop], tap.map) if score == "max" else None
        lists[score, end] = Peaks(top.image[start:stop], top.values(end)[start:stop], position)
    stats = total.columns(start, stop)
    return TapResults(catalog, tap, lists, stats.describe(tap.positions), int(stats.unfit.sum()))


def _unravel(position: NDArray[np.int32], shape: tuple[int, int]) -> NDArray[np.int32]:
    """Row-major numbers [C, k] as rows and columns [C, k, 2], -1 where empty."""
    rows, cols = np.divmod(position, np.int32(shape[1]))
    return np.where(position[..., None] >= 0, np.stack([rows, cols], -1), np.int32(-1))
