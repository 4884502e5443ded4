"""A network for the soak: slow enough to be disturbed, and out of memory whenever a file says so."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from tiny import Tiny


class Soaked(Tiny):
    """Tiny, a few hundredths of a second for each batch."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        folder = os.environ.get("MAXACT_SOAK")
        with suppress(FileNotFoundError):
            if folder:
                (Path(folder) / "memory").unlink()  # whoever is first
                raise torch.OutOfMemoryError("no memory, says the soak")
        return super().forward(images)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Soaked(0.03)
