"""The demo, piece by piece: all of it takes minutes, and `make demo` runs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maxact
from maxact import demo
from maxact.errors import MaxactError
from stores import contents


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiles of two photographs."""
    folder = tmp_path_factory.mktemp("demo") / "tiles"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PHOTOGRAPHS", ("chelsea.png", "camera.png"))
        patch.setattr(demo, "_PARTS", (1, 2))
        assert demo.write_tiles(folder) == 2 + 15 + 1 + 9
    return folder


def test_tiles(tiles: Path) -> None:
    """Squares of one, and of half, of the short side of a photograph, half overlapping."""
    chelsea = sorted(path.name for path in (tiles / "chelsea").iterdir())  # 451 x 300 pixels
    assert chelsea == sorted(
        [*(f"300-0-{x}.jpg" for x in (0, 150)), *(f"150-{y}-{x}.jpg" for y in (0, 75, 150) for x in range(0, 302, 75))]
    )
    with Image.open(tiles / "camera" / "512-0-0.jpg") as tile:
        assert tile.size == (224, 224) and tile.mode == "RGB"  # it is grey, and written in colour as all are
        found = np.asarray(tile).astype(int)
    data = Path(str(importlib.util.find_spec("skimage").origin)).parent / "data"  # type: ignore[union-attr]
    with Image.open(data / "camera.png") as whole:
        wanted = np.asarray(whole.convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(found - wanted).mean() < 3


def test_a_second_run_meets_the_same_files(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PHOTOGRAPHS", ("chelsea.png", "camera.png"))
    monkeypatch.setattr(demo, "_PARTS", (1, 2))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tiles.rglob("*.jpg")}
    torn = tiles / "camera" / "256-0-0.part"  # a run that was killed
    torn.write_bytes(b"half")
    assert demo.write_tiles(tiles) == len(before)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tiles.rglob("*.jpg")} == before
    torn.unlink(missing_ok=True)
    assert all(name.endswith(".jpg") for name in contents(tiles))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MaxactError) as caught:
        demo.write_tiles(tmp_path / "file" / "tiles")
    assert str(caught.value) == (
        f"{tmp_path}/file/tiles: cannot be written (Not a directory); make its folder first, or choose another place"
    )


def test_about_1500_tiles() -> None:
    data = Path(str(importlib.util.find_spec("skimage").origin)).parent / "data"  # type: ignore[union-attr]
    count = 0
    for name in demo.PHOTOGRAPHS:
        with Image.open(data / name) as photograph:
            width, height = photograph.size
        for part in demo._PARTS:
            side = min(width, height) // part
            count += len(demo._starts(height, side)) * len(demo._starts(width, side))
    assert 1300 <= count <= 1700


def test_the_network_is_trained_and_scanned(tiles: Path, tmp_path: Path) -> None:
    """A few tiles through the real network: a cat is a cat, and the pieces of the demo fit."""
    store = maxact.scan(
        "maxact.demo:network", tiles / "chelsea", tmp_path / "x", limit=6, batch=3, layers=["*expand_conv", "_fc"]
    )
    assert len(store) > 10 and store.manifest.finished
    assert store.manifest.preprocessing["interpolation"] == "bicubic"
    network = demo.network().eval()
    with torch.inference_mode():
        classes = network(torch.stack([store.input(number) for number in range(6)])).argmax(1).tolist()
    assert sum(281 <= number <= 285 for number in classes) >= 3  # ImageNet's domestic cats
    channels = demo.telling_channels(store)
    assert list(channels) == list(store) and all(len(set(each)) == 4 for each in channels.values())
    name = "_fc"
    results = store[name]
    score, stats = results.lists["max", "top"].score, results.stats
    height = np.nanmean(score[:, :6], 1) - stats["mean"]
    height[results.dead] = -np.inf
    assert not results.dead[channels[name]].any() and height[channels[name][0]] > np.median(height)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MaxactError) as caught:
        demo._package("no_such_package")
    assert (
        str(caught.value) == "demo: the package no_such_package is missing; install it with `pip install maxact[demo]`"
    )
