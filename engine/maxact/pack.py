"""Repacking a dataset once, so that every later scan decodes less: smaller JPEGs in tar archives (`maxact pack`).

An archive stands for a fixed range of the source's catalog, is written aside and renamed when it is whole, and counts
from when its index is there (packed.py). So a run that was cut short goes on with the archives that are missing, and
the result is the same to the byte. What happens to a picture is in repack.py.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from maxact import packed
from maxact.bad import write_errors
from maxact.catalog import Catalog, Entry, Shard, is_dataset
from maxact.config import RunConfig, cores
from maxact.errors import MaxactError, UsageError
from maxact.fetch import Unreadable
from maxact.files import leftovers, replace_file, write_json, writing
from maxact.lock import hold
from maxact.manifest import shorten
from maxact.partial import BadImage
from maxact.process import Interrupted, Progress, listing, log_file, signals
from maxact.provenance import describe_source, versions
from maxact.repack import Archive, PackConfig, Packers, Stopped
from maxact.schedule import Patience

log = logging.getLogger("maxact")

_EXAMPLES = 3
_ADVICE = "make room there and run the same again (without --overwrite) to go on"


def pack(
    images: object,
    out: str | os.PathLike[str],
    *,
    short_side: int = 256,
    quality: int = 95,
    where: str | Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    shard_images: int = 4096,
    max_megapixels: float = 200.0,
    workers: int | None = None,
    readers: int = 16,
    max_bad: int | None = None,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    native_log: bool = False,
) -> dict[str, Any]:
    """Writes images, made smaller, into tar archives in a folder that is images itself, with the same keys and labels.

    images, where, sample, seed, limit: as in `scan`; a map-style Dataset too.
    out: the folder of the result. An unfinished pack of the same arguments goes on, a finished one gets back what it
        lacks; of other arguments it is refused. `overwrite` starts again.
    short_side: in pixels; quality: of JPEG; shard_images: images in an archive. max_megapixels: larger ones are bad.
    workers: threads that decode and encode (every core); readers: threads that read.
    max_bad: bad images that are borne before the run stops; 1 % unless told otherwise, but at least 10.
    report: called after every image, with how far it is. native_log: see `scan`; the log is OUT/run/log.

    Gives the summary that OUT/pack.json has: images, packed, bad, archives, bytes. In the main thread SIGINT and
    SIGTERM end the run after the archives that are whole, and raise Interrupted. Raises UsageError for arguments that
    cannot be meant, and MaxactError for all else that the caller can mend.
    """
    config = PackConfig(short_side, quality, shard_images, max_megapixels)
    if workers is not None and not 1 <= workers <= 1024:
        raise UsageError(f"workers: expected 1 to 1024, got {workers!r}")
    run = RunConfig(readers=readers, decode_threads=workers or cores(), max_bad=max_bad, overwrite=overwrite)
    labels = (where,) if isinstance(where, str) else tuple(dict.fromkeys(where))
    selection = {"where": list(labels), "sample": sample, "seed": seed if sample is not None else 0, "limit": limit}
    folder = Path(out)
    _check_place(folder)
    catalog = None
    if overwrite or not _saved(folder):
        catalog = Catalog.build(images, where=labels, sample=sample, seed=seed, limit=limit, report=listing(report))
        _refuse_inside(catalog, folder)
    with hold(folder), log_file(folder / "run" / "log", native_log):
        return _Pack(folder, images, selection, catalog, config, run, report).run()


class _Pack:
    """One run: the pack that it fills, and how far it is."""

    def __init__(
        self,
        folder: Path,
        images: object,
        selection: dict[str, Any],
        catalog: Catalog | None,
        config: PackConfig,
        run: RunConfig,
        report: Callable[[Progress], None],
    ) -> None:
        self._folder, self._config, self._run, self._report = folder, config, run, report
        dataset = images if is_dataset(images) else None
        source = {"source": describe_source(images), **selection}
        saved = _saved(folder)
        if run.overwrite or saved is None:
            assert catalog is not None
            source |= {"count": len(catalog), "packed": packed.describe(catalog.table)}
            self._start(catalog, {"settings": asdict(config), "images": source})
        else:
            source |= {name: saved["images"][name] for name in ("count", "packed")}
            _refuse_other(folder, saved, {"settings": asdict(config), "images": source})
            self._about = saved
            catalog = Catalog.load(self._catalog_path, dataset)
        self._catalog = catalog
        _delete(leftovers([*folder.iterdir(), *(folder / "run").iterdir()]))
        self._archives = catalog.shards(config.shard_images)
        self._stop = threading.Event()
        self._bad: dict[int, BadImage] = {}
        self._sizes: dict[int, int] = {}  # archive -> its bytes
        for archive in self._archives:
            self._count(archive)

    @property
    def _catalog_path(self) -> Path:
        return self._folder / "run" / "catalog"  # no suffix: it is no list of images to whoever searches this folder

    def _path(self, archive: Shard) -> Path:
        return Path(os.fsdecode(packed.archive(os.fsencode(self._folder), archive.index)))

    def _start(self, catalog: Catalog, about: dict[str, Any]) -> None:
        """A new pack, in the place of what there is."""
        with writing(self._folder):
            _clear(self._folder)
        catalog.save(self._catalog_path)
        self._about = packed.BEGINNING | about | {"versions": versions(torch.device("cpu"))}
        self._save(finished=False, summary=None)

    def _save(self, **changes: Any) -> None:
        """Writes pack.json."""
        self._about |= changes
        with writing(self._folder / packed.PACK, _ADVICE):
            write_json(self._folder / packed.PACK, self._about)

    def _count(self, archive: Shard) -> None:
        """Counts an archive as done if it is."""
        path = self._path(archive)
        try:
            index = packed.load_index(os.fsencode(path))
        except MaxactError:  # damaged: made again, as one that is missing
            return
        if index is not None and len(index) == archive.stop - archive.start:
            self._sizes[archive.index] = path.stat().st_size
            for row in index.filter(pc.is_valid(index["error"])).to_pylist():
                self._bad[row["image"]] = BadImage(row["image"], row["key"], row["stage"], row["error"])

    @property
    def _left(self) -> list[Shard]:
        return [archive for archive in self._archives if archive.index not in self._sizes]

    @property
    def _done(self) -> int:
        return len(self._catalog) - sum(archive.stop - archive.start for archive in self._left)

    def run(self) -> dict[str, Any]:
        """Makes the archives that are missing. Gives the summary."""
        if self._about["finished"]:
            if not self._left:
                log.info("%s: done already, %d images", self._folder, len(self._catalog))
                return dict(self._about["summary"])
            log.warning("%s: %d archives are missing or damaged; making them again", self._folder, len(self._left))
            self._save(finished=False, summary=None)
        self._allow(())
        before = self._done
        if before:
            log.info("%s: going on after %d of %d images", self._folder, before, len(self._catalog))
        with signals(self._stop) as caught:
            self._make(before)
        if caught:
            name = signal.Signals(caught[0]).name
            done = f"{self._done} of {len(self._catalog)} images are in whole archives"
            message = f"stopped by {name}: {done}; run the same again (without --overwrite) to go on"
            raise Interrupted(caught[0], message)
        return self._finish()

    def _make(self, before: int) -> None:
        """Makes archives until none is left or a signal comes; with pauses where the images cannot be read."""
        patience = Patience(self._stop)
        begun = time.monotonic()
        while self._left and not self._stop.is_set():
            done = self._done
            progress = Progress(len(self._catalog), before, done - before, stage="packing", bad=len(self._bad))
            try:
                self._attempt(progress, begun)
            except Stopped:
                return
            except Unreadable as error:
                if self._done > done:
                    patience.renew()
                patience.wait(error, lambda: None)  # every archive that is whole is on disk already

    def _attempt(self, progress: Progress, begun: float) -> None:
        archives = self._left
        with Packers(self._catalog, self._config, self._run) as packers:
            entries = (entry for archive in archives for entry in self._entries(archive))
            images = packers.pack(entries)

            def note(bad: bool) -> None:
                nonlocal progress
                now = time.monotonic() - begun
                progress = replace(progress, done=progress.done + 1, bad=progress.bad + bad, seconds=now)
                self._report(progress)

            for archive in archives:
                path = self._path(archive)
                part = Archive(archive, self._allow, note, self._stop)
                with writing(path, _ADVICE):
                    replace_file(path, partial(part.write, images))
                    packed.write_index(path, part.rows)
                self._count(archive)

    def _entries(self, archive: Shard) -> Iterator[Entry]:
        for start in range(archive.start, archive.stop, 256):
            yield from self._catalog.entries(start, min(start + 256, archive.stop))

    def _allow(self, bad: Sequence[BadImage]) -> None:
        """Raises MaxactError where these bad images and those of whole archives are too many."""
        allowed = self._run.allowed_bad(len(self._catalog))
        found = [*self._bad.values(), *bad]
        if len(found) > allowed:
            examples = "; ".join(f"{image.key}: {image.error}" for image in found[-_EXAMPLES:])
            raise MaxactError(
                f"{len(found)} images are bad, more than the {allowed} that --max-bad allows ({examples}); mend them "
                "and start again with --overwrite, or allow more and run the same again"
            )

    def _finish(self) -> dict[str, Any]:
        bad = tuple(self._bad[number] for number in sorted(self._bad))
        summary = {
            "images": len(self._catalog),
            "packed": len(self._catalog) - len(bad),
            "bad": len(bad),
            "archives": len(self._archives),
            "bytes": sum(self._sizes.values()),
        }
        if not summary["packed"]:
            raise MaxactError(
                f"{self._folder}: not one of the {summary['images']} images could be used "
                f"({bad[0].key}: {bad[0].error})"
            )
        path = self._folder / packed.ERRORS
        with writing(path, _ADVICE):
            replace_file(path, lambda aside: write_errors(aside, bad))
        self._save(finished=True, summary=summary)
        return summary


# The folder


def _saved(folder: Path) -> dict[str, Any] | None:
    """What pack.json says of a pack that was begun; one that is being deleted says nothing."""
    about = packed.read_pack(os.fsencode(folder))
    return about if about and "settings" in about else None


def _check_place(folder: Path) -> None:
    """Raises MaxactError where a folder holds anything but a pack, or the beginnings of one."""
    if not os.path.exists(folder):
        return
    if not folder.is_dir():
        raise MaxactError(f"{folder}: is a file, not a folder; choose another place for the pack")
    if packed.read_pack(os.fsencode(folder)) is not None:
        return
    with writing(folder):
        others = [item for item in folder.iterdir() if item.name != "run"]
        run = folder / "run"
        others += [item for item in (run.iterdir() if run.is_dir() else ()) if item.name not in _RUN]
    if leftovers(others) != others:
        raise MaxactError(f"{folder}: there is something else here; choose another place for the pack")


_RUN = ("catalog", "lock", "log")


def _refuse_inside(catalog: Catalog, folder: Path) -> None:
    """Raises UsageError where images to pack are in the folder of the pack: starting it would delete them."""
    here = os.path.realpath(os.fsencode(folder))
    if any(os.path.dirname(os.path.realpath(path)) == here for path in packed.archives(catalog.table)):
        raise UsageError(f"{folder}: holds images that are to be packed; choose another place for the pack")


def _refuse_other(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises MaxactError, with the differences, where a pack was made otherwise. Versions do not count."""
    found = []
    for part, values in wanted.items():
        for name, theirs in json.loads(json.dumps(values)).items():
            mine = saved[part].get(name)
            if mine != theirs:
                found.append(f"{name}: {shorten(mine)}, not {shorten(theirs)}")
    if found:
        raise MaxactError(
            f"{folder}: was made otherwise ({'; '.join(found)}); "
            "give the same arguments, another folder, or --overwrite"
        )


def _clear(folder: Path) -> None:
    """Deletes a pack. Cut short, what is left counts for nothing: pack.json says so first."""
    if (folder / packed.PACK).exists():
        write_json(folder / packed.PACK, packed.BEGINNING)
        archives = [path for path in folder.glob("*.tar") if path.stem.isdecimal()]
        indexes = [path for path in folder.glob(f"*.tar{packed.SUFFIX}") if path.name.partition(".")[0].isdecimal()]
        _delete([*indexes, *archives, folder / packed.ERRORS, folder / "run" / "catalog"])


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
