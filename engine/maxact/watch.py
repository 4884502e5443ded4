"""How far a run is: what its schedule has, and the batches of the shards that are in hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic

from maxact.catalog import Shard
from maxact.crew import Crew
from maxact.process import Progress, Tick
from maxact.schedule import P, Schedule


@dataclass
class _Open:
    """What has been through of a shard that is not finished."""

    images: int = 0
    bad: int = 0
    grey: int = 0


class Watch(Generic[P]):
    """Follows a schedule's run and reports it."""

    def __init__(self, schedule: Schedule[P], report: Callable[[Progress], None], stage: str = "scanning") -> None:
        self._schedule, self._report = schedule, report
        self._progress = Progress(schedule.images, schedule.images_done, stage=stage)
        self._open: dict[int, _Open] = {}
        self._begun = time.monotonic()
        self._waited = 0.0
        self.crew: Crew[Any, P] | None = None  # whose workers are shown
        self._count()

    def note(self, tick: Tick) -> None:
        """A batch is through."""
        if tick.begins:  # perhaps once more
            self._open[tick.shard] = _Open()
        now = self._open.setdefault(tick.shard, _Open())
        now.images += tick.images
        now.bad += len(tick.bad)
        now.grey += tick.grey
        hands = self.crew.hands if self.crew else ()
        self._waited += tick.waited / max(1, len(hands))
        self._schedule.note(tick)
        done, bad, grey = self._finished
        in_hand = self._open.values()
        self._progress = replace(
            self._progress,
            done=done - self._progress.before + sum(each.images for each in in_hand),
            bad=bad + sum(each.bad for each in in_hand),
            grey=grey + sum(each.grey for each in in_hand),
            waited=self._waited,
            seconds=time.monotonic() - self._begun,
            hands=hands,
        )
        self._report(self._progress)

    def attempt(self, run: Callable[[Iterator[Shard]], Iterator[P]], shards: Iterator[Shard]) -> Iterator[P]:
        """What `run` gives for some shards, followed."""
        self._open.clear()  # what an attempt before this one did not finish comes again
        self._count()
        for part in run(shards):
            yield part
            self._close(part.touched)

    def _close(self, shards: Iterable[int]) -> None:
        for shard in shards:
            self._open.pop(shard, None)
        self._count()

    def _count(self) -> None:
        """What the schedule has: images, bad and grey ones."""
        self._finished = self._schedule.images_done, self._schedule.bad, self._schedule.grey
