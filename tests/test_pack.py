"""Packs: the same images, smaller, in archives that are images themselves; whatever happened on the way, the same."""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.transforms import v2

from maxact import packed, repack, schedule
from maxact.archives import printable, tar_rows
from maxact.catalog import Catalog, Entry
from maxact.decode import make_decoder
from maxact.errors import MaxactError, UsageError
from maxact.fetch import Unreadable
from maxact.manifest import shorten
from maxact.pack import pack
from maxact.preprocess import Preprocess
from maxact.process import Progress
from maxact.sources import IMAGES
from stores import Child, die_at, scan, wait_for
from support import Pictures, photograph

SETTINGS: dict[str, Any] = {"short_side": 32, "shard_images": 4, "workers": 2, "readers": 4}


def run(images: object, out: Path, **settings: Any) -> dict[str, Any]:
    return pack(images, out, **(SETTINGS | settings))


def files(out: Path) -> dict[str, bytes]:
    """Every file of a pack but what `run/` holds."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def same_images(out: object, images: object) -> None:
    """Keys and labels, in order."""
    found, wanted = Catalog.build(out).table, Catalog.build(images).table
    assert found["key"].to_pylist() == wanted["key"].to_pylist()
    assert found["label"].to_pylist() == wanted["label"].to_pylist()


def opened(images: object) -> dict[str, Image.Image]:
    """The pictures of a catalog by their keys."""
    catalog = Catalog.build(images)
    pictures = {}
    for entry in catalog.entries(0, len(catalog)):
        data = catalog.read(entry)
        assert isinstance(data, bytes)
        pictures[entry.key] = Image.open(io.BytesIO(data))
    return pictures


def refused(words: str, call: Callable[[], object], kind: type[MaxactError] = MaxactError) -> None:
    with pytest.raises(MaxactError) as caught:
        call()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


class TestPictures:
    def test_sizes_and_pixels_are_torchvisions(self, photos: Path, tmp_path: Path) -> None:
        summary = run(photos, tmp_path / "out")
        assert summary == {
            "images": 21,
            "packed": 21,
            "bad": 0,
            "archives": 6,
            "bytes": sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar")),
        }
        originals, made = opened(photos), opened(tmp_path / "out")
        assert list(originals) == list(made)
        fit = v2.Resize(32, v2.InterpolationMode.BILINEAR, antialias=True)
        for key, picture in originals.items():
            wanted = fit(picture.convert("RGB"))
            assert made[key].format == "JPEG" and made[key].size == wanted.size
            # JPEG at quality 95 with colour at half the resolution, which averages four pixels
            luma = [np.asarray(each.convert("L"), int) for each in (made[key], wanted)]
            assert np.abs(luma[0] - luma[1]).mean() < 3

    def test_better_quality_is_closer(self, photos: Path, tmp_path: Path) -> None:
        sizes = [run(photos, tmp_path / str(quality), quality=quality)["bytes"] for quality in (50, 95)]
        assert sizes[0] < sizes[1]

    def test_none_is_enlarged(self, tmp_path: Path) -> None:
        folder = tmp_path / "in" / "x"
        folder.mkdir(parents=True)
        small = photograph(1, 20)
        small.save(folder / "a.jpg", quality=80, comment=b"kept as it is")
        small.save(folder / "b.png")
        small.convert("CMYK").save(folder / "c.jpg")
        photograph(2, 32).save(folder / "d.jpg")  # exactly as large
        run(tmp_path / "in", tmp_path / "out")
        catalog = Catalog.build(tmp_path / "out")
        read = {entry.key: catalog.read(entry) for entry in catalog.entries(0, 4)}
        for name in "acd":
            assert read[f"x/{name}.jpg"] == (folder / f"{name}.jpg").read_bytes()
        png = opened(tmp_path / "out")["x/b.png"]
        assert png.format == "JPEG" and png.size == small.size

    def test_odd_pictures_have_the_pixels_that_a_scan_decodes(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        picture = photograph(3, 64)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        picture.save(folder / "exif.jpg", quality=95, exif=exif, comment=b"x" * 500)
        picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
        picture.convert("L").save(folder / "grey.jpg", quality=95)
        picture.convert("P").save(folder / "palette.png")
        picture.convert("RGBA").save(folder / "alpha.png")
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
        picture.save(folder / "named.jpg", format="WEBP", lossless=True)
        assert run(folder, tmp_path / "out")["bad"] == 0
        batches = []
        for source in (folder, tmp_path / "out"):
            catalog = Catalog.build(source)
            decoder = make_decoder("torchvision", Preprocess(32, (32, 32)), batch=7, threads=1)
            decoder.submit([catalog.read(entry) for entry in catalog.entries(0, 7)])
            decoded = decoder.collect()
            decoder.close()
            assert not decoded.errors
            batches.append(decoded.images.float().mean(-1))
        assert (batches[0] - batches[1]).abs().mean((1, 2)).max() < 4
        assert all(not made.getexif() and "comment" not in made.info for made in opened(tmp_path / "out").values())

    def test_bad_files_are_those_of_a_scan(self, photos: Path, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        shutil.copytree(photos, folder)
        paths = sorted(folder.rglob("*.jpg"))
        paths[1].write_bytes(paths[1].read_bytes()[:-2])
        paths[6].write_bytes(b"")
        paths[7].write_bytes(b"<html>")
        Image.new("RGB", (700, 700)).save(paths[8])
        paths[9].unlink()
        paths[9].symlink_to("nowhere")
        store = scan(folder, tmp_path / "store", decoder="torchvision", max_megapixels=0.4)
        summary = run(folder, tmp_path / "out", max_megapixels=0.4)
        assert summary["bad"] == 5 and summary["packed"] == 16
        errors = pq.read_table(tmp_path / "out" / "errors.parquet")
        assert errors.schema == store.errors().schema
        assert errors.to_pylist() == store.errors().to_pylist()
        keys = Catalog.build(folder).table["key"].to_pylist()
        good = [key for key in keys if key not in errors["key"].to_pylist()]
        assert Catalog.build(tmp_path / "out").table["key"].to_pylist() == good

    def test_a_strip_that_is_too_long_for_a_jpeg(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        Image.new("RGB", (65_501, 2)).save(tmp_path / "in" / "a.png")
        photograph(0).save(tmp_path / "in" / "b.jpg")
        run(tmp_path / "in", tmp_path / "out", short_side=4)
        (error,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
        assert error["error"] == "65501 x 2 pixels: a JPEG has at most 65,500 on a side"

    def test_too_many_bad_files(self, photos: Path, tmp_path: Path) -> None:
        shutil.copytree(photos, tmp_path / "in")
        for path in sorted((tmp_path / "in").rglob("*.jpg"))[5:8]:
            path.write_bytes(b"no picture")
        refused(
            "3 images are bad, more than the 2 that --max-bad allows",
            lambda: run(tmp_path / "in", tmp_path / "out", max_bad=2),
        )
        assert run(tmp_path / "in", tmp_path / "out", max_bad=3)["bad"] == 3

    def test_nothing_but_bad_files(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "x.jpg").write_bytes(b"GIF89a")
        refused("not one of the 1 images", lambda: run(tmp_path / "in", tmp_path / "out"))
        refused("unfinished", lambda: Catalog.build(tmp_path / "out"))

    def test_storage_that_has_gone(self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(photos, tmp_path / "in")
        reads = itertools.count()

        def fetch(catalog: Catalog, entry: Entry) -> object:
            if next(reads) == 9:
                (tmp_path / "in").rename(tmp_path / "away")
            return catalog.read(entry)  # without patience

        monkeypatch.setattr(repack, "fetch", fetch)
        monkeypatch.setattr(schedule, "PAUSES", (0.0,))
        refused("cannot be read", lambda: run(tmp_path / "in", tmp_path / "out", readers=1), Unreadable)
        assert 2 <= len(list((tmp_path / "out").glob("*.tar"))) < 6
        (tmp_path / "away").rename(tmp_path / "in")
        assert run(tmp_path / "in", tmp_path / "out")["packed"] == 21


class TestSources:
    def test_a_pack_has_the_keys_and_labels_of_its_source(self, photos: Path, tmp_path: Path) -> None:
        odd = tmp_path / "odd"
        for name in ("a/x.jpg", "a/x.png", "a/x.left.jpg", "b.c/.x/../y.jpg", "größe 猫/z\n.jpg", "back\\slash/n.jpg"):
            path = odd / name.replace("/.x/..", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(len(name)).save(path)
        shutil.copy(odd / "a" / "x.jpg", os.fsencode(odd) + b"/a/\xff.jpg")
        archive = tmp_path / "s.tar"
        with tarfile.open(archive, "w") as tar:
            for name, data in (
                ("1.jpg", None),
                ("1.cls", b"7"),
                ("../2.jpg", None),
                ("2.cls", b" cat\n"),
                ("d/3.jpg", None),
            ):
                content = data or (odd / "a" / "x.jpg").read_bytes()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        table = pa.table({"image": [(odd / "a" / "x.jpg").read_bytes()] * 5, "label": ["l/m", "", "é", "l/m", "."]})
        pq.write_table(table, tmp_path / "p.parquet")
        listing = tmp_path / "list.csv"
        listing.write_text("path,label\n" + "".join(f"{odd}/a/x.jpg,{label}\n" for label in ("u", "v", "", "a", "u")))
        for number, source in enumerate((odd, archive, tmp_path / "p.parquet", listing, [photos, archive, photos])):
            out = tmp_path / f"out{number}"
            assert run(source, out, shard_images=3)["bad"] == 0
            same_images(out, source)
            same_images(f"{out}/*.tar", source)
            same_images(f"{out}/{{000000..{len(list(out.glob('*.tar'))) - 1:06}}}.tar", source)
            # the same labels, and bytes at the same places, without the indexes
            indexed = Catalog.build(out).table
            plain = [row for path in sorted(out.glob("*.tar")) for row in tar_rows(os.fsencode(path), "", IMAGES)]
            assert [printable(row[1]) for row in plain] == [label.strip() for label in indexed["label"].to_pylist()]
            assert [row[3:5] for row in plain] == list(
                zip(indexed["offset"].to_pylist(), indexed["length"].to_pylist(), strict=True)
            )
            for path in out.glob("*.tar"):
                with tarfile.open(path) as tar:
                    check_convention(tar.getmembers())

    def test_a_selection(self, photos: Path, tmp_path: Path) -> None:
        which: dict[str, Any] = {"where": ["*a*"], "sample": 7, "seed": 3, "limit": 5}
        run(photos, tmp_path / "out", **which)
        wanted = Catalog.build(photos, **which).table
        assert Catalog.build(tmp_path / "out").table["key"].to_pylist() == wanted["key"].to_pylist()

    def test_a_dataset_of_pictures(self, tmp_path: Path) -> None:
        pictures = Pictures(6)
        assert run(pictures, tmp_path / "out")["packed"] == 6
        made = opened(tmp_path / "out")
        assert list(made) == [f"item/{number}" for number in range(6)]
        assert [min(picture.size) for picture in made.values()] == [32] * 6
        assert run(pictures, tmp_path / "out")["packed"] == 6

    def test_a_scan_takes_a_pack_and_tells(self, photos: Path, tmp_path: Path) -> None:
        run(photos, tmp_path / "out")
        store = scan(tmp_path / "out", tmp_path / "store")
        assert store.catalog.table["key"].to_pylist() == Catalog.build(photos).table["key"].to_pylist()
        (found,) = packed.describe(store.catalog.table)
        assert found["folder"] == str(tmp_path / "out")
        assert found["settings"] == {"short_side": 32, "quality": 95, "shard_images": 4, "max_megapixels": 200.0}
        assert found["images"]["source"] == str(photos) and found["images"]["count"] == 21
        assert found["versions"]["maxact"]
        assert packed.describe(Catalog.build(photos).table) == []
        # a pack of a pack, and beside other images
        run([tmp_path / "out", photos], tmp_path / "again")
        assert json.loads((tmp_path / "again" / "pack.json").read_text())["images"]["packed"] == [found]

    def test_folders_with_packs_in_them(self, photos: Path, tmp_path: Path) -> None:
        for name in "ab":
            run(photos, tmp_path / name, limit=5)
        assert len(Catalog.build(tmp_path)) == 10
        assert len(Catalog.build(f"{tmp_path}/a/*")) == 5
        assert len(Catalog.build([tmp_path / "a" / "000001.tar"])) == 1

    def test_archives_that_are_not_what_was_indexed(self, photos: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        run(photos, out)
        whole = files(out)
        with open(out / "000001.tar", "ab") as file:
            file.write(bytes(512))
        refused("000001.tar is not the archive that", lambda: Catalog.build(out))
        (out / "000001.tar").unlink()
        refused("unfinished pack", lambda: Catalog.build(out))
        assert len(Catalog.build(f"{out}/*.tar")) == 17
        assert run(photos, out)["packed"] == 21  # makes it again
        assert files(out) == whole
        (out / "000002.tar.index").write_bytes(b"PAR1")
        refused("000002.tar.index is damaged", lambda: Catalog.build(out))
        (out / "000002.tar.index").unlink()  # then it is an archive like any other
        keys = Catalog.build(out).table["key"].to_pylist()
        assert keys[7] == Catalog.build(photos).table["key"][7].as_py() and keys[8].startswith("000002.tar/")

    def test_a_file_of_somebody_else(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "pack.json").write_text('{"name": "other"}')
        (path,) = sorted(photos.rglob("*.jpg"))[:1]
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(path, "x.jpg")
        assert len(Catalog.build(tmp_path)) == 1
        refused("there is something else here", lambda: run(photos, tmp_path))


def check_convention(members: list[tarfile.TarInfo]) -> None:
    """WebDataset's: a sample's members stand together, named alike up to the first dot, no two samples alike."""
    samples: list[tuple[str, list[str]]] = []
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, kind = base.partition(".")
        assert stem and ".." not in member.name.split("/") and not member.name.startswith(("/", "."))
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        sample = f"{folder}/{stem}"
        if samples and samples[-1][0] == sample:
            samples[-1][1].append(kind)
        else:
            samples.append((sample, [kind]))
    assert all(kinds in (["jpg"], ["jpg", "cls"]) for _, kinds in samples)
    assert len({sample for sample, _ in samples}) == len(samples)


def _pack(photos: Path, out: Path, dies_at: int | None = None, seconds: float = 0) -> int:
    if dies_at is not None:
        die_at(dies_at)
    if seconds:
        smaller = repack.smaller

        def slowly(*arguments: Any) -> bytes:
            time.sleep(seconds)
            return smaller(*arguments)

        repack.smaller = slowly
    try:
        run(photos, out)
    except MaxactError as error:
        print(error)
        return error.exit_code
    return 0


class TestRuns:
    def test_killed_at_every_step(self, photos: Path, in_memory: Path) -> None:
        run(photos, in_memory / "whole")
        out, code, step = in_memory / "out", -1, 0
        while code:
            step += 8
            code = Child(partial(_pack, photos, out, step)).wait()
            assert code in (0, -signal.SIGKILL)
            if code and (out / "pack.json").exists():
                refused("unfinished pack", lambda: Catalog.build(out))
        assert step > 15
        assert files(out) == files(in_memory / "whole")
        assert {path.name for path in (out / "run").iterdir()} == {"catalog", "lock", "log"}

    def test_killed_in_the_middle(self, photos: Path, in_memory: Path) -> None:
        out = in_memory / "out"
        child = Child(partial(_pack, photos, out, None, 0.05))
        wait_for(lambda: (out / "000002.tar.index").exists())
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert 3 <= len(list(out.glob("*.tar.index"))) < 6
        before = (out / "000000.tar").stat().st_mtime_ns
        reports: list[Progress] = []
        run(photos, out, report=reports.append)
        assert reports[0].before >= 12 and reports[-1].before + reports[-1].done == 21
        assert (out / "000000.tar").stat().st_mtime_ns == before
        run(photos, in_memory / "whole")
        assert files(out) == files(in_memory / "whole")

    def test_killed_while_it_starts_again(self, photos: Path, in_memory: Path) -> None:
        run(photos, in_memory / "whole", quality=80)
        for step in range(1, 20, 5):
            out = in_memory / str(step)
            run(photos, out)
            whole = packed.read_pack(os.fsencode(out))
            child = Child(partial(_overwrite, photos, out, step))
            assert child.wait() == -signal.SIGKILL
            if packed.read_pack(os.fsencode(out)) == whole:  # not yet begun
                assert step == 1 and run(photos, out)["packed"] == 21
            else:
                run(photos, out, quality=80)
                assert files(out) == files(in_memory / "whole")

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_signals(self, signum: signal.Signals, photos: Path, in_memory: Path) -> None:
        out = in_memory / "out"
        child = Child(partial(_pack, photos, out, None, 0.05))
        wait_for(lambda: (out / "000001.tar.index").exists())
        child.kill(signum)
        assert child.wait() == 128 + signum
        assert child.out.startswith(f"stopped by {signum.name}: ") and "of 21 images are in whole archives" in child.out
        assert not list(out.glob(".*"))
        assert run(photos, out)["packed"] == 21

    def test_one_run_at_a_time(self, photos: Path, in_memory: Path) -> None:
        out = in_memory / "out"
        child = Child(partial(_pack, photos, out, None, 3600))
        wait_for((out / "pack.json").exists)
        refused(f"in use by process {child.process.pid}", lambda: run(photos, out))
        child.kill()
        child.wait()
        assert run(photos, out)["packed"] == 21

    def test_other_arguments_are_refused(self, photos: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        run(photos, out)
        whole = files(out)
        refused("short_side: 32, not 48", lambda: run(photos, out, short_side=48))
        refused("quality: 95, not 90; limit: null, not 3", lambda: run(photos, out, quality=90, limit=3))
        refused(f"source: {shorten(str(photos))}", lambda: run(sorted(photos.rglob("*.jpg")), out))
        run(photos, out, workers=1, readers=1, max_bad=0)  # these change nothing
        assert files(out) == whole
        assert run(photos, out, quality=90, limit=3, overwrite=True)["archives"] == 1
        assert len(Catalog.build(out)) == 3 and not (out / "000001.tar").exists()

    def test_places_that_are_no_packs(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        refused("is a file, not a folder", lambda: run(photos, tmp_path / "file"))
        refused("there is something else here", lambda: run(photos, photos))
        out = tmp_path / "out"
        run(photos, out)
        refused("holds images that are to be packed", lambda: run(out, out, overwrite=True), UsageError)
        assert len(Catalog.build(out)) == 21

    @pytest.mark.parametrize(
        "settings", [{"short_side": 0}, {"quality": 101}, {"shard_images": 0}, {"workers": 0}, {"max_megapixels": 0}]
    )
    def test_settings_that_cannot_be(self, settings: dict[str, Any], photos: Path, tmp_path: Path) -> None:
        (name,) = settings
        refused(f"{name}: expected", lambda: run(photos, tmp_path / "out", **settings), UsageError)
        assert not (tmp_path / "out").exists()

    def test_a_full_disk(self, photos: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def fill(progress: Progress) -> None:
            if progress.done == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

        try:
            with pytest.raises(MaxactError) as caught:
                run(photos, out, report=fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert str(caught.value).startswith(f"{out}/000001.tar: cannot be written (") and "\n" not in str(caught.value)
        assert {path.name for path in out.glob("*tar*")} == {"000000.tar", "000000.tar.index"}
        assert run(photos, out)["packed"] == 21
        run(photos, tmp_path / "whole")
        assert files(out) == files(tmp_path / "whole")


def _overwrite(photos: Path, out: Path, step: int) -> None:
    die_at(step)
    run(photos, out, quality=80, overwrite=True)
