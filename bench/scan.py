"""How much of the machine's limit a scan reaches on a CPU.

F is the bare forward rate of the network on tensors in memory, D the rate of the decoder alone on files' bytes in
memory, both with the threads, batch and precision of the scan, and with the C library's allocator set as in the
scan. Where both share the cores the limit is 1 / (1/F + 1/D). Scan, F and D are measured in turn, several rounds;
the ratio is the median of the rounds' ratios. The same is given in CPU seconds, which other processes on the machine
disturb less: (F's + D's) / the scan's, per image. And once more with F in a process of its own that sets nothing: what
a user's own script has, and what a user who knows none of that would call the limit.

A round of the scan is half a shard that begins with empty heaps. A whole shard is a little cheaper: heaps that have
seen more images take fewer of the next. A scan of every photograph beforehand loads the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from common import arguments, finish, interleaved, median, photographs
from maxact.catalog import Catalog
from maxact.config import RunConfig, ScanConfig, cores
from maxact.decode import make_decoder
from maxact.find import find_taps
from maxact.models import Model, load_model
from maxact.numerics import kept_memory, numerics
from maxact.scan import Job, Tick, scan

WARM_UP = 2  # batches that do not count


@dataclass(frozen=True)
class Cost:
    """Seconds per image, on the clock and of CPU time."""

    wall: float
    cpu: float


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def per(self, images: int) -> Cost:
        """The cost of each of so many images since then."""
        return Cost((time.perf_counter() - self._wall) / images, (time.process_time() - self._cpu) / images)


def forward(model: Model, batch: int, batches: int, threads: int, precision: str) -> Callable[[], Cost]:
    """The bare network, channels_last, on one batch in memory."""
    network = model.network.to(memory_format=torch.channels_last)
    images = torch.rand(batch, 3, *model.preprocess.crop).to(memory_format=torch.channels_last)

    def run() -> Cost:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with numerics(threads), kept_memory(), torch.inference_mode(), autocast:
            for _ in range(WARM_UP):
                network(images)
            watch = Stopwatch()
            for _ in range(batches):
                network(images)
            return watch.per(batches * batch)

    return run


def plain(name: str, batch: int, batches: int, threads: int, precision: str) -> Callable[[], Cost]:
    """The bare network as a script of anybody's runs it: a process of its own, without the scan's settings of the
    allocator and of waiting threads, which make the network itself faster."""
    script = f"""
import time, torch
from torchvision.models import get_model
torch.set_num_threads({threads})
network = get_model({name!r}, weights=None).eval().to(memory_format=torch.channels_last)
images = torch.rand({batch}, 3, 224, 224).to(memory_format=torch.channels_last)
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled={precision == "bf16"}):
    for _ in range({WARM_UP}):
        network(images)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range({batches}):
        network(images)
    print(time.perf_counter() - wall, time.process_time() - cpu)
"""
    ours = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")
    environment = {key: value for key, value in os.environ.items() if key not in ours}

    def run() -> Cost:
        said = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        return Cost(*(float(seconds) / (batch * batches) for seconds in said))

    return run


def decode(model: Model, catalog: Catalog, batch: int, batches: int, threads: int) -> Callable[[], Cost]:
    """The decoder alone, on bytes in memory, as many batches in flight as in a scan."""
    files = [catalog.read(entry) for entry in catalog.entries(0, min(len(catalog), batch * batches))]
    parts = [files[start : start + batch] for start in range(0, len(files) - batch + 1, batch)]

    def run() -> Cost:
        decoder = make_decoder("auto", model.preprocess, batch=batch, threads=threads)
        for part in parts[:WARM_UP]:
            decoder.submit(part)
            decoder.collect()
        watch = Stopwatch()
        for index in range(batches):
            if index >= decoder.depth:
                decoder.collect()
            decoder.submit(parts[index % len(parts)])
        for _ in range(min(decoder.depth, batches)):
            decoder.collect()
        cost = watch.per(batches * batch)
        decoder.close()
        return cost

    return run


def whole(job: Job) -> Callable[[], Cost]:
    """The scan's loop, from its first batches on to the last shard's result."""
    shards = job.catalog.shards(job.settings.shard or 0)

    def run() -> Cost:
        watch, seen = Stopwatch(), 0

        def tick(tick: Tick) -> None:
            nonlocal watch, seen
            seen += 1
            if seen == WARM_UP:
                watch = Stopwatch()

        counted = len(job.catalog) - WARM_UP * (job.settings.batch or 0)
        # up to the last shard's result: what is torn down afterwards belongs to no image
        given = scan([job], iter(shards), threading.Event(), tick, lambda shard: [job.tally(shard)])
        return [watch.per(counted) for _ in given][-1]

    return run


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "", images="", models="resnet18", batch=32, batches=62, rounds=5, precision="fp32", threads=cores()
    )
    rows = []
    values: dict[str, object] = {}
    for name in args.models.split(","):
        model = load_model(name, weights="none")
        found = find_taps(model)
        one = Catalog.build(photographs(args.images))
        # every photograph again and again, up to the number of batches
        paths = [entry.source for entry in one.entries(0, len(one))]
        count = args.batch * (args.batches + WARM_UP)
        catalog = Catalog.build([Path(path.decode()) for path in islice(paths * (count // len(paths) + 1), count)])
        settings = ScanConfig(precision=args.precision, batch=args.batch).resolve(torch.device("cpu"))
        run = RunConfig("cpu", threads=args.threads, decode_threads=args.threads)
        job = Job(model.network, model.preprocess, found.taps, catalog, settings, run, torch.device("cpu"))
        whole(replace(job, catalog=one))()
        measured = interleaved(
            {
                "forward": forward(model, args.batch, args.batches // 4, args.threads, args.precision),
                "decode": decode(model, catalog, args.batch, args.batches, args.threads),
                "scan": whole(job),
                "plain": plain(name, args.batch, args.batches // 4, args.threads, args.precision),
            },
            args.rounds,
        )
        costs = list(zip(measured["forward"], measured["decode"], measured["scan"], strict=True))
        ratio = median([(f.wall + d.wall) / s.wall for f, d, s in costs])
        cpu_ratio = median([(f.cpu + d.cpu) / s.cpu for f, d, s in costs])
        plains = [(p.wall + c[1].wall) / c[2].wall for p, c in zip(measured["plain"], costs, strict=True)]
        p = median([cost.wall for cost in measured["plain"]])
        f, d, s = (median([cost.wall for cost in measured[key]]) for key in ("forward", "decode", "scan"))
        rates = 1 / f, 1 / d, 1 / (f + d), 1 / s, ratio, cpu_ratio, 1 / p, median(plains)
        rows.append((name, args.precision, len(found.taps), *rates))
        values[name] = {key: [vars(cost) for cost in each] for key, each in measured.items()}
    columns = (
        *("network", "precision", "taps", "forward img/s", "decode img/s", "limit img/s", "scan img/s"),
        *("ratio", "ratio of CPU time", "plain forward img/s", "ratio to its limit"),
    )
    finish("scan", columns, rows, {"seconds per image": values}, args.json)


if __name__ == "__main__":
    main()
