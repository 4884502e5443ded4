"""Settings: checked where they are made, completed once, saved and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from maxact import config
from maxact.config import SHARD, RunConfig, ScanConfig, cores
from maxact.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("at", "relu", "at: expected norm, module or activation, got 'relu'"),
        ("scores", (), "scores: expected max or mean, got ()"),
        ("scores", ("max", "median"), "scores: expected max or mean, got ('max', 'median')"),
        ("top", 0, "top: expected at least 1, got 0"),
        ("bottom", -1, "bottom: expected 0 or more, got -1"),
        ("precision", "fp8", "precision: expected fp32, fp16 or bf16, got 'fp8'"),
        ("batch", 0, "batch: expected at least 1, got 0"),
        ("shard", 0, "shard: expected at least 1, got 0"),
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


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cuda:x"])
def test_devices_that_are_not_here(device: str) -> None:
    with pytest.raises(UsageError, match=r"^device: "):
        RunConfig(device).torch_device()


def test_devices() -> None:
    assert RunConfig("cpu").torch_device() == CPU
    assert RunConfig().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_is_left_open_is_chosen_for_the_device() -> None:
    cpu, cuda = ScanConfig().resolve(CPU), ScanConfig().resolve(CUDA)
    assert (cpu.precision, cpu.batch, cpu.shard) == ("fp32", 32, SHARD)
    assert (cuda.precision, cuda.batch, cuda.shard) == ("fp16", 128, SHARD)
    given = ScanConfig(precision="bf16", batch=7, shard=20).resolve(CUDA)
    assert (given.precision, given.batch, given.shard) == ("bf16", 7, 21)  # whole batches
    assert given.resolve(CPU) == given


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
