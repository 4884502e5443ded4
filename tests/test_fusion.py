"""The form of the peaks that fuses: equal to the reference, and in the code for CUDA (bench/fusion.py, which needs no
device) no kernel of the taps' own reads a map."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from maxact.preprocess import Preprocess
from maxact_kernels import peaks

ROOT = Path(__file__).resolve().parent.parent


class Small(nn.Module):
    """What decides about fusion: few channels and many, a norm and none, a residual, an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.many = nn.Conv2d(8, 128, 3, padding=1)
        self.again, self.last = nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(128, 5)
        self.preprocess = Preprocess(resize=32, crop=(32, 32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.many(self.relu(self.norm(self.few(images)))))
        maps = self.relu(self.last(self.again(maps)) + maps)
        scores: torch.Tensor = self.fc(maps.mean((2, 3)))
        return scores


def residual() -> nn.Module:
    """A ResNet-18 with one block where it has two, which takes half the time."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.preprocess = Preprocess(resize=256, crop=(224, 224))  # type: ignore[assignment]
    return network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (2, 4, 49), (2, 3, 1), (4, 4096, 3, 5), (1, 2, 300, 300)])
@pytest.mark.parametrize("special", [None, torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_the_fused_form_is_the_reference(dtype: torch.dtype, shape: tuple[int, ...], special: float | None) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    maps[0] = maps[0].round()  # ties
    maps[-1, 0] = -maps[-1, 0].abs()
    maps[-1, 0].view(-1)[::2] = 0.0  # the maximum is 0 and -0
    maps[-1, 0].view(-1)[1::3] = -0.0
    if special is not None:
        maps.view(-1)[7::53] = special
    maps = maps.to(dtype)
    for given in (maps, maps.movedim(1, -1).contiguous().movedim(-1, 1)):
        got, expected = peaks.fused(given), peaks.reference(given.flatten(2))
        for name, mine, theirs in zip(
            ("max", "position", "min", "mean", "square", "active"), got, expected, strict=True
        ):
            rounding = {"rtol": 1e-5, "atol": 1e-6} if name in ("mean", "square") else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(
                mine, theirs, **rounding, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What bench/fusion.py finds, for each network."""
    if sys.platform != "linux":
        pytest.skip("torch has no Triton here")
    path = os.pathsep.join([str(ROOT / "bench"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    out = tmp_path_factory.mktemp("fusion") / "found.json"
    models = "test_fusion:Small,test_fusion:residual,vgg11"
    command = [sys.executable, str(ROOT / "bench" / "fusion.py"), "--models", models, "--json", str(out)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return {row[0]: dict(zip(result["columns"], row, strict=True)) for row in result["rows"]}


def test_no_kernel_of_the_taps_own_reads_a_map(found: dict[str, dict[str, Any]]) -> None:
    small = found["test_fusion:Small"]
    assert small["taps"] == 4
    # all but the linear layer's, which has one position and nothing to reduce
    assert small["shared"] == 3
    assert small["again"] == 0


def test_taps_stay_where_their_maps_are(found: dict[str, dict[str, Any]]) -> None:
    """Past a max-pool Inductor would put them at the end of the network, where the maps have to be read again."""
    assert found["vgg11"]["again"] == 0 and found["vgg11"]["more"] < 0.03


def test_the_taps_of_a_resnet_move_little_more(found: dict[str, dict[str, Any]]) -> None:
    resnet = found["test_fusion:residual"]
    assert (resnet["taps"], resnet["shared"], resnet["again"]) == (13, 12, 0)
    # 5 %: partial results of maps that are reduced row by row, and the peaks themselves; the first map alone is 10 %
    assert resnet["more"] < 0.07
    # the network's own kernels are the bare one's: what is more is the taps'
    assert resnet["with taps"] - resnet["of the taps alone"] <= resnet["kernels bare"]
