"""Reading a store while a run writes it, and two runs at once: a reader sees some commit, whole."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from maxact.errors import MaxactError
from maxact.export import export
from maxact.info import describe
from maxact.lock import hold
from maxact.store import Store
from stores import ARGUMENTS, command, scan, wait_for


def test_a_reader_sees_one_commit_after_the_other(photos: Path, in_memory: Path) -> None:
    """As often as it can: the images that are counted never become fewer, and all it reads belongs together."""
    store, out = in_memory / "x", in_memory / "x.parquet"
    child = command("scan", "tiny:slow", photos, store, *ARGUMENTS, "--batch", "1", "--shard", "1")
    wait_for(lambda: Store.exists(store) and Store(store).state() is not None)
    seen, unfinished = [0], 0
    while not Store(store).manifest.finished:
        opened = Store(store)
        counts = {int(opened[tap].stats["count"][0]) // opened[tap].tap.positions for tap in opened}
        shown = {min(5, len(opened[tap].top(0))) for tap in opened}
        assert len(counts) == len(shown) == 1  # of one commit, though each tap was read by itself
        (count,) = counts
        assert count >= seen[-1]
        seen.append(count)
        told = describe(opened)
        assert told["summary"] == f"unfinished: {count} of 21 images, {count} of 21 shards" or opened.manifest.finished
        unfinished += not opened.manifest.finished
        rows = export(store, out)
        assert rows == len(pq.read_table(out)) and rows % 18 == 0
    assert child.wait() == 0
    assert unfinished and len(set(seen)) > 2
    assert int(Store(store)["bn1"].stats["count"][0]) == 21 * 32 * 32


def test_two_runs_on_one_store(photos: Path, tmp_path: Path) -> None:
    """The second is refused, with the first one's name, and changes nothing."""
    store = tmp_path / "x"
    with hold(store), pytest.raises(MaxactError, match=r"in use by process \d+ on .*; wait for it or stop it first"):
        scan(photos, store, devices="cpu:2")
    scan(photos, store)
    with hold(store), pytest.raises(MaxactError, match="in use by process"):
        scan(photos, store)
    assert Store(store).manifest.finished
