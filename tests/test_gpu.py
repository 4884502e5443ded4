"""What only a CUDA device can show. None of this has run yet: no such device has been at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from torch import nn

import maxact
from maxact.decode import make_decoder
from maxact.deconv import Projector
from maxact.find import find
from maxact.models import Normalised, load_model
from maxact.taps import Taps
from maxact_kernels import peaks
from support import BLANK, SMALL, write_photographs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_the_reference_takes_the_lowest_of_equal_positions() -> None:
    maps = torch.randint(0, 3, (8, 64, 12544), generator=torch.Generator().manual_seed(0)).float()
    _, position, *_ = peaks.reference(maps.cuda())
    np.testing.assert_array_equal(position.cpu().numpy(), maps.numpy().argmax(-1))


def test_the_reference_leaves_out_maps_with_nan_and_infinity() -> None:
    maps = torch.randn(2, 4, 49)
    maps[0, 1, 3], maps[1, 2, 48] = torch.nan, torch.inf
    on_gpu = peaks.reference(maps.cuda())
    for mine, theirs in zip(on_gpu, peaks.reference(maps), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, equal_nan=True)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "efficientnet_b0"])
def test_peaks_agree_with_those_on_the_cpu(name: str) -> None:
    model = load_model(name, weights="none", crop=64, resize=64)
    network = Normalised(model.network, model.preprocess).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = find(network, BLANK)
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    with Taps(network, found.taps) as taps:
        expected = taps(images).result()
    torch.backends.cudnn.allow_tf32 = False
    network.cuda()
    with Taps(network, found.taps) as taps:
        got = taps(images.cuda()).result()
    scale = np.abs(expected.max).max()
    np.testing.assert_allclose(got.max, expected.max, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-3, atol=1e-4 * scale)
    # another position only where it is as high, but for rounding
    assert (got.position == expected.position).mean() > 0.99


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "efficientnet_b0"])
def test_a_compiled_network_gives_the_peaks_of_the_eager_one(name: str) -> None:
    """Inductor fuses the reductions; it has given wrong positions in channels_last maps before."""
    model = load_model(name, weights="none", crop=64, resize=64)
    network = Normalised(model.network, model.preprocess).to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = find(network, BLANK.cuda())
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, device="cuda")
    with Taps(network, found.taps, "fp16") as taps:
        expected = taps(images).result()
    with Taps(network, found.taps, "fp16", compiled=True) as taps:
        batches = [taps(images.roll(turn, 0)) for turn in range(4)]  # none waits for the one before
        for turn, batch in enumerate(batches):
            got = batch.result()
            scale = np.abs(expected.max).max()
            np.testing.assert_allclose(np.roll(got.max, -turn, 0), expected.max, rtol=1e-2, atol=1e-3 * scale)
            assert (np.roll(got.position, -turn, 0) == expected.position).mean() > 0.9


def test_what_is_left_open_is_chosen_by_trying(tmp_path: Path) -> None:
    """A batch that does not fit is halved, and what overflows in fp16 gets bf16."""
    write_photographs(tmp_path / "photos", 6)

    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 20:  # as many as this machine may have, and then some
                torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
            return x * 1e5

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Greedy(), nn.Conv2d(4, 4, 1))
    network.preprocess = SMALL  # type: ignore[assignment]
    store = maxact.scan(network, tmp_path / "photos", tmp_path / "s.zarr", devices="cuda:0", compile=False)
    settings = store.manifest.settings
    assert (settings["batch"], settings["precision"], settings["shard"]) == (16, "bf16", 4096)
    assert store["2"].unfit == 0


def test_two_networks_over_one_decoding_on_the_device(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 20)
    settings = {"weights": "none", "crop": 64, "resize": 64, "batch": 8, "devices": "cuda:0", "compile": False}
    both = maxact.scan_together(["resnet18", "vgg11"], tmp_path / "photos", tmp_path / "both", **settings)
    for name, store in zip(["resnet18", "vgg11"], both, strict=True):
        alone = maxact.scan(name, tmp_path / "photos", tmp_path / f"{name}.zarr", **settings)  # type: ignore[arg-type]
        for tap in alone:
            for mine, theirs in zip(alone[tap].lists["max", "top"], store[tap].lists["max", "top"], strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_an_overflow_in_half_precision_is_counted_and_not_ranked(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 6)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    network.preprocess = SMALL  # type: ignore[assignment]
    with torch.no_grad():
        network[1].weight.fill_(1e5)
    store = maxact.scan(network, tmp_path / "photos", tmp_path / "s.zarr", devices="cuda:0", precision="fp16", batch=4)
    assert store["1"].unfit == 6 * 4  # every channel of every image
    assert (store["1"].lists["max", "top"][0] == -1).all()
    assert store["0"].unfit == 0


@pytest.mark.parametrize("bad", [False, True])
def test_mixed_decoding_agrees_with_the_cpu(tmp_path: Path, bad: bool) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    files: list[bytes] = [path.read_bytes() for path in write_photographs(tmp_path, 9)]
    if bad:
        files[4] = files[4][:-200]
    decoded = {}
    for device in ("cpu", "cuda"):
        decoder = make_decoder("dali", SMALL, batch=9, threads=2, device=device)
        decoder.submit(files)
        decoder.submit(files)
        decoded[device] = [decoder.collect(), decoder.collect()]
        decoder.close()
    for on_cpu, on_gpu in zip(decoded["cpu"], decoded["cuda"], strict=True):
        assert on_gpu.images.is_cuda
        assert set(on_gpu.errors) == set(on_cpu.errors) == ({4} if bad else set())
        difference = (on_gpu.images.cpu().float() - on_cpu.images.float()).abs()
        assert difference.mean() < 1.0


def test_a_scan_finds_what_the_cpu_finds(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 40)
    settings = {"weights": "none", "crop": 64, "resize": 64, "top": 5, "batch": 8, "decoder": "torchvision"}
    exact = maxact.scan("resnet18", tmp_path / "photos", tmp_path / "cpu.zarr", devices="cpu", **settings)  # type: ignore[arg-type]
    full = maxact.scan(
        "resnet18", tmp_path / "photos", tmp_path / "fp32.zarr", devices="cuda:0", precision="fp32", **settings
    )  # type: ignore[arg-type]
    half = maxact.scan("resnet18", tmp_path / "photos", tmp_path / "fp16.zarr", devices="cuda:0", **settings)  # type: ignore[arg-type]
    assert half.manifest.settings["precision"] == "fp16"
    for tap in exact:
        image, score, _ = exact[tap].lists["max", "top"]
        there, values, _ = full[tap].lists["max", "top"]
        np.testing.assert_allclose(values, score, rtol=1e-3, atol=1e-3)
        assert (there == image).mean() > 0.97
        candidates = zarr.open(tmp_path / "fp16.zarr")[f"{tap}/max/top/candidates/image"][:]
        kept = [set(row) <= set(more) for row, more in zip(image, candidates, strict=True)]
        assert np.mean(kept) > 0.99


def test_pictures_without_colour_and_empty_places(tmp_path: Path) -> None:
    paths = write_photographs(tmp_path / "photos", 40)
    for path in paths[5:30:6]:
        with Image.open(path) as picture:
            picture.convert("L").save(path)
    for path in paths[3:40:9]:
        path.write_bytes(path.read_bytes()[:-200])
    settings = {"weights": "none", "crop": 64, "resize": 64, "batch": 8, "skip_grey": True, "precision": "fp32"}
    found = []
    for device in ("cpu", "cuda:0"):
        store = maxact.scan("resnet18", tmp_path / "photos", tmp_path / device[:3], top=40, devices=device, **settings)  # type: ignore[arg-type]
        bad = store.errors()["image"].to_pylist()
        found.append((bad, (store.manifest.summary or {})["grey"], np.sort(store["fc"].lists["max", "top"][0][0])))
    assert found[0][:2] == found[1][:2]
    np.testing.assert_array_equal(found[0][2], found[1][2])


def test_the_same_scan_again_gives_the_same_bits(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 20)
    stores = [
        maxact.scan("resnet18", tmp_path / "photos", tmp_path / name, weights="none", crop=64, resize=64, batch=8)
        for name in ("a.zarr", "b.zarr")
    ]
    for tap in stores[0]:
        for mine, theirs in zip(*(store[tap].lists["max", "top"] for store in stores), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("method", ["deconvnet", "guided", "gradient"])
def test_projections_agree_with_those_on_the_cpu(method: str) -> None:
    model = load_model("vgg11", weights="none", crop=64, resize=64)
    network = model.network
    tap = next(tap for tap in find(Normalised(network, model.preprocess), BLANK).taps if tap.name == "features.8")
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    index, channels, positions = [0, 1, 2, 3, 3], [0, 5, 7, 9, 11], [[0, 0], [3, 4], [15, 15], [8, 2], [1, 9]]
    torch.backends.cudnn.allow_tf32 = False
    found = []
    for device in ("cpu", "cuda"):
        with Projector(network.to(device), tap, method) as projector:  # type: ignore[arg-type]
            found.append(projector(images.to(device), index, channels, positions))
    expected, got = found
    torch.testing.assert_close(got.score.cpu(), expected.score, rtol=1e-3, atol=1e-4)
    scale = float(expected.signal.abs().max())
    torch.testing.assert_close(got.signal.cpu(), expected.signal, rtol=1e-2, atol=1e-3 * scale)


def test_a_second_pass(tmp_path: Path) -> None:
    """The winners' recomputed scores are the stored ones, though the decoders differ by some levels."""
    write_photographs(tmp_path / "photos", 6)
    store = maxact.scan("tiny:network", tmp_path / "photos", tmp_path / "x", top=3, batch=2, devices="cuda:0")
    done = maxact.project(store, devices="cuda:0", ranks=2)
    assert done.manifest.projected is not None and done.winners("bn1").projected().all()
