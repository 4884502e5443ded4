"""The first pass beside its peers: who finds the same lists in what time, with what memory and on how much disk.

The contestants are described in contestants.py; each is a process of its own, round after round, with the same
network, weights, layers, image files, batch and threads. The files are photographs cropped once to the size of the
network, and random crops of them where there are not enough, so that nothing is resized on the way: every decoder
gives the same pixels. (Photographs of full size would cost the peers more.) After the first round every list is
compared with maxact's: the same images, but for near ties, with the same scores; otherwise nothing is reported.

Rates are those of images after the first ones; what comes once (a store to write, a decoder to build) is given apart,
and then the rate of the whole run with it. Where the forward pass is nearly all, rates say little about the rest, so
CPU time is given too: what each takes an image beyond the bare forward pass in its own memory layout and process
settings. Peak memory is the process's alone, without the workers of a DataLoader. The number of those, and the layout
of a peer, NCHW or channels_last, are the fastest of a short trial.

A peer that cannot be imported is named, with the reason, and left out. The second pass beside Captum is in deconv.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from common import ROOT, arguments, finish, interleaved, median, photographs
from contestants import PHOTOGRAPHS, Measurement, Task
from maxact.catalog import Catalog
from maxact.config import cores
from maxact.models import load_model

if TYPE_CHECKING:
    from contestants import Found

PEERS = ("zennit-crp", "thingsvision")  # what need not be installed
FEW = 2  # batches of the short run, from which on each image counts
TRIAL = 4  # more batches, by which a contestant's layout or number of workers is chosen
TOLERANCE = 1e-3  # of a channel's highest score: two memory layouts round otherwise
COMMON = 0.98  # of all winners, at least, are the same: near ties are rare


@dataclass(frozen=True)
class Result:
    """What a contestant took, and what it found."""

    measurement: Measurement
    found: Found


def write_images(source: Path, folder: Path, side: int, images: int) -> None:
    """Square JPEG files 00000.jpg, 00001.jpg, …: the middle of every photograph, then random parts of them."""
    catalog = Catalog.build(source)
    paths = [entry.source.decode() for entry in catalog.entries(0, min(len(catalog), images))]
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(images):
        with Image.open(paths[number % len(paths)]) as opened:
            picture = opened.convert("RGB")
        width, height = picture.size
        cut, y, x = (1.0, 0.5, 0.5) if number < len(paths) else (draw.uniform(0.4, 0.9), *draw.uniform(size=2))
        part = cut * min(width, height)
        left, top = x * (width - part), y * (height - part)
        box = (left, top, left + part, top + part)
        picture.resize((side, side), Image.Resampling.BICUBIC, box).save(folder / f"{number:05}.jpg", quality=90)


def start(task: Task) -> subprocess.CompletedProcess[str]:
    """Runs a contestant to its end."""
    out = Path(task.out)
    out.mkdir()
    file = out / "task.json"
    file.write_text(json.dumps(asdict(task)))
    # what this process has set for itself as maxact's command line does is no peer's
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")}
    command = [sys.executable, str(ROOT / "contestants.py"), str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def measure(task: Task) -> Result:
    """What a contestant took and found. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory(dir=Path(task.out)) as folder:
        task = replace(task, out=str(Path(folder) / "out"))
        ended = start(task)
        if ended.returncode:
            raise RuntimeError(f"{task.who} failed ({ended.returncode}):\n{ended.stderr[-3000:]}")
        measurement = Measurement(**json.loads((Path(task.out) / "measurement.json").read_text()))
        found: Found = {}
        with np.load(Path(task.out) / "found.npz") as parts:
            for name in dict.fromkeys(key.split("/", 1)[1] for key in parts.files):
                image, score, position = (parts[f"{part}/{name}"] for part in range(3))
                found[name] = image, score, position
    return Result(measurement, found)


def missing(task: Task) -> str:
    """Why a contestant cannot be had here, in one line; nothing where it can."""
    with tempfile.TemporaryDirectory(dir=Path(task.out)) as folder:
        ended = start(replace(task, out=str(Path(folder) / "out"), count=0))
    if not ended.returncode:
        return ""
    return (ended.stderr.strip() or f"it ended with {ended.returncode}").splitlines()[-1]


def fastest(*variants: Task) -> Task:
    """The best of some ways to run a contestant, by one short trial each."""

    def trial(task: Task) -> float:
        taken = measure(replace(task, count=min(task.count, (FEW + TRIAL) * task.batch))).measurement
        return taken.wall - taken.few_wall

    return min(variants, key=trial)


def enter(task: Task, workers: int) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks of all contestants, each in the way that is fastest on this machine; and the peers that cannot be
    had, with the reason. `workers` of a DataLoader are chosen too where they are negative."""
    last = replace(task, last=True)
    tasks = {
        "forward": replace(task, who="forward"),
        "forward, channels_last": replace(last, who="forward"),
        "forward, maxact's settings": replace(last, who="forward-maxact"),
    }
    numbers = sorted({0, 1, 2, task.threads}) if workers < 0 else [workers]
    for each in (task, last):
        name = "plain script, channels_last" if each.last else "plain script"
        tasks[name] = fastest(*(replace(each, who="plain", workers=number) for number in numbers))
    absent = {}
    for name in PEERS:
        if reason := missing(replace(task, who=name)):
            print(f"{name}: not installed ({reason})")
            absent[name] = reason
        else:
            tasks[name] = fastest(replace(task, who=name), replace(last, who=name))
    return tasks | {"maxact": replace(last, who="maxact")}, absent


def limit(task: Task) -> str:
    """Which bare forward pass a contestant contains; nothing for those themselves."""
    if task.who.startswith("forward"):
        return ""
    if task.who == "maxact":
        return "forward, maxact's settings"
    return "forward, channels_last" if task.last else "forward"


def compare(who: str, mine: Found, theirs: Found) -> tuple[float, float]:
    """The share of winners that both have, and among them that of equal positions. Raises RuntimeError where lists
    differ by more than near ties."""
    if mine.keys() != theirs.keys():
        raise RuntimeError(f"{who} has other layers: {sorted(mine.keys() ^ theirs.keys())}")
    equal = shared = every = 0
    for layer, (image, score, position) in mine.items():
        their_image, their_score, their_position = theirs[layer]
        if their_image.shape != image.shape:
            raise RuntimeError(f"{who}, {layer}: has lists of {their_image.shape}, not {image.shape}")
        margin = TOLERANCE * np.abs(score).max(1, keepdims=True)  # [C, 1]
        same = image[:, :, None] == their_image[:, None, :]  # [C, rank, rank of theirs]
        apart = np.abs(score[:, :, None] - their_score[:, None, :]) > margin[:, :, None]
        wrong = {
            "another score of the same image": (same & apart).any((1, 2)),
            "another score at the same rank": (np.abs(score - their_score) > margin).any(1),
            "an image missing": (~same.any(2) & (score > their_score[:, -1:] + margin)).any(1),
            "an image too many": (~same.any(1) & (their_score > score[:, -1:] + margin)).any(1),
            "an image twice": (same.sum(2) > 1).any(1),
        }
        for what, channels in wrong.items():
            if channels.any():
                channel = int(channels.argmax())
                lists = f"{image[channel]} {score[channel]}, {who} {their_image[channel]} {their_score[channel]}"
                raise RuntimeError(f"{layer}, channel {channel}: {what}: maxact {lists}")
        equal += int((same & (position[:, :, None] == their_position[:, None, :])).sum())
        shared += int(same.sum())
        every += image.size
    if shared < COMMON * every:
        raise RuntimeError(f"{who}: only {shared} of {every} winners are maxact's")
    return shared / every, equal / shared


@dataclass(frozen=True)
class Cost:
    """Seconds an image, on the clock and of CPU time."""

    wall: float
    cpu: float


def per_image(taken: Measurement, few: int, images: int) -> Cost:
    """What each image costs that comes after the first ones: nothing in it comes once."""
    more = images - few
    return Cost((taken.wall - taken.few_wall) / more, (taken.cpu - taken.few_cpu) / more)


def report(
    args: argparse.Namespace,
    tasks: Mapping[str, Task],
    costs: Mapping[str, Sequence[Measurement]],
    agree: Mapping[str, tuple[float, float]],
    absent: Mapping[str, str],
) -> None:
    """The table: medians over the rounds, ratios and differences within each."""
    few = FEW * args.batch
    each = {name: [per_image(cost, few, args.images) for cost in runs] for name, runs in costs.items()}
    rows = []
    for name, mine in each.items():
        wall = median([cost.wall for cost in mine])
        ratio = median([ours.wall / cost.wall for ours, cost in zip(each["maxact"], mine, strict=True)])
        starts = [run.few_wall - few * cost.wall for run, cost in zip(costs[name], mine, strict=True)]
        whole = median([args.images / cost.wall for cost in costs[name]])
        busy = median([1000 * cost.cpu for cost in mine])
        beyond: object = "-"
        if bare := limit(tasks[name]):
            beyond = median([1000 * (cost.cpu - own.cpu) for cost, own in zip(mine, each[bare], strict=True)])
        memory, disk = max(cost.memory for cost in costs[name]), max(cost.disk for cost in costs[name])
        rows.append((name, 1 / wall, ratio, max(0.0, median(starts)), whole, busy, beyond, memory, disk))
    columns = (
        *("contestant", "img/s", "of maxact's", "once, s", f"img/s of {args.images} with that"),
        *("CPU ms an image", "beyond its bare forward", "peak memory MB", "disk MB"),
    )
    details = {
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "photographs")},
        "chosen": {name: {"workers": task.workers, "channels_last": task.last} for name, task in tasks.items()},
        "equal winners and positions": agree,
        "not installed": absent,
        "measurements": {name: [asdict(cost) for cost in runs] for name, runs in costs.items()},
    }
    print("all lists agree; winners that are maxact's, and their positions that are:")
    for name, (winners, positions) in agree.items():
        print(f"  {name}: {winners:.4f}, {positions:.4f}")
    for name, task in tasks.items():
        if task.who == "plain" or name in PEERS:
            workers = f", {task.workers} workers" if task.who == "plain" else ""
            print(f"  {name} runs {'channels_last' if task.last else 'NCHW'}{workers}")
    finish("peers", columns, rows, details, args.json)


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "",
        photographs="",
        network="resnet18",
        images=512,
        batch=32,
        top=9,
        rounds=3,
        threads=cores(),
        workers=-1,  # chosen by trial
    )
    if args.images % args.batch or args.images < (FEW + 1) * args.batch:
        raise SystemExit(f"--images: whole batches, more than {FEW} (zennit-crp fails on a last batch of one)")
    model = load_model(args.network, weights="none")
    side = model.preprocess.crop[0]
    (ROOT / "out").mkdir(exist_ok=True)
    # beside the results, not in memory as /tmp may be: thingsvision writes 9 MB an image of a ResNet-18
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as folder:
        place = Path(folder)
        write_images(photographs(args.photographs), place / "images" / PHOTOGRAPHS, side, args.images)
        torch.save(model.network.state_dict(), place / "weights.pth")
        task = Task(
            *("", args.network, str(place / "weights.pth"), str(place / "images"), folder, side),
            *(args.images, FEW * args.batch, args.batch, args.top, args.threads),
        )
        tasks, absent = enter(task, args.workers)
        runs: dict[str, Callable[[], Result]] = {name: partial(measure, each) for name, each in tasks.items()}
        results = interleaved(runs, 1)
        mine = results["maxact"][0].found
        agree = {
            name: compare(name, mine, results[name][0].found)
            for name, each in tasks.items()
            if limit(each) and name != "maxact"
        }
        for name, more in interleaved(runs, args.rounds - 1).items():
            results[name] += more
    costs = {name: [result.measurement for result in each] for name, each in results.items()}
    report(args, tasks, costs, agree, absent)


if __name__ == "__main__":
    main()
