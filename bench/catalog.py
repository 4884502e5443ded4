"""How long it takes, and how much memory, to index 1.28 million paths: a list, and a walk over the same files.

Each measurement runs in a process of its own; memory is its peak over what the imports alone take. Files are made
once and stay warm, so that this measures maxact and not the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUDGET_SECONDS, BUDGET_MB = 10.0, 500.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=128_000)
    parser.add_argument("--repeat", type=int, default=10, help="how often the list names each file")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(*args.child)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        listing = make_files(Path(folder), args.files, args.repeat)
        for name, images in (("list", str(listing)), ("folder", f"{folder}/train")):
            command = [sys.executable, __file__, "--child", name, images]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            results.append(result)
            print(
                f"{name:8}{result['images']:>10,} images: index {result['build_s']:.2f} s, "
                f"peak {result['peak_mb']:.0f} MB over imports, save {result['save_s']:.2f} s "
                f"({result['file_mb']:.0f} MB), load {result['load_s']:.2f} s, "
                f"{result['entries_us']:.0f} us for 64 entries, read {result['read_us']:.1f} us a file"
            )
    first = results[0]
    within = first["build_s"] <= BUDGET_SECONDS and first["peak_mb"] <= BUDGET_MB
    print(f"budget: {BUDGET_SECONDS:.0f} s and {BUDGET_MB:.0f} MB: {'met' if within else 'NOT MET'}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


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
        size = os.path.getsize(path)
        start = time.perf_counter()
        catalog = Catalog.load(path)
        load = time.perf_counter() - start
    start = time.perf_counter()
    for batch in range(100):
        entries = catalog.entries(batch * 64, batch * 64 + 64)
    entries_time = (time.perf_counter() - start) / 100
    start = time.perf_counter()
    for entry in entries:
        catalog.read(entry)
    read = (time.perf_counter() - start) / len(entries)
    figures = {
        "name": name,
        "images": len(catalog),
        "build_s": build,
        "peak_mb": (peak - before) / 1024,
        "save_s": save,
        "file_mb": size / 1e6,
        "load_s": load,
        "entries_us": entries_time * 1e6,
        "read_us": read * 1e6,
    }
    print(json.dumps(figures))


def memory_kb(field: str) -> int:
    """Of this process alone: getrusage's peak begins with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
