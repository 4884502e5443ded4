"""Weights from files: every layout, every refusal, and the hash."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from maxact.checkpoints import hash_state
from maxact.errors import MaxactError
from maxact.models import load_model

NESTED = ("state_dict", "model", "model_state_dict")


def small() -> Any:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


def refusal(network: Any, weights: Path) -> str:
    with pytest.raises(MaxactError) as caught:
        load_model(network, weights=weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["plain", "state_dict", "model", "model_state_dict", "module.", "_orig_mod."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_checkpoints(tmp_path: Path, layout: str, suffix: str) -> None:
    torch.manual_seed(1)
    source = small()
    state = dict(source.state_dict())
    if layout.endswith("."):
        state = {layout + key: value for key, value in state.items()}
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({layout: state, "epoch": 3} if layout in NESTED else state, file)
    model = load_model(small(), weights=file)
    assert model.weights == f"file {file}"
    assert model.sha256 == hash_state(source)
    assert torch.equal(model.network.state_dict()["conv.weight"], source.conv.weight)


def test_a_torchvision_network_from_a_file(tmp_path: Path) -> None:
    network = torchvision.models.resnet50()
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    model = load_model("resnet50", weights=str(tmp_path / "mine.pth"))
    assert model.sha256 == hash_state(network)
    assert model.preprocess.resize == 232  # DEFAULT is V2
    # an official file's name says which preprocessing is its own
    (tmp_path / "mine.pth").rename(tmp_path / "resnet50-0676ba61.pth")
    assert load_model("resnet50", weights=str(tmp_path / "resnet50-0676ba61.pth")).preprocess.resize == 256


def test_old_names_inside_official_files(tmp_path: Path) -> None:
    network = torchvision.models.densenet121()
    old = {}
    for key, value in network.state_dict().items():
        if "num_batches_tracked" not in key:  # older than these
            for kind in ("norm1", "norm2", "conv1", "conv2"):
                if "denselayer" in key:
                    key = key.replace(f".{kind}.", f".{kind[:-1]}.{kind[-1]}.")
            old[key] = value
    torch.save(old, tmp_path / "densenet121.pth")
    assert load_model("densenet121", weights=tmp_path / "densenet121.pth").sha256 == hash_state(network)
    # versions of modules' formats are not in safetensors files
    network = torchvision.models.mnasnet0_5()
    save_file(network.state_dict(), tmp_path / "mnasnet.safetensors")
    assert load_model("mnasnet0_5", weights=tmp_path / "mnasnet.safetensors").sha256 == hash_state(network)


def test_auxiliary_heads_come_with_the_file(tmp_path: Path) -> None:
    for aux in (True, False):
        network = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, aux_loss=aux
        )
        torch.save(network.state_dict(), tmp_path / "a.pth")
        model = load_model("deeplabv3_mobilenet_v3_large", weights=tmp_path / "a.pth")
        assert model.sha256 == hash_state(network)


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    del state["conv.bias"]
    state["extra"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(7, 4)
    torch.save(state, tmp_path / "a.pth")
    assert refusal(small(), weights=tmp_path / "a.pth") == (
        f"file {tmp_path / 'a.pth'} does not fit Sequential: 1 missing: conv.bias; 1 unexpected: extra; "
        "1 misshaped: fc.weight is [7, 4] in the file and [2, 4] in the network"
    )
    said = refusal("vgg11", weights=tmp_path / "a.pth")
    assert "22 missing: features.0.weight, features.0.bias, features.3.weight, features.3.bias, …; " in said


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("whole", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, whole: bool) -> None:
    file, trace = tmp_path / "a.pth", tmp_path / "ran"
    if whole:
        file.write_bytes(pickle.dumps(Evil(trace)))
    else:
        torch.save({"state_dict": small().state_dict(), "evil": Evil(trace)}, file)
    said = refusal(small(), weights=file)
    assert said.startswith(f"weights {file}: refused (") and "save the network's state_dict() alone" in said
    assert not trace.exists()


def test_a_whole_pickled_network_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    assert "refused (it holds torch.nn.modules.linear.Linear, and only" in refusal(small(), weights=tmp_path / "a.pth")


def test_a_tampered_file_in_torch_hubs_cache_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(Evil(tmp_path / "ran"), cache / "resnet18-f37072fd.pth")
    with pytest.raises(MaxactError, match=r"cannot load ResNet18_Weights.IMAGENET1K_V1 from https://"):
        load_model("resnet18")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world" * 100, b"PK\x03\x04 no archive" * 20, None])
def test_files_that_cannot_be_read(tmp_path: Path, suffix: str, content: bytes | None) -> None:
    file = tmp_path / f"a{suffix}"
    if content is not None:
        file.write_bytes(content)
    said = refusal(small(), weights=file)
    assert said.startswith(f"weights {file}: ")
    assert content is not None or "No such file" in said


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "cannot be read (Is a directory)" in refusal(small(), weights=tmp_path)


@pytest.mark.parametrize("content", [{}, [torch.zeros(1)], {"epoch": 3}, {1: torch.zeros(1)}, torch.zeros(3)])
def test_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert "no state dict in it; expected tensors by name" in refusal(small(), weights=tmp_path / "a.pth")


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        file = tmp_path / name
        if name.endswith("pth"):
            torch.save(small().state_dict(), file)
        else:
            save_file(small().state_dict(), file)
        file.write_bytes(file.read_bytes()[:-50])
        assert "broken, or neither .pth nor .safetensors (" in refusal(small(), weights=file)


# The hash


def test_the_hash_is_of_names_kinds_shapes_and_values() -> None:
    network = small()
    digest = hash_state(network)
    assert hash_state(network.to(memory_format=torch.channels_last)) == digest
    with torch.no_grad():
        network.conv.weight[0, 0, 0, 0] += 1
    assert hash_state(network) != digest
    digest = hash_state(network)
    assert hash_state(network.bfloat16()) != digest
    one, other = nn.Module(), nn.Module()
    one.register_buffer("a", torch.zeros(2, 3))
    other.register_buffer("a", torch.zeros(3, 2))
    assert hash_state(one) != hash_state(other)
    one.register_buffer("b", torch.zeros(0))
    one.register_buffer("c", torch.tensor(True))
    assert len(hash_state(one)) == 64
