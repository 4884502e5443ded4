"""Scans of compiled networks: the peaks of the uncompiled one but for rounding, whatever the taps are."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import maxact
import several
from maxact.config import Precision
from maxact.errors import MaxactError
from maxact.find import find
from maxact.models import Normalised
from maxact.process import Progress
from maxact.store import Store
from maxact.taps import Taps
from stores import contents
from support import SMALL, THREADS, Place, all_maps, describe, lively, pixels, same

COUNT, BATCH = 21, 4  # the last batch has one image
SETTINGS: dict[str, Any] = {
    "top": COUNT,
    "batch": BATCH,
    "shard": 8,
    "threads": THREADS,
    "decode_threads": 1,
    "readers": 4,
    "decoder": "torchvision",
}
PLACES = same("bn1", "bn2") | {
    "again": Place("again"),
    "again:1": Place("again", 1),
    "tokens": Place("tokens", 0, -1),
    "fc": Place("fc", 0, -1),
}


class Network(nn.Module):
    """In-place activations after the places that are recorded, a residual addition, a module that is called twice,
    token maps and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.tokens, self.fc = nn.Linear(8, 6), nn.Linear(6, 5)
        self.preprocess = SMALL

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.pool(self.relu(self.bn2(self.conv2(maps)) + maps))
        maps = self.again(self.again(maps).relu_())
        tokens = self.tokens(maps.flatten(2).transpose(1, 2))
        scores: torch.Tensor = self.fc(tokens.mean(1))
        return scores


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lively(Network(), seed)


def scan(photos: Path, store: Path, chosen: nn.Module | None = None, **settings: Any) -> Store:
    return maxact.scan(chosen or network(), photos, store, **(SETTINGS | settings))


def test_normalisations_go_into_the_convolutions_before_them() -> None:
    """Inductor's own code has no normalisation left, though taps lie behind them."""
    wrapped = Normalised(network().eval(), SMALL).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.zeros(BATCH, *SMALL.crop, 3, dtype=torch.uint8)
    with Taps(wrapped, find(wrapped, images).taps, compiled=True) as taps:
        _, (code,) = run_and_get_code(taps, images)
    assert "maxact.peaks" in code and "batch_norm" not in code


def test_a_map_that_is_one_value_in_memory_is_not_clamped_in_place() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3), keepdim=True).expand_as(x)

    network = nn.Sequential(nn.Conv2d(3, 8, 3), Wide(), nn.ReLU(), nn.Conv2d(8, 4, 1))
    wrapped = Normalised(lively(network.eval(), 0), SMALL)
    images = torch.randint(0, 256, (BATCH, *SMALL.crop, 3), dtype=torch.uint8)
    chosen = find(wrapped, images, ["1", "3"]).taps
    with Taps(wrapped, chosen) as taps:
        wanted = taps(images).result()
    with Taps(wrapped, chosen, compiled=True) as taps:
        found = taps(images).result()
    np.testing.assert_allclose(found.max, wanted.max, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)


def rectified(run: Callable[[nn.Conv2d, torch.Tensor], torch.Tensor]) -> nn.Module:
    """A tapped convolution, what `run` does to its output, and a second one that sees what comes of that."""

    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen: torch.Tensor = self.second(run(self.first, images))
            return seen

    torch.manual_seed(0)
    return lively(Rectified(), 0)


# what comes behind a tap -> whether the tap can do it
BEHIND: dict[str, tuple[Callable[[nn.Conv2d, torch.Tensor], torch.Tensor], bool]] = {
    "relu": (lambda conv, x: conv(x).relu(), True),
    "relu in place": (lambda conv, x: nn.functional.relu_(conv(x)), True),
    "relu6": (lambda conv, x: nn.functional.relu6(conv(x)), True),
    "clamp": (lambda conv, x: conv(x).clamp(-0.3, 0.7), True),
    "clamps": (lambda conv, x: conv(x).clamp_min(-0.3).clamp_max(0.7).relu(), True),
    "clamps that cross": (lambda conv, x: conv(x).clamp_max(-0.1).clamp_min(0.2), True),
    "relu of one half": (lambda conv, x: torch.cat([(y := conv(x))[:, :4].relu(), y[:, 4:]], 1), False),
    "leaky relu": (lambda conv, x: nn.functional.leaky_relu(conv(x), 0.1), False),
    "relu and itself": (lambda conv, x: (y := conv(x)).relu() + 0.5 * y, False),
    "two relus": (lambda conv, x: (y := conv(x)).relu() - y.clamp(-1, 0.5), False),
    "relu of a view": (lambda conv, x: (y := conv(x)).flatten(2).relu().view_as(y) - 0.5 * y, False),
    "integers": (lambda conv, x: conv(x).int().float(), False),
    "clamped integers": (lambda conv, x: conv(x).relu().long().to(x.dtype), True),  # the relu alone
    "booleans": (lambda conv, x: conv(x).bool().float(), False),
    "clamp read between": (lambda conv, x: (y := conv(x).clamp_min(-0.2)) + y.clamp_max(0.3), True),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("behind", BEHIND)
def test_a_tap_does_what_a_rectifier_behind_it_would(behind: str, precision: Precision) -> None:
    """And only where nothing else reads what the tap sees: the peaks of both convolutions stay the same."""
    run, joined = BEHIND[behind]
    wrapped = Normalised(rectified(run).eval(), SMALL).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (BATCH, *SMALL.crop, 3), dtype=torch.uint8)
    chosen = find(wrapped, images).taps
    assert [tap.name for tap in chosen] == ["first", "second"]
    with Taps(wrapped, chosen, precision) as taps:
        wanted = taps(images).result()
    with Taps(wrapped, chosen, precision, compiled=True) as taps:
        pending, (code,) = run_and_get_code(taps, images)
        again = taps(images).result()
    assert ("peaks_then_clamp" in code) == joined
    tolerance = 1e-5 if precision == "fp32" else 2**-6
    for found in (pending.result(), again):
        for name in ("max", "min", "mean", "square"):
            exact = getattr(wanted, name)
            slack = tolerance * np.abs(exact).max()
            np.testing.assert_allclose(getattr(found, name), exact, rtol=tolerance, atol=slack, err_msg=name)


def test_weights_that_changed_between_two_scans_count(photos: Path, tmp_path: Path) -> None:
    """They are constants to a compiled network, and in place a module's weights stay the same tensors."""
    chosen = network()
    scan(photos, tmp_path / "a", chosen, compile=True)
    with torch.no_grad():
        for weight in chosen.parameters():
            weight.mul_(1.5)
        chosen.get_buffer("bn1.running_mean").add_(0.5)
    again = scan(photos, tmp_path / "b", chosen, compile=True)
    wanted = scan(photos, tmp_path / "c", copy.deepcopy(chosen))
    for name in again:
        for each, other in zip(again[name].lists.values(), wanted[name].lists.values(), strict=True):
            np.testing.assert_allclose(each.score, other.score, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def compiled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return scan(photos, tmp_path_factory.mktemp("compiled") / "x", compile=True)


@pytest.fixture(scope="module")
def eager(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return scan(photos, tmp_path_factory.mktemp("eager") / "x")


def maps_of(photos: Path, chosen: nn.Module) -> dict[str, np.ndarray]:
    return all_maps(chosen, pixels(sorted(photos.rglob("*.jpg"))), PLACES, BATCH)


def check(store: Store, maps: dict[str, np.ndarray], tolerance: float) -> None:
    """Every image is in every list, with the maximum of its map, and where that is, but for rounding. So the winners
    are the same but for ties nearer than that."""
    assert set(store) == set(maps)
    widths = {tap.name: tap.map[1] for tap in store.manifest.taps}
    for name, exact in maps.items():  # [N, C, P]
        image, score, position = store[name].lists["max", "top"]
        assert np.array_equal(np.sort(image, 1), np.broadcast_to(np.arange(COUNT), image.shape)), name
        assert (np.diff(score, axis=1) <= 0).all(), name
        channel = np.arange(len(image))[:, None]
        place = position[..., 0] * widths[name] + position[..., 1]
        slack = tolerance * np.abs(exact).max()
        np.testing.assert_allclose(score, exact[image, channel].max(2), rtol=0, atol=slack, err_msg=name)
        np.testing.assert_allclose(score, exact[image, channel, place], rtol=0, atol=2 * slack, err_msg=name)


def test_the_peaks_are_those_of_the_network(compiled: Store, photos: Path) -> None:
    maps = maps_of(photos, network())
    check(compiled, maps, 1e-5)
    for name, exact in maps.items():
        stats = compiled[name].stats
        for key, values in describe(exact).items():
            if key == "count":
                assert np.array_equal(stats[key], values)
            elif key != "active":  # a value near zero may be on either side of it
                np.testing.assert_allclose(stats[key], values, rtol=1e-4, atol=1e-5 * np.abs(exact).max(), err_msg=name)
        np.testing.assert_allclose(stats["active"], describe(exact)["active"], atol=5e-3)


def test_as_the_uncompiled_scan(compiled: Store, eager: Store) -> None:
    assert eager.manifest.settings["compile"] is False and compiled.manifest.settings["compile"] is True
    assert eager.manifest.taps == compiled.manifest.taps
    for name in eager:
        mine, theirs = (store[name].lists["max", "top"] for store in (compiled, eager))
        scale = np.abs(theirs[1]).max()
        np.testing.assert_allclose(mine[1], theirs[1], rtol=1e-4, atol=1e-5 * scale)
        same_image = mine[0] == theirs[0]
        assert (mine[2] == theirs[2]).all(2)[same_image].mean() > 0.99
        tied = np.zeros_like(same_image)
        tied[:, 1:] |= -np.diff(theirs[1], axis=1) < 1e-4 * scale
        tied[:, :-1] |= tied[:, 1:]
        assert (same_image | tied).all(), name


def test_networks_of_one_shape_keep_their_own_weights(compiled: Store, photos: Path, tmp_path: Path) -> None:
    """The graph that one network left in the process is not used with that network's weights for the next one."""
    for seed in (1, 2):
        store = scan(photos, tmp_path / str(seed), network(seed), compile=True)
        check(store, maps_of(photos, network(seed)), 1e-5)


def test_the_network_is_left_as_it_was(photos: Path, tmp_path: Path) -> None:
    chosen = network()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = chosen(images.contiguous(memory_format=torch.channels_last))
        attributes = {name: set(vars(module)) for name, module in chosen.named_modules()}
        state = copy.deepcopy(chosen.state_dict())
        scan(photos, tmp_path / "x", chosen, compile=True, limit=4)
        assert {name: set(vars(module)) for name, module in chosen.named_modules()} == attributes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in chosen.modules())
        assert type(chosen) is Network and chosen.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in chosen.state_dict().items())
        assert not any(value.is_inference() for value in chosen.state_dict().values())
        torch.testing.assert_close(chosen(images), before)
    chosen.requires_grad_()
    chosen(images).sum().backward()  # weights that were made in inference mode would not take part


class Stop(Exception):
    pass


def stop_after(images: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.done >= images:
            raise Stop

    return report


def test_the_choice_is_kept(compiled: Store, eager: Store, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        scan(photos, tmp_path / "x", compile=True, report=stop_after(13))
    with pytest.raises(MaxactError, match=r"was made otherwise \(compile: true, not false\)"):
        scan(photos, tmp_path / "x", compile=False)
    scan(photos, tmp_path / "x")
    assert contents(tmp_path / "x") == contents(compiled.path)
    for made in (True, False):
        store = compiled if made else eager
        assert scan(photos, store.path).manifest.settings["compile"] is made
    with pytest.raises(MaxactError, match=r"was made otherwise \(compile: false, not true\)"):
        scan(photos, eager.path, compile=True)


def test_a_start_says_that_it_is_compiled(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "maxact"):
        scan(photos, tmp_path / "x", compile=True, limit=4)
    messages = [record.getMessage() for record in caplog.records if record.name == "maxact"]
    assert [message.split(", ", 3)[3] for message in messages] == ["fp32 on cpu, batches of 4, compiled"]


def test_in_bfloat16(photos: Path, tmp_path: Path) -> None:
    """Rounded at other places than the uncompiled network, to eight bits."""
    maps = maps_of(photos, network())
    for compiles in (False, True):
        store = scan(photos, tmp_path / str(compiles), compile=compiles, precision="bf16")
        check(store, maps, 2**-6)


def test_a_process_can_compile_any_number_of_networks(photos: Path, tmp_path: Path) -> None:
    """torch.compile gives up after so many graphs of one function, by default eight."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for channels in (4, 5, 9):
            store = scan(photos, tmp_path / str(channels), several.First(channels), compile=True, limit=4)
            assert len(store["bn1"].dead) == channels
