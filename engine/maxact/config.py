"""What decides the content of a store (`ScanConfig`), and what only decides how a run goes (`RunConfig`)."""

from __future__ import annotations

import dataclasses
import math
import os
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

COMPILED = 10_000  # images of a scan on a CPU from which compiling the network can pay
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

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot be."""
        _check(self.at in get_args(At), "at", "norm, module or activation", self.at)
        _check(
            bool(self.scores) and set(self.scores) <= set(get_args(Score)),
            "scores",
            "max or mean",
            self.scores,
        )
        _check(self.top >= 1, "top", "at least 1", self.top)
        _check(self.bottom >= 0, "bottom", "0 or more", self.bottom)
        _check(
            self.precision in (None, *get_args(Precision)),
            "precision",
            "fp32, fp16 or bf16",
            self.precision,
        )
        _check(self.batch is None or self.batch >= 1, "batch", "at least 1", self.batch)
        _check(self.shard is None or self.shard >= 1, "shard", "at least 1", self.shard)
        _check(self.decoder in get_args(DecoderName), "decoder", "auto, dali or torchvision", self.decoder)
        _check(self.max_megapixels > 0, "max_megapixels", "more than 0", self.max_megapixels)

    def resolve(self, device: torch.device, images: int = 0) -> ScanConfig:
        """The same with every None filled in for a device and a number of images, and the shard a whole number of
        batches."""
        on_cpu = device.type == "cpu"
        batch = self.batch or (32 if on_cpu else 128)
        return dataclasses.replace(
            self,
            precision=self.precision or ("fp32" if on_cpu else "fp16"),
            batch=batch,
            shard=math.ceil((self.shard or SHARD) / batch) * batch,
            compile=(not on_cpu or images >= COMPILED) if self.compile is None else self.compile,
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

    device: str = "auto"
    threads: int | None = None  # of the network, on a CPU; None is every core
    readers: int = 16  # threads that read files
    decode_threads: int | None = None  # None is every core
    max_bad: int | None = None  # bad images that stop the run; None is 1 % of the catalog, but at least 10
    retry_errors: bool = False
    overwrite: bool = False
    hardware_share: float = 0.65  # of JPEGs that a GPU's decoding hardware takes, where it has some; DALI's default

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot be."""
        _check(0 <= self.hardware_share <= 1, "hardware_share", "0 to 1", self.hardware_share)
        _check(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        _check(self.readers >= 1, "readers", "at least 1", self.readers)
        _check(
            self.decode_threads is None or self.decode_threads >= 1,
            "decode_threads",
            "at least 1",
            self.decode_threads,
        )
        _check(self.max_bad is None or self.max_bad >= 0, "max_bad", "0 or more", self.max_bad)

    def torch_device(self) -> torch.device:
        """The device to run on. Raises UsageError where it is not there."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UsageError(f"device: expected auto, cpu or cuda:N, got {self.device!r}") from error
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"device: expected auto, cpu or cuda:N, got {self.device!r}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device: {self.device} is not here ({torch.cuda.device_count()} CUDA devices seen)")
        return device

    def allowed_bad(self, images: int) -> int:
        """How many bad images a catalog of so many may have before the run stops."""
        return max(10, images // 100) if self.max_bad is None else self.max_bad


def cores() -> int:
    """CPU cores that this process may use."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # there is no such file, or no quota
        quota, period = map(int, _QUOTA.read_text().split())
        count = min(count, quota // period)
    return max(1, count)
