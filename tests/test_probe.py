"""What is chosen before a store is started, and memory that does not suffice, before the start and after it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import maxact
import several
from maxact import config, fetch, schedule
from maxact.catalog import Catalog
from maxact.config import ScanConfig
from maxact.errors import MaxactError
from maxact.probe import _differing, _fitting, _overflowing, _try, probe
from maxact.process import Progress
from maxact.scan import Job
from maxact.store import Store
from maxact.taps import CannotCompile, OutOfMemory
from maxact_kernels.peaks import Peaks
from stores import contents, scan
from support import make_job

CPU = torch.device("cpu")


def exhaust(kind: str) -> None:
    """What torch and Python raise where memory does not suffice."""
    if kind == "torch":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity ...")
    if kind == "python":
        raise MemoryError
    torch.empty(1 << 50)  # a petabyte


class Hungry(several.First):
    """Takes so many images at once."""

    def __init__(self, most: int, kind: str = "torch") -> None:
        super().__init__()
        self.most, self.kind = most, kind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            exhaust(self.kind)
        return super().forward(images)


def job_of(network: nn.Module, images: object, **asked: Any) -> Job:
    """A job whose settings are not resolved."""
    asked = {"decoder": "torchvision", "top": 5} | asked
    job = make_job(several.First(), Catalog.build(images), preprocess=network.preprocess)  # type: ignore[arg-type]
    return replace(job, network=network.eval().requires_grad_(False), settings=ScanConfig(**asked))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What maxact has logged; torch traces every compilation where pytest listens."""
    return [record.getMessage() for record in caplog.records if record.name == "maxact"]


# The batch


@pytest.mark.parametrize("kind", ["torch", "python", "cpu"])
def test_a_batch_that_does_not_fit_is_halved(kind: str, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(Hungry(5, kind), photos, shard=20)
    settings, trial = _fitting(job, job.settings, job.settings.resolve(CPU))
    assert (settings.batch, settings.shard) == (4, 20)
    assert trial.peaks.max.shape == (4, 11)
    assert said(caplog) == [f"out of memory with batches of {batch}: {batch // 2} instead" for batch in (32, 16, 8)]
    assert not any(module._forward_hooks for module in job.network.modules())


def test_shards_stay_whole_batches(photos: Path) -> None:
    job = job_of(Hungry(11), photos)
    settings, _ = _fitting(job, job.settings, job.settings.resolve(CPU))
    assert (settings.batch, settings.shard) == (8, 4096)
    job = job_of(Hungry(11), photos, shard=33)
    settings, _ = _fitting(job, job.settings, job.settings.resolve(CPU))
    assert (settings.batch, settings.shard) == (8, 40)


def test_a_batch_that_was_asked_for_is_not_changed(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(Hungry(5), photos, batch=6)
    with pytest.raises(OutOfMemory, match=r"^out of memory with batches of 6$"):
        _fitting(job, job.settings, job.settings.resolve(CPU))
    assert said(caplog) == []


def test_one_image_that_does_not_fit(photos: Path) -> None:
    job = job_of(Hungry(0), photos)
    with pytest.raises(OutOfMemory, match=r"^out of memory with batches of 1$"):
        _fitting(job, job.settings, job.settings.resolve(CPU))


# The precision


class Loud(several.First):
    """Beyond what float16 can hold, but only after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        nn.init.uniform_(self.conv1.weight, 0, 1)
        self.bn1.weight.data[:] = 1e3
        nn.init.uniform_(self.fc.weight, 1e3, 2e3)


@pytest.mark.parametrize("precision, overflows", [("fp32", None), ("bf16", None), ("fp16", "fc")])
def test_an_overflow_is_found(precision: Any, overflows: str | None, photos: Path) -> None:
    network = Loud()
    job = job_of(network, photos, precision=precision, batch=4)
    assert _overflowing(job, _try(job, job.settings.resolve(CPU))) == overflows


def test_only_places_with_an_image_count(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(sorted(photos.rglob("*.jpg"))[0].read_bytes())
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    job = job_of(several.First(), tmp_path, batch=4)
    assert _try(job, job.settings.resolve(CPU)).peaks.max.shape == (1, 11)


# The graph


def peaks_of(job: Job) -> Peaks:
    return _try(job, job.settings.resolve(CPU)).peaks


def doctored(peaks: Peaks, **columns: np.ndarray) -> Peaks:
    return Peaks(**(vars(peaks) | columns))


def test_other_peaks_are_noticed(photos: Path) -> None:
    job = job_of(several.first(), photos, batch=16)
    eager = peaks_of(job)
    first, fc = slice(0, 6), slice(6, 11)
    assert _differing(job, eager, eager) is None

    rounded = doctored(eager, max=eager.max * np.float32(1 + 1e-6), min=eager.min + np.float32(1e-6))
    assert _differing(job, eager, rounded) is None

    some = eager.position.copy()  # near ties have gone the other way
    some[:5, first] += 1
    assert _differing(job, eager, doctored(eager, position=some)) is None

    moved = eager.position.copy()
    np.random.default_rng(0).shuffle(moved[:, first])
    assert _differing(job, eager, doctored(eager, position=moved)) == "bn1"

    off = eager.max.copy()
    off[:, fc] += 0.5 * off[:, fc].std()
    assert _differing(job, eager, doctored(eager, max=off)) == "fc"

    shuffled = eager.max[::-1].copy()
    assert _differing(job, eager, doctored(eager, max=shuffled)) == "bn1"


def test_maps_without_peaks(photos: Path) -> None:
    """They are not compared, but both networks must have them."""
    job = job_of(several.first(), photos, batch=16)
    eager = peaks_of(job)
    for gone in (slice(0, 3), slice(None)):
        top, position = eager.max.copy(), eager.position.copy()
        top[gone], position[gone] = np.nan, -1
        without = doctored(eager, max=top, position=position)
        assert _differing(job, without, without) is None
        assert _differing(job, eager, without) == _differing(job, without, eager) == "bn1"


def test_other_means_are_noticed(photos: Path) -> None:
    job = job_of(several.first(), photos, batch=16)
    eager = peaks_of(job)
    for name in ("mean", "min"):
        values = getattr(eager, name).copy()
        values[:, 6:] += 1e3
        assert _differing(job, eager, doctored(eager, **{name: values})) == "fc"


class Constant(several.First):
    """Each of its maps is one value, and so are all the peaks of a layer."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.3)
        nn.init.zeros_(self.conv1.weight)


def test_peaks_that_are_all_alike(photos: Path) -> None:
    job = job_of(Constant(), photos, batch=4)
    eager = peaks_of(job)
    assert len(set(eager.max[:, 0])) == 1
    assert _differing(job, eager, eager) is None
    assert _differing(job, eager, doctored(eager, max=eager.max * np.float32(1.01))) == "bn1"


class Dependent(several.First):
    """Its way depends on what it sees."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images if images.sum() > 0 else images * 2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images are enough to try it."""
    monkeypatch.setattr(config, "COMPILED", 20)


def test_on_a_cpu_nothing_is_tried_unless_it_is_asked_for(photos: Path) -> None:
    job = job_of(Hungry(0), photos)
    assert probe(job) == replace(job, settings=job.settings.resolve(CPU))
    assert job.settings.resolve(CPU).compile is False


def test_it_is_compiled_where_that_is_asked_for(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(several.first(), photos, compile=True, batch=4)
    assert probe(job) == replace(job, settings=job.settings.resolve(CPU))
    assert job.settings.resolve(CPU).compile is True
    assert said(caplog) == []
    assert not any(module._forward_hooks for module in job.network.modules())


def test_halved_and_compiled(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(Hungry(5), photos, compile=True)
    settings = probe(job).settings
    assert (settings.batch, settings.compile) == (4, True)
    assert len(said(caplog)) == 3


def test_a_long_scan_of_what_is_no_graph(photos: Path, small: None, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(Dependent(), photos, batch=4)
    assert job.settings.resolve(CPU, 21).compile is True
    with caplog.at_level(logging.INFO, "maxact"):
        settings = probe(job).settings
    assert settings == replace(job.settings.resolve(CPU, 21), compile=False)
    (message,) = said(caplog)
    assert message.startswith("not compiled: torch.compile cannot take this network (") and "\n" not in message
    assert not any(module._forward_hooks for module in job.network.modules())


def test_what_is_no_graph_and_was_asked_for(photos: Path, tmp_path: Path) -> None:
    job = job_of(Dependent(), photos, batch=4, compile=True)
    with pytest.raises(CannotCompile, match=r"^torch.compile cannot take this network \(") as caught:
        probe(job)
    assert "\n" not in str(caught.value)
    with pytest.raises(CannotCompile):
        scan(photos, tmp_path / "x", Dependent(), compile=True)
    assert not Store.exists(tmp_path / "x")


def test_bad_images_only(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    job = job_of(several.first(), tmp_path, compile=True, batch=4)
    assert probe(job).settings.compile is True


class Gone(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        raise OSError(errno.EIO, "gone")


def test_storage_that_has_gone(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is chosen untried: the scan does not begin."""
    monkeypatch.setattr(fetch._again, "sleep", lambda seconds: None)
    job = job_of(several.first(), Gone(), batch=32)
    with pytest.raises(fetch.Unreadable):
        probe(job)


# Memory that does not suffice later


class Forgetful(several.First):
    """Once it is told to, its memory does not suffice for so many batches, each so many after the one before."""

    def __init__(self, kind: str = "torch") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.reset_parameters()
        self.kind, self.failures, self.every, self.calls = kind, 0, 1, 0

    def reset_parameters(self) -> None:
        for module in (self.conv1, self.fc):
            module.reset_parameters()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.failures:
            self.calls += 1
            if self.calls % self.every == 0:
                self.failures -= 1
                exhaust(self.kind)
        return super().forward(images)

    def fail(self, times: int, every: int = 1) -> None:
        self.failures, self.every = times, every


def after(images: int, act: Callable[[], object]) -> Callable[[Progress], None]:
    """A report that acts once so many images are through."""
    acted = []

    def report(progress: Progress) -> None:
        if progress.done >= images and not acted:
            acted.append(True)
            act()

    return report


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return scan(photos, tmp_path_factory.mktemp("undisturbed") / "x", Forgetful())


@pytest.mark.parametrize("kind", ["torch", "python", "cpu"])
def test_it_starts_again_once(
    kind: str, undisturbed: Store, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, seen = Forgetful(kind), list[Progress]()
    tell = after(10, lambda: network.fail(1))
    store = scan(photos, tmp_path / "x", network, report=lambda each: (seen.append(each), tell(each)))
    assert contents(store.path) == contents(undisturbed.path)
    (message,) = said(caplog)
    assert message in [f"out of memory with batches of 2: starting again at shard {shard}" for shard in (1, 2)]
    assert (seen[-1].before, seen[-1].done, seen[-1].total) == (0, 21, 21)


def test_it_starts_again_as_long_as_shards_are_finished(undisturbed: Store, photos: Path, tmp_path: Path) -> None:
    network = Forgetful()
    store = scan(photos, tmp_path / "x", network, report=after(1, lambda: network.fail(2, every=5)))
    assert network.failures == 0
    assert contents(store.path) == contents(undisturbed.path)


def test_it_stops_where_memory_never_suffices(
    undisturbed: Store, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = Forgetful()
    with pytest.raises(MaxactError) as caught:
        scan(photos, tmp_path / "x", network, report=after(10, lambda: network.fail(10**6)))
    assert str(caught.value) == (
        "out of memory with batches of 2, twice; start again with a smaller --batch (and --overwrite)"
    )
    assert network.failures == 10**6 - 2 and len(said(caplog)) == 1
    state = Store(tmp_path / "x").state()
    assert state is not None and 0 in state.shards
    scan(photos, tmp_path / "x", Forgetful())  # perhaps there is more of it now
    assert contents(tmp_path / "x") == contents(undisturbed.path)


def test_the_shard_just_finished_is_not_lost(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is still being counted when the next batch does not fit."""
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)
    network = Forgetful()
    with pytest.raises(OutOfMemory):
        scan(photos, tmp_path / "x", network, report=after(8, lambda: network.fail(10**6)))
    state = Store(tmp_path / "x").state()
    assert state is not None and state.shards == {0, 1}


def test_several_networks_of_which_one_does_not_fit(photos: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"top": 5, "batch": 2, "shard": 4, "threads": 1, "decode_threads": 1, "readers": 4}
    for name, times in (("x", 0), ("y", 1)):
        network, other = Forgetful(), "several:second"
        act = after(10, lambda network=network, times=times: network.fail(times))  # type: ignore[misc]
        maxact.scan_together([other, network], photos, tmp_path / name, report=act, **settings)
    found, wanted = ({k: v for k, v in contents(tmp_path / n).items() if "/run/" not in k} for n in ("y", "x"))
    assert found == wanted
