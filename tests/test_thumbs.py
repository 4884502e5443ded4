"""The file of model inputs: which images are in it, and what their pictures look like."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import maxact
from maxact import thumbs
from maxact.errors import MaxactError
from maxact.inputs import Inputs
from maxact.thumbs import Thumbs, update, write_thumbs


@pytest.fixture
def inputs(finished: maxact.Store) -> Iterator[Inputs]:
    with finished.inputs(finished.catalog) as opened:
        yield opened


def nothing(done: int, total: int) -> None:
    pass


def picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "WEBP" and opened.mode == "RGB"
        return np.asarray(opened).astype(int)


def test_they_are_the_model_inputs(finished: maxact.Store, inputs: Inputs, tmp_path: Path) -> None:
    path, said = tmp_path / "thumbs.parquet", []
    update(path, [2, 3, 20], inputs, threading.Event(), lambda *count: said.append(count))
    assert said == [(3, 3)]
    found = Thumbs(path)
    assert found.numbers.tolist() == [2, 3, 20]
    for number, pixels in zip((2, 3, 20), finished.pixels([2, 3, 20]).numpy().astype(int), strict=True):
        assert number in found
        mine = picture(found[number])
        assert mine.shape == pixels.shape
        assert np.abs(mine - pixels).mean() < 8 and np.abs(mine.mean((0, 1)) - pixels.mean((0, 1))).max() < 4
    for number in (-1, 0, 4, 21):
        assert number not in found
        with pytest.raises(KeyError):
            found[number]
    table = pq.read_table(path)
    assert {field.name: str(field.type) for field in table.schema} == {"image": "int64", "webp": "binary"}


def test_more_are_added_and_the_old_ones_stay(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "thumbs.parquet"
    write_thumbs(path, iter([(1, b"one"), (5, b"five"), (7, b"seven")]))
    update(path, [0, 5, 6], inputs, threading.Event(), nothing)
    found = Thumbs(path)
    assert found.numbers.tolist() == [0, 1, 5, 6, 7]
    assert [found[number] for number in (1, 5, 7)] == [b"one", b"five", b"seven"]
    before = path.stat().st_mtime_ns, path.read_bytes()
    update(path, [0, 7], inputs, threading.Event(), nothing)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_none(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "thumbs.parquet"
    update(path, [], inputs, threading.Event(), nothing)
    assert Thumbs(path).numbers.tolist() == [] and 0 not in Thumbs(path)


def test_many_are_read_in_groups(tmp_path: Path) -> None:
    path, count = tmp_path / "thumbs.parquet", 2 * thumbs._GROUP + 3
    write_thumbs(path, ((3 * number, str(number).encode()) for number in range(count)))
    assert pq.ParquetFile(path).num_row_groups == 3
    found = Thumbs(path)
    size = thumbs._GROUP
    for number in (0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, count - 1, 4):
        assert found[3 * number] == str(number).encode()
        assert 3 * number + 1 not in found


def test_floats_are_stretched(tmp_path: Path) -> None:
    pixels = torch.linspace(-2, 3, 3 * 16 * 16).view(3, 16, 16)
    assert np.abs(picture(thumbs._webp(pixels)).mean() - 127.5) < 6


def test_messages(tmp_path: Path) -> None:
    path = tmp_path / "thumbs.parquet"
    with pytest.raises(MaxactError, match=r"thumbs\.parquet: is not there; run `maxact project` on the store"):
        Thumbs(path)
    path.write_bytes(b"half")
    with pytest.raises(MaxactError, match=r"thumbs\.parquet is damaged"):
        Thumbs(path)
