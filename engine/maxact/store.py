"""The store on disk: a Zarr group with what was found, the catalog beside it, and the states of an unfinished run.

A run writes one file per commit, `run/state-N`, and the Zarr arrays once, from the last of them, when it is finished;
until then the same results are read from the state. The parts have modules of their own: states.py, ranking.py (a tap's
arrays), winners.py (the second pass), pooled.py, bad.py (errors.parquet).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from maxact import pooled
from maxact.arrays import (
    DAMAGE,
    changing,
    consolidate,
    create_group,
    open_group,
    read_manifest,
    sync_attributes,
    write_field,
)
from maxact.bad import error_table, read_errors, write_errors
from maxact.catalog import Catalog
from maxact.dense import FOLDER
from maxact.errors import MaxactError
from maxact.field import Field
from maxact.files import leftovers, sync_folder, sync_tree, writing
from maxact.inputs import Inputs
from maxact.lock import check_place, lock
from maxact.manifest import Manifest, shorten
from maxact.models import Normalised
from maxact.partial import BadImage, Partial
from maxact.pooled import Pooled
from maxact.preprocess import Preprocess
from maxact.process import show_bytes
from maxact.ranking import mark_settled, read_candidates, read_settled, read_tap, write_settled, write_tap
from maxact.results import Peaks, TapResults, of_partial
from maxact.settle import Exact
from maxact.sound import is_count, is_words
from maxact.states import load_state, remove_states, save_state, states
from maxact.tap import columns
from maxact.thumbs import Thumbs
from maxact.topk import List
from maxact.winners import Layout, Winners

log = logging.getLogger("maxact")
_FILES = ("zarr.json", "images.parquet", "errors.parquet", "thumbs.parquet", "run", FOLDER)  # beside the taps
_ADVICE = "make room there and run the same again (without --overwrite) to go on"


class Store:
    """A store that exists. `store[tap]` is what one tap gave; iterating gives the taps' names."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the store at `path` for reading. Raises MaxactError where there is none."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._committed: tuple[Partial | None] | None = None  # what `committed` gives

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: Manifest, catalog: Catalog) -> Store:
        """Starts a store: the catalog, and the group with its attributes, which is what makes it one."""
        folder = Path(path)
        check_place(folder)
        with writing(folder):
            (folder / "run").mkdir(parents=True, exist_ok=True)
            for left in (*folder.glob("run/state-*"), *leftovers(folder.iterdir())):
                left.unlink()
            catalog.save(folder / "images.parquet")
            create_group(folder, manifest)
        store = cls(folder)
        store.catalog = Catalog(catalog.table)  # what was saved: one in memory is enough
        return store

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether a store was started at `path`."""
        return os.path.exists(os.path.join(path, "zarr.json"))

    @staticmethod
    def remove(path: str | os.PathLike[str]) -> None:
        """Deletes the store at `path`, if it is one. The catalog and `run/`, with the lock that the caller holds,
        stay: `create` replaces them. Raises MaxactError where anything else lies beside its arrays."""
        store = Store(path)
        store.check_alone()
        with writing(path):
            # cut short, it is a store of the same scan in which nothing is done yet
            store.reopen()
            remove_states(store.path)
            entries = sorted(Path(path).iterdir(), key=lambda entry: entry.name == "zarr.json")
            for entry in (entry for entry in entries if entry.name not in ("run", "images.parquet")):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def check_alone(self) -> None:
        """Raises MaxactError where the folder holds what is not the store's."""
        ours = {*_FILES, *(tap.name for tap in self.manifest.taps)}
        ours |= {left.name for left in leftovers(self.path.iterdir())}
        if others := {entry.name for entry in self.path.iterdir()} - ours:
            advice = "move it elsewhere, then run the same again"
            raise MaxactError(f"{self.path}: {min(others)} is not the store's; {advice}")

    @staticmethod
    def lock(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
        """Holds the store at `path` for one run: see `lock.lock`."""
        return lock(Path(path))

    def commit(self, partial: Partial) -> None:
        """Makes `partial` the state of the run: after this it survives anything; before, the last one does."""
        save_state(self.path, partial, _ADVICE)
        self._committed = None

    def state(self) -> Partial | None:
        """What the last commit wrote; None before the first."""
        return load_state(self.path, self.manifest, len(self.catalog))

    def committed(self) -> Partial | None:
        """What readers see of an unfinished store: the last commit when it was first asked for, so that all they read
        belongs together. None before the first commit, and of a finished store, which it may have become by now."""
        if self.manifest.finished:
            return None
        if self._committed is None:
            state = self.state()
            if state is None:
                self.manifest = read_manifest(self.path)
            self._committed = (state,)
        return self._committed[0]

    def scanned(self) -> int:
        """How many images the scan has done, the bad ones among them: those of the last commit, or all."""
        state = self.committed()
        shards = () if self.manifest.finished else self.catalog.shards(self.shard)
        left = (shard for shard in shards if not state or shard.index not in state.shards)
        return len(self.catalog) - sum(shard.stop - shard.start for shard in left)

    def finish(self, partial: Partial, fields: Mapping[str, Field] | None = None) -> None:
        """Writes the Zarr arrays and errors.parquet from the run's whole result.

        Cut short it can be done again: until the very end the store is an unfinished one. The state goes when
        nothing in it can be scanned again.
        """
        summary = {
            "images": self.manifest.images["count"],
            "scanned": self.manifest.images["count"] - len(partial.bad) - sum(partial.grey.values()),
            "bad": len(partial.bad),
            "grey": sum(partial.grey.values()),
        }
        stats = partial.total()
        with changing(self.path, f"it needs about {show_bytes(partial.nbytes)}; {_ADVICE}") as group:
            for tap, start, stop in columns(self.manifest.taps):
                write_tap(group, of_partial(self.catalog, tap, partial, stats, start, stop), self.manifest)
                if fields:
                    write_field(group[tap.name], fields[tap.name])
            self._forget_projection()  # the arrays of one went with the lists that they belonged to
            self._forget_settling()
            write_errors(self.path / "errors.parquet", partial.bad)
            group = consolidate(self.path)
            for left in leftovers(self.path.rglob("*")):
                left.unlink()
            # but for tens of thousands of files that were synced when they were written
            for entry in self.path.iterdir():
                if entry.is_dir() and entry.name != FOLDER:
                    sync_tree(entry)
            sync_folder(self.path)
            self._mark(group, finished=True, summary=summary)
            self.tidy()

    def start_pooled(self) -> None:
        """Starts the arrays of every image's values, if they are to be kept and are not there yet.

        Raises MaxactError where they are gone.
        """
        settings, taps = self.manifest.settings, self.manifest.taps
        if not settings["pooled"]:
            return
        if missing := pooled.missing(self.path, taps, settings["pooled"]):
            if self.manifest.finished or states(self.path):
                where = f"{self.path}/{FOLDER}"
                raise MaxactError(f"{where}: the values of {missing[0].name} are gone; scan again with --overwrite")
            with changing(self.path, _ADVICE) as group:
                pooled.create(group, missing, settings["pooled"], self.manifest.images["count"], self.shard)
                sync_tree(self.path / FOLDER)
        with writing(self.path, _ADVICE):
            pooled.tidy(self.path)

    def pooled(self, tap: str) -> Pooled:
        """Every image's value of every channel of a tap, where the scan kept them (`pooled`); of an unfinished store
        those of the last commit. Raises MaxactError where there are none."""
        if tap not in set(self):
            raise MaxactError(f"{self.path}: has no tap {tap!r}; it has {shorten(', '.join(self))}")
        kind = self.manifest.settings["pooled"]
        if not kind:
            raise MaxactError(f"{self.path}: was scanned without --pooled, so it has no value of every image")
        state = self.committed()
        done = None if self.manifest.finished else state.shards if state else frozenset[int]()
        table = self.errors()
        bad = table.filter(pc.not_equal(table["stage"], "project"))["image"].to_numpy()
        found = next(each for each in self.manifest.taps if each.name == tap)
        return Pooled(self.path, found, kind, self.manifest.images["count"], self.shard, done, bad)

    def reopen(self) -> None:
        """Marks a finished store as unfinished again, before more is scanned into it; what was projected is void."""
        with changing(self.path, _ADVICE) as group:
            self._mark(group, finished=False, summary=None, projected=None)
            self._forget_projection()
            self._forget_settling()

    def _forget_projection(self) -> None:
        for name in ("run/projected.json", "thumbs.parquet"):
            (self.path / name).unlink(missing_ok=True)

    def settling(self) -> dict[Path, dict[str, Any]]:
        """The states of settling runs, and what each is about: nothing where it is damaged or of another store."""
        found = {path: _settling(Exact.about(path)) for path in sorted((self.path / "run").glob("settling-*"))}
        return {path: about if set(about.get("taps", ())) <= set(self) else {} for path, about in found.items()}

    def _forget_settling(self) -> None:
        for path in self.settling():
            path.unlink()

    def tidy(self) -> None:
        """Deletes what a finished store needs no more: what writes that were cut short left, and the states, unless
        there are bad images, whose shards can be scanned again."""
        for left in leftovers((*self.path.iterdir(), *(self.path / "run").iterdir())):
            left.unlink()
        if not self.bad_in_scan():
            remove_states(self.path)

    def _mark(self, group: Any, **changes: Any) -> None:
        """Changes the manifest, here and on disk, in one write."""
        self.manifest = replace(self.manifest, **changes)
        group.attrs["maxact"] = self.manifest.to_json()
        sync_attributes(self.path)
        self._committed = None
        self.__dict__.pop("_results", None)

    @property
    def shard(self) -> int:
        """Images in a shard."""
        size: int = self.manifest.settings["shard"]
        return size

    @cached_property
    def catalog(self) -> Catalog:
        """The images that the store was made from."""
        return Catalog.load(self.path / "images.parquet")

    @cached_property
    def _results(self) -> Callable[[str], TapResults]:
        """Reads one tap: from the arrays of a finished store, from the state of an unfinished one."""
        state = self.committed()
        places = {tap.name: (tap, start, stop) for tap, start, stop in columns(self.manifest.taps)}
        if self.manifest.finished:
            return lambda name: read_tap(self.path, self.catalog, places[name][0], self.manifest)
        if state is None:
            raise MaxactError(
                f"{self.path}: nothing is committed yet; wait for the first commit or start the scan again"
            )
        stats, ranks = state.total(), self.manifest.settings

        def read(name: str) -> TapResults:
            found = of_partial(self.catalog, places[name][0], state, stats, *places[name][1:])
            try:
                found.check()
            except ValueError as error:
                advice = "scan again with --overwrite"
                raise MaxactError(f"{self.path}: its state is damaged ({error}); {advice}") from error
            return found.first(ranks)

        return read

    def __repr__(self) -> str:
        state = "finished" if self.manifest.finished else "unfinished"
        return f"<maxact.Store {str(self.path)!r}: {self.manifest.model['name']}, {len(self)} taps, {state}>"

    def __iter__(self) -> Iterator[str]:
        return (tap.name for tap in self.manifest.taps)

    def __len__(self) -> int:
        return len(self.manifest.taps)

    def __getitem__(self, name: str) -> TapResults:
        """What the tap `name` gave. Raises MaxactError for a name that is not there."""
        if name not in set(self):
            raise MaxactError(f"{self.path}: has no tap {name!r}; it has {shorten(', '.join(self))}")
        return self._results(name)

    def candidates(self, tap: str, key: List) -> Peaks:
        """All candidates of a list of a 16-bit scan, as that scored them."""
        return read_candidates(self.path, next(each for each in self.manifest.taps if each.name == tap), key)

    def settled(self, tap: str, key: List) -> int:
        """How many first ranks of a list are in the order of float32, though the scan was of 16 bits."""
        return read_settled(self.path, tap, key)[0]

    def is_settled(self, tap: str, ranks: int) -> bool:
        """Whether the first `ranks` of all lists of a tap, or what was kept of them, are in the order of float32."""
        kept = self.manifest.settings
        return all(self.settled(tap, key) >= min(ranks, kept[key[1]]) for key in self.manifest.lists())

    def settled_deviation(self) -> float:
        """The largest deviation (`settle.Settled`) that was seen when lists were settled."""
        lists = (read_settled(self.path, tap, key) for tap in self for key in self.manifest.lists())
        return max((deviation for _, deviation in lists), default=0.0)

    def write_settled(self, tap: str, key: List, peaks: Peaks, certain: NDArray[np.bool_]) -> None:
        """Replaces a list by a settled one. Until `mark_settled` the candidates are read in its place."""
        with changing(self.path, _ADVICE) as group:
            write_settled(self.path, group, tap, key, peaks, certain)
        self.__dict__.pop("_results", None)

    def mark_settled(self, tap: str, key: List, ranks: int, deviation: float) -> None:
        """Says that the first `ranks` of a list are settled, after all that `write_settled` wrote is on the disk."""
        with changing(self.path, _ADVICE) as group:
            mark_settled(group, tap, key, ranks, deviation)
        self.__dict__.pop("_results", None)

    def winners(self, tap: str, score: str = "max", end: str = "top") -> Winners:
        """What the second pass kept of one list. Raises MaxactError where it has not run on it."""
        place = f"{tap}/{score}/{end}"
        missing = MaxactError(f"{self.path}: {place} has not been projected; run `maxact project` on it")
        if not self.manifest.finished:  # what is there is of the lists before
            raise missing
        try:
            return Winners(open_group(self.path, place))
        except DAMAGE as error:
            raise missing from error

    def start_winners(self, tap: str, score: str, end: str, layout: Layout) -> Winners:
        """The arrays of one list, for writing; started where they are not there."""
        with changing(self.path, _ADVICE) as group:
            return Winners.create(group[f"{tap}/{score}/{end}"], layout)

    def winning_images(self, place: str, channels: Sequence[int]) -> NDArray[np.int64]:
        """The images whose winners the second pass shows, of some channels of the list `tap/score/end`; ascending."""
        tap, score, end = place.rsplit("/", 2)
        shown = self.winners(tap, score, end).layout.shown
        image = self[tap].lists[score, end].image  # type: ignore[index]
        images = image[[channel for channel in channels if channel < len(image)], :shown]
        return np.unique(images[images >= 0])

    def remove_winners(self) -> None:
        """Deletes what a second pass wrote, but for the order that it settled."""
        with changing(self.path, _ADVICE) as group:
            self._mark(group, projected=None)
            (self.path / "thumbs.parquet").unlink(missing_ok=True)
            for tap in self:
                for score, end in self.manifest.lists():
                    Winners.remove(group[f"{tap}/{score}/{end}"])
            consolidate(self.path)
            sync_attributes(self.path)

    def finish_projection(self, bad: Sequence[BadImage], facts: dict[str, Any]) -> None:
        """Ends a second pass: the images that it could not have, and what it was."""
        with changing(self.path, _ADVICE):
            write_errors(self.path / "errors.parquet", (*self.bad_in_scan(), *bad))
            for left in leftovers(self.path.rglob("*")):
                left.unlink()
            for path, about in self.settling().items():
                if about and all(self.is_settled(tap, about["ranks"]) for tap in about["taps"]):
                    path.unlink()
            group = consolidate(self.path)
            self._mark(group, projected=facts)

    def thumbs(self) -> Thumbs:
        """The model inputs of the images that were projected. Raises MaxactError where there are none."""
        return Thumbs(self.path / "thumbs.parquet")

    def pixels(self, numbers: Sequence[int], dataset: object | None = None) -> torch.Tensor:
        """The model inputs of some images before normalisation, as the scan decoded them.

        uint8 [N, H, W, 3], or float32 [N, 3, H, W] from a preprocess function. `dataset` is the one that was
        scanned, where it was one. Raises MaxactError where an image cannot be had any more.
        """
        catalog = Catalog(self.catalog.table, dataset)
        with self.inputs(catalog) as inputs:
            found, bad = inputs.get(numbers)
        if bad:
            raise MaxactError(f"{self.path}: {bad[0].key} cannot be read any more ({bad[0].error})")
        return torch.stack([found[number].pixels for number in numbers])

    def inputs(self, catalog: Catalog, readers: int = 16) -> Inputs:
        """What gives the model inputs of images of `catalog`, decoded as the scan decoded them."""
        settings = self.manifest.settings
        return Inputs(
            catalog,
            Preprocess.from_json(self.manifest.preprocessing),
            decoder=settings["decoder"],
            max_pixels=int(settings["max_megapixels"] * 1e6),
            readers=readers,
        )

    def input(self, number: int, dataset: object | None = None) -> torch.Tensor:
        """The exact tensor that the network saw of an image, float32 [3, H, W]; `dataset` as in `pixels`."""
        normalised = Normalised(torch.nn.Identity(), Preprocess.from_json(self.manifest.preprocessing))
        image: torch.Tensor = normalised(self.pixels([number], dataset))[0]
        return image

    def bad_in_scan(self) -> list[BadImage]:
        """The bad images of the scan, without those that only the second pass could not have."""
        found = [BadImage.from_json(row) for row in self.errors().to_pylist()]
        return [image for image in found if image.stage != "project"]

    def errors(self) -> pa.Table:
        """The bad images so far: image, key, stage, error. Raises MaxactError where they cannot be read."""
        state = self.committed()
        if self.manifest.finished:
            return read_errors(self.path / "errors.parquet")
        return error_table(state.bad if state else ())


def _settling(about: str | None) -> dict[str, Any]:
    """What the state of a settling run says that it is about; nothing where that cannot be."""
    with suppress(ValueError, RecursionError):
        values = json.loads(about or "{}")
        if isinstance(values, dict) and is_words(values.get("taps")) and is_count(values.get("ranks")):
            return values
    return {}
