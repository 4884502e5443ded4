"""The stages of a scan and what follows from them: real runs of small networks; no test looks at how fast they are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import maxact
import tiny
from maxact import cli, loops, stages
from maxact import sweep as sweeping
from maxact.bench import bench
from maxact.catalog import Catalog
from maxact.config import cores
from maxact.errors import MaxactError, UsageError
from maxact.preprocess import Preprocess
from maxact.sweep import Point, Setting, best, choices, sweep
from maxact.verdict import Bench, Rule, Stage
from stores import names
from support import make_job, write_photographs

SHORT: dict[str, Any] = {
    "rounds": 2,
    "seconds": 0.05,
    "batch": 4,
    "threads": 1,
    "decode_threads": 1,
    "readers": 4,
    "decoder": "torchvision",
}
STAGES = ["read", "decode", "forward", "taps", "heaps", "store", "scan"]


def plain() -> nn.Module:
    """A network that torch.compile takes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2))
    network.preprocess = Preprocess(32, (32, 32))  # type: ignore[assignment]
    return network


class Picky(tiny.Tiny):
    """Fails with batches that are larger than 8."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 8:
            raise MemoryError("there is no more")
        return super().forward(images)


@pytest.fixture(scope="module")
def result(photos: Path) -> Bench:
    return bench("tiny:network", photos, **SHORT)


# What is measured


def test_stages(result: Bench) -> None:
    """Every stage in every round; the order is that of the table."""
    assert [stage.name for stage in result.stages] == STAGES
    for stage in result.stages:
        assert len(stage.costs) == 2 and all(cost.wall > 0 and cost.cpu >= 0 for cost in stage.costs)
        assert stage.rate == 1 / median(cost.wall for cost in stage.costs)
        assert stage.spread == tuple(sorted(1 / cost.wall for cost in stage.costs))
        assert result[stage.name] is stage and stage.name in result
    assert (result.model, result.weights[:2], result.images, result.taps) == ("tiny:network", "as", 21, 3)
    assert result.channels == 18 and 0 <= result.waiting <= 1 and result.points == ()
    assert result.settings | {"rounds": 2, "batch": 4, "precision": "fp32", "compile": False} == result.settings
    assert result.settings["decoder"] == "torchvision" and torch.__version__.startswith(result.machine["torch"])
    with pytest.raises(KeyError):
        result["copy"]


def test_limit_follows_from_the_stages(result: Bench) -> None:
    """By the rule that is stated: decoding and the network share the cores, and no stage is faster than alone."""
    facts = result.to_json()
    costs = {stage["name"]: stage["seconds per image"] for stage in facts["stages"]}
    here = cores()

    def limit(wall: dict[str, float], cpu: dict[str, float]) -> float:
        return 1 / max((cpu["decode"] + cpu["forward"]) / here, wall["read"], wall["decode"], wall["forward"])

    middle = {
        kind: {name: float(np.median([cost[kind] for cost in each])) for name, each in costs.items()}
        for kind in ("wall", "cpu")
    }
    assert facts["limit"] == pytest.approx(limit(**middle), rel=1e-12)
    rounds = [
        {kind: {name: each[number][kind] for name, each in costs.items()} for kind in ("wall", "cpu")}
        for number in range(2)
    ]
    shares = [1 / each["wall"]["scan"] / limit(**each) for each in rounds]
    assert facts["shares"] == pytest.approx(shares, rel=1e-12)
    assert facts["share"] == pytest.approx(np.median(shares), rel=1e-12)
    assert facts["rule"]["cores"] == here
    assert f"{here} / (CPU of forward + CPU of decode), forward, decode, read" in facts["rule"]["words"]


def test_json(result: Bench) -> None:
    """All that it holds, as plain values."""
    facts = result.to_json()
    assert json.loads(json.dumps(facts)) == facts
    assert [stage["name"] for stage in facts["stages"]] == STAGES
    assert facts["bottleneck"] in STAGES and facts["advice"] == list(result.advice)


def test_words(result: Bench) -> None:
    columns, rows = result.rows()
    assert [row[0] for row in rows] == STAGES and all(len(row) == len(columns) for row in rows)
    assert all(" to " in str(row[columns.index("least to most")]) for row in rows)
    lines = result.lines()
    assert [line.split()[0] for line in lines[:3]] == ["limit", "scan", "bottleneck"] and len(lines) > 3
    assert lines[2].split()[1] == result.bottleneck


def test_few_images_and_bad_ones(tmp_path: Path) -> None:
    """Three pictures, two files that are none and one that cannot be found are measured as they would be scanned."""
    paths = write_photographs(tmp_path, 3)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "empty.jpg").touch()
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join([*map(str, paths), "bad.jpg", "empty.jpg", "gone.jpg"]))
    found = bench("tiny:network", listed, **(SHORT | {"rounds": 1, "batch": 16, "decoder": "auto"}))
    assert [stage.name for stage in found.stages] == STAGES and found.images == 6


def test_compiled(photos: Path) -> None:
    """The network is measured both ways, and the limit follows from the one that the scan runs."""
    found = bench(plain(), photos, compile=True, precision="bf16", **(SHORT | {"rounds": 1}))
    assert [stage.name for stage in found.stages] == [*STAGES[:3], "compiled forward", *STAGES[3:]]
    assert found.rule.shared == ("compiled forward", "decode") and found.network == "compiled forward"
    assert any("compiled, the network runs" in words for words in found.advice)


def test_leaves_everything_as_it_was(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    network = tiny.network()
    before, threads = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_num_threads()
    bench(network, photos, **(SHORT | {"rounds": 1}))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.get_num_threads() == threads and not names(tmp_path)


# The stages


def test_twin() -> None:
    """Hooks of its own, the weights of the other."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    twin = stages.twin(network)
    twin[0].register_forward_hook(lambda *call: None)  # type: ignore[index]
    assert not network[0]._forward_hooks
    mine, theirs = network.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert all(mine[name] is theirs[name] for name in mine)
    network.handle = (number for number in range(3))  # type: ignore[assignment]
    with pytest.raises(MaxactError, match="cannot be copied"):
        stages.twin(network)


@pytest.mark.parametrize(("images", "batch", "expected"), [(5, 4, 8), (8, 4, 8), (9, 4, 16), (1, 32, 64)])
def test_repeated(tmp_path: Path, images: int, batch: int, expected: int) -> None:
    """Whole batches, the images in their order again and again."""
    catalog = Catalog.build(write_photographs(tmp_path, images))
    entries = loops.repeated(catalog, batch).entries(0, expected)
    sources = [entry.source for entry in catalog.entries(0, images)]
    assert [entry.source for entry in entries] == [sources[number % images] for number in range(expected)]


def test_a_large_catalog_is_not_repeated(tmp_path: Path) -> None:
    """Of very many images stretches out of all of it are enough."""
    one = Catalog.build(write_photographs(tmp_path, 1))
    large = one.take(np.zeros(200_000, np.int64))
    large = Catalog(large.table.set_column(4, "offset", large.table["image"]))
    offsets = loops.repeated(large, 32).table["offset"].to_numpy()
    assert len(offsets) == 65_536 and offsets[0] == 0 and offsets[-1] == 199_999
    assert (np.diff(offsets) > 0).all() and (np.diff(offsets) == 1).sum() == 64 * 1023


def test_the_loop_goes_on_where_it_stood(photos: Path) -> None:
    """Stretch after stretch, the images of the catalog in their order, all batches whole."""
    seen: list[int] = []
    job = make_job(tiny.Tiny(), loops.repeated(Catalog.build(photos), 4), preprocess=Preprocess(32, (32, 32)))
    network = job.network
    handle = network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    with closing(loops.Loop(job)) as loop:
        counts = []
        for batches in (1, 3, 2):
            cost = loop(batches)
            counts.append(len(seen))
            assert cost.wall > 0 and 0 <= loop.waited <= 1
    handle.remove()
    assert set(seen) == {4}
    # what is counted, and no more than is needed to fill the pipe and to come to a shard's end
    assert all(after - before in range(4, 12) for before, after in pairwise([0, *counts]))


def test_counting_takes_whole_shards(photos: Path) -> None:
    """The loop's pieces are counted in shards of the settings' size."""
    job = make_job(tiny.Tiny(), Catalog.build(photos), preprocess=Preprocess(32, (32, 32)), shard=8)
    counting = loops._Counting(job)
    with loops.as_in_a_scan(job), stages.taps_of(job) as taps:
        (images, *_) = stages.gather(job).images
        peaks = taps(images).result()
    for turn in range(5):
        tally = counting._tally
        counting.add(peaks, np.arange(4 * turn, 4 * turn + 4))
        assert (counting._tally is tally) == (turn % 2 == 0)
        counting.close((), 0)


# What follows from it


def made(
    walls: dict[str, float],
    waiting: float = 0.0,
    cuda: bool = False,
    cpus: Mapping[str, float] | None = None,
    bf16: str = "yes",
    **settings: Any,
) -> Bench:
    """A result with so many milliseconds an image for each stage, on two cores, and so many of CPU time: unless told
    otherwise those of both cores all the time."""
    spent = {name: 2 * wall for name, wall in walls.items()} | dict(cpus or {})
    compiled = "compiled forward" in walls
    network = "compiled forward" if compiled else "forward"
    beside = tuple(name for name in ("read", "decode", "copy", network) if name in walls)
    chosen = {"batch": 32, "threads": 2, "decode_threads": 2, "readers": 16, "precision": "fp32", "compile": compiled}
    chosen |= {"hardware_share": 0.65}
    return Bench(
        *("net", "none", 100, 3, 64),
        chosen | {"decoder": "dali", "device": "cuda" if cuda else "cpu"} | settings,
        {"cpu": "a processor", "cores": "2", "bf16": bf16, "device": "cpu"},
        tuple(Stage(name, (loops.Cost(wall / 1000, spent[name] / 1000),)) for name, wall in walls.items()),
        Rule((), beside) if cuda else Rule((network, "decode"), ("read",), 2),
        waiting,
    )


@pytest.mark.parametrize(
    ("cuda", "walls", "limit", "bottleneck", "advice"),
    [
        (False, {}, 100, "forward", "--precision bf16, --compile, or another --batch than 32"),
        (False, {"decode": 12}, 50, "decode", "maxact pack"),
        (False, {"read": 20}, 50, "read", "--readers than 16"),
        (False, {"read": 9}, 100, "forward", "--sweep"),  # beside the others it takes no time of theirs
        (False, {"taps": 18}, 100, "taps", "fewer --layers"),
        (False, {"heaps": 9}, 100, "heaps", "smaller --top"),
        (False, {"compiled forward": 7, "taps": 8}, 111.1, "compiled forward", "1.14 times"),
        (True, {}, 125, "forward", "--precision fp16"),
        (True, {"decode": 12}, 83.3, "decode", "--decode-threads than 2"),
        (True, {"copy": 10}, 100, "copy", "dali"),
        (True, {"taps": 9}, 125, "taps", "--compile"),
        (True, {"read": 20}, 50, "read", "nearer"),
        (True, {"heaps": 20}, 125, "heaps", "--top"),
    ],
)
def test_bottleneck(cuda: bool, walls: dict[str, float], limit: float, bottleneck: str, advice: str) -> None:
    usual = {"read": 1.0, "decode": 2.0, "forward": 8.0, "taps": 8.3, "heaps": 0.1, "scan": 25.0}
    order = [name for name in (*STAGES[:3], "copy", "compiled forward", *STAGES[3:]) if name in usual | walls]
    found = made({name: (usual | walls)[name] for name in order}, cuda=cuda)
    assert found.limit == pytest.approx(limit, rel=1e-3)
    assert found.share == pytest.approx(1000 / 25 / found.limit)
    assert found.bottleneck == bottleneck
    assert any(advice in words for words in found.advice)


WALLS = {"read": 1.0, "decode": 2.0, "forward": 8.0, "taps": 8.3, "heaps": 0.1, "scan": 12.5}


@pytest.mark.parametrize(
    ("cpus", "limit", "parts", "bottleneck"),
    [
        ({}, 100.0, {"forward": 8.0, "decode": 2.0}, "forward"),  # both fill both cores: 2 / (16 + 4 ms)
        ({"decode": 2.0}, 1000 / 9, {"forward": 8.0, "decode": 1.0}, "forward"),  # 2 / (16 + 2)
        # the network on one core and the decoder on the other: (8 + 2) / 2 ms, but no faster than the network alone
        ({"forward": 8.0, "decode": 2.0, "taps": 8.3}, 125.0, {"forward": 8.0}, "forward"),
        ({"forward": 13.0, "decode": 4.0}, 1000 / 8.5, {"forward": 6.5, "decode": 2.0}, "forward"),
    ],
)
def test_limit_where_cores_are_left(
    cpus: dict[str, float], limit: float, parts: dict[str, float], bottleneck: str
) -> None:
    """Worked out by hand: what stages that share the cores leave of them others can have."""
    found = made(WALLS, cpus=cpus)
    assert found.limit == pytest.approx(limit)
    assert {name: 1000 * seconds for name, seconds in found.parts.items()} == pytest.approx(parts)
    assert found.share == pytest.approx(80 / limit) and found.bottleneck == bottleneck


def test_a_stage_alone_can_be_the_limit() -> None:
    """A decoder on one core that is slower than the network: the cores have time for both."""
    found = made(WALLS | {"decode": 10.0}, cpus={"decode": 10.0, "forward": 8.0, "taps": 8.3})
    assert found.limit == pytest.approx(100) and found.bottleneck == "decode"
    assert found.parts == pytest.approx({"decode": 0.01})
    # what each needs of the cores counts, not how long it takes on the clock by itself
    found = made(WALLS | {"decode": 9.0}, cpus={"decode": 9.0})
    assert found.limit == pytest.approx(2000 / 25) and found.bottleneck == "forward"


def test_cuda_stages_go_on_side_by_side() -> None:
    """However much CPU time they take."""
    found = made(WALLS, cuda=True, cpus={"forward": 100.0, "decode": 100.0})
    assert found.limit == pytest.approx(125) and not any("cores busy" in words for words in found.advice)


def test_cores_busy() -> None:
    found = made(WALLS, cpus={"forward": 10.0, "decode": 2.0})
    columns, rows = found.rows()
    shown = {row[0]: row[columns.index("cores busy")] for row in rows}
    assert shown == {"read": 2.0, "decode": 1.0, "forward": 1.25, "taps": 2.0, "heaps": 2.0, "scan": 2.0}
    facts = {stage["name"]: stage["cores busy"] for stage in found.to_json()["stages"]}
    assert facts["forward"] == pytest.approx(1.25)
    words = (
        "keeps 1.2 of 2 cores busy: unless something else runs here, try a larger --batch than 32, `--devices cpu:2`"
    )
    assert any(words in advice for advice in found.advice)
    assert any("keeps 1.6 of" in advice for advice in made(WALLS, cpus={"forward": 12.7}).advice)
    assert not any("cores busy" in advice for advice in made(WALLS, cpus={"forward": 12.9}).advice)


def test_the_share_is_that_of_rounds() -> None:
    """A machine that is twice as slow in one round: its stages are, too, so nothing is to be seen in the shares."""
    pace = {"forward": 8, "decode": 2, "read": 1, "taps": 8, "heaps": 1, "scan": 12.5}
    speeds = [(1, 1.0), (2, 1.1), (4, 0.9)]  # of the machine, and of the scan besides
    stages_ = tuple(
        Stage(
            name,
            tuple(
                loops.Cost(ms * slow / 1000 * (scan if name == "scan" else 1), 2 * ms * slow / 1000)
                for slow, scan in speeds
            ),
        )
        for name, ms in pace.items()
    )
    found = replace(made(WALLS), stages=stages_)
    assert found.shares == pytest.approx((0.8, 0.8 / 1.1, 0.8 / 0.9)) and found.share == pytest.approx(0.8)
    assert found["scan"].spread == pytest.approx((1000 / 45, 80))
    assert "80% of the limit (73% to 89% in 3 rounds)" in found.lines()[1]
    columns, rows = found.rows()
    assert {row[0]: row[columns.index("least to most")] for row in rows}["forward"] == "31.2 to 125"
    assert found.to_json()["stages"][0]["least and most"] == pytest.approx([31.25, 125])


def test_bf16_is_no_advice_where_there_is_none() -> None:
    assert any("--precision bf16" in words for words in made(WALLS).advice)
    assert not any("bf16" in words for words in made(WALLS, bf16="no").advice)
    assert any("--precision fp16" in words for words in made(WALLS, cuda=True, bf16="no").advice)
    found = made(WALLS | {"compiled forward": 8.0}, bf16="no")
    assert any("scan's time: try another --batch than 32" in words for words in found.advice)


def test_waiting_is_said() -> None:
    walls = WALLS | {"scan": 15.0}
    assert not any("waits" in words for words in made(walls, 0.05).advice)
    assert any("40% of the time: try more --decode-threads than 2" in words for words in made(walls, 0.4).advice)
    assert any("--readers than 16" in words for words in made(walls | {"read": 5.0}, 0.4).advice)


# Trying settings


def test_sweep(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every choice of every part once, and a command line that scans as it says."""
    reports: list[tuple[int, int]] = []
    options = {"layers": ["3"], "resize": 40, "mean": (0.5, 0.5, 0.5), **SHORT, "rounds": 1}
    images = {"where": ["c*", "r*"], "sample": 8, "seed": 3, "limit": 6}
    options |= images | {"score": ["max", "mean"], "top": 4, "bottom": 2}
    found = bench("test_bench:plain", str(photos), sweep=True, report=lambda *report: reports.append(report), **options)
    first = found.points[0].setting
    assert first == Setting(4, 1, 1, 4, "fp32", False)
    parts = choices(first, torch.device("cpu"))
    tried = {name: tuple(dict.fromkeys(getattr(point.setting, name) for point in found.points)) for name in parts}
    assert {name: set(values) for name, values in tried.items()} == {
        name: {getattr(first, name), *values} for name, values in parts.items()
    }
    assert len(found.points) == 1 + sum(map(len, parts.values())) and all(point.rate for point in found.points)
    assert (len(found.points), len(found.points)) in reports and reports[-1][0] == reports[-1][1]
    columns, rows = found.tried()
    assert len(rows) == len(found.points) and len(columns) == len(rows[0]) and "hardware share" not in columns
    facts = found.to_json()
    assert json.loads(json.dumps(facts)) == facts and found.lines()[-1].endswith(found.exact or found.command)

    words = shlex.split(found.command)
    assert words[:5] == ["maxact", "scan", "test_bench:plain", str(photos), "STORE"]
    assert found.exact.split()[:5] in ([], words[:5])
    words[4] = str(tmp_path / "store.zarr")
    assert cli.main(words[1:]) == 0
    assert "6 of 6 images" in capsys.readouterr().out
    manifest = maxact.open(words[4]).manifest
    settings = manifest.settings
    assert images.items() <= manifest.images.items()
    assert {"scores": ["max", "mean"], "top": 4, "bottom": 2}.items() <= settings.items()
    chosen = best(found.points).setting
    assert (settings["batch"], settings["precision"], settings["compile"]) == (
        *(chosen.batch, chosen.precision, chosen.compile),
    )
    assert settings["layers"] == ["3"] and settings["decoder"] == "torchvision"


class Timed:
    """In place of trying a setting: how fast it is by its batch, the next of these rates every time."""

    def __init__(self, **rates: list[float | None]) -> None:
        self.rates = {int(name[1:]): iter(each) for name, each in rates.items()}
        self.order: list[int] = []

    def __call__(self, setting: Setting, job: Any, seconds: float) -> Point:
        self.order.append(setting.batch)
        rate = next(self.rates[setting.batch])
        return Point(setting, rate, None if rate else "no more")


FIRST = Setting(8, 2, 2, 4, "fp32", False)
TRIED = [
    Point(FIRST, 100.0),
    Point(replace(FIRST, batch=16), 150.0),
    Point(replace(FIRST, batch=32, precision="bf16"), 200.0),
    Point(replace(FIRST, batch=64), None, "out of memory"),
]


def again(monkeypatch: pytest.MonkeyPatch, timed: Timed, points: list[Point], rounds: int = 3) -> list[Point]:
    monkeypatch.setattr("maxact.sweep._try", timed)
    return [*sweeping.again(points, None, 1.0, rounds, lambda done, total: None)]  # type: ignore[arg-type]


def test_the_best_is_measured_again_beside_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn; what counts is the median of the rounds' ratios, not what the sweep had found."""
    timed = Timed(b8=[100, 200, 100], b16=[120, 240, 90], b32=[150, 320, 160])
    points = again(monkeypatch, timed, TRIED)
    assert timed.order == [8, 16, 32] * 3
    assert [point.again for point in points] == [(100, 200, 100), (120, 240, 90), (150, 320, 160), ()]
    assert [point.rate for point in points] == [100.0, 150.0, 200.0, None]
    assert sweeping.gains(points[0], points[2]) == [1.5, 1.6, 1.6]
    assert best(points) is points[2] and best(sweeping.of_one_precision(points)) is points[1]
    found = replace(made(WALLS), points=tuple(points))
    assert "the best setting that was tried is 1.60 times as fast as this one (1.50 to 1.60 in 3 rounds, in turn)" in (
        found.advice
    )
    assert "the best in fp32 is 1.20 times as fast as this one (0.90 to 1.20 in 3 rounds, in turn)" in found.advice
    columns, rows = found.tried()
    assert [row[columns.index("again")] for row in rows] == [100, 120, 160, None]
    assert "hardware share" not in columns


def test_what_was_luck_in_a_sweep_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(b8=[100, 100], b16=[101, 100], b32=[100, 102])
    points = again(monkeypatch, timed, TRIED, rounds=2)
    assert best(points) is points[0]
    words = "the best setting that was tried is this one; tried again, another was 1.01 times as fast as this one"
    assert any(said.startswith(words) for said in replace(made(WALLS), points=tuple(points)).advice)


def test_what_fails_when_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    points = again(monkeypatch, Timed(b8=[100, 100], b16=[150, 150], b32=[None, 200]), TRIED, rounds=2)
    assert points[2].rate is None and points[2].error == "no more" and best(points) is points[1]
    points = again(monkeypatch, Timed(b8=[None, 100], b16=[150, 150], b32=[200, 200]), TRIED, rounds=2)
    assert best(points) is points[2]
    said = replace(made(WALLS), points=tuple(points)).advice
    assert "the best setting that was tried runs where this one failed" in said


def test_nothing_is_tried_again_where_the_first_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed()
    assert again(monkeypatch, timed, [TRIED[0], TRIED[3]]) == [TRIED[0], TRIED[3]] and timed.order == []
    assert best([TRIED[0], TRIED[3]]) == TRIED[0]


def test_choices_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr("maxact.sweep.has_bf16", lambda: True)
    assert choices(FIRST, device)["precision"] == ("bf16",)
    monkeypatch.setattr("maxact.sweep.has_bf16", lambda: False)
    assert choices(FIRST, device)["precision"] == ()
    assert choices(replace(FIRST, precision="bf16"), device)["precision"] == ("fp32",)
    assert "bf16" in choices(FIRST, torch.device("cuda"))["precision"]


def test_what_is_scanned_is_what_is_measured(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which images, and what is kept of them."""
    jobs: list[Any] = []
    heaps = stages.heaps
    monkeypatch.setattr(stages, "heaps", lambda job, peaks: jobs.append(job) or heaps(job, peaks))
    monkeypatch.setattr("maxact.catalog.TOLD", 10)
    counts: list[int] = []
    chosen: dict[str, Any] = {"where": ["c*", "r*"], "sample": 5, "seed": 3, "limit": 4}
    kept: dict[str, Any] = {"score": ("max", "mean"), "top": 3, "bottom": 2}
    found = bench("tiny:network", photos, listed=counts.append, **chosen, **kept, **(SHORT | {"rounds": 1}))
    (job,) = jobs
    assert found.images == 4 and job.catalog.table.equals(Catalog.build(photos, **chosen).table) and counts == [10, 20]
    ends = {"top": 3, "bottom": 2}
    assert job.settings.kept() == {(score, end): k for score in ("max", "mean") for end, k in ends.items()}


def test_a_setting_that_fails_is_a_point(photos: Path) -> None:
    job = make_job(Picky(), Catalog.build(photos), preprocess=Preprocess(32, (32, 32)))
    points = {point.setting.batch: point for point in sweep(job, 0.02, lambda done, total: None)}
    assert points[16].rate is None and points[16].error == "OutOfMemory: out of memory with batches of 16"
    assert points[8].rate and points[8].error is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--batch", "8", "--threads", "2", "--decode-threads", "3", "--readers", "4", "--precision", "fp32"]),
        ({"compile": True}, ["--compile"]),
        ({"precision": "bf16"}, ["bf16", "--no-compile"]),
    ],
)
def test_options(options: dict[str, Any], words: list[str]) -> None:
    setting = replace(Setting(8, 2, 3, 4, "fp32", False), **options)
    found = setting.options(torch.device("cpu"))
    assert set(words) <= set(found)
    assert "--threads" not in setting.options(torch.device("cuda"))


# What cannot be


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rounds": 0}, UsageError, "rounds: expected at least 1"),
        ({"seconds": 0}, UsageError, "seconds: expected more than 0"),
        ({"seconds": float("nan")}, UsageError, "seconds"),
        ({"batch": 0}, UsageError, "batch"),
        ({"layers": ["conv9"]}, UsageError, "nothing in the network matches"),
        ({"devices": "nothing"}, UsageError, "devices"),
        ({"at": "nowhere"}, UsageError, "at"),
        ({"decoder": "nothing"}, UsageError, "decoder"),
        ({"top": 0}, UsageError, "top: expected 1"),
        ({"score": "least"}, UsageError, "scores"),
        ({"limit": 0}, UsageError, "limit must be at least 1"),
        ({"where": "nowhere"}, MaxactError, "nowhere"),
    ],
)
def test_bad_arguments(photos: Path, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        bench("tiny:network", photos, **(SHORT | options))
    assert "\n" not in str(caught.value)


def test_one_network_at_a_time() -> None:
    with pytest.raises(UsageError, match="bench measures one network at a time, got 'alexnet,vgg16'"):
        bench("alexnet,vgg16", "nowhere")


@pytest.mark.parametrize("data", [b"", b"no picture"])
def test_no_image_can_be_used(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "one.jpg").write_bytes(data)
    with pytest.raises(MaxactError, match="not one of the images that were tried could be used") as caught:
        bench("tiny:network", tmp_path, **SHORT)
    assert "\n" not in str(caught.value)
