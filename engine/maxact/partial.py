"""What some shards gave: the strongest peaks, the statistics, the bad images, and which shards those are.

A `Tally` counts one shard and closes into a `Partial`; Partials of different shards merge into one, in any order and
to the same bits. Ranked peaks merge freely, their order being total. Sums of floats do not, so the statistics are
kept as the nodes of one binary tree over the shard numbers: node (level, index) covers the shards from
index * 2**level to (index + 1) * 2**level, and is only ever the sum of its two halves, the left one first. What a run
has counted is a set of such nodes, and their total is always taken along the tree.

The leaf of a shard that has bad images stays by itself, so that the shard can be taken out and scanned again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from maxact.catalog import Shard
from maxact.errors import MaxactError
from maxact.stats import Stats
from maxact.topk import List, Ranked, Top
from maxact_kernels.peaks import Peaks

Node = tuple[int, int]  # level, index


@dataclass(frozen=True)
class BadImage:
    """An image that gave no peaks: its number and key, the stage that failed (read, decode) and why."""

    image: int
    key: str
    stage: str
    error: str


@dataclass(frozen=True)
class Partial:
    """The result of a set of shards; immutable.

    `tops` holds for every score and end the peaks [C, k]; `stats` the tree's nodes; `bad` the bad images by number;
    `grey` how many images each shard left out for having no colour (shards with none are not in it).
    """

    shards: frozenset[int]
    tops: dict[List, Ranked]
    stats: dict[Node, Stats]
    bad: tuple[BadImage, ...] = ()
    grey: dict[int, int] = field(default_factory=dict)
    held: frozenset[int] = frozenset()  # shards with bad images, whose leaves stay by themselves

    def merge(self, other: Partial) -> Partial:
        """The result of both. Raises ValueError where they have a shard in common."""
        if self.shards & other.shards:
            raise ValueError(f"expected partials of different shards, got {min(self.shards & other.shards)} twice")
        held = self.held | other.held
        return Partial(
            self.shards | other.shards,
            {key: top.merge(other.tops[key]) for key, top in self.tops.items()},
            _join_siblings(self.stats | other.stats, held),
            tuple(sorted((*self.bad, *other.bad), key=lambda bad: bad.image)),
            self.grey | other.grey,
            held,
        )

    def without(self, shard: Shard) -> Partial:
        """The result less a shard that has bad images, for scanning it again.

        Peaks that the shard had displaced are not brought back: they will be displaced again, by the same ones.
        """
        return Partial(
            self.shards - {shard.index},
            {key: top.without(shard.start, shard.stop) for key, top in self.tops.items()},
            {node: stats for node, stats in self.stats.items() if node != (0, shard.index)},
            tuple(bad for bad in self.bad if not shard.start <= bad.image < shard.stop),
            {index: count for index, count in self.grey.items() if index != shard.index},
            self.held - {shard.index},
        )

    def total(self) -> Stats:
        """The statistics of all shards, summed along the tree."""
        levels = max(self.shards).bit_length()
        total = _fold(self.stats, (levels, 0))
        assert total is not None
        return total

    def save(self, path: Path) -> None:
        """Writes everything to one file, in safetensors' format. Raises OSError where that cannot be done."""
        arrays: dict[str, NDArray[np.generic]] = {"shards": np.array(sorted(self.shards), np.int64)}
        for (score, end), top in self.tops.items():
            arrays |= {f"top/{score}/{end}/{name}": array for name, array in vars(top).items()}
        for (level, index), stats in self.stats.items():
            arrays |= {f"stats/{level}/{index}/{name}": array for name, array in vars(stats).items()}
        notes = {
            "bad": [asdict(bad) for bad in self.bad],
            "grey": list(self.grey.items()),
            "held": sorted(self.held),
        }
        arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        try:
            safetensors.numpy.save_file(arrays, path)
        except safetensors.SafetensorError as error:  # a full disk comes as one, too
            raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path) -> Partial:
        """Reads what `save` wrote. Raises MaxactError where the file is not such a one."""
        tops: dict[List, dict[str, NDArray[np.generic]]] = {}
        nodes: dict[Node, dict[str, NDArray[np.generic]]] = {}
        try:
            arrays = safetensors.numpy.load_file(path)
            notes = json.loads(arrays.pop("notes").tobytes())
            shards = frozenset(arrays.pop("shards").tolist())
            for name, array in arrays.items():
                kind, first, second, column = name.split("/")
                if kind == "top":
                    tops.setdefault((first, second), {})[column] = array  # type: ignore[arg-type]
                else:
                    nodes.setdefault((int(first), int(second)), {})[column] = array
            return cls(
                shards,
                {key: Ranked(**columns) for key, columns in tops.items()},  # type: ignore[arg-type]
                {node: Stats(**columns) for node, columns in nodes.items()},  # type: ignore[arg-type]
                tuple(BadImage(**bad) for bad in notes["bad"]),
                dict(notes["grey"]),
                frozenset(notes["held"]),
            )
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise MaxactError(f"{path}: not a state of a run ({error})") from error


class Tally:
    """Counts one shard, batch by batch: `add`, then `close`.

    `kept` says how many peaks to keep for each score and end. Mean scores have no position.
    """

    def __init__(self, shard: Shard, channels: int, kept: dict[List, int]) -> None:
        self._shard = shard
        self._tops = {(score, end): Top(channels, k, end) for (score, end), k in kept.items()}
        self._stats = Stats.empty(channels)

    def add(self, peaks: Peaks, numbers: NDArray[np.int64]) -> None:
        """Adds a batch: peaks [N, C], image numbers [N], negative where a row is masked."""
        for (score, _), top in self._tops.items():
            top.add(getattr(peaks, score), peaks.position, numbers)
        self._stats.add(peaks, numbers)

    def close(self, bad: Sequence[BadImage] = (), grey: int = 0) -> Partial:
        """The shard's result."""
        index = self._shard.index
        return Partial(
            frozenset({index}),
            {key: top.state() for key, top in self._tops.items()},
            {(0, index): self._stats},
            tuple(bad),
            {index: grey} if grey else {},
            frozenset({index} if bad else ()),
        )


def _join_siblings(nodes: dict[Node, Stats], held: frozenset[int]) -> dict[Node, Stats]:
    """Sums every pair of halves that is there, level by level, but for leaves that are held."""
    nodes = dict(nodes)
    level = 0
    while any(node[0] >= level for node in nodes):
        for left in [node for node in nodes if node[0] == level and node[1] % 2 == 0]:
            right = (level, left[1] + 1)
            if right in nodes and not (level == 0 and held & {left[1], right[1]}):
                nodes[level + 1, left[1] // 2] = nodes.pop(left).merge(nodes.pop(right))
        level += 1
    return nodes


def _fold(nodes: dict[Node, Stats], node: Node) -> Stats | None:
    """The sum of everything below a node; None where nothing was counted."""
    if node in nodes or node[0] == 0:
        return nodes.get(node)
    level, index = node
    left, right = _fold(nodes, (level - 1, 2 * index)), _fold(nodes, (level - 1, 2 * index + 1))
    return left.merge(right) if left and right else left or right
