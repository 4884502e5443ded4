"""What the benchmarks share: the machine in words, repeated interleaved measurements, a table, a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import maxact.environment

maxact.environment.prepare()  # as the command line does, before torch is imported

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from maxact.demo import write_tiles  # noqa: E402
from maxact.progress import print_table  # noqa: E402

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """The command line of a benchmark: one option for each default, and --json for where the result goes."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in defaults.items():
        kind = type(value) if value is not None else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    parser.add_argument("--json", type=Path, help="where the result goes (bench/out/<name>.json)")
    return parser.parse_args()


def photographs(folder: str) -> Path:
    """The folder of images that was given, or one of tiles cut from scikit-image's photographs."""
    if folder:
        return Path(folder)
    tiles = ROOT / "out" / "tiles"
    write_tiles(tiles)
    return tiles


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def resident(field: str = "VmRSS") -> float:
    """Resident memory of this process in MB, or its peak ("VmHWM"); getrusage's would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    """From here on the peak ("VmHWM") is that of what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def cuttings(sources: Sequence[Path], folder: Path, side: int, count: int) -> list[Path]:
    """Small squares out of photographs, all different, as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for index in range(count):
        made.append(folder / f"{index}.jpg")
        source, turn = sources[index % len(sources)], index // len(sources)
        with Image.open(source) as picture:
            # the windows of one photograph shrink and move from one turn to the next
            edge = max(side, min(picture.size) * 7 // (7 + turn))
            left, top = (turn * 29 % (size - edge + 1) for size in picture.size)
            cut = picture.convert("RGB").resize((side, side), box=(left, top, left + edge, top + edge))
        cut.save(made[-1], quality=90)
    return made


def interleaved(runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Each run once a round, round after round, so that a slow spell of the machine meets all of them alike."""
    values: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            values[name].append(run())
    return values


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def finish(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], details: Mapping[str, Any], out: Path | None
) -> None:
    """Prints the table and writes it with the details and the machine as JSON."""
    print_table(columns, rows, name)
    out = out or ROOT / "out" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"name": name, "machine": machine(), "columns": list(columns), "rows": [list(row) for row in rows]}
    out.write_text(json.dumps(result | dict(details), indent=2) + "\n")
    print(f"written to {out}")
