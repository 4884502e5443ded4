"""What a CUDA device does: decoding alone, the bare network, the network with its taps, and the whole scan.

For each network, in this order, until its share of the time is spent: the decoder alone on files' bytes in memory;
the bare network on a batch that lies on the device, as it is and compiled, in fp16 and bf16, in the scan's settings
of cuDNN, and once in those that a user might choose for speed; the network with all its taps, in turn with the bare
one; the scan's loop on files. The scan's limit is the slower of the decoder and of the bare compiled network in fp16.

Without --images the files are cut from scikit-image's photographs in the number of pixels that ImageNet's have on
average, which are no originals: their sizes are all alike.

Nothing of it is meant for a CPU; --device cpu only shows that the script itself works.
"""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from common import ROOT, arguments, cuttings, finish, machine, median
from decode import rate as decoding_rate
from maxact.catalog import Catalog
from maxact.config import RunConfig, ScanConfig, cores
from maxact.decode import choose_decoder
from maxact.demo import PHOTOGRAPHS
from maxact.errors import MaxactError
from maxact.find import find_taps
from maxact.models import Model, Normalised, load_model
from maxact.numerics import kept_memory, numerics
from maxact.process import Tick
from maxact.scan import Job, scan
from maxact.taps import DTYPES, Pending, Taps

WARM_UP = 4  # batches that do not count
ROUNDS = 5  # of what is measured in turn
SIDE = 433  # pixels: 433 x 433 are as many as 500 x 375
FILES = 512  # different ones, when they are cut here
IMAGES = 16384  # entries of the catalog, the files again and again; its shards come again and again too
PERIOD = 0.25  # seconds between two looks at the device
COMPILE = 45.0  # seconds that a first compilation may take, in the plan of the time
GOALS = (
    ("scan / limit", 0.9, "of the slower of decoder and compiled network"),
    ("scan img/s", 8000.0, "img/s from original JPEGs"),
    ("taps / compiled fp16", 0.98, "of the compiled network, with taps, on a batch on the device"),
)

Step = Callable[[], dict[str, float]]


@dataclass
class Usage:
    """What a device was used while it was watched: see `watched`."""

    busy: list[float] = field(default_factory=list)  # percent of the time with a kernel on the device, samples
    memory: float = 0.0  # bytes, of all processes, at most


@contextmanager
def watched(device: torch.device) -> Iterator[Usage]:
    """Looks at the device's use several times a second: by NVML where pynvml is there, else by nvidia-smi."""
    usage, stop = Usage(), threading.Event()
    if device.type != "cuda":
        yield usage
        return
    by_nvml = _has_nvml(device)
    process = None if by_nvml else _nvidia_smi(device)

    def look() -> None:
        while not stop.wait(PERIOD):
            free, total = torch.cuda.mem_get_info(device)
            usage.memory = max(usage.memory, total - free)
            if by_nvml:
                usage.busy.append(float(torch.cuda.utilization(device)))

    def listen() -> None:
        assert process is not None and process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):  # "[N/A]" on a part of a device
                usage.busy.append(float(line))

    threads = [threading.Thread(target=look, daemon=True)]
    if process is not None:
        threads.append(threading.Thread(target=listen, daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield usage
    finally:
        stop.set()
        if process is not None:
            process.terminate()
        for thread in threads:
            thread.join(5)


def _has_nvml(device: torch.device) -> bool:
    try:
        torch.cuda.utilization(device)
    except Exception:  # pynvml is missing, or the driver's library; its errors have no class that is known here
        return False
    return True


def _nvidia_smi(device: torch.device) -> subprocess.Popen[str] | None:
    """A process that prints the percentage every PERIOD; None where there is no such command."""
    name = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"GPU-{name}" if name else str(device.index or 0)
    query = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--loop-ms={PERIOD * 1e3:.0f}")
    try:
        return subprocess.Popen(
            ["nvidia-smi", f"--id={which}", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None


class Runner:
    """The measurements of one network on one device."""

    def __init__(self, model: Model, device: torch.device, batch: int, each: float, catalog: Catalog) -> None:
        self._model, self._device, self._batch, self._each = model, device, batch, each
        self._catalog = catalog
        self._taps = find_taps(model).taps
        self._network = Normalised(model.network, model.preprocess).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        shape = (batch, *model.preprocess.shape)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self._compiled: Callable[[], object] | None = None  # in fp16, to be measured in turn with the taps

    def steps(self) -> list[tuple[str, float, Step]]:
        """What is measured, the most important first: its name, the seconds that it may take, and what does it."""
        each = self._each
        return [
            ("decode", 3 * each, self.decode),
            ("eager fp16", 2 * each, lambda: self.forward("eager fp16", self._bare("fp16"))),
            ("compiled fp16", COMPILE, self.compiled),
            ("taps", COMPILE + 2 * ROUNDS * each / 2, self.taps),
            ("scan", COMPILE / 2 + 3 * each, self.scan),
            ("eager bf16", 2 * each, lambda: self.forward("eager bf16", self._bare("bf16"))),
            ("compiled bf16", COMPILE, lambda: self.forward("compiled bf16", self._bare("bf16", compiled=True))),
            ("fastest cuDNN", 3 * each, self.fastest),
            ("reduce-overhead", COMPILE, self.overhead),
        ]

    def decode(self) -> dict[str, float]:
        """The decoder alone, as many batches in flight as in a scan."""
        some = self._catalog.entries(0, min(len(self._catalog), 8 * FILES))
        files = [self._catalog.read(entry) for entry in some]
        preprocess, device = self._model.preprocess, str(self._device)
        return {"decode img/s": decoding_rate("auto", files, preprocess, self._batch, cores(), device, self._each)}

    def forward(self, name: str, run: Callable[[], object]) -> dict[str, float]:
        """One way to run the bare network on a batch that lies on the device."""
        with self._as_in_a_scan():
            return {f"{name} img/s": self._rate(run, self._each)}

    def compiled(self) -> dict[str, float]:
        """The bare network as torch.compile makes it by default."""
        run = self._bare("fp16", compiled=True)
        found = self.forward("compiled fp16", run)
        self._compiled = run
        return found

    def fastest(self) -> dict[str, float]:
        """The same with cuDNN free to try its algorithms and to take any: what the scan's settings cost."""
        if self._compiled is None:
            return {}
        with self._as_in_a_scan():
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False  # put back at the end
            return {"compiled fp16, any cuDNN, img/s": self._rate(self._compiled, self._each)}

    def overhead(self) -> dict[str, float]:
        """The bare network as a CUDA graph, launched at one go."""
        return self.forward("reduce-overhead fp16", self._bare("fp16", compiled=True, mode="reduce-overhead"))

    def taps(self) -> dict[str, float]:
        """The network with all its taps, its peaks on their way to host memory, in turn with the bare one."""
        pending: deque[Pending] = deque()
        with self._as_in_a_scan(), Taps(self._network, self._taps, "fp16", cores(), compiled=True) as taps:

            def run() -> None:
                pending.append(taps(self._images))
                if len(pending) > 2:  # as far behind as a scan
                    pending.popleft().result()

            with_taps, ratios = [], []
            for _ in range(ROUNDS):
                with_taps.append(self._rate(run, self._each / 2))
                if self._compiled is not None:
                    ratios.append(with_taps[-1] / self._rate(self._compiled, self._each / 2))
            pending.clear()
        found = {"taps fp16 img/s": median(with_taps)}
        return found | ({"taps / compiled fp16": median(ratios)} if ratios else {})

    def scan(self) -> dict[str, float]:
        """The scan's loop, from its first batches on for some seconds; and what it uses of the device."""
        catalog = self._catalog
        on_cpu = self._device.type == "cpu"
        settings = ScanConfig(precision="fp32" if on_cpu else "fp16", batch=self._batch, compile=True)
        settings = settings.resolve(self._device, len(catalog))
        run = RunConfig(str(self._device))
        model = self._model
        job = Job(model.network, model.preprocess, self._taps, catalog, settings, run, self._device)
        assert settings.shard
        shards = itertools.cycle(list(catalog.shards(settings.shard)))
        stop, ticks = threading.Event(), list[tuple[float, int]]()
        waited = 0.0

        def report(tick: Tick) -> None:
            nonlocal waited
            ticks.append((time.perf_counter(), tick.images))
            if len(ticks) > WARM_UP:
                waited += tick.waited
                if ticks[-1][0] - ticks[WARM_UP - 1][0] >= 2 * self._each:
                    stop.set()

        self._forget_peak()
        with watched(self._device) as usage:
            for _ in scan([job], shards, stop, report, lambda shard: [job.tally(shard)]):
                pass
        counted = ticks[WARM_UP:]
        passed = counted[-1][0] - ticks[WARM_UP - 1][0]
        found = {
            "scan img/s": sum(images for _, images in counted) / passed,
            "scan waits for images, share of its time": waited / passed,
        }
        if self._device.type == "cuda":
            found["GPU memory GB, all of it"] = usage.memory / 1e9
            found["GPU memory GB, torch's"] = torch.cuda.max_memory_allocated(self._device) / 1e9
            # those of the compilation and of the first batches are no scan's
            busy = usage.busy[-max(1, int(passed / 0.25)) :]
            if busy:
                found["GPU busy %"] = median(busy)
        return found

    def _bare(self, precision: str, compiled: bool = False, mode: str | None = None) -> Callable[[], object]:
        network: nn.Module = self._network
        run: Any = torch.compile(network, fullgraph=True, dynamic=False, mode=mode) if compiled else network

        def once() -> object:
            with torch.inference_mode(), torch.autocast(self._device.type, DTYPES[precision]):
                return run(self._images)

        return once

    @contextmanager
    def _as_in_a_scan(self) -> Iterator[None]:
        with numerics(cores()), kept_memory():
            yield

    def _rate(self, run: Callable[[], object], seconds: float) -> float:
        """Images per second of what runs one batch, over about so many seconds."""
        for _ in range(WARM_UP):
            run()
        once = self._time(run, 2) / 2
        times = max(2, int(seconds / once))
        return times * self._batch / self._time(run, times)

    def _time(self, run: Callable[[], object], times: int) -> float:
        """Seconds of so many runs, one after the other: the device's own on CUDA."""
        if self._device.type != "cuda":
            begun = time.perf_counter()
            for _ in range(times):
                run()
            return time.perf_counter() - begun
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        first.record()
        for _ in range(times):
            run()
        last.record()
        torch.cuda.synchronize(self._device)
        return float(first.elapsed_time(last)) / 1e3

    def _forget_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


def measure(runner: Runner, deadline: float, name: str) -> dict[str, float]:
    """What there is time for until `deadline`; what fails or has no time left is named and left out."""
    found: dict[str, float] = {}
    for step, needs, function in runner.steps():
        left = deadline - time.perf_counter()
        if left < needs:
            print(f"{name}: {step} left out, it may take {needs:.0f} s and {max(0, left):.0f} s are left", flush=True)
            continue
        begun = time.perf_counter()
        try:
            values = function()
        except Exception as error:  # the other measurements are worth having all the same
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{name}: {step} failed: {reason[:200]}", flush=True)
            continue
        found |= values
        words = ", ".join(f"{key} {value:,.4g}" for key, value in values.items())
        print(f"{name}: {words} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return found | limit(found)


def limit(found: dict[str, float]) -> dict[str, float]:
    """The scan's limit, where decoder and network run side by side, and the share of it that it reaches."""
    if not {"decode img/s", "compiled fp16 img/s"} <= set(found):
        return {}
    most = min(found["decode img/s"], found["compiled fp16 img/s"])
    share = {"scan / limit": found["scan img/s"] / most} if "scan img/s" in found else {}
    return {"limit img/s": most} | share


def goals(results: dict[str, dict[str, float]]) -> list[str]:
    """A line for each goal: what each network reached."""
    lines = []
    for key, least, words in GOALS:
        reached = [
            f"{name} {found[key]:,.3g} ({'reached' if found[key] >= least else 'missed'})"
            for name, found in results.items()
            if key in found
        ]
        lines.append(f"goal {least:,g} {words}: {', '.join(reached) or 'not measured'}")
    return lines


def pictures(images: str) -> tuple[Catalog, str]:
    """What is scanned, and what it is in words."""
    if images:
        catalog = Catalog.build(images)
        return catalog, f"{len(catalog)} images of {images}"
    import skimage

    sources = []
    for name in PHOTOGRAPHS:
        source = Path(str(skimage.__file__)).parent / "data" / name
        with Image.open(source) as picture:
            if min(picture.size) >= SIDE:
                sources.append(source)
    made = cuttings(sources, ROOT / "out" / "squares", SIDE, FILES)
    words = f"{FILES} squares of {SIDE} pixels, no original photographs"
    return Catalog.build(list(itertools.islice(itertools.cycle(made), IMAGES))), words


def main() -> int:
    """Measures and reports."""
    args = arguments(
        __doc__ or "",
        images="",
        models="resnet50,vgg16,maxact.demo:network",
        batch=128,
        each=3.0,
        seconds=380.0,
        devices="cuda:0",
    )
    begun = time.perf_counter()
    if args.devices.startswith("cuda") and not torch.cuda.is_available():
        print(f"gpu: torch {torch.__version__} sees no CUDA device here, so nothing is measured", file=sys.stderr)
        return 1
    device = RunConfig(args.devices).torch_device()
    out = args.json or ROOT / "out" / "gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        catalog, words = pictures(args.images)
    except (ImportError, MaxactError) as error:
        print(f"gpu: no images ({error}); give --images, or install maxact[demo]", file=sys.stderr)
        return 1
    names = args.models.split(",")
    results: dict[str, dict[str, float]] = {}
    details: dict[str, Any] = {"batch": args.batch, "images": words, "results": results}
    for index, name in enumerate(names):
        # what one network leaves of its time the next ones share
        left = args.seconds - (time.perf_counter() - begun)
        deadline = time.perf_counter() + left / (len(names) - index)
        try:
            model = load_model(name, weights="none" if ":" not in name else None)
            details["decoder"] = choose_decoder("auto", model.preprocess)
            runner = Runner(model, device, args.batch, args.each, catalog)
        except MaxactError as error:
            print(f"{name}: left out: {error}", flush=True)
            continue
        results[name] = measure(runner, deadline, name)
        out.write_text(json.dumps({"name": "gpu", "machine": machine()} | details, indent=2) + "\n")
        del runner, model
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    keys = list(dict.fromkeys(key for found in results.values() for key in found))
    rows = [(key, *(found.get(key, float("nan")) for found in results.values())) for key in keys]
    finish("gpu", (f"batch {args.batch}", *results), rows, details, out)
    where = "" if details.get("decoder") == "dali" else ", which decodes on the CPU"
    print(f"decoder {details.get('decoder')}{where}; {words}; {time.perf_counter() - begun:.0f} s in all")
    print("\n".join(goals(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
