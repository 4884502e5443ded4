"""How many images a second the streaming heaps take on one core, beside torch.topk on the same values.

The channels are those of a ResNet-50 with every convolution tapped. The heaps are warm: they have seen --warm images
of random values before, so that few of the next ones enter, as in all but the first minute of a run over ImageNet.
The peer is what one writes with torch: the best k so far and the batch side by side, torch.topk, gather.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from common import arguments, finish, interleaved, median
from maxact.topk import Top


class Race:
    """Both ways over the same stream of random values, with k entries a channel."""

    def __init__(self, channels: int, batch: int, k: int) -> None:
        self._shape, self._k, self._seen = (batch, channels), k, 0
        self._rng = np.random.default_rng(0)
        self._positions = np.zeros(self._shape, np.int32)
        self._top = Top(channels, k)
        self._best = torch.full((channels, k), -torch.inf)
        self._image = torch.full((channels, k), -1, dtype=torch.int64)

    def heaps(self) -> float:
        """Images per second of one batch."""
        values = self._rng.standard_normal(self._shape, dtype=np.float32)
        begun = time.perf_counter()
        self._top.add(values, self._positions, np.arange(self._seen, self._seen + len(values)))
        self._seen += len(values)
        return len(values) / (time.perf_counter() - begun)

    def peer(self) -> float:
        """Images per second of one batch, with torch.topk."""
        values = torch.from_numpy(self._rng.standard_normal(self._shape, dtype=np.float32))
        begun = time.perf_counter()
        numbers = torch.arange(self._seen, self._seen + len(values)).expand(values.shape[1], -1)
        self._best, place = torch.cat([self._best, values.T], 1).topk(self._k)
        self._image = torch.cat([self._image, numbers], 1).gather(1, place)
        return len(values) / (time.perf_counter() - begun)

    def warm_up(self, images: int) -> None:
        """Lets the heaps see so many images; torch.topk costs the same from the first one on."""
        while self._seen < images:
            self.heaps()


def main() -> None:
    """Measures and reports."""
    args = arguments(__doc__ or "", channels=26560, batch=64, warm=50_000, rounds=35)
    torch.set_num_threads(1)
    rows = []
    details = {}
    for k in (9, 50, 100):
        race = Race(args.channels, args.batch, k)
        race.warm_up(args.warm)
        measured = interleaved({"heaps": race.heaps, "torch.topk": race.peer}, args.rounds)
        ours, theirs = median(measured["heaps"]), median(measured["torch.topk"])
        rows.append((args.channels, k, ours, theirs, ours / theirs))
        details[k] = measured
    columns = ("channels", "k", "heaps img/s", "torch.topk img/s", "ratio")
    finish("heaps", columns, rows, {"warm": args.warm, "measured": details}, args.json)


if __name__ == "__main__":
    main()
