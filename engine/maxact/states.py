"""The states of an unfinished run: one file per commit, `run/state-N`, of which the last one counts."""

from __future__ import annotations

import os
from pathlib import Path

from maxact.config import ScanConfig
from maxact.errors import MaxactError
from maxact.files import replace_file, writing
from maxact.lock import is_state
from maxact.manifest import Manifest
from maxact.partial import Partial
from maxact.process import show_bytes


def states(path: Path) -> list[tuple[int, Path]]:
    """Those of the store at `path`, by number: one, or two where a commit was cut short before it tidied up."""
    try:
        with os.scandir(path / "run") as entries:  # which say what they are: by now a file may be gone
            found = [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted((int(each.name[6:]), each) for each in found if is_state(each))


def save_state(path: Path, partial: Partial, advice: str) -> None:
    """Makes `partial` the state of the store at `path`: after this it survives anything; before, the last one does.
    What the system refuses is a MaxactError with `advice`."""
    before = states(path)
    number = before[-1][0] + 1 if before else 0
    place = path / "run" / f"state-{number}"
    with writing(place, f"it needs {show_bytes(partial.nbytes)}; {advice}"):
        replace_file(place, partial.save)
        for _, old in before:
            old.unlink()


def load_state(path: Path, manifest: Manifest, images: int) -> Partial | None:
    """What `save_state` last wrote; None before the first. Raises MaxactError where it is no state of the store, which
    has so many images."""
    while there := states(path) or states(path):  # one that is listed while it is replaced may be missed
        try:
            state = Partial.load(there[-1][1])
        except FileNotFoundError:  # a run that goes on has committed once more
            continue
        _check(there[-1][1], state, manifest, images)
        return state
    return None


def remove_states(path: Path) -> None:
    """Deletes those of the store at `path`."""
    for _, state in states(path):
        state.unlink()


def _check(path: Path, state: Partial, manifest: Manifest, images: int) -> None:
    """Raises MaxactError for a state that is none of this store: it would be merged with what is scanned."""
    settings = manifest.settings
    channels = sum(tap.channels for tap in manifest.taps)
    kept = {key: (channels, k) for key, k in ScanConfig.from_json(settings).kept().items()}
    shards = -(-images // settings["shard"])
    good = {key: top.score.shape for key, top in state.tops.items()} == kept
    for top in state.tops.values():
        good &= bool(top.image.min(initial=-1) >= -1 and top.image.max(initial=-1) < images)
    good &= max((*state.shards, *state.grey, *state.held), default=0) < shards
    good &= all(len(stats.images) == channels for stats in state.stats.values())
    if not good or any(bad.image >= images for bad in state.bad):
        raise MaxactError(f"{path}: is no state of this store; start again with --overwrite")
