"""The command line: exit codes, one line for every mistake, what is printed where."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import tiny
from maxact import cli, demo
from maxact.decode import native_stderr
from maxact.store import Store
from stores import ARGUMENTS, Child, command, names


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*arguments: object) -> Result:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What works


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from maxact.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'numba', 'zarr', 'pyarrow', 'rich', 'PIL', 'nvidia.dali'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""
    for name in ("layers", "scan", "export", "info", "demo"):
        assert re.search(rf"^    {name} ", done.stdout, re.MULTILINE)


def test_the_installed_command() -> None:
    script = Path(sys.executable).with_name("maxact")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"maxact {importlib.metadata.version('maxact')}\n"


@pytest.mark.parametrize("name", ["layers", "scan", "export", "info", "demo"])
def test_every_command_has_help(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert done.code == 0 and done.err == "" and f"usage: maxact {name}" in done.out


def test_scan_info_export(run: Run, photos: Path, inside: Path) -> None:
    done = run("scan", "tiny:network", photos, "x.zarr", *ARGUMENTS, "--score", "max", "--score", "mean", "--bottom", 2)
    assert done.code == 0
    assert done.out == "x.zarr: 21 of 21 images; 3 taps, 18 channels (`maxact info x.zarr` says more)\n"
    start, end = done.err.splitlines()
    assert " tiny:network (weights as tiny:network returns them), 3 taps with 18 channels, 21 images, fp32 on" in start
    assert " 21 of 21 images, " in end

    again = run(
        "scan", "tiny:network", photos, "x.zarr", *ARGUMENTS, "--score", "max", "--score", "mean", "--bottom", 2
    )
    assert (again.code, again.out) == (0, done.out)
    assert again.err.endswith(" x.zarr: done already, 21 images\n") and again.err.count("\n") == 1

    info = run("info", "x.zarr")
    assert info.code == 0 and info.err == ""
    assert "bn2" in info.out and re.search(r"^finished +true$", info.out, re.MULTILINE)
    facts = json.loads(run("info", "--json", "x.zarr").out)
    assert facts["finished"] is True and [tap["tap"] for tap in facts["taps"]] == ["bn1", "bn2", "fc"]

    exported = run("export", "x.zarr", "x.parquet")
    assert (exported.code, exported.err) == (0, "")
    assert exported.out == f"x.parquet: {2 * 7 * 18} rows\n"
    assert pq.read_table("x.parquet").num_rows == 2 * 7 * 18
    assert names(inside) == {"x.zarr", "x.parquet"}


def test_quiet(run: Run, photos: Path, inside: Path) -> None:
    assert run("scan", "tiny:network", photos, "x.zarr", *ARGUMENTS, "--quiet") == Result(0, "", "")
    assert run("scan", "tiny:network", photos, "x.zarr", *ARGUMENTS, "--quiet") == Result(0, "", "")


def test_settings_arrive(run: Run, photos: Path, inside: Path) -> None:
    words = "--where c* --where r* --sample 5 --seed 3 --limit 4 --layers bn* --layers fc --at module --resize 40"
    words += " --crop 24x20 --interpolation bicubic --fit squash --mean .1 .2 .3 --std .4 .5 .6 --decoder torchvision"
    words += " --max-megapixels 3 --skip-grey --pooled mean --precision bf16 --device cpu --max-bad 3"
    assert run("scan", "tiny:network", photos, "x.zarr", *ARGUMENTS, *words.split()).code == 0
    manifest = Store("x.zarr").manifest
    assert manifest.images == {
        "source": str(photos),
        "where": ["c*", "r*"],
        "sample": 5,
        "seed": 3,
        "limit": 4,
        "count": 4,
    }
    wanted = {
        "layers": ["bn*", "fc"],
        "at": "module",
        "scores": ["max"],
        "top": 5,
        "bottom": 0,
        "precision": "bf16",
        "batch": 2,
        "shard": 4,
        "decoder": "torchvision",
        "max_megapixels": 3.0,
        "skip_grey": True,
        "compile": False,
        "hardware_share": None,
        "pooled": "mean",
    }
    assert manifest.settings == wanted
    preprocessing = {"resize": 40, "crop": [24, 20], "interpolation": "bicubic", "fit": "squash"}
    assert preprocessing.items() <= manifest.preprocessing.items()
    assert manifest.preprocessing["std"] == [0.4, 0.5, 0.6]
    assert set(Store("x.zarr").catalog.table["label"].to_pylist()) <= {"chelsea", "coffee", "rocket"}


def test_several_sources(run: Run, photos: Path, inside: Path) -> None:
    assert run("scan", "tiny:network", photos / "ihc", photos / "coffee", "x.zarr", *ARGUMENTS).code == 0
    assert Store("x.zarr").manifest.images["source"] == [str(photos / "ihc"), str(photos / "coffee")]


def test_weights_from_a_file(run: Run, photos: Path, inside: Path) -> None:
    safetensors.torch.save_file(tiny.network().state_dict(), "w.safetensors")
    done = run("scan", "tiny:network", photos, "x.zarr", *ARGUMENTS, "--weights", "w.safetensors", "--limit", 2)
    assert done.code == 0 and "(weights file w.safetensors)" in done.err


def test_layers(run: Run) -> None:
    done = run("layers", "resnet18", "--weights", "none")
    assert done.code == 0 and done.err == ""
    *table, last = done.out.splitlines()
    assert last == "21 taps, 5,800 channels; weights none (random); input 224 x 224"
    rows = [re.split(r"[\s│]+", line.strip("│ ")) for line in table if "│" in line]
    assert ["bn1", "conv1", "Conv2d", "64", "112", "x", "112", "7", "x", "7", "2", "x", "2"] in rows
    # the fields of the two ways to a downsample: 11 by the pool, and it sees every other unit of that
    down = ["layer2.0.downsample.1", "layer2.0.downsample.0", "Conv2d", "128", "28", "x", "28"]
    assert [*down, "43", "x", "43", "8", "x", "8"] in rows
    assert ["fc", "fc", "Linear", "1,000", "1", "x", "1", "whole", "input"] in rows
    some = run("layers", "resnet18", "--weights", "none", "--layers", "layer4.*.conv?", "--at", "module", "--crop", 64)
    assert some.out.splitlines()[-1] == "4 taps, 2,048 channels; weights none (random); input 64 x 64"


def test_drawing_a_field(run: Run, photos: Path, inside: Path) -> None:
    done = run("layers", "tiny:network", "--crop", 64, "--draw", "bn1", "--image", photos, "--out", "one.png")
    assert (done.code, done.err) == (0, "") and done.out.startswith("one.png: the field of the unit in row ")
    assert run("layers", "tiny:network", "--crop", 64, "--draw", "bn1").code == 0
    with Image.open("one.png") as one, Image.open("field.png") as blank:
        assert one.size == blank.size and one.tobytes() != blank.tobytes()
    wrong = run("layers", "tiny:network", "--draw", "bn7")
    assert wrong.code == 2 and "draw: tiny:network has no tap 'bn7' (near: bn" in wrong.err


def test_project_and_render(run: Run, photos: Path, inside: Path) -> None:
    assert run("scan", "tiny:network", photos, "x.zarr", *ARGUMENTS, "--quiet").code == 0
    early = run("render", "x.zarr", "site")
    assert early.code == 1 and early.err.count("\n") == 1 and "project" in early.err
    done = run("project", "x.zarr", "--channels", "0-2,5", "--ranks", 3, "--method", "guided", "--method", "gradient")
    assert (done.code, done.out) == (0, "x.zarr: projected (`maxact render x.zarr OUT` shows it)\n")
    winners = Store("x.zarr").winners("bn1")
    assert winners.projected().nonzero()[0].tolist() == [0, 1, 2, 5]
    assert (winners.layout.shown, winners.layout.methods) == (3, ("guided", "gradient"))
    other = run("project", "x.zarr", "--ranks", 4)
    assert other.code == 1 and "was projected otherwise (ranks: 3, not 4; methods: " in other.err
    site = run("render", "x.zarr", "site", "--layers", "bn1")
    assert site.code == 0 and site.out == "site/index.html\n" and re.search(r"\d+ channels, about ", site.err)
    sheets = run("render", "x.zarr", "sheets", "--mosaic", "--filters", "--channels", 5, "--quiet")
    assert (sheets.code, sheets.out) == (0, "")
    assert {"filters.png", "bn1-crops-01.png", "bn1-projections-01.png", "bn1-5.png"} <= names(inside / "sheets")
    assert run("render", "x.zarr", "print", "--mosaic", "--format", "pdf", "--across", 4, "--layers", "bn1").code == 0
    assert names(inside / "print") == {"bn1-across-crops.pdf", "bn1-across-projections.pdf"}
    for words, said in (
        (("--channels", "3-1"), "channels: expected a range from low to high"),
        (("--layers", "bn7"), "layers: x.zarr has no tap that matches 'bn7'; close to it: bn"),
        (("--label-names", "nowhere.txt"), "nowhere.txt"),
    ):
        wrong = run("render", "x.zarr", "site", *words)
        assert wrong.code in (1, 2) and said in wrong.err and wrong.err.count("\n") == 1


def test_info_of_a_store_with_errors(run: Run, photos: Path, inside: Path) -> None:
    shutil.copytree(photos, "photos")
    for path in sorted(Path("photos").rglob("*.jpg"))[:2]:
        path.write_bytes(b"no image")
    done = run("scan", "tiny:network", "photos", "x.zarr", *ARGUMENTS)
    assert done.code == 0 and "19 of 21 images, 2 bad; 3 taps" in done.out
    assert done.err.splitlines()[-1].endswith(", 2 bad")
    info = run("info", "x.zarr")
    assert "bad images" in info.out and "astronaut/000.jpg" in info.out and "decode" in info.out


def test_bench(run: Run, photos: Path, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for arrives, and what is found is written where it is to be."""
    module = importlib.import_module("maxact.bench")
    given: dict[str, Any] = {}
    measure = module.bench
    monkeypatch.setattr(module, "bench", lambda *words, **options: given.update(options) or measure(*words, **options))
    words = (
        "--where c* --where r* --sample 5 --seed 3 --limit 4 --score mean --score max --top 7 --bottom 2 --layers bn*"
    )
    words += " --batch 2 --threads 1 --rounds 2 --seconds .05 --quiet --json x.json --picture x.png"
    done = run("bench", "tiny:network", photos, *words.split())
    assert (done.code, done.err) == (0, "") and "in 2 rounds" in done.out and "cores busy" in done.out
    wanted = {
        "where": ["c*", "r*"],
        "sample": 5,
        "seed": 3,
        "limit": 4,
        "score": ["mean", "max"],
        "top": 7,
        "bottom": 2,
    }
    assert wanted.items() <= given.items() and given["layers"] == ["bn*"]
    assert names(inside) == {"x.json", "x.png"} and json.loads(Path("x.json").read_text())["images"] == 4


@pytest.mark.parametrize("option", ["--json", "--picture"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("gone/x", "No such file or directory"),
        ("file/x", "Not a directory"),
        ("folder", "Is a directory"),
        ("", "Is a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_bench_tries_places_first(run: Run, inside: Path, option: str, place: str, reason: str) -> None:
    """Not after minutes of measuring: what would be measured is not even there."""
    Path("folder").mkdir()
    Path("file").touch()
    done = run("bench", "tiny:network", "nowhere", option, place)
    assert done.code == 2 and done.out == "" and names(inside) == {"folder", "file"}
    assert done.err == f"maxact: {option}: {place} cannot be written ({reason}); choose another place\n"


def test_bench_leaves_nothing_where_it_tries(run: Run, inside: Path) -> None:
    Path("old.json").write_text("old")
    done = run("bench", "tiny:network", "nowhere", "--json", "old.json", "--picture", "new.png")
    assert done.code == 1 and "nowhere" in done.err
    assert names(inside) == {"old.json"} and Path("old.json").read_text() == "old"


def test_demo(run: Run, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few tiles and a small network, of which one channel has no number."""

    def network() -> nn.Module:
        built = tiny.network()
        built.get_parameter("bn1.bias").data[0] = torch.nan
        return nn.Sequential(built.conv1, built.bn1)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "PHOTOGRAPHS", ("chelsea.png",))
    monkeypatch.setattr(demo, "_PARTS", (1,))
    monkeypatch.setattr(demo, "MOSAICS", ("1",))
    monkeypatch.setattr(demo, "network", network)
    done = run("demo", "out", "--quiet")
    assert done.code == 0, done.err
    row = next(line for line in done.out.splitlines() if "chelsea/" in line)
    assert "Conv2d" in row and "nan" not in row
    assert names(inside / "out") == {"tiles", "demo.zarr", "gallery", "mosaic"}
    drawn = sorted((inside / "out" / "mosaic").iterdir())[0]
    drawn.unlink()
    drawn.mkdir()
    again = run("demo", "out", "--quiet")
    assert again.code == 1
    assert again.err.splitlines()[-1].startswith("maxact: out/mosaic: cannot be written (Is a directory)")


# Mistakes


def mistakes() -> dict[str, tuple[list[str], int, str]]:
    """What is given, the exit code, and what the line says. PHOTOS stands for the photographs."""
    scan = ["scan", "tiny:network", "PHOTOS", "x.zarr"]
    return {
        "no command": ([], 2, "COMMAND"),
        "unknown command": (["scam"], 2, "scam"),
        "too few": (["scan", "resnet18"], 2, "IMAGES, STORE"),
        "unknown option": ([*scan, "--tpo", "3"], 2, "unrecognized arguments: --tpo"),
        "no number": ([*scan, "--top", "many"], 2, "argument --top: invalid int value: 'many'"),
        "bad crop": ([*scan, "--crop", "3x"], 2, "argument --crop: expected pixels as N or HxW, got '3x'"),
        "worse crop": ([*scan, "--crop", "big"], 2, "argument --crop: expected pixels as N or HxW, got 'big'"),
        "bad score": ([*scan, "--score", "median"], 2, "argument --score: invalid choice: 'median'"),
        "top 0": ([*scan, "--top", "0"], 2, "top: expected 1 to 100,000, got 0"),
        "batch 0": ([*scan, "--batch", "0"], 2, "batch: expected 1 to 65,536, got 0"),
        "devices": ([*scan, "--devices", "gpu"], 2, "devices: expected auto, cpu, cpu:COUNT, cuda"),
        "limit": ([*scan, "--limit", "0"], 2, "limit must be at least 1, not 0"),
        "std": ([*scan, "--std", "0", "1", "1"], 2, "std: expected three numbers above 0"),
        "unknown model": (["layers", "resnet81"], 2, "unknown network 'resnet81' (near: resnet18"),
        "unknown module": (["layers", "nowhere:network"], 2, "nowhere:network: cannot import nowhere"),
        "unknown callable": (["layers", "tiny:netwrok"], 2, "tiny has no netwrok (near: network)"),
        "unknown layer": ([*scan, "--layers", "conv3"], 2, "conv3"),
        "near misses": ([*scan, "--layers", "bn3"], 2, "bn2, bn1"),
        "unknown weights": (["layers", "resnet18", "--weights", "V9"], 2, "V9"),
        "missing weights": (["layers", "resnet18", "--weights", "w.pth"], 1, "w.pth"),
        "bad weights": (["layers", "resnet18", "--weights", "bad.pth"], 1, "bad.pth"),
        "other weights": (
            ["layers", "tiny:network", "--weights", "other.safetensors"],
            1,
            "13 missing: conv1.weight, ",
        ),
        "missing images": (["scan", "tiny:network", "nowhere", "x.zarr"], 1, "nowhere"),
        "no images": (["scan", "tiny:network", "empty", "x.zarr"], 1, "empty"),
        "no label": ([*scan, "--where", "giraffe"], 1, "no label matches giraffe; of 7 labels the first are 'astro"),
        "no store": (["info", "nowhere"], 1, "nowhere: not a maxact store (make one with `maxact scan`)"),
        "no store to export": (["export", "empty", "x.parquet"], 1, "empty: not a maxact store"),
        "a file in the way": (["scan", "tiny:network", "PHOTOS", "bad.pth"], 1, "bad.pth: is a file, not a folder"),
        "grey": (
            [*scan, "--skip-grey", "--preprocess", "tiny:network"],
            2,
            "skip_grey: cannot be had with the preprocess function tiny:network; leave one out",
        ),
        "the user's own list": (["scan", "tiny:network", "PHOTOS", "data"], 1, "data: there is something else here"),
        "a demo in a file": (["demo", "bad.pth", "--quiet"], 1, "bad.pth/tiles: cannot be written (Not a directory)"),
        "no store to project": (["project", "empty"], 1, "empty: not a maxact store"),
        "no store to render": (["render", "empty", "site"], 1, "empty: not a maxact store"),
        "a folder in the way": ([*scan[:3], "full", "--overwrite"], 1, "full: there is something else here"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_one_line(run: Run, photos: Path, inside: Path, name: str) -> None:
    words, code, said = mistakes()[name]
    (inside / "empty").mkdir()
    (inside / "full").mkdir()
    (inside / "full" / "thesis.tex").write_text("x")
    (inside / "data").mkdir()
    (inside / "data" / "images.parquet").write_bytes(b"of the user")
    (inside / "bad.pth").write_bytes(b"no weights")
    safetensors.torch.save_file({"fc.weight": tiny.network().fc.weight.data}, "other.safetensors")  # type: ignore[union-attr, dict-item]
    before = names(inside)
    done = run(*(str(photos) if word == "PHOTOS" else word for word in words))
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("maxact: ") and done.err.count("\n") == 1, done.err
    assert said in done.err
    assert names(inside) == before


def test_other_settings_and_too_many_bad_images_are_one_line(run: Run, photos: Path, inside: Path) -> None:
    shutil.copytree(photos, "photos")
    for path in sorted(Path("photos").rglob("*.jpg"))[:6]:
        path.write_bytes(path.read_bytes()[:-2])
    scan = ("scan", "tiny:network", "photos", "x.zarr", *ARGUMENTS)
    failed = run(*scan, "--max-bad", 2, "--quiet")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.count("\n") == 1 and "that --max-bad allows (astronaut/" in failed.err
    assert run(*scan, "--quiet") == Result(0, "", "")
    other = run(*scan, "--bottom", 1)
    assert other.code == 1 and other.out == ""
    assert other.err.startswith("maxact: x.zarr: was made otherwise (bottom: 0, not 1); ")
    assert other.err.count("\n") == 1


def test_nobody_reads_on(photos: Path, finished: Store) -> None:
    """`maxact info STORE | head -1`"""
    script = Path(sys.executable).with_name("maxact")
    piped = f"{script} info {finished.path} --json | head -1"
    done = subprocess.run(piped, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_interrupted_before_it_begins(photos: Path, tmp_path: Path) -> None:
    child = command("scan", "tiny:interrupted", photos, tmp_path / "x.zarr")
    assert child.wait() == 128 + signal.SIGINT
    assert (child.out, child.err) == ("", "maxact: stopped; what was committed is kept\n")


# Names


def test_names_that_are_not_utf_8(photos: Path, tmp_path: Path) -> None:
    """Folders, files and the store itself, from end to end, through a command line of its own."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder + b"/\xff\xfe")
    originals = sorted(photos.rglob("*.jpg"))[:3]
    for name, path in zip(
        (b"/one.jpg", b"/\xff\xfe/tw\xf6.jpg", b"/\xff\xfe/new\nline\x1b[31m.jpg"), originals, strict=True
    ):
        shutil.copyfile(path, folder + name)
    store = os.fsdecode(folder + b".zarr")
    done = command("scan", "tiny:network", os.fsdecode(folder), store, *ARGUMENTS)
    assert done.wait() == 0, done.err
    assert done.out.startswith(f"{tmp_path}/caf\\udce9.zarr: 3 of 3 images")
    info = command("info", store, "--json")
    assert info.wait() == 0, info.err
    assert json.loads(info.out)["images"]["source"].endswith("caf\\udce9")
    export = command("export", store, os.fsdecode(folder + b".parquet"))
    assert export.wait() == 0, export.err
    with open(folder + b".parquet", "rb") as file:
        keys = sorted(set(pq.read_table(file)["key"].to_pylist()))
    assert len(keys) == 3 and all(key.isprintable() for key in keys)
    with open(folder + b"/\xff\xfe/tw\xf6.jpg", "ab") as file:
        file.write(b"\0")
    bad = command("scan", "tiny:network", os.fsdecode(folder), store, *ARGUMENTS, "--overwrite")
    assert bad.wait() == 0, bad.err
    again = command("scan", "tiny:network", os.fsdecode(folder), store, *ARGUMENTS, "--top", "9")
    assert again.wait() == 1
    assert again.err.count("\n") == 1 and "was made otherwise (top: 5, not 9)" in again.err


# What C libraries print


def test_the_noise_of_libraries_goes_to_the_log(run: Run, photos: Path, inside: Path) -> None:
    shutil.copytree(photos, "photos")
    for path in sorted(Path("photos").rglob("*.jpg"))[:3]:
        path.write_bytes(path.read_bytes()[:-2])
    done = run("scan", "tiny:network", "photos", "x.zarr", *ARGUMENTS, "--decoder", "dali")
    assert done.code == 0
    assert len(done.err.splitlines()) == 2
    log = (inside / "x.zarr" / "run" / "log").read_text()
    assert "ERROR" in log  # nvImageCodec's own account of them
    assert "tiny:network (weights" in log and "21 of 21 images" in log


def crash(folder: Path) -> int:
    """A C library that takes the process down, in the middle of a run."""
    import ctypes

    with open(folder / "log", "wb") as log, native_stderr(log.fileno()):
        libc: Any = ctypes.CDLL(None)
        libc.perror(b"last words")
        libc.abort()
    return 0


def test_a_crash_is_not_silent(tmp_path: Path) -> None:
    from functools import partial

    child = Child(partial(crash, tmp_path))
    assert child.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in child.err and "in crash" in child.err
    assert b"last words" in (tmp_path / "log").read_bytes()
