"""Running the second pass on this machine: a finished store to settled winners, crops and projections."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import nn

from maxact import schedule, thumbs
from maxact.blocks import plan
from maxact.catalog import Catalog, is_dataset
from maxact.choose import choose_channels
from maxact.config import MOST_AT_ONCE, Crop, Method, ProjectConfig, RunConfig, ScanConfig, Seed, items
from maxact.errors import MaxactError, UsageError
from maxact.fetch import Unreadable, is_unread, look
from maxact.field import Field
from maxact.fields import of_taps
from maxact.files import writing
from maxact.find import find_taps
from maxact.ledger import Ledger
from maxact.local import attempts
from maxact.models import Model, load_model
from maxact.partial import BadImage
from maxact.preprocess import Preprocess
from maxact.process import Interrupted, Progress, Tick, log_file, show_bytes, signals
from maxact.project import Block, Job, Result
from maxact.project import project as project_blocks
from maxact.provenance import describe_source
from maxact.run_ray import joined
from maxact.run_settle import Settling
from maxact.settle import explained
from maxact.store import Store
from maxact.tap import Tap

log = logging.getLogger("maxact")
_SPARE = 16 << 20  # bytes of free space that a pass leaves alone
_THUMB = 0.33  # bytes that a pixel of the picture of an image takes at most, nearly always
_DEVIATES = (
    "scores differ from the stored ones by more than %s explains, up to %.2g of the score or of the channel's standard "
    "deviation: are the weights, the files, the decoder and the versions those of the scan?"
)
_ADVICE = "make room there and run the same again to go on"


def project(
    store: str | os.PathLike[str] | Store,
    *,
    network: nn.Module | str | None = None,
    weights: str | os.PathLike[str] | None = None,
    images: object | None = None,
    layers: str | Sequence[str] = (),
    channels: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    ranks: int = 9,
    method: Method | Sequence[Method] = ("deconvnet",),
    seed: Seed = "one",
    crop: Crop = "auto",
    max_size: int = 128,
    settle: bool = True,
    batch: int | None = None,
    devices: str = "auto",
    threads: int | None = None,
    readers: int = 16,
    stall: float = 300.0,
    cluster: str | None = None,
    cpus_per_worker: int | None = None,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    native_log: bool = False,
) -> Store:
    """Projects the winners of a finished scan back to pixels, and cuts out what they saw.

    store: of `maxact.scan`. The same call again goes on where one was stopped, and adds other layers and channels;
        with other settings it is refused, and `overwrite` starts the second pass again.
    network, weights: those that were scanned, where the store cannot name them (a module of yours, a file that has
        moved). images: the Dataset that was scanned, where it was one.
    layers: globs over taps; channels: numbers, of every tap or tap by tap; all unless told otherwise. ranks: how
        many winners of each list.
    method: `deconvnet`, `guided` or `gradient` (`deconv.Projector`), one or several. seed: the signal starts with 1,
        or with the activation.
    crop: `field` cuts out what a unit sees, `focus` a square around what the projection shows, `auto` the field
        unless it covers over half of the input. max_size: pixels of a crop's longer side.
    settle: after a scan in 16 bits, put the shown ranks in the order of float32 first.
    batch: images that the network runs on at once. devices, threads, readers, stall, cluster, cpus_per_worker: where
        and with how many threads, as of `maxact.scan`.
    report: called as it goes on, with how far it is.

    Gives the store as it is then. An image that cannot be had any more is recorded in errors.parquet, and its winners
    stay empty. In the main thread SIGINT and SIGTERM commit what is done, then raise Interrupted. Raises UsageError for
    arguments that cannot be meant, and MaxactError for all else that the caller can mend.
    """
    opened = store if isinstance(store, Store) else Store(store)
    if batch is not None and not 1 <= batch <= MOST_AT_ONCE:
        raise UsageError(f"batch: expected 1 to {MOST_AT_ONCE:,}, got {batch}")
    wanted = ProjectConfig(ranks, cast(tuple[Method, ...], items(method)), seed, crop, max_size, settle)
    asked = RunConfig(devices, threads, readers, stall=stall, cluster=cluster, cpus_per_worker=cpus_per_worker)
    if not opened.manifest.finished:
        raise MaxactError(f"{opened.path}: the scan is not finished; run `maxact scan` again first")
    if images is not None and (source := describe_source(images)) != opened.manifest.images["source"]:
        raise UsageError(f"images: expected what was scanned ({opened.manifest.images['source']}), got {source}")
    chosen = choose_channels(opened, items(layers), channels)
    model = scanned_model(opened, network, weights)
    with (
        joined(asked) as run,
        Store.lock(opened.path),
        log_file(opened.path / "run" / "log", native_log),
    ):
        target = run.torch_device()
        opened = Store(opened.path)  # as it is now that nobody else changes it
        dataset = images if is_dataset(images) else None
        pass_ = _Pass(opened, model, wanted, run, chosen, dataset, batch, report)
        pass_.open(overwrite)
        pass_.run(target)
    return Store(opened.path)


def scanned_model(store: Store, network: nn.Module | str | None, weights: str | os.PathLike[str] | None) -> Model:
    """The network of a store, loaded again. Raises MaxactError where it is another one by now."""
    made = store.manifest.model
    if network is None and ":" not in made["name"] and made["weights"] == "as given":
        raise MaxactError(f"{store.path}: was scanned with a module of yours ({made['name']}); give it as network")
    words = made["weights"]
    if weights is None and network is None:
        if words.startswith("file "):
            weights = words.removeprefix("file ")
        elif words.startswith("none"):
            weights = "none"
        elif not words.startswith(("timm ", "as ")):
            weights = words  # of torchvision
    model = load_model(network if network is not None else made["name"], weights=weights)
    if model.sha256 != made["sha256"]:
        raise MaxactError(
            f"{store.path}: was scanned with other weights ({words}) than those of {model.name} now "
            f"({model.weights}); give the ones that were scanned with --weights"
        )
    return replace(model, preprocess=Preprocess.from_json(store.manifest.preprocessing))


@dataclass(frozen=True)
class Projecting:
    """The second pass, as a worker does it."""

    job: Job
    patience: float = 0.0  # blocks are handed over one by one
    merge: None = None

    def on(self, run: RunConfig) -> Projecting:
        """The same for one worker."""
        return replace(self, job=self.job.on(run))

    def run(self, blocks: Iterator[Block], stop: threading.Event, report: Callable[[Tick], None]) -> Iterator[Result]:
        """See `project.project`."""
        return project_blocks(self.job, blocks, stop, report)

    def look(self) -> None:
        """Raises MaxactError where the images cannot be read from here."""
        look(self.job.catalog)


class _Pass:
    """One second pass over one store."""

    def __init__(
        self,
        store: Store,
        model: Model,
        settings: ProjectConfig,
        run: RunConfig,
        chosen: dict[str, list[int]],
        dataset: object | None,
        batch: int | None,
        report: Callable[[Progress], None],
    ) -> None:
        self._store, self._model, self._settings, self._run_config = store, model, settings, run
        self._chosen, self._batch, self._report = chosen, batch, report
        self._catalog = Catalog(store.catalog.table, dataset)
        self._taps = {tap.name: tap for tap in store.manifest.taps if tap.name in chosen}
        self._path = store.path / "run" / "projected.json"
        self._stop = threading.Event()
        self._deviation = 0.0  # in this run
        self._missing: dict[tuple[str, int], dict[int, BadImage]] = {}  # of each block, what it could not read

    def open(self, overwrite: bool) -> None:
        """Reads how far an earlier pass came. Raises MaxactError where that had other settings."""
        settings = self._settings.to_json() | {"methods": list(self._settings.methods)}
        ledger = None if overwrite else Ledger.load(self._path)
        if ledger is None and not overwrite and self._is_projected():
            raise MaxactError(
                f"{self._path}: is missing, and nothing else says how the winners were projected; bring it back, or "
                "give --overwrite to start the second pass again"
            )
        if ledger is None:
            ledger = Ledger(settings, clean=not overwrite)
        elif not ledger.done and ledger.settings != settings:  # begun, and nothing done: there is nothing to lose
            ledger = Ledger(settings, clean=False)
        if different := [
            f"{name}: {value}, not {settings.get(name)}"
            for name, value in ledger.settings.items()
            if value != settings.get(name)
        ]:
            raise MaxactError(
                f"{self._store.path}: was projected otherwise ({'; '.join(different)}); give the same settings, or "
                "--overwrite to start the second pass again"
            )
        self._ledger = ledger
        self._commit()  # before there is any array, or none any more
        if not ledger.clean:
            self._store.remove_winners()
            ledger.clean = True
            self._commit()

    def _is_projected(self) -> bool:
        """Whether some list has arrays of a second pass."""
        for name in self._store:
            for score, end in self._store.manifest.lists():
                with suppress(MaxactError):
                    self._store.winners(name, score, end)
                    return True
        return False

    def run(self, device: torch.device) -> None:
        """Settles, projects what is left, and finishes."""
        size = self._model.preprocess.crop
        fields = of_taps(self._model.network, list(self._taps.values()), size)
        with signals(self._stop) as caught:
            if self._settings.settle and self._store.manifest.settings["precision"] != "fp32":
                self._settle(device)
            if not self._stop.is_set():
                self._project(list(plan(self._store, self._chosen, fields, self._settings, self._ledger)), device)
                self._keep_pictures()
            if caught:
                name = signal.Signals(caught[0]).name
                raise Interrupted(caught[0], f"stopped by {name}: what is done is kept; run the same again to go on")
            self._finish()

    def _settle(self, device: torch.device) -> None:
        """Puts the ranks to be shown in the order of float32, where the scan was of 16 bits."""
        scanned = self._store.manifest.settings["batch"]
        # on a GPU, where the scan may have filled the memory, twice the bits want half the images
        batch = self._batch or (max(1, scanned // 2) if device.type == "cuda" else scanned)
        settling = Settling(self._store, list(self._taps.values()), self._settings.ranks, batch, self._catalog)
        if not settling.taps:
            return
        settling.run(self._model, self._run_config, self._stop, self._report)
        if self._stop.is_set():
            return
        self._ledger.bad |= {bad.image: replace(bad, stage="project") for bad in settling.bad}
        self._commit()  # before the lists: once they are settled, nobody tries those images again
        settling.write()
        self._compare(settling.deviation, self._store.manifest.settings["precision"])

    def _project(self, blocks: list[Block], device: torch.device) -> None:
        self._check_space(blocks)
        left = {block.index: block for block in blocks}
        progress = Progress(sum(block.winners for block in blocks), 0, stage="projecting", unit="winners")
        known, unlit, undefined = set(self._ledger.whole), 0, set[str]()
        begun = committed = time.monotonic()
        job = Job(
            self._model.network,
            self._model.preprocess,
            self._catalog,
            ScanConfig.from_json(self._store.manifest.settings),
            self._settings,
            self._run_config,
            device,
            self._batch or (32 if device.type == "cpu" else 128),
            self._convolutions(),
        )
        patience = schedule.Patience(self._stop)
        with attempts(Projecting(job), self._run_config, self._stop, lambda tick: None) as (attempt, crew):
            try:
                while left and not self._stop.is_set():
                    try:
                        for result in attempt(iter(list(left.values()))):
                            self._keep(result)
                            del left[result.block.index]
                            unlit += result.unlit
                            undefined |= result.undefined
                            patience.renew()
                            progress = replace(
                                progress,
                                done=progress.done + result.block.winners,
                                bad=len(self._ledger.bad),
                                seconds=time.monotonic() - begun,
                                hands=crew.hands if crew else (),
                            )
                            self._report(progress)
                            if time.monotonic() - committed >= schedule.COMMIT_SECONDS:
                                self._commit()
                                committed = time.monotonic()
                    except Unreadable as error:
                        patience.wait(error, self._commit)
            finally:
                self._commit()
        self._say(undefined, unlit, known)

    def _convolutions(self) -> list[tuple[Tap, Field]]:
        """Every convolution of the network with its field: only what winners need of their maps is computed."""
        network = self._model.network
        found = find_taps(self._model, at="module").taps
        chosen = [tap for tap in found if isinstance(network.get_submodule(tap.module), nn.Conv2d)]
        fields = of_taps(network, chosen, self._model.preprocess.crop)
        return [(tap, fields[tap.name]) for tap in chosen]

    def _keep(self, result: Result) -> None:
        """Writes a block; channels of it that an earlier run had done stay as they are."""
        block = result.block
        tap, score, end = block.place.rsplit("/", 2)
        winners = self._store.start_winners(tap, score, end, block.layout)
        stop = block.start + len(block.peaks.image)
        done = [
            channel - block.start for channel in self._ledger.done.get(block.place, ()) if block.start <= channel < stop
        ]
        if done:
            for name, values in result.arrays.items():
                values[done] = winners.read(name, block.start, stop)[done]
        with writing(self._store.path, _ADVICE):
            winners.write(block.start, result.arrays)
        for image in block.images:
            self._ledger.bad.pop(image, None)
        self._ledger.bad |= {bad.image: replace(bad, stage="project") for bad in result.bad}
        # what could not be read, now, is tried again by the next run
        missing = {bad.image: bad for bad in result.bad if is_unread(bad)}
        self._missing[block.place, block.start] = missing
        unread = np.any(np.isin(block.peaks.image, list(missing)), axis=1)
        self._ledger.add(block.place, [block.start + row for row in block.left.tolist() if not unread[row]])
        if result.whole:
            self._ledger.whole = sorted({*self._ledger.whole, block.tap.name})
        self._ledger.deviation = max(self._ledger.deviation, result.deviation)
        self._deviation = max(self._deviation, result.deviation)

    def _commit(self) -> None:
        """Makes what is done survive a loss of power: the arrays first, then the file that says that they are there."""
        os.sync()
        with writing(self._path, _ADVICE):
            self._ledger.save(self._path)

    def _check_space(self, blocks: list[Block]) -> None:
        """Says how much room the pass needs at most. Raises MaxactError where there is less."""
        if not blocks:
            return
        need = 0
        for block in blocks:
            rest = block.layout.arrays().values()
            row = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind, _, _ in rest)
            need += row * block.winners
        images = np.unique(np.concatenate([block.images for block in blocks]))
        need += round(len(images) * math.prod(self._model.preprocess.crop) * _THUMB)
        if (old := self._store.path / "thumbs.parquet").exists():
            need += old.stat().st_size  # it is replaced whole
        free = shutil.disk_usage(self._store.path).free
        winners = sum(block.winners for block in blocks)
        log.info(
            "%s: %d winners on %d images to project, at most %s to write (%s free)",
            *(self._store.path, winners, len(images), show_bytes(need), show_bytes(free)),
        )
        if need + _SPARE > free:
            raise MaxactError(
                f"{self._store.path}: needs up to {show_bytes(need + _SPARE)}, and {show_bytes(free)} are free; "
                "make room, or choose fewer with --layers, --channels, --ranks or a smaller --max-size"
            )

    def _say(self, undefined: set[str], unlit: int, known: set[str]) -> None:
        """What a user has to know of how the projections were made, once."""
        for name in sorted(undefined):
            log.warning("%s: has no rule of its own; its true gradient was used", name)
        if unlit:
            log.warning("%d winners have an activation of zero or less; their signal starts with 1", unlit)
        for name in sorted({*self._ledger.whole} - known):
            log.warning(
                "%s: a part of the image does not give the whole one's score here; whole images were used", name
            )
        precision = "fp32" if self._settings.settle else self._store.manifest.settings["precision"]
        self._compare(self._deviation, precision)

    def _compare(self, deviation: float, precision: str) -> None:
        """Says so where scores are not those of the scan."""
        if deviation > explained(precision, self._store.manifest.settings["hardware_share"] is not None):
            log.warning(_DEVIATES, precision, deviation)

    def _keep_pictures(self) -> None:
        """Keeps the pictures of all images that were projected."""
        used = [self._store.winning_images(place, channels) for place, channels in self._ledger.done.items()]
        numbers = np.unique(np.concatenate(used)) if used else np.empty(0, np.int64)
        wanted = [number for number in numbers.tolist() if number not in self._ledger.bad]
        begun, patience = time.monotonic(), schedule.Patience(self._stop)

        def note(done: int, total: int) -> None:
            seconds = time.monotonic() - begun
            self._report(Progress(total, 0, done, seconds=seconds, stage="keeping pictures of"))

        with self._store.inputs(self._catalog, self._run_config.readers) as inputs, writing(self._store.path, _ADVICE):
            while not self._stop.is_set():
                try:
                    bad = thumbs.update(self._store.path / "thumbs.parquet", wanted, inputs, self._stop, note)
                except Unreadable as error:
                    patience.wait(error, self._commit)
                    inputs.retry()
                    continue
                self._ledger.bad |= {image.image: replace(image, stage="project") for image in bad}
                return

    def _finish(self) -> None:
        """Keeps the errors, and what the pass was."""
        self._ledger.settled = self._store.settled_deviation()
        # what one block could not read and another one could is missing in the first one all the same
        missing = {image: bad for each in self._missing.values() for image, bad in each.items()}
        lost = missing | self._ledger.bad
        bad = sorted((replace(each, stage="project") for each in lost.values()), key=lambda image: image.image)
        self._store.finish_projection(bad, self._ledger.facts())
