"""Images per second of each decoder, from bytes in memory to model inputs, as many batches in flight as in a scan."""

from __future__ import annotations

import itertools
import time

import torch

from common import arguments, finish, interleaved, median, photographs
from maxact.catalog import Catalog
from maxact.config import cores
from maxact.decode import make_decoder
from maxact.preprocess import Interpolation, Preprocess


def rate(
    name: str, files: list[object], preprocess: Preprocess, batch: int, threads: int, device: str, seconds: float
) -> float:
    """Images per second, after a batch to warm up."""
    decoder = make_decoder(name, preprocess, batch=batch, threads=threads, device=device)
    stream = itertools.cycle(files)
    try:
        decoder.submit(list(itertools.islice(stream, batch)))
        assert not decoder.collect().errors
        for _ in range(decoder.depth):
            decoder.submit(list(itertools.islice(stream, batch)))
        done, begun = 0, time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            images = decoder.collect().images
            decoder.submit(list(itertools.islice(stream, batch)))
            if images.is_cuda:
                torch.cuda.current_stream(images.device).synchronize()  # not the next batch, which is on its way
            done += len(images)
        return done / passed
    finally:
        decoder.close()


def main() -> None:
    """Measures and reports."""
    args = arguments(__doc__ or "", images="", files=512, batch=32, device="cpu", seconds=2.0, rounds=5)
    catalog = Catalog.build(photographs(args.images))
    files = [catalog.read(entry) for entry in catalog.entries(0, min(args.files, len(catalog)))]
    interpolations: tuple[Interpolation, ...] = ("bilinear", "bicubic")
    runs = {
        (name, interpolation, threads): lambda name=name, interpolation=interpolation, threads=threads: rate(
            name, files, Preprocess(interpolation=interpolation), args.batch, threads, args.device, args.seconds
        )
        for interpolation in interpolations
        for threads in sorted({1, cores()})
        for name in ("dali", "torchvision")
    }
    measured = interleaved({"/".join(map(str, key)): run for key, run in runs.items()}, args.rounds)
    rows = [(*key, median(measured["/".join(map(str, key))])) for key in runs]
    finish("decode", ("decoder", "interpolation", "threads", "img/s"), rows, {"measured": measured}, args.json)


if __name__ == "__main__":
    main()
