"""Stores that are started or gone on with: what is shared, what each keeps, what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import maxact
import several
from maxact import start
from maxact.config import RunConfig, ScanConfig
from maxact.errors import MaxactError
from maxact.find import find_taps
from maxact.models import load_model
from maxact.process import Progress
from maxact.run import store_path
from maxact.store import Store
from stores import SETTINGS, contents, scan

FIRST, SECOND = "several:first", "several:second"
OPEN: dict[str, Any] = {"batch": None, "shard": None}


class Stop(Exception):
    pass


def stop_after(images: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.done >= images:
            raise Stop

    return report


def together(images: object, folder: Path, names: Any = (FIRST, SECOND), **options: Any) -> tuple[Store, ...]:
    return maxact.scan_together(names, images, folder, **(SETTINGS | options))


def chosen(store: Store, *names: str) -> list[Any]:
    return [store.manifest.settings[name] for name in names or ("precision", "batch", "shard", "compile")]


def test_what_is_left_open_suits_the_device(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", FIRST, **OPEN)
    assert chosen(store) == ["fp32", 32, 4096, False]


@pytest.mark.parametrize("names", [(FIRST, SECOND), (SECOND, FIRST)])
def test_a_fresh_store_takes_batch_and_shard_of_the_one_that_is_there(
    names: tuple[str, str], photos: Path, tmp_path: Path
) -> None:
    scan(photos, store_path(tmp_path / "x", FIRST), FIRST, batch=3, shard=5)
    stores = together(photos, tmp_path / "x", names, **OPEN)
    assert [chosen(store, "batch", "shard") for store in stores] == [[3, 6]] * 2
    scan(photos, tmp_path / "y", SECOND, batch=3, shard=6)
    assert contents(store_path(tmp_path / "x", SECOND)) == contents(tmp_path / "y")


def test_another_batch_is_refused_where_one_is_there(photos: Path, tmp_path: Path) -> None:
    scan(photos, store_path(tmp_path, FIRST), FIRST, batch=3, shard=5)
    with pytest.raises(
        MaxactError, match=r"several:first.zarr: was made otherwise \(batch: 3, not 2; shard: 6, not 4\)"
    ):
        together(photos, tmp_path)
    assert not Store.exists(store_path(tmp_path, SECOND))


def test_each_keeps_its_own_precision(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        scan(photos, store_path(tmp_path, SECOND), SECOND, precision="bf16", report=stop_after(9))
    for _ in range(2):
        stores = together(photos, tmp_path, **OPEN)
        assert [chosen(store, "precision", "batch") for store in stores] == [["fp32", 2], ["bf16", 2]]
    with pytest.raises(MaxactError, match=r"several:second.zarr: was made otherwise \(precision: bf16, not fp32\)"):
        together(photos, tmp_path, precision="fp32")


def test_the_images_are_those_of_the_store_that_is_there(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    first = scan(tmp_path / "photos", store_path(tmp_path, FIRST), FIRST)
    shutil.copy(sorted(photos.rglob("*.jpg"))[0], tmp_path / "photos" / "new.jpg")
    _, second = together(tmp_path / "photos", tmp_path)
    assert second.catalog.table.equals(first.catalog.table) and len(second.catalog) == 21
    alone = scan(tmp_path / "photos", tmp_path / "alone", SECOND)
    assert len(alone.catalog) == 22


class Hungry(several.First):
    """Takes at most five images at once."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 5:
            raise torch.OutOfMemoryError
        return super().forward(images)


def test_a_store_of_a_cpu_goes_on_where_there_is_a_gpu(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only a GPU decides of pixels is that of the store; nothing runs on the device here."""
    network = several.First().eval()
    store = scan(photos, tmp_path / "x", network, decoder="dali")
    model = load_model(network)
    monkeypatch.setattr(start, "versions", lambda device: {})
    wanted = ScanConfig.from_json(store.manifest.settings)
    for share in (None, 0.8):
        asked = replace(wanted, precision=None, batch=None, compile=None, hardware_share=share)
        begin = start.Start(store.path, model, find_taps(model), asked)
        source = start.Source(photos)
        if share is None:
            ((again, _),) = start.start([begin], source, None, RunConfig("cpu"), torch.device("cuda:0"))
            assert again.manifest.settings["hardware_share"] is None
        else:
            with pytest.raises(MaxactError, match=r"was made otherwise \(hardware_share: null, not 0.8\)"):
                start.start([begin], source, None, RunConfig("cpu"), torch.device("cuda:0"))


def test_the_smallest_batch_that_suits_all_of_them(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU it is only tried where the network is to be compiled."""
    with caplog.at_level(logging.INFO, "maxact"):
        hungry = Hungry()
        stores = together(photos, tmp_path, [several.second(), hungry], compile=True, batch=None, shard=20)
    assert [chosen(store) for store in stores] == [["fp32", 4, 20, True]] * 2
    messages = [record.getMessage() for record in caplog.records if record.name == "maxact"]
    assert messages[:3] == [f"out of memory with batches of {batch}: {batch // 2} instead" for batch in (32, 16, 8)]
    assert [message.rsplit(", ", 2)[1:] for message in messages[3:5]] == [["batches of 4", "compiled"]] * 2
    assert [store.manifest.finished for store in stores] == [True, True]
    more = together(photos, tmp_path, [several.third(), hungry], compile=True, **OPEN)
    assert [chosen(store) for store in more] == [["fp32", 4, 20, True]] * 2


def test_a_batch_that_was_asked_for_and_does_not_fit(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(MaxactError, match=r"^out of memory with batches of 6$"):
        together(photos, tmp_path, [several.second(), Hungry()], compile=True, batch=6)
    assert not any(Store.exists(path) for path in tmp_path.iterdir())


def test_a_store_from_before_there_was_a_choice_to_compile(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        scan(photos, tmp_path / "x", FIRST, report=stop_after(13))
    about = tmp_path / "x" / "zarr.json"
    values = json.loads(about.read_text())
    del values["attributes"]["maxact"]["settings"]["compile"]
    about.write_text(json.dumps(values))
    with pytest.raises(MaxactError, match=r"compile: false, not true"):
        scan(photos, tmp_path / "x", FIRST, compile=True)
    assert scan(photos, tmp_path / "x", FIRST).manifest.finished
    scan(photos, tmp_path / "y", FIRST)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_overwrite_where_only_one_is_there(photos: Path, tmp_path: Path) -> None:
    scan(photos, store_path(tmp_path / "x", FIRST), FIRST, batch=3, top=4, limit=10)
    together(photos, tmp_path / "x", overwrite=True)
    for name in (FIRST, SECOND):
        scan(photos, store_path(tmp_path / "y", name), name)
        assert contents(store_path(tmp_path / "x", name)) == contents(store_path(tmp_path / "y", name))
