"""How much of the machine's limit a scan reaches on a CPU.

F is the bare forward rate of the network on tensors in memory, D the rate of the decoder alone on files' bytes in
memory, both with the threads, batch and precision of the scan, and with the C library's allocator set as in the
scan. Where both share the cores the limit is 1 / (1/F + 1/D). Scan, F and D are measured in turn, several rounds;
the ratio is the median of the rounds' ratios. The same is given in CPU seconds, which other processes on the machine
disturb less: (F's + D's) / the scan's, per image. F is given three ways: the bare network; with --compile 1 (of the
scan, too) also compiled; and "plain", in a process of its own that sets nothing: what a user's own script has, and what
a user who knows none of that would call the limit.

A round of the scan is a stretch of one that goes on (`maxact.loops.Loop`), without beginning and end. A stretch over
every photograph beforehand loads the kernels. `maxact bench` measures more stages of any scan; here are many networks,
and what is beyond the engine.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from common import arguments, finish, interleaved, median, photographs
from maxact import stages
from maxact.catalog import Catalog
from maxact.config import RunConfig, ScanConfig, cores
from maxact.find import find_taps
from maxact.loops import Cost, Loop, as_in_a_scan, repeated
from maxact.models import load_model
from maxact.scan import Job

WARM_UP = 2  # batches of the plain network that do not count


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


def _share(measured: Mapping[str, Sequence[Cost]], forward: str, clock: str) -> float:
    """What the scan reaches of the limit that a forward pass and the decoder imply: the median of the rounds."""
    rounds = zip(measured[forward], measured["decode"], measured["scan"], strict=True)
    return median([(getattr(f, clock) + getattr(d, clock)) / getattr(s, clock) for f, d, s in rounds])


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "",
        images="",
        models="resnet18",
        batch=32,
        batches=62,
        rounds=5,
        precision="fp32",
        threads=cores(),
        compile=0,
    )
    rows = []
    values: dict[str, object] = {}
    for name in args.models.split(","):
        model = load_model(name, weights="none")
        found = find_taps(model)
        catalog = Catalog.build(photographs(args.images))
        settings = ScanConfig(precision=args.precision, batch=args.batch, compile=bool(args.compile))
        settings = settings.resolve(torch.device("cpu"))
        run = RunConfig("cpu", threads=args.threads, decode_threads=args.threads)
        cycled = repeated(catalog, args.batch)
        job = Job(model.network, model.preprocess, found.taps, cycled, settings, run, torch.device("cpu"))
        images = torch.rand(args.batch, 3, *model.preprocess.crop).to(memory_format=torch.channels_last)
        forwards = {"forward": False} | ({"compiled": True} if args.compile else {})
        with as_in_a_scan(job), closing(Loop(replace(job, network=stages.twin(job.network)))) as loop:
            loop(math.ceil(len(catalog) / args.batch))
            decode = stages.decode(job, stages.gather(job).files)
            runs: dict[str, Callable[[], Cost]] = {
                key: partial(stages.forward(stages.bare(job, compiled), [images], args.precision), args.batches // 4)
                for key, compiled in forwards.items()
            }
            runs |= {"decode": partial(decode, args.batches), "scan": partial(loop, args.batches)}
            if ":" not in name:
                runs["plain"] = plain(name, args.batch, args.batches // 4, args.threads, args.precision)
            measured = interleaved(runs, args.rounds)
        rates: dict[str, object] = {key: 1 / median([cost.wall for cost in costs]) for key, costs in measured.items()}
        kinds = ("forward", "compiled", "plain")
        shares = [_share(measured, key, "wall") if key in measured else "" for key in kinds]
        speeds = [rates.get(key, "") for key in (*kinds, "decode", "scan")]
        of_cpu = _share(measured, "forward", "cpu")
        rows.append((name, args.precision, "yes" if args.compile else "no", len(found.taps), *speeds, *shares, of_cpu))
        values[name] = {key: [vars(cost) for cost in each] for key, each in measured.items()}
    columns = (
        *("network", "precision", "compiled", "taps"),
        *("forward img/s", "compiled forward", "plain forward", "decode", "scan"),
        *("ratio", "to compiled", "to plain", "of CPU time"),
    )
    finish("scan", columns, rows, {"seconds per image": values}, args.json)


if __name__ == "__main__":
    main()
