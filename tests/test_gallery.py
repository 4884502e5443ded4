"""The gallery: what is written, and what a real browser makes of it."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from torch import nn

import maxact
from maxact import schedule
from maxact.preprocess import Preprocess
from maxact.render.gallery import measure, write_gallery
from maxact.render.sprites import Pictures, Sprites
from projected import copy_store, damage_thumbs, project
from stores import interrupted, scan
from support import write_photographs

# a folder's name is a label, and with the file's the key
EVIL_LABEL = "\"><img src=x onerror='window.hacked=1'>&amp;\u202eabc"
EVIL_WORDS = "</script><script>window.hacked=1</script>\u2028\n`${window.hacked=1}`\\"
EVIL_TAP = "<b>\"q' #?&%2F:1\u202e"


def data_of(path: Path) -> Any:
    """What a data file hands over."""
    match = re.fullmatch(r"maxact\.\w+\((?:\d+, )*JSON\.parse\((.*)\)\);\n", path.read_text())
    assert match is not None
    return json.loads(json.loads(match[1]))


# What is written


@pytest.fixture
def store(finished: maxact.Store, tmp_path: Path) -> maxact.Store:
    store = copy_store(finished, tmp_path / "store.zarr")
    project(store, "bn1", channels=[0, 1, 2, 4])
    project(store, "bn2", size=40)
    return store


def test_files(store: maxact.Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[tuple[int, int]] = []
    assert write_gallery(store, out, report=lambda *done: told.append(done)) == out / "index.html"
    assert sorted(path.name for path in (out / "img/bn1/max-top").glob("*.webp")) == [f"{n}.webp" for n in (0, 1, 2, 4)]
    assert len(list((out / "img/bn2/max-top").glob("*.webp"))) == 7
    assert not (out / "img/fc").exists()
    assert told[-1] == (11, 11)
    index = data_of(out / "data/index.js")
    assert [(tap["name"], tap["channels"], tap["pictured"], tap["cover"] > 0) for tap in index["taps"]] == [
        ("bn1", 6, 4, True),
        ("bn2", 7, 7, True),
        ("fc", 5, 0, False),
    ]


def test_data_says_what_the_store_says(store: maxact.Store, tmp_path: Path) -> None:
    write_gallery(store, tmp_path / "out", label_names={"chelsea": "a cat"})
    tap = data_of(tmp_path / "out/data/bn2.js")
    for name, values in tap["stats"].items():
        np.testing.assert_allclose(values, store["bn2"].stats[name], rtol=1e-4)
    part = data_of(tmp_path / "out/data/bn2-0.js")
    winners = store.winners("bn2")
    for (score, end), name in (((each.split("/")), each) for each in tap["lists"]):
        for channel in range(7):
            table = store["bn2"].top(channel, score, end).to_pylist()
            found = part["lists"][name][channel]
            assert len(found) == (4 if name == "max/top" else len(table))
            for rank, (image, label, value, row, column, *boxes) in enumerate(found):
                expected = table[rank]
                assert part["images"][image] == [expected["image"], expected["key"]]
                code = expected["label"]
                assert tap["labels"][label] == (["chelsea", "a cat"] if code == "chelsea" else [code])
                assert value == pytest.approx(expected["score"], rel=1e-4)
                assert (row, column) == (expected.get("row", -1), expected.get("column", -1))
                if name == "max/top":
                    for box, kind in zip(boxes, ("box", "focus_box", "crop_box"), strict=True):
                        assert box == winners.read(kind, channel, channel + 1)[0, rank].tolist()
                else:
                    assert boxes == []


def test_fields_are_told_where_they_are_known(store: maxact.Store, tmp_path: Path) -> None:
    write_gallery(store, tmp_path / "out")
    bn1, bn2, fc = data_of(tmp_path / "out/data/index.js")["taps"]
    assert (bn1["field"]["size"], bn1["field"]["stride"], bn1["global"]) == ([3, 3], [1, 1], False)
    assert (bn2["field"]["size"], bn2["field"]["stride"], bn2["global"]) == ([5, 5], [2, 2], False)
    assert fc["global"]
    attributes = json.loads((store.path / "bn1/zarr.json").read_text())
    for name in ("field", "global"):
        del attributes["attributes"][name]
    (store.path / "bn1/zarr.json").write_text(json.dumps(attributes))
    write_gallery(store, tmp_path / "out")
    assert "field" not in data_of(tmp_path / "out/data/index.js")["taps"][0]


def test_layers_and_channels_choose(store: maxact.Store, tmp_path: Path) -> None:
    write_gallery(store, tmp_path / "out", layers=["bn*"], channels=[6, 2, 100])
    index = data_of(tmp_path / "out/data/index.js")
    assert [tap["name"] for tap in index["taps"]] == ["bn1", "bn2"]
    assert data_of(tmp_path / "out/data/bn2.js")["shown"] == [2, 6]
    assert data_of(tmp_path / "out/data/bn1.js")["shown"] == [2]
    assert len(data_of(tmp_path / "out/data/bn1.js")["stats"]["max"]) == 6, "the distribution is of all channels"
    assert sorted(path.stem for path in (tmp_path / "out/img").rglob("max-top/*.webp")) == ["2", "2", "6"]


def test_sprites_that_are_there_stay(store: maxact.Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_gallery(store, out)
    paths = sorted((out / "img").rglob("max-top/*.webp"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    paths[3].unlink()
    project(store, "bn2", size=40, seed=1)  # other projections
    write_gallery(store, out)
    changed = [path for path in paths if path.stat().st_mtime_ns != before[path]]
    assert changed == sorted({paths[3], *(path for path in paths if "bn2" in path.parts)})


def stamp_of(out: Path) -> str:
    match = re.search(r'data-stamp="(\w+)"', (out / "index.html").read_text())
    assert match is not None
    return match[1]


def test_sprites_are_never_stale(store: maxact.Store, tmp_path: Path) -> None:
    """Other channels of the same block were drawn since they were."""
    out = tmp_path / "out"
    write_gallery(store, out, layers=["bn2"], channels=[0])
    project(store, "bn2", size=40, seed=1)
    write_gallery(store, out, layers=["bn2"], channels=[1])
    write_gallery(store, out, layers=["bn2"])
    write_gallery(store, tmp_path / "new", layers=["bn2"])
    for channel in range(7):
        name = f"img/bn2/max-top/{channel}.webp"
        assert (out / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    assert stamp_of(out) == stamp_of(tmp_path / "new")


def test_thumbs_that_come_later_are_shown(store: maxact.Store, tmp_path: Path) -> None:
    thumbs, aside = store.path / "thumbs.parquet", tmp_path / "thumbs.parquet"
    thumbs.rename(aside)
    write_gallery(store, tmp_path / "out")
    before = stamp_of(tmp_path / "out")
    aside.rename(thumbs)
    write_gallery(store, tmp_path / "out")
    write_gallery(store, tmp_path / "new")
    assert stamp_of(tmp_path / "out") != before
    for path in (tmp_path / "new/img").rglob("*.webp"):
        assert (tmp_path / "out/img" / path.relative_to(tmp_path / "new/img")).read_bytes() == path.read_bytes()


def test_a_cut_leaves_nothing_stale(store: maxact.Store, tmp_path: Path) -> None:
    """Drawn from other projections, cut short, and drawn from the first ones again."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    write_gallery(store, out, layers=["bn2"])
    first = {path: path.read_bytes() for path in (out / "img").rglob("max-top/*.webp")}
    project(store, "bn2", size=40, seed=1)
    with pytest.raises(KeyboardInterrupt):
        write_gallery(store, out, layers=["bn2"], report=stop)
    assert any(path.read_bytes() != data for path, data in first.items())
    project(store, "bn2", size=40)
    write_gallery(store, out, layers=["bn2"])
    assert all(path.read_bytes() == data for path, data in first.items())


def test_cut_short_it_goes_on(store: maxact.Store, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 4:  # within the second tap
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gallery(store, tmp_path / "out", report=stop)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/img/bn1").rglob("*.webp")}
    assert not (tmp_path / "out/index.html").exists()
    write_gallery(store, tmp_path / "out")
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert len(list((tmp_path / "out/img/bn2/max-top").glob("*.webp"))) == 7


def test_channels_that_are_projected_meanwhile_come_next_time(store: maxact.Store) -> None:
    sprites = Sprites(store, "bn1", ("max", "top"), Pictures(store))
    before = sprites.boxes()
    project(store, "bn1", channels=range(6))
    assert Sprites(store, "bn1", ("max", "top"), Pictures(store)).projected.sum() > 4
    np.testing.assert_array_equal(sprites.boxes(), before)


def test_the_size_is_said_before(store: maxact.Store, tmp_path: Path) -> None:
    need = measure(store, layers=["bn2"])
    write_gallery(store, tmp_path / "out", layers=["bn2"])
    written = sum(path.stat().st_size for name in ("img", "data") for path in (tmp_path / "out" / name).rglob("*.*"))
    assert (need.channels, need.sprites) == (7, 7)
    assert written / 1.5 < need.bytes < written * 1.5


def test_nothing_projected(finished: maxact.Store, tmp_path: Path) -> None:
    with pytest.raises(maxact.MaxactError, match="nothing of it has been projected; run `maxact project`"):
        write_gallery(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scan_that_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last commit, as a scan of so many images would give it; without pictures."""
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)

    interrupted(photos, tmp_path / "x")
    unfinished = maxact.open(tmp_path / "x")
    assert 0 < unfinished.scanned() < 21
    assert measure(unfinished).sprites == 0
    write_gallery(unfinished, tmp_path / "out")
    index = data_of(tmp_path / "out/data/index.js")
    assert index["images"] == unfinished.scanned()
    assert ["unfinished", f"{unfinished.scanned()} of 21 images are scanned"] in index["facts"]
    assert [tap["pictured"] for tap in index["taps"]] == [0, 0, 0]
    part = data_of(tmp_path / "out/data/bn2-0.js")
    reference = scan(photos, tmp_path / "y", limit=unfinished.scanned())
    for channel, winners in enumerate(part["lists"]["max/top"]):
        keys = [part["images"][image][1] for image, *_ in winners]
        assert keys == reference["bn2"].top(channel)["key"].to_pylist()


def test_pictures_of_the_lists_before_are_not_shown(store: maxact.Store) -> None:
    """A finished scan that goes on again has other lists."""
    store.reopen()
    with pytest.raises(maxact.MaxactError, match="bn2/max/top has not been projected"):
        store.winners("bn2")


def test_nothing_chosen(store: maxact.Store, tmp_path: Path) -> None:
    with pytest.raises(maxact.UsageError, match=r"channels \[99\]"):
        write_gallery(store, tmp_path / "out", channels=[99])


def test_a_page_of_somebody_else_stays(store: maxact.Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.html").write_text("<h1>mine</h1>")
    with pytest.raises(maxact.MaxactError, match="is not a gallery"):
        write_gallery(store, tmp_path / "out")
    assert (tmp_path / "out/index.html").read_text() == "<h1>mine</h1>"


def test_a_place_that_cannot_be(store: maxact.Store, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(maxact.MaxactError, match="cannot be written"):
        write_gallery(store, tmp_path / "out")


def test_a_damaged_store_is_named(store: maxact.Store, tmp_path: Path) -> None:
    """And not the place that is written to."""
    damage_thumbs(store)
    with pytest.raises(maxact.MaxactError, match=r"store\.zarr/thumbs\.parquet: .* is damaged; project again"):
        write_gallery(store, tmp_path / "out")


# In a browser


class Page:
    """A gallery in a browser."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, route: str = "#/", width: int = 1300, height: int = 900) -> None:
        """Opens the page anew at a route and waits until it is drawn."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        self.driver.get(self.address + route)
        self.wait(lambda: self.run("return document.getElementById('main')?.dataset.ready") == self.route())

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, 20, 0.02).until(lambda _: condition())

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def route(self) -> str:
        hash_: str = self.run("return location.hash")
        return hash_

    def goes_to(self, route: str) -> None:
        """Waits until the page is at a route, and drawn."""
        self.wait(
            lambda: self.route() == route and self.run("return document.getElementById('main').dataset.ready") == route
        )

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [each.get_property("textContent") for each in self.all(selector)]

    def channels(self) -> list[int]:
        return [int(each.get_attribute("data-channel")) for each in self.all(".card")]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def images_appear(self) -> None:
        """Waits until every image of the page has pixels."""
        self.run("document.querySelectorAll('img').forEach((each) => { each.loading = 'eager'; })")
        self.wait(
            lambda: self.run(
                "return document.images.length > 0 && "
                "[...document.images].every((each) => each.complete && each.naturalWidth > 0)"
            )
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """One for all tests of this file."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program and driver, "these tests need Chromium: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, Service(driver)) as opened:
        yield opened


class Evil(nn.Module):
    """A layer whose name is meant to do harm."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(EVIL_TAP, nn.Conv2d(3, 5, 3, stride=2))
        self.last = nn.Conv2d(5, 8, 3, stride=2)
        self.preprocess = Preprocess(resize=32, crop=(32, 32))

    def forward(self, images: Any) -> Any:
        return self.last(self._modules[EVIL_TAP](images))  # type: ignore[misc]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> maxact.Store:
    """A projected store: several lists, channels without pictures, names that are meant to do harm."""
    place = tmp_path_factory.mktemp("shown")
    write_photographs(place / "photos", 21)
    for name in ("astronaut", "brick", "chelsea", "ihc", "motorcycle_left"):
        shutil.move(place / "photos" / name, place / "photos" / (name + EVIL_LABEL))
    store = scan(place / "photos", place / "scanned.zarr", Evil(), score=("max", "mean"), bottom=3)
    store = copy_store(store, place / "store.zarr")
    project(store, EVIL_TAP, channels=[0, 1, 2])
    project(store, "last", size=33, cut="focus", methods=("deconvnet", "guided"))
    project(store, "last", end="bottom", shown=3, size=33)
    project(store, "last", score="mean", size=33, missing=[(4, 1)])
    return store


@pytest.fixture(scope="module")
def site(shown: maxact.Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "a folder, of mine"
    return write_gallery(shown, out, label_names={"coffee": EVIL_WORDS})


@pytest.fixture
def page(browser: webdriver.Chrome, site: Path) -> Iterator[Page]:
    page = Page(browser, site.as_uri())
    page.errors()
    yield page
    assert page.errors() == []
    assert page.run("return window.hacked") is None


def test_it_opens_from_the_file_system(page: Page) -> None:
    page.open()
    page.images_appear()
    assert page.texts(".tap .name bdi") == [EVIL_TAP, "last"]
    assert "21 images · 2 taps · 13 channels" in page.texts(".lead")[0]
    assert page.run("return performance.getEntriesByType('resource').every((each) => each.name.startsWith('file://'))")


def test_it_opens_from_a_web_server(browser: webdriver.Chrome, site: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site.parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = Page(browser, f"http://127.0.0.1:{server.server_port}/")
            page.open("#/tap/last/3")
            page.images_appear()
            browser.get("about:blank")
        finally:
            server.shutdown()
            thread.join()
    assert page.errors() == []


def test_a_grid_shows_the_crops_of_every_channel(page: Page, site: Path) -> None:
    page.open("#/tap/last")
    page.images_appear()
    assert page.channels() == list(range(8))
    with Image.open(site.parent / "img/last/max-top/0.webp") as sprite:
        assert page.run("return [document.images[0].naturalWidth, document.images[0].naturalHeight]") == list(
            sprite.size
        )
    page.all("[href*='last/5']")[0].click()
    page.goes_to("#/tap/last/5")


def test_channels_without_pictures_say_so(page: Page) -> None:
    page.open()
    page.all(".tap")[0].click()
    page.wait(lambda: page.all(".card"))
    assert len(page.all(".card img")) == len(page.all(".card")) == 3
    Select(page.all("select[name=show]")[0]).select_by_value("all")
    page.wait(lambda: len(page.all(".card")) == 5)
    assert page.texts(".card .pic.none") == ["not projected"] * 2
    page.all(".card")[4].click()
    page.wait(lambda: page.all(".statistics"))
    assert "not been projected" in page.texts(".empty")[0]
    assert len(page.all(".winner")) == 4, "the list is there all the same"


@pytest.mark.parametrize("statistic", ["max", "mean", "std", "min", "active"])
def test_sorting(page: Page, shown: maxact.Store, statistic: str) -> None:
    page.open("#/tap/last")
    Select(page.all("select[name=sort]")[0]).select_by_value(statistic)
    page.goes_to(f"#/tap/last?sort={statistic}")
    expected = np.argsort(-shown["last"].stats[statistic], kind="stable").tolist()
    assert page.channels() == expected
    page.all("button[name=order]")[0].click()
    page.goes_to(f"#/tap/last?sort={statistic}&order=up")
    assert page.channels() == expected[::-1]
    assert page.run("return document.activeElement.name") == "order"


def test_dead_channels_first(page: Page, shown: maxact.Store) -> None:
    page.open("#/tap/last?sort=dead")
    dead = shown["last"].dead
    assert page.channels() == np.argsort(~dead, kind="stable").tolist()
    page.open("#/tap/last?show=dead")
    assert page.channels() == np.flatnonzero(dead).tolist()
    page.open("#/tap/last?show=live")
    assert page.channels() == np.flatnonzero(~dead).tolist()


def test_a_gated_field_is_told_as_such(browser: webdriver.Chrome, store: maxact.Store, tmp_path: Path) -> None:
    path = store.path / "bn2/zarr.json"
    attributes = json.loads(path.read_text())
    attributes["attributes"]["global"] = True  # as after a squeeze-excite
    path.write_text(json.dumps(attributes))
    page = Page(browser, write_gallery(store, tmp_path / "out").as_uri())
    page.open()
    told = page.texts(".tap .some")
    assert "5 px, gated by the whole image · stride 2 px" in told[1]
    assert "field the whole image" in told[2]


def test_more_channels_come_until_the_page_is_full(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """On a screen so large that the next channels do not move the button away."""
    write_photographs(tmp_path / "photos", 3)
    network = nn.Sequential(nn.Conv2d(3, 300, 3, stride=4))
    network.preprocess = Preprocess(resize=32, crop=(32, 32))  # type: ignore[assignment]
    store = copy_store(scan(tmp_path / "photos", tmp_path / "scanned.zarr", network), tmp_path / "store.zarr")
    project(store, "0", channels=[0])
    page = Page(browser, write_gallery(store, tmp_path / "out").as_uri())
    page.open("#/tap/0?show=all", height=9000)
    page.wait(lambda: len(page.all(".card")) == 300 and not page.all(".more")[0].is_displayed())
    page.open("#/tap/0?show=all")
    assert len(page.all(".card")) < 300, "not before they are near"


def test_filtering_by_label(page: Page, shown: maxact.Store) -> None:
    page.open("#/tap/last")
    box = page.all("input[name=label]")[0]
    box.send_keys("rock", Keys.ENTER)
    page.goes_to("#/tap/last?label=rock")
    labels = [shown["last"].top(channel)["label"].to_pylist()[:4] for channel in range(8)]
    assert page.channels() == [channel for channel in range(8) if "rocket" in labels[channel]]


def test_lists_are_tabs(page: Page, shown: maxact.Store) -> None:
    page.open("#/tap/last/4")
    assert page.texts(".tabs a") == ["highest max", "lowest max", "highest mean", "lowest mean"]
    page.all(".tabs a")[2].click()
    page.goes_to("#/tap/last/4?list=mean/top")
    page.images_appear()
    scores = shown["last"].top(4, "mean")["score"].to_pylist()[:4]
    assert [float(text.replace("\N{MINUS SIGN}", "-")) for text in page.texts(".score b")] == pytest.approx(
        scores, rel=1e-3
    )
    assert len(page.all(".plate")) == 2
    assert len(page.all(".winner > .pic > img")) == 3, "one of the four could not be had"
    assert page.texts(".tiles .none") == ["missing"] * 2


def test_a_channel_shows_what_is_known_of_it(page: Page, shown: maxact.Store) -> None:
    page.open("#/tap/last/6")
    page.images_appear()
    table = shown["last"].top(6).slice(0, 4).to_pylist()
    assert page.texts(".winner .key") == [row["key"] for row in table]
    assert page.texts(".winner .small") == [
        f"image {row['image']} · row {row['row']}, column {row['column']}" for row in table
    ]
    words = {"coffee": EVIL_WORDS}
    assert page.texts(".winner .label") == [words.get(row["label"], row["label"]) for row in table]
    assert len(page.all(".plate")) == 3, "crops and two methods"
    stats = shown["last"].stats
    for row, name in zip(page.all(".statistics tbody tr"), ("max", "mean", "std", "min", "active"), strict=True):
        rank = int((stats[name] > stats[name][6]).sum()) + 1
        assert row.find_element(By.CSS_SELECTOR, ".rank").text == f"{rank} of 8"
        assert len(row.find_elements(By.CSS_SELECTOR, "rect.here")) == 1


def test_boxes_lie_over_the_image(page: Page, shown: maxact.Store) -> None:
    page.open("#/tap/last/2")
    winners = shown.winners("last")
    for kind, name in (("field", "box"), ("focus", "focus_box")):
        drawn = page.run(
            "return [...document.querySelectorAll(`.winner rect.${arguments[0]}`)].map((each) => "
            "['y', 'x', 'height', 'width'].map((name) => Number(each.getAttribute(name))))",
            kind,
        )
        boxes = winners.read(name, 2, 3)[0]
        np.testing.assert_array_equal(drawn, np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1))
    assert page.run("return document.querySelector('.winner .marks').getAttribute('viewBox')") == "0 0 32 32"
    page.press("b")
    assert not page.all(".winner .marks")[0].is_displayed()
    page.press("m")
    assert page.all(".winner .map")[0].is_displayed()
    page.press("b", "m")


def test_a_tile_leads_to_its_winner(page: Page) -> None:
    page.open("#/tap/last/2")
    page.all(".plate")[1].find_elements(By.CSS_SELECTOR, "button")[2].click()
    assert page.run("return document.activeElement.id") == "winner-2"


def test_searching(page: Page) -> None:
    page.open()
    page.press("/")
    page.press("la")
    assert page.texts("#found li bdi") == ["last"]
    page.press("st 3", Keys.ENTER)
    page.goes_to("#/tap/last/3")
    page.press("/")
    page.press("5", Keys.ENTER)
    page.goes_to("#/tap/last/5")
    page.press("/")
    page.press("conv2d")
    assert page.texts("#found li bdi") == [EVIL_TAP, "last"]
    page.press(Keys.ARROW_DOWN, Keys.ENTER)
    page.goes_to("#/tap/last")
    page.press("/")
    page.press("nothing at all")
    assert page.texts("#found li") == ["Nothing is called that."]
    page.press(Keys.ESCAPE)
    assert not page.all("#found")[0].is_displayed()


def test_keys(page: Page, shown: maxact.Store) -> None:
    page.open("#/tap/last?sort=max")
    order = np.argsort(-shown["last"].stats["max"], kind="stable").tolist()
    page.press("j", Keys.ARROW_RIGHT, "k", Keys.ARROW_RIGHT, Keys.ENTER)
    page.goes_to(f"#/tap/last/{order[1]}?sort=max")
    page.press(Keys.ARROW_RIGHT)
    page.goes_to(f"#/tap/last/{order[2]}?sort=max")
    page.press("j")
    page.goes_to(f"#/tap/last/{order[3]}?sort=max")
    page.press("k")
    page.goes_to(f"#/tap/last/{order[2]}?sort=max")
    page.press(Keys.ESCAPE)
    page.goes_to("#/tap/last?sort=max")
    assert page.run("return document.activeElement.dataset.channel") == str(order[2])
    page.press(Keys.ESCAPE)
    page.goes_to("#/")
    assert page.driver.switch_to.active_element.get_attribute("href").endswith("#/tap/last")
    page.press("?")
    assert page.run("return document.getElementById('help').open")
    page.press(Keys.ESCAPE)
    assert not page.run("return document.getElementById('help').open")
    assert page.route() == "#/"


def test_names_that_mean_harm_stay_text(page: Page) -> None:
    page.open()
    page.all(".tap")[0].click()
    page.wait(lambda: page.all(".card"))
    assert page.texts("h1 bdi") == [EVIL_TAP]
    page.all(".card")[0].click()
    page.wait(lambda: page.all(".winner"))
    assert page.texts("h1 bdi") == [EVIL_TAP]
    page.driver.refresh()  # the link is a whole one
    page.wait(lambda: page.all(".winner"))
    found = set()
    for channel in range(8):
        page.open(f"#/tap/last/{channel}")
        found |= set(page.texts(".winner .label"))
    assert EVIL_WORDS in found
    assert any("\"><img src=x onerror='window.hacked=1'>&amp;" in label for label in found)


def test_links_that_lead_nowhere(page: Page) -> None:
    for route, said in (
        ("#/tap/nothing", "There is no tap nothing"),
        ("#/tap/last/99", "last has no channel 99"),
        ("#/tap/%E0%A4%A", "There is no tap"),
    ):
        page.open(route)
        assert said in page.texts(".empty")[0]
    page.open("#/tap/last/1?list=nothing&sort=nothing&show=nothing")
    assert len(page.all(".winner")) == 4


@pytest.mark.parametrize("route", ["#/", "#/tap/last", "#/tap/last/3"])
def test_a_phone_needs_no_sideways_scrolling(page: Page, route: str) -> None:
    page.open(route, width=360)
    page.images_appear()
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    beyond = page.run(
        "return [...document.querySelectorAll('main *, header *')].filter((each) => !each.closest('.pic, [hidden]') "
        "&& each.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)"
        ".map((each) => each.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_light_and_dark(page: Page) -> None:
    def lightness() -> int:
        colour: str = page.run("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    for scheme, dark in (("light", False), ("dark", True)):
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        page.run("try { localStorage.removeItem('maxact-theme') } catch {}")
        page.open()
        assert (lightness() < 150) == dark
        page.all("#theme")[0].click()
        assert (lightness() < 150) != dark
        page.open("#/tap/last")
        assert (lightness() < 150) != dark, "it stays"
    page.run("localStorage.removeItem('maxact-theme')")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_what_is_seen_has_words(page: Page) -> None:
    """Images have texts, buttons and fields have names."""
    for route in ("#/", "#/tap/last", "#/tap/last/3"):
        page.open(route)
        nameless = page.run(
            """return [...document.querySelectorAll("button, select, input, a")].filter((each) =>
              !(each.textContent.trim() || each.getAttribute("aria-label") || each.closest("label")
                || each.querySelector("img[alt]:not([alt=''])"))).map((each) => each.outerHTML)"""
        )
        assert nameless == []
        assert page.run("return [...document.images].every((each) => each.hasAttribute('alt'))")
