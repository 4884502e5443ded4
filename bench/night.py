"""A night: 1.28 million images through a network so small that this machine does it in minutes, all else real.

The catalog has as many paths as images (many of the same small files), which are read and decoded; heaps, statistics,
commits and the store are those of any scan. Measured in a process of its own: memory, looked up every second, from the
first minute of scanning on; the share of the time that commits take; and how long a run that is killed at some points
takes from its start to the first new batch, over what a run takes that has nothing to resume.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import arguments, cuttings, finish, photographs, resident
from maxact.partial import Partial
from maxact.preprocess import Preprocess
from maxact.process import Progress
from maxact.run import scan
from maxact.store import Store

SIDE = 32


class Stub(nn.Module):
    """Many channels for little work: patches of 8 x 8 pixels to 256 maps of 4 x 4, and those to a vector."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 256, 8, 8)
        self.pool, self.vector = nn.AdaptiveAvgPool2d(1), nn.Linear(256, channels - 256)
        self.preprocess = Preprocess(resize=SIDE, crop=(SIDE, SIDE))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, 32, 32] -> [N, channels - 256]."""
        out: torch.Tensor = self.vector(self.pool(self.patches(images)).flatten(1))
        return out


def child(listing: str, store: str, channels: int, devices: str) -> None:
    """Scans, and prints what is measured as JSON: a line when the first batch is through, and one at the end."""
    begun = time.perf_counter()
    commits = 0.0
    commit = Store.commit
    seen: list[tuple[float, float, int]] = []  # seconds, MB, images
    images = 0

    def timed(self: Store, partial: Partial) -> None:
        nonlocal commits
        before = time.perf_counter()
        commit(self, partial)
        commits += time.perf_counter() - before

    Store.commit = timed  # type: ignore[method-assign]

    def report(progress: Progress) -> None:
        nonlocal images
        if progress.stage == "scanning":
            if not images:
                print(json.dumps({"first": time.perf_counter() - begun, "before": progress.before}), flush=True)
            images = progress.before + progress.done

    def watch() -> None:
        while True:
            if images:
                seen.append((time.perf_counter() - begun, resident(), images))
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
    scan(Stub(channels), listing, store, devices=devices, report=report, compile=False)
    result = {"seconds": time.perf_counter() - begun, "commits": commits, "seen": seen, "peak": resident("VmHWM")}
    print(json.dumps(result), flush=True)


def run(command: list[str], until: int | None = None, store: Path | None = None) -> list[dict[str, Any]]:
    """What a child says; killed once so many images are committed."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline())]
        if until is not None:
            assert store is not None
            while process.poll() is None and _committed(store) < until:
                time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
        return lines + [json.loads(line) for line in process.stdout]


def _committed(store: Path) -> int:
    """Images in the last commit; from the size of the newest state's list of shards, which is cheap to read."""
    opened = Store(store)
    state = opened.state() if not opened.manifest.finished else None
    return len(state.shards) * opened.shard if state else 0


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "", images="", count=1_280_000, channels=4096, devices="cpu", kills="0.1,0.5,0.9", child=""
    )
    if args.child:
        listing, store = args.child.split("|")
        child(listing, store, args.channels, args.devices)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = sorted(path.resolve() for path in photographs(args.images).rglob("*") if path.is_file())
        small = cuttings(sources, folder / "images", SIDE, 2000)
        paths = folder / "list.txt"
        paths.write_text("".join(f"{path}\n" for path in islice(small * (args.count // len(small) + 1), args.count)))

        def command(store: Path) -> list[str]:
            options = ["--channels", str(args.channels), "--devices", args.devices]
            return [sys.executable, str(Path(__file__)), "--child", f"{paths}|{store}", *options]

        first, whole = run(command(folder / "whole.zarr"))
        resumed = {}
        for share in args.kills.split(","):
            # the same store again and again: each point is one at which the run before was killed
            run(command(folder / "killed.zarr"), int(float(share) * args.count), folder / "killed.zarr")
            again = run(command(folder / "killed.zarr"), 0, folder / "killed.zarr")
            resumed[share] = again[0]
        last = run(command(folder / "killed.zarr"))
        same = subprocess.run(
            ["diff", "-rq", "-x", "run", folder / "whole.zarr", folder / "killed.zarr"],
            capture_output=True,
            check=False,
        )
        begun = whole["seen"][0][0]
        settled = [memory for at, memory, images in whole["seen"] if at >= begun + 60 and images < args.count]
        spread = max(settled) - min(settled) if settled else float("nan")
    rows = [
        ("images", args.count),
        ("channels", args.channels),
        ("seconds", whole["seconds"]),
        ("images a second", args.count / (whole["seconds"] - first["first"])),
        ("memory at the end, MB", whole["seen"][-1][1]),
        ("largest less smallest from the first minute to the last image, MB", spread),
        ("peak, MB", whole["peak"]),
        ("share of commits", whole["commits"] / whole["seconds"]),
        ("start to first batch, s", first["first"]),
        *((f"resumed at {at}: start to first batch, s", each.get("first", "over")) for at, each in resumed.items()),
        ("the store of the killed runs is the same", "yes" if same.returncode == 0 else "no"),
    ]
    details = {"whole": whole, "first": first, "resumed": resumed, "last": last[-1]}
    finish("night", ("", "value"), rows, details, args.json)


if __name__ == "__main__":
    main()
