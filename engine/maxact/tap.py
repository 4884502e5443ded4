"""A tap: a place in a network whose output is recorded. `taps` finds and runs them, `store` keeps what they gave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Tap:
    """A place whose output is recorded.

    `name` is the path of the module where it is recorded, with `:1`, `:2` ... for that module's later calls;
    `layer` the path of the layer that it records, `kind` that layer's class. `map` is (rows, columns): tokens count
    as [T, 1] and vectors as [1, 1]. `axis` is the channel axis of the output, 1 or -1.
    """

    name: str
    module: str
    call: int
    layer: str
    kind: str
    channels: int
    map: tuple[int, int]
    axis: int

    @property
    def positions(self) -> int:
        """How many positions one map has."""
        return self.map[0] * self.map[1]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tap:
        """What `to_json` gave, also after a round through JSON. Raises ValueError or TypeError for what is no tap."""
        tap = cls(**(values | {"map": tuple(values["map"])}))
        words, numbers = (tap.name, tap.module, tap.layer, tap.kind), (tap.call, tap.channels, tap.axis, *tap.map)
        if not all(isinstance(word, str) for word in words) or not all(type(number) is int for number in numbers):
            raise TypeError(f"tap {tap.name!r}: a name is no text, or a number no whole one")
        # the name is that of a folder of the store
        if tap.name in ("", ".", "..") or "/" in tap.name or "\0" in tap.name:
            raise ValueError(f"tap {tap.name!r}: cannot bear this name")
        good = tap.channels >= 1 and tap.call >= 0 and tap.axis in (1, -1)
        if not good or len(tap.map) != 2 or min(tap.map) < 1 or max(tap.channels, tap.positions) >= 1 << 31:
            raise ValueError(f"tap {tap.name!r}: a number of it cannot be")
        return tap


def columns(taps: Iterable[Tap]) -> Iterator[tuple[Tap, int, int]]:
    """Each tap with the first and past its last column in a table of all taps' channels side by side."""
    start = 0
    for tap in taps:
        yield tap, start, start + tap.channels
        start += tap.channels
