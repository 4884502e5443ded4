"""The first pass of one network or several over one decoding: the work, what it gives, and the stores as one book.

A shard is done when every store has it; what a store has already is left out when the others still lack it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig
from maxact.errors import MaxactError
from maxact.fetch import look
from maxact.partial import BadImage, Partial
from maxact.process import Tick
from maxact.scan import Counting, Job, scan
from maxact.store import Store

HAND_OVER = 3.0  # seconds for which a worker merges its shards


@dataclass(frozen=True)
class Parts:
    """What some shards gave each network, None where that is nothing yet."""

    each: tuple[Partial | None, ...]

    @cached_property
    def shards(self) -> frozenset[int]:
        """The shards that every network has."""
        return frozenset.intersection(*(part.shards if part else frozenset() for part in self.each))

    @cached_property
    def touched(self) -> frozenset[int]:
        """The shards that any network has."""
        return frozenset(shard for part in self.each if part for shard in part.shards)

    @cached_property
    def bad(self) -> tuple[BadImage, ...]:
        """The images that are bad for any of them, by number: decodings may differ."""
        found = {bad.image: bad for part in self.each if part for bad in part.bad}
        return tuple(found[image] for image in sorted(found))

    @cached_property
    def grey(self) -> dict[int, int]:
        """How many images each shard left out for having no colour."""
        return {shard: count for part in self.each if part for shard, count in part.grey.items()}

    @cached_property
    def held(self) -> frozenset[int]:
        """The shards that can be taken out, because an image was bad for one of them."""
        return frozenset(shard for part in self.each if part for shard in part.held)

    def merge(self, other: Parts) -> Parts:
        """The result of both; where a network has the shards of `other` already, what it has stays."""
        return Parts(tuple(_merge(mine, theirs) for mine, theirs in zip(self.each, other.each, strict=True)))

    def without(self, shard: Shard) -> Parts:
        """The result less a shard, where it can be taken out, for scanning it again."""
        return Parts(
            tuple(part.without(shard) if part and shard.index in part.held else part for part in self.each),
        )


def _merge(mine: Partial | None, theirs: Partial | None) -> Partial | None:
    if mine is None or theirs is None:
        return mine or theirs
    return mine if theirs.shards <= mine.shards else mine.merge(theirs)


@dataclass(frozen=True)
class Scanning:
    """The first pass, as a worker does it: the jobs, of each the shards that its store has already, and those that
    are scanned again, with the images that were bad in them (`Stores.held`)."""

    jobs: tuple[Job, ...]
    done: tuple[frozenset[int], ...]
    again: tuple[Mapping[int, frozenset[int]], ...]
    patience: float = HAND_OVER

    def on(self, run: RunConfig) -> Scanning:
        """The same for one worker."""
        return replace(self, jobs=tuple(job.on(run) for job in self.jobs))

    def run(self, shards: Iterator[Shard], stop: threading.Event, report: Callable[[Tick], None]) -> Iterator[Parts]:
        """See `scan.scan`."""
        return map(Parts, scan(self.jobs, shards, stop, report, self._count))

    def _count(self, shard: Shard) -> list[Counting[Partial] | None]:
        index = shard.index
        return [
            None if index in done else job.tally(shard, again.get(index))
            for job, done, again in zip(self.jobs, self.done, self.again, strict=True)
        ]

    def merge(self, mine: Parts, theirs: Parts) -> Parts:
        """The result of both."""
        return mine.merge(theirs)

    def look(self) -> None:
        """Raises MaxactError where the images cannot be read from here, or a store that it writes to is not here."""
        look(self.jobs[0].catalog)
        for job in self.jobs:
            if job.store and not (job.store / "zarr.json").exists():
                need = "with --pooled the store must be on a file system that every worker sees"
                raise MaxactError(f"{job.store}: is not there; {need}")


class Stores:
    """Stores of one catalog with shards of one size."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = tuple(stores)

    @property
    def catalog(self) -> Catalog:
        """The catalog of them all."""
        return self._stores[0].catalog

    @property
    def shard(self) -> int:
        """Images in a shard."""
        return self._stores[0].shard

    @cached_property
    def begun(self) -> Parts:
        """What was committed when this was first asked."""
        return Parts(tuple(store.state() for store in self._stores))

    def held(self) -> tuple[dict[int, frozenset[int]], ...]:
        """Of each store the shards that can be scanned again, and the images in them that are bad for any network."""
        bad = [image.image for image in self.begun.bad]
        return tuple(
            {index: frozenset(image for image in bad if image // self.shard == index) for index in part.held}
            if part
            else {}
            for part in self.begun.each
        )

    def state(self) -> Parts:
        """What a run goes on with: see `begun`."""
        return self.begun

    def commit(self, parts: Parts) -> None:
        """Makes the parts survive anything, one after the other."""
        for store, part in zip(self._stores, parts.each, strict=True):
            if part is not None:
                store.commit(part)
