"""Networks that tests name on the command line, as `several:first`: for scans of several at once, and for graphs."""

from __future__ import annotations

import time

import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from maxact.preprocess import Preprocess

SIDE = 32
calls: list[object] = []  # of `counted`


class First(nn.Module):
    """Convolution, norm, in-place ReLU, and a linear layer."""

    def __init__(self, channels: int = 6, seconds: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu, self.pool, self.fc = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 5)
        self.preprocess = Preprocess(resize=SIDE, crop=(SIDE, SIDE))
        self.seconds = seconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.seconds:
            time.sleep(self.seconds)
        maps = self.relu(self.bn1(self.conv1(images)))
        scores: torch.Tensor = self.fc(self.pool(maps).flatten(1))
        return scores


class Second(First):
    """The same pixels, normalised in another way."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(7, seconds)
        self.preprocess = Preprocess(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))


class Third(First):
    """Other pixels of the same pictures."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(5, seconds)
        self.preprocess = Preprocess(resize=40, crop=(24, 28), interpolation="bicubic")


def first() -> nn.Module:
    torch.manual_seed(1)
    return First().eval()


def second() -> nn.Module:
    torch.manual_seed(2)
    return Second().eval()


def third() -> nn.Module:
    torch.manual_seed(3)
    return Third().eval()


def slow() -> nn.Module:
    """The first, three hundredths of a second for each batch."""
    torch.manual_seed(1)
    return First(seconds=0.03).eval()


def slow_third() -> nn.Module:
    torch.manual_seed(3)
    return Third(0.03).eval()


def counted(picture: Image.Image) -> torch.Tensor:
    """A preprocess function that notes its calls."""
    calls.append(picture.size)
    made: torch.Tensor = v2.functional.to_dtype(v2.functional.to_image(picture.resize((SIDE, SIDE))), scale=True)
    return made
