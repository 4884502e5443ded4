"""Which blocks a second pass has, and what their arrays hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import numpy as np

from maxact import crops
from maxact.config import ProjectConfig
from maxact.errors import MaxactError
from maxact.field import Field
from maxact.ledger import Ledger
from maxact.project import Block
from maxact.results import Peaks
from maxact.store import Store
from maxact.tap import Tap
from maxact.winners import Layout

_LARGEST_MAP = 32  # rows and columns of the activation maps that are kept


def plan(
    store: Store,
    chosen: Mapping[str, Sequence[int]],
    fields: Mapping[str, Field],
    settings: ProjectConfig,
    ledger: Ledger,
) -> Iterator[Block]:
    """The blocks in which something is left to do, of the chosen channels of each tap.

    Raises MaxactError where what is there was projected to other shapes, which only another version does.
    """
    taps = {tap.name: tap for tap in store.manifest.taps if tap.name in chosen}
    numbers = count()
    for name, tap in taps.items():
        results = store[name]
        for (score, end), peaks in results.lists.items():
            layout = _layout(settings, tap, fields[name], peaks, score)
            place = f"{name}/{score}/{end}"
            if ledger.done.get(place) and layout != (stored := store.winners(name, score, end).layout):
                raise MaxactError(
                    f"{store.path}: {place} was projected by another version of maxact, to other shapes "
                    f"({stored.frame}, not {layout.frame}); --overwrite starts the second pass again"
                )
            left = np.zeros(tap.channels, bool)
            left[ledger.left(place, chosen[name])] = True
            shown = peaks.first(layout.shown)
            for start in range(0, tap.channels, layout.chunk):
                part = slice(start, min(start + layout.chunk, tap.channels))
                if left[part].any():
                    image = np.where(left[part, None], shown.image[part], -1)
                    position = None if shown.position is None else shown.position[part]
                    yield Block(
                        next(numbers),
                        tap,
                        fields[name],
                        place,
                        layout,
                        start,
                        np.flatnonzero(left[part]),
                        Peaks(image, shown.score[part], position),
                        np.nan_to_num(results.stats["std"][part]).astype(np.float32),
                    )


def _layout(settings: ProjectConfig, tap: Tap, field: Field, peaks: Peaks, score: str) -> Layout:
    """What the arrays of one list are to hold."""
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
