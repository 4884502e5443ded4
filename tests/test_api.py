"""The public Python API, used as its documentation says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import maxact
import tiny
from stores import SETTINGS, scan
from support import Pictures, photograph

both = pytest.mark.parametrize("decoder", ["dali", "torchvision"])


class Watched(nn.Module):
    """The tiny network, and every tensor that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.network()
        self.preprocess = tiny.Tiny().preprocess
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        result: torch.Tensor = self.inner(images)
        return result


def seen(network: Watched, count: int) -> Iterator[torch.Tensor]:
    """The images of the scan, in batches of two: the last calls, but for the one that finds the fields."""
    batches = network.seen[-((count + 1) // 2) - 1 : -1]
    yield from torch.cat(batches)[:count]


def theirs(picture: Image.Image, resize: int = 32, crop: int = 32) -> torch.Tensor:
    """torchvision's own preprocessing."""
    transform = v2.Compose(
        [
            *(v2.Resize(resize), v2.CenterCrop(crop), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    result: torch.Tensor = transform(picture)
    return result


@both
def test_input_is_what_the_network_saw_and_what_torchvision_makes(photos: Path, tmp_path: Path, decoder: Any) -> None:
    network = Watched()
    store = scan(photos, tmp_path / "x", network, decoder=decoder, crop=24)
    for number, image in enumerate(seen(network, 21)):
        found = store.input(number)
        assert found.dtype == torch.float32 and found.shape == (3, 24, 24)
        assert torch.equal(found, image)
        with Image.open(Path(store.catalog.entry(number).source.decode())) as picture:
            wanted = theirs(picture, 32, 24)
        # a level of 255, and the network's norm makes it 1 / (255 * 0.224)
        assert (found - wanted).abs().max() < (1.01 if decoder == "dali" else 0.01) / 255 / 0.224
    assert torch.equal(store.pixels([4])[0], store.pixels([7, 4])[1])


def test_a_dataset(tmp_path: Path) -> None:
    network, dataset = Watched(), Pictures()
    store = scan(dataset, tmp_path / "x", network)
    for number, image in enumerate(seen(network, 6)):
        assert torch.equal(store.input(number, dataset), image)
        assert (store.input(number, dataset) - theirs(dataset[number])).abs().max() < 0.01
    assert store.catalog.table["key"].to_pylist() == [f"item/{number}" for number in range(6)]
    with pytest.raises(maxact.MaxactError, match="item/2 is an item of a Dataset: give that again"):
        store.input(2)


def test_a_list_of_pictures_is_a_dataset_too(tmp_path: Path) -> None:
    pictures = [photograph(number, 48) for number in range(4)]
    store = scan(pictures, tmp_path / "x")
    assert store.manifest.images["source"] == "builtins.list of 4"
    assert repr(store["fc"].lists) == repr(scan(Pictures(4), tmp_path / "y")["fc"].lists)
    assert scan(pictures, tmp_path / "x").manifest.finished


def test_arrays_and_tensors(tmp_path: Path) -> None:
    class Arrays(Pictures):
        def __getitem__(self, index: int) -> Any:
            array = np.asarray(self.pictures[index])
            return (array, "label") if index % 2 else (torch.from_numpy(array.copy()).permute(2, 0, 1),)

    store = scan(Arrays(), tmp_path / "x")
    assert store.errors().num_rows == 0
    assert repr(store["fc"].lists) == repr(scan(Pictures(), tmp_path / "y")["fc"].lists)


def test_a_list_of_paths(photos: Path, tmp_path: Path) -> None:
    paths = [photos / "coffee", str(photos / "ihc")]
    store = scan(paths, tmp_path / "x")
    assert len(store.catalog) == 6
    assert store.manifest.images["source"] == [str(path) for path in paths]
    assert scan(paths, tmp_path / "x").manifest.finished


def test_a_preprocess_function(photos: Path, tmp_path: Path) -> None:
    network = Watched()
    store = scan(photos, tmp_path / "x", network, preprocess="test_api:upside_down")
    for number, image in enumerate(seen(network, 21)):
        assert torch.equal(store.input(number), image)
    with Image.open(Path(store.catalog.entry(3).source.decode())) as picture:
        assert torch.equal(store.input(3), upside_down(picture.convert("RGB")))
    assert store.pixels([0, 1]).shape == (2, 3, 32, 32)


def upside_down(picture: Image.Image) -> torch.Tensor:
    return theirs(picture).flip(1)


def test_the_example_of_the_package(photos: Path, tmp_path: Path) -> None:
    store = maxact.scan(tiny.network(), photos, tmp_path / "tiny.zarr", **(SETTINGS | {"top": 4}))
    assert isinstance(store, maxact.Store)
    frame = store["bn2"].top(5).to_pandas()
    assert list(frame.columns) == ["rank", "image", "key", "label", "score", "row", "column"] and len(frame) == 4
    again = maxact.open(tmp_path / "tiny.zarr")
    assert again["bn2"].top(5).equals(store["bn2"].top(5))
    assert isinstance(again["bn2"], maxact.TapResults)
    assert maxact.export(again, tmp_path / "tiny.parquet") == 4 * 18


def test_everything_public_is_there_and_nothing_else() -> None:
    for name in maxact.__all__:
        assert getattr(maxact, name) is getattr(maxact, name)
    assert maxact.open is maxact.Store
    assert issubclass(maxact.UsageError, maxact.MaxactError) and issubclass(maxact.Interrupted, maxact.MaxactError)
    with pytest.raises(AttributeError, match="module 'maxact' has no attribute 'scam'"):
        maxact.scam  # noqa: B018


ORDERS = """
import importlib, itertools, sys
orders = [("maxact.scan", "maxact.export", "maxact.catalog"), ("maxact.run", "maxact.scan"), ("maxact.export",), ()]
for order in orders:
    for name in [name for name in sys.modules if name.split(".")[0] == "maxact"]:
        del sys.modules[name]
    for name in order:
        importlib.import_module(name)
    import maxact
    import maxact.scan
    from maxact import export, scan
    for function in (maxact.scan, scan, maxact.export, export):
        assert callable(function), (order, function)
    assert maxact.scan.__module__ == "maxact.run"
    from maxact.scan import Job
    assert callable(maxact.scan) and Job.__module__ == "maxact.scan"
print("good")
"""


def test_functions_stay_functions_whatever_is_imported_first() -> None:
    """`maxact.scan` is a function, and there is a file scan.py."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", ORDERS], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("good\n", "")


def test_importing_is_cheap() -> None:
    code = "import sys, maxact; print(sorted({'torch', 'numpy', 'zarr', 'pyarrow', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
