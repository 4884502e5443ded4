"""maxact: for every channel of every layer of a convolutional network, the images that activate it most.

    import maxact

    store = maxact.scan("resnet18", "photographs/", "resnet18.zarr", top=50)
    store["layer4.1.bn2"].top(171).to_pandas()

Everything public is imported from here; it is loaded when it is first used, so that the command line answers at
once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from maxact.errors import MaxactError, UsageError

if TYPE_CHECKING:
    from maxact.bench import bench
    from maxact.catalog import Catalog
    from maxact.export import export, export_pooled
    from maxact.fields import fields
    from maxact.pack import pack
    from maxact.pooled import Pooled
    from maxact.process import Interrupted, Progress
    from maxact.results import TapResults
    from maxact.run import scan, scan_together
    from maxact.run_project import project
    from maxact.store import Store
    from maxact.store import Store as open
    from maxact.winners import Winners

__all__ = [
    "Catalog",
    "Interrupted",
    "MaxactError",
    "Pooled",
    "Progress",
    "Store",
    "TapResults",
    "UsageError",
    "Winners",
    "bench",
    "export",
    "export_pooled",
    "fields",
    "open",
    "pack",
    "project",
    "scan",
    "scan_together",
]

_HOMES = {
    "Catalog": "catalog",
    "Interrupted": "process",
    "Pooled": "pooled",
    "Progress": "process",
    "Store": "store",
    "TapResults": "results",
    "Winners": "winners",
    "bench": "bench",
    "export": "export",
    "export_pooled": "export",
    "fields": "fields",
    "pack": "pack",
    "project": "run_project",
    "scan": "run",
    "scan_together": "run",
}


def __getattr__(name: str) -> Any:
    if name == "open":  # `maxact.open(path)` reads best, and is all that opening is
        return __getattr__("Store")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # importing the file scan.py would bind `maxact.scan` to that module, and hide the function
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
