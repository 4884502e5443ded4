"""Merging what shards gave: any order, any grouping, the same bits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxact.catalog import Shard
from maxact.errors import MaxactError
from maxact.partial import HELD, BadImage, Partial, Tally
from maxact_kernels.peaks import Peaks

CHANNELS, SIZE = 5, 12
KEPT = {("max", "top"): 4, ("mean", "bottom"): 3}


def batch(number: int) -> tuple[Peaks, np.ndarray]:
    """The peaks and image numbers of a batch of SIZE images, a function of its number alone."""
    rng = np.random.default_rng(number)
    top, low, mean, square = (
        rng.standard_normal((SIZE, CHANNELS)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 4))
        for _ in range(4)
    )
    position = np.broadcast_to(np.arange(SIZE, dtype=np.int32)[:, None], (SIZE, CHANNELS)).copy()
    return Peaks(top, position, low, mean, square**2, position), np.arange(number * SIZE, (number + 1) * SIZE)


def shard_result(index: int, bad: bool = False) -> Partial:
    """What a shard of one batch gives, a function of its number alone."""
    tally = Tally(Shard(index, index * SIZE, (index + 1) * SIZE), CHANNELS, KEPT)
    peaks, numbers = batch(index)
    if bad:
        numbers[3] = -1
    tally.add(peaks, numbers)
    errors = [BadImage(index * SIZE + 3, f"key {index * SIZE + 3}", "decode", "broken")] if bad else []
    return tally.close(errors, grey=index % 2)


def same(a: Partial, b: Partial) -> bool:
    """Bit for bit."""
    if (a.shards, a.bad, a.grey, a.held) != (b.shards, b.bad, b.grey, b.held):
        return False
    pairs = [(a.tops[key], b.tops[key]) for key in a.tops] + [(a.total(), b.total())]
    return all(
        getattr(x, field.name).tobytes() == getattr(y, field.name).tobytes()
        for x, y in pairs
        for field in dataclasses.fields(x)
    )


def in_order(indices: list[int], bad: set[int]) -> Partial:
    result = shard_result(indices[0], indices[0] in bad)
    for index in indices[1:]:
        result = result.merge(shard_result(index, index in bad))
    return result


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 17), st.sets(st.integers(0, 16)), st.randoms(use_true_random=False))
def test_any_order_and_grouping_gives_the_same_bits(count: int, bad: set[int], random) -> None:
    whole = in_order(list(range(count)), bad)
    groups = [shard_result(index, index in bad) for index in range(count)]
    random.shuffle(groups)
    while len(groups) > 1:  # merge two at random until one is left
        one, other = (groups.pop(random.randrange(len(groups))) for _ in range(2))
        groups.append(one.merge(other))
    assert same(groups[0], whole)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.sets(st.integers(0, 11)), st.randoms(use_true_random=False))
def test_a_shard_scanned_again_without_its_errors_leaves_no_trace(count: int, bad: set[int], random) -> None:
    clean = in_order(list(range(count)), set())
    result = in_order(random.sample(range(count), count), bad)
    for index in sorted(index for index in bad if index < count):
        result = result.without(Shard(index, index * SIZE, (index + 1) * SIZE)).merge(shard_result(index))
    assert same(result, clean)


def test_only_so_many_shards_can_be_taken_out_and_the_sums_stay_the_same() -> None:
    count = HELD + 20
    bad = set(range(count))
    forward, backward = in_order(list(range(count)), bad), in_order(list(range(count))[::-1], bad)
    assert same(forward, backward) and set(forward.held) == set(range(HELD))
    assert len(forward.stats) <= HELD + 8
    assert (forward.total().images == SIZE * count - count).all()  # one bad image each


def test_the_size_of_the_shards_does_not_show() -> None:
    """The same batches, cut into shards of one, three and eight."""
    totals = []
    for batches in (1, 3, 8):
        result = None
        for first in range(0, 24, batches):
            tally = Tally(Shard(first // batches, first * SIZE, (first + batches) * SIZE), CHANNELS, KEPT)
            for number in range(first, first + batches):
                tally.add(*batch(number))
            part = tally.close()
            result = part if result is None else result.merge(part)
        totals.append(result)
    for other in totals[1:]:
        for name, array in vars(totals[0].total()).items():
            assert getattr(other.total(), name).tobytes() == array.tobytes()
        for key, top in totals[0].tops.items():
            np.testing.assert_array_equal(other.tops[key].image, top.image)


def test_the_sum_is_that_of_all_shards() -> None:
    total = in_order(list(range(11)), set()).total()
    sums = np.sum([shard_result(i).total().total for i in range(11)], 0)
    np.testing.assert_allclose(total.total, sums, rtol=1e-12)
    assert (total.images == 11 * SIZE).all()


def test_the_same_shard_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="1 twice"):
        in_order([0, 1], set()).merge(shard_result(1))


def test_finished_pairs_are_summed_so_that_memory_does_not_grow() -> None:
    assert len(in_order(list(range(64)), set()).stats) == 1
    assert len(in_order(list(range(63)), set()).stats) == 6


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.sets(st.integers(0, 8)))
def test_saved_and_loaded_is_the_same(tmp_path_factory, count: int, bad: set[int]) -> None:
    path = tmp_path_factory.mktemp("state") / "state-0"
    whole = in_order(list(range(count)), bad)
    whole.save(path)
    loaded = Partial.load(path)
    assert same(loaded, whole)
    assert same(loaded.merge(shard_result(count)), whole.merge(shard_result(count)))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 100])
def test_a_damaged_state_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state-3"
    path.write_bytes(content)
    with pytest.raises(MaxactError, match="state-3"):
        Partial.load(path)
