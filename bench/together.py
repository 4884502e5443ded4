"""What scanning two networks over one decoding costs beside scanning them one after the other.

The loop of a scan over the same images: with one network, and with that network twice (two copies, a tally each), in
turn. Once alone costs 1, twice alone 2; together it is 2 less what the second decoding would have cost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from common import arguments, finish, interleaved, median, photographs
from maxact.catalog import Catalog
from maxact.config import RunConfig, ScanConfig, cores
from maxact.find import find_taps
from maxact.loops import repeated
from maxact.models import load_model
from maxact.numerics import kept_memory
from maxact.scan import Job, scan
from maxact.stages import twin


def running(jobs: list[Job]) -> Callable[[], float]:
    """Seconds from the first batch on to the last shard's result."""

    def run() -> float:
        begun: list[float] = []
        shards = iter(jobs[0].catalog.shards(jobs[0].settings.shard or 0))
        given = scan(
            jobs,
            shards,
            threading.Event(),
            lambda tick: begun.append(time.perf_counter()),
            lambda shard: [job.tally(shard) for job in jobs],
        )
        for _ in given:
            end = time.perf_counter()
        return (end - begun[0]) / (len(begun) - 1) / (jobs[0].settings.batch or 1)

    return run


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "", images="", models="resnet50,squeezenet1_1", batch=32, batches=12, rounds=3, device="cpu"
    )
    device = torch.device(args.device)
    rows = []
    for name in args.models.split(","):
        model = load_model(name, weights="none")
        settings = ScanConfig(batch=args.batch, compile=False).resolve(device)
        catalog = repeated(Catalog.build(photographs(args.images)), args.batch)
        catalog = Catalog(catalog.table.slice(0, min(len(catalog), args.batches * args.batch)))
        run = RunConfig(args.device, threads=cores())
        job = Job(model.network, model.preprocess, find_taps(model).taps, catalog, settings, run, device)
        pair = [job, replace(job, network=twin(job.network))]
        with kept_memory():
            times = interleaved({"one": running([job]), "two": running(pair)}, args.rounds)
        ratio = median([two / one for one, two in zip(times["one"], times["two"], strict=True)])
        rows.append((name, args.device, 1 / median(times["one"]), 1 / median(times["two"]), ratio))
    columns = ("network", "device", "one img/s", "two together img/s", "cost beside one")
    finish("together", columns, rows, {}, args.json)


if __name__ == "__main__":
    main()
