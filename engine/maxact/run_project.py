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
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from maxact import crops, schedule, thumbs
from maxact.catalog import Catalog, is_dataset
from maxact.choose import choose_taps
from maxact.config import Crop, Method, ProjectConfig, RunConfig, Seed, cores
from maxact.errors import MaxactError, UsageError
from maxact.fetch import Unreadable
from maxact.field import Field
from maxact.fields import of_taps
from maxact.files import writing
from maxact.ledger import Ledger
from maxact.models import Model, load_model
from maxact.preprocess import Preprocess, near
from maxact.process import Interrupted, Progress, log_file, show_bytes, signals
from maxact.project import Block, Job, Result
from maxact.project import project as project_blocks
from maxact.provenance import describe_source
from maxact.results import Peaks
from maxact.run_settle import Settling
from maxact.settle import EXPLAINED
from maxact.store import Store
from maxact.tap import Tap
from maxact.winners import Layout

log = logging.getLogger("maxact")
_SPARE = 256 << 20  # bytes of free space that a pass leaves alone
_THUMB = 16 << 10  # bytes that the picture of an image takes at most, nearly always
_LARGEST_MAP = 32  # rows and columns of the activation maps that are kept
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
    device: str = "auto",
    threads: int | None = None,
    readers: int = 16,
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
    batch: images that the network runs on at once. device, threads, readers: where and with how many threads.
    report: called as it goes on, with how far it is.

    An image that cannot be had any more is recorded in errors.parquet, and its winners stay empty. In the main thread
    SIGINT and SIGTERM commit what is done, then raise Interrupted. Raises UsageError for arguments that cannot be
    meant, and MaxactError for all else that the caller can mend.
    """
    opened = store if isinstance(store, Store) else Store(store)
    wanted = ProjectConfig(ranks, cast(tuple[Method, ...], _items(method)), seed, crop, max_size, settle)
    run = RunConfig(device, threads, readers)
    target = run.torch_device()
    if not opened.manifest.finished:
        raise MaxactError(f"{opened.path}: the scan is not finished; run `maxact scan` again first")
    if images is not None and (source := describe_source(images)) != opened.manifest.images["source"]:
        raise UsageError(f"images: expected what was scanned ({opened.manifest.images['source']}), got {source}")
    chosen = _choose(opened, _items(layers), channels)
    model = scanned_model(opened, network, weights)
    with Store.lock(opened.path), log_file(opened.path / "run" / "log", native_log):
        dataset = images if is_dataset(images) else None
        pass_ = _Pass(opened, model, wanted, run, chosen, dataset, batch, report)
        pass_.open(overwrite)
        pass_.run(target)
    return Store(opened.path)


def _items(value: str | Sequence[str]) -> tuple[str, ...]:
    """Text is one item; what comes twice counts once."""
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))


def _choose(
    store: Store, layers: Sequence[str], channels: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, list[int]]:
    """The channels to project, by tap."""
    chosen = choose_taps(store, layers)
    taps = {tap.name: tap for tap in store.manifest.taps if tap.name in chosen}
    if isinstance(channels, Mapping) and (unknown := [name for name in channels if name not in set(store)]):
        raise UsageError(f"channels: {store.path} has no tap {unknown[0]!r}{near(unknown[0], list(store))}")

    def numbers(tap: Tap) -> Sequence[int]:
        if channels is None:
            return range(tap.channels)
        return channels.get(tap.name, ()) if isinstance(channels, Mapping) else channels

    picked = {name: sorted(c for c in set(numbers(tap)) if 0 <= c < tap.channels) for name, tap in taps.items()}
    if not any(picked.values()):
        raise UsageError(f"channels: expected some from 0 to {max(t.channels for t in taps.values()) - 1}")
    return picked


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

    def open(self, overwrite: bool) -> None:
        """Reads how far an earlier pass came. Raises MaxactError where that had other settings."""
        settings = self._settings.to_json() | {"methods": list(self._settings.methods)}
        ledger = None if overwrite else Ledger.load(self._path)
        if ledger is None:
            self._store.remove_winners()
            ledger = Ledger(settings)
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

    def run(self, device: torch.device) -> None:
        """Settles, projects what is left, and finishes."""
        size = self._model.preprocess.crop
        fields = of_taps(self._model.network, list(self._taps.values()), size)
        with signals(self._stop) as caught:
            if self._settings.settle and self._store.manifest.settings["precision"] != "fp32":
                self._settle(device)
            if not self._stop.is_set():
                self._project(list(self._plan(fields)), device)
            if caught:
                name = signal.Signals(caught[0]).name
                raise Interrupted(caught[0], f"stopped by {name}: what is done is kept; run the same again to go on")
            self._finish()

    def _settle(self, device: torch.device) -> None:
        """Puts the ranks to be shown in the order of float32, where the scan was of 16 bits."""
        batch = self._batch or self._store.manifest.settings["batch"]
        settling = Settling(self._store, list(self._taps.values()), self._settings.ranks, batch, self._catalog)
        if not settling.taps:
            return
        begun = time.monotonic()

        def note(done: int) -> None:
            seconds = time.monotonic() - begun
            self._report(Progress(len(settling.numbers), 0, done, seconds=seconds, stage="settling"))

        settling.run(self._model, self._run_config, device, self._stop, note)
        if self._stop.is_set():
            return
        self._ledger.bad |= {bad.image: replace(bad, stage="project") for bad in settling.bad}
        self._commit()  # before the lists: once they are settled, nobody tries those images again
        settling.write()
        precision = self._store.manifest.settings["precision"]
        if settling.deviation > EXPLAINED[precision]:
            log.warning(_DEVIATES, precision, settling.deviation)

    def _plan(self, fields: dict[str, Field]) -> Iterator[Block]:
        """The blocks in which something is left to do."""
        for name, tap in self._taps.items():
            results = self._store[name]
            for (score, end), peaks in results.lists.items():
                layout = self._layout(tap, fields[name], peaks, score)
                place = f"{name}/{score}/{end}"
                left = np.zeros(tap.channels, bool)
                left[self._ledger.left(place, self._chosen[name])] = True
                shown = peaks.first(layout.shown)
                for start in range(0, tap.channels, layout.chunk):
                    part = slice(start, min(start + layout.chunk, tap.channels))
                    if left[part].any():
                        image = np.where(left[part, None], shown.image[part], -1)
                        position = None if shown.position is None else shown.position[part]
                        yield Block(
                            tap,
                            fields[name],
                            place,
                            layout,
                            start,
                            np.flatnonzero(left[part]),
                            Peaks(image, shown.score[part], position),
                            np.nan_to_num(results.stats["std"][part]).astype(np.float32),
                        )

    def _layout(self, tap: Tap, field: Field, peaks: Peaks, score: str) -> Layout:
        settings = self._settings
        cut = crops.choose_cut(field, settings.crop, whole=score == "mean")
        if cut == "focus":
            side = min(settings.max_size, max(field.shape))
            frame, scale = (side, side), None
        else:
            frame, scale = crops.frame_of(field.shape if score == "mean" else field.size, settings.max_size)
        ranks = peaks.image.shape[1]
        kept = tap.map if tap.positions > 1 and max(tap.map) <= _LARGEST_MAP else None
        return Layout(
            tap.channels, ranks, min(settings.ranks, ranks), frame, cut, scale, kept, settings.methods, settings.seed
        )

    def _project(self, blocks: list[Block], device: torch.device) -> None:
        self._check_space(blocks)
        total = sum(block.winners for block in blocks)
        progress = Progress(total, 0, stage="projecting", unit="winners")
        begun = committed = time.monotonic()
        with self._store.inputs(self._catalog, self._run_config.readers) as inputs:
            job = Job(
                self._model.network,
                self._model.preprocess,
                inputs,
                self._settings,
                device,
                self._batch or (32 if device.type == "cpu" else 128),
                self._run_config.threads or cores(),
                exact=self._settings.settle or self._store.manifest.settings["precision"] == "fp32",
                whole=set(self._ledger.whole),
            )
            waits = iter(schedule.PAUSES)
            try:
                while blocks and not self._stop.is_set():
                    try:
                        for result in project_blocks(job, blocks, self._stop):
                            self._keep(result)
                            self._ledger.whole = sorted(job.whole)
                            blocks, waits = blocks[1:], iter(schedule.PAUSES)
                            progress = replace(
                                progress,
                                done=progress.done + result.block.winners,
                                bad=len(self._ledger.bad),
                                seconds=time.monotonic() - begun,
                            )
                            self._report(progress)
                            if time.monotonic() - committed >= schedule.COMMIT_SECONDS:
                                self._commit()
                                committed = time.monotonic()
                    except Unreadable as error:
                        if (pause := next(waits, None)) is None:
                            raise
                        log.warning("%s (trying again in %.0f s)", error, pause)
                        self._commit()
                        self._stop.wait(pause)
            finally:
                self._commit()
        self._say(job)

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
        self._ledger.add(block.place, (block.left + block.start).tolist())
        self._ledger.bad |= {bad.image: replace(bad, stage="project") for bad in result.bad}
        self._ledger.deviation = max(self._ledger.deviation, result.deviation)

    def _commit(self) -> None:
        """Makes what is done survive a loss of power: the arrays first, then the file that says that they are there."""
        os.sync()
        with writing(self._path, _ADVICE):
            self._ledger.save(self._path)

    def _check_space(self, blocks: list[Block]) -> None:
        """Says how much room the pass needs at most. Raises MaxactError where there is less."""
        need = 0
        for block in blocks:
            rest = block.layout.arrays().values()
            row = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind, _, _ in rest)
            need += row * block.winners
        images = np.unique(np.concatenate([block.images for block in blocks])) if blocks else np.empty(0, np.int64)
        need += len(images) * _THUMB
        free = shutil.disk_usage(self._store.path).free
        winners = sum(block.winners for block in blocks)
        log.info(
            "%s: %d winners on %d images to project, at most %s to write (%s free)",
            *(self._store.path, winners, len(images), show_bytes(need), show_bytes(free)),
        )
        if need + _SPARE > free:
            raise MaxactError(
                f"{self._store.path}: needs up to {show_bytes(need)}, and {show_bytes(free)} are free; "
                "make room, or choose fewer with --layers, --channels, --ranks or a smaller --max-size"
            )

    def _say(self, job: Job) -> None:
        """What a user has to know of how the projections were made, once."""
        for name in sorted(job.undefined):
            log.warning("%s: has no rule of its own; its true gradient was used", name)
        if job.unlit:
            log.warning("%d winners have an activation of zero or less; their signal starts with 1", job.unlit)
        for name in sorted(job.whole):
            log.warning(
                "%s: a part of the image does not give the whole one's score here; whole images were used", name
            )
        precision = "fp32" if job.exact else self._store.manifest.settings["precision"]
        if self._ledger.deviation > EXPLAINED[precision]:
            log.warning(_DEVIATES, precision, self._ledger.deviation)

    def _finish(self) -> None:
        """Keeps the pictures of the images, the errors, and what the pass was."""
        used = [self._store.winning_images(place, channels) for place, channels in self._ledger.done.items()]
        numbers = np.unique(np.concatenate(used)) if used else np.empty(0, np.int64)
        begun = time.monotonic()

        def note(done: int, total: int) -> None:
            seconds = time.monotonic() - begun
            self._report(Progress(total, 0, done, seconds=seconds, stage="keeping pictures of"))

        with self._store.inputs(self._catalog, self._run_config.readers) as inputs, writing(self._store.path, _ADVICE):
            thumbs.update(self._store.path / "thumbs.parquet", numbers.tolist(), inputs, note)
        self._ledger.settled = self._store.settled_deviation()
        self._store.finish_projection(list(self._ledger.bad.values()), self._ledger.facts())
