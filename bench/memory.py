"""Memory of a scan: its peak beside the bare network and the loader, and how it grows with the number of images.

Each measurement is a process of its own, which looks up its resident memory as it goes and its peak at the end. The
pictures are few and repeated; for a crop of less than 224 pixels they are small copies, so that 100,000 images take
a minute. Growth is given in bytes an image, from a fifth of the images on: until then buffers find their sizes. What
is there before the first image belongs to the catalog, whose bytes an image are given by themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from common import arguments, finish, photographs, resident
from maxact.catalog import Catalog
from maxact.config import RunConfig, ScanConfig, cores
from maxact.decode import make_decoder
from maxact.find import find_taps
from maxact.loader import load
from maxact.models import load_model
from maxact.numerics import kept_memory, numerics
from maxact.scan import Job, scan

POINTS = 10  # so often a run looks its memory up


@dataclass(frozen=True)
class Memory:
    """Of one process, in MB: what the catalog took, after each tenth of the images, and the peak."""

    catalog: float
    trajectory: list[float]
    peak: float

    def growth(self, images: int) -> float:
        """Bytes an image, from a fifth of the images to the end."""
        settled = self.trajectory[POINTS // 5 - 1 :]
        return (settled[-1] - settled[0]) * 2**20 / (images * (1 - 1 / 5))


def one(what: str, model_name: str, paths: str, images: int, crop: int) -> Memory:
    """Runs one thing in this process."""
    model = load_model(model_name, weights="none", crop=crop, resize=crop + crop // 8)
    device = torch.device("cpu")
    settings = ScanConfig(shard=1024).resolve(device)
    assert settings.batch and settings.shard
    Catalog.build(paths, limit=1)  # what it imports is no image's
    before = resident()
    catalog = Catalog.build(paths, limit=images)
    taken = resident() - before
    trajectory: list[float] = []
    seen = 0

    def through(count: int) -> None:
        nonlocal seen
        seen += count
        while len(trajectory) < POINTS and seen * POINTS >= images * (len(trajectory) + 1):
            trajectory.append(resident())

    if what == "scan":
        job = Job(model.network, model.preprocess, find_taps(model).taps, catalog, settings, RunConfig("cpu"), device)
        result = None
        shards = iter(catalog.shards(settings.shard))
        given = scan([job], shards, threading.Event(), lambda tick: through(tick.images), lambda at: [job.tally(at)])
        for (partial,) in given:
            assert partial is not None
            result = partial if result is None else result.merge(partial)
    else:  # the network and the loader, and nothing else
        decoder = make_decoder("auto", model.preprocess, batch=settings.batch, threads=cores())
        batches = load(
            catalog,
            iter(catalog.shards(settings.shard)),
            [decoder],
            batch=settings.batch,
            readers=16,
        )
        network = model.network.to(memory_format=torch.channels_last)
        with numerics(cores()), kept_memory(), torch.inference_mode():
            for (batch,) in batches:
                network(batch.images.permute(0, 3, 1, 2).float())
                through(batch.present)
        decoder.close()
    return Memory(taken, trajectory, resident("VmHWM"))


def copies(sources: Sequence[Path], folder: Path, side: int) -> list[Path]:
    """Small copies of photographs, as JPEG."""
    made = []
    for index, source in enumerate(sources):
        made.append(folder / f"{index}.jpg")
        with Image.open(source) as picture:
            picture.convert("RGB").resize((side, side)).save(made[-1], quality=90)
    return made


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "", images="", runs="resnet18:224:640,squeezenet1_1:64:10000,squeezenet1_1:64:100000", child=""
    )
    if args.child:
        what, name, crop, count, paths = args.child.split(",")
        print(json.dumps(asdict(one(what, name, paths, int(count), int(crop)))))
        return
    sources = sorted(path.resolve() for path in photographs(args.images).rglob("*") if path.is_file())
    rows: list[tuple[object, ...]] = []
    details = {}
    with tempfile.TemporaryDirectory() as folder:
        for item in args.runs.split(","):
            name, crop, count = item.split(":")
            small = int(crop) < 224
            pictures = copies(sources, Path(folder), int(crop) + int(crop) // 8) if small else sources
            paths = Path(folder) / "paths.txt"
            many = islice(pictures * (int(count) // len(pictures) + 1), int(count))
            paths.write_text("".join(f"{path}\n" for path in many))
            bare, whole = (measure(f"{what},{name},{crop},{count},{paths}") for what in ("bare", "scan"))
            details[item] = {"bare": asdict(bare), "scan": asdict(whole)}
            figures = (bare.peak, whole.peak, whole.peak - bare.peak, whole.catalog * 2**20 / int(count))
            growth = (bare.growth(int(count)), whole.growth(int(count)))
            rows.append((name, int(crop), int(count), *figures, *growth))
            for what, memory in (("network and loader", bare), ("scan", whole)):
                print(f"{item} {what}, MB after each tenth:", *(f"{value:.0f}" for value in memory.trajectory))
    columns = (
        *("network", "crop", "images", "network and loader MB", "scan MB", "difference MB", "catalog bytes an image"),
        *("growth of network and loader, bytes an image", "growth of the scan, bytes an image"),
    )
    finish("memory", columns, rows, {"MB": details}, args.json)


def measure(child: str) -> Memory:
    """Runs `one` in a process of its own."""
    run = subprocess.run([sys.executable, __file__, "--child", child], check=True, capture_output=True, text=True)
    return Memory(**json.loads(run.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
