"""What every decoder shares: the interface, and where a picture goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from maxact.pictures import Refused
from maxact.preprocess import Placement, Preprocess

T = TypeVar("T")


@dataclass
class Decoded:
    """One batch. The images belong to whoever holds them: nothing overwrites them, also not after `close`.

    On CUDA they are ready on the stream that was current when `collect` was called, and their memory is freed in
    that stream's order: a consumer that reads them on another stream has to make the first wait for it.
    """

    images: torch.Tensor
    """uint8 [N, H, W, 3], or float32 [N, 3, H, W] from a preprocess function; 0 where bad."""
    errors: dict[int, str] = field(default_factory=dict)
    """Place in the batch -> why it is bad, in one line."""


class Decoder(Protocol):
    """Decodes batches in the background, in order. One thread at a time calls it."""

    depth: int
    """How many batches may be submitted and not yet collected."""

    def submit(self, files: Sequence[Any]) -> None:
        """Start a batch of 1 to `batch` files: bytes, or pictures where those are taken."""

    def collect(self) -> Decoded:
        """Wait for the oldest batch that was submitted and not yet collected."""

    def blank(self, n: int) -> torch.Tensor:
        """A batch of n images that are 0, as `collect` would give them."""

    def close(self) -> None:
        """End the threads; batches in flight are dropped. Closing again does nothing."""


@dataclass(frozen=True)
class Settings:
    """What a decoder is made with."""

    preprocess: Preprocess
    batch: int
    threads: int
    device: torch.device
    max_pixels: int
    """A picture of more, or one that would be resized to more, is refused by its header."""
    depth: int
    hardware_share: float | None = None
    """Of JPEGs that a GPU's decoding hardware takes, where it has some; None is DALI's own choice."""

    @property
    def fill(self) -> tuple[int, int, int]:
        """What lies outside of the picture: torchvision's centre crop pads with black."""
        return self.preprocess.fill if self.preprocess.fit == "pad" else (0, 0, 0)

    def place(self, height: int, width: int) -> Placement:
        """Where a picture of this size goes. Raises Refused where it is too large."""
        pixels = height * width
        if not pixels:
            raise Refused(f"{width} x {height} pixels: there is no picture")
        if pixels > self.max_pixels:
            raise Refused(f"{width} x {height} pixels ({_mega(pixels)}), {self._limit}")
        placement = self.preprocess.placement(height, width)
        rows, columns = placement.size
        if rows * columns > self.max_pixels:  # one row of pixels, say
            raise Refused(f"{width} x {height} pixels would be resized to {columns} x {rows}, {self._limit}")
        return placement

    @property
    def _limit(self) -> str:
        return f"over the limit of {_mega(self.max_pixels)}"

    def check(self, files: Sequence[Any], in_flight: int) -> None:
        """Raise for a batch that must not be submitted: a mistake of the caller's."""
        if not 1 <= len(files) <= self.batch:
            raise ValueError(f"expected 1 to {self.batch} files, got {len(files)}")
        if in_flight >= self.depth:
            raise RuntimeError(f"{in_flight} batches are in flight, as many as may be: collect one first")


def _mega(pixels: int) -> str:
    return f"{pixels / 1e6:,.{0 if pixels >= 1e8 else 2}f} megapixels"
