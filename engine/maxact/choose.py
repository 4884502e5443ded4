"""What of a store is drawn: the chosen taps and channels, and names of files for them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence

from maxact.errors import UsageError
from maxact.preprocess import near
from maxact.store import Store
from maxact.tap import Tap

_MOST = 1_000_000  # channels that a range may name: more is a slip of the finger
_LONG = 120  # characters of a tap's name in a file's


def parse_channels(text: str) -> list[int]:
    """`0-63,171` -> 0, 1, … 63, 171: ascending, each once. Raises UsageError for anything else."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if match is None:
            raise UsageError(f"channels: expected numbers and ranges such as 0-63,171, got {text!r}")
        start, stop = int(match[1]), int(match[2] or match[1])
        if not start <= stop < start + _MOST:
            raise UsageError(f"channels: expected a range from low to high such as 0-63, got {part.strip()!r}")
        chosen.update(range(start, stop + 1))
    return sorted(chosen)


def choose_taps(store: Store, layers: Sequence[str] = ()) -> list[str]:
    """The taps whose name or layer one of `layers` matches, exactly or as a glob; all of them where it is empty.

    Raises UsageError for a pattern that matches nothing.
    """
    taps = store.manifest.taps
    chosen: set[str] = set()
    for pattern in layers:
        found = {tap.name for tap in taps if pattern in (tap.name, tap.layer)} or {
            tap.name
            for tap in taps
            if fnmatch.fnmatchcase(tap.name, pattern) or fnmatch.fnmatchcase(tap.layer, pattern)
        }
        if not found:
            near = difflib.get_close_matches(pattern, list(store), n=5, cutoff=0.3)
            hint = f"; close to it: {', '.join(near)}" if near else ""
            raise UsageError(
                f"layers: {store.path} has no tap that matches {pattern!r}{hint} (`maxact info` lists all)"
            )
        chosen |= found
    return [tap.name for tap in taps if not layers or tap.name in chosen]


def choose_channels(
    store: Store, layers: Sequence[str], channels: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, list[int]]:
    """The chosen channels, by tap: `channels` of each, or tap by tap, or all. Raises UsageError where there is none."""
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


def file_names(taps: Sequence[str]) -> dict[str, str]:
    """A name for files for every tap: letters, digits, dots and underscores, no two alike on any file system.

    There is no hyphen in it, so that what follows one in a longer name is never a tap's. None is `index`, which is the
    name of what lists them.
    """
    names: dict[str, str] = {}
    taken = {"index"}
    for tap in taps:
        plain = re.sub(r"[^A-Za-z0-9._]", "_", tap)[:_LONG]
        plain = re.sub(r"^\.", "_", plain) or "_"
        name, number = plain, 1
        while name.lower() in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name.lower())
        names[tap] = name
    return names
