"""Files of weights that mean harm: nothing in them runs, takes memory, or is read beyond them."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from hostile import ODD, damaged, frugal, fuzz, refusal, values
from maxact.models import load_model


def small() -> Any:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


def saved(state: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


STATE = small().state_dict()
WHOLE = {
    "zip.pth": saved(STATE),
    "old.pth": saved(STATE, _use_new_zipfile_serialization=False),
    "x.safetensors": save(dict(STATE)),
}


def refused(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with frugal(200):
        said = refusal(lambda: load_model(small(), weights=path))
    assert said is not None
    return said


@fuzz(40)
@given(st.sampled_from(sorted(WHOLE)).flatmap(lambda name: st.tuples(st.just(name), damaged(WHOLE[name], 900))))
def test_damaged_files(tmp_path: Path, given: tuple[str, bytes]) -> None:
    name, data = given
    (tmp_path / name).write_bytes(data)
    with frugal(200):
        refusal(lambda: load_model(small(), weights=tmp_path / name))


class Evil:
    """Pickled, it is a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_out_of_nothing(tmp_path: Path, zipped: bool) -> None:
    """torch lets `bytearray(10 ** 10)` through, which takes ten gigabytes."""
    data = saved(STATE | {"x": Evil(bytearray, 10**10)}, _use_new_zipfile_serialization=zipped, pickle_protocol=2)
    assert "it makes bytes of any number" in refused(tmp_path / "a.pth", data)


def zipped(parts: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def parts() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(WHOLE["zip.pth"])) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_zip_bomb(tmp_path: Path) -> None:
    bomb = zipped(parts() | {"archive/data/0": bytes(1 << 27)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    assert "refused (its parts are compressed, as torch.save leaves none)" in refused(tmp_path / "a.pth", bomb)


def test_parts_that_overlap(tmp_path: Path) -> None:
    """A zip archive may name the same bytes any number of times."""
    data = bytearray(zipped({"a/data.pkl": parts()["archive/data.pkl"], "a/data/0": bytes(1000)}))
    end = data.rindex(b"PK\5\6")
    place = data.rindex(b"PK\1\2")
    entries = bytes(data[place:end]) * 50
    tail = bytearray(data[end:])
    start = int.from_bytes(tail[16:20], "little")
    tail[8:12] = struct.pack("<HH", 51, 51)
    tail[12:16] = struct.pack("<I", place - start + len(entries))
    said = refused(tmp_path / "a.pth", bytes(data[:place]) + entries + bytes(tail))
    assert "broken (its parts are larger than the file)" in said


def test_a_part_that_is_shorter_than_a_tensor(tmp_path: Path) -> None:
    """What lies behind it in memory is not the file's."""
    file = tmp_path / "a.pth"
    for size in (0, 4, 60):
        broken = {name: data[:size] if name.endswith("data/0") else data for name, data in parts().items()}
        pickled = broken["archive/data.pkl"]
        broken["archive/data.pkl"] = pickled.replace(b"Kl", b"J" + struct.pack("<i", 1 << 30))
        assert pickled != broken["archive/data.pkl"]
        file.write_bytes(zipped(broken))
        with frugal(200):
            refusal(lambda: load_model(small(), weights=file))  # or weights that are bytes of this file


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "complex": lambda plain: plain.to(torch.complex64),
    "sparse": lambda plain: plain.to_sparse(),
    "quantised": lambda plain: torch.quantize_per_tensor(plain, 1.0, 0, torch.qint8),
    "meta": lambda plain: plain.to("meta"),
    "nested": lambda plain: torch.nested.nested_tensor([plain, plain[:2]]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds(tmp_path: Path, kind: str) -> None:
    tensor = KINDS[kind](torch.zeros(4, 3, 3, 3))
    said = refused(tmp_path / "a.pth", saved(STATE | {"conv.weight": tensor}))
    assert "conv.weight is no plain tensor of numbers" in said or "refused (" in said


def test_a_tensor_of_any_shape_takes_no_memory(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(1 << 40)  # one number, a trillion times
    said = refused(tmp_path / "a.pth", saved(STATE | {"conv.weight": huge}))
    assert "conv.weight is [1099511627776] in the file and [4, 3, 3, 3] in the network" in said


@fuzz(8)
@given(st.sampled_from(["conv.weight", "fc.bias", "more"]), values | st.sampled_from(ODD))
def test_values_of_any_kind(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "a.pth").write_bytes(saved(STATE | {key: value}))
    refusal(lambda: load_model(small(), weights=tmp_path / "a.pth"))


@pytest.mark.parametrize("metadata", [5, {"": 3}, {"": {"version": "x"}}, {"norm": {"version": None}}, [1]])
def test_what_a_state_dict_says_of_its_formats(tmp_path: Path, metadata: Any) -> None:
    state = OrderedDict(STATE)
    state._metadata = metadata  # type: ignore[attr-defined]
    (tmp_path / "a.pth").write_bytes(saved(state))
    refusal(lambda: load_model(small(), weights=tmp_path / "a.pth"))


@pytest.mark.parametrize("odd", ODD)
def test_names_of_any_kind(tmp_path: Path, odd: str) -> None:
    torch_file, tensors = tmp_path / "a.pth", tmp_path / "a.safetensors"
    said = refused(torch_file, saved(STATE | {odd: torch.zeros(1)}))
    assert "1 unexpected: " in said
    if "\udcff" not in odd:
        assert "1 unexpected: " in refused(tensors, save(STATE | {odd: torch.zeros(1)}))


def tensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        tensors({}, length=1 << 62),
        tensors({}, length=(1 << 64) - 1),
        tensors(b"[" * 100_000),
        tensors({"conv.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 64]}}),
        tensors({"conv.weight": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 64]}}),
        tensors({"conv.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 1 << 60]}}),
        tensors({"conv.weight": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}),
        tensors({"conv.weight": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}}),
        tensors({"conv.weight": {"dtype": "F32", "shape": [0] * 5000, "data_offsets": [0, 0]}}, b""),
        tensors({"conv.weight": {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}}),
        tensors({"conv.weight": {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}}),
        tensors({"conv.weight": {"dtype": "X", "shape": [64], "data_offsets": [0, 64]}}),
        tensors({"__metadata__": {"a": 5}}),
    ],
)
def test_headers_of_safetensors_that_lie(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "a.safetensors", content)


def test_pickles_inside_pickles(tmp_path: Path) -> None:
    refused(tmp_path / "a.pth", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    refused(tmp_path / "a.pth", b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".")
