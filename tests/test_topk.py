"""Streaming top-k against sorting everything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maxact.topk import End, Ranked, Top

# few different scores, so that most ranks are decided by the image number
scores = st.one_of(st.integers(-2, 2).map(float), st.floats(width=32, allow_nan=True, allow_infinity=False))
tables = st.tuples(st.integers(0, 30), st.integers(1, 70)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=scores, fill=st.integers(0, 1).map(float))
)


def by_sorting(table: np.ndarray, numbers: np.ndarray, k: int, end: End) -> tuple[np.ndarray, np.ndarray]:
    """Images and scores [C, k] of a table [N, C], by sorting on (score, image)."""
    images = np.full((table.shape[1], k), -1)
    values = np.full((table.shape[1], k), np.nan, np.float32)
    for c in range(table.shape[1]):
        sign = -1 if end == "top" else 1
        order = sorted((sign * v, n, v) for v, n in zip(table[:, c], numbers, strict=True) if not np.isnan(v))[:k]
        for rank, (_, number, value) in enumerate(order):
            images[c, rank], values[c, rank] = number, value
    return images, values


def gather(table: np.ndarray, numbers: np.ndarray, k: int, end: End, batch: int = 7) -> Ranked:
    top = Top(table.shape[1], k, end)
    positions = np.broadcast_to(numbers[:, None] * 10, table.shape).astype(np.int32)
    for start in range(0, len(table), batch):
        part = slice(start, start + batch)
        top.add(table[part], np.ascontiguousarray(positions[part]), numbers[part])
    return top.state()


ends = st.sampled_from(["top", "bottom"])


@settings(deadline=None)
@given(tables, st.integers(1, 12), ends, st.randoms(use_true_random=False))
def test_keeps_what_sorting_keeps_whatever_the_order(table, k, end, random) -> None:
    numbers = np.arange(len(table), dtype=np.int64)
    images, values = by_sorting(table, numbers, k, end)
    order = list(range(len(table)))
    random.shuffle(order)
    ranked = gather(table[order], numbers[order], k, end)
    np.testing.assert_array_equal(ranked.image, images)
    np.testing.assert_array_equal(ranked.values(end), values)
    # a position travels with its image
    np.testing.assert_array_equal(ranked.position, np.where(images >= 0, images * 10, -1))


@settings(deadline=None)
@given(tables, st.integers(1, 12), ends, st.lists(st.integers(0, 2), min_size=30, max_size=30))
def test_merging_parts_gives_the_whole_in_any_order(table, k, end, owner) -> None:
    numbers = np.arange(len(table), dtype=np.int64)
    parts = []
    for part in range(3):
        mine = np.array([owner[n] == part for n in range(len(table))], bool)
        parts.append(gather(table[mine], numbers[mine], k, end))
    whole = gather(table, numbers, k, end)
    a, b, c = parts
    for merged in (a.merge(b).merge(c), c.merge(b.merge(a)), b.merge(c.merge(a))):
        for name in ("score", "image", "position"):
            assert getattr(merged, name).tobytes() == getattr(whole, name).tobytes()


@settings(deadline=None)
@given(tables, st.integers(1, 12), st.integers(0, 30), st.integers(0, 30))
def test_taking_images_out_and_in_again_changes_nothing(table, k, start, stop) -> None:
    numbers = np.arange(len(table), dtype=np.int64)
    whole = gather(table, numbers, k, "top")
    inside = (numbers >= start) & (numbers < stop)
    less = whole.without(start, stop)
    assert not ((less.image >= start) & (less.image < stop)).any()
    again = less.merge(gather(table[inside], numbers[inside], k, "top"))
    for name in ("score", "image", "position"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_a_masked_row_never_enters() -> None:
    top = Top(40, 2)
    table = np.full((3, 40), 9, np.float32)
    top.add(table, np.zeros((3, 40), np.int32), np.array([4, -1, 5]))
    np.testing.assert_array_equal(top.state().image, [[4, 5]] * 40)


def test_state_can_be_taken_in_the_middle() -> None:
    table = np.random.default_rng(0).standard_normal((20, 33)).astype(np.float32)
    numbers = np.arange(20)
    top = Top(33, 4)
    zeros = np.zeros((10, 33), np.int32)
    top.add(table[:10], zeros, numbers[:10])
    np.testing.assert_array_equal(top.state().image, by_sorting(table[:10], numbers[:10], 4, "top")[0])
    top.add(table[10:], zeros, numbers[10:])
    np.testing.assert_array_equal(top.state().image, by_sorting(table, numbers, 4, "top")[0])


@pytest.mark.parametrize("k", [1, 9, 100])
def test_many_images_and_channels(k: int) -> None:
    rng = np.random.default_rng(k)
    table = rng.standard_normal((3000, 100)).astype(np.float32)
    numbers = np.arange(3000)
    ranked = gather(table, numbers, k, "top", batch=64)
    np.testing.assert_array_equal(ranked.image, np.argsort(-table, axis=0, kind="stable")[:k].T)
