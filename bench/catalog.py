"""How long it takes, and how much memory, to index 1.28 million paths: a list, and a walk over the same files.

Each measurement runs in a process of its own; memory is its peak over what the imports alone take. Files are made
once and stay warm, so that this measures maxact and not the disk. `--paths 14000000` lists as many as ImageNet-21k
has; every path is another, but many are the same file, by links to its folder. Beside the time of the index stands
the longest time in it without a sign of life, where the catalog gives any.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

BUDGET_SECONDS, BUDGET_MB = 10.0, 500.0  # for a list of 1.28 million


def main() -> None:
    """Measures and reports."""
    if sys.argv[1:2] == ["--child"]:
        measure(*sys.argv[2:])
        return
    from common import arguments, finish

    args = arguments(__doc__ or "", files=128_000, paths=1_280_000)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        listing = make_files(Path(folder), args.files, args.paths)
        for name, images in (("list", str(listing)), ("folder", f"{folder}/train")):
            command = [sys.executable, __file__, "--child", name, images]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    rows = [tuple(result.values()) for result in results]
    seconds, megabytes = (limit * args.paths / 1_280_000 for limit in (BUDGET_SECONDS, BUDGET_MB))
    within = results[0]["index s"] <= seconds and results[0]["peak MB over imports"] <= megabytes
    budget = {"seconds": seconds, "MB": megabytes, "met": within}
    finish("catalog", tuple(results[0]), rows, {"budget": budget}, args.json)


def make_files(folder: Path, files: int, paths: int) -> Path:
    """ImageNet's layout: 1,000 folders in `train`. The list has every file again and again, by links to `train`."""
    names = []
    for number in range(files):
        name = f"n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG"
        if number < 1000:
            (folder / "train" / name).parent.mkdir(parents=True)
        with open(folder / "train" / name, "wb") as file:
            file.write(b"x")
        names.append(name)
    listing = folder / "list.txt"
    with open(listing, "w") as out:
        for turn, start in enumerate(range(0, paths, files)):
            (folder / f"train{turn}").symlink_to("train")
            out.writelines(f"train{turn}/{name}\n" for name in names[: paths - start])
    return listing


def measure(name: str, images: str) -> None:
    """Prints the figures of one source as JSON."""
    from maxact.catalog import Catalog

    before = memory_kb("VmRSS")
    start = time.perf_counter()
    signs = [start]
    options: dict[str, Any] = {}
    if "report" in inspect.signature(Catalog.build).parameters:
        options["report"] = lambda count: signs.append(time.perf_counter())
    catalog = Catalog.build(images, **options)
    signs.append(time.perf_counter())
    build = signs[-1] - start
    peak = memory_kb("VmHWM")
    kept = memory_kb("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "images.parquet")
        start = time.perf_counter()
        catalog.save(path)
        save = time.perf_counter() - start
        start = time.perf_counter()
        catalog = Catalog.load(path)
        load = time.perf_counter() - start
    start = time.perf_counter()
    for batch in [number % (len(catalog) // 64) for number in range(100)]:
        entries = catalog.entries(batch * 64, batch * 64 + 64)
    entries_time = (time.perf_counter() - start) / 100
    start = time.perf_counter()
    for entry in entries:
        catalog.read(entry)
    read = (time.perf_counter() - start) / len(entries)
    figures = {
        "source": name,
        "images": len(catalog),
        "index s": build,
        "longest silence s": max(later - sooner for sooner, later in pairwise(signs)),
        "peak MB over imports": (peak - before) / 1024,
        "kept MB": (kept - before) / 1024,
        "kept bytes an image": (kept - before) * 1024 / len(catalog),
        "save s": save,
        "load s": load,
        "64 entries us": entries_time * 1e6,
        "read a file us": read * 1e6,
    }
    print(json.dumps(figures))


def memory_kb(field: str) -> int:
    """Of this process alone: getrusage's peak begins with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
