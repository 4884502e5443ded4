"""Networks by name and as objects, their preprocessing and normalisation."""

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import functional

from maxact.checkpoints import hash_state
from maxact.errors import MaxactError, UsageError
from maxact.models import Normalised, load_model
from maxact.preprocess import Preprocess

OWN = """
import torch
from torch import nn
from maxact.preprocess import Preprocess

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())

def knowing():
    network = plain()
    network.preprocess = Preprocess(resize=72, crop=(64, 48), interpolation="bicubic")
    return network

whole = plain()

def wrong():
    return 3

def failing():
    raise ValueError("no\\nluck")

def to_tensor(picture):
    return torch.zeros(3, 8, 8)
"""


def small() -> Any:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder as the current directory, with a module that only it has."""
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return tmp_path


def refusal(model: Any, kind: type[MaxactError] = MaxactError, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        load_model(model, **settings)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# torchvision


@pytest.mark.parametrize(
    ("name", "resize", "crop", "interpolation"),
    [
        ("resnet18", 256, 224, "bilinear"),
        ("vgg11", 256, 224, "bilinear"),
        ("efficientnet_b0", 256, 224, "bicubic"),
        ("inception_v3", 342, 299, "bilinear"),
        ("swin_t", 232, 224, "bicubic"),
        ("deeplabv3_resnet50", 520, 520, "bilinear"),
    ],
)
def test_torchvision_networks_bring_their_preprocessing(name: str, resize: int, crop: int, interpolation: str) -> None:
    model = load_model(name, weights="none")
    assert (model.name, model.weights) == (name, "none (random)")
    assert model.preprocess == Preprocess(resize, (crop, crop), interpolation)  # type: ignore[arg-type]
    assert not any(module.training for module in model.network.modules())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    with torch.inference_mode():
        out = Normalised(model.network, model.preprocess)(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))
    assert len(out) == (2 if name == "inception_v3" else 1) or isinstance(out, torch.Tensor)


def test_detection_normalises_by_itself_and_takes_a_batch() -> None:
    model = load_model("ssdlite320_mobilenet_v3_large", weights="none")
    assert model.preprocess == Preprocess(320, (320, 320), mean=(0, 0, 0), std=(1, 1, 1))
    with torch.inference_mode():
        out = Normalised(model.network, model.preprocess)(torch.zeros(2, 320, 320, 3, dtype=torch.uint8))
    assert len(out) == 2


def test_sizes_built_into_a_network_follow_its_preprocessing() -> None:
    # DEFAULT takes 518 pixels, the bare builder 224. The network is 2.5 GB: its shape alone is looked at.
    from maxact.models import _unloaded

    default = torchvision.models.ViT_H_14_Weights.DEFAULT
    with torch.device("meta"):
        network = _unloaded("vit_h_14", torchvision.models.vit_h_14, default, ())
    assert network.image_size == default.transforms().crop_size[0] == 518


def test_pretrained_inception_transforms_its_input_whatever_the_weights_come_from() -> None:
    assert load_model("inception_v3", weights="none").network.transform_input


def test_random_weights_are_the_same_again_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = load_model("resnet18", weights="none")
    assert torch.equal(torch.rand(3), expected)
    assert load_model("ResNet18", weights="none").sha256 == first.sha256
    assert first.sha256 != load_model("vgg11", weights="none").sha256


def test_names_of_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file in torch hub's cache is used as torchvision uses it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    network = torchvision.models.resnet18()
    default = torchvision.models.ResNet18_Weights.DEFAULT
    file = cache / default.url.rsplit("/", 1)[-1]
    torch.save(network.state_dict(), file)
    for name in (None, "DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        model = load_model("resnet18", weights=name)
        assert model.weights == "ResNet18_Weights.IMAGENET1K_V1"
        assert model.sha256 == hash_state(network)


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # nothing listens at port 9 of this machine: the same failure with and without a network
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    said = refusal("resnet18")
    assert said.startswith("resnet18: cannot load ResNet18_Weights.IMAGENET1K_V1 from https://")
    assert said.endswith("; give --weights FILE, or --weights none for random ones")


def test_unknown_names() -> None:
    assert "'vgg116' (near: vgg16, " in refusal("vgg116", UsageError)
    assert "expected a torchvision name, timm:NAME or" in refusal("qqqq", UsageError)
    assert refusal(3, UsageError) == "model: expected a name or an nn.Module, got int"
    assert refusal("quantized_resnet18", UsageError).endswith("take resnet18")
    assert refusal("r3d_18", UsageError) == "r3d_18 takes video, not images"
    assert refusal("raft_small", UsageError) == "raft_small takes video, not images"
    said = refusal("resnet18", UsageError, weights="ResNet50_Weights.IMAGENET1K_V2")
    assert "has no weights 'ResNet50_Weights.IMAGENET1K_V2': expected IMAGENET1K_V1, DEFAULT, none" in said


# Overrides


def test_overrides_replace_single_fields(own: Path) -> None:
    model = load_model(
        "resnet18",
        weights="none",
        resize=100,
        crop=96,
        mean=[0.5] * 3,
        interpolation="nearest",
        fit="pad",
        preprocess="own_networks:to_tensor",
    )
    assert model.preprocess == Preprocess(
        100, (96, 96), "nearest", (0.5, 0.5, 0.5), fit="pad", function="own_networks:to_tensor"
    )
    assert load_model(small(), crop=(32, 48)).preprocess.crop == (32, 48)
    assert "crop: expected" in refusal(small(), UsageError, crop=-1)
    assert "has no to_tensr (near: to_tensor" in refusal(small(), UsageError, preprocess="own_networks:to_tensr")


# timm


def test_timm() -> None:
    model = load_model("timm:resnet18d", weights="none")
    assert (model.name, model.weights) == ("timm:resnet18d", "none (random)")
    assert model.preprocess == Preprocess(256, (224, 224), "bicubic")
    assert model.sha256 == load_model("timm:resnet18d", weights="none").sha256
    assert load_model(model.network).preprocess == model.preprocess  # given as an object, it still knows


def test_timm_checkpoint(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("test_resnet", pretrained=False)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    model = load_model("timm:test_resnet", weights=tmp_path / "a.safetensors")
    assert model.sha256 == hash_state(network)


def test_timm_names() -> None:
    assert "'timm:resnt18' (near: resnet18" in refusal("timm:resnt18", UsageError, weights="none")
    assert "resnet18.a1_in1k, resnet18.a2_in1k" in refusal("timm:resnet18.nonsense", UsageError, weights="none")
    assert "has no pretrained weights; give" in refusal("timm:beit3_giant_patch14_224", UsageError)
    assert "has no weights 'V1'" in refusal("timm:resnet18", UsageError, weights="V1")


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal("timm:resnet18", UsageError).endswith("needs timm: pip install 'maxact[timm]'")


def test_timm_weights_that_cannot_be_fetched(tmp_path: Path) -> None:
    # in a process of its own: huggingface_hub reads these when it is imported, and else retries for a minute
    run = subprocess.run(
        [sys.executable, "-c", "from maxact.models import load_model; load_model('timm:test_resnet')"],
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = run.stderr.strip().splitlines()[-1]
    assert "MaxactError: timm:test_resnet: cannot load its pretrained weights (" in said
    assert said.endswith("; give --weights FILE, or --weights none for random ones")


@pytest.mark.parametrize(("mode", "fit"), [("center", "crop"), ("squash", "squash"), ("border", "pad")])
def test_timm_crop_modes(mode: str, fit: str) -> None:
    network = small()
    network.pretrained_cfg = {
        "input_size": (3, 96, 96),
        "crop_pct": 0.9,
        "crop_mode": mode,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
    }
    import timm  # noqa: F401  (a timm network means that timm is there)

    expected = Preprocess(106, (96, 96), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), fit)  # type: ignore[arg-type]
    assert load_model(network).preprocess == expected


# Networks of the user's own


def test_callables_in_the_current_directory(own: Path) -> None:
    model = load_model("own_networks:plain")
    assert (model.name, model.weights) == ("own_networks:plain", "as own_networks:plain returns them")
    assert model.preprocess == Preprocess()
    assert not model.network.training and not any(p.requires_grad for p in model.network.parameters())
    assert model.sha256 == load_model("own_networks:plain", weights="none").sha256  # random, and yet the same
    assert load_model("own_networks:knowing").preprocess == Preprocess(72, (64, 48), "bicubic")
    assert load_model("own_networks:knowing", resize=80).preprocess == Preprocess(80, (64, 48), "bicubic")
    assert isinstance(load_model("own_networks:whole").network, nn.Sequential)
    assert sys.path[-1] == str(own)  # last: its json.py shadows nothing


def test_callables_that_fail(own: Path) -> None:
    assert refusal("own_networks:wrong", UsageError).endswith("expected it to return an nn.Module, got int")
    said = refusal("own_networks:failing")
    assert said.startswith("own_networks:failing: ValueError: no (") and "own_networks.py, line" in said
    assert "own_networks has no plane (near: plain" in refusal("own_networks:plane", UsageError)
    assert "cannot import elsewhere" in refusal("elsewhere:plain", UsageError)
    assert "expected package.module:callable" in refusal("own_networks:", UsageError)
    assert "has no weights 'DEFAULT'" in refusal("own_networks:plain", UsageError, weights="DEFAULT")


def test_objects_are_taken_as_they_are() -> None:
    network = small()
    model = load_model(network)
    assert model.network is network
    assert (model.name, model.weights) == ("Sequential", "as given")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    knowing = small()
    knowing.preprocess = Preprocess(resize=40, crop=(32, 32))
    assert load_model(knowing).preprocess == Preprocess(resize=40, crop=(32, 32))


# Normalisation


@pytest.mark.parametrize("preprocess", [Preprocess(), Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)])
def test_normalisation_is_torchvisions_for_every_level(preprocess: Preprocess) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    seen = Normalised(nn.Identity(), preprocess)(levels)
    expected = functional.normalize(levels.permute(0, 3, 1, 2) / 255, list(preprocess.mean), list(preprocess.std))
    assert seen.shape == (2, 3, 16, 16) and seen.dtype == torch.float32
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert (seen - expected).abs().max() < 1e-6


def test_float_tensors_pass_untouched() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert Normalised(nn.Identity(), Preprocess())(images) is images


def test_the_wrapper_keeps_the_network_and_adds_nothing_to_its_state() -> None:
    network = small().eval()
    wrapper = Normalised(network, Preprocess())
    assert wrapper.network is network and not wrapper.training
    assert set(wrapper.state_dict()) == {f"network.{key}" for key in network.state_dict()}


def test_the_wrapper_is_traced_as_one_graph() -> None:
    wrapper = Normalised(nn.Conv2d(3, 4, 3), Preprocess())
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    compiled = torch.compile(wrapper, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), wrapper(images))
