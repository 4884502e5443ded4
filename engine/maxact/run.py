"""Running a pass on this machine: settings to a job, a job to a finished store."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from maxact import taps
from maxact.catalog import Catalog, Shard, is_dataset
from maxact.config import At, DecoderName, Precision, RunConfig, ScanConfig, Score
from maxact.decode import choose_decoder
from maxact.errors import MaxactError, UsageError
from maxact.fields import of_taps
from maxact.manifest import Manifest
from maxact.models import Model, load_model
from maxact.partial import Partial
from maxact.process import Interrupted, Progress, log_file, signals
from maxact.provenance import describe_source, versions
from maxact.scan import Job, Tick
from maxact.scan import scan as scan_shards
from maxact.schedule import Schedule
from maxact.store import Store

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
    device: str = "auto",
    threads: int | None = None,
    readers: int = 16,
    decode_threads: int | None = None,
    max_bad: int | None = None,
    retry_errors: bool = False,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    native_log: bool = False,
) -> Store:
    """Scans images through a network and keeps, for every channel of every tap, the strongest peaks.

    network: a torchvision name, `timm:NAME`, `package.module:callable`, or an nn.Module (`models.load_model`, which
        also takes weights, resize, crop, mean, std, interpolation, fit and preprocess). It is moved to the device
        and to the memory format channels_last, and left there: a module of yours too.
    images: a folder, glob, list, tar archives or Parquet files, or a map-style Dataset (`Catalog.build`, which also
        takes where, sample, seed and limit). Its `__getitem__`, and a preprocess function, are called from several
        threads at once.
    store: the folder of the result. Where there is one already, an unfinished scan of the same arguments goes on, a
        finished one is only opened; of other arguments it is refused. `overwrite` starts again.
    layers, at: what is recorded, and where in a layer's chain (`taps.find`).
    score: `max`, `mean` or both; what ranks an image in a channel. top, bottom: how many to keep at either end.
    precision: of the network; float32 on a CPU and float16 on CUDA unless told otherwise. batch: images in a batch;
        shard: images between two points at which the scan can go on, rounded up to batches; both are kept for the
        life of the store.
    decoder: `dali`, `torchvision`, or DALI where it can be had. max_megapixels: larger images count as bad.
        skip_grey leaves out pictures without colour.
    device, threads, readers, decode_threads: where and with how many threads it runs.
    max_bad: bad images that are borne before the run stops; 1 % unless told otherwise, but at least 10.
        retry_errors: scan the shards of recorded errors again.
    report: called after every batch, with how far it is.
    native_log: for a process that does nothing else, as the command line is: what C libraries print to standard
        error goes to the log of the run, STORE/run/log, too.

    In the main thread SIGINT and SIGTERM commit what is finished, then raise Interrupted. Raises UsageError for
    arguments that cannot be meant, and MaxactError for all else that the caller can mend.
    """
    wanted = ScanConfig(
        layers=_items(layers),
        at=at,
        scores=cast(tuple[Score, ...], _items(score)),
        top=top,
        bottom=bottom,
        precision=precision,
        batch=batch,
        shard=shard,
        decoder=decoder,
        max_megapixels=max_megapixels,
        skip_grey=skip_grey,
    )
    run = RunConfig(device, threads, readers, decode_threads, max_bad, retry_errors, overwrite)
    model = load_model(
        network,
        weights=weights,
        resize=resize,
        crop=crop,
        mean=mean,
        std=std,
        interpolation=interpolation,
        fit=fit,
        preprocess=preprocess,
    )
    # all that can be wrong with the arguments is found before anything is on disk
    target = run.torch_device()
    chosen = choose_decoder(wanted.decoder, model.preprocess, is_dataset(images))
    wanted = replace(wanted, decoder=cast(DecoderName, chosen))
    if skip_grey and model.preprocess.function:
        raise UsageError(
            f"skip_grey: cannot be had with the preprocess function {model.preprocess.function}; leave one out"
        )
    found = taps.find_taps(model, wanted.layers, wanted.at)
    labels = _items(where)
    selection = {"where": list(labels), "sample": sample, "seed": seed if sample is not None else 0, "limit": limit}
    catalog = None
    if overwrite or not Store.exists(store):
        catalog = Catalog.build(images, where=labels, sample=sample, seed=seed, limit=limit)
    with Store.lock(store), log_file(Path(store) / "run" / "log", native_log):
        opened, job = _open(Path(store), model, found, images, selection, catalog, wanted, run, target)
        return _run(opened, job, report)


def _items(value: str | Sequence[str]) -> tuple[str, ...]:
    """Text is one item; what comes twice counts once."""
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))


def _open(
    path: Path,
    model: Model,
    found: taps.Found,
    images: object,
    selection: dict[str, Any],
    catalog: Catalog | None,
    wanted: ScanConfig,
    run: RunConfig,
    device: torch.device,
) -> tuple[Store, Job]:
    """The store, started or found to be that of the same scan, and the job that fills it."""
    fresh = run.overwrite or not Store.exists(path)
    if fresh:
        assert catalog is not None
        if Store.exists(path):
            Store.remove(path)
        settings = wanted.resolve(device)
        count = len(catalog)
    else:
        store = Store(path)
        saved = store.manifest.settings
        chosen = {name: saved[name] for name in ("precision", "batch", "shard") if getattr(wanted, name) is None}
        settings = replace(wanted, **chosen)
        settings = settings.resolve(device)
        count = store.manifest.images["count"]
    manifest = Manifest(
        model={"name": model.name, "weights": model.weights, "sha256": model.sha256},
        preprocessing=model.preprocess.to_json(),
        images={"source": describe_source(images), **selection, "count": count},
        settings=settings.to_json(),
        taps=found.taps,
        versions=versions(device),
    )
    if fresh:
        assert catalog is not None
        store = Store.create(path, manifest, catalog)
        _log_start(manifest, found, device)
    elif differences := store.manifest.differences(manifest):
        raise MaxactError(
            f"{path}: was made otherwise ({'; '.join(differences)}); "
            "give the same arguments, another store, or --overwrite"
        )
    job = Job(
        model.network,
        model.preprocess,
        found.taps,
        Catalog(store.catalog.table, images if is_dataset(images) else None),
        settings,
        run,
        device,
    )
    return store, job


def _run(store: Store, job: Job, report: Callable[[Progress], None]) -> Store:
    """Scans what is left of a store and finishes it."""
    if store.manifest.finished and not (job.run.retry_errors and store.bad_in_scan()):
        store.tidy()
        log.info("%s: done already, %d images", store.path, len(job.catalog))
        return store
    allowed = job.run.allowed_bad(len(job.catalog))
    schedule = Schedule[Partial](store, retry_errors=job.run.retry_errors, allowed_bad=allowed)
    if store.manifest.finished:
        store.reopen()
    before = schedule.images_done
    progress = Progress(len(job.catalog), before)
    if before:
        log.info("%s: going on after %d of %d images", store.path, before, progress.total)

    def attempt(shards: Iterator[Shard]) -> Iterator[Partial]:
        nonlocal progress
        # what an attempt before this one had of a shard that it did not finish comes again
        done = schedule.images_done - before
        progress = replace(progress, done=done, bad=schedule.bad, grey=schedule.grey)
        return scan_shards(job, shards, schedule.stop, note, job.tally)

    begun = time.monotonic()

    def note(tick: Tick) -> None:
        nonlocal progress
        progress = replace(
            progress,
            done=progress.done + tick.images,
            bad=progress.bad + len(tick.bad),
            grey=progress.grey + tick.grey,
            waited=progress.waited + tick.waited,
            seconds=time.monotonic() - begun,
        )
        schedule.note(tick)
        report(progress)

    with signals(schedule.stop) as caught:
        schedule.run(attempt)
        if caught:
            name = signal.Signals(caught[0]).name
            done = f"{schedule.images_done} of {progress.total} images are committed"
            message = f"stopped by {name}: {done}; run the same again (without --overwrite) to go on"
            raise Interrupted(caught[0], message)
        store.finish(schedule.result, of_taps(job.network, job.taps, job.preprocess.crop))
    if not (store.manifest.summary or {})["scanned"]:
        first = store.errors().slice(0, 1).to_pylist()
        reason = f" ({first[0]['key']}: {first[0]['error']})" if first else ""
        raise MaxactError(f"{store.path}: not one of the {progress.total} images could be used{reason}")
    for tap in store:
        if unfit := store[tap].unfit:
            log.warning("%s: %d maps with NaN or infinity were left out", tap, unfit)
    return store


def _log_start(manifest: Manifest, found: taps.Found, device: torch.device) -> None:
    settings = manifest.settings
    log.info(
        "%s (weights %s), %d taps with %d channels, %d images, %s on %s, batches of %d",
        manifest.model["name"],
        manifest.model["weights"],
        len(found.taps),
        found.channels,
        manifest.images["count"],
        settings["precision"],
        device,
        settings["batch"],
    )
    if found.idle:
        log.info("never run by the network, so left out: %s", ", ".join(found.idle))
