"""The loop of the first pass. Read this file first: an image goes from `load` through `taps` into a `Tally`.

What the names stand for: `loader.load` reads and decodes in the background and gives batches of pixels;
`taps.Taps` runs the network and gives one peak per channel and image; `partial.Tally` keeps the strongest of one
shard and closes into a Partial, which is all that leaves this file. (Settling the order of a 16-bit scan counts
another way: `settle.Picker`.)

Several networks may be scanned at once: every image is read once for all of them, and decoded once for those whose
preprocessing differs in nothing but the normalisation, which is part of the network. Usually it is one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig, ScanConfig, cores
from maxact.decode import Decoder, make_decoder
from maxact.dense import Dense, Target
from maxact.errors import OutOfMemory, is_memory
from maxact.fetch import Unreadable
from maxact.loader import Batch, load
from maxact.models import Normalised
from maxact.numerics import current, kept_memory, make_current, numerics
from maxact.partial import BadImage, Tally
from maxact.preprocess import Preprocess
from maxact.process import Tick
from maxact.tap import Tap
from maxact.taps import Pending, Taps
from maxact_kernels.peaks import Peaks

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
_BEHIND = 2  # batches that may wait to be counted while the network goes on


@dataclass(frozen=True)
class Job:
    """All that a worker needs to scan any shard with one network; `settings` are resolved."""

    network: nn.Module
    preprocess: Preprocess
    taps: tuple[Tap, ...]
    catalog: Catalog
    settings: ScanConfig
    run: RunConfig
    device: torch.device
    store: Path | None = None  # where the values of every image go, if they are to be kept

    def on(self, run: RunConfig) -> Job:
        """The same for one worker, whose device and threads `run` says."""
        return replace(self, run=run, device=run.torch_device())

    def tally(self, shard: Shard, before: frozenset[int] | None = None) -> Tally:
        """What counts a shard of a scan: the strongest peaks and the statistics. `before`: see `dense.Dense`."""
        settings, channels = self.settings, sum(tap.channels for tap in self.taps)
        if self.store is None or settings.pooled is None:
            return Tally(shard, channels, settings.kept())
        assert settings.shard
        target = Target(self.store, settings.pooled, self.taps, len(self.catalog), settings.shard)
        return Dense(shard, channels, settings.kept(), target, before)

    @property
    def pixels(self) -> tuple[str, float | None, Preprocess]:
        """What decides the pixels: jobs that agree in it share one decoding."""
        return self.settings.decoder, self.settings.hardware_share, self.preprocess.without_normalisation()


class Counting(Protocol[P_co]):
    """Counts one shard: a Tally, which closes into a Partial, or what another pass has in its place."""

    def add(self, peaks: Peaks, numbers: NDArray[np.int64], /) -> None: ...
    def close(self, bad: Sequence[BadImage], grey: int, /) -> P_co: ...


def scan(
    jobs: Sequence[Job],
    shards: Iterator[Shard],
    stop: threading.Event,
    report: Callable[[Tick], None],
    count: Callable[[Shard], Sequence[Counting[P] | None]],
) -> Iterator[tuple[P | None, ...]]:
    """Scans shards and gives what each of them gave each job, in order. It depends on nothing but the jobs.

    jobs: of one catalog, with the same batch, shard, device and settings of the run.
    `count` makes what counts a shard for each job (see `Job.tally`), or None for one that is to be left out.
    `stop` ends the scan after the batch in hand: finished shards are still given, the one in flight is dropped.
    Raises loader.Unreadable where the images of a shard cannot be read, and taps.OutOfMemory, both after the finished
    shards before it.
    """
    failure: Unreadable | OutOfMemory | None = None
    shard: int | None = None
    with running(jobs, shards) as (loaded, networks), _Counter(count, jobs[0].device) as counter:
        asked = time.perf_counter()
        try:
            for batches in loaded:  # uint8 [N, H, W, 3] of each decoding; the next ones are on their way
                waited = time.perf_counter() - asked
                tallies = counter.tallies(batches[0].shard)
                for (decoding, taps), tally in zip(networks, tallies, strict=True):
                    if tally is not None:
                        batch = batches[decoding]
                        peaks = taps(batch.images)  # [N, channels of all taps]; on a GPU this only starts the work
                        counter.add(tally, batch, peaks)  # while the network is at the next batch
                if batches[0].ends_shard:
                    counter.close()
                worst = max(batches, key=lambda batch: len(batch.bad))
                begins, shard = worst.shard.index != shard, worst.shard.index
                report(Tick(shard, begins, worst.present, worst.bad, worst.grey, waited))
                yield from counter.finished()
                if stop.is_set():
                    break
                asked = time.perf_counter()
        except (Unreadable, OutOfMemory) as error:
            failure = error
        except RuntimeError as error:
            failure = _short(jobs[0], error)  # outside of the network: pixels, or the peaks' way out
        try:
            yield from counter.rest()
        except RuntimeError as error:
            failure = failure or _short(jobs[0], error)
    if failure:
        raise failure


def _short(job: Job, error: RuntimeError) -> OutOfMemory:
    """That the memory does not suffice, in a user's words; raises the error where it says something else."""
    if not is_memory(error):
        raise error
    short = OutOfMemory(f"out of memory with batches of {job.settings.batch}")
    short.__cause__ = error
    return short


@contextmanager
def running(
    jobs: Sequence[Job], shards: Iterator[Shard]
) -> Iterator[tuple[Iterator[tuple[Batch, ...]], list[tuple[int, Taps]]]]:
    """What the loop needs, made once for all shards: the batches on their way, and of each job which of the
    decodings it takes and its network with its taps."""
    first = jobs[0]
    settings, run = first.settings, first.run
    assert settings.batch
    threads = run.threads or cores()
    ways = list(dict.fromkeys(job.pixels for job in jobs))
    with ExitStack() as resources:
        resources.enter_context(current(first.device))
        firsts = [next(job for job in jobs if job.pixels == way) for way in ways]
        decoders = [resources.enter_context(closing(decoder_of(job, job.device))) for job in firsts]
        resources.enter_context(numerics(threads))
        resources.enter_context(kept_memory())
        loaded = load(
            first.catalog,
            shards,
            decoders,
            batch=settings.batch,
            readers=run.readers,
            skip_grey=settings.skip_grey,
        )
        resources.enter_context(closing(loaded))
        networks = []
        for job in jobs:
            assert job.settings.precision
            network = Normalised(job.network, job.preprocess).to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            taps = Taps(network, job.taps, job.settings.precision, threads, bool(job.settings.compile))
            networks.append((ways.index(job.pixels), resources.enter_context(taps)))
        yield (_apart(loaded, first.device) if first.device.type == "cuda" else loaded), networks


def _apart(loaded: Iterator[tuple[Batch, ...]], device: torch.device) -> Iterator[tuple[Batch, ...]]:
    """The same batches, made on a stream of their own: what has to wait for pixels there (grey pictures, empty places)
    does not wait for the network, which is at the batch before."""
    pixels = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    while True:
        with torch.cuda.stream(pixels):
            batches = next(loaded, None)
        if batches is None:
            return
        networks = torch.cuda.current_stream(device)
        networks.wait_stream(pixels)
        for batch in batches:
            batch.images.record_stream(networks)  # their memory is not used again before the networks are done
        yield batches


def decoder_of(job: Job, device: torch.device) -> Decoder:
    """What decodes a job's images, onto a device."""
    settings, run = job.settings, job.run
    assert settings.batch
    return make_decoder(
        settings.decoder,
        job.preprocess,
        batch=settings.batch,
        threads=run.decode_threads or cores(),
        device=device,
        max_pixels=int(settings.max_megapixels * 1e6),
        pictures=job.catalog.dataset is not None,
        hardware_share=settings.hardware_share,
    )


@dataclass
class _Shard(Generic[P]):
    """What counts one shard for one job, and the images of it that are not counted."""

    counting: Counting[P]
    bad: list[BadImage] = field(default_factory=list)
    grey: int = 0


class _Counter(Generic[P]):
    """Counts batches on a thread of its own, in their order, shard by shard, and closes shards on another: closing one
    may write much (`dense.py`), and the next one is counted meanwhile."""

    def __init__(self, count: Callable[[Shard], Sequence[Counting[P] | None]], device: torch.device) -> None:
        self._count, self._device = count, device
        self._shards: list[_Shard[P] | None] = []  # of the shard in hand
        self._counting: deque[Future[None]] = deque()
        self._closed: deque[Future[tuple[P | None, ...]]] = deque()

    def __enter__(self) -> _Counter[P]:
        self._thread = ThreadPoolExecutor(1, "maxact-count", make_current, (self._device,))  # whose events it waits for
        self._closer = ThreadPoolExecutor(1, "maxact-close")
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._closer.shutdown()

    def tallies(self, shard: Shard) -> Sequence[_Shard[P] | None]:
        """What counts the shard in hand, for every job."""
        if not self._shards:
            self._shards = [None if counting is None else _Shard(counting) for counting in self._count(shard)]
        return self._shards

    def add(self, shard: _Shard[P], batch: Batch, peaks: Pending) -> None:
        """Takes the next batch; waits where the thread is too far behind."""
        self._counting.append(self._thread.submit(_count, shard.counting, peaks, batch.numbers))
        shard.bad += batch.bad
        shard.grey += batch.grey
        if len(self._counting) > _BEHIND * len(self._shards):
            self._counting.popleft().result()

    def close(self) -> None:
        """The shard in hand is through."""
        wait(self._closed)  # in memory are two shards at most
        self._closed.append(self._closer.submit(_close, self._shards, tuple(self._counting)))
        self._shards = []

    def finished(self) -> Iterator[tuple[P | None, ...]]:
        """The shards that are finished by now."""
        while self._closed and self._closed[0].done():
            yield self._closed.popleft().result()

    def rest(self) -> Iterator[tuple[P | None, ...]]:
        """Waits for everything, and gives the shards that are finished then. Raises what counting raised, after
        them."""
        failures = [error for counted in self._counting if (error := counted.exception())]
        for closed in self._closed:
            if error := closed.exception():
                failures.append(error)
            else:
                yield closed.result()
        self._closed.clear()
        if failures:
            raise failures[0]


def _count(counting: Counting[P], peaks: Pending, numbers: NDArray[np.int64]) -> None:
    counting.add(peaks.result(), numbers)  # on a GPU, the one place where the host waits for a network


def _close(shards: Sequence[_Shard[P] | None], counting: Sequence[Future[None]]) -> tuple[P | None, ...]:
    for counted in counting:  # all of them, and a batch that failed must not be missing without a word
        counted.result()
    return tuple(None if shard is None else shard.counting.close(shard.bad, shard.grey) for shard in shards)
