"""The scan's own loop as something that can be timed, and what timing anything takes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from maxact.catalog import Catalog, Shard
from maxact.config import cores
from maxact.numerics import kept_memory, numerics
from maxact.partial import BadImage
from maxact.process import Tick
from maxact.scan import Job, scan
from maxact_kernels.peaks import Peaks

_FILLED = 3  # batches of a scan until what was decoded while it stood still is used up
_UNIT = 2  # batches in the shards of a scan that is measured: it can stand still only at a shard's end
BLOCKS, BLOCK = 64, 1024  # of a large catalog so many stretches of so many images are enough


@dataclass(frozen=True)
class Cost:
    """Seconds per image, on the clock and of CPU time."""

    wall: float
    cpu: float


Measure = Callable[[int], Cost]


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def per(self, images: int) -> Cost:
        """The cost of each of so many images since then."""
        return Cost((time.perf_counter() - self._wall) / images, (time.process_time() - self._cpu) / images)


def settle(seconds: float = 10.0) -> None:
    """Waits until what works in the background has nothing more to do, or so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.005:
            return


@contextmanager
def as_in_a_scan(job: Job) -> Iterator[None]:
    """Numbers, threads and memory as a scan has them; around all stages, for they are the process's."""
    with numerics(job.run.threads or cores()), kept_memory():
        yield


def repeated(catalog: Catalog, batch: int) -> Catalog:
    """The images again and again up to whole shards of those that `Loop` runs; of very many only a part."""
    numbers = np.arange(len(catalog))
    if len(catalog) > BLOCKS * BLOCK:
        starts = np.linspace(0, len(catalog) - BLOCK, BLOCKS, dtype=np.int64)
        numbers = (starts[:, None] + np.arange(BLOCK)).ravel()
    unit = _UNIT * batch
    return catalog.take(np.resize(numbers, math.ceil(len(numbers) / unit) * unit))


def batches_in(seconds: float, cost: Cost, batch: int, least: int = 2) -> int:
    """How many batches a stage takes in so many seconds."""
    return max(least, math.ceil(seconds / max(cost.wall * batch, 1e-9)))


class Loop:
    """The scan's own loop with all that belongs to it, a stretch at a time.

    Between two stretches it stands still, and holds what it has made: threads, a decoder, a compiled network with its
    hooks. What it finds is counted in heaps of shards of the settings' size, and dropped. A stretch does not count
    what a scan has once: its beginning and its end.
    """

    def __init__(self, job: Job) -> None:
        """`job`: its catalog as `repeated` makes it. Raises what a scan raises; so do stretches."""
        self._job = job
        self.waited = 0.0  # share of the last stretch in which the loop waited for images
        self._counting = _Counting(job)
        self._wanted = self._seen = 0
        self._cost: Cost | None = None
        self._given = scan([job], self._shards(), threading.Event(), self._tick, lambda shard: [self._counting])

    def __call__(self, batches: int) -> Cost:
        """Scans on, and gives the cost of an image in so many batches of that."""
        self._wanted, self._seen, self._cost = batches, 0, None
        while self._cost is None:
            next(self._given)
        settle()
        return self._cost

    def close(self) -> None:
        """Ends the scan."""
        self._given.close()  # type: ignore[attr-defined]  # a generator, though it says less

    def _shards(self) -> Iterator[Shard]:
        # each with a number of its own, since the loader counts what it cannot read in each
        shards = cycle(self._job.catalog.shards(_UNIT * _batch(self._job)))
        return (replace(shard, index=index) for index, shard in enumerate(shards))

    def _tick(self, tick: Tick) -> None:
        self._seen += 1
        if self._seen == _FILLED:
            self._watch, self._waits = Stopwatch(), 0.0
        elif self._seen > _FILLED and self._cost is None:
            self._waits += tick.waited
            if self._seen == _FILLED + self._wanted:
                images = self._wanted * _batch(self._job)
                self._cost = self._watch.per(images)
                self.waited = self._waits / (self._cost.wall * images)


class _Counting:
    """Counts what comes in shards of the settings' size, in whatever pieces it comes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._left = 0  # images of the shard in hand
        self._begin()

    def _begin(self) -> None:
        self._left = self._job.settings.shard or 1
        self._tally = self._job.tally(Shard(0, 0, self._left))

    def add(self, peaks: Peaks, numbers: NDArray[np.int64], /) -> None:
        self._tally.add(peaks, numbers)
        self._left -= len(numbers)
        if self._left <= 0:
            self._tally.close()
            self._begin()

    def close(self, bad: Sequence[BadImage], grey: int, /) -> None:
        """A piece is through, which means nothing."""


def _batch(job: Job) -> int:
    assert job.settings.batch
    return job.settings.batch
