"""Running statistics of every channel over all images and positions."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from maxact_kernels import moments
from maxact_kernels.peaks import Peaks

STATISTICS = ("active", "count", "max", "mean", "min", "std")  # what `describe` gives


@dataclass(frozen=True)
class Stats:
    """Sums of C channels; every array is [C].

    `images` counts the maps that entered, `unfit` those that held NaN or infinity and did not. `total` and `square`
    are float64 sums of the maps' means and mean squares, `active` counts positions above zero. Sums of floats depend
    on their order, so a `Stats` is only ever merged along one fixed tree (see `partial`).
    """

    images: NDArray[np.int64]
    unfit: NDArray[np.int64]
    total: NDArray[np.float64]
    square: NDArray[np.float64]
    min: NDArray[np.float32]
    max: NDArray[np.float32]
    active: NDArray[np.int64]

    @classmethod
    def empty(cls, channels: int) -> Stats:
        """The statistics of no image."""
        return cls(
            np.zeros(channels, np.int64),
            np.zeros(channels, np.int64),
            np.zeros(channels, np.float64),
            np.zeros(channels, np.float64),
            np.full(channels, np.inf, np.float32),
            np.full(channels, -np.inf, np.float32),
            np.zeros(channels, np.int64),
        )

    def add(self, peaks: Peaks, numbers: NDArray[np.int64]) -> None:
        """Adds a batch in place: peaks [N, C], image numbers [N], negative where a row is masked."""
        sums = (self.images, self.unfit, self.total, self.square, self.min, self.max, self.active)
        moments.add(*sums, peaks.max, peaks.min, peaks.mean, peaks.square, peaks.active, numbers)

    def merge(self, other: Stats) -> Stats:
        """The statistics of both, self before other."""
        return Stats(
            self.images + other.images,
            self.unfit + other.unfit,
            self.total + other.total,
            self.square + other.square,
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
            self.active + other.active,
        )

    def columns(self, start: int, stop: int) -> Stats:
        """Views of the channels `start` to `stop`."""
        return Stats(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def describe(self, positions: int) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
        """count, mean, std, min, max and active (share above zero) over images and positions, each [C].

        `positions` is the number of positions of one map. The deviation is that of a whole population, and NaN like
        the others where no map entered.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.total / self.images
            # the subtraction can come out a rounding error below zero for a constant channel
            variance = np.maximum(self.square / self.images - mean**2, 0)
            active = self.active / (self.images * positions)
        seen = self.images > 0
        return {
            "count": self.images * positions,
            "mean": mean.astype(np.float32),
            "std": np.sqrt(variance).astype(np.float32),
            "min": np.where(seen, self.min, np.float32(np.nan)),
            "max": np.where(seen, self.max, np.float32(np.nan)),
            "active": active.astype(np.float32),
        }
