"""What decides the content of a store (`ScanConfig`), and what only decides how a run goes (`RunConfig`)."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from maxact.errors import UsageError

Precision = Literal["fp32", "fp16", "bf16"]
At = Literal["norm", "module", "activation"]
Score = Literal["max", "mean"]
DecoderName = Literal["auto", "dali", "torchvision"]
Method = Literal["deconvnet", "guided", "gradient"]
Seed = Literal["one", "activation"]
Crop = Literal["auto", "field", "focus"]

MOST_PEAKS = 100_000  # that a channel keeps: they are all in memory
MOST_AT_ONCE = 65_536  # images in a batch
MOST_THREADS = 1024  # libraries end the process where they cannot start so many
COMPILED = 10_000  # images of a scan on a CPU from which compiling the network can pay
HARDWARE_SHARE = 0.65  # DALI's default
SHARD = 4096  # images in a shard, rounded up to a whole number of batches
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, or max, in a period of so many


def _check(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UsageError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class ScanConfig:
    """The settings of a scan, saved in its store; a store is only ever continued with the same ones.

    None means "chosen when the store is started, kept from then on": `resolve` fills it in.
    """

    layers: tuple[str, ...] = ()  # module paths or globs; () is every convolution and linear layer
    at: At = "norm"
    scores: tuple[Score, ...] = ("max",)
    top: int = 50
    bottom: int = 0
    precision: Precision | None = None
    batch: int | None = None
    shard: int | None = None
    decoder: DecoderName = "auto"
    max_megapixels: float = 200.0
    skip_grey: bool = False
    compile: bool | None = None
    hardware_share: float | None = None  # of JPEGs that a GPU's decoding hardware takes, where it has some: it gives
    # other pixels, by some levels; None on a CPU
    pooled: Score | None = None  # what of every image and channel is kept

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot be."""
        _check(self.at in get_args(At), "at", "norm, module or activation", self.at)
        _check(
            bool(self.scores) and set(self.scores) <= set(get_args(Score)),
            "scores",
            "max or mean",
            self.scores,
        )
        _check(1 <= self.top <= MOST_PEAKS, "top", f"1 to {MOST_PEAKS:,}", self.top)
        _check(0 <= self.bottom <= MOST_PEAKS, "bottom", f"0 to {MOST_PEAKS:,}", self.bottom)
        _check(
            self.precision in (None, *get_args(Precision)),
            "precision",
            "fp32, fp16 or bf16",
            self.precision,
        )
        _check(self.batch is None or 1 <= self.batch <= MOST_AT_ONCE, "batch", f"1 to {MOST_AT_ONCE:,}", self.batch)
        _check(self.shard is None or 1 <= self.shard < 1 << 31, "shard", "1 to 2,147,483,647", self.shard)
        _check(self.decoder in get_args(DecoderName), "decoder", "auto, dali or torchvision", self.decoder)
        _check(0 < self.max_megapixels < math.inf, "max_megapixels", "more than 0", self.max_megapixels)
        _check(self.pooled in (None, *get_args(Score)), "pooled", "max or mean", self.pooled)
        share = self.hardware_share
        _check(share is None or 0 <= share <= 1, "hardware_share", "0 to 1", share)

    def resolve(self, device: torch.device, images: int = 0) -> ScanConfig:
        """The same with every None filled in for a device and a number of images, and the shard a whole number of
        batches."""
        on_cpu = device.type == "cpu"
        batch = self.batch or (32 if on_cpu else 128)
        share = HARDWARE_SHARE if self.hardware_share is None else self.hardware_share
        return dataclasses.replace(
            self,
            precision=self.precision or ("fp32" if on_cpu else "fp16"),
            batch=batch,
            shard=math.ceil((self.shard or SHARD) / batch) * batch,
            compile=(not on_cpu or images >= COMPILED) if self.compile is None else self.compile,
            hardware_share=None if on_cpu or self.decoder == "torchvision" else share,
        )

    def kept(self) -> dict[tuple[str, Any], int]:
        """How many peaks a channel keeps for each (score, end).

        A 16-bit scan keeps more than are asked for: the candidates that full precision may yet bring up.
        """
        exact = self.precision == "fp32"
        ends = {"top": self.top, "bottom": self.bottom}
        return {
            (score, end): k if exact else max(2 * k, k + 32)
            for score in self.scores
            for end, k in ends.items()
            if k > 0
        }

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ScanConfig:
        """What `to_json` gave, also after a round through JSON."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))


@dataclass(frozen=True)
class ProjectConfig:
    """The settings of a second pass, saved in its store; what it made is only ever added to with the same ones."""

    ranks: int = 9
    methods: tuple[Method, ...] = ("deconvnet",)
    seed: Seed = "one"
    crop: Crop = "auto"
    max_size: int = 128
    settle: bool = True

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot be."""
        _check(self.ranks >= 1, "ranks", "at least 1", self.ranks)
        known = get_args(Method)
        _check(bool(self.methods) and set(self.methods) <= set(known), "methods", " or ".join(known), self.methods)
        _check(self.seed in get_args(Seed), "seed", "one or activation", self.seed)
        _check(self.crop in get_args(Crop), "crop", "auto, field or focus", self.crop)
        _check(8 <= self.max_size <= 1024, "max_size", "8 to 1024 pixels", self.max_size)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunConfig:
    """How a run goes: nothing here changes what a store holds, but for float rounding between thread counts."""

    devices: str = "auto"  # auto, cpu, cpu:COUNT, cuda, cuda:N, cuda:FIRST-LAST, or several with commas between them
    threads: int | None = None  # of the network, on a CPU; None is every core, shared between the workers
    readers: int = 16  # threads of a worker that read files
    decode_threads: int | None = None  # of a worker; None is every core, shared
    max_bad: int | None = None  # bad images that stop the run; None is 1 % of the catalog, but at least 10
    retry_errors: bool = False
    overwrite: bool = False
    stall: float = 300.0  # seconds of silence after which a worker is replaced
    cluster: str | None = None  # of Ray: auto, or HOST:PORT; its nodes do the work
    cpus_per_worker: int | None = None  # of a cluster; None is all of a node's, or a GPU's part of them

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot be."""
        _check(
            self.threads is None or 1 <= self.threads <= MOST_THREADS, "threads", f"1 to {MOST_THREADS}", self.threads
        )
        _check(1 <= self.readers <= MOST_THREADS, "readers", f"1 to {MOST_THREADS}", self.readers)
        _check(
            self.decode_threads is None or 1 <= self.decode_threads <= MOST_THREADS,
            "decode_threads",
            f"1 to {MOST_THREADS}",
            self.decode_threads,
        )
        _check(self.max_bad is None or self.max_bad >= 0, "max_bad", "0 or more", self.max_bad)
        _check(self.stall > 0, "stall", "more than 0 seconds", self.stall)
        each = self.cpus_per_worker
        _check(each is None or each >= 1, "cpus_per_worker", "at least 1", each)
        _check(each is None or self.cluster is not None, "cpus_per_worker", "none without a cluster", each)
        if self.cluster is None:
            parse_devices(self.devices)
            return
        _check(self.devices in ("auto", "cpu", "cuda"), "devices", "auto, cpu or cuda on a cluster", self.devices)
        here = "auto or HOST:PORT (run maxact on a node of the cluster; `ray job submit` does)"
        _check(bool(re.fullmatch(r"auto|[^/\s]+:[0-9]+", self.cluster)), "cluster", here, self.cluster)

    def each(self) -> tuple[RunConfig, ...]:
        """This for each worker: its device by itself, and its part of the cores."""
        there = parse_devices(self.devices)
        share = max(1, cores() // len(there))
        return tuple(
            dataclasses.replace(
                self,
                devices=str(device),
                threads=self.threads or share,
                decode_threads=self.decode_threads or share,
            )
            for device in there
        )

    @property
    def alone(self) -> bool:
        """Whether it needs no worker but this very process: on one CPU, as far as that is all that was asked for."""
        if self.cluster is not None:
            return False
        return self.devices in ("auto", "cpu") and parse_devices(self.devices) == (torch.device("cpu"),)

    def torch_device(self) -> torch.device:
        """The (first) device to run on, on a cluster that of a worker. Raises UsageError where it is not there."""
        device = parse_devices(self.devices)[0]
        if device.type == "cuda" and self.cluster is None:
            missing = [each for each in parse_devices(self.devices) if (each.index or 0) >= torch.cuda.device_count()]
            if missing:
                raise UsageError(f"devices: {missing[0]} is not here ({torch.cuda.device_count()} CUDA devices seen)")
        return device

    def allowed_bad(self, images: int) -> int:
        """How many bad images a catalog of so many may have before the run stops."""
        return max(10, images // 100) if self.max_bad is None else self.max_bad


def parse_devices(words: str) -> tuple[torch.device, ...]:
    """The devices that some words mean, one for each worker; CUDA devices need not be there. Raises UsageError."""
    expected = "auto, cpu, cpu:COUNT, cuda, cuda:N or cuda:FIRST-LAST"
    if words == "auto":
        words = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[torch.device] = []
    for word in words.split(","):
        match = re.fullmatch(r"(cpu|cuda)(?::([0-9]{1,4})(?:-([0-9]{1,4}))?)?", word.strip(), re.ASCII)
        kind, first, last = match.groups() if match else ("", None, None)
        if not kind or (kind == "cpu" and last is not None) or (last is not None and int(last) < int(first or 0)):
            raise UsageError(f"devices: expected {expected}, got {words!r}")
        if kind == "cpu":
            count = 1 if first is None else int(first)
            _check(1 <= count <= 1024, "devices", "cpu:1 to cpu:1024", words)
            found += [torch.device("cpu")] * count
        else:
            numbers = (
                range(max(1, torch.cuda.device_count())) if first is None else range(int(first), int(last or first) + 1)
            )
            found += [torch.device("cuda", number) for number in numbers]
    if len({device.type for device in found}) > 1:
        raise UsageError(f"devices: expected CPUs or CUDA devices, not both, got {words!r}")
    cuda = [device for device in found if device.type == "cuda"]
    if len(set(cuda)) < len(cuda):
        raise UsageError(f"devices: expected each CUDA device once, got {words!r}")
    return tuple(found)


def items(value: str | Sequence[str]) -> tuple[str, ...]:
    """What may be given as one text or as several: text is one item; what comes twice counts once."""
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))


def cores() -> int:
    """CPU cores that this process may use."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # there is no such file, or no quota
        quota, period = map(int, _QUOTA.read_text().split())
        count = min(count, quota // period)
    return max(1, count)
