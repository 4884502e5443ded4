"""What there is to say of a store, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxact.dense import size
from maxact.errors import MaxactError
from maxact.partial import Partial
from maxact.pooled import disk_bytes
from maxact.store import Store


def describe(store: Store) -> dict[str, Any]:
    """How a store was made, what is in it and what went wrong; ready for JSON. An unfinished one shows its last
    commit."""
    state = store.committed()
    manifest = store.manifest
    facts: dict[str, Any] = {
        "store": str(store.path),
        "format": manifest.format,
        "finished": manifest.finished,
        "model": manifest.model,
        "preprocessing": manifest.preprocessing,
        "images": manifest.images,
        "settings": manifest.settings,
        "versions": manifest.versions,
    }
    if manifest.finished:
        facts["summary"] = manifest.summary
    else:
        done, shards = len(state.shards) if state else 0, len(store.catalog.shards(store.shard))
        count = manifest.images["count"]
        facts["summary"] = f"unfinished: {store.scanned():,} of {count:,} images, {done} of {shards} shards"
    facts["projected"] = manifest.projected or "not yet (maxact project)"
    facts["pooled"] = _pooled(store, state)
    facts["taps"] = _taps(store)
    facts["errors"] = store.errors().to_pylist()
    return facts


def _pooled(store: Store, state: Partial | None) -> dict[str, Any] | str:
    """Of every image's values: what they are, what they take on the disk, and the share of images that have none."""
    kind = store.manifest.settings["pooled"]
    if not kind:
        return "not kept (maxact scan --pooled)"
    there = store.scanned()
    if summary := store.manifest.summary:
        without = there - summary["scanned"]
    else:
        without = len(state.bad) + sum(state.grey.values()) if state else 0
    return {
        "value": kind,
        "images": there,
        "without_value": round(without / there, 6) if there else 0.0,
        "bytes": disk_bytes(store.path),
        "uncompressed": size(there, sum(tap.channels for tap in store.manifest.taps)),
    }


def _taps(store: Store) -> list[dict[str, Any]]:
    rows = []
    for tap in store.manifest.taps:
        row: dict[str, Any] = {
            "tap": tap.name,
            "layer": tap.layer,
            "kind": tap.kind,
            "channels": tap.channels,
            "map": f"{tap.map[0]} x {tap.map[1]}",
        }
        try:
            results = store[tap.name]
        except MaxactError:  # nothing is committed yet
            rows.append(row)
            continue
        stats = results.stats
        row |= {
            "dead": int(results.dead.sum()),
            "mean": _number(np.mean, stats["mean"]),
            "active": _number(np.mean, stats["active"]),
            "highest": _number(np.max, stats["max"]),
            "unfit": results.unfit,
        }
        rows.append(row)
    return rows


def _number(reduce: Callable[[NDArray[Any]], Any], values: NDArray[Any]) -> float | None:
    """Over the channels in which a map entered (the others have NaN); None where there is none."""
    values = values[~np.isnan(values)]
    return float(reduce(values)) if len(values) else None
