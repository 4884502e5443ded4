"""What it costs to keep every image's value of every channel: compressors on real values, how fast shards are counted
and written with them and without, and what that adds to a scan."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import blosc
from numpy.typing import NDArray

from common import arguments, finish, interleaved, median, photographs, seconds
from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig, ScanConfig, cores
from maxact.dense import FOLDER, Grid, size
from maxact.find import find_taps
from maxact.models import load_model
from maxact.numerics import kept_memory
from maxact.pooled import create
from maxact.scan import Job, scan
from maxact.stages import twin
from maxact.tap import columns
from maxact_kernels.peaks import Peaks

# name -> whether a chunk is laid out channel by channel, and how Blosc takes it
COMPRESSORS: dict[str, tuple[bool, tuple[bytes, int, int] | None]] = {
    "raw": (False, None),
    "raw, by channel": (True, None),
    "lz4, bitshuffle": (False, (b"lz4", 5, blosc.BITSHUFFLE)),
    "lz4, bitshuffle, by channel (as it is)": (True, (b"lz4", 5, blosc.BITSHUFFLE)),
    "lz4, shuffle, by channel": (True, (b"lz4", 5, blosc.SHUFFLE)),
    "zstd 1, bitshuffle": (False, (b"zstd", 1, blosc.BITSHUFFLE)),
    "zstd 1, bitshuffle, by channel": (True, (b"zstd", 1, blosc.BITSHUFFLE)),
}


def repeated(catalog: Catalog, count: int) -> Catalog:
    """So many images: the same ones again and again."""
    return catalog.take(np.resize(np.arange(len(catalog)), count))


def through(job: Job) -> float:
    """Seconds per image of a scan, from the first batch on to the last shard's result."""
    begun: list[float] = []
    shards = iter(job.catalog.shards(job.settings.shard or 0))
    report: Callable[[object], None] = lambda tick: begun.append(time.perf_counter())  # noqa: E731
    for _ in scan([job], shards, threading.Event(), report, lambda shard: [job.tally(shard)]):
        end = time.perf_counter()
    return (end - begun[0]) / (len(begun) - 1) / (job.settings.batch or 1)


def start(folder: Path, job: Job) -> Job:
    """The job with a store in `folder` to write to."""
    assert job.settings.pooled and job.settings.shard
    group = zarr.create_group(folder, overwrite=True)
    create(group, job.taps, job.settings.pooled, len(job.catalog), job.settings.shard)
    return replace(job, store=folder)


def values_of(job: Job) -> NDArray[np.float16]:
    """The pooled values [images, channels] that a job wrote."""
    group: Any = zarr.open_group(job.store, mode="r", use_consolidated=False)
    return np.concatenate([group[f"{FOLDER}/{tap.name}/max"][:] for tap in job.taps], axis=1)


def compress(values: NDArray[np.float16], job: Job, way: tuple[bool, tuple[bytes, int, int] | None]) -> int:
    """The bytes that the values of a shard take, tap by tap and chunk by chunk as they are written; on one thread."""
    by_channel, kind = way
    total = 0
    for tap, first, end in columns(job.taps):
        grid = Grid(len(values), tap.channels)
        for left in range(first, end, grid.columns):
            for row in range(0, len(values), grid.rows):
                part = values[row : row + grid.rows, left : min(end, left + grid.columns)]
                chunk = np.ascontiguousarray(part.T if by_channel else part)
                total += len(chunk.tobytes() if kind is None else blosc.compress(chunk, *kind))
    return total


def count(job: Job, values: NDArray[np.float16], batch: int) -> tuple[float, float]:
    """Seconds that the counting of a shard takes, and what it takes to close it (with pooled values: to write it)."""
    tally = job.tally(Shard(0, 0, len(values)))
    wide = values.astype(np.float32)
    zeros = np.zeros_like(wide, np.int32)

    def add() -> None:
        for first in range(0, len(values), batch):
            rows = slice(first, first + batch)
            floats, ints = np.ascontiguousarray(wide[rows]), zeros[rows]
            tally.add(Peaks(floats, ints, floats, floats, floats, ints), np.arange(first, first + len(floats)))

    return seconds(add), seconds(tally.close)


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "",
        images="",
        model="maxact.demo:network",
        batch=32,
        shard=768,
        rounds=3,
        scanned=512,
        device="cpu",
        out=tempfile.gettempdir(),
    )
    device = torch.device(args.device)
    model = load_model(args.model, weights="DEFAULT" if ":" not in args.model else None)
    settings = ScanConfig(batch=args.batch, shard=args.shard, compile=False, pooled="max").resolve(device)
    photos = Catalog.build(photographs(args.images))
    taps, run = find_taps(model).taps, RunConfig(args.device, threads=cores())
    channels = sum(tap.channels for tap in taps)
    details: dict[str, object] = {"model": args.model, "channels": channels}
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(dir=args.out) as place, kept_memory():
        catalog = repeated(photos, args.shard)
        job = start(Path(place, "a"), Job(model.network, model.preprocess, taps, catalog, settings, run, device))
        through(job)
        values = values_of(job)
        mega = size(len(values), channels) / 1e6
        with ThreadPoolExecutor(1) as thread:  # in the main thread Blosc takes several of its own
            sizes = {name: thread.submit(compress, values, job, kind).result() for name, kind in COMPRESSORS.items()}
            ways: dict[str, Callable[[], float]] = {
                name: lambda kind=kind: thread.submit(seconds, lambda: compress(values, job, kind)).result()  # type: ignore[misc]
                for name, kind in COMPRESSORS.items()
            }
            times = interleaved(ways, args.rounds)
        for name, each in times.items():
            rows.append((f"compress, 1 thread: {name}", f"{mega / median(each):.0f} MB/s", sizes[name] / 1e6 / mega))
        details["compress"] = {name: {"seconds": each, "bytes": sizes[name]} for name, each in times.items()}
        plain = replace(job, settings=replace(settings, pooled=None))
        counted = interleaved(
            {"without": lambda: count(plain, values, args.batch), "with": lambda: count(job, values, args.batch)},
            args.rounds,
        )
        for name, pairs in counted.items():
            add, close = (median([pair[part] for pair in pairs]) for part in (0, 1))
            rows.append((f"count {name} pooled values", f"{len(values) / add:.0f} img/s", ""))
            rows.append((f"close {name} pooled values", f"{len(values) / close:.0f} img/s", f"{mega / close:.0f} MB/s"))
        details["count"] = counted
        few = replace(job, catalog=repeated(photos, args.scanned), settings=replace(settings, shard=args.scanned // 2))
        few = start(Path(place, "b"), few)
        bare = replace(few, settings=replace(few.settings, pooled=None), network=twin(few.network))
        scans = interleaved({"without": lambda: through(bare), "with": lambda: through(few)}, args.rounds)
        cost = median([one / other for one, other in zip(scans["with"], scans["without"], strict=True)])
        for name, each in scans.items():
            rows.append((f"scan {name} pooled values", f"{1 / median(each):.1f} img/s", cost if name == "with" else ""))
        details["scan"] = scans
    finish("pooled", ("what", "rate", "of raw / cost"), rows, details, args.json)


if __name__ == "__main__":
    main()
