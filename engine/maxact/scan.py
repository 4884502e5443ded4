"""The loop of the first pass. Read this file first: an image goes from `load` through `taps` into a `Tally`.

What the names stand for: `loader.load` reads and decodes in the background and gives batches of pixels;
`taps.Taps` runs the network and gives one peak per channel and image; `partial.Tally` keeps the strongest of one
shard and closes into a Partial, which is all that leaves this file.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import nn

from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig, ScanConfig, cores
from maxact.decode import make_decoder
from maxact.loader import Batch, Unreadable, load
from maxact.models import Normalised
from maxact.partial import BadImage, Partial, Tally
from maxact.preprocess import Preprocess
from maxact.tap import Tap
from maxact.taps import Pending, Taps
from maxact_kernels.peaks import Peaks

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_COUNTING = 2  # batches that may wait to be counted while the network goes on


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


@dataclass(frozen=True)
class Tick:
    """One batch is through: how many of its images there were, the bad ones, those left out as grey, and the
    seconds that the loop waited for it."""

    images: int
    bad: tuple[BadImage, ...]
    grey: int
    waited: float


def scan(job: Job, shards: Iterator[Shard], stop: threading.Event, report: Callable[[Tick], None]) -> Iterator[Partial]:
    """Scans shards and gives what each of them gave, in order. What a shard gives depends on nothing but the job.

    `stop` ends the scan after the batch in hand: finished shards are still given, the one in flight is dropped.
    Raises loader.Unreadable where the images of a shard cannot be read.
    """
    settings, kept = job.settings, job.settings.kept()
    threads = job.run.threads or cores()
    assert settings.precision and settings.batch
    with ExitStack() as stack:
        stack.enter_context(numerics(threads))
        stack.enter_context(kept_memory())
        network = Normalised(job.network, job.preprocess).to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        taps = stack.enter_context(Taps(network, job.taps, settings.precision, threads))
        decoder = stack.enter_context(
            closing(
                make_decoder(
                    settings.decoder,
                    job.preprocess,
                    batch=settings.batch,
                    threads=job.run.decode_threads or cores(),
                    device=job.device,
                    max_pixels=int(settings.max_megapixels * 1e6),
                    pictures=job.catalog.dataset is not None,
                )
            )
        )
        batches = stack.enter_context(
            closing(
                load(
                    job.catalog,
                    shards,
                    decoder,
                    batch=settings.batch,
                    shape=job.preprocess.shape,
                    readers=job.run.readers,
                    skip_grey=settings.skip_grey,
                )
            )
        )
        # one thread counts, in the order of the batches, while the network is at the next one
        counter = stack.enter_context(ThreadPoolExecutor(1, "maxact-count"))
        counting: deque[Future[None]] = deque()
        closed: deque[Future[Partial]] = deque()

        tally: Tally | None = None
        bad: list[BadImage] = []
        grey = 0
        asked = time.perf_counter()
        failed: list[Unreadable] = []
        for batch in _until_unreadable(batches, failed):
            waited = time.perf_counter() - asked
            tally = tally or Tally(batch.shard, taps.channels, kept)
            peaks = taps(batch.images)  # [N, channels of all taps]; on a GPU this only starts the work
            counting.append(counter.submit(_count, tally, peaks, batch.numbers))
            bad += batch.bad
            grey += batch.grey
            if batch.ends_shard:
                closed.append(counter.submit(tally.close, bad, grey))
                tally, bad, grey = None, [], 0
            if len(counting) > _COUNTING:
                counting.popleft().result()
            while closed and closed[0].done():
                yield closed.popleft().result()
            present = int((batch.numbers >= 0).sum()) + len(batch.bad) + batch.grey
            report(Tick(present, batch.bad, batch.grey, waited))
            if stop.is_set():
                break
            asked = time.perf_counter()
        for counted in counting:
            counted.result()
        for last in closed:
            yield last.result()
        if failed:
            raise failed[0]


def _until_unreadable(batches: Iterator[Batch], failed: list[Unreadable]) -> Iterator[Batch]:
    """The batches, up to where no more can be read: what is finished by then is still to be given."""
    try:
        yield from batches
    except Unreadable as error:
        failed.append(error)


def _count(tally: Tally, peaks: Pending, numbers: NDArray) -> None:  # type: ignore[type-arg]
    found: Peaks = peaks.result()  # on a GPU: the one place where the host waits for the device
    tally.add(found, numbers)


@contextmanager
def numerics(threads: int) -> Iterator[None]:
    """float32 that is IEEE float32, the same algorithms every time, and `threads` CPU threads; then as before."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keeps freed memory in the process while the scan runs, where the C library is glibc.

    It hands every large block back to the system, and the next batch's maps meet pages that have to be cleared
    again: a quarter of a ResNet-18's time on a CPU.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(-1))
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 10)
        libc.malloc_trim(0)
