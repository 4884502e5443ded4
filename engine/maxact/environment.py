"""Settings of libraries that they read from the environment, once, when they are loaded."""

from __future__ import annotations

import os

BEST = {
    # a thread of the network's that waits must not spin: the decoder's threads can use the core meanwhile
    "OMP_WAIT_POLICY": "PASSIVE",
    # feature maps in huge pages: a tenth faster
    "THP_MEM_ALLOC_ENABLE": "1",
}


def prepare() -> None:
    """Sets what a process that does nothing but a run is best served by, where the user has not; before torch is
    imported."""
    for name, value in BEST.items():
        os.environ.setdefault(name, value)
