"""What every way of running has in common: which shards are left, what is merged, and when it is committed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Generic, Protocol, Self, TypeVar

from maxact.catalog import Catalog, Shard
from maxact.errors import MaxactError, OutOfMemory
from maxact.fetch import Unreadable
from maxact.numerics import give_back
from maxact.partial import BadImage
from maxact.process import Tick

COMMIT_SECONDS = 30.0  # between two commits, at least
PAUSES = (5.0, 30.0, 120.0)  # seconds to wait for storage that has gone, growing; then the run stops
_EXAMPLES = 3

log = logging.getLogger("maxact")


class Part(Protocol):
    """What some shards gave: a Partial of a scan, or the Exact peaks of a settling run."""

    @property
    def shards(self) -> frozenset[int]: ...
    @property
    def touched(self) -> frozenset[int]:
        """The shards of which it holds anything."""

    @property
    def bad(self) -> tuple[BadImage, ...]: ...
    @property
    def grey(self) -> Mapping[int, int]: ...
    @property
    def held(self) -> Collection[int]: ...
    def merge(self, other: Self) -> Self: ...
    def without(self, shard: Shard) -> Self: ...


P = TypeVar("P", bound=Part)


class Book(Protocol[P]):
    """Where what is done is kept: a Store, or what settling keeps beside it."""

    @property
    def catalog(self) -> Catalog: ...
    @property
    def shard(self) -> int:
        """Images in a shard."""

    def state(self) -> P | None:
        """What the last commit wrote."""

    def commit(self, part: P, /) -> None:
        """Makes `part` survive anything."""


class Patience:
    """Pauses for storage that has gone: they grow, and after the last one the run ends."""

    def __init__(self, stop: threading.Event, pauses: tuple[float, ...] | None = None) -> None:
        self._stop = stop
        self._pauses = PAUSES if pauses is None else pauses
        self.renew()

    def renew(self) -> None:
        """Something could be read: the next pause is the first again."""
        self._waits = iter(self._pauses)

    def wait(self, error: Unreadable, commit: Callable[[], object]) -> None:
        """Commits, then pauses. Raises `error` where there were enough pauses."""
        pause = next(self._waits, None)
        if pause is None:
            raise error
        log.warning("%s (trying again in %.0f s)", error, pause)
        commit()
        self._stop.wait(pause)


class Schedule(Generic[P]):
    """The shards of one book: what is done, what is left, and the merged result so far.

    `retry_errors` scans the shards of recorded errors again. Bad images are counted as they come, and more of them
    than `allowed_bad` end the run. Setting `stop` ends it after the batch in hand.
    """

    def __init__(self, book: Book[P], *, retry_errors: bool = False, allowed_bad: int = 10) -> None:
        self._book = book
        self._allowed_bad = allowed_bad
        self._size = book.shard
        self._shards = book.catalog.shards(self._size)
        self._result = book.state()
        self._uncommitted = False
        self._committed = time.monotonic()
        self._failure: MaxactError | None = None
        self.stop = threading.Event()
        # what these gave before stays in the result until they have been scanned again
        self._again = set(self._result.held) if retry_errors and self._result else set()
        self._bad: dict[int, BadImage] = {}
        if retry_errors and self._result:
            apart = {bad.image // self._size for bad in self._result.bad} - self._again
            if apart:
                log.warning("errors of %d more shards stay: only --overwrite scans those again", len(apart))
        if self._result:
            self._count_bad(bad for bad in self._result.bad if bad.image // self._size not in self._again)

    @property
    def left(self) -> list[Shard]:
        """The shards that are not done, in order."""
        done = (self._result.shards if self._result else frozenset()) - self._again
        return [shard for shard in self._shards if shard.index not in done]

    @property
    def images(self) -> int:
        """Images in all."""
        return len(self._book.catalog)

    @property
    def images_done(self) -> int:
        """Images in finished shards."""
        return len(self._book.catalog) - sum(shard.stop - shard.start for shard in self.left)

    @property
    def bad(self) -> int:
        """Bad images in finished shards."""
        bad = self._result.bad if self._result else ()
        return sum(image.image // self._size not in self._again for image in bad)

    @property
    def grey(self) -> int:
        """Images without colour that finished shards left out."""
        grey = self._result.grey if self._result else {}
        return sum(count for shard, count in grey.items() if shard not in self._again)

    def run(
        self,
        scan: Callable[[Iterator[Shard]], Iterator[P]],
        pauses: tuple[float, ...] = PAUSES,
    ) -> None:
        """Scans what is left, committing as it goes and once more however it ends.

        Where the images cannot be read, it goes on after a pause, with all that it has; where no shard was
        finished between two such pauses, they grow, and after the last of `pauses` the run ends. Where the memory
        did not suffice, it starts once more with all of it given back; where no shard was finished since, it ends.

        Raises MaxactError for these, and for too many bad images.
        """
        patience = Patience(self.stop, pauses)
        short = len(self._shards) + 1  # shards that were left when the memory did not suffice
        try:
            while self.left and not self.stop.is_set():
                before = len(self.left)
                try:
                    for partial in scan(iter(self.left)):
                        self._finish(partial)
                except Unreadable as error:
                    if len(self.left) < before:
                        patience.renew()
                    patience.wait(error, self.commit)
                except OutOfMemory as error:
                    if len(self.left) == short:
                        advice = "start again with a smaller --batch (and --overwrite)"
                        raise OutOfMemory(f"{error}, twice; {advice}") from error
                    short = len(self.left)
                    log.warning("%s: starting again at shard %d", error, self.left[0].index)
                    self.commit()
                if len(self.left) == short:  # not earlier: the error's traceback held the memory
                    give_back()
        finally:
            self.commit()
        if self._failure:
            raise self._failure

    def note(self, tick: Tick) -> None:
        """Counts bad images as they come, and stops the run where there are too many.

        Those that cannot be read wait for the end of their shard: where the storage is gone, it never comes. What is
        finished is committed in time, though no other shard may be finished for long.
        """
        self._count_bad(bad for bad in tick.bad if bad.stage != "read")
        self._commit_in_time()

    def _count_bad(self, bad: Iterable[BadImage]) -> None:
        self._bad |= {image.image: image for image in bad}
        if len(self._bad) > self._allowed_bad and not self._failure:
            examples = "; ".join(f"{bad.key}: {bad.error}" for bad in list(self._bad.values())[-_EXAMPLES:])
            self._failure = MaxactError(
                f"{len(self._bad)} images are bad, more than the {self._allowed_bad} that --max-bad allows "
                f"({examples}); mend them and start again with --overwrite, or allow more and run the same again"
            )
            self.stop.set()

    def _finish(self, partial: P) -> None:
        if self._result and partial.touched <= self._again:
            self._again -= partial.touched
            before = [bad for bad in self._result.bad if bad.image // self._size in partial.touched]
            if lost := [bad for bad in partial.bad if bad.image not in {bad.image for bad in before}]:
                # what this image had displaced from the lists is gone: they cannot do without it any more
                log.warning("%s is bad now (%s) and was not: its shard stays as it was", lost[0].key, lost[0].error)
                self._count_bad(before)
                return
            for index in partial.touched:
                self._result = self._result.without(self._shards[index])
        self._count_bad(partial.bad)
        self._result = partial if self._result is None else self._result.merge(partial)
        self._uncommitted = True
        self._commit_in_time()

    def _commit_in_time(self) -> None:
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Writes the finished shards to disk, if there are any that are not there yet."""
        if self._uncommitted and self._result is not None:
            self._book.commit(self._result)
            self._uncommitted = False
        self._committed = time.monotonic()

    @property
    def result(self) -> P:
        """The whole. Every shard must be done."""
        assert self._result is not None and not self.left
        return self._result
