"""The stages of a scan, each by itself and all together, as things that can be timed.

Each function gives a `Measure`: called with a number of batches it works on so many and gives what an image cost. What
it needs is made before, and what it works on lies in memory. The scan itself is in loops.py.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maxact.catalog import Catalog, Entry, Shard
from maxact.compiled import compile_for
from maxact.config import Precision, cores
from maxact.decode import choose_decoder
from maxact.errors import MaxactError
from maxact.fetch import failure
from maxact.fields import of_taps
from maxact.loops import BLOCK, Cost, Measure, Stopwatch
from maxact.manifest import Manifest
from maxact.models import Normalised
from maxact.partial import BadImage, Partial
from maxact.preprocess import one_line
from maxact.provenance import versions
from maxact.scan import Job, decoder_of
from maxact.store import Store
from maxact.taps import DTYPES, Pending, Taps
from maxact_kernels.peaks import Peaks

WARM_UP = 1  # batches of a stage that do not count, after other stages have run
_BEHIND = 2  # batches of which the peaks may still be on their way, as in a scan
_KEPT = 8  # batches of files in memory
_KEPT_BYTES = 256 << 20  # but no more than this, and one batch
_SPREAD = 0.1  # standard deviation of the factors that make other images' peaks of those that there are


@dataclass(frozen=True)
class Sample:
    """Some batches of images in memory: `files` as they are read, `images` the same decoded, on the device."""

    files: tuple[list[object], ...]
    images: tuple[torch.Tensor, ...]


def gather(job: Job) -> Sample:
    """Reads and decodes images for the other stages, those that cannot be read left out.

    Raises MaxactError where not one can be used.
    """
    batch = _batch(job)
    files: list[object] = []
    bad: list[BadImage] = []
    size = 0
    for entry in job.catalog.entries(0, min(len(job.catalog), _KEPT * batch)):
        try:
            file = job.catalog.read(entry)
        except MaxactError:
            raise
        except Exception as error:  # as in the loader
            bad.append(failure(entry, error))
            continue
        size += len(file) if isinstance(file, bytes) else math.prod(job.preprocess.shape)
        files.append(file)
        if size > _KEPT_BYTES and len(files) >= batch:
            break
    count = max(1, len(files) // batch)
    batches = tuple([*islice(cycle(files), index * batch, (index + 1) * batch)] for index in range(count))
    images = []
    with closing(decoder_of(job, job.device)) as decoder:
        for part in batches if files else ():
            decoder.submit(part)
            decoded = decoder.collect()
            bad += [BadImage(-1, "", "decode", reason) for reason in decoded.errors.values()]
            if len(decoded.errors) < batch:
                images.append(decoded.images)
    if not images:
        raise MaxactError(f"not one of the images that were tried could be used ({bad[0].error})")
    return Sample(batches, tuple(images))


def read(job: Job) -> Measure:
    """Files into memory, through as many threads as the scan has for it, from wherever they are: the disk, or what
    the system remembers of it. It goes on through the catalog where it has stopped."""
    entries = _endless(job.catalog)

    def one(entry: Entry) -> None:
        with suppress(Exception):  # a bad image costs what it costs
            job.catalog.read(entry)

    def run(batches: int) -> Cost:
        images = [*islice(entries, batches * _batch(job))]
        with ThreadPoolExecutor(job.run.readers) as pool:
            watch = Stopwatch()
            for _ in pool.map(one, images):
                pass
            return watch.per(len(images))

    return run


def _endless(catalog: Catalog) -> Iterator[Entry]:
    while True:
        for start in range(0, len(catalog), BLOCK):
            yield from catalog.entries(start, min(start + BLOCK, len(catalog)))


def decode(job: Job, files: Sequence[list[object]]) -> Measure:
    """The decoder alone, on files in memory, with as many batches in flight as in a scan."""
    device = torch.device("cpu") if is_copied(job) else job.device

    def run(batches: int) -> Cost:
        source = cycle(files)
        with closing(decoder_of(job, device)) as decoder:
            for _ in range(WARM_UP):
                decoder.submit(next(source))
                decoder.collect()
            _synchronise(device)
            watch = Stopwatch()
            for index in range(batches):
                if index >= decoder.depth:
                    decoder.collect()
                decoder.submit(next(source))
            for _ in range(min(decoder.depth, batches)):
                decoder.collect()
            _synchronise(device)
            return watch.per(batches * _batch(job))

    return run


def is_copied(job: Job) -> bool:
    """Whether decoded images have to be copied to the device."""
    settings = job.settings
    pictures = job.catalog.dataset is not None
    return job.device.type == "cuda" and choose_decoder(settings.decoder, job.preprocess, pictures) == "torchvision"


def copying(images: Sequence[torch.Tensor]) -> Measure:
    """Decoded images to the device, as the decoder that has them in host memory sends them."""
    device = images[0].device
    host = [batch.cpu().pin_memory() for batch in images]

    def run(batches: int) -> Cost:
        source = cycle(host)
        next(source).to(device, non_blocking=True)
        _synchronise(device)
        watch = Stopwatch()
        for _ in range(batches):
            next(source).to(device, non_blocking=True)
        _synchronise(device)
        return watch.per(batches * len(host[0]))

    return run


def forward(network: Callable[[torch.Tensor], Any], images: Sequence[torch.Tensor], precision: Precision) -> Measure:
    """A network on batches in memory, on their device."""
    device, dtype = images[0].device, DTYPES[precision]

    def run(batches: int) -> Cost:
        source = cycle(images)
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for _ in range(WARM_UP):
                network(next(source))
            _synchronise(device)
            watch = Stopwatch()
            for _ in range(batches):
                network(next(source))
            _synchronise(device)
            return watch.per(batches * len(images[0]))

    return run


def tapped(taps: Taps, images: Sequence[torch.Tensor]) -> Measure:
    """A network with its taps on batches in memory, its peaks in host memory in the end."""

    def run(batches: int) -> Cost:
        source = cycle(images)
        for _ in range(WARM_UP):
            taps(next(source)).result()
        pending: deque[Pending] = deque()
        watch = Stopwatch()
        for _ in range(batches):
            pending.append(taps(next(source)))
            if len(pending) > _BEHIND:
                pending.popleft().result()
        for peaks in pending:
            peaks.result()
        return watch.per(batches * len(images[0]))

    return run


def heaps(job: Job, peaks: Sequence[Peaks]) -> Measure:
    """The counting of whole shards, each from empty heaps to its result, and merging those.

    Further images' peaks are made of those that there are, by a factor for each image: else few would enter.
    """
    size = job.settings.shard or 1
    draw = np.random.default_rng(0)

    def run(batches: int) -> Cost:
        source = cycle(peaks)
        wall = cpu = 0.0
        result: Partial | None = None
        count = math.ceil(batches * _batch(job) / size)
        for shard in (Shard(index, index * size, (index + 1) * size) for index in range(count)):
            tally = job.tally(shard)
            for start in range(shard.start, shard.stop, _batch(job)):
                numbers = np.arange(start, start + _batch(job))
                others = _others(next(source), draw)
                watch = Stopwatch()
                tally.add(others, numbers)
                cost = watch.per(1)
                wall, cpu = wall + cost.wall, cpu + cost.cpu
            watch = Stopwatch()
            partial = tally.close()
            result = partial if result is None else result.merge(partial)
            cost = watch.per(1)
            wall, cpu = wall + cost.wall, cpu + cost.cpu
        return Cost(wall / (count * size), cpu / (count * size))

    return run


def _others(peaks: Peaks, draw: np.random.Generator) -> Peaks:
    factors = (1 + _SPREAD * draw.standard_normal((len(peaks.max), 1))).astype(np.float32)
    return replace(peaks, max=peaks.max * factors, mean=peaks.mean * factors)


@dataclass(frozen=True)
class Writing:
    """Seconds that it takes to start a store, to commit a state of the scan, and to finish the store."""

    create: float
    commit: float
    finish: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.create + self.commit + self.finish


def store(job: Job, peaks: Peaks) -> Callable[[], tuple[Writing, Cost]]:
    """A store of the scan, in a temporary folder: started, committed once, finished; and the cost of that for each
    image of the catalog."""
    tally = job.tally(Shard(0, 0, _batch(job)))
    tally.add(peaks, np.arange(len(peaks.max)))
    partial = tally.close()
    catalog = job.catalog
    manifest = Manifest(
        model={"name": type(job.network).__name__, "weights": "", "sha256": ""},
        preprocessing=job.preprocess.to_json(),
        images={"source": "", "where": [], "sample": None, "seed": 0, "limit": None, "count": len(catalog)},
        settings=job.settings.to_json(),
        taps=job.taps,
        versions=versions(job.device),
    )

    def run() -> tuple[Writing, Cost]:
        with tempfile.TemporaryDirectory(prefix="maxact-") as folder:
            watch = Stopwatch()
            made = Store.create(Path(folder) / "bench.zarr", manifest, catalog)
            create = watch.per(1).wall
            made.commit(partial)
            commit = watch.per(1).wall - create
            made.finish(partial, of_taps(job.network, job.taps, job.preprocess.crop))
            finish = watch.per(1).wall - create - commit
            return Writing(create, commit, finish), watch.per(len(catalog))

    return run


def twin(network: nn.Module) -> nn.Module:
    """The same network with the same weights, for hooks and compilers of its own. Raises MaxactError where it cannot
    be copied."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    try:
        return copy.deepcopy(network, dict(shared))
    except Exception as error:  # whatever a module of the user's has in it
        raise MaxactError(f"the network cannot be copied, as measuring it needs ({one_line(error)})") from error


def bare(job: Job, compiled: bool = False) -> Callable[[torch.Tensor], Any]:
    """The network of a job without taps, on its device, in the scan's memory format, from pixels on."""
    network = _normalised(job)
    if not compiled:
        return network
    made: Callable[[torch.Tensor], Any] = compile_for(network, job.device)
    return made


@contextmanager
def taps_of(job: Job) -> Iterator[Taps]:
    """The network of a job with its taps, made once."""
    assert job.settings.precision
    threads, compiled = job.run.threads or cores(), bool(job.settings.compile)
    with Taps(_normalised(job), job.taps, job.settings.precision, threads, compiled) as taps:
        yield taps


def _normalised(job: Job) -> Normalised:
    network = Normalised(twin(job.network), job.preprocess)
    network.to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _batch(job: Job) -> int:
    assert job.settings.batch
    return job.settings.batch


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
