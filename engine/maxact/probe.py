"""What is chosen before a store is started: batch, precision, and whether the network is compiled.

Tried on the first images of the catalog, and only where the device leaves something to choose. What is chosen is
saved in the store and never changes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maxact.catalog import Shard
from maxact.config import ScanConfig
from maxact.errors import MaxactError, OutOfMemory, is_memory
from maxact.numerics import give_back
from maxact.scan import Job, running
from maxact.tap import columns
from maxact.taps import CannotCompile
from maxact_kernels.peaks import Peaks

log = logging.getLogger("maxact")
_TIMES = 3  # batches that are timed
_UNFIT = 0.01  # largest share of maps that may hold NaN or infinity in one of them only
_AGREE = 0.5  # least share of peaks whose position must be the same in the compiled network
_NEAR = 0.1  # largest usual difference of a peak in the compiled network, in standard deviations of its tap


@dataclass(frozen=True)
class _Trial:
    """The peaks of one batch, of those of its places that have an image, and the seconds that it takes."""

    peaks: Peaks
    seconds: float


def probe(job: Job) -> Job:
    """The job with its settings resolved.

    Where the device is CUDA and the settings leave it open, a batch that does not fit into the memory is halved, and
    a network that overflows in float16 gets bfloat16. A network is compiled where torch.compile takes it as one graph
    that gives the same peaks; on a CPU, unless it is asked for, only if that is faster. Each choice is logged.

    Raises Unreadable where the first images cannot be read, OutOfMemory where a batch that was asked for, or one image,
    does not fit; CannotCompile where compiling was asked for and cannot be.
    """
    asked = job.settings
    settings = asked.resolve(job.device, len(job.catalog))
    if job.device.type == "cpu" and not settings.compile:
        return replace(job, settings=settings)
    compiles = settings.compile
    settings, trial = _fitting(job, asked, replace(settings, compile=False))
    if settings.precision == "fp16" and asked.precision is None and (tap := _overflowing(job, trial)):
        log.warning("%s overflows in fp16: bf16 instead", tap)
        settings, trial = _fitting(job, asked, replace(settings, precision="bf16"))
    if compiles:
        settings = _compiled(job, asked, settings, trial)
    return replace(job, settings=settings)


def _fitting(job: Job, asked: ScanConfig, settings: ScanConfig) -> tuple[ScanConfig, _Trial]:
    """The settings with the largest batch that fits, of the one that they have and its halves."""
    while True:
        try:
            return settings, _try(job, settings)
        except (MaxactError, RuntimeError) as error:
            if not is_memory(error) or asked.batch is not None or settings.batch == 1:
                raise
        half = (settings.batch or 2) // 2
        log.warning("out of memory with batches of %d: %d instead", settings.batch, half)
        settings = replace(settings, batch=half, shard=asked.shard).resolve(job.device, len(job.catalog))


def fitting_together(jobs: Sequence[Job], batch: int, asked: bool) -> int:
    """The largest batch with which all networks fit into the memory at once: `batch`, or unless that was `asked` for
    its half, and so on. Raises OutOfMemory where none does."""
    while True:
        each = [replace(job, settings=replace(job.settings, batch=batch)) for job in jobs]
        try:
            give_back()
            with running(each, iter([Shard(0, 0, min(batch, len(jobs[0].catalog)))])) as (loaded, networks):
                batches = next(loaded)
                for decoding, taps in networks:
                    taps(batches[decoding].images).result()
            return batch
        except (MaxactError, RuntimeError) as error:
            if not is_memory(error) or asked or batch == 1:
                raise
        log.warning("out of memory with batches of %d for all networks together: %d instead", batch, batch // 2)
        batch //= 2


def _overflowing(job: Job, trial: _Trial) -> str | None:
    """The first tap with a map that holds infinity or NaN."""
    for tap, start, stop in columns(job.taps):
        if np.isnan(trial.peaks.max[:, start:stop]).any():
            return tap.name
    return None


def _compiled(job: Job, asked: ScanConfig, settings: ScanConfig, eager: _Trial) -> ScanConfig:
    """The settings, compiled where that can be and is right and worth it."""
    compiled = replace(settings, compile=True)
    try:
        trial = _try(job, compiled)
    except (CannotCompile, OutOfMemory) as error:
        if asked.compile:
            raise
        log.info("not compiled: %s", error)
        return settings
    if tap := _differing(job, eager.peaks, trial.peaks):
        if asked.compile:
            raise CannotCompile(f"torch.compile gives other peaks at {tap}; leave --compile out")
        log.warning("not compiled: torch.compile gives other peaks at %s", tap)
        return settings
    if not asked.compile and job.device.type == "cpu" and trial.seconds >= eager.seconds:
        log.info("not compiled: that is not faster here")
        return settings
    return compiled


def _differing(job: Job, eager: Peaks, compiled: Peaks) -> str | None:
    """The first tap whose peaks are not the same but for rounding: torch.compile has given wrong positions before."""
    for tap, start, stop in columns(job.taps) if len(eager.max) else ():
        mine, theirs = eager.columns(start, stop), compiled.columns(start, stop)
        finite: NDArray[np.bool_] = np.isfinite(mine.max) & np.isfinite(theirs.max)
        if (np.isfinite(mine.max) ^ np.isfinite(theirs.max)).mean() > _UNFIT:
            return tap.name
        if not finite.any():
            continue
        for name in ("max", "min", "mean"):
            one, other = getattr(mine, name)[finite], getattr(theirs, name)[finite]
            if np.median(np.abs(one - other)) > _NEAR * np.std(one) + 1e-6 * np.abs(one).max():
                return tap.name
        if (mine.position == theirs.position)[finite].mean() < _AGREE:
            return tap.name
    return None


def _try(job: Job, settings: ScanConfig) -> _Trial:
    assert settings.batch
    first = Shard(0, 0, min(settings.batch, len(job.catalog)))
    give_back()  # what a trial before this one still holds, DALI could not have
    with running([replace(job, settings=settings)], iter([first])) as (loaded, networks):
        ((batch,), (_, taps)) = next(loaded), networks[0]
        peaks = taps(batch.images).result()  # compiled by this
        begun = time.perf_counter()
        for _ in range(_TIMES):
            taps(batch.images).result()
        seconds = time.perf_counter() - begun
        there = batch.numbers >= 0
        return _Trial(Peaks(*(values[there] for values in vars(peaks).values())), seconds / _TIMES)
