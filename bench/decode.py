"""Images a second of each decoder, files to model input (224 x 224 or what --resize and --crop say).

    python bench/decode.py --images DIR [--json OUT.json]

The files are read into memory first; depth batches are in flight, as in a scan. The rate is the best of the runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from maxact.decode import make_decoder
from maxact.preprocess import Preprocess

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def rate(name: str, files: list[bytes], preprocess: Preprocess, args: argparse.Namespace, threads: int) -> float:
    """Images a second over --seconds, after one pass over a batch to warm up."""
    decoder = make_decoder(name, preprocess, batch=args.batch, threads=threads, device=args.device)
    stream = itertools.cycle(files)
    try:
        decoder.submit(list(itertools.islice(stream, args.batch)))
        assert not decoder.collect().errors
        for _ in range(decoder.depth):
            decoder.submit(list(itertools.islice(stream, args.batch)))
        done, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < args.seconds:
            images = decoder.collect().images
            decoder.submit(list(itertools.islice(stream, args.batch)))
            if images.is_cuda:
                torch.cuda.synchronize()
            done += len(images)
        return done / passed
    finally:
        decoder.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a directory of photographs")
    parser.add_argument("--limit", type=int, default=512, help="files to use")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--interpolation", nargs="+", default=["bilinear", "bicubic"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in SUFFIXES)[: args.limit]
    if not paths:
        parser.error(f"no images in {args.images}")
    files = [path.read_bytes() for path in paths]
    print(f"{len(files)} files of {statistics.mean(map(len, files)) / 1024:.0f} KiB, batch {args.batch}, {args.device}")
    print(f"{'decoder':12} {'interpolation':14} {'threads':>7} {'images/s':>9}")
    results = []
    for interpolation in args.interpolation:
        preprocess = Preprocess(resize=args.resize, crop=(args.crop, args.crop), interpolation=interpolation)
        for name, threads in itertools.product(("dali", "torchvision"), args.threads):
            rates = [rate(name, files, preprocess, args, threads) for _ in range(args.runs)]
            row = {"decoder": name, "interpolation": interpolation, "threads": threads, "rate": max(rates)}
            results.append({**row, "rates": rates})
            print(f"{name:12} {interpolation:14} {threads:7} {max(rates):9.0f}", flush=True)
    if args.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        settings = {"files": len(files), "batch": args.batch, "device": args.device, "resize": args.resize}
        args.json.write_text(json.dumps({**machine, **settings, "crop": args.crop, "results": results}, indent=2))


if __name__ == "__main__":
    main()
