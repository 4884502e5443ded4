"""How a store was made: all that decides its content, saved in it, and compared before it is continued."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maxact.errors import MaxactError
from maxact.tap import Tap
from maxact.topk import ENDS, List

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """How a store was made; its group's attribute `maxact`.

    `images` holds what the catalog was made from, `settings` the ScanConfig, both as plain values. The other
    dictionaries are as `models` and `scan` write them. `summary` is filled in when the scan has finished, `projected`
    (the settings of the second pass) when that has.
    """

    model: dict[str, Any]
    preprocessing: dict[str, Any]
    images: dict[str, Any]
    settings: dict[str, Any]
    taps: tuple[Tap, ...]
    versions: dict[str, str]
    format: int = FORMAT
    finished: bool = False
    summary: dict[str, Any] | None = None
    projected: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"taps": [tap.to_json() for tap in self.taps]}

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path) -> Manifest:
        """What `to_json` gave. Raises MaxactError for another format or a damaged one."""
        if not isinstance(values, dict):
            raise MaxactError(f"{path}: its attribute maxact is damaged (it is no table of names and values)")
        if values.get("format") != FORMAT:
            raise MaxactError(
                f"{path}: expected a store of format {FORMAT}, got {values.get('format')!r}; "
                "read it with the version of maxact that wrote it"
            )
        try:
            unsaid = {"compile": False, "pooled": None, "hardware_share": None}  # by older ones
            values = values | {"settings": unsaid | values["settings"]}
            return cls(**(values | {"taps": tuple(Tap.from_json(tap) for tap in values["taps"])}))
        except (KeyError, TypeError, ValueError) as error:
            raise MaxactError(f"{path}: its attribute maxact is damaged ({error})") from error

    def lists(self) -> list[List]:
        """The lists of peaks that the store has: its scores, at the ends that were asked for."""
        return [(score, end) for score in sorted(self.settings["scores"]) for end in ENDS if self.settings[end]]

    def differences(self, other: Manifest) -> list[str]:
        """What in `other` would give another result: one "name: ours, not theirs" each.

        Versions do not count: a store may be continued after an update.
        """
        pairs = []
        for part in ("model", "preprocessing", "images", "settings"):
            ours, theirs = (json.loads(json.dumps(getattr(m, part))) for m in (self, other))
            pairs += [(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]
        found = [f"{name}: {shorten(mine)}, not {shorten(yours)}" for name, mine, yours in pairs if mine != yours]
        if not found and self.taps != other.taps:
            found.append(f"taps: {len(self.taps)}, not {len(other.taps)} or in other places")
        return found


def shorten(value: Any) -> str:
    """A value as a few words for a message."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
