"""What a store has of one tap in its Zarr arrays: statistics, ranked lists, and the order that settling gave these.

A list of a 16-bit scan has its candidates beside it. While it is being settled (attribute `settling`) they are read in
its place; then `settled` says for how many first ranks it is, and `deviation` how far the scores were off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxact.arrays import DAMAGE, open_group, read_array, read_peaks, sync_attributes, write_array, write_peaks
from maxact.catalog import Catalog
from maxact.errors import MaxactError
from maxact.manifest import Manifest
from maxact.results import Peaks, TapResults
from maxact.sound import expect, is_count
from maxact.stats import STATISTICS
from maxact.tap import Tap
from maxact.topk import List


def write_tap(group: Any, results: TapResults, manifest: Manifest) -> None:
    """All of one tap, into the root group of a store."""
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
        shown = manifest.settings[end]
        write_peaks(node, f"{score}/{end}", peaks.first(shown), "rank")
        if shown < peaks.image.shape[1]:
            # a dimension of its own: xarray wants one that bears the same name to be as long in a group below
            write_peaks(node, f"{score}/{end}/candidates", peaks, "candidate")
    for name, values in results.stats.items():
        write_array(node, f"stats/{name}", values, ("channel",), 0 if name == "count" else np.nan)


def read_tap(path: Path, catalog: Catalog, tap: Tap, manifest: Manifest) -> TapResults:
    """What `write_tap` wrote into the store at `path`. Raises MaxactError where it is missing or damaged."""
    lists: dict[List, Peaks] = {}
    try:
        node = open_group(path, tap.name)
        for score, end in manifest.lists():
            place = node[f"{score}/{end}"]
            if "settling" in place.attrs:  # cut short: the order of 16 bits, which is whole
                whole = read_peaks(place["candidates"], (score, end), tap.channels)
                lists[score, end] = whole.first(manifest.settings[end])
            else:
                lists[score, end] = read_peaks(place, (score, end), tap.channels)
        stats = {
            name: read_array(node["stats"], name, np.int64 if name == "count" else np.float32, (tap.channels,))
            for name in STATISTICS
        }
        found = TapResults(catalog, tap, lists, stats, int(node.attrs["unfit"]))
        found.check()
        return found
    except DAMAGE as error:
        raise MaxactError(f"{path}: the tap {tap.name} is missing or damaged; scan again with --overwrite") from error


def read_candidates(path: Path, tap: Tap, key: List) -> Peaks:
    """All candidates of a list of a 16-bit scan. Raises MaxactError where they are missing or damaged."""
    try:
        return read_peaks(open_group(path, f"{place_of(tap.name, key)}/candidates"), key, tap.channels)
    except DAMAGE as error:
        raise MaxactError(
            f"{path}: the candidates of {tap.name} are missing or damaged; scan again with --overwrite"
        ) from error


def read_settled(path: Path, tap: str, key: List) -> tuple[int, float]:
    """How many first ranks of a list are settled, and the deviation that was seen. Raises MaxactError where what the
    list says of it cannot be."""
    place = place_of(tap, key)
    try:
        attributes = open_group(path, place).attrs
        settled, deviation = attributes.get("settled", 0), attributes.get("deviation", 0.0)
        expect(is_count(settled), "settled")
        expect(type(deviation) in (int, float) and deviation >= 0, "deviation")
        return settled, float(deviation)
    except DAMAGE as error:
        raise MaxactError(f"{path}: {place} is missing or damaged; scan again with --overwrite") from error


def write_settled(path: Path, group: Any, tap: str, key: List, peaks: Peaks, certain: NDArray[np.bool_]) -> None:
    """Replaces a list of the store at `path`, whose root is `group`."""
    place = place_of(tap, key)
    node = group[place]
    node.attrs.put(_without_settling(node.attrs) | {"settling": True})
    sync_attributes(path / place)
    for name, values in peaks._asdict().items():
        if values is not None:
            node[name][:] = values
    write_array(node, "certain", certain, ("channel",), False)


def mark_settled(group: Any, tap: str, key: List, ranks: int, deviation: float) -> None:
    """Says that the first `ranks` of a list are settled."""
    node = group[place_of(tap, key)]
    node.attrs.put(_without_settling(node.attrs) | {"settled": ranks, "deviation": deviation})


def place_of(tap: str, key: List) -> str:
    """Where in a store a list is."""
    return f"{tap}/{key[0]}/{key[1]}"


def _without_settling(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a list without those that settling gives it."""
    return {name: value for name, value in attributes.items() if name not in ("settling", "settled", "deviation")}
