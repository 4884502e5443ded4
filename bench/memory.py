"""Peak memory of a scan: beside the bare network and the loader, and as the number of images grows.

Each measurement is a process of its own, whose peak resident memory the system reports. The network is small and
the pictures are few and repeated, so that 100,000 images take minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from itertools import islice
from pathlib import Path

import torch

from common import arguments, finish, photographs
from maxact.catalog import Catalog
from maxact.config import RunConfig, ScanConfig, cores
from maxact.decode import make_decoder
from maxact.loader import load
from maxact.models import load_model
from maxact.run import find_taps
from maxact.scan import Job, kept_memory, numerics, scan


def peak() -> float:
    """Peak resident memory of this process in MB; getrusage's would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def one(what: str, model_name: str, paths: str, images: int, crop: int) -> None:
    """Runs one thing in this process and prints its peak."""
    model = load_model(model_name, weights="none", crop=crop, resize=crop + crop // 8)
    device = torch.device("cpu")
    settings = ScanConfig(shard=1024).resolve(device)
    assert settings.batch and settings.shard
    catalog = Catalog.build(paths, limit=images)
    if what == "scan":
        job = Job(model.network, model.preprocess, find_taps(model).taps, catalog, settings, RunConfig("cpu"), device)
        result = None
        for partial in scan(job, iter(catalog.shards(settings.shard)), threading.Event(), lambda tick: None):
            result = partial if result is None else result.merge(partial)
    else:  # the network and the loader, and nothing else
        decoder = make_decoder("auto", model.preprocess, batch=settings.batch, threads=cores())
        batches = load(
            catalog,
            iter(catalog.shards(settings.shard)),
            decoder,
            batch=settings.batch,
            readers=16,
        )
        network = model.network.to(memory_format=torch.channels_last)
        with numerics(cores()), kept_memory(), torch.inference_mode():
            for batch in batches:
                network(batch.images.permute(0, 3, 1, 2).float())
        decoder.close()
    print(json.dumps(peak()))


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "", images="", runs="resnet18:224:640,squeezenet1_1:64:10000,squeezenet1_1:64:100000", child=""
    )
    if args.child:
        what, name, crop, count, paths = args.child.split(",")
        one(what, name, paths, int(count), int(crop))
        return
    sources = sorted(path.resolve() for path in photographs(args.images).rglob("*") if path.is_file())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for item in args.runs.split(","):
            name, crop, count = item.split(":")
            paths = Path(folder) / "paths.txt"
            many = islice(sources * (int(count) // len(sources) + 1), int(count))
            paths.write_text("".join(f"{path}\n" for path in many))
            peaks = {}
            for what in ("bare", "scan"):
                child = f"{what},{name},{crop},{count},{paths}"
                run = subprocess.run(
                    [sys.executable, __file__, "--child", child], check=True, capture_output=True, text=True
                )
                peaks[what] = float(run.stdout.splitlines()[-1])
            rows.append((name, int(crop), int(count), peaks["bare"], peaks["scan"], peaks["scan"] - peaks["bare"]))
    columns = ("network", "crop", "images", "network and loader MB", "scan MB", "difference MB")
    finish("memory", columns, rows, {}, args.json)


if __name__ == "__main__":
    main()
