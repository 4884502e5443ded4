"""Files to batches: order, places, what is bad, what is tried again, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from maxact.catalog import Catalog, Shard
from maxact.decode import make_decoder
from maxact.errors import MaxactError
from maxact.loader import Batch, Unreadable, load
from maxact.preprocess import Preprocess
from support import SIDE, SMALL, photograph, pixels

both = pytest.mark.parametrize("decoder", ["dali", "torchvision"])


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """The 21 photographs, to be damaged."""
    return Path(shutil.copytree(photos, tmp_path / "images"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def loading(
    catalog: Catalog,
    shards: Iterator[Shard] | int,
    *,
    batch: int = 4,
    decoder: str = "torchvision",
    preprocess: Preprocess = SMALL,
    readers: int = 4,
    skip_grey: bool = False,
) -> Iterator[Generator[Batch, None, None]]:
    """The batches of a catalog, in shards of that size or as given."""
    chosen = iter(catalog.shards(shards)) if isinstance(shards, int) else shards
    pictures = catalog.dataset is not None
    with (
        closing(make_decoder(decoder, preprocess, batch=batch, threads=2, pictures=pictures)) as made,
        closing(load(catalog, chosen, [made], batch=batch, readers=readers, skip_grey=skip_grey)) as batches,
    ):
        yield (each for (each,) in batches)


def load_all(images: object, shards: Iterator[Shard] | int = 8, **options: Any) -> list[Batch]:
    """Every batch, from a catalog or from what a catalog is made of."""
    catalog = images if isinstance(images, Catalog) else Catalog.build(images)
    with loading(catalog, shards, **options) as batches:
        return list(batches)


def by_number(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """Image number -> its pixels, for those that are not left out."""
    return {int(n): batch.images[i] for batch in batches for i, n in enumerate(batch.numbers) if n >= 0}


def bad(batches: list[Batch]) -> dict[int, tuple[str, str]]:
    """Image number -> stage and reason."""
    found = [image for batch in batches for image in batch.bad]
    assert len({image.image for image in found}) == len(found)
    return {image.image: (image.stage, image.error) for image in found}


def check(batches: list[Batch], expected: torch.Tensor, missing: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Exactly the images that are not missing came, each with its own pixels, and all else is blank."""
    found = by_number(batches)
    assert sorted(found) == [number for number in range(len(expected)) if number not in missing]
    for number, image in found.items():
        assert torch.equal(image, expected[number]), number
    for batch in batches:
        assert not batch.images[torch.from_numpy(batch.numbers < 0)].any()


# Order, numbers, padding


@both
@pytest.mark.parametrize("shard", [4, 8, 12, 100])
def test_batches_come_in_order_and_never_span_shards(shard: int, decoder: str, photos: Path) -> None:
    batches = load_all(photos, shard, decoder=decoder)
    check(batches, pixels(files(photos)))
    expected = []
    for start in range(0, 21, shard):
        stop = min(start + shard, 21)
        for first in range(start, stop, 4):
            numbers = list(range(first, min(first + 4, stop)))
            expected.append((start // shard, numbers + [-1] * (4 - len(numbers)), first + 4 >= stop))
    assert [(batch.shard.index, batch.numbers.tolist(), batch.ends_shard) for batch in batches] == expected
    for batch in batches:
        assert batch.images.shape == (4, SIDE, SIDE, 3) and batch.images.dtype == torch.uint8
        assert batch.numbers.dtype == np.int64
        assert batch.bad == () and batch.grey == 0


@pytest.mark.parametrize("batch", [1, 3, 7, 20, 21, 22, 64])
def test_any_batch_size(batch: int, photos: Path) -> None:
    batches = load_all(photos, 10 * batch, batch=batch)
    check(batches, pixels(files(photos)))
    assert len(batches) == -(-21 // batch) and all(len(own.images) == batch for own in batches)


@pytest.mark.parametrize("readers", [1, 2, 16])
def test_any_number_of_readers(readers: int, photos: Path) -> None:
    check(load_all(photos, 8, readers=readers), pixels(files(photos)))


def test_shards_in_any_order_and_only_those(photos: Path) -> None:
    catalog = Catalog.build(photos)
    shards = catalog.shards(8)
    batches = load_all(catalog, iter([shards[2], shards[0]]))
    assert [batch.shard.index for batch in batches] == [2, 2, 0, 0]
    assert [batch.ends_shard for batch in batches] == [False, True] * 2
    assert list(by_number(batches)) == [16, 17, 18, 19, 20, *range(8)]
    assert load_all(catalog, iter([])) == []


def test_a_shard_that_starts_between_batches(photos: Path) -> None:
    """Shards need not be multiples of the batch: each starts a batch of its own."""
    batches = load_all(photos, 6)
    assert [batch.numbers.tolist() for batch in batches][:3] == [[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, 9]]
    check(batches, pixels(files(photos)))


def test_the_next_shard_is_asked_for_before_the_last_one_is_finished(photos: Path) -> None:
    """So that reading and decoding go on from shard to shard."""
    catalog, asked = Catalog.build(photos), []

    def shards() -> Iterator[Shard]:
        for shard in catalog.shards(4):
            asked.append(shard.index)
            yield shard

    with loading(catalog, shards(), readers=2) as batches:
        ahead = [(batch.shard.index, asked[-1]) for batch in batches]
    assert [index for index, _ in ahead] == list(range(6))
    assert all(last >= min(index + 2, 5) for index, last in ahead), ahead
    assert all(last <= index + 6 for index, last in ahead)  # but no more than it takes


def test_shards_are_asked_for_as_they_are_needed(photos: Path) -> None:
    """Not all at once: what is asked for must be worked off, by whoever asked."""
    catalog = Catalog.build([*files(photos)] * 10)
    given: list[int] = []

    def shards() -> Iterator[Shard]:
        for shard in catalog.shards(4):
            given.append(shard.index)
            yield shard

    with loading(catalog, shards()) as batches:
        next(batches)
        assert len(given) < 15


def test_what_is_read_ahead_is_bounded(photos: Path) -> None:
    """Whoever takes batches slowly does not fill the memory with files."""
    catalog, read = Catalog.build([*files(photos)] * 10), 0
    lock, original = threading.Lock(), catalog.read

    def counted(entry: Any) -> object:
        nonlocal read
        with lock:
            read += 1
        return original(entry)

    catalog.read = counted  # type: ignore[method-assign]
    with loading(catalog, 1000) as batches:
        for taken in range(1, 5):
            next(batches)
            time.sleep(0.1)
            assert read <= 4 * (taken + 8)


# Pictures from elsewhere


class Pictures(torch.utils.data.Dataset[Any]):
    """A map-style Dataset of photographs, as `convert` makes them."""

    def __init__(self, convert: Callable[[Image.Image], object], count: int = 9) -> None:
        self.convert, self.count = convert, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        return self.convert(photograph(index))


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


@pytest.mark.parametrize(
    "convert",
    [
        lambda picture: picture,
        lambda picture: (picture, 7),
        lambda picture: [picture, "label", None],
        np.asarray,
        tensor,
        lambda picture: tensor(picture).float() / 255,
        lambda picture: (tensor(picture), {"label": 1}),
    ],
    ids=["PIL", "pair", "list", "array", "tensor", "float tensor", "tensor and dict"],
)
def test_a_dataset_of_pictures(convert: Callable[[Image.Image], object], tmp_path: Path) -> None:
    for number in range(9):
        photograph(number).save(tmp_path / f"{number}.png")
    check(load_all(Pictures(convert)), pixels(files(tmp_path)))


def test_a_dataset_that_fails_for_some(tmp_path: Path) -> None:
    """Whatever it raises or returns is that picture's own error."""

    class Fails(Pictures):
        def __getitem__(self, index: int) -> object:
            if index == 3:
                raise KeyError("no such row\nin the table")
            if index == 17:
                return "a string"
            return super().__getitem__(index)

    for number in range(21):
        photograph(number).save(tmp_path / f"{number:02}.png")
    batches = load_all(Fails(lambda picture: picture, 21), 100)
    check(batches, pixels(files(tmp_path)), {3, 17})
    assert bad(batches)[3] == ("read", "'no such row\\nin the table'")
    assert bad(batches)[17][0] == "decode" and "str" in bad(batches)[17][1]


def shifted(picture: Image.Image) -> torch.Tensor:
    """A preprocess function: the picture's top left corner, 0 to 1."""
    return tensor(picture)[:, :20, :24].float() / 255


def refuses(picture: Image.Image) -> torch.Tensor:
    if picture.height > picture.width:
        raise ValueError("too tall")
    return shifted(picture)


def test_a_preprocess_function(photos: Path) -> None:
    own = Preprocess(function="test_loader:shifted", crop=(20, 24))
    batches = load_all(photos, preprocess=own)
    assert all(batch.images.shape == (4, 3, 20, 24) and batch.images.dtype == torch.float32 for batch in batches)
    expected = []
    for path in files(photos):
        with Image.open(path) as picture:
            expected.append(shifted(picture))
    check(batches, torch.stack(expected))


def test_a_preprocess_function_that_refuses_some(photos: Path) -> None:
    own = Preprocess(function="test_loader:refuses", crop=(20, 24))
    batches = load_all(photos, preprocess=own)
    tall = set()
    for number, path in enumerate(files(photos)):
        with Image.open(path) as picture:
            tall |= {number} if picture.height > picture.width else set()
    assert 3 < len(tall) < 12
    assert set(bad(batches)) == tall and set(by_number(batches)) == set(range(21)) - tall
    assert all(stage == "decode" and "too tall" in error for stage, error in bad(batches).values())


def test_archives_and_parquet(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for number, path in enumerate(files(photos)):
            archive.add(path, f"{number:03}.jpg")
    data = pa.table({"image": [path.read_bytes() for path in files(photos)]})
    pq.write_table(data, tmp_path / "images.parquet", row_group_size=5)
    for source in ("images.tar", "images.parquet"):
        check(load_all(tmp_path / source), pixels(files(photos)))


# Grey pictures


def test_grey_pictures_are_left_out(tmp_path: Path) -> None:
    """Grey is no colour anywhere but for JPEG's rounding; a picture with one coloured corner is not."""
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (SIDE, SIDE, 1), np.uint8), 3, 2)
    slight, corner = grey.copy(), grey.copy()
    slight[..., 0] = np.minimum(slight[..., 0].astype(int) + 8, 255)
    corner[:4, :4] = (200, 100, 30)
    pictures = [
        Image.fromarray(grey),
        photograph(0),
        Image.fromarray(slight),
        Image.fromarray(corner),
        Image.fromarray(grey).convert("L"),
        photograph(1),
    ]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "6.png").write_bytes(b"")
    batches = load_all(tmp_path, skip_grey=True)
    assert set(by_number(batches)) == {1, 3, 5}
    assert [batch.grey for batch in batches] == [2, 1] and set(bad(batches)) == {6}
    assert not any(batch.grey for batch in load_all(tmp_path))


@both
def test_grey_jpegs_are_grey(decoder: str, tmp_path: Path) -> None:
    for number in range(3):
        photograph(number).convert("L").save(tmp_path / f"{number} L.jpg")
        photograph(number).convert("L").convert("RGB").save(tmp_path / f"{number} RGB.jpg", quality=60)
        photograph(number).save(tmp_path / f"{number} colour.jpg")
    batches = load_all(tmp_path, decoder=decoder, skip_grey=True)
    assert set(by_number(batches)) == {2, 5, 8} and sum(batch.grey for batch in batches) == 6


# Bad files


def spoilt(kind: str, path: Path) -> bytes:
    whole = path.read_bytes()
    if kind == "gif":
        photograph(0).save(path.with_suffix(".gif"))
        return path.with_suffix(".gif").read_bytes()
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "no end marker": whole[:-2],
        "header only": whole[:100],
        "random": np.random.default_rng(0).bytes(3000),
        "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
    }[kind]


KINDS = ("empty", "truncated", "no end marker", "header only", "random", "html", "gif")


@both
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_costs_only_itself(kind: str, decoder: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(files(folder)[0], tmp_path / "copy.jpg")
    data = spoilt(kind, tmp_path / "copy.jpg")
    paths = files(folder)
    expected = pixels(paths)
    paths[6].write_bytes(data)
    batches = load_all(folder, decoder=decoder)
    check(batches, expected, {6})
    ((stage, error),) = bad(batches).values()
    assert stage == "decode" and error and "\n" not in error
    # it is told with the batch that it is in, which is otherwise full
    assert [len(batch.bad) for batch in batches] == [0, 1, 0, 0, 0, 0]
    assert batches[1].numbers.tolist() == [4, 5, -1, 7]
    assert batches[1].bad[0].key == str(paths[6].relative_to(folder))


@both
def test_all_bad_files_together(decoder: str, folder: Path, tmp_path: Path) -> None:
    paths = files(folder)
    expected = pixels(paths)
    shutil.copy(paths[0], tmp_path / "copy.jpg")
    # alone in a batch, side by side, a batch of nothing else, first and last
    places = (0, 5, 6, 8, 9, 10, 11, 14, 20)
    for place, kind in zip(places, (*KINDS, "random", "empty"), strict=True):
        paths[place].write_bytes(spoilt(kind, tmp_path / "copy.jpg"))
    batches = load_all(folder, 12, decoder=decoder)
    check(batches, expected, set(places))
    assert {number: stage for number, (stage, _) in bad(batches).items()} == dict.fromkeys(places, "decode")


@both
def test_nothing_but_bad_files(decoder: str, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"" if number % 2 else b"random")
    batches = load_all(tmp_path, decoder=decoder)
    assert len(batches) == 2 and not by_number(batches) and set(bad(batches)) == set(range(6))
    assert all(batch.images.shape == (4, SIDE, SIDE, 3) for batch in batches)
    assert [batch.ends_shard for batch in batches] == [False, True]


# Files that cannot be read


def test_files_that_changed_since_they_were_catalogued(folder: Path) -> None:
    paths = files(folder)
    expected, catalog = pixels(paths), Catalog.build(folder)
    with open(paths[2], "ab") as file:
        file.write(b"more")
    os.utime(paths[9], ns=(1, 1))
    shutil.copy(paths[0], paths[17])  # another picture of another length
    began = time.monotonic()
    batches = load_all(catalog)
    assert time.monotonic() - began < 2  # there is no use in trying those again
    check(batches, expected, {2, 9, 17})
    found = bad(batches)
    assert {stage for stage, _ in found.values()} == {"read"}
    assert all(error.startswith("changed") for _, error in found.values())
    assert "bytes, but had" in found[2][1] and "modified after" in found[9][1]


def test_changed_files_are_no_sign_of_storage_gone(folder: Path) -> None:
    """More than a tenth of them: each is bad, the shard is not."""
    catalog = Catalog.build(folder)
    for path in files(folder):
        os.utime(path, ns=(1, 1))
    assert len(bad(load_all(catalog))) == 21


def test_files_that_were_missing_from_the_start(folder: Path, tmp_path: Path) -> None:
    """A list may name files that never were: they are bad, at once, however many they are."""
    paths = files(folder)
    expected = pixels(paths)
    for number in (3, 4, 5, 6, 7, 20):
        paths[number].unlink()
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    began = time.monotonic()
    batches = load_all(tmp_path / "list.txt")
    assert time.monotonic() - began < 2
    check(batches, expected, {3, 4, 5, 6, 7, 20})
    assert set(bad(batches).values()) == {("read", "No such file or directory (ENOENT)")}


def test_a_file_that_is_gone(folder: Path) -> None:
    """One of 21 is less than a tenth: after some tries it is bad."""
    paths = files(folder)
    expected, catalog = pixels(paths), Catalog.build(folder)
    paths[13].unlink()
    batches = load_all(catalog, 100)
    check(batches, expected, {13})
    assert bad(batches) == {13: ("read", "No such file or directory (ENOENT)")}


def test_a_mount_that_goes_away_for_a_moment(folder: Path) -> None:
    """Reading is tried again, until the files are back."""
    expected, catalog = pixels(files(folder)), Catalog.build(folder)
    away = folder.with_name("away")
    folder.rename(away)
    back = threading.Timer(0.5, away.rename, [folder])
    back.start()
    batches = load_all(catalog)
    back.join()
    check(batches, expected)
    assert bad(batches) == {}


class Flaky(Pictures):
    """Raises for each picture `times` times before it gives it."""

    def __init__(self, error: OSError, times: int, count: int = 9) -> None:
        super().__init__(lambda picture: picture, count)
        self.error, self.times = error, times
        self.calls: dict[int, int] = {}

    def __getitem__(self, index: int) -> object:
        self.calls[index] = self.calls.get(index, 0) + 1  # one thread reads any one picture
        if self.calls[index] <= self.times:
            raise self.error
        return super().__getitem__(index)


def test_a_batch_in_which_nothing_can_be_read_is_blank_in_the_right_form(folder: Path, tmp_path: Path) -> None:
    """Nothing reaches the decoder, and the batch must look like its neighbours all the same."""
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in [*files(folder)[:8], *[folder / "gone.jpg"] * 4]))
    for own in (SMALL, Preprocess(function="test_loader:shifted", crop=(20, 24))):
        batches = load_all(listed, 100, preprocess=own)
        assert [len(batch.bad) for batch in batches] == [0, 0, 4]
        assert {(batch.images.shape, batch.images.dtype) for batch in batches} == {
            (batches[0].images.shape, batches[0].images.dtype)
        }
        assert not batches[2].images.any()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ConnectionResetError("reset"), TimeoutError("slow")], ids=repr
)
def test_errors_that_pass_are_not_seen(error: OSError, tmp_path: Path) -> None:
    for number in range(9):
        photograph(number).save(tmp_path / f"{number}.png")
    dataset = Flaky(error, 2)
    batches = load_all(dataset, readers=9)
    check(batches, pixels(files(tmp_path)))
    assert bad(batches) == {} and set(dataset.calls.values()) == {3}


def test_a_damaged_picture_of_a_dataset_is_not_read_again() -> None:
    """PIL's errors about a picture are OSErrors too; they are not the storage's."""
    dataset = Flaky(UnidentifiedImageError("cannot identify image file"), 99)
    batches = load_all(dataset, readers=9)
    assert bad(batches) == dict.fromkeys(range(9), ("decode", "cannot identify image file"))
    assert set(dataset.calls.values()) == {1}


def test_unreadable_once_more_than_a_tenth_is_gone(folder: Path) -> None:
    catalog = Catalog.build(folder)
    shutil.rmtree(files(folder)[0].parent)
    files(folder)[0].unlink()
    with pytest.raises(Unreadable, match="4 of the 21 images") as caught:
        load_all(catalog, 24, readers=16)
    message = str(caught.value)
    assert isinstance(caught.value, MaxactError) and "\n" not in message
    assert "No such file or directory" in message and "run the same again" in message


class Gone(Pictures):
    """Cannot read the images from `start` on, and says so at once."""

    def __init__(self, start: int, count: int = 21) -> None:
        super().__init__(lambda picture: picture, count)
        self.start = start

    def __getitem__(self, index: int) -> object:
        if index >= self.start:
            raise LookupError("gone")
        return super().__getitem__(index)


@pytest.mark.parametrize(("count", "start"), [(4, 2), (21, 19), (40, 36)])
def test_a_few_or_a_tenth_are_bad_files(count: int, start: int) -> None:
    """Two, however small the shard; of 40 images four. One more, and the storage is gone."""
    batches = load_all(Gone(start, count), 64)
    assert set(by_number(batches)) == set(range(start))
    assert bad(batches) == dict.fromkeys(range(start, count), ("read", "gone"))
    with pytest.raises(Unreadable, match=f"{count - start + 1} of the {count} images"):
        load_all(Gone(start - 1, count), 64)


@pytest.mark.parametrize("slowness", [0.0, 0.2])
def test_what_comes_before_the_unreadable_still_comes(slowness: float) -> None:
    """However far ahead the loader has read: a shard that could be finished is."""
    numbers = []
    with loading(Catalog.build(Gone(16)), 8) as batches, pytest.raises(Unreadable, match="4 of the 5 images"):
        for batch in batches:
            numbers.append(batch.numbers.tolist())
            time.sleep(slowness)
    assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_catalog_without_its_dataset_is_the_callers_mistake() -> None:
    """No image is to blame, so the run ends."""
    catalog = Catalog(Catalog.build(Pictures(lambda picture: picture)).table)
    decoder = make_decoder("torchvision", SMALL, batch=4, threads=1, pictures=True)
    with (
        closing(decoder),
        closing(load(catalog, iter(catalog.shards(9)), [decoder], batch=4, readers=2)) as batches,
        pytest.raises(MaxactError, match="give that again"),
    ):
        next(batches)


# What is left behind


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("maxact-read", "decode"))]


def wait_until_none_read(seconds: float = 5.0) -> None:
    for thread in reading():
        thread.join(seconds)
    assert not reading()


@both
def test_leaving_in_the_middle_leaves_no_threads(decoder: str, photos: Path) -> None:
    catalog = Catalog.build(photos)
    for taken in range(4):
        with loading(catalog, 8, decoder=decoder) as batches:
            for _ in range(taken):
                next(batches)
            assert not taken or reading()
        wait_until_none_read()


def test_leaving_does_not_wait_for_files_that_do_not_come() -> None:
    """A mount that hangs must not hold up the end of a run; what was not begun by then is never read."""
    release, begun = threading.Event(), []

    class Hangs(Pictures):
        def __getitem__(self, index: int) -> object:
            begun.append(index)
            if index >= 4:
                release.wait(30)
            return super().__getitem__(index)

    with loading(Catalog.build(Hangs(lambda picture: picture, 40)), 40) as batches:
        next(batches)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    release.set()
    wait_until_none_read()
    assert len(begun) <= 4 + 4


def test_a_shard_that_cannot_be_planned_leaves_no_threads(photos: Path) -> None:
    catalog = Catalog.build(photos)

    def shards() -> Iterator[Shard]:
        yield from catalog.shards(100)
        raise ZeroDivisionError

    with loading(catalog, shards()) as batches, pytest.raises(ZeroDivisionError):
        list(batches)
    wait_until_none_read()


def test_batches_stay_as_they_are(photos: Path) -> None:
    """Nothing overwrites the pixels of a batch that someone still holds."""
    for decoder in ("dali", "torchvision"):
        with loading(Catalog.build(photos), 8, decoder=decoder) as batches:
            kept = [(batch, batch.images.clone()) for batch in batches]
        assert all(torch.equal(batch.images, before) for batch, before in kept)
