"""Where a result came from, in words that a store keeps: its images, and the versions of what made it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from itertools import chain
from numbers import Number
from typing import Any

import numpy as np
import torch

from maxact import sources
from maxact.catalog import PATH, is_dataset
from maxact.urls import is_remote

_PATHS = 20  # paths of images that a store lists
_VERSIONED = ("maxact", "torch", "torchvision", "nvidia-dali-cuda130", "numpy", "numba", "zarr", "pillow")


def describe_source(images: object) -> Any:
    """What a store says of where its images came from: absolute paths, a hash of many, or the kind of Dataset."""
    if is_dataset(images):
        return _describe_dataset(images)
    if isinstance(images, list | tuple):
        paths = [describe_source(image) for image in images]
        return paths if len(paths) <= _PATHS else f"{len(paths)} paths, sha256 {_digest(paths)}"
    path = os.fsdecode(images)  # type: ignore[arg-type]
    path = path if is_remote(path) else os.path.abspath(path)
    return path.encode("utf-8", "backslashreplace").decode()


def _describe_dataset(dataset: object) -> str:
    """The kind and length of a Dataset, and a hash of what it says of its items without fetching any."""
    labels = [label for _, label, *_ in sources.items(dataset)]
    words = f"{type(dataset).__module__}.{type(dataset).__qualname__} of {len(labels)}"
    samples = getattr(dataset, "samples", getattr(dataset, "imgs", ()))
    if not isinstance(samples, list | tuple | np.ndarray):
        samples = ()
    if not any(labels) and not len(samples):
        return words
    # the hash first: messages show the beginning
    return f"sha256 {_digest(chain(labels, map(_plain, samples)))}: {words}"


def _plain(value: object) -> str:
    """What is the same in every process of a sample, as a path and a number: an object may show its address."""
    if isinstance(value, list | tuple):
        return repr([_plain(part) for part in value])
    if isinstance(value, PATH):
        return os.fsdecode(value)
    return str(value) if isinstance(value, Number) else type(value).__name__


def _digest(words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = platform.machine()
    if device.type == "cuda":  # of another machine of a cluster, perhaps
        name = torch.cuda.get_device_name(device) if (device.index or 0) < torch.cuda.device_count() else "elsewhere"
    return found | {"device": f"{device} ({name})"}
