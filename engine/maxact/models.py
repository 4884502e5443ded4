"""Names -> network, weights and preprocessing. The wrapper normalises, so that it happens on the device."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maxact.checkpoints import as_file, hash_state, load_state, read_state
from maxact.errors import MaxactError, UsageError
from maxact.preprocess import Fit, Preprocess, import_callable, near, one_line

HOW_TO_GO_ON = "give --weights FILE, or --weights none for random ones"


@dataclass(frozen=True)
class Model:
    """A network that is ready to be scanned, and where it came from."""

    name: str
    network: nn.Module
    """In evaluation mode, without gradients; takes normalised float [N, 3, H, W]: see Normalised."""
    preprocess: Preprocess
    weights: str
    """In words: "ResNet18_Weights.IMAGENET1K_V1", "file checkpoint.pth", "none (random)"."""
    sha256: str
    """Of every parameter and persistent buffer: see `hash_state`."""


class Normalised(nn.Module):
    """A network that takes the loader's pixels: uint8 [N, H, W, 3] -> (x / 255 - mean) / std -> network.

    The network gets float32 [N, 3, H, W] whose memory is channels_last. A float tensor passes to it as it is
    (the work of a preprocessing function). The network itself, with its module paths, is `.network`.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network = network
        # One multiplication and one addition a pixel; worked out in double precision.
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)
        self.train(network.training)

    def forward(self, images: torch.Tensor) -> Any:
        return self.network(self.normalise(images))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """What the network gets of uint8 images [N, H, W, 3]; float ones as they are."""
        if images.dtype == torch.uint8:
            # rows of W * 3 values instead of an innermost axis of 3, which no CPU vectorises: ten times faster
            n, height, width, _ = images.shape
            rows = images.reshape(n, height, width * 3).to(torch.float32)
            torch.addcmul(self.shift.repeat(width), rows, self.scale.repeat(width), out=rows)
            images = rows.view(n, height, width, 3).permute(0, 3, 1, 2)  # [N, 3, H, W], channels_last
        return images


def load_model(
    model: str | nn.Module,
    *,
    weights: str | os.PathLike[str] | None = None,
    resize: int | None = None,
    crop: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    fit: str | None = None,
    preprocess: str | None = None,
) -> Model:
    """Load a network with its weights and preprocessing.

    model: a torchvision name (`vgg16`), `timm:NAME`, `package.module:callable` that returns an nn.Module, or
        an nn.Module. No copy is made of a module of the user's: it is put into evaluation mode, its
        parameters stop requiring gradients, and `weights`, where given, are loaded into it.
    weights: None for torchvision's DEFAULT, timm's pretrained weights, or the module as it comes; a
        torchvision weights name; a .safetensors or .pth file (only tensors are loaded: no code in it runs);
        or "none", random ones, the same every time.
    The others replace single fields of the network's own preprocessing (see Preprocess). That is the one of
    its weights; with a file or "none" that of the network's DEFAULT weights, or of those whose official file
    name the file bears; the module's attribute `preprocess` where that is a Preprocess; else ImageNet's.
    `preprocess` names a function in its place (package.module:callable, picture -> float tensor [3, H, W]).

    Raises UsageError for names and settings that cannot be meant, MaxactError for weights that cannot be
    fetched, read or fitted.
    """
    if not isinstance(model, (str, nn.Module)):
        raise UsageError(f"model: expected a name or an nn.Module, got {type(model).__name__}")
    words = None if weights is None else os.fspath(weights)
    file = as_file(words)
    state = read_state(file) if file is not None else None
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
        if isinstance(model, nn.Module):
            name = type(model).__name__
            network, own, loaded = _given(name, model, words, state, "as given")
        elif model.startswith("timm:"):
            name = model
            network, own, loaded = _timm(model.removeprefix("timm:"), words, state)
        elif ":" in model:
            name = model
            network, own, loaded = _given(name, _call(model), words, state, f"as {model} returns them")
        else:
            name = model.lower()
            network, own, loaded = _torchvision(name, words, state, file)
    if preprocess is not None:
        import_callable(preprocess)  # a mistake shows now, not in the loader
    overrides = {
        "resize": resize,
        "crop": (crop, crop) if isinstance(crop, int) else crop,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "fit": fit,
        "function": preprocess,
    }
    given: dict[str, Any] = {field: value for field, value in overrides.items() if value is not None}
    network.eval().requires_grad_(False)
    return Model(name, network, dataclasses.replace(own, **given), loaded, hash_state(network))


# Where networks come from: each gives the network, its own preprocessing, and its weights in words.


def _torchvision(
    name: str, weights: str | None, state: dict[str, Any] | None, file: Path | None
) -> tuple[nn.Module, Preprocess, str]:
    from torchvision import models

    try:
        builder = models.get_model_builder(name)
    except ValueError:
        known = models.list_models()
        raise UsageError(
            f"unknown network {name!r}{near(name, known)}: expected a torchvision name, timm:NAME or "
            "package.module:callable"
        ) from None
    if name.startswith("quantized_"):
        raise UsageError(f"{name} computes in integers: take {name.removeprefix('quantized_')}")
    if builder.__module__.startswith(("torchvision.models.video", "torchvision.models.optical_flow")):
        raise UsageError(f"{name} takes video, not images")
    known_weights = models.get_model_weights(name)
    member = known_weights.DEFAULT
    if state is not None:
        # An official file (its name holds its hash) brings its own sizes: V1 and V2 differ in them.
        assert file is not None
        member = next((w for w in known_weights if w.url.rsplit("/", 1)[-1] == file.name), member)
    elif weights is not None and weights != "none":
        short = weights.removeprefix(f"{known_weights.__name__}.")
        if short not in known_weights.__members__:
            raise UsageError(
                f"{name} has no weights {weights!r}: expected {', '.join(known_weights.__members__)}, none, "
                "or a .safetensors or .pth file"
            )
        member = known_weights[short]

    if state is not None:
        network = _unloaded(name, builder, member, state)
        if name.startswith("densenet"):  # the official files predate today's module names
            pattern = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
            state = {pattern.sub(r"\1\2", key): value for key, value in state.items()}
        load_state(network, state, name, f"file {weights}")
        loaded = f"file {weights}"
    elif weights == "none":
        network, loaded = _unloaded(name, builder, member, ()), "none (random)"
    else:
        try:
            # Fetched into torch hub's cache and first read here, tensors only: torchvision's own call would
            # run what a tampered file tells it to.
            member.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True)
            network, loaded = builder(weights=member, progress=False), repr(member)
        except Exception as error:  # the network, the disk, a broken file in the cache
            raise MaxactError(
                f"{name}: cannot load {member!r} from {member.url} ({one_line(error)}); {HOW_TO_GO_ON}"
            ) from error
    return network, _torchvision_preprocess(member.transforms(), network), loaded


def _unloaded(name: str, builder: Callable[..., nn.Module], member: Any, keys: Iterable[str]) -> nn.Module:
    """The network as torchvision builds it for its pretrained weights, but random; `keys` will be loaded."""
    parameters = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None  # else it is fetched
    if "aux_loss" in parameters:
        options["aux_loss"] = any(key.startswith("aux_classifier.") for key in keys)
    if name in ("googlenet", "inception_v3"):
        # Pretrained, these turn ImageNet's normalisation into their own; a file's results need it too.
        options["transform_input"] = True
        options["aux_logits"] = any(key.startswith(("aux1.", "AuxLogits.")) for key in keys)
        options["init_weights"] = not keys
    if name.startswith("vit_"):
        options["image_size"] = member.meta["min_size"][0]
    _seed()
    return builder(**options)


def _torchvision_preprocess(preset: Any, network: nn.Module) -> Preprocess:
    """Classification presets know all, segmentation's no crop, detection's nothing: it is in the network."""
    if not hasattr(preset, "mean"):
        size = int(network.transform.min_size[-1])  # type: ignore[union-attr,index]
        return Preprocess(size, (size, size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    resize = preset.resize_size[0]
    side = preset.crop_size[0] if hasattr(preset, "crop_size") else resize
    return Preprocess(resize, (side, side), preset.interpolation.value, tuple(preset.mean), tuple(preset.std))


def _timm(name: str, weights: str | None, state: dict[str, Any] | None) -> tuple[nn.Module, Preprocess, str]:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UsageError(f"timm:{name} needs timm: pip install 'maxact[timm]'") from None
    if state is None and weights not in (None, "DEFAULT", "none"):
        raise UsageError(
            f"timm:{name} has no weights {weights!r}: expected DEFAULT, none, or a .safetensors or .pth file "
            "(timm names weights in the network's name: timm:resnet18.a1_in1k)"
        )
    bare = name.split(".", 1)[0]
    if ":" not in name:  # hf-hub:… and local-dir:… are looked up by timm itself
        if not timm.is_model(bare):
            raise UsageError(f"unknown network 'timm:{name}'{near(bare, timm.list_models())}")
        tagged = timm.list_pretrained(f"{bare}.*")
        if name != bare and name not in tagged:
            raise UsageError(f"unknown network 'timm:{name}': expected {', '.join([bare, *tagged])}")
        if weights in (None, "DEFAULT") and not timm.models.is_model_pretrained(bare):
            raise UsageError(f"timm:{name} has no pretrained weights; {HOW_TO_GO_ON}")
    pretrained = state is None and weights != "none"
    try:
        _seed()
        network = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # huggingface_hub's and timm's errors have no common base
        what = "cannot load its pretrained weights" if pretrained else "cannot be built"
        raise MaxactError(f"timm:{name}: {what} ({one_line(error)}); {HOW_TO_GO_ON}") from error
    loaded = "none (random)"
    if state is not None:
        load_state(network, state, f"timm:{name}", f"file {weights}")
        loaded = f"file {weights}"
    elif pretrained:
        config: Any = network.pretrained_cfg
        loaded = f"timm {config['architecture']}" + (f".{config['tag']}" if config.get("tag") else "")
    return network, _timm_preprocess(network), loaded


def _timm_preprocess(network: nn.Module) -> Preprocess:
    from timm.data.config import resolve_model_data_config

    config: Mapping[str, Any] = resolve_model_data_config(model=network)  # type: ignore[no-untyped-call]
    channels, height, width = config["input_size"]
    if channels != 3:
        raise UsageError(f"expected a network that takes 3 colours, got one that takes {channels} channels")
    fits: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}
    return Preprocess(
        resize=int(max(height, width) / config["crop_pct"]),
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit=fits[config["crop_mode"]],
    )


def _call(name: str) -> nn.Module:
    """The nn.Module that package.module:callable names or returns."""
    _seed()
    found = import_callable(name)
    if not isinstance(found, nn.Module):
        try:
            _seed()  # again: a first import may have drawn numbers
            found = found()
        except MaxactError:
            raise
        except Exception as error:  # the user's code can raise anything; say where it did
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise MaxactError(f"{name}: {one_line(error)} ({last.filename}, line {last.lineno})") from error
    if not isinstance(found, nn.Module):
        raise UsageError(f"{name}: expected it to return an nn.Module, got {type(found).__name__}")
    return found


def _given(
    name: str, network: nn.Module, weights: str | None, state: dict[str, Any] | None, words: str
) -> tuple[nn.Module, Preprocess, str]:
    """A module of the user's own."""
    if state is not None:
        load_state(network, state, name, f"file {weights}")
        words = f"file {weights}"
    elif weights == "none":
        words = f"none ({words})"
    elif weights is not None:
        raise UsageError(
            f"{name} has no weights {weights!r}: expected a .safetensors or .pth file, or nothing for its own"
        )
    own = getattr(network, "preprocess", None)
    if isinstance(own, Preprocess):
        return network, own, words
    if "timm" in sys.modules and isinstance(getattr(network, "pretrained_cfg", None), dict):
        return network, _timm_preprocess(network), words
    return network, Preprocess(), words


def _seed() -> None:
    """Called right before a network is built: its random weights must be the same when a run is resumed."""
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which seeds the devices too
