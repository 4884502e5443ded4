"""What some shards gave: the strongest peaks, the statistics, the bad images, and which shards those are.

A `Tally` counts one shard and closes into a `Partial`; Partials of different shards merge into one, in any order and
to the same bits, whatever the size of the shards. Ranked peaks merge freely, their order being total. Sums of floats
do not, so the statistics are kept as the nodes of one binary tree over the batch numbers of the catalog: node (level,
index) covers the batches from index * 2**level to (index + 1) * 2**level, and is only ever the sum of its two halves,
the left one first. What a run has counted is a set of such nodes, and their total is always taken along the tree.

The nodes of a shard that has bad images stay by themselves, so that the shard can be taken out and scanned again;
but only those of the first HELD such shards, or a state would grow with every bad image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from maxact.catalog import Shard
from maxact.errors import MaxactError
from maxact.sound import check_columns, expect, is_count
from maxact.stats import Stats
from maxact.topk import List, Ranked, Top
from maxact_kernels.peaks import Peaks

Node = tuple[int, int]  # level, index
HELD = 64  # shards with bad images that can be scanned again
# what reading a damaged file of ours may raise
DAMAGED = (
    OSError,
    safetensors.SafetensorError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
)


@dataclass(frozen=True)
class BadImage:
    """An image that gave no peaks: its number and key, the stage that failed (read, decode) and why."""

    image: int
    key: str
    stage: str
    error: str

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BadImage:
        """From its parts by name. Raises TypeError where one is missing or of another kind."""
        found = cls(**values)
        words = (found.key, found.stage, found.error)
        if not is_count(found.image) or not all(isinstance(word, str) for word in words):
            raise TypeError("a bad image that can be none")
        return found


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
    held: dict[int, tuple[Node, ...]] = field(default_factory=dict)  # shards that can be taken out, and their nodes

    @property
    def touched(self) -> frozenset[int]:
        """The shards of which it holds anything."""
        return self.shards

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays, which is nearly what `save` writes."""
        parts = (*self.tops.values(), *self.stats.values())
        return sum(array.nbytes for part in parts for array in vars(part).values())

    def merge(self, other: Partial) -> Partial:
        """The result of both. Raises ValueError where they have a shard in common."""
        if self.shards & other.shards:
            raise ValueError(f"expected partials of different shards, got {min(self.shards & other.shards)} twice")
        held = self.held | other.held
        held = {shard: held[shard] for shard in sorted(held)[:HELD]}
        return Partial(
            self.shards | other.shards,
            {key: top.merge(other.tops[key]) for key, top in self.tops.items()},
            _join_siblings(self.stats | other.stats, {node for nodes in held.values() for node in nodes}),
            tuple(sorted((*self.bad, *other.bad), key=lambda bad: bad.image)),
            self.grey | other.grey,
            held,
        )

    def without(self, shard: Shard) -> Partial:
        """The result less a shard that is held, for scanning it again.

        Peaks that the shard had displaced are not brought back: they will be displaced again, by the same ones.
        """
        return Partial(
            self.shards - {shard.index},
            {key: top.without(shard.start, shard.stop) for key, top in self.tops.items()},
            {node: stats for node, stats in self.stats.items() if node not in self.held[shard.index]},
            tuple(bad for bad in self.bad if not shard.start <= bad.image < shard.stop),
            {index: count for index, count in self.grey.items() if index != shard.index},
            {index: nodes for index, nodes in self.held.items() if index != shard.index},
        )

    def total(self) -> Stats:
        """The statistics of all shards, summed along the tree."""
        batches = max((index + 1) << level for level, index in self.stats)
        total = _fold(self.stats, (batches.bit_length(), 0))
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
            "held": list(self.held.items()),
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
            # the kernels that merge these look at nothing
            channels = len(next(iter(nodes.values()), {}).get("images", ()))
            for top in tops.values():
                check_columns(top, _RANKED, (channels, top["score"].shape[-1]))
            for (level, index), stats in nodes.items():
                expect(0 <= level < 64 and 0 <= index < 1 << 48, f"node {level}/{index}")
                check_columns(stats, _STATS, (channels,))
            grey, held = dict(notes["grey"]), dict(notes["held"])
            expect(channels > 0 and all(map(is_count, (*shards, *grey, *grey.values(), *held))), "numbers")
            return cls(
                shards,
                {key: Ranked(**columns) for key, columns in tops.items()},  # type: ignore[arg-type]
                {node: Stats(**columns) for node, columns in nodes.items()},  # type: ignore[arg-type]
                tuple(BadImage.from_json(bad) for bad in notes["bad"]),
                grey,
                {shard: tuple((level, index) for level, index in nodes) for shard, nodes in held.items()},
            )
        except FileNotFoundError:
            raise
        except DAMAGED as error:
            raise MaxactError(f"{path}: not a state of a run ({error})") from error


_RANKED = {"score": np.float32, "image": np.int64, "position": np.int32}
_STATS = {
    "images": np.int64,
    "unfit": np.int64,
    "active": np.int64,
    "total": np.float64,
    "square": np.float64,
    "min": np.float32,
    "max": np.float32,
}


class Tally:
    """Counts one shard, batch by batch: `add`, then `close`.

    `kept` says how many peaks to keep for each score and end. Mean scores have no position.
    """

    def __init__(self, shard: Shard, channels: int, kept: dict[List, int]) -> None:
        self._shard = shard
        self._tops = {(score, end): Top(channels, k, end) for (score, end), k in kept.items()}
        self._channels = channels
        self._batches = 0
        self._nodes: dict[Node, Stats] = {}

    def add(self, peaks: Peaks, numbers: NDArray[np.int64]) -> None:
        """Adds the next batch: peaks [N, C], image numbers [N], negative where a row is masked; all N are the same."""
        for (score, _), top in self._tops.items():
            top.add(getattr(peaks, score), peaks.position, numbers)
        stats = Stats.empty(self._channels)
        stats.add(peaks, numbers)
        number = self._shard.start // len(numbers) + self._batches
        self._nodes = _join_siblings(self._nodes | {(0, number): stats}, set())
        self._batches += 1

    def close(self, bad: Sequence[BadImage] = (), grey: int = 0) -> Partial:
        """The shard's result."""
        index = self._shard.index
        return Partial(
            frozenset({index}),
            {key: top.state() for key, top in self._tops.items()},
            self._nodes,
            tuple(bad),
            {index: grey} if grey else {},
            {index: tuple(self._nodes)} if bad else {},
        )


def _join_siblings(nodes: dict[Node, Stats], held: set[Node]) -> dict[Node, Stats]:
    """Sums every pair of halves that is there, level by level, but for nodes that are held."""
    nodes = dict(nodes)
    level = 0
    while any(node[0] >= level for node in nodes):
        for left in [node for node in nodes if node[0] == level and node[1] % 2 == 0]:
            right = (level, left[1] + 1)
            if right in nodes and not held & {left, right}:
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
