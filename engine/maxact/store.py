"""The store on disk: a Zarr group with what was found, the catalog beside it, and the states of an unfinished run.

The only file that imports zarr. A run writes one file per commit, `run/state-N`, and the Zarr arrays once, from the
last of them, when it is finished; until then the same results are read from the state.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
import zarr.errors
from numpy.typing import NDArray

from maxact.archives import reading
from maxact.catalog import Catalog, Changed
from maxact.config import cores
from maxact.decode import make_decoder
from maxact.errors import MaxactError
from maxact.files import is_aside, replace_file, sync_file, sync_folder, sync_tree, writing
from maxact.manifest import Manifest, shorten
from maxact.models import Normalised
from maxact.partial import BadImage, Partial
from maxact.preprocess import Preprocess
from maxact.results import Peaks, TapResults, of_partial
from maxact.tap import Tap, columns
from maxact.topk import List

log = logging.getLogger("maxact")
_CHUNK = 2 << 20  # bytes that a chunk may have
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # what network file systems without locks say
_ADVICE = "make room there and run the same again (without --overwrite) to go on"
_ERRORS = pa.schema([("image", pa.int64()), ("key", pa.string()), ("stage", pa.string()), ("error", pa.string())])


class Store:
    """A store that exists. `store[tap]` is what one tap gave; iterating gives the taps' names."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the store at `path` for reading. Raises MaxactError where there is none."""
        self.path = Path(path)
        try:
            group = zarr.open_group(self.path, mode="r", use_consolidated=False)
            values = group.attrs["maxact"]
        except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
            raise MaxactError(f"{self.path}: not a maxact store (make one with `maxact scan`)") from error
        self.manifest = Manifest.from_json(values, self.path)  # type: ignore[arg-type]

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: Manifest, catalog: Catalog) -> Store:
        """Starts a store: the catalog, and the group with its attributes, which is what makes it one."""
        folder = Path(path)
        _check_place(folder)
        with writing(folder):
            (folder / "run").mkdir(parents=True, exist_ok=True)
            for left in (*folder.glob("run/state-*"), *filter(is_aside, folder.iterdir())):
                left.unlink()
            catalog.save(folder / "images.parquet")
            zarr.create_group(folder, attributes={"maxact": manifest.to_json()})
            _sync_attributes(folder)
        return cls(folder)

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether a store was started at `path`."""
        return os.path.exists(os.path.join(path, "zarr.json"))

    @staticmethod
    def remove(path: str | os.PathLike[str]) -> None:
        """Deletes the store at `path`, if it is one. The catalog and `run/`, with the lock that the caller holds,
        stay: `create` replaces them."""
        store = Store(path)
        with writing(path):
            # cut short, it is a store of the same scan in which nothing is done yet
            store.reopen()
            for _, state in store._states():
                state.unlink()
            entries = sorted(Path(path).iterdir(), key=lambda entry: entry.name == "zarr.json")
            for entry in (entry for entry in entries if entry.name not in ("run", "images.parquet")):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @staticmethod
    @contextmanager
    def lock(path: str | os.PathLike[str]) -> Iterator[None]:
        """Holds the store at `path` for one run. The system lets go when the process ends, however it does.

        Raises MaxactError where another process holds it, and where there is something that is no store. A file
        system that has no locks is only warned of.
        """
        _check_place(Path(path))
        folder = Path(path) / "run"
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            handle = open(folder / "lock", "ab+", buffering=0)  # noqa: SIM115 (open for as long as the lock is held)
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                handle.seek(0)
                holder = handle.read().decode().strip() or "another process"
                raise MaxactError(f"{path}: in use by {holder}; wait for it or stop it first") from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s: cannot be locked here; see to it that no second run uses it", path)
            with writing(path):
                handle.truncate(0)
                handle.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield

    def commit(self, partial: Partial) -> None:
        """Makes `partial` the state of the run: after this it survives anything; before, the last one does."""
        states = self._states()
        number = states[-1][0] + 1 if states else 0
        path = self.path / "run" / f"state-{number}"
        with writing(path, _ADVICE):
            replace_file(path, partial.save)
            for _, old in states:
                old.unlink()

    def state(self) -> Partial | None:
        """What the last commit wrote; None before the first."""
        while states := self._states():
            try:
                return Partial.load(states[-1][1])
            except FileNotFoundError:  # a run that goes on has committed once more
                continue
        return None

    def _states(self) -> list[tuple[int, Path]]:
        """The states that are there, by number: one, or two where a commit was cut short before it tidied up."""
        names = filter(_is_state, (self.path / "run").glob("state-*"))
        return sorted((int(path.name[6:]), path) for path in names)

    def finish(self, partial: Partial) -> None:
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
        with writing(self.path, _ADVICE), warnings.catch_warnings():
            # Zarr 3 calls consolidated metadata an extension, and the Parquet files beside the arrays unknown
            warnings.simplefilter("ignore")
            group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            for tap, start, stop in columns(self.manifest.taps):
                self._write_tap(group, of_partial(self.catalog, tap, partial, stats, start, stop))
            write_errors(self.path / "errors.parquet", partial.bad)
            group = zarr.consolidate_metadata(self.path)
            for left in filter(is_aside, self.path.rglob("*")):
                left.unlink()
            sync_tree(self.path)
            self._mark(group, finished=True, summary=summary)
            self.tidy()

    def reopen(self) -> None:
        """Marks a finished store as unfinished again, before more is scanned into it."""
        with writing(self.path):
            group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            self._mark(group, finished=False, summary=None)

    def tidy(self) -> None:
        """Deletes what a finished store needs no more: what writes that were cut short left, and the states, unless
        there are bad images, whose shards can be scanned again."""
        for left in filter(is_aside, (*self.path.iterdir(), *(self.path / "run").iterdir())):
            left.unlink()
        if not self.errors().num_rows:
            for _, state in self._states():
                state.unlink()

    def _mark(self, group: zarr.Group, **changes: Any) -> None:
        """Changes the manifest, here and on disk, in one write."""
        self.manifest = replace(self.manifest, **changes)
        group.attrs["maxact"] = self.manifest.to_json()
        _sync_attributes(self.path)
        self.__dict__.pop("_results", None)

    def _write_tap(self, group: zarr.Group, results: TapResults) -> None:
        tap = results.tap
        attributes = {
            "kind": tap.kind,
            "layer": tap.layer,
            "channels": tap.channels,
            "map": list(tap.map),
            "unfit": results.unfit,
        }
        node = group.create_group(tap.name, attributes=attributes, overwrite=True)
        for (score, end), peaks in results.lists.items():
            shown = self.manifest.settings[end]
            _write_peaks(node, f"{score}/{end}", peaks.first(shown), "rank")
            if shown < peaks.image.shape[1]:
                # a dimension of its own: xarray wants one that bears the same name to be as long in a group below
                _write_peaks(node, f"{score}/{end}/candidates", peaks, "candidate")
        for name, values in results.stats.items():
            _write(node, f"stats/{name}", values, ("channel",), 0 if name == "count" else np.nan)

    @cached_property
    def catalog(self) -> Catalog:
        """The images that the store was made from."""
        return Catalog.load(self.path / "images.parquet")

    @cached_property
    def _results(self) -> Callable[[str], TapResults]:
        """Reads one tap: from the arrays of a finished store, from the state of an unfinished one."""
        places = {tap.name: (tap, start, stop) for tap, start, stop in columns(self.manifest.taps)}
        if self.manifest.finished:
            return lambda name: self._read_tap(places[name][0])
        state = self.state()
        if state is None:
            raise MaxactError(
                f"{self.path}: nothing is committed yet; wait for the first commit or start the scan again"
            )
        stats, ranks = state.total(), self.manifest.settings
        return lambda name: of_partial(self.catalog, places[name][0], state, stats, *places[name][1:]).first(ranks)

    def _read_tap(self, tap: Tap) -> TapResults:
        lists: dict[List, Peaks] = {}
        try:
            # the consolidated metadata would make empty arrays of files that are gone
            group: Any = zarr.open_group(self.path, mode="r", use_consolidated=False)
            node = group[tap.name]
            for score, end in self.manifest.lists():
                place = node[f"{score}/{end}"]
                lists[score, end] = Peaks(
                    place["image"][:], place["score"][:], place["position"][:] if score == "max" else None
                )
            stats = {name: node[f"stats/{name}"][:] for name in sorted(node["stats"])}
            return TapResults(self.catalog, tap, lists, stats, node.attrs["unfit"])
        except (OSError, KeyError, ValueError, RuntimeError, zarr.errors.BaseZarrError) as error:
            raise MaxactError(
                f"{self.path}: the tap {tap.name} is missing or damaged; scan again with --overwrite"
            ) from error

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

    def pixels(self, numbers: Sequence[int], dataset: object | None = None) -> torch.Tensor:
        """The model inputs of some images before normalisation, as the scan decoded them.

        uint8 [N, H, W, 3], or float32 [N, 3, H, W] from a preprocess function. `dataset` is the one that was
        scanned, where it was one. Raises MaxactError where an image cannot be had any more.
        """
        settings = self.manifest.settings
        decoder = make_decoder(
            settings["decoder"],
            Preprocess.from_json(self.manifest.preprocessing),
            batch=len(numbers),
            threads=cores(),
            max_pixels=int(settings["max_megapixels"] * 1e6),
            pictures=dataset is not None,
        )
        catalog = Catalog(self.catalog.table, dataset)
        entries = [catalog.entry(number) for number in numbers]
        with closing(catalog), closing(decoder):
            try:
                decoder.submit([catalog.read(entry) for entry in entries])
            except (OSError, Changed) as error:
                raise MaxactError(f"{self.path}: an image cannot be read any more ({error})") from error
            decoded = decoder.collect()
        for index, reason in decoded.errors.items():
            raise MaxactError(f"{entries[index].key}: cannot be decoded any more ({reason})")
        return decoded.images

    def input(self, number: int, dataset: object | None = None) -> torch.Tensor:
        """The exact tensor that the network saw of an image, float32 [3, H, W]; `dataset` as in `pixels`."""
        normalised = Normalised(torch.nn.Identity(), Preprocess.from_json(self.manifest.preprocessing))
        image: torch.Tensor = normalised(self.pixels([number], dataset))[0]
        return image

    def errors(self) -> pa.Table:
        """The bad images so far: image, key, stage, error. Raises MaxactError where they cannot be read."""
        if self.manifest.finished:
            path = os.fsencode(self.path / "errors.parquet")
            with reading(path):
                return pq.read_table(pa.OSFile(path))
        state = self.state()
        return _error_table(state.bad if state else ())


def _write_peaks(node: zarr.Group, place: str, peaks: Peaks, dimension: str) -> None:
    """One list of peaks, whose ranks bear the name `dimension`."""
    _write(node, f"{place}/image", peaks.image, ("channel", dimension), -1)
    _write(node, f"{place}/score", peaks.score, ("channel", dimension), np.nan)
    if peaks.position is not None:
        _write(node, f"{place}/position", peaks.position, ("channel", dimension, "axis"), -1)


def _write(group: zarr.Group, name: str, values: NDArray[Any], dimensions: tuple[str, ...], fill: float) -> None:
    """One array, in chunks of whole channels of at most _CHUNK bytes."""
    row = values[:1].nbytes or 1
    chunk = max(1, min(len(values), _CHUNK // row))
    group.create_array(
        name,
        data=np.ascontiguousarray(values),
        chunks=(chunk, *values.shape[1:]),
        dimension_names=dimensions,
        fill_value=fill,
        overwrite=True,
    )


def _check_place(folder: Path) -> None:
    """Raises MaxactError where a folder holds anything but a store, or the beginnings of one."""
    if not os.path.exists(folder):
        return
    if not folder.is_dir():
        raise MaxactError(f"{folder}: is a file, not a folder; choose another place for the store")
    if Store.exists(folder):
        Store(folder)
        return
    with writing(folder):
        run = folder / "run"
        begun = [*run.iterdir()] if run.is_dir() else []
        # where nobody has begun a store, images.parquet is a file of the user's
        ours = {"run", "images.parquet"} if run / "lock" in begun else {"run"}
        others = [item for item in folder.iterdir() if item.name not in ours]
        others += [item for item in begun if item.name not in ("lock", "log") and not _is_state(item)]
    if not all(map(is_aside, others)):
        raise MaxactError(f"{folder}: there is something else here; choose another place for the store")


def _is_state(path: Path) -> bool:
    return path.name.startswith("state-") and path.name[6:].isdecimal()


def _sync_attributes(folder: Path) -> None:
    """Zarr does not see to it that what it writes survives a loss of power."""
    sync_file(folder / "zarr.json")
    sync_folder(folder)


def _error_table(bad: tuple[BadImage, ...]) -> pa.Table:
    return pa.Table.from_pylist([asdict(image) for image in bad], schema=_ERRORS)


def write_errors(path: Path, bad: tuple[BadImage, ...]) -> None:
    """Writes errors.parquet."""

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:  # Arrow itself takes no path that is not UTF-8
            pq.write_table(_error_table(bad), file)

    replace_file(path, write)
