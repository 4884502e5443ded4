"""How much the driver of many workers takes in: results and ticks a second, through local sockets and through Ray.

A result is what a worker hands over of a ResNet-50 (26,560 channels): 50 peaks a channel in float32, or the 132
candidates of a 16-bit scan. Workers hand over made-up ones as fast as they are asked; the driver only takes them in,
or merges them too, as in a scan; merging and committing are measured alone as well. The rates are those of a machine
that does all of this at once; the driver's thread is busy for less. From that follows with how many GPUs it would have
no more time, if each scans `--rate` images a second, tells of every batch and hands over what it has every few
seconds, and how many a network of 10 Gbit/s to the driver carries. (Beyond that no worker waits: it goes on merging
until the driver has taken its last result.)
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, finish, interleaved, median, seconds
from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig
from maxact.files import replace_file
from maxact.local import attempts
from maxact.partial import Partial
from maxact.process import Tick
from maxact.run_ray import joined
from maxact.schedule import COMMIT_SECONDS, Schedule
from maxact.stats import Stats
from maxact.together import HAND_OVER, Parts
from maxact.topk import Ranked
from maxact.watch import Watch

CHANNELS = 26_560
KEPT = {"fp32": 50, "fp16": 132}
BATCH, SHARD = 128, 4096
TICKS = 32  # of a shard
RESULTS = 12  # that are timed
WARM_UP = 4  # results that are not
EACH = 100  # shards of each kind: ticks, fp32, fp16
NETWORK = 1.25e9  # bytes a second of 10 Gbit/s


def made(shard: int, k: int) -> Partial:
    """What a shard might give."""
    draw = np.random.default_rng(shard)
    score = -np.sort(-draw.random((CHANNELS, k), np.float32), axis=1)
    image = np.broadcast_to(np.arange(shard * SHARD, shard * SHARD + k), score.shape).copy()
    top = Ranked(score, image, np.zeros(score.shape, np.int32))
    return Partial(frozenset({shard}), {("max", "top"): top}, {(5, shard): Stats.empty(CHANNELS)})


@dataclass(frozen=True)
class Giving:
    """A work that gives made-up results of shards that nobody scans; of the first kind no result, but ticks."""

    made: tuple[Partial, ...] = ()
    patience: float = 0.0
    merge: None = None

    def on(self, run: RunConfig) -> Giving:
        """One result is enough: its numbers are changed."""
        return replace(self, made=tuple(made(0, k) for k in KEPT.values()))

    def run(self, shards: Iterator[Shard], stop: threading.Event, report: Callable[[Tick], None]) -> Iterator[Parts]:
        """A result for every shard."""
        for shard in shards:
            kind, index = shard.index // EACH, frozenset({shard.index})
            if kind == 0:
                for number in range(TICKS):
                    report(Tick(shard.index, number == 0, BATCH, (), 0, 0.0))
                yield Parts((Partial(index, {}, {}),))
                continue
            ((key, top),) = self.made[kind - 1].tops.items()
            top = replace(top, image=top.image + shard.index * SHARD)
            yield Parts((Partial(index, {key: top}, {(5, shard.index): Stats.empty(CHANNELS)}),))

    def look(self) -> None:
        """It reads nothing."""


class Book:
    """A catalog without a store."""

    shard = 1

    def __init__(self, folder: Path) -> None:
        (folder / "one.jpg").write_bytes(b"x")
        self.catalog = Catalog(Catalog.build(folder).table.take([0] * 3 * EACH))

    def state(self) -> None:
        """Nothing is done yet."""

    def commit(self, part: Parts) -> None:
        """Nothing is kept."""


def taken(
    attempt: Callable[[Iterator[Shard]], Iterator[Parts]], shards: list[Shard], merging: bool
) -> tuple[float, float]:
    """Seconds in which the driver takes in what one shard gives, or merges it, too: by the clock, and of its thread."""
    result: Parts | None = None
    begun = busy = 0.0
    for number, parts in enumerate(attempt(iter(shards)), 1):
        if merging:
            result = parts if result is None else result.merge(parts)
        if number == WARM_UP:
            begun, busy = time.perf_counter(), time.thread_time()
    count = len(shards) - WARM_UP
    return (time.perf_counter() - begun) / count, (time.thread_time() - busy) / count


def alone(k: int, folder: Path) -> tuple[int, float, float]:
    """A result's bytes, and the seconds that it takes to merge one and to commit one."""
    whole, parts = made(0, k), [made(number, k) for number in range(1, 6)]
    whole.merge(parts[0])  # compiled by this
    merging = [seconds(partial(whole.merge, part)) for part in parts]
    commits = [seconds(partial(replace_file, folder / "state", whole.save)) for _ in range(3)]
    return whole.nbytes, median(merging), median(commits)


def measure(runs: dict[str, RunConfig], rounds: int, rate: float) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """The table's rows, and what they follow from."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as resources:
        book = Book(Path(folder))
        shards = book.catalog.shards(1)
        tasks: dict[str, Callable[[], tuple[float, float]]] = {}
        for name, run in runs.items():
            watch = Watch(Schedule[Parts](book), lambda progress: None)
            workers = attempts(Giving(), run, threading.Event(), watch.note)
            attempt, crew = resources.enter_context(workers)
            watch.crew = crew
            tasks[f"{name} ticks"] = partial(taken, attempt, shards[:EACH], False)
            for number, kind in enumerate(KEPT, 1):
                some = shards[number * EACH :][: RESULTS + WARM_UP]
                tasks[f"{name} take {kind}"] = partial(taken, attempt, some, False)
                tasks[f"{name} merge {kind}"] = partial(taken, attempt, some, True)
        interleaved(tasks, 1)  # everybody is there by now
        found = interleaved(tasks, rounds)
        clock, busy = ({key: median([each[n] for each in times]) for key, times in found.items()} for n in (0, 1))
        rows: list[tuple[Any, ...]] = []
        for kind, k in KEPT.items():
            count, merging, commit = alone(k, Path(folder))
            for name in runs:
                take, merge = f"{name} take {kind}", f"{name} merge {kind}"
                tick = busy[f"{name} ticks"] / TICKS
                row: tuple[Any, ...] = (name, kind, count / 1e6, 1 / clock[take], count / clock[take] / 1e6)
                row += (1 / clock[merge], 1e3 * busy[take], 1e3 * busy[merge], 1e3 * merging, 1e3 * commit, 1e6 * tick)
                free = 1 - commit / COMMIT_SECONDS
                used = busy[merge] / HAND_OVER + rate / BATCH * tick  # seconds of each second, for a GPU
                rows.append((*row, math.floor(free / used), math.floor(NETWORK / (count / HAND_OVER))))
    details = {"seconds": clock, "busy": busy, "rate": rate}
    return rows, {"channels": CHANNELS, "batch": BATCH, "hand_over_s": HAND_OVER} | details


if __name__ == "__main__":
    options = arguments(__doc__, rate=8000.0, rounds=2)
    with joined(RunConfig(cluster="auto", cpus_per_worker=1)) as there:
        found, details = measure({"sockets": RunConfig("cpu:2"), "Ray": there}, options.rounds, options.rate)
    finish(
        "ray_driver",
        (
            "through",
            "scan",
            "MB",
            "taken in/s",
            "MB/s",
            "merged/s",
            "busy with taking in, ms",
            "and merging, ms",
            "merging alone, ms",
            "commit ms",
            "busy with a tick, µs",
            "GPUs until the driver is busy",
            "GPUs on 10 Gbit/s",
        ),
        found,
        details,
        options.json,
    )
