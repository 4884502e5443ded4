"""How the cost of a scan grows: with images, channels, k, taps and bad images, one at a time; `--axis` chooses.

Each point is two processes of their own on one store: the first is stopped by a signal when half the shards are done,
the second goes on to the end. The network is a chain of 1 x 1 convolutions on 2 x 2 maps, a tap each, and the
pictures are small and repeated, so that reading, decoding, counting and storing are what costs.

Of both processes: seconds from the start of the process until the first batch is through (the first time with the
catalog, the second with the state), seconds and CPU seconds of each image after the first batches, peaks of memory
before the first batch, in the loop and at the end, what commits and the end take, and what is on the disk.

Beside the measured growth from one point to the next stands what must grow: for the state and the store their numbers'
own bytes, for the memory of the loop one copy of the heaps and of the statistics, one batch of peaks and of maps, and
the catalog. The table of growth says how often that fits, and with which power of the axis the times grow. (The
store is compressed, so it can be smaller than its numbers.) Compiling is left out: it is a step that does not grow.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import arguments, cuttings, finish, forget_peak, photographs, resident
from maxact import run
from maxact.catalog import Catalog
from maxact.preprocess import Preprocess
from maxact.process import Interrupted, Progress
from maxact.progress import print_table
from maxact.store import Store

MB = 2**20
SIDE = 32  # pixels of the model input
MAP = 2  # rows and columns of every tap's map
WIDTH = 8  # channels from one tap to the next
BATCH = 32
WARM_UP = 4  # batches that do not count

AXES = {
    "images": (1_000, 3_000, 10_000, 30_000, 100_000),
    "channels": (1_000, 3_000, 10_000, 30_000, 100_000),
    "k": (1, 10, 100, 300, 1_000),
    "taps": (1, 10, 30, 100, 300),
    "bad": (0, 1, 8, 32, 64),
}


@dataclass(frozen=True)
class Point:
    """What is scanned: `channels` of all `taps` together; one image in each of `bad` shards cannot be decoded."""

    images: int
    channels: int
    k: int
    taps: int
    bad: int
    shard: int

    def must(self) -> dict[str, float]:
        """MB that cannot be had for less: what the lists and statistics hold, and what a batch and the catalog do."""
        entries = self.channels * min(self.k, self.images)
        heaps = entries * 16 / MB  # a number, a score and a position: 8 + 4 + 4 bytes
        sums = self.channels * 48 / MB
        nodes = math.ceil(self.images / BATCH).bit_count()  # of the tree in which sums of floats are taken
        batch = BATCH * self.channels * (6 + MAP * MAP) * 4 / MB
        catalog = self.images * CATALOG / MB
        return {
            "loop MB": heaps + nodes * sums + batch + catalog,
            "end MB": heaps + nodes * sums + catalog,
            "state MB": heaps + nodes * sums,
            "store MB": (entries * 20 + self.channels * 28) / MB,  # a position is two numbers there
        }


CATALOG = 100  # bytes of an image in the catalog, as these pictures are called: its key and path and five numbers


class Chain(nn.Module):
    """1 x 1 convolutions, one after the other, of equal numbers of channels; the first few of them go on."""

    def __init__(self, taps: int, channels: int) -> None:
        super().__init__()
        self.preprocess = Preprocess(resize=SIDE, crop=(SIDE, SIDE))
        generator = torch.Generator().manual_seed(0)
        widths = [channels // taps + (index < channels % taps) for index in range(taps)]
        carried = [3, *(min(WIDTH, width) for width in widths)]
        self.layers = nn.ModuleList(
            nn.Conv2d(carried[index], width, 1, bias=False) for index, width in enumerate(widths)
        )
        for index, layer in enumerate(self.layers):
            nn.init.normal_(layer.weight, generator=generator)  # type: ignore[arg-type]
            if index:  # what goes on neither grows nor fades
                nn.init.orthogonal_(layer.weight[: carried[index + 1]], generator=generator)  # type: ignore[index]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = nn.functional.adaptive_avg_pool2d(images, MAP)
        for layer in self.layers:
            maps = layer(maps)[:, :WIDTH]
        return maps


@dataclass
class Figures:
    """What one process measured. Times in seconds, memory in MB."""

    first_batch: float = 0.0  # since the process started
    imports: float = 0.0  # of that
    images: int = 0  # in the loop, without the first batches
    loop: float = 0.0
    cpu: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)  # peaks: "start", "loop", "end"
    calls: dict[str, list[float]] = field(default_factory=dict)  # seconds of every call of the parts that are timed
    state: float = 0.0  # the last commit's
    after: float = 0.0  # from the store being finished to the end
    store: float = 0.0  # without the catalog and what is in run/
    files: int = 0


def one(point: Point, paths: str, store: str, half: bool, begun: float) -> Figures:
    """Scans in this process, which started at `begun`, to the end or to the first half."""
    figures = Figures(imports=time.monotonic() - begun)
    ended: dict[str, float] = {}
    marks: list[tuple[float, float, int]] = []  # after each batch: time, CPU time, images

    def watch(name: str, owner: Any, attribute: str) -> None:
        inner: Callable[..., Any] = getattr(owner, attribute)
        calls = figures.calls.setdefault(name, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            if name == "fields":  # the first thing after the loop
                figures.memory["loop"] = resident("VmHWM")
                forget_peak()
            start = time.monotonic()
            result = inner(*args, **kwargs)
            ended[name] = time.monotonic()
            calls.append(ended[name] - start)
            if name == "commit":
                figures.state = sum(path.stat().st_size for path in Path(store, "run").glob("state-*")) / MB
            return result

        # what a class gives of a classmethod is bound to it already
        setattr(owner, attribute, staticmethod(timed) if hasattr(inner, "__self__") else timed)

    watch("catalog", Catalog, "build")
    watch("create", Store, "create")
    watch("load state", Store, "state")
    watch("commit", Store, "commit")
    watch("fields", run, "of_taps")
    watch("finish", Store, "finish")
    enough = math.ceil(point.images / 2 / point.shard) * point.shard

    def report(progress: Progress) -> None:
        if progress.stage != "scanning":
            return
        marks.append((time.monotonic(), time.process_time(), progress.done))
        if len(marks) == 1:
            figures.first_batch = marks[0][0] - begun
            figures.memory["start"] = resident("VmHWM")
            forget_peak()
        if half and progress.done >= enough:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        run.scan(
            Chain(point.taps, point.channels),
            paths,
            store,
            top=point.k,
            batch=BATCH,
            shard=point.shard,
            compile=False,  # from 10,000 images on it would be tried, which is a step and no growth
            max_bad=point.images,
            report=report,
        )
    except Interrupted:
        assert half
    else:
        figures.after = time.monotonic() - ended["finish"]
    figures.memory.setdefault("loop", resident("VmHWM"))
    figures.memory["end"] = resident("VmHWM")
    if len(marks) > WARM_UP:
        (first, last) = marks[WARM_UP], marks[-1]
        figures.loop, figures.cpu, figures.images = last[0] - first[0], last[1] - first[1], last[2] - first[2]
    files = [path for path in Path(store).rglob("*") if path.is_file()]
    apart = ("run", "images.parquet")
    figures.store = sum(path.stat().st_size for path in files if path.relative_to(store).parts[0] not in apart) / MB
    figures.files = len(files)
    return figures


def measure(point: Point, pictures: list[Path], broken: Path) -> tuple[Figures, Figures]:
    """Both processes of one point."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "paths.txt")
        names = [*islice(pictures * (point.images // len(pictures) + 1), point.images)]
        shards = math.ceil(point.images / point.shard)
        for index in range(point.bad):
            names[index * shards // point.bad * point.shard] = broken
        paths.write_text("".join(f"{name}\n" for name in names))
        given = json.dumps({"point": asdict(point), "paths": str(paths), "store": str(Path(folder, "store.zarr"))})
        first, second = (_child(given, half) for half in (True, False))
    return first, second


def _child(given: str, half: bool) -> Figures:
    text = json.dumps(json.loads(given) | {"half": half, "begun": time.monotonic()})
    ran = subprocess.run([sys.executable, __file__, "--child", text], stdout=subprocess.PIPE, text=True, check=True)
    return Figures(**json.loads(ran.stdout.splitlines()[-1]))


def row(first: Figures, second: Figures) -> dict[str, float]:
    """One line of the table."""
    seen = max(1, first.images + second.images)
    commits = [*first.calls["commit"], *second.calls["commit"]]
    return {
        "img/s": seen / max(first.loop + second.loop, 1e-9),
        "CPU ms an image": (first.cpu + second.cpu) / seen * 1000,
        "start s": first.first_batch,
        "resume s": second.first_batch,
        "start MB": max(first.memory["start"], second.memory["start"]),
        "loop MB": max(first.memory["loop"], second.memory["loop"]),
        "end MB": second.memory["end"],
        "commit s": max(commits),
        "state MB": second.state,
        "fields s": sum(second.calls["fields"]),
        "finish s": sum(second.calls["finish"]),
        "after it s": second.after,
        "store MB": second.store,
        "files": second.files,
    }


def growth(axis: str, values: list[int], points: list[Point], rows: list[dict[str, float]]) -> list[tuple[object, ...]]:
    """From each point to the next: how much of what must grow the memory and the disk took, the powers of times."""
    lines: list[tuple[object, ...]] = []
    for index in range(1, len(values)):
        (a, b), (old, new) = values[index - 1 : index + 1], rows[index - 1 : index + 1]
        step = f"{axis} {a:,} to {b:,}"
        before, after = points[index - 1].must(), points[index].must()
        for name in after:
            grown, needed = new[name] - old[name], after[name] - before[name]
            times = grown / needed if needed > 0.1 else None
            lines.append((step, name, old[name], new[name], grown * MB / (b - a), needed * MB / (b - a), times, None))
        for name in ("CPU ms an image", "start s", "resume s", "commit s", "fields s", "finish s", "after it s"):
            power = math.log(new[name] / old[name]) / math.log(b / a) if a and min(new[name], old[name]) > 0 else None
            lines.append((step, name, old[name], new[name], (new[name] - old[name]) / (b - a), None, None, power))
    return lines


def main() -> None:
    """Measures and reports."""
    if sys.argv[1:2] == ["--child"]:
        given = json.loads(sys.argv[2])
        given["point"] = Point(**given["point"])
        print(json.dumps(asdict(one(**given))))
        return
    args = arguments(
        __doc__ or "",
        axis="all",
        values="",
        images=2048,
        channels=3000,
        k=50,
        taps=10,
        shard=512,
        pictures=2048,
        sources="",
    )
    base = Point(args.images, args.channels, args.k, args.taps, 0, args.shard)
    chosen = list(AXES) if args.axis == "all" else args.axis.split(",")
    sources = sorted(path for path in photographs(args.sources).rglob("*.jpg"))
    table: list[tuple[object, ...]] = []
    details: dict[str, Any] = {}
    steps: list[tuple[object, ...]] = []
    columns: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        pictures = cuttings(sources, Path(folder), SIDE, args.pictures)
        broken = Path(folder, "broken.jpg")
        broken.write_bytes(b"no picture")
        for axis in chosen:
            values = [*map(int, args.values.split(","))] if args.values else list(AXES[axis])
            points = [replace(base, **{axis: value}) for value in values]
            if axis == "bad":  # small shards, so that there are enough of them
                points = [replace(point, shard=BATCH) for point in points]
            rows = []
            for value, point in zip(values, points, strict=True):
                first, second = measure(point, pictures, broken)
                rows.append(row(first, second))
                columns = tuple(rows[-1])
                table.append((axis, value, *rows[-1].values()))
                details[f"{axis} {value}"] = {"point": asdict(point), "first": asdict(first), "second": asdict(second)}
                print(f"{axis} {value:,}:", ", ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
            steps += growth(axis, values, points, rows)
    heads = ("step", "what", "before", "after", "a unit (bytes or s)", "needed bytes a unit", "times the need", "power")
    print_table(heads, steps, "growth")
    finish("scale", ("axis", "value", *columns), table, {"growth": [heads, *steps], "processes": details}, args.json)


if __name__ == "__main__":
    main()
