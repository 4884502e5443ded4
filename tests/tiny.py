"""Networks that tests name on the command line, as `tiny:network`: small enough for hundreds of runs."""

from __future__ import annotations

import time

import torch
from torch import nn

from maxact.preprocess import Preprocess

SIDE = 32


class Tiny(nn.Module):
    """Two convolutions with their norms, and a linear layer: three taps, bn1, bn2 and fc."""

    def __init__(self, seconds: float = 0.0, after: int = 0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 7, 3, stride=2, padding=1), nn.BatchNorm2d(7)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(7, 5)
        self.preprocess = Preprocess(resize=SIDE, crop=(SIDE, SIDE))
        self.seconds, self.after = seconds, after

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.after -= 1
        if self.after < 0:
            time.sleep(self.seconds)
        maps = torch.relu(self.bn1(self.conv1(images)))
        maps = torch.relu(self.bn2(self.conv2(maps)))
        scores: torch.Tensor = self.fc(self.pool(maps).flatten(1))
        return scores


def network() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


def slow() -> nn.Module:
    """The same, a tenth of a second for each batch."""
    torch.manual_seed(0)
    return Tiny(0.1)


def stuck() -> nn.Module:
    """The same, but some batches later it takes for ever."""
    torch.manual_seed(0)
    return Tiny(3600, 9)


def interrupted() -> nn.Module:
    """Control-C while the network is being made."""
    raise KeyboardInterrupt
