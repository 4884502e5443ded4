"""Imported once by the server that test processes are forked from: what takes long, and starts no threads."""

import importlib
import tempfile
from pathlib import Path

import numpy as np
import pandas

import maxact.cli
import maxact.demo
import maxact.export
import maxact.info
import maxact.progress
import maxact.run
import maxact.run_project
import tiny
from maxact.catalog import Shard
from maxact.partial import Partial, Tally
from maxact_kernels.boxes import smallest_boxes
from maxact_kernels.peaks import Peaks, reduce

__all__ = ["maxact", "pandas", "tiny"]

importlib.import_module("nvidia.dali.fn")
peaks = Peaks.empty(2, 3)
for channels_last in (True, False):  # the kernels are loaded from their cache by the first call
    shape = (2, 9, 3) if channels_last else (2, 3, 9)
    reduce(np.zeros(shape, np.float32), channels_last, peaks)
smallest_boxes(np.ones((1, 2, 3), np.float32), 0.95)
partials = []
for index in range(2):
    tally = Tally(Shard(index, 2 * index, 2 * index + 2), 3, {("max", "top"): 2})
    tally.add(peaks, np.arange(2 * index, 2 * index + 2))
    partials.append(tally.close())
with tempfile.TemporaryDirectory() as folder:
    partials[0].merge(partials[1]).save(Path(folder) / "state")
    Partial.load(Path(folder) / "state").total()
