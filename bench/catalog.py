"""How long it takes, and how much memory, to index 1.28 million paths: a list, and a walk over the same files.

Each measurement runs in a process of its own; memory is its peak over what the imports alone take. Files are made
once and stay warm, so that this measures maxact and not the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUDGET_SECONDS, BUDGET_MB = 10.0, 500.0  # for the list


def main() -> None:
    """Measures and reports."""
    if sys.argv[1:2] == ["--child"]:
        measure(*sys.argv[2:])
        return
    from common import arguments, finish

    args = arguments(__doc__ or "", files=128_000, repeat=10)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        listing = make_files(Path(folder), args.files, args.repeat)
        for name, images in (("list", str(listing)), ("folder", f"{folder}/train")):
            command = [sys.executable, __file__, "--child", name, images]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    rows = [tuple(result.values()) for result in results]
    within = results[0]["index s"] <= BUDGET_SECONDS and results[0]["peak MB over imports"] <= BUDGET_MB
    budget = {"seconds": BUDGET_SECONDS, "MB": BUDGET_MB, "met": within}
    finish("catalog", tuple(results[0]), rows, {"budget": budget}, args.json)


def make_files(folder: Path, files: int, repeat: int) -> Path:
    """ImageNet's layout: 1,000 folders. The list names every file `repeat` times, by relative path."""
    names = []
    for number in range(files):
        name = f"train/n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG"
        if number < 1000:
            (folder / name).parent.mkdir(parents=True)
        with open(folder / name, "wb") as file:
            file.write(b"x")
        names.append(name)
    listing = folder / "list.txt"
    listing.write_text("\n".join(names * repeat) + "\n")
    return listing


def measure(name: str, images: str) -> None:
    """Prints the figures of one source as JSON."""
    from maxact.catalog import Catalog

    before = memory_kb("VmRSS")
    start = time.perf_counter()
    catalog = Catalog.build(images)
    build = time.perf_counter() - start
    peak = memory_kb("VmHWM")
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
        "peak MB over imports": (peak - before) / 1024,
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
