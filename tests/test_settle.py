"""Settling the order of a 16-bit scan: the parts of it, on arrays that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maxact.catalog import Shard
from maxact.errors import MaxactError
from maxact.partial import BadImage
from maxact.results import Peaks
from maxact.settle import Candidates, Exact, Picker, Settled, considered, settle
from maxact_kernels.peaks import Peaks as Batch

MAX, MEAN = ("max", "top"), ("mean", "bottom")


def test_how_many_are_looked_at() -> None:
    assert [considered(ranks) for ranks in (1, 9, 32, 50)] == [33, 41, 64, 100]


def ranked(score: np.ndarray, k: int, end: str) -> np.ndarray:
    """The k images [C, k] of the highest (lowest) scores [C, N], in rank order; -1 where there are fewer."""
    sign = -1 if end == "top" else 1
    channels, images = score.shape
    found = np.full((channels, k), -1)
    for channel in range(channels):
        order = sorted(range(images), key=lambda image: (sign * score[channel, image], image))[:k]
        found[channel, : len(order)] = order
    return found


def listed(score: np.ndarray, k: int, end: str) -> Peaks:
    """The list of some scores [C, N]; every position tells its image."""
    image = ranked(score, k, end)
    value = np.where(image >= 0, np.take_along_axis(score, image.clip(0), 1), np.nan).astype(np.float32)
    return Peaks(image, value, np.stack([image, -image], -1).astype(np.int32))


def bf16(score: np.ndarray) -> np.ndarray:
    return torch.from_numpy(score).bfloat16().float().numpy()


def settled(exact: np.ndarray, stored: np.ndarray, k: int, m: int, ranks: int, end: str) -> tuple[Peaks, Settled]:
    """The list of 16 bits, and what settling makes of it when the candidates' exact scores are known."""
    before, candidates = listed(stored, k, end), listed(stored, m, end)
    known = np.where(candidates.image >= 0, np.take_along_axis(exact, candidates.image.clip(0), 1), np.nan)
    assert candidates.position is not None
    position = 1000 + candidates.position
    spread = exact.std(1).astype(np.float32)
    return before, settle(
        before,
        candidates,
        known.astype(np.float32),
        position,
        ranks=ranks,
        end=end,
        spread=spread,
        precision="bf16",
    )


@st.composite
def scores(draw: Any) -> np.ndarray:
    """Scores [C, N] among which many are equal, or become equal in 16 bits."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    source = np.random.default_rng(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([3, 50, 5000]))
    values = 1 + source.integers(0, levels, shape) / draw(st.sampled_from([4, 1000]))
    return (values * draw(st.sampled_from([1, -1]))).astype(np.float32)


@settings(deadline=None)
@given(scores(), st.sampled_from(["top", "bottom"]), st.integers(1, 4), st.integers(0, 3), st.integers(0, 9))
def test_settled_ranks(exact: np.ndarray, end: str, ranks: int, later: int, more: int) -> None:
    k, m = ranks + later, ranks + later + more
    before, after = settled(exact, bf16(exact), k, m, ranks, end)
    image, score, position = after.peaks
    assert position is not None and image.shape == score.shape == before.image.shape and score.dtype == np.float32
    true = ranked(exact, ranks, end)
    for channel in range(len(exact)):
        filled = image[channel] >= 0
        assert filled.sum() == min(k, exact.shape[1]) and len(set(image[channel][filled])) == filled.sum()
        if after.certain[channel]:
            assert image[channel, :ranks].tolist() == true[channel].tolist()
        first = image[channel, :ranks]
        # of all that was looked at, these are the best, in rank order, with their exact scores and positions
        looked = ranked(bf16(exact), m, end)[channel]
        among = ranked(exact[channel : channel + 1, sorted(looked[looked >= 0])], ranks, end)[0]
        assert first.tolist() == [sorted(looked[looked >= 0])[place] if place >= 0 else -1 for place in among]
        for rank in np.flatnonzero(first >= 0):
            assert score[channel, rank] == exact[channel, first[rank]]
            assert position[channel, rank].tolist() == [1000 + first[rank], 1000 - first[rank]]
        # the later ones are those of before, in their order
        rest = [number for number in before.image[channel].tolist() if number not in first.tolist()]
        assert image[channel, ranks:][: len(rest)].tolist() == rest[: k - ranks]
        assert np.isnan(score[channel][~filled]).all()
    if exact.shape[1] <= m - 1:  # every image was looked at
        assert after.certain.all()


def test_what_a_margin_is_for() -> None:
    """The next candidate has 3.5 in 16 bits; the largest deviation is 0.5, and a step of 3.5 is 0.027."""
    stored = np.array([[9, 8, 3.5, 3.5]], np.float32)
    for last, certain in ((4.1, True), (4.01, False)):
        exact = np.array([[9, last, 3.5, 3.5]], np.float32)
        stored[0, 1] = last + 0.5
        _, after = settled(exact, stored, 2, 3, 2, "top")
        assert after.certain.tolist() == [certain]
        assert after.deviation == pytest.approx(0.5 / (last + 0.5))


@pytest.mark.parametrize("unknown", [np.nan, np.inf, -np.inf])
def test_images_that_cannot_be_had_again(unknown: float) -> None:
    """Nor have those a score that overflow in float32."""
    stored = np.array([[5, 4, 3, 2], [5, 4, 3, 2]], np.float32)
    candidates = listed(stored, 4, "top")
    assert candidates.position is not None
    exact = np.array([[1, unknown, 3.5, 2], [5, 4, 3, 2]], np.float32)
    after = settle(
        candidates.first(3),
        candidates,
        exact,
        candidates.position + 100,
        ranks=2,
        end="top",
        spread=np.ones(2, np.float32),
        precision="fp16",
    )
    assert after.peaks.image.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert after.peaks.score.tolist() == [[4, 3.5, 5], [5, 4, 3]]
    assert after.peaks.position is not None
    assert after.peaks.position[0].tolist() == [[1, -1], [102, 98], [0, 0]]
    assert after.certain.tolist() == [False, False]  # 4 of 16 bits more is the largest deviation, of both channels
    assert after.deviation == pytest.approx(0.8)


def test_deviations_are_measured_by_score_or_spread() -> None:
    stored = np.array([[0.01, 0.0], [100, 50]], np.float32)
    candidates = listed(stored, 2, "top")
    exact = np.array([[0.02, 0.0], [101, 50]], np.float32)
    after = settle(
        candidates, candidates, exact, None, ranks=1, end="top", spread=np.array([2, 2], np.float32), precision="fp16"
    )
    assert after.deviation == pytest.approx(0.01)
    assert after.peaks.position is None


def batch(draw: np.random.Generator, numbers: list[int], channels: int) -> Batch:
    found = Batch.empty(len(numbers), channels)
    for values in vars(found).values():
        values[:] = draw.integers(0, 100, values.shape)
    return found


def test_picking() -> None:
    """Every candidate's value, and nothing else, whatever batches and shards the images come in."""
    draw = np.random.default_rng(0)
    image = np.array([[4, 0, 2], [1, 4, -1], [0, 3, 1]])
    images = {MAX: image, MEAN: image[:, ::-1][:, :2]}
    candidates = Candidates(images, 5)
    shards = [Shard(0, 0, 4), Shard(1, 4, 5)]
    numbers = [[[0, 1], [2, -1]], [[4, -1]]]  # the image 3 is bad
    seen: dict[int, tuple[Batch, int]] = {}
    parts = []
    for shard, batches in zip(shards, numbers, strict=True):
        picker = Picker(shard, candidates)
        for each in batches:
            peaks = batch(draw, each, 3)
            picker.add(peaks, np.array(each))
            seen |= {number: (peaks, row) for row, number in enumerate(each) if number >= 0}
        parts.append(picker.close([BadImage(3, "c", "decode", "x")] if shard.index == 0 else [], 0))
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert merged.shards == {0, 1} and [bad.image for bad in merged.bad] == [3]
        assert set(merged.position) == {MAX}
        for key, wanted in images.items():
            for channel, rank in np.ndindex(wanted.shape):
                score = merged.score[key][channel, rank]
                if wanted[channel, rank] in (-1, 3):
                    assert np.isnan(score) and (key == MEAN or merged.position[key][channel, rank] == -1)
                    continue
                peaks, row = seen[wanted[channel, rank]]
                assert score == getattr(peaks, key[0])[row, channel]
                if key == MAX:
                    assert merged.position[key][channel, rank] == peaks.position[row, channel]
    with pytest.raises(ValueError, match="expected different shards, got 0 twice"):
        parts[0].merge(parts[0])


def some(shards: set[int]) -> Exact:
    draw = np.random.default_rng(len(shards))
    score = {key: draw.normal(size=(3, 4)).astype(np.float32) for key in (MAX, MEAN)}
    score[MAX][0, 1] = np.nan
    return Exact(
        frozenset(shards), score, {MAX: draw.integers(-1, 9, (3, 4), np.int32)}, (BadImage(1, "ü", "read", "x"),)
    )


def test_a_round_through_the_file(tmp_path: Path) -> None:
    path, part = tmp_path / "settling", some({0, 3})
    assert Exact.load(path, "this") is None and Exact.about(path) is None
    part.save(path, "this")
    assert Exact.about(path) == "this"
    assert Exact.load(path, "that") is None
    found = Exact.load(path, "this")
    assert found is not None and repr(found) == repr(part)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "settling"
    path.write_bytes(b"half a state")
    assert Exact.about(path) is None
    with pytest.raises(MaxactError, match=r"settling: is damaged \(.*\); delete it and project again"):
        Exact.load(path, "this")
    with pytest.raises(OSError):
        some({1}).save(tmp_path / "nowhere" / "settling", "this")
