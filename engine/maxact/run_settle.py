"""Running what settles the order of a 16-bit scan: its candidates through the scan's own loop again, in float32."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig, ScanConfig
from maxact.fetch import look
from maxact.files import replace_file, writing
from maxact.local import attempts
from maxact.models import Model
from maxact.partial import BadImage
from maxact.process import Progress, Tick
from maxact.results import Peaks
from maxact.scan import Job, scan
from maxact.schedule import Schedule
from maxact.settle import Candidates, Exact, Picker, Settled, considered, settle
from maxact.store import Store
from maxact.tap import Tap, columns
from maxact.together import HAND_OVER
from maxact.topk import List
from maxact.watch import Watch

log = logging.getLogger("maxact")
_DEAR = 0.8  # share of the images from which a float32 scan costs as much


@dataclass(frozen=True)
class Picking:
    """Picking the candidates' peaks out of their images, as a worker does it."""

    job: Job
    candidates: Candidates
    patience: float = HAND_OVER

    def on(self, run: RunConfig) -> Picking:
        """The same for one worker."""
        return replace(self, job=self.job.on(run))

    def run(self, shards: Iterator[Shard], stop: threading.Event, report: Callable[[Tick], None]) -> Iterator[Exact]:
        """See `scan.scan`."""
        given = scan([self.job], shards, stop, report, lambda shard: [Picker(shard, self.candidates)])
        return (exact for (exact,) in given if exact)

    def merge(self, mine: Exact, theirs: Exact) -> Exact:
        """The result of both."""
        return mine.merge(theirs)

    def look(self) -> None:
        """Raises MaxactError where the images cannot be read from here."""
        look(self.job.catalog)


class Settling:
    """The candidates for the first ranks of some taps, and the float32 run over their images; the book of a Schedule.

    Taps whose lists are settled for as many ranks already are left out.
    """

    def __init__(self, store: Store, taps: list[Tap], ranks: int, batch: int, catalog: Catalog) -> None:
        """`catalog` is the store's, with the Dataset that was scanned where it was one."""
        self._store, self._ranks = store, ranks
        self._lists = store.manifest.lists()
        wanted = ScanConfig.from_json(store.manifest.settings)
        wanted = replace(wanted, precision="fp32", batch=batch, shard=None, compile=False)
        self.settings = wanted.resolve(torch.device("cpu"))
        self._left = {tap.name for tap in taps if not store.is_settled(tap.name, ranks)}
        scanned = self._begun({tap.name for tap in taps}) if self._left else set()
        self.taps = tuple(tap for tap in taps if tap.name in scanned)
        self._all = catalog
        self._settled: list[tuple[Tap, List, Settled]] = []
        self.bad: list[BadImage] = []
        self.deviation = 0.0

    def _shown(self, key: List) -> int:
        """How many first ranks of a list are to be settled."""
        kept: int = self._store.manifest.settings[key[1]]
        return min(self._ranks, kept)

    def _begun(self, chosen: set[str]) -> set[str]:
        """The taps to scan for: those that are left; where a run was cut short while it wrote its lists, all of that
        run, whose state is still there."""
        for about in self._store.settling().values():
            taps = set(about.pop("taps", ()))
            if self._terms.items() <= about.items() and self._left <= taps <= chosen:
                return taps
        return self._left

    @property
    def _terms(self) -> dict[str, int | None]:
        """What another run has to share to go on with the state of this one."""
        return {"ranks": self._ranks, "shard": self.shard, "batch": self.settings.batch}

    @property
    def shard(self) -> int:
        """Images in a shard."""
        assert self.settings.shard
        return self.settings.shard

    @cached_property
    def _candidates(self) -> dict[List, list[Peaks]]:
        """Of every list, each tap's candidates that are looked at."""
        count = considered(self._ranks)
        return {key: [self._store.candidates(tap.name, key).first(count) for tap in self.taps] for key in self._lists}

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """The images that are candidates, ascending."""
        images = [peaks.image.ravel() for each in self._candidates.values() for peaks in each]
        found: NDArray[np.int64] = np.unique(np.concatenate(images)) if images else np.empty(0, np.int64)
        return found[found >= 0]

    @cached_property
    def catalog(self) -> Catalog:
        """Those images, numbered anew."""
        return self._all.take(self.numbers)

    @cached_property
    def _about(self) -> str:
        """What the state is about: the same candidates of the same taps."""
        images = hashlib.sha256(self.numbers.tobytes()).hexdigest()
        return json.dumps({"taps": [tap.name for tap in self.taps], **self._terms, "images": images})

    @property
    def _path(self) -> Path:
        """The state's own file: other lists may be half settled at the same time."""
        return self._store.path / "run" / f"settling-{hashlib.sha256(self._about.encode()).hexdigest()[:12]}"

    def run(self, model: Model, run: RunConfig, stop: threading.Event, report: Callable[[Progress], None]) -> None:
        """Scans the images, committing like a scan, and finds the settled lists, unless `stop` ends it."""
        share = len(self.numbers) / max(1, len(self._all))
        dear = "; a scan in float32 would have cost the same" if share > _DEAR else ""
        log.info(
            "%s: settling the first %d ranks of all channels of %d taps in float32 on %d images, %.0f %% of the set%s",
            *(self._store.path, self._ranks, len(self.taps), len(self.numbers), 100 * share, dear),
        )
        counts = [np.concatenate([peaks.image for peaks in self._candidates[key]]) for key in self._lists]
        places = [np.where(image >= 0, np.searchsorted(self.numbers, image), -1) for image in counts]
        candidates = Candidates(dict(zip(self._lists, places, strict=True)), len(self.numbers))
        job = Job(
            model.network,
            model.preprocess,
            self.taps,
            self.catalog,
            self.settings,
            run,
            run.torch_device(),
        )
        schedule = Schedule[Exact](self, allowed_bad=len(self.numbers))
        schedule.stop = stop
        watch = Watch(schedule, report, "settling")
        with attempts(Picking(job, candidates), run, stop, watch.note) as (attempt, watch.crew):
            schedule.run(partial(watch.attempt, attempt))
        if not stop.is_set():
            self._settle(schedule.result)

    def state(self) -> Exact | None:
        """What the last commit wrote about the same candidates."""
        return Exact.load(self._path, self._about)

    def commit(self, part: Exact) -> None:
        """Makes `part` survive anything."""
        with writing(self._path):
            replace_file(self._path, lambda aside: part.save(aside, self._about))

    def write(self) -> None:
        """Writes the lists with their first ranks settled. Cut short, `run` and this can be done again: the state
        stays until the pass is finished."""
        # a tap that is settled already may have been projected in its order
        written = [each for each in self._settled if each[0].name in self._left]
        for tap, key, settled in written:
            self._store.write_settled(tap.name, key, settled.peaks, settled.certain)
        os.sync()
        for tap, key, settled in written:
            self._store.mark_settled(tap.name, key, self._shown(key), settled.deviation)
        os.sync()

    def _settle(self, part: Exact) -> None:
        manifest = self._store.manifest
        scanned = (manifest.summary or {})["scanned"]
        for index, (tap, start, stop) in enumerate(columns(self.taps)):
            stats = self._store[tap.name].stats
            spread = np.nan_to_num(stats["std"]).astype(np.float32)
            # an image whose 16-bit map overflowed is no candidate, and can be the strongest of all
            fit = stats["count"] == scanned * tap.positions
            for key in self._lists:
                candidates = self._candidates[key][index]
                place = part.position[key][start:stop] if key in part.position else None
                position = None if place is None else np.stack(np.divmod(place, np.int32(tap.map[1])), -1)
                settled = settle(
                    self._store.candidates(tap.name, key).first(manifest.settings[key[1]]),
                    candidates,
                    part.score[key][start:stop],
                    position,
                    ranks=self._shown(key),
                    end=key[1],
                    spread=spread,
                    precision=manifest.settings["precision"],
                )
                self._settled.append((tap, key, replace(settled, certain=settled.certain & fit)))
                self.deviation = max(self.deviation, settled.deviation)
        self.bad = [replace(bad, image=int(self.numbers[bad.image])) for bad in part.bad]
