"""Settings: checked where they are made, completed once, saved and read."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maxact import config
from maxact.config import HARDWARE_SHARE, SHARD, RunConfig, ScanConfig, cores
from maxact.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("at", "relu", "at: expected norm, module or activation, got 'relu'"),
        ("scores", (), "scores: expected max or mean, got ()"),
        ("scores", ("max", "median"), "scores: expected max or mean, got ('max', 'median')"),
        ("top", 0, "top: expected 1 to 100,000, got 0"),
        ("bottom", -1, "bottom: expected 0 to 100,000, got -1"),
        ("precision", "fp8", "precision: expected fp32, fp16 or bf16, got 'fp8'"),
        ("batch", 0, "batch: expected 1 to 65,536, got 0"),
        ("shard", 0, "shard: expected 1 to 2,147,483,647, got 0"),
        ("decoder", "pil", "decoder: expected auto, dali or torchvision, got 'pil'"),
        ("max_megapixels", 0, "max_megapixels: expected more than 0, got 0"),
    ],
)
def test_scan_settings_that_cannot_be(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ScanConfig(**{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 0), ("readers", 0), ("decode_threads", 0), ("max_bad", -1)],
)
def test_run_settings_that_cannot_be(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=rf"^{name}: expected .*, got {value}$"):
        RunConfig(**{name: value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            (words, "devices: expected auto, cpu")
            for words in ("gpu", "meta", "cuda:x", "", "cuda:3-1", "cpu:1-2", "cpu:-1")
        ),
        ("cpu:0", "devices: expected cpu:1 to cpu:1024, got 'cpu:0'"),
        ("cpu,cuda:0", "devices: expected CPUs or CUDA devices, not both"),
        ("cuda:0-2,cuda:1", "devices: expected each CUDA device once"),
    ],
)
def test_devices_that_cannot_be(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        RunConfig(words)


def test_devices_that_are_not_here() -> None:
    with pytest.raises(UsageError, match=r"^devices: cuda:99 is not here"):
        RunConfig("cuda:99").torch_device()


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        ("cpu", ["cpu"]),
        ("cpu:3", ["cpu"] * 3),
        ("cuda:2", ["cuda:2"]),
        ("cuda:0-2,cuda:5", ["cuda:0", "cuda:1", "cuda:2", "cuda:5"]),
    ],
)
def test_devices(words: str, devices: list[str]) -> None:
    each = RunConfig(words).each()
    assert [run.devices for run in each] == devices
    share = max(1, cores() // len(devices))
    assert {(run.threads, run.decode_threads) for run in each} == {(share, share)}
    assert [run.threads for run in RunConfig(words, threads=5).each()] == [5] * len(devices)


def test_a_single_cpu_needs_no_worker() -> None:
    assert RunConfig("cpu").torch_device() == CPU
    assert RunConfig().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert [RunConfig(words).alone for words in ("cpu", "cpu:1", "cpu:2", "cuda:0")] == [True, False, False, False]


def test_what_is_left_open_is_chosen_for_the_device() -> None:
    cpu, cuda = ScanConfig().resolve(CPU), ScanConfig().resolve(CUDA)
    assert (cpu.precision, cpu.batch, cpu.shard) == ("fp32", 32, SHARD)
    assert (cuda.precision, cuda.batch, cuda.shard) == ("fp16", 128, SHARD)
    given = ScanConfig(precision="bf16", batch=7, shard=20).resolve(CUDA)
    assert (given.precision, given.batch, given.shard) == ("bf16", 7, 21)  # whole batches
    assert given.resolve(CPU) == replace(given, hardware_share=None)
    assert (cpu.hardware_share, cuda.hardware_share) == (None, HARDWARE_SHARE)
    for share, decoder, kept in ((0.0, "dali", 0.0), (0.8, "auto", 0.8), (0.8, "torchvision", None)):
        assert ScanConfig(hardware_share=share, decoder=decoder).resolve(CUDA).hardware_share == kept


@pytest.mark.parametrize(("top", "kept"), [(50, 100), (9, 41), (32, 64), (1, 33)])
def test_a_16_bit_scan_keeps_candidates(top: int, kept: int) -> None:
    assert ScanConfig(top=top, precision="fp32").kept() == {("max", "top"): top}
    assert ScanConfig(top=top, precision="fp16").kept() == {("max", "top"): kept}


def test_kept_lists() -> None:
    config = ScanConfig(scores=("max", "mean"), top=3, bottom=2, precision="fp32")
    assert config.kept() == {("max", "top"): 3, ("max", "bottom"): 2, ("mean", "top"): 3, ("mean", "bottom"): 2}


def test_it_comes_back_from_json() -> None:
    config = ScanConfig(layers=("a.*", "b"), scores=("mean",), skip_grey=True).resolve(CPU)
    assert ScanConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_bad_images_that_are_borne() -> None:
    assert [RunConfig().allowed_bad(count) for count in (5, 1000, 1100, 1_281_167)] == [10, 10, 11, 12_811]
    assert RunConfig(max_bad=0).allowed_bad(1000) == 0


@pytest.mark.parametrize(
    ("quota", "wanted"),
    [("max 100000", 8), ("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_cores(quota: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(config, "_QUOTA", tmp_path / "cpu.max")
    assert cores() == 8  # no quota is known
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores() == wanted
