"""Files of weights -> state dict -> network, and the hash that a store records. No file's code ever runs."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maxact.errors import MaxactError
from maxact.preprocess import one_line

FILE_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar"}


def as_file(weights: str | None) -> Path | None:
    """The path, where `weights` (a name, a file or "none") means a file."""
    if weights is None or weights == "none":
        return None
    path = Path(weights)
    return path if path.suffix in FILE_SUFFIXES or os.sep in weights or path.is_file() else None


def read_state(path: Path) -> dict[str, Any]:
    """The state dict in a .pth or .safetensors file. Only tensors and plain containers are made from it.

    Raises MaxactError where it cannot be read, would run code, or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            archive = _check_archive(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch remarks on a pickle's protocol helps nobody
                # mapped, so that nothing lies beyond what the file really holds
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except MaxactError:
        raise
    except OSError as error:
        raise MaxactError(f"weights {path}: cannot be read ({error.strerror or one_line(error)})") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}, and only tensors are loaded" if found else "not a file of tensors"
        raise MaxactError(
            f"weights {path}: refused ({what}); save the network's state_dict() alone, best as .safetensors"
        ) from error
    except Exception as error:  # torch and safetensors raise nearly anything for broken files
        raise MaxactError(f"weights {path}: broken, or neither .pth nor .safetensors ({one_line(error)})") from error

    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    good = isinstance(loaded, Mapping) and all(isinstance(key, str) for key in loaded)
    if not good or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise MaxactError(
            f"weights {path}: no state dict in it; expected tensors by name, plain or under state_dict, "
            "model_state_dict or model"
        )
    state = OrderedDict(loaded)
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and not _is_plain(value):
            raise MaxactError(f"weights {path}: {key} is no plain tensor of numbers on a CPU; save it as one")
    metadata = getattr(loaded, "_metadata", None)
    if isinstance(metadata, Mapping) and all(isinstance(value, Mapping) for value in metadata.values()):
        state._metadata = metadata  # type: ignore[attr-defined]  # modules read their old formats by the version in it
    for prefix in ("module.", "_orig_mod."):  # DataParallel's and torch.compile's
        if all(key.startswith(prefix) for key in state):
            nn.modules.utils.consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _check_archive(path: Path) -> bool:
    """Whether a file is a zip archive, as torch writes them: nothing in it compressed, which could be a bomb, and all
    of it somewhere in the file. Raises MaxactError for another one."""
    with open(path, "rb") as file:
        archived = file.read(4) == b"PK\x03\x04"
        if path.stat().st_size:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                if content.find(b"\nbytearray\n") >= 0:
                    raise MaxactError(f"weights {path}: refused (it makes bytes of any number, as no state dict does)")
    if not archived:
        return False
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise MaxactError(f"weights {path}: refused (its parts are compressed, as torch.save leaves none)")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise MaxactError(f"weights {path}: broken (its parts are larger than the file)")
    return True


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor can be compared and copied as every other one."""
    kind = type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_nested
    return kind and value.device.type == "cpu" and not value.is_quantized and not value.is_complex()


def load_state(network: nn.Module, state: dict[str, Any], name: str, source: str) -> None:
    """Load all of `state` into all of the network, in place.

    Raises MaxactError that names what is missing, unexpected or misshaped; parts may be loaded by then.
    """
    shapes = {key: value.shape for key, value in network.state_dict().items() if isinstance(value, torch.Tensor)}
    misshaped = [
        key
        for key, value in state.items()
        if key in shapes and (not isinstance(value, torch.Tensor) or value.shape != shapes[key])
    ]
    fitting = OrderedDict((key, value) for key, value in state.items() if key not in misshaped)
    version = getattr(network, "_version", None)  # safetensors files hold none, and MNASNet refuses to guess
    fitting._metadata = getattr(state, "_metadata", {"": {"version": version}})  # type: ignore[attr-defined]
    try:
        # Not strict: modules bring old names up to date themselves; only then is it known what is missing.
        missing, unexpected = network.load_state_dict(fitting, strict=False)
    except Exception as error:  # also whatever the modules' own ways to load may raise
        raise MaxactError(f"{source} does not fit {name} ({one_line(error)})") from error
    detail = [
        f"{key} is {_shape(state[key])} in the file and {_shape(shapes[key])} in the network" for key in misshaped
    ]
    wrong = (
        ("missing", [key for key in missing if key not in misshaped]),
        ("unexpected", list(unexpected)),
        ("misshaped", detail),
    )
    said = [f"{len(keys)} {word}: {', '.join(keys[:4])}{', …' * (len(keys) > 4)}" for word, keys in wrong if keys]
    if said:
        raise MaxactError(f"{source} does not fit {name}: {'; '.join(said)}")


def _shape(value: object) -> str:
    shape = value.shape if isinstance(value, torch.Tensor) else value
    return str(list(shape)) if isinstance(shape, torch.Size) else type(value).__name__


def hash_state(network: nn.Module) -> str:
    """The sha256 (hex) of the state dict's tensors, sorted by name: name, dtype, shape and bytes of each.

    The same whatever device, memory format or kind of file they came from. Extra state that is no tensor is
    left out.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            # contiguous() copies only what is not row-major already, one tensor at a time
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
