"""Starting scans or going on with them: what is asked for and what is on disk to stores and the jobs that fill them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from maxact import packed, run_ray
from maxact.catalog import Catalog, Shard, is_dataset
from maxact.config import RunConfig, ScanConfig
from maxact.dense import FOLDER, size
from maxact.errors import MaxactError
from maxact.find import Found
from maxact.local import call
from maxact.manifest import Manifest, shorten
from maxact.models import Model
from maxact.numerics import has_bf16
from maxact.pooled import disk_bytes
from maxact.probe import fitting_together, probe
from maxact.process import show_bytes
from maxact.provenance import describe_source, versions
from maxact.scan import Job
from maxact.store import Store

T = TypeVar("T")
log = logging.getLogger("maxact")
_CHOSEN = ("precision", "batch", "shard", "compile")  # chosen when a store is started, and kept


@dataclass(frozen=True)
class Source:
    """Which images are asked for (`Catalog.build`)."""

    images: object
    where: tuple[str, ...] = ()
    sample: int | None = None
    seed: int = 0
    limit: int | None = None

    def catalog(self, report: Callable[[int], None]) -> Catalog:
        """Lists them, and reports how many have been found."""
        return Catalog.build(
            self.images, where=self.where, sample=self.sample, seed=self.seed, limit=self.limit, report=report
        )

    def describe(self, count: int, packs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What a store says of them, and of the packs that they lie in (`packed.describe`)."""
        return {
            "source": describe_source(self.images),
            "where": list(self.where),
            "sample": self.sample,
            "seed": self.seed if self.sample is not None else 0,
            "limit": self.limit,
            "count": count,
            **({"packed": list(packs)} if packs else {}),
        }


@dataclass(frozen=True)
class Start:
    """One network and the store that it is to have; `settings` hold None for what may be chosen."""

    path: Path
    model: Model
    found: Found
    settings: ScanConfig


def start(
    starts: Sequence[Start], source: Source, catalog: Catalog | None, run: RunConfig, device: torch.device
) -> list[tuple[Store, Job]]:
    """The stores, each started or found to be that of the same scan, and the jobs that fill them.

    All have one catalog, batch and shard: those of the stores that are there, or `catalog` and what suits every
    network. Raises MaxactError where a store was made otherwise.
    """
    there = {} if run.overwrite else {each.path: Store(each.path) for each in starts if Store.exists(each.path)}
    shared: dict[str, Any] = {}
    if there:
        first, *others = there.values()
        catalog = first.catalog
        shared = {name: first.manifest.settings[name] for name in ("batch", "shard", "hardware_share")}
        for other in others:
            _check_alike(first, other)
            other.catalog = first.catalog  # one in memory is enough
    assert catalog is not None
    catalog = Catalog(catalog.table, source.images if is_dataset(source.images) else None)
    opened: dict[Path, tuple[Store, Job]] = {}
    for each in starts:
        if each.path in there:
            store = there[each.path]
            saved = store.manifest.settings
            kept = {name: saved[name] for name in _CHOSEN if getattr(each.settings, name) is None}
            settings = replace(each.settings, **kept).resolve(device, len(catalog))
            if None in (each.settings.hardware_share, settings.hardware_share):  # not asked for, or not had here
                settings = replace(settings, hardware_share=saved["hardware_share"])
            images = source.describe(len(catalog), store.manifest.images.get("packed", ()))
            _check_same(store, _manifest(each, images, settings, device))
            store.start_pooled()
            opened[each.path] = store, _job(each, catalog, settings, run, device)
    _check_room(starts, there, len(catalog))
    fresh = [each for each in starts if each.path not in there]
    jobs = {}
    for each in fresh:
        wanted = replace(each.settings, **{name: value for name, value in shared.items() if _free(each, name)})
        jobs[each.path] = _probe(_job(each, catalog, wanted, run, device))
    if fresh:
        smallest = min(job.settings.batch or 0 for job in jobs.values())
        if device.type == "cuda" and len(starts) > 1:
            several = [*(job for _, job in opened.values()), *jobs.values()]
            fixed = bool(shared) or any(each.settings.batch is not None for each in fresh)
            smallest = _try(run, lambda own: fitting_together([job.on(own) for job in several], smallest, fixed))
        images = source.describe(len(catalog), packed.describe(catalog.table))
        for each in fresh:
            job = jobs[each.path]
            settings = replace(job.settings, batch=smallest, shard=each.settings.shard or shared.get("shard"))
            settings = settings.resolve(device, len(catalog))
            if Store.exists(each.path):
                Store.remove(each.path)
            manifest = _manifest(each, images, settings, device)
            store = Store.create(each.path, manifest, catalog)
            store.start_pooled()
            _log_start(manifest, each.found, device)
            opened[each.path] = store, replace(job, settings=settings)
    if len(starts) > 1 and not all(store.manifest.finished for store, _ in opened.values()):
        _log_decodings(starts, [opened[each.path][1] for each in starts])
    return [opened[each.path] for each in starts]


def _free(each: Start, name: str) -> bool:
    return getattr(each.settings, name) is None


def _job(each: Start, catalog: Catalog, settings: ScanConfig, run: RunConfig, device: torch.device) -> Job:
    # workers need not have this process's working directory
    store = each.path.absolute() if settings.pooled else None
    return Job(each.model.network, each.model.preprocess, each.found.taps, catalog, settings, run, device, store)


def _probe(job: Job) -> Job:
    """See `probe`; on a GPU or a cluster where the work will be."""
    compiles = job.settings.resolve(job.device, len(job.catalog)).compile
    if job.device.type == "cpu" and not (compiles and job.run.cluster):
        return probe(job)
    return replace(job, settings=_try(job.run, lambda own: probe(job.on(own)).settings))


def _try(run: RunConfig, function: Callable[[RunConfig], T]) -> T:
    """What a function gives as the first worker runs: in a process of its own, for DALI keeps the memory that it has
    had, or on a cluster in one of its workers."""
    if run.cluster is not None:
        return run_ray.call(run, function)
    own = run.each()[0]
    return call(own.devices, 3 * run.stall, function, own)


def _manifest(each: Start, images: dict[str, Any], settings: ScanConfig, device: torch.device) -> Manifest:
    return Manifest(
        model={"name": each.model.name, "weights": each.model.weights, "sha256": each.model.sha256},
        preprocessing=each.model.preprocess.to_json(),
        images=images,
        settings=settings.to_json(),
        taps=each.found.taps,
        versions=versions(device),
    )


def _check_same(store: Store, wanted: Manifest) -> None:
    if differences := store.manifest.differences(wanted):
        raise MaxactError(
            f"{store.path}: was made otherwise ({'; '.join(differences)}); "
            "give the same arguments, another store, or --overwrite"
        )


def _check_room(starts: Sequence[Start], there: dict[Path, Store], images: int) -> None:
    """Raises MaxactError where the values of every image that is left, if they are to be kept, may not fit on the disk
    (the stores of one scan are on one)."""
    needs: dict[Path, int] = {}
    freed = 0  # of what is to be overwritten
    for each in starts:
        if not each.settings.pooled:
            continue
        if store := there.get(each.path):
            left = _left(store)
            count = sum(shard.stop - shard.start for shard in left)
            freed += disk_bytes(each.path, {shard.index for shard in left})  # written, but not committed
        else:
            count = images
            freed += disk_bytes(each.path)
        needs[each.path] = size(count, each.found.channels)
    need = sum(needs.values())
    if not need:
        return
    path = max(needs, key=needs.__getitem__)
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free + freed
    if need > free:
        whose = "" if len(needs) == 1 else ", and those of the other networks,"
        raise MaxactError(
            f"{path}: the {FOLDER} values of the images to scan{whose} take up to {show_bytes(need)} and "
            f"{show_bytes(free)} are free (compression, which saves some, is not counted on); "
            f"make room, choose fewer --layers or leave --pooled out"
        )


def _left(store: Store) -> list[Shard]:
    """The shards that are not committed."""
    if store.manifest.finished:
        return []
    state = store.state()
    done = state.shards if state else frozenset()
    return [shard for shard in store.catalog.shards(store.shard) if shard.index not in done]


def _check_alike(store: Store, other: Store) -> None:
    """Raises MaxactError for stores that cannot be filled together."""
    same = all(store.manifest.settings[name] == other.manifest.settings[name] for name in ("batch", "shard"))
    if not same or not store.catalog.table.equals(other.catalog.table):
        what = "images" if same else "batches or shards"
        raise MaxactError(f"{other.path}: has other {what} than {store.path}; scan these networks apart")


def _log_decodings(starts: Sequence[Start], jobs: Sequence[Job]) -> None:
    """Says how often an image is decoded, and why not once."""
    ways: dict[Any, list[str]] = {}
    for each, job in zip(starts, jobs, strict=True):
        ways.setdefault(job.pixels, []).append(each.path.stem)
    if len(ways) == 1:
        log.info("every image is decoded once for all of them")
        return
    terms = [
        preprocess.to_json() | {"decoder": decoder, "hardware_share": share} for decoder, share, preprocess in ways
    ]
    differing = [name for name in terms[0] if len({str(each[name]) for each in terms}) > 1]
    words = [
        f"{', '.join(names)} ({', '.join(f'{name} {shorten(own[name])}' for name in differing)})"
        for names, own in zip(ways.values(), terms, strict=True)
    ]
    log.warning("every image is decoded %d times, for they want other pixels: %s", len(ways), "; ".join(words))


def _log_start(manifest: Manifest, found: Found, device: torch.device) -> None:
    settings = manifest.settings
    log.info(
        "%s (weights %s), %d taps with %d channels, %d images, %s on %s, batches of %d%s",
        manifest.model["name"],
        manifest.model["weights"],
        len(found.taps),
        found.channels,
        manifest.images["count"],
        settings["precision"],
        device,
        settings["batch"],
        ", compiled" if settings["compile"] else "",
    )
    if settings["precision"] == "bf16" and device.type == "cpu" and not has_bf16():
        log.warning("this processor does not multiply in bfloat16, so fp32 is faster here")
    smallest = min((pack["settings"]["short_side"] for pack in manifest.images.get("packed", ())), default=None)
    if smallest and smallest < manifest.preprocessing["resize"] and not manifest.preprocessing["function"]:
        log.warning("packed at a short side of %d, below the network's %d", smallest, manifest.preprocessing["resize"])
    if found.idle:
        log.info("never run by the network, so left out: %s", ", ".join(found.idle))
