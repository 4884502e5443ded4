"""How fast maps are reduced to peaks, beside what merely reads or copies them.

On a CUDA device: the Triton kernel, `maps.amax` (one number where the kernel gives six), a copy, and the reference in
plain torch, on float16 channels_last maps of a ResNet-50's sizes. Each is recorded as a CUDA graph over as many maps
as fill four times the device's L2 cache, so that they come from memory and starting kernels costs nothing, and timed
with CUDA events. On a CPU: the numba kernel, the same with the clamp of a ReLU6 in its pass and with torch's clamp
after it, numpy's maximum and a copy, float32, on one thread.

GB/s counts the bytes of the map once, for the copy twice. The last row is all 53 maps of a ResNet-50: seconds per
image, and how many images a second their peaks alone would allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

import numpy as np
import torch

from common import arguments, finish, interleaved, median, seconds
from maxact_kernels import peaks, peaks_cuda
from maxact_kernels.peaks import Peaks

# channels, positions -> how many convolutions of a ResNet-50 give such a map for 224 x 224 pixels
MAPS = {
    (64, 112 * 112): 1,
    (64, 56 * 56): 6,
    (128, 56 * 56): 1,
    (256, 56 * 56): 4,
    (128, 28 * 28): 7,
    (256, 28 * 28): 1,
    (512, 28 * 28): 5,
    (256, 14 * 14): 11,
    (512, 14 * 14): 1,
    (1024, 14 * 14): 7,
    (512, 7 * 7): 5,
    (2048, 7 * 7): 4,
}
WARM_UP = 3  # runs before the graph is recorded: they compile

Runs = Mapping[str, Callable[[], float]]


def on_gpu(images: int, channels: int, positions: int, repeat: int) -> Runs:
    """What is timed on the current CUDA device; each gives the seconds of one map."""
    size = images * channels * positions * 2
    cache = torch.cuda.get_device_properties().L2_cache_size
    maps = [
        torch.randn(images, positions, channels, device="cuda", dtype=torch.float16)
        for _ in range(ceil(4 * cache / size))
    ]
    out = torch.empty(peaks_cuda.PLANES, images, channels, device="cuda")
    copy = torch.empty_like(maps[0])

    def timed(run: Callable[[torch.Tensor], object]) -> Callable[[], float]:
        for _ in range(WARM_UP):
            run(maps[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for each in maps:
                run(each)

        def measure() -> float:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            graph.replay()
            begun.record()
            for _ in range(repeat):
                graph.replay()
            ended.record()
            ended.synchronize()
            return float(begun.elapsed_time(ended)) / 1000 / repeat / len(maps)

        return measure

    return {
        "kernel": timed(lambda each: peaks_cuda.peaks(each, True, out)),
        "maximum": timed(lambda each: each.amax(1)),
        "copy": timed(copy.copy_),
        "reference": timed(lambda each: peaks.reference(each.mT)),
    }


def on_cpu(images: int, channels: int, positions: int, repeat: int) -> Runs:
    """What is timed on one core; each gives the seconds of one map."""
    torch.set_num_threads(1)
    maps = np.random.default_rng(0).standard_normal((images, positions, channels), dtype=np.float32)
    tensor = torch.from_numpy(maps)
    out, copy = Peaks.empty(images, channels), np.empty_like(maps)
    peaks.reduce(maps[:1], True, out.rows(0, 1))  # compiles, or loads

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        def many() -> None:
            for _ in range(repeat):
                run()

        return lambda: seconds(many) / repeat

    def then_clamp() -> None:
        peaks.reduce(maps, True, out)
        tensor.clamp_(0, 6)

    return {
        "kernel": timed(lambda: peaks.reduce(maps, True, out)),
        "clamping": timed(lambda: peaks.reduce(maps, True, out, bounds=(0, 6))),
        "then clamp": timed(then_clamp),
        "maximum": timed(lambda: maps.max()),
        "copy": timed(lambda: np.copyto(copy, maps)),
    }


def main() -> None:
    """Measures and reports."""
    gpu = torch.cuda.is_available() and peaks_cuda.AVAILABLE
    args = arguments(__doc__ or "", images=128 if gpu else 4, rounds=9, repeat=5 if gpu else 3)
    rows: list[tuple[object, ...]] = []
    values: dict[str, object] = {}
    sums: dict[str, float] = {}
    for (channels, positions), count in MAPS.items():
        runs = (on_gpu if gpu else on_cpu)(args.images, channels, positions, args.repeat)
        measured = interleaved(runs, args.rounds)
        times = {name: median(each) for name, each in measured.items()}
        size = args.images * channels * positions * (2 if gpu else 4)
        rates = {name: size * (2 if name == "copy" else 1) / each / 1e9 for name, each in times.items()}
        for name, each in times.items():
            sums[name] = sums.get(name, 0) + count * each / args.images
        microseconds = times["kernel"] * 1e6
        rows.append((channels, positions, count, microseconds, *rates.values(), rates["kernel"] / rates["maximum"]))
        values[f"{channels} x {positions}"] = measured
    size = sum(channels * positions * count for (channels, positions), count in MAPS.items()) * (2 if gpu else 4)
    rates = {name: size * (2 if name == "copy" else 1) / each / 1e9 for name, each in sums.items()}
    total = sums["kernel"] * args.images * 1e6
    rows.append(("all", "", sum(MAPS.values()), total, *rates.values(), rates["kernel"] / rates["maximum"]))
    columns = ("channels", "positions", "maps", "kernel us", *(f"{name} GB/s" for name in rates), "of the maximum's")
    details = {
        "images": args.images,
        "seconds": values,
        "images per second of all maps": {name: 1 / each for name, each in sums.items()},
    }
    finish("peaks", columns, rows, details, args.json)


if __name__ == "__main__":
    main()
