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
        """What `to_json` gave, also after a round through JSON."""
        return cls(**(values | {"map": tuple(values["map"])}))


def columns(taps: Iterable[Tap]) -> Iterator[tuple[Tap, int, int]]:
    """Each tap with the first and past its last column in a table of all taps' channels side by side."""
    start = 0
    for tap in taps:
        yield tap, start, start + tap.channels
        start += tap.channels
