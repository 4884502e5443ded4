"""The loop of the first pass. Read this file first: an image goes from `load` through `taps` into a `Tally`.

What the names stand for: `loader.load` reads and decodes in the background and gives batches of pixels;
`taps.Taps` runs the network and gives one peak per channel and image; `partial.Tally` keeps the strongest of one
shard and closes into a Partial, which is all that leaves this file. (Settling the order of a 16-bit scan counts
another way: `settle.Picker`.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig, ScanConfig, cores
from maxact.decode import make_decoder
from maxact.fetch import Unreadable
from maxact.loader import Batch, load
from maxact.models import Normalised
from maxact.numerics import kept_memory, numerics
from maxact.partial import BadImage, Tally
from maxact.preprocess import Preprocess
from maxact.tap import Tap
from maxact.taps import Pending, Taps
from maxact_kernels.peaks import Peaks

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
_BEHIND = 2  # batches that may wait to be counted while the network goes on


@dataclass(frozen=True)
class Job:
    """All that a worker needs to scan any shard; `settings` are resolved."""

    network: nn.Module
    preprocess: Preprocess
    taps: tuple[Tap, ...]
    catalog: Catalog
    settings: ScanConfig
    run: RunConfig
    device: torch.device

    def tally(self, shard: Shard) -> Tally:
        """What counts a shard of a scan: the strongest peaks and the statistics."""
        return Tally(shard, sum(tap.channels for tap in self.taps), self.settings.kept())


@dataclass(frozen=True)
class Tick:
    """One batch is through: how many of its images there were, the bad ones, those left out as grey, and the
    seconds that the loop waited for it."""

    images: int
    bad: tuple[BadImage, ...]
    grey: int
    waited: float


class Counting(Protocol[P_co]):
    """Counts one shard: a Tally, which closes into a Partial, or what another pass has in its place."""

    def add(self, peaks: Peaks, numbers: NDArray[np.int64], /) -> None: ...
    def close(self, bad: Sequence[BadImage], grey: int, /) -> P_co: ...


def scan(
    job: Job,
    shards: Iterator[Shard],
    stop: threading.Event,
    report: Callable[[Tick], None],
    count: Callable[[Shard], Counting[P]],
) -> Iterator[P]:
    """Scans shards and gives what each of them gave, in order. What a shard gives depends on nothing but the job.

    `count` makes what counts a shard: see `tally`.
    `stop` ends the scan after the batch in hand: finished shards are still given, the one in flight is dropped.
    Raises loader.Unreadable where the images of a shard cannot be read, after the finished shards before it.
    """
    unreadable: Unreadable | None = None
    with _running(job, shards) as (batches, taps), _Counter(count) as counter:
        asked = time.perf_counter()
        try:
            for batch in batches:  # uint8 [N, H, W, 3]; the next ones are being read and decoded
                waited = time.perf_counter() - asked
                peaks = taps(batch.images)  # [N, channels of all taps]; on a GPU this only starts the work
                counter.add(batch, peaks)  # while the network is at the next batch
                yield from counter.finished()
                report(Tick(batch.present, batch.bad, batch.grey, waited))
                if stop.is_set():
                    break
                asked = time.perf_counter()
        except Unreadable as error:
            unreadable = error
        yield from counter.rest()
    if unreadable:
        raise unreadable


@contextmanager
def _running(job: Job, shards: Iterator[Shard]) -> Iterator[tuple[Iterator[Batch], Taps]]:
    """What the loop needs, made once for all shards: the batches on their way, and the network with its taps."""
    settings, run = job.settings, job.run
    assert settings.precision and settings.batch
    threads = run.threads or cores()
    network = Normalised(job.network, job.preprocess).to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decoder = make_decoder(
        settings.decoder,
        job.preprocess,
        batch=settings.batch,
        threads=run.decode_threads or cores(),
        device=job.device,
        max_pixels=int(settings.max_megapixels * 1e6),
        pictures=job.catalog.dataset is not None,
    )
    with closing(decoder):
        batches = load(
            job.catalog,
            shards,
            decoder,
            batch=settings.batch,
            readers=run.readers,
            skip_grey=settings.skip_grey,
        )
        taps = Taps(network, job.taps, settings.precision, threads)
        with numerics(threads), kept_memory(), closing(batches), taps:
            yield batches, taps


class _Counter(Generic[P]):
    """Counts batches on a thread of its own, in their order, shard by shard."""

    def __init__(self, count: Callable[[Shard], Counting[P]]) -> None:
        self._count = count
        self._tally: Counting[P] | None = None
        self._bad: list[BadImage] = []
        self._grey = 0
        self._counting: deque[Future[None]] = deque()
        self._closed: deque[Future[P]] = deque()

    def __enter__(self) -> _Counter[P]:
        self._thread = ThreadPoolExecutor(1, "maxact-count")
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def add(self, batch: Batch, peaks: Pending) -> None:
        """Takes the next batch; waits where the thread is too far behind."""
        tally = self._tally = self._tally or self._count(batch.shard)
        self._counting.append(self._thread.submit(_count, tally, peaks, batch.numbers))
        self._bad += batch.bad
        self._grey += batch.grey
        if batch.ends_shard:
            self._closed.append(self._thread.submit(tally.close, self._bad, self._grey))
            self._tally, self._bad, self._grey = None, [], 0
        if len(self._counting) > _BEHIND:
            self._counting.popleft().result()

    def finished(self) -> Iterator[P]:
        """The shards that are finished by now."""
        while self._closed and self._closed[0].done():
            yield self._closed.popleft().result()

    def rest(self) -> Iterator[P]:
        """Waits for everything, and gives the shards that are finished then."""
        for counted in self._counting:
            counted.result()
        while self._closed:
            yield self._closed.popleft().result()


def _count(tally: Counting[P], peaks: Pending, numbers: NDArray[np.int64]) -> None:
    tally.add(peaks.result(), numbers)  # on a GPU, the one place where the host waits for the device
