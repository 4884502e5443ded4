"""The decoder for machines without DALI, for datasets that give pictures and for preprocess functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from maxact.decoder import Decoded, Settings
from maxact.pictures import Refused, alone, as_picture, line, open_picture, rgb
from maxact.preprocess import Placement


class TorchvisionDecoder:
    """torchvision's pixels, bit for bit: PIL decodes and resizes, as it does below torchvision's transforms.

    Each image is one task of a thread pool, written into its place of the batch; PIL works outside of the GIL.
    """

    def __init__(self, settings: Settings) -> None:
        self.depth = settings.depth
        preprocess = settings.preprocess
        self._settings = settings
        self._function = None if preprocess.function is None else preprocess.load_function()
        self._resample = Image.Resampling[preprocess.interpolation.upper()]
        self._pool = ThreadPoolExecutor(settings.threads, "decode")
        self._flights: deque[tuple[torch.Tensor, list[Future[str | None]]]] = deque()

    def submit(self, files: Sequence[Any]) -> None:
        self._settings.check(files, len(self._flights))
        images = self._zeros(len(files))
        parts = [self._pool.submit(self._one, file, images[i]) for i, file in enumerate(files)]
        self._flights.append((images, parts))

    def collect(self) -> Decoded:
        images, parts = self._flights.popleft()
        reasons = {i: part.result() for i, part in enumerate(parts)}
        errors = {i: reason for i, reason in reasons.items() if reason is not None}
        return Decoded(images.to(self._settings.device, non_blocking=True), errors)  # from pinned memory: no waiting

    def blank(self, n: int) -> torch.Tensor:
        return self._zeros(n).to(self._settings.device)

    def close(self) -> None:
        self._flights.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _zeros(self, n: int) -> torch.Tensor:
        dtype = torch.uint8 if self._function is None else torch.float32
        pinned = self._settings.device.type == "cuda"
        return torch.zeros((n, *self._settings.preprocess.shape), dtype=dtype, pin_memory=pinned)

    def _one(self, file: object, out: torch.Tensor) -> str | None:
        """Decode one file into `out`, [H, W, 3] or [3, H, W]. The reason where it is bad: `out` stays blank."""
        source = ""
        try:
            if isinstance(file, bytes):
                picture = open_picture(file)
                source = f"{picture.format}: "
            else:
                picture = as_picture(file)
            placement = self._settings.place(picture.height, picture.width)
            with alone(picture):
                picture = rgb(picture)
                if self._function is None:
                    self._fit(picture, placement, out.numpy())
                else:
                    source = "preprocess function: "
                    self._call(picture, out)
        except Refused as refused:
            return line(refused)
        except Exception as error:
            return line(f"{source}{line(error)}")
        return None

    def _fit(self, picture: Image.Image, placement: Placement, out: np.ndarray) -> None:
        """Resize and crop the picture into `out`, [H, W, 3]."""
        (height, width), (y, x) = placement
        pixels = np.asarray(picture.resize((width, height), self._resample))  # [height, width, 3]
        shown = pixels[max(0, y) : y + out.shape[0], max(0, x) : x + out.shape[1]]
        if shown.shape != out.shape:
            out[:] = self._settings.fill
        top, left = max(0, -y), max(0, -x)
        out[top : top + shown.shape[0], left : left + shown.shape[1]] = shown

    def _call(self, picture: Image.Image, out: torch.Tensor) -> None:
        """What the preprocess function makes of the picture into `out`, [3, H, W]."""
        assert self._function is not None
        made = self._function(picture)
        if not isinstance(made, torch.Tensor):
            raise Refused(f"preprocess function: gave {type(made).__name__}, expected a tensor {list(out.shape)}")
        if made.shape != out.shape:
            shapes = f"a tensor {list(made.shape)}, expected {list(out.shape)}"
            raise Refused(f"preprocess function: gave {shapes} (--crop sets the size)")
        out.copy_(made.detach())
