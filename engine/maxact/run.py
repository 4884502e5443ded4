"""Scanning on this machine: arguments to stores and jobs, jobs to finished stores."""

from __future__ import annotations

import inspect
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from maxact.catalog import is_dataset
from maxact.config import At, DecoderName, Precision, RunConfig, ScanConfig, Score, items
from maxact.decode import choose_decoder
from maxact.errors import MaxactError, UsageError
from maxact.fields import of_taps
from maxact.find import find_taps
from maxact.local import attempts
from maxact.models import load_model
from maxact.partial import Partial
from maxact.process import Interrupted, Progress, listing, log_file, signals
from maxact.run_ray import joined
from maxact.scan import Job
from maxact.schedule import Schedule
from maxact.start import Source, Start, start
from maxact.store import Store
from maxact.tap import columns
from maxact.together import HAND_OVER, Parts, Scanning, Stores
from maxact.watch import Watch

log = logging.getLogger("maxact")


def scan(
    network: str | nn.Module,
    images: object,
    store: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    where: str | Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    layers: str | Sequence[str] = (),
    at: At = "norm",
    score: Score | Sequence[Score] = ("max",),
    top: int = 50,
    bottom: int = 0,
    pooled: Score | None = None,
    resize: int | None = None,
    crop: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    fit: str | None = None,
    preprocess: str | None = None,
    precision: Precision | None = None,
    batch: int | None = None,
    shard: int | None = None,
    decoder: DecoderName = "auto",
    max_megapixels: float = 200.0,
    skip_grey: bool = False,
    compile: bool | None = None,
    devices: str = "auto",
    threads: int | None = None,
    readers: int = 16,
    decode_threads: int | None = None,
    hardware_share: float | None = None,
    stall: float = 300.0,
    cluster: str | None = None,
    cpus_per_worker: int | None = None,
    max_bad: int | None = None,
    retry_errors: bool = False,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    native_log: bool = False,
) -> Store:
    """Scans images through a network and keeps, for every channel of every tap, the strongest peaks.

    network: a torchvision name, `timm:NAME`, `package.module:callable`, or an nn.Module (`models.load_model`, which
        also takes weights, resize, crop, mean, std, interpolation, fit and preprocess). On `cpu` it is
        moved to the memory format channels_last, and left so: a module of yours too.
    images: a folder, glob, list, tar archives or Parquet files, or a map-style Dataset (`Catalog.build`, which also
        takes where, sample, seed and limit). Its `__getitem__`, and a preprocess function, are called from several
        threads at once.
    store: the folder of the result. Where there is one already, an unfinished scan of the same arguments goes on, a
        finished one is only opened; of other arguments it is refused. `overwrite` starts again.
    layers, at: what is recorded, and where in a layer's chain (`find.find`).
    score: `max`, `mean` or both; what ranks an image in a channel. top, bottom: how many to keep at either end.
    pooled: `max` or `mean`: keep every image's value of every channel, too (`Store.pooled`); takes images x channels x
        2 bytes of disk, and what a shard has of them in memory.
    precision: of the network; float32 on a CPU and float16 on CUDA unless told otherwise. batch: images in a batch;
        shard: images between two points at which the scan can go on, rounded up to batches; both are kept for the
        life of the store.
    decoder: `dali`, `torchvision`, or DALI where it can be had. max_megapixels: larger images count as bad.
        skip_grey leaves out pictures without colour.
    compile: whether torch.compile makes one graph of the network and its taps; unless told otherwise on CUDA, and on a
        CPU for ten thousand images and more where it is faster. Kept for the life of the store.
    devices: where it runs: `cpu`; `cuda` (all of them), `cuda:0`, `cuda:0-7`, `cuda:0,cuda:2`; `cpu:4` is four workers
        on the CPU; `auto` is every CUDA device, or the CPU. Each has a process of its own (what is scanned is pickled
        for it), but for `cpu` alone, which is this process. A worker that dies, or is silent for `stall` seconds, is
        replaced.
    cluster: of Ray, `auto` or HOST:PORT: its nodes do the work (docs/clusters.md), a worker for each GPU, or for every
        `cpus_per_worker` CPUs (all of a node's, unless told otherwise) where there are none or devices is `cpu`.
    threads, readers, decode_threads: of each worker; the cores are shared unless told otherwise. hardware_share: of the
        JPEGs that a GPU's decoding hardware takes, where it has some; 0.65 there unless told otherwise.
    max_bad: bad images that are borne before the run stops; 1 % unless told otherwise, but at least 10.
        retry_errors: scan the shards of recorded errors again.
    report: called after every batch, with how far it is.
    native_log: for a process that does nothing else, as the command line is: what C libraries print to standard
        error goes to the log of the run, STORE/run/log, too.

    In the main thread SIGINT and SIGTERM commit what is finished, then raise Interrupted. Raises UsageError for
    arguments that cannot be meant, and MaxactError for all else that the caller can mend.
    """
    settings = {name: value for name, value in locals().items() if name not in ("network", "images", "store")}
    return _scan([network], images, [Path(store)], **(settings | {"weights": [weights]}))[0]


def scan_together(
    networks: Sequence[str | nn.Module] | Mapping[str, str | nn.Module],
    images: object,
    folder: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | None] | None = None,
    **settings: Any,
) -> tuple[Store, ...]:
    """Scans images through several networks, and reads and decodes each image once for all of them.

    Decoded once for those whose preprocessing differs in nothing but the normalisation, and once for each other way.
    Each network gets a store of its own, `folder/NAME.zarr` (see `store_path`), the same as a scan of its own with
    the same batch would give it; the scans can be stopped and continued together or apart.

    networks: named after themselves, or by the names in a mapping, as two checkpoints of one network have to be.
    weights: for each network, or for all. settings: as of `scan`; they are for all of the networks. Raises what
    `scan` raises, and UsageError for two networks of one name.
    """
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(scan).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if unknown := settings.keys() - defaults.keys():
        raise TypeError(f"scan_together() got an unexpected keyword argument {min(unknown)!r}")
    if not networks:
        raise UsageError("networks: expected at least one")
    several = isinstance(weights, Sequence) and not isinstance(weights, str)
    each = list(cast(Sequence[Any], weights)) if several else [weights] * len(networks)
    if len(each) != len(networks):
        raise UsageError(f"weights: expected one or {len(networks)}, got {len(each)}")
    if Store.exists(folder):
        raise MaxactError(f"{os.fspath(folder)}: is a store itself; the stores of several networks go into a folder")
    names, chosen = [*networks], [*networks.values()] if isinstance(networks, Mapping) else [*networks]
    paths = [store_path(folder, name) for name in names]
    if len(set(paths)) < len(paths):
        raise UsageError("networks: expected different names, for the stores bear them (NAME=MODEL gives others)")
    return tuple(_scan(chosen, images, paths, **(defaults | settings | {"weights": each})))


def store_path(folder: str | os.PathLike[str], network: str | nn.Module) -> Path:
    """Where `scan_together` puts a network's store: named after it, with what a file's name cannot bear as `_`."""
    name = network if isinstance(network, str) else type(network).__name__
    return Path(folder) / f"{name.replace('/', '_')}.zarr"


def _scan(networks: Sequence[str | nn.Module], images: object, paths: Sequence[Path], **given: Any) -> list[Store]:
    """`scan` for one or several networks; `given` are its arguments, weights one for each network."""
    with joined(RunConfig(**{each.name: given.pop(each.name) for each in fields(RunConfig)})) as run:
        return _scan_on(run, networks, images, paths, **given)


def _scan_on(
    run: RunConfig,
    networks: Sequence[str | nn.Module],
    images: object,
    paths: Sequence[Path],
    *,
    report: Callable[[Progress], None],
    native_log: bool,
    **given: Any,
) -> list[Store]:
    weights = given.pop("weights")
    labels = items(given.pop("where"))
    sample, seed, limit = (given.pop(name) for name in ("sample", "seed", "limit"))
    source = Source(images, labels, sample, seed, limit)
    wanted = ScanConfig(
        layers=items(given.pop("layers")),
        scores=cast(tuple[Score, ...], items(given.pop("score"))),
        **{
            name: given.pop(name)
            for name in (
                *("at", "top", "bottom", "precision", "batch", "shard", "decoder", "max_megapixels", "skip_grey"),
                *("compile", "hardware_share", "pooled"),
            )
        },
    )
    device = run.torch_device()
    # all that can be wrong with the arguments is found before anything is on disk
    starts = []
    for network, own, path in zip(networks, weights, paths, strict=True):
        model = load_model(network, weights=own, **given)  # what is left is about its preprocessing
        decoder = choose_decoder(wanted.decoder, model.preprocess, is_dataset(images))
        if wanted.skip_grey and (function := model.preprocess.function):
            raise UsageError(f"skip_grey: cannot be had with the preprocess function {function}; leave one out")
        found = find_taps(model, wanted.layers, wanted.at)
        starts.append(Start(path, model, found, replace(wanted, decoder=cast(DecoderName, decoder))))
    for path in paths:
        if run.overwrite and Store.exists(path):
            Store(path).check_alone()
    catalog = None
    if run.overwrite or not any(Store.exists(path) for path in paths):
        catalog = source.catalog(listing(report))
    with ExitStack() as resources:
        for path in paths:
            resources.enter_context(Store.lock(path))
            resources.enter_context(log_file(path / "run" / "log", native_log and path == paths[0]))
        opened = start(starts, source, catalog, run, device)
        _run([(store, job) for store, job in opened if not _is_done(store, job)], run, report)
        return [store for store, _ in opened]


def _is_done(store: Store, job: Job) -> bool:
    if not store.manifest.finished or (job.run.retry_errors and store.bad_in_scan()):
        return False
    store.tidy()
    log.info("%s: done already, %d images", store.path, len(job.catalog))
    return True


def _run(opened: Sequence[tuple[Store, Job]], run: RunConfig, report: Callable[[Progress], None]) -> None:
    """Scans what is left of some stores of one catalog and finishes them."""
    if not opened:
        return
    stores, jobs = [store for store, _ in opened], [job for _, job in opened]
    book, catalog = Stores(stores), jobs[0].catalog
    schedule = Schedule[Parts](book, retry_errors=run.retry_errors, allowed_bad=run.allowed_bad(len(catalog)))
    again = book.held() if run.retry_errors else ({},) * len(stores)
    done = [
        part.shards - held.keys() if part else frozenset[int]()
        for part, held in zip(book.begun.each, again, strict=True)
    ]
    for store in stores:
        if store.manifest.finished:
            store.reopen()
    # shards that are scanned again are handed over one by one, for each may turn out otherwise
    work = Scanning(tuple(jobs), tuple(done), again, patience=0.0 if run.retry_errors else HAND_OVER)
    watch = Watch(schedule, report)
    if before := schedule.images_done:
        log.info("%s: going on after %d of %d images", stores[0].path, before, schedule.images)
    with signals(schedule.stop) as caught:
        with attempts(work, run, schedule.stop, watch.note) as (attempt, watch.crew):
            schedule.run(partial(watch.attempt, attempt))
        if caught:
            name = signal.Signals(caught[0]).name
            words = f"{schedule.images_done} of {schedule.images} images are committed"
            message = f"stopped by {name}: {words}; run the same again (without --overwrite) to go on"
            raise Interrupted(caught[0], message)
        for store, job, part in zip(stores, jobs, schedule.result.each, strict=True):
            assert part is not None
            store.finish(part, of_taps(job.network, job.taps, job.preprocess.crop))
            _look_over(store, part)


def _look_over(store: Store, part: Partial) -> None:
    """Says what a finished store lacks. Raises MaxactError where it holds nothing."""
    if not (store.manifest.summary or {})["scanned"]:
        first = store.errors().slice(0, 1).to_pylist()
        reason = f" ({first[0]['key']}: {first[0]['error']})" if first else ""
        raise MaxactError(f"{store.path}: not one of the {len(store.catalog)} images could be used{reason}")
    if changed := sum(image.error.startswith("changed") for image in part.bad):
        log.warning("changed since they were catalogued: %d of the images; only --overwrite takes them in", changed)
    unfit = part.total().unfit
    for tap, first, end in columns(store.manifest.taps):
        if count := int(unfit[first:end].sum()):
            log.warning("%s: %d maps with NaN or infinity were left out", tap.name, count)
