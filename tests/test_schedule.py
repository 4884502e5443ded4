"""What both ways of running share: the order of shards, commits, pauses, bad images, scanning again.

What a shard gives is made by hand here: image n scores n in channel 0 and -n in channel 1, unless it is bad.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from maxact import schedule
from maxact.catalog import Catalog, Shard
from maxact.config import ScanConfig
from maxact.errors import MaxactError
from maxact.fetch import Unreadable
from maxact.manifest import Manifest
from maxact.partial import BadImage, Partial, Tally
from maxact.process import Tick
from maxact.schedule import Schedule
from maxact.store import Store
from maxact.tap import Tap
from maxact_kernels.peaks import Peaks
from support import SMALL

IMAGES, SIZE, SHARDS = 18, 4, 5


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """18 images in 5 shards, the last of 2; the three strongest of two channels are kept."""
    for number in range(IMAGES):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"x")
    catalog = Catalog.build(tmp_path)
    settings = ScanConfig(top=3, precision="fp32", batch=2, shard=SIZE).to_json()
    taps = (Tap("conv", "conv", 0, "conv", "Conv2d", 2, (1, 1), 1),)
    model = {"name": "none", "weights": "none", "sha256": ""}
    images = {"count": IMAGES, "source": str(tmp_path)}
    manifest = Manifest(model, SMALL.to_json(), images, settings, taps, {})
    return Store.create(tmp_path / "store", manifest, catalog)


def bad_image(number: int, stage: str = "decode") -> BadImage:
    return BadImage(number, f"{number:02}.jpg", stage, "broken")


def give(shard: Shard, bad: Iterable[BadImage] = ()) -> Partial:
    """What a shard gives."""
    numbers = np.arange(shard.start, shard.stop)
    scores = np.stack([numbers, -numbers], 1).astype(np.float32)
    zero, places = np.zeros_like(scores), np.zeros_like(scores, np.int32)
    tally = Tally(shard, 2, {("max", "top"): 3})
    bad = [image for image in bad if shard.start <= image.image < shard.stop]
    numbers[[image.image - shard.start for image in bad]] = -1
    tally.add(Peaks(scores, places, scores, scores, zero, places), numbers)
    return tally.close(bad)


def giving(
    bad: Iterable[BadImage] = (), seen: list[int] | None = None
) -> Callable[[Iterator[Shard]], Iterator[Partial]]:
    """A scan that gives one shard after the other."""

    def scan(shards: Iterator[Shard]) -> Iterator[Partial]:
        for shard in shards:
            if seen is not None:
                seen.append(shard.index)
            yield give(shard, bad)

    return scan


def lists(store: Store) -> list[list[int]]:
    images: list[list[int]] = store["conv"].lists["max", "top"][0].tolist()
    return images


def test_all_shards_once_and_in_order(store: Store) -> None:
    seen: list[int] = []
    plan = Schedule(store)
    assert [shard.index for shard in plan.left] == [0, 1, 2, 3, 4]
    plan.run(giving(seen=seen))
    assert seen == [0, 1, 2, 3, 4] and plan.left == [] and plan.images_done == IMAGES
    store.finish(plan.result)
    assert lists(store) == [[17, 16, 15], [0, 1, 2]]


def test_what_is_committed_is_not_scanned_again(store: Store) -> None:
    def stopping(shards: Iterator[Shard]) -> Iterator[Partial]:
        yield give(next(shards))
        next(shards)
        yield give(next(shards))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Schedule(store).run(stopping)
    state = store.state()
    assert state is not None and state.shards == {0, 2}
    plan, seen = Schedule(store), list[int]()
    assert plan.images_done == 8
    plan.run(giving(seen=seen))
    assert seen == [1, 3, 4]
    store.finish(plan.result)
    assert lists(store) == [[17, 16, 15], [0, 1, 2]]


def test_commits_are_some_time_apart(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = []

    def count(self: Store, partial: Partial) -> None:
        commits.append(len(partial.shards))

    monkeypatch.setattr(Store, "commit", count)
    Schedule(store).run(giving())
    assert commits == [5]  # once, at the end
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)
    Schedule(store).run(giving())
    assert commits == [5, 1, 2, 3, 4, 5]  # nothing is written twice


def test_what_is_finished_is_committed_though_the_next_shard_takes_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0.2)
    plan, seen = Schedule(store), []

    def scan(shards: Iterator[Shard]) -> Iterator[Partial]:
        yield give(next(shards))
        second = next(shards)
        for _ in range(2):
            state = store.state()
            seen.append(state.shards if state else None)
            time.sleep(0.3)
            plan.note(Tick(second.index, False, 1, (), 0, 0.0))
        yield give(second)
        yield from map(give, shards)

    plan.run(scan)
    assert seen == [None, {0}]


def test_stop_ends_it_between_shards(store: Store) -> None:
    plan = Schedule(store)

    def scan(shards: Iterator[Shard]) -> Iterator[Partial]:
        for shard in shards:
            if plan.stop.is_set():
                return
            if shard.index == 2:
                plan.stop.set()
            yield give(shard)

    plan.run(scan)
    assert plan.images_done == 12
    state = store.state()
    assert state is not None and state.shards == {0, 1, 2}


# Storage that goes away


def flaky(failures: dict[int, int]) -> Callable[[Iterator[Shard]], Iterator[Partial]]:
    """A scan for which a shard cannot be read so many times."""

    def scan(shards: Iterator[Shard]) -> Iterator[Partial]:
        for shard in shards:
            if failures.get(shard.index, 0):
                failures[shard.index] -= 1
                raise Unreadable("the mount is gone")
            yield give(shard)

    return scan


def test_it_pauses_commits_and_goes_on(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    plan = Schedule(store)
    begun = time.monotonic()
    plan.run(flaky({0: 1, 3: 2}), pauses=(0.1, 0.2))
    assert time.monotonic() - begun >= 0.1 + 0.1 + 0.2  # they start anew where shards were finished in between
    assert plan.left == []
    assert [record.getMessage() for record in caplog.records] == ["the mount is gone (trying again in 0 s)"] * 3


def test_it_gives_up_in_the_end(store: Store) -> None:
    plan, failures = Schedule(store), {2: 99}
    with pytest.raises(Unreadable, match="the mount is gone"):
        plan.run(flaky(failures), pauses=(0.01, 0.02, 0.03))
    assert failures == {2: 95}  # the pause after the first two shards, three growing ones, and no more
    state = store.state()
    assert state is not None and state.shards == {0, 1}


def test_stop_cuts_a_pause_short(store: Store) -> None:
    plan = Schedule(store)

    def scan(shards: Iterator[Shard]) -> Iterator[Partial]:
        yield give(next(shards))
        plan.stop.set()
        raise Unreadable("the mount is gone")

    begun = time.monotonic()
    plan.run(scan, pauses=(60,))
    assert time.monotonic() - begun < 10
    assert plan.images_done == 4


# Bad images


def ticking(plan: Schedule, bad: list[BadImage]) -> Callable[[Iterator[Shard]], Iterator[Partial]]:
    """A scan that tells of bad images in one tick for each shard, and looks at `stop` as the real one does."""

    def scan(shards: Iterator[Shard]) -> Iterator[Partial]:
        for shard in shards:
            mine = tuple(image for image in bad if shard.start <= image.image < shard.stop)
            plan.note(Tick(shard.index, True, shard.stop - shard.start, mine, 0, 0.0))
            if plan.stop.is_set():
                return
            yield give(shard, bad)

    return scan


def test_too_many_bad_images_stop_it(store: Store) -> None:
    bad = [bad_image(number) for number in (1, 5, 6, 9, 10)]
    plan = Schedule(store, allowed_bad=3)
    with pytest.raises(MaxactError) as caught:
        plan.run(ticking(plan, bad))
    assert str(caught.value) == (
        "5 images are bad, more than the 3 that --max-bad allows (06.jpg: broken; 09.jpg: broken; 10.jpg: broken); "
        "mend them and start again with --overwrite, or allow more and run the same again"
    )
    state = store.state()
    assert state is not None and state.shards == {0, 1} and [image.image for image in state.bad] == [1, 5, 6]
    again = Schedule(store, allowed_bad=5)
    again.run(ticking(again, bad))
    store.finish(again.result)
    assert store.errors()["image"].to_pylist() == [1, 5, 6, 9, 10]
    assert store.manifest.summary == {"images": 18, "scanned": 13, "bad": 5, "grey": 0}


def test_as_many_as_are_allowed_do_not(store: Store) -> None:
    plan = Schedule(store, allowed_bad=2)
    plan.run(ticking(plan, [bad_image(1), bad_image(5)]))
    assert plan.left == [] and plan.bad == 2


def test_a_finished_run_with_too_many_is_not_let_through_the_second_time(store: Store) -> None:
    bad = [bad_image(16, "read"), bad_image(17, "read")]  # these count when their shard, the last, is through
    for _ in range(2):
        plan = Schedule(store, allowed_bad=1)
        with pytest.raises(MaxactError, match="2 images are bad, more than the 1 that --max-bad allows"):
            plan.run(ticking(plan, bad))
        assert plan.left == []
    Schedule(store, allowed_bad=2).run(giving())


def test_reading_errors_wait_for_the_end_of_their_shard(store: Store) -> None:
    """Where the storage is gone they are many, and the run has to pause, not to stop."""
    bad = [bad_image(number, "read") for number in range(4)]
    plan, gone = Schedule(store, allowed_bad=1), [True]

    def scan(shards: Iterator[Shard]) -> Iterator[Partial]:
        if gone.pop():
            plan.note(Tick(0, True, 2, tuple(bad[:2]), 0, 0.0))
            gone.append(False)
            raise Unreadable("the mount is gone")
        yield from giving()(shards)

    plan.run(scan, pauses=(0.01,))
    assert plan.left == [] and plan.bad == 0


# Scanning shards with errors again


def with_errors(store: Store, bad: Iterable[BadImage]) -> None:
    plan = Schedule(store)
    plan.run(giving(bad))
    store.finish(plan.result)
    assert any((store.path / "run").glob("state-*"))


def test_errors_that_have_gone(store: Store) -> None:
    with_errors(store, [bad_image(16), bad_image(5), bad_image(0)])
    assert lists(store) == [[17, 15, 14], [1, 2, 3]]
    store.reopen()
    plan, seen = Schedule(store, retry_errors=True), list[int]()
    assert plan.images_done == 8 and plan.bad == 0
    plan.run(giving([bad_image(5)], seen))
    assert seen == [0, 1, 4] and plan.bad == 1
    store.finish(plan.result)
    assert lists(store) == [[17, 16, 15], [0, 1, 2]]
    assert store.errors()["image"].to_pylist() == [5]
    assert store.state() is not None  # for the next time
    store.reopen()
    last = Schedule(store, retry_errors=True)
    assert [shard.index for shard in last.left] == [1]
    last.run(giving())
    store.finish(last.result)
    assert store.errors().num_rows == 0 and store.state() is None


def test_the_statistics_are_those_of_an_undisturbed_run(store: Store, tmp_path: Path) -> None:
    other = Store.create(tmp_path / "other", store.manifest, store.catalog)
    plan = Schedule(other)
    plan.run(giving())
    other.finish(plan.result)
    with_errors(store, [bad_image(2), bad_image(9)])
    store.reopen()
    again = Schedule(store, retry_errors=True)
    again.run(giving())
    store.finish(again.result)
    for name, values in other["conv"].stats.items():
        assert values.tobytes() == store["conv"].stats[name].tobytes()


def test_until_it_is_scanned_again_a_shard_keeps_what_it_gave(store: Store) -> None:
    """So that it does not matter where scanning again is cut short, and with what arguments it goes on."""
    with_errors(store, [bad_image(5), bad_image(17)])
    store.reopen()

    def cut(shards: Iterator[Shard]) -> Iterator[Partial]:
        yield give(next(shards))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Schedule(store, retry_errors=True).run(cut)
    plan = Schedule(store)
    assert plan.left == [] and plan.bad == 1
    store.finish(plan.result)
    assert lists(store) == [[16, 15, 14], [0, 1, 2]]
    assert store.errors()["image"].to_pylist() == [17]


def test_a_shard_that_became_worse_stays_as_it_was(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Image 17 had displaced image 13: without it the lists would lack one."""
    with_errors(store, [bad_image(16)])
    before = lists(store)
    store.reopen()
    plan = Schedule(store, retry_errors=True)
    plan.run(giving([bad_image(17, "read")]))
    store.finish(plan.result)
    assert lists(store) == before == [[17, 15, 14], [0, 1, 2]]
    assert store.errors()["image"].to_pylist() == [16]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "17.jpg is bad now (broken) and was not: its shard stays as it was"
    ]


def test_errors_that_are_scanned_again_count_once(store: Store) -> None:
    with_errors(store, [bad_image(1), bad_image(5)])
    store.reopen()
    plan = Schedule(store, retry_errors=True, allowed_bad=2)
    plan.run(ticking(plan, [bad_image(1), bad_image(5)]))
    assert plan.bad == 2
    few = Schedule(store, retry_errors=True, allowed_bad=1)
    with pytest.raises(MaxactError, match="2 images are bad"):
        few.run(ticking(few, [bad_image(1), bad_image(5)]))
