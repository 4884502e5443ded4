"""bench/fusion.py: in the code for CUDA no kernel of the taps' own reads a map. Needs no CUDA device."""

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

from maxact.preprocess import Preprocess

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


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no Triton here")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_no_kernel_of_the_taps_own_reads_a_map(precision: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "bench"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "bench" / "fusion.py"), "--models", "test_fusion:Small"]
    command += ["--precision", precision, "--json", str(tmp_path / "found.json")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
    result: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    found = dict(zip(result["columns"], result["rows"][0], strict=True))
    assert found["taps"] == 4
    # all but the linear layer's, which has one position and nothing to reduce
    assert found["shared"] == 3
    assert found["again"] == 0
