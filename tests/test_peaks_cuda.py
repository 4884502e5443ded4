"""The Triton kernels: in Triton's interpreter against plain numpy, compiled for a Hopper GPU, and on a GPU.

The interpreter is chosen by the environment when Triton is imported, for a whole process. So the kernels run in a
process of their own, and nothing here imports them at the top.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maxact_kernels import peaks
from test_peaks import check
from test_peaks import maps as any_maps

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds for Linux"
)
NAMES = ("max", "position", "min", "mean", "square", "active")
DTYPES = ["float32", "float16", "bfloat16"]
Run = Callable[..., dict[str, np.ndarray]]


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _peaks(maps: np.ndarray, channels_last: bool, dtype: str, before: int, after: int) -> tuple[np.ndarray, int]:
    """What the kernels make of maps [N, C, P] in a tensor with columns of 7 around theirs, and how many parts."""
    from maxact_kernels import peaks_cuda

    images, channels, positions = maps.shape
    laid = torch.from_numpy(maps.transpose(0, 2, 1) if channels_last else maps).to(getattr(torch, dtype)).contiguous()
    out = torch.full((6, images, before + channels + after), 7.0)
    peaks_cuda.peaks(laid, channels_last, out, before)
    return out.numpy(), peaks_cuda.plan(images, positions, channels, channels_last).splits


def _trouble() -> str | None:
    from maxact_kernels import peaks_cuda

    return peaks_cuda.trouble(torch.device("cpu"))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_interpret) as process:
        yield process


@pytest.fixture(scope="module")
def run(interpreter: ProcessPoolExecutor) -> Run:
    """The six arrays that the kernels give for maps [N, C, P] of a float type."""

    def run(
        maps: np.ndarray, channels_last: bool, dtype: str = "float32", before: int = 0, after: int = 0, splits: int = 1
    ) -> dict[str, np.ndarray]:
        out, parts = interpreter.submit(_peaks, maps, channels_last, dtype, before, after).result()
        assert parts >= splits
        channels = maps.shape[1]
        assert (out[..., :before] == 7).all() and (out[..., before + channels :] == 7).all()
        six = dict(zip(NAMES, np.ascontiguousarray(out[..., before : before + channels]), strict=True))
        return six | {name: six[name].view(np.int32) for name in ("position", "active")}

    return run


def rounded(maps: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(maps).to(getattr(torch, dtype)).float().numpy()


@settings(deadline=None, max_examples=30)
@given(any_maps, st.booleans(), st.sampled_from(DTYPES))
def test_kernels_give_what_numpy_gives(run: Run, maps: np.ndarray, channels_last: bool, dtype: str) -> None:
    maps = rounded(maps, dtype)
    check(run(maps, channels_last, dtype), maps)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (2, 1000, 1),  # a vector, as of a linear layer
        (1, 1, 1030),
        (2, 3, 65),
        (3, 64, 16),  # in channels_last exactly what one turn of the loop takes
        (2, 64, 49),
        (1, 70, 33),
        (1, 40, 17),  # rows that are aligned to 8 values, not to 16
    ],
)
def test_sizes_around_those_of_a_tile(run: Run, shape: tuple[int, int, int], dtype: str, channels_last: bool) -> None:
    maps = rounded(np.random.default_rng(shape).standard_normal(shape, dtype=np.float32), dtype)
    check(run(maps, channels_last, dtype, before=3, after=2), maps)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_large_map_are_joined(run: Run, dtype: str, channels_last: bool) -> None:
    # one image of few channels is far too little for a device: its positions are shared among programs
    shape = (1, 65, 700) if channels_last else (1, 3, 17000)
    maps = rounded(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), dtype)
    maps[0, 0, 600], maps[0, 1, 5], maps[0, 2, 650] = np.nan, np.inf, -np.inf
    maps[0, 64 if channels_last else 2] = np.random.default_rng(1).integers(0, 2, shape[2])  # ties across the parts
    check(run(maps, channels_last, dtype, before=1, after=1, splits=2), maps)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("positions", [1, 5, 16, 49, 1030])
def test_the_lowest_position_wins_a_tie(run: Run, positions: int, channels_last: bool) -> None:
    rng = np.random.default_rng(positions)
    maps = rng.integers(0, 2, (1, 9, positions)).astype(np.float32)
    maps[0, 0] = -3  # all alike, and below what stands where there are no positions
    maps[0, 1] = 3
    maps[0, 2] = 0.0
    maps[0, 2, 0] = -0.0  # no less than 0
    got = run(maps, channels_last, "float16")
    check(got, maps)
    assert (got["position"][0, :3] == 0).all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_map_below_zero_keeps_its_own_maximum(run: Run, channels_last: bool) -> None:
    maps = -1 - np.random.default_rng(0).random((2, 5, 50), dtype=np.float32)
    got = run(maps, channels_last)
    check(got, maps)
    assert (got["max"] < -1).all() and (got["active"] == 0).all()
    check(run(-maps, channels_last), -maps)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 20, 48, slice(None)])
def test_one_bad_value_takes_only_its_own_map_out(
    run: Run, value: float, place: int | slice, channels_last: bool
) -> None:
    maps = np.random.default_rng(0).standard_normal((2, 5, 49), dtype=np.float32)
    maps = rounded(maps, "float16")
    clean = run(maps, channels_last, "float16")
    maps[1, 3, place] = value
    got = run(maps, channels_last, "float16")
    check(got, maps)
    assert got["position"][1, 3] == -1 and np.isnan(got["max"][1, 3])
    others = np.ones((2, 5), bool)
    others[1, 3] = False
    for name in NAMES:
        np.testing.assert_array_equal(got[name][others], clean[name][others])


def test_both_infinities_in_one_map(run: Run) -> None:
    maps = np.zeros((1, 2, 40), np.float32)
    maps[0, 0, 3], maps[0, 0, 30] = np.inf, -np.inf
    check(run(maps, True), maps)


def test_half_precision_is_summed_in_float32(run: Run) -> None:
    # in float16 the sum would end at 2,048, and the sum of squares of 300 at infinity
    maps = np.ones((1, 2, 5000), np.float32)
    maps[0, 1] = 300
    got = run(maps, True, "float16")
    np.testing.assert_allclose(got["mean"], [[1, 300]], rtol=1e-5)
    np.testing.assert_allclose(got["square"], [[1, 90000]], rtol=1e-5)
    np.testing.assert_array_equal(got["active"], [[5000, 5000]])


def test_tensors_that_do_not_fit_are_refused() -> None:
    from maxact_kernels.peaks_cuda import peaks as by_triton

    maps, out = torch.zeros(2, 49, 8), torch.zeros(6, 2, 10)
    for bad in (maps.double(), maps.transpose(1, 2), maps[:0], maps.int()):
        with pytest.raises(ValueError, match=r"maps: .* got torch"):
            by_triton(bad, True, out)
    for bad, column in ((out, 3), (out, -1), (out[:5], 0), (out[:, :1], 0), (out.double(), 0), (out.mT, 0)):
        with pytest.raises(ValueError, match=r"out: .* got torch"):
            by_triton(maps, True, bad, column)


def test_trouble_is_found_where_there_is_some(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_trouble).result() is None
    assert _trouble()  # compiled, they run on no CPU


def test_without_triton_the_module_is_imported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("without_triton", Path(peaks.__file__).with_name("peaks_cuda.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_triton", module)
    monkeypatch.setitem(sys.modules, "triton", None)
    spec.loader.exec_module(module)
    assert module.AVAILABLE is False
    assert module.trouble(torch.device("cpu")) == "Triton is not installed"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_they_compile_for_hopper_with_wide_loads(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes what the compiler refuses. Needs no GPU."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from maxact_kernels import peaks_cuda

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def ptx(kernel: Any, pointers: dict[str, str], warps: int, **constants: int | bool) -> str:
        names = [parameter.name for parameter in kernel.params]
        types = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
        source = ASTSource(
            kernel,
            types,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
        )
        options = {"num_warps": warps, **peaks_cuda._OPTIONS}
        return str(compiled(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])

    # the first convolution of a ResNet: shared among programs
    how = peaks_cuda.plan(128, 12544, 64, True)
    assert how.splits > 1
    sizes = {"VECTOR": how.vector, "BLOCK": how.block, "TILE": how.tile, "LOADS": peaks_cuda._LOADS}
    pointers = {"maps": f"*{dtype}", "out": "*fp32"}
    text = ptx(peaks_cuda._part, pointers, peaks_cuda._WARPS, LAST=True, ALONE=False, **sizes)
    loads = [line for line in text.splitlines() if "ld.global" in line]
    # 8 values a thread, 16 bytes at a time; those of the loop, and those of the positions left over
    assert all(".v4.b32" in line for line in loads)
    assert len(loads) == (peaks_cuda._LOADS + 1) * (2 if dtype == "fp32" else 1)
    if dtype == "fp32":
        sizes = {"SPLITS": peaks_cuda._SPLITS, "BLOCK": peaks_cuda._CHANNELS}
        assert "ld.global" in ptx(peaks_cuda._join, {"parts": "*fp32", "out": "*fp32"}, peaks_cuda._JOIN_WARPS, **sizes)


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def _agree(got: torch.Tensor, maps: torch.Tensor) -> None:
    """Peaks [6, N, C] with the reference's of maps [N, C, P]."""
    for name, mine, theirs in zip(NAMES, got, peaks.reference(maps), strict=True):
        if theirs.dtype == torch.int32:
            assert torch.equal(mine.contiguous().view(torch.int32), theirs), name
        else:
            rtol, atol = (1e-5, 1e-6) if name in ("mean", "square") else (0, 0)
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol, equal_nan=True)


class TestOnAGPU:
    """None of this has run yet: no CUDA device has been at hand."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("channels_last", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "shape", [(128, 64, 12544), (128, 256, 3136), (128, 2048, 49), (9, 40, 784), (33, 24, 785), (256, 1000, 1)]
    )
    def test_kernels_give_what_the_reference_gives(
        self, shape: tuple[int, int, int], dtype: str, channels_last: bool
    ) -> None:
        from maxact_kernels.peaks_cuda import peaks as by_triton

        images, channels, positions = shape
        generator = torch.Generator("cuda").manual_seed(0)
        # whole numbers: ties everywhere
        maps = torch.randint(-4, 4, shape, generator=generator, device="cuda").to(getattr(torch, dtype))
        maps[0] = torch.randn(shape[1:], generator=generator, device="cuda").to(maps.dtype)
        for channel, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            maps[1, channel, positions // 2] = maps[2, channel, positions - 1] = maps[3, channel, 0] = value
        laid = maps.transpose(1, 2).contiguous() if channels_last else maps
        out = torch.full((6, images, channels + 5), 7.0, device="cuda")
        by_triton(laid, channels_last, out, 3)
        assert (out[..., :3] == 7).all() and (out[..., channels + 3 :] == 7).all()
        _agree(out[..., 3:-2], maps)

    def test_there_is_no_trouble(self) -> None:
        from maxact_kernels.peaks_cuda import trouble

        assert trouble(torch.device("cuda")) is None

    def test_more_values_than_an_int32_counts(self) -> None:
        from maxact_kernels.peaks_cuda import peaks as by_triton

        images, positions, channels = 2700, 12544, 64
        maps = torch.zeros((images, positions, channels), dtype=torch.float16, device="cuda")
        maps[-2:].normal_()
        assert maps.numel() > 2**31
        out = torch.empty((6, images, channels), device="cuda")
        by_triton(maps, True, out)
        _agree(out[:, -3:], maps[-3:].transpose(1, 2))

    def test_the_same_maps_give_the_same_bits(self) -> None:
        from maxact_kernels.peaks_cuda import peaks as by_triton

        maps = torch.randn(64, 12544, 64, device="cuda", dtype=torch.float16)
        first, again = torch.empty((2, 6, 64, 64), device="cuda")
        by_triton(maps, True, first)
        by_triton(maps, True, again)
        assert torch.equal(first.view(torch.int32), again.view(torch.int32))
