"""`maxact bench`: how fast each stage of a scan is here, the limit that follows, and how near the scan comes to it."""

from __future__ import annotations

import inspect
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from maxact import stages
from maxact.catalog import PATH, Catalog, is_dataset
from maxact.config import At, DecoderName, Precision, RunConfig, ScanConfig, Score, cores, items
from maxact.decode import choose_decoder, native_stderr
from maxact.errors import UsageError
from maxact.find import find_taps
from maxact.loops import Cost, Loop, Measure, as_in_a_scan, batches_in, repeated
from maxact.models import Model, load_model
from maxact.numerics import has_bf16
from maxact.probe import probe
from maxact.provenance import versions
from maxact.scan import Job
from maxact.sweep import Point, Setting, again, best, of_one_precision
from maxact.sweep import sweep as try_settings
from maxact.verdict import Bench, Rule, Stage

_LEAST = 4  # batches of a stretch of the scan
_PATHS = 8  # paths of images that a command line is given
_SEVERAL = ("where", "layers", "score")  # options that may repeat
_SCAN = (
    *("where", "sample", "seed", "limit", "weights", "layers", "at", "resize", "crop", "interpolation", "fit", "mean"),
    *("std", "preprocess", "decoder", "score", "top", "bottom", "devices"),
)


def bench(
    network: str | nn.Module,
    images: object,
    *,
    weights: str | os.PathLike[str] | None = None,
    where: str | Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    layers: str | Sequence[str] = (),
    at: At = "norm",
    score: Score | Sequence[Score] = ("max",),
    top: int = 50,
    bottom: int = 0,
    resize: int | None = None,
    crop: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    fit: str | None = None,
    preprocess: str | None = None,
    precision: Precision | None = None,
    batch: int | None = None,
    decoder: DecoderName = "auto",
    compile: bool | None = None,
    devices: str = "auto",
    threads: int | None = None,
    readers: int = 16,
    decode_threads: int | None = None,
    hardware_share: float | None = None,
    rounds: int = 3,
    seconds: float = 6.0,
    sweep: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    listed: Callable[[int], None] = lambda count: None,
    native_log: bool = False,
) -> Bench:
    """Measures the stages of a scan on this machine, each alone, and the scan itself.

    The scan is its own loop at full speed: loading the network, compiling, starting threads and writing the store are
    not in it, though the last is a stage. Few images are taken again and again. Nothing is kept.

    network, images and what follows them: as of `scan`. The process should do nothing else; the command line sets
    some libraries' waiting threads and memory for a scan (environment.py), which this cannot do any more.
    rounds: all stages are measured in turn, so often; their medians count, and of the scan's share of the limit that of
    the rounds' shares.
    seconds: how long a stage is measured, in all rounds together, at least; the scan twice as long.
    sweep: tries other settings, too, each for half of `seconds`; then this one and the best of them again, in turn, in
    as many rounds.
    report: called with how many measurements are done, and of how many. listed: called before that, now and then, with
    how many images have been found.
    native_log: drop what C libraries print to standard error about damaged images.

    Raises UsageError for arguments that cannot be meant, and MaxactError for all else that the caller can mend.
    """
    given = {name: value for name, value in locals().items() if name not in ("network", "images")}
    if isinstance(network, str) and "," in network:
        raise UsageError(f"network: bench measures one network at a time, got {network!r}; give one of them")
    if rounds < 1:
        raise UsageError(f"rounds: expected at least 1, got {rounds!r}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds: expected more than 0, got {seconds!r}")
    loading = ("weights", "resize", "crop", "mean", "std", "interpolation", "fit", "preprocess")
    choices = ("at", "top", "bottom", "precision", "batch", "compile", "hardware_share")
    wanted = ScanConfig(
        layers=items(layers),
        scores=cast(tuple[Score, ...], items(score)),
        **cast(dict[str, Any], {name: given[name] for name in choices}),
    )
    counts: dict[str, Any] = {name: given[name] for name in ("threads", "readers", "decode_threads")}
    run = RunConfig(devices, **counts)
    device = run.torch_device()
    model = load_model(network, **{name: given[name] for name in loading})
    settings = replace(wanted, decoder=cast(DecoderName, choose_decoder(decoder, model.preprocess, is_dataset(images))))
    found = find_taps(model, wanted.layers, at)
    catalog = Catalog.build(images, where=items(where), sample=sample, seed=seed, limit=limit, report=listed)
    with ExitStack() as resources:
        if native_log:
            nowhere = resources.enter_context(open(os.devnull, "wb"))
            resources.enter_context(native_stderr(nowhere.fileno()))
        job = probe(Job(model.network, model.preprocess, found.taps, catalog, settings, run, device))
        result = _measure(job, model, rounds, seconds, report)
        if not sweep:
            return result
        points = tuple(try_settings(job, seconds / 2, report))
        points = tuple(again(points, job, seconds / 2, rounds, report))
    command, exact = _best(points, _start(network, images, given), job)
    return replace(result, points=points, command=command, exact=exact)


def _measure(job: Job, model: Model, rounds: int, seconds: float, report: Callable[[int, int], None]) -> Bench:
    batch, precision = job.settings.batch, job.settings.precision
    assert batch and precision
    cycled = replace(job, catalog=repeated(job.catalog, batch))
    with ExitStack() as resources:
        resources.enter_context(as_in_a_scan(job))
        sample = stages.gather(cycled)
        # a network of its own, since its hooks stay on
        loop = resources.enter_context(closing(Loop(replace(cycled, network=stages.twin(job.network)))))
        loop(1)  # before the taps: threads that share their work are taken back in the opposite order
        taps = resources.enter_context(stages.taps_of(job))
        peaks = [taps(images).result() for images in sample.images]
        runs: dict[str, Measure] = {"read": stages.read(cycled), "decode": stages.decode(cycled, sample.files)}
        if stages.is_copied(job):
            runs["copy"] = stages.copying(sample.images)
        runs["forward"] = stages.forward(stages.bare(job), sample.images, precision)
        if job.settings.compile:
            runs["compiled forward"] = stages.forward(stages.bare(job, compiled=True), sample.images, precision)
        runs |= {"taps": stages.tapped(taps, sample.images), "heaps": stages.heaps(job, peaks), "scan": loop}
        write = stages.store(job, peaks[0])
        each = seconds / rounds
        counts = {
            name: batches_in(2 * each, run(1), batch, _LEAST) if name == "scan" else batches_in(each, run(1), batch)
            for name, run in runs.items()
        }
        costs: dict[str, list[Cost]] = {name: [] for name in runs}
        waits, written = [], []
        for number in range(rounds):
            for place, (name, run) in enumerate(runs.items()):
                costs[name].append(run(counts[name]))
                report(number * len(runs) + place + 1, rounds * len(runs))
            waits.append(loop.waited)
            written.append(write())
    notes = _notes(job, sample, costs)
    slowest = max((writing for writing, _ in written), key=lambda writing: writing.seconds)
    notes["store"] = f"once: {slowest.create + slowest.finish:.2g} s, and {slowest.commit:.2g} s for every commit"
    costs["store"] = [cost for _, cost in written]
    order = [name for name in costs if name != "scan"] + ["scan"]
    network = "compiled forward" if job.settings.compile else "forward"
    if job.device.type == "cpu":
        rule = Rule((network, "decode"), ("read",), cores())
    else:
        rule = Rule((), tuple(name for name in ("read", "decode", "copy", network) if name in costs))
    return Bench(
        model.name,
        model.weights,
        len(job.catalog),
        len(job.taps),
        sum(tap.channels for tap in job.taps),
        vars(Setting.of(job)) | {"decoder": job.settings.decoder, "device": str(job.device), "rounds": rounds},
        _machine(job.device),
        tuple(Stage(name, tuple(costs[name]), notes.get(name, "")) for name in order),
        rule,
        sorted(waits)[len(waits) // 2],
    )


def _notes(job: Job, sample: stages.Sample, costs: Mapping[str, Sequence[Cost]]) -> dict[str, str]:
    """What a reader of the table would ask."""
    sizes = [len(file) for part in sample.files for file in part if isinstance(file, bytes)]
    size = f"{sum(sizes) / len(sizes) / 1000:,.0f} kB an image; " if sizes else ""
    first, *others = (cost.wall for cost in costs["read"])
    slower = f"; the first time {1 / first:,.0f} img/s" if others and first > 2 * min(others) else ""
    decoding = "on the device" if job.device.type == "cuda" and not stages.is_copied(job) else "on the CPU"
    return {
        "read": f"{size}from wherever they are, disk or memory{slower}",
        "decode": f"{job.settings.decoder}, {decoding}",
        "scan": "at full speed, without start and end",
    }


def _machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions that the figures belong to."""
    cpu = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": str(cores()), "bf16": "yes" if has_bf16() else "no"} | versions(device)


def _start(network: str | nn.Module, images: object, given: Mapping[str, Any]) -> list[str]:
    """The beginning of a command line that scans what was measured, with the options that were given."""
    paths = ["IMAGES"]
    if isinstance(images, PATH):
        paths = [os.fsdecode(images)]
    elif not is_dataset(images) and len(images) <= _PATHS:  # type: ignore[arg-type]
        paths = [os.fsdecode(path) for path in images]  # type: ignore[attr-defined]
    words = ["maxact", "scan", network if isinstance(network, str) else "MODEL", *paths, "STORE"]
    defaults = inspect.signature(bench).parameters
    for name in _SCAN:
        value, default, option = given[name], defaults[name].default, f"--{name}"
        if name in _SEVERAL:
            words += [word for each in items(value) if items(value) != items(default) for word in (option, each)]
        elif value == default:
            continue
        elif name == "crop" and not isinstance(value, int):
            words += [option, "x".join(map(str, value))]
        elif name in ("mean", "std"):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return words


def _best(points: Sequence[Point], start: Sequence[str], job: Job) -> tuple[str, str]:
    """The command line of the best setting, and of the best of the first one's precision; "" where that is the same,
    or all failed."""

    def line(chosen: Point) -> str:
        return shlex.join([*start, *chosen.setting.options(job.device)]) if chosen.rate else ""

    command, exact = line(best(points)), line(best(of_one_precision(points)))
    return command, "" if exact == command else exact
