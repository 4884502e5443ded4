"""Trying settings of a scan: one after the other, each kept where the scan is faster with it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from maxact.config import Precision, cores
from maxact.loops import Loop, as_in_a_scan, batches_in, repeated
from maxact.numerics import has_bf16
from maxact.preprocess import one_line
from maxact.scan import Job

_GAIN = 1.02  # how much faster another value must be to be taken
_LEAST = 4  # batches that a setting is tried on


@dataclass(frozen=True)
class Setting:
    """What can be chosen of a scan without changing what it looks for. `threads`, of the network, are a CPU's."""

    batch: int
    threads: int
    decode_threads: int
    readers: int
    precision: Precision
    compile: bool
    hardware_share: float | None = None

    @classmethod
    def of(cls, job: Job) -> Setting:
        """That of a job with resolved settings."""
        settings, run = job.settings, job.run
        assert settings.batch and settings.precision
        return cls(
            settings.batch,
            run.threads or cores(),
            run.decode_threads or cores(),
            run.readers,
            settings.precision,
            bool(settings.compile),
            settings.hardware_share,
        )

    def apply(self, job: Job) -> Job:
        """The job, whose catalog is not repeated, with this setting."""
        settings = replace(
            job.settings,
            batch=self.batch,
            precision=self.precision,
            compile=self.compile,
            hardware_share=self.hardware_share,
        )
        run = replace(
            job.run,
            threads=self.threads,
            decode_threads=self.decode_threads,
            readers=self.readers,
        )
        catalog = repeated(job.catalog, self.batch)
        return replace(job, settings=settings.resolve(job.device), run=run, catalog=catalog)

    def options(self, device: torch.device) -> list[str]:
        """As words of a command line."""
        words = ["--batch", str(self.batch)]
        if device.type == "cpu":
            words += ["--threads", str(self.threads)]
        elif self.hardware_share is not None:
            words += ["--hardware-share", str(self.hardware_share)]
        words += ["--decode-threads", str(self.decode_threads), "--readers", str(self.readers)]
        return [*words, "--precision", self.precision, "--compile" if self.compile else "--no-compile"]


@dataclass(frozen=True)
class Point:
    """A setting that was tried: images per second, or why it could not be; of few also images per second in each of the
    rounds in which they were measured again."""

    setting: Setting
    rate: float | None
    error: str | None = None
    again: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"again": list(self.again)}


def choices(start: Setting, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """For each part of a setting the values that are tried, in this order of the parts."""
    here = cores()
    if device.type == "cpu":
        values: dict[str, tuple[Any, ...]] = {
            "batch": (8, 16, 32, 64),
            "threads": (here // 2, here - 1, here),
            "decode_threads": (here // 2, here, 2 * here),
            "readers": (4, 16, 32),
            "compile": (False, True),
            "precision": ("fp32", "bf16") if has_bf16() else ("fp32",),
        }
    else:
        values = {
            "batch": (64, 128, 256, 512),
            "hardware_share": () if start.hardware_share is None else (0.5, 0.65, 0.8, 0.95),
            "decode_threads": (here // 2, here, 2 * here, 4 * here),
            "readers": (16, 32, 64),
            "compile": (False, True),
            # where bf16 was chosen, fp16 overflows
            "precision": ("fp32", "bf16") if start.precision == "bf16" else ("fp32", "fp16", "bf16"),
        }
    return {
        name: tuple(dict.fromkeys(value for value in some if value != 0 and value != getattr(start, name)))
        if name != "compile"
        else (not start.compile,)
        for name, some in values.items()
    }


def sweep(job: Job, seconds: float, report: Callable[[int, int], None]) -> Iterator[Point]:
    """Tries settings around those of a job, each for so many seconds: one part after the other, with the best of the
    parts before it. The first point is the job's own setting. What fails is a point, too.
    """
    best = Setting.of(job)
    parts = choices(best, job.device)
    total = 1 + sum(map(len, parts.values()))
    point = _try(best, job, seconds)
    fastest = point.rate or 0.0
    report(1, total)
    yield point
    done = 1
    for name, values in parts.items():
        base = best
        for value in values:
            point = _try(replace(base, **{name: value}), job, seconds)
            if point.rate is not None and point.rate > _GAIN * fastest:
                best, fastest = point.setting, point.rate
            done += 1
            report(done, total)
            yield point


def again(
    points: Sequence[Point], job: Job, seconds: float, rounds: int, report: Callable[[int, int], None]
) -> Iterator[Point]:
    """The points of a sweep. The first, the fastest, and the fastest of the first one's precision have been measured
    again, in turn, so often, each for so many seconds; what failed then is a point that failed.
    """
    fastest = [max(some, key=lambda point: point.rate or 0.0) for some in (points, of_one_precision(points))]
    chosen = {point for point in (points[0], *fastest) if point.rate}
    tried: dict[Point, list[Point]] = {point: [] for point in points if point in chosen and len(chosen) > 1}
    for number in range(rounds):
        for place, (point, found) in enumerate(tried.items()):
            found.append(_try(point.setting, job, seconds))
            report(number * len(tried) + place + 1, rounds * len(tried))
    for point in points:
        found = tried.get(point, [])
        failed = [each for each in found if each.rate is None]
        yield failed[0] if failed else replace(point, again=tuple(each.rate for each in found if each.rate))


def of_one_precision(points: Sequence[Point]) -> list[Point]:
    """Those with the precision of the first."""
    return [point for point in points if point.setting.precision == points[0].setting.precision]


def gains(first: Point, other: Point) -> list[float]:
    """How many times as fast as the first another is, in each round in which both were measured again."""
    return [mine / theirs for theirs, mine in zip(first.again, other.again, strict=False)]


def best(points: Sequence[Point]) -> Point:
    """The fastest of those that were measured again, or the first, where that is hardly slower."""
    first = points[0]
    if not first.again:  # nothing was faster, or it failed
        return max(points, key=lambda point: point.rate or 0.0)
    ratios = {point: statistics.median(gains(first, point)) for point in points if point.again}
    fastest = max(ratios, key=lambda point: ratios[point])
    return fastest if ratios[fastest] >= _GAIN else first


def _try(setting: Setting, job: Job, seconds: float) -> Point:
    if setting.compile:
        torch.compiler.reset()  # it compiles a function for a few shapes and networks, no more
    try:
        tried = setting.apply(job)
        with as_in_a_scan(tried), closing(Loop(tried)) as loop:
            batches = batches_in(seconds, loop(1), setting.batch, _LEAST)
            return Point(setting, 1 / loop(batches).wall)
    except Exception as error:  # out of memory, a compiler that gives up: whatever it is, the others are tried
        return Point(setting, None, one_line(error))
    finally:
        gc.collect()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
