"""The strongest peaks of every channel: `Top` gathers them from batches, `Ranked` is what it gives and merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maxact_kernels import heaps

End = Literal["top", "bottom"]
ENDS: tuple[End, ...] = ("top", "bottom")
List = tuple[str, End]  # score ("max" or "mean"), end


@dataclass(frozen=True)
class Ranked:
    """k peaks of each of C channels in rank order, the best first.

    `score` float32 [C, k], `image` int64 [C, k] and `position` int32 [C, k] (row-major number in the map). Empty
    places come last and have score -inf, image -1 and position -1. At the end `bottom` scores are negated here, so
    that the best is the highest at either end; `values` undoes it.
    """

    score: NDArray[np.float32]
    image: NDArray[np.int64]
    position: NDArray[np.int32]

    @classmethod
    def empty(cls, channels: int, k: int) -> Ranked:
        """No peaks at all."""
        return cls(
            np.full((channels, k), -np.inf, np.float32),
            np.full((channels, k), -1, np.int64),
            np.full((channels, k), -1, np.int32),
        )

    def merge(self, other: Ranked) -> Ranked:
        """The k best of both, which must not have an image in common. Commutative and associative, bit for bit."""
        merged = Ranked.empty(*self.score.shape)
        heaps.merge_rows(
            *(self.score, self.image, self.position),
            *(other.score, other.image, other.position),
            *(merged.score, merged.image, merged.position),
        )
        return merged

    def without(self, start: int, stop: int) -> Ranked:
        """The same without the images `start` to `stop`, the others moved up."""
        out = (self.image >= start) & (self.image < stop)
        order = np.argsort(out, axis=1, kind="stable")  # the kept ones first, in their order
        gone = np.take_along_axis(out, order, 1)
        return Ranked(
            np.where(gone, np.float32(-np.inf), np.take_along_axis(self.score, order, 1)),
            np.where(gone, -1, np.take_along_axis(self.image, order, 1)),
            np.where(gone, np.int32(-1), np.take_along_axis(self.position, order, 1)),
        )

    def values(self, end: End) -> NDArray[np.float32]:
        """The scores as the network gave them, float32 [C, k], NaN where empty."""
        sign = np.float32(1 if end == "top" else -1)
        return np.where(self.image >= 0, sign * self.score, np.float32(np.nan))


class Top:
    """Streaming top-k over batches: the k highest (`top`) or lowest (`bottom`) scores of each of C channels.

    The order is score, then image number ascending: total, so that what is kept does not depend on the order of
    the batches. An image counts once per channel; the caller offers each image once.
    """

    def __init__(self, channels: int, k: int, end: End = "top") -> None:
        self._heap = Ranked.empty(channels, k)
        self._size = np.zeros(channels, np.int64)
        self._worst = np.full(channels, -np.inf, np.float32)
        self._sign = np.float32(1 if end == "top" else -1)

    def add(self, scores: NDArray[np.float32], positions: NDArray[np.int32], numbers: NDArray[np.int64]) -> None:
        """Offers a batch: `scores` and `positions` [N, C], image `numbers` [N], negative where a row is masked.

        A NaN never enters.
        """
        heap = self._heap
        heaps.add(
            *(heap.score, heap.image, heap.position, self._size, self._worst),
            *(scores, positions, numbers, self._sign),
        )

    def state(self) -> Ranked:
        """What was kept, in rank order; this Top goes on unchanged."""
        heap = self._heap
        ranked = Ranked(heap.score.copy(), heap.image.copy(), heap.position.copy())
        heaps.sort_rows(ranked.score, ranked.image, ranked.position, self._size)
        return ranked
