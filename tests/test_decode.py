"""Decoding: the two decoders against each other and torchvision, every format, every kind of bad file.

Tolerances, of 255 levels: where both resize the inside of a picture bilinearly they differ by at most one level.
DALI repeats a picture's edge where PIL renormalises, so the outermost resized pixels differ by up to 40; and PIL
rounds and clips between its two passes, so bicubic overshoots differ likewise. Both are less than 1 % of pixels,
and 0.25 levels is the most on average.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification

from maxact.decode import Decoded, Decoder, make_decoder, native_stderr
from maxact.errors import MaxactError, UsageError
from maxact.preprocess import Fit, Interpolation, Preprocess

skimage = importlib.util.find_spec("skimage")
assert skimage is not None and skimage.origin is not None
DATA = Path(skimage.origin).parent / "data"

needs_dali = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("nvidia") is None, reason="DALI is for Linux"
)
both = pytest.mark.parametrize("name", [pytest.param("dali", marks=needs_dali), "torchvision"])


@cache
def photo(name: str = "astronaut.png", size: tuple[int, int] | None = None) -> Image.Image:
    with Image.open(DATA / name) as picture:
        plain = Image.fromarray(np.asarray(picture.convert("RGB")))  # without its colour profile
    return plain if size is None else plain.resize(size)


def encode(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand: PIL writes no 16-bit colour, and no header that lies."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png16(values: np.ndarray) -> bytes:
    """[H, W, C] uint16 -> a 16-bit PNG, grey or colour."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, {1: 0, 3: 2, 4: 6}[channels], rows)


PHOTOS = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"]


@cache
def jpegs(n: int = 8) -> tuple[bytes, ...]:
    """Different photographs of different sizes."""
    sizes = [(320, 240), (241, 333), (500, 375), (299, 299)]
    return tuple(encode(photo(PHOTOS[i % 4], sizes[i // 4 % 4]), quality=80 + i) for i in range(n))


@cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    """Kinds of bad files, with a part of the reason that they must be given."""
    whole = encode(photo())
    random = np.random.default_rng(0).bytes(4000)
    return {
        "empty": (b"", "the file is empty"),
        "half": (whole[: len(whole) // 2], "truncated"),
        "no end marker": (whole[:-2], "truncated"),
        "header only": (whole[:100], "JPEG"),
        "one byte": (b"\xff", "not an image"),
        "random": (random, "not an image"),
        "html": (b"\n<!DOCTYPE html><html><body>404 not found</body></html>", "HTML is not supported"),
        "gif": (encode(photo(), "GIF"), "GIF is not supported"),
        "half a png": (encode(photo(), "PNG")[:20000], "PNG"),
        "half a webp": (encode(photo(), "WEBP")[:9000], "WEBP"),
        "half a bmp": (encode(photo(), "BMP")[:20000], "BMP"),
        "bomb": (png(50000, 50000, 8, 2, b"\0" * 10), "2,500 megapixels), over the limit of 200 megapixels"),
    }


@pytest.fixture
def make() -> Iterator[Any]:
    """make_decoder, closed at the end."""
    made: list[Decoder] = []

    def one(name: str, preprocess: Preprocess | None = None, **options: Any) -> Decoder:
        options = {"batch": 16, "threads": 2, **options}
        made.append(make_decoder(name, preprocess or Preprocess(), **options))
        return made[-1]

    yield one
    for decoder in made:
        decoder.close()


def decode(decoder: Decoder, files: Sequence[Any]) -> Decoded:
    decoder.submit(files)
    return decoder.collect()


def differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.int() - b.int()).abs().float()


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    difference = differences(a, b)
    assert difference.mean() <= 0.25
    assert (difference > 2).float().mean() <= 0.01
    assert difference.max() <= 40


FITS: list[tuple[Fit, int, tuple[int, int]]] = [
    ("crop", 256, (224, 224)),
    ("crop", 81, (65, 47)),  # small and odd
    ("crop", 600, (513, 600)),  # larger than the pictures
    ("crop", 100, (180, 224)),  # torchvision pads with black
    ("squash", 256, (150, 231)),
    ("pad", 256, (224, 191)),
]
INTERPOLATIONS: list[Interpolation] = ["bilinear", "bicubic"]
PREPROCESSES = [
    Preprocess(interpolation=interpolation, fit=fit, resize=resize, crop=crop)
    for interpolation in INTERPOLATIONS
    for fit, resize, crop in FITS
]


@needs_dali
@pytest.mark.parametrize("preprocess", PREPROCESSES, ids=lambda p: f"{p.interpolation}-{p.fit}-{p.crop}")
def test_decoders_agree(make: Any, preprocess: Preprocess) -> None:
    pictures = [photo(name, size) for name in PHOTOS for size in [(500, 333), (201, 307), (99, 61), (640, 65)]]
    files = [encode(picture) for picture in pictures]
    dali = decode(make("dali", preprocess), files)
    other = decode(make("torchvision", preprocess), files)
    assert dali.errors == other.errors == {}
    assert dali.images.shape == (16, *preprocess.crop, 3)
    assert_close(dali.images, other.images)
    if preprocess.interpolation == "bilinear" and preprocess.fit == "crop" and preprocess.resize >= 256:
        inside = differences(dali.images, other.images)[:, 2:-2, 2:-2]
        assert inside.max() <= 1


@needs_dali
def test_nearest_agrees(make: Any) -> None:
    preprocess = Preprocess(interpolation="nearest")
    a, b = (decode(make(name, preprocess), jpegs()).images for name in ("dali", "torchvision"))
    assert (a != b).float().mean() <= 0.01  # a centre that falls between two pixels goes to either


@both
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (64, 97)])
def test_geometry_is_torchvisions(make: Any, name: str, interpolation: Interpolation, resize: int, crop: int) -> None:
    mode = v2.InterpolationMode(interpolation)
    preset = ImageClassification(crop_size=crop, resize_size=resize, interpolation=mode, mean=(0, 0, 0), std=(1, 1, 1))
    files = [encode(photo(n, size)) for n in PHOTOS for size in [(333, 500), (401, 255), (90, 131)]]
    expected = [preset(Image.open(io.BytesIO(file))) for file in files]
    expected_images = (torch.stack(expected) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    preprocess = Preprocess(resize=resize, crop=(crop, crop), interpolation=interpolation)
    images = decode(make(name, preprocess), files).images
    if name == "torchvision":
        assert torch.equal(images, expected_images)
    else:
        assert_close(images, expected_images)


FORMATS: dict[str, Any] = {
    "jpeg": lambda p: encode(p),
    "progressive": lambda p: encode(p, progressive=True),
    "cmyk": lambda p: encode(p.convert("CMYK")),
    "grey": lambda p: encode(p.convert("L")),
    "junk after the end": lambda p: encode(p) + b"junk" * 30,
    "png": lambda p: encode(p, "PNG"),
    "rgba png": lambda p: encode(Image.merge("RGBA", (*p.split(), p.convert("L"))), "PNG"),
    "grey png with alpha": lambda p: encode(p.convert("LA"), "PNG"),
    "palette": lambda p: encode(p.quantize(32), "PNG"),
    "palette with alpha": lambda p: encode(p.quantize(32), "PNG", transparency=bytes(range(32))),
    "1-bit png": lambda p: encode(p.convert("1"), "PNG"),
    "webp": lambda p: encode(p, "WEBP"),
    "lossless webp": lambda p: encode(p, "WEBP", lossless=True),
    "bmp": lambda p: encode(p, "BMP"),
    "palette bmp": lambda p: encode(p.quantize(32), "BMP"),
    "tiff": lambda p: encode(p, "TIFF"),
    "lzw tiff": lambda p: encode(p, "TIFF", compression="tiff_lzw"),
    "cmyk tiff": lambda p: encode(p.convert("CMYK"), "TIFF"),
    "jpeg 2000": lambda p: encode(p, "JPEG2000"),
    "ppm": lambda p: encode(p, "PPM"),
}


@needs_dali
def test_formats(make: Any) -> None:
    for picture in (photo("coffee.png", (301, 233)), photo("chelsea.png", (240, 350))):
        files = [write(picture) for write in FORMATS.values()]
        dali, other = (decode(make(name, batch=len(files)), files) for name in ("dali", "torchvision"))
        assert dali.errors == other.errors == {}
        for kind, a, b in zip(FORMATS, dali.images, other.images, strict=True):
            assert differences(a, b).max() <= 1, kind
            assert a.any(), kind


@both
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_pixels_are_scaled(make: Any, name: str, channels: int) -> None:
    values = np.random.default_rng(channels).integers(0, 65536, (32, 32, channels)).astype(np.uint16)
    decoder = make(name, Preprocess(fit="squash", crop=(32, 32), interpolation="nearest"))
    images = decode(decoder, [png16(values)]).images[0].numpy().astype(float)
    expected = np.broadcast_to(values[:, :, : min(channels, 3)] / 257, images.shape)
    # PIL keeps the upper eight bits of 16-bit colour: one level below at most.
    assert np.abs(images - expected).max() <= (1 if channels > 1 else 0.5)


@both
def test_exif_rotation_is_not_applied(make: Any, name: str) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    picture = photo("rocket.jpg", (320, 240))
    plain, turned = encode(picture), encode(picture, exif=exif)
    assert plain != turned
    images = decode(make(name), [plain, turned]).images
    assert torch.equal(images[0], images[1])


@both
@pytest.mark.parametrize("kind", bad_files())
def test_bad_file_alone(make: Any, name: str, kind: str) -> None:
    data, part = bad_files()[kind]
    decoder = make(name)
    for _ in range(2):
        result = decode(decoder, [data])
        assert result.images.shape == (1, 224, 224, 3) and not result.images.any()
        assert list(result.errors) == [0]
        assert part in result.errors[0]
        assert len(result.errors[0]) <= 200 and result.errors[0].isprintable()
    assert decode(decoder, jpegs()).errors == {}


@both
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bad_files_cost_only_themselves(make: Any, name: str, depth: int) -> None:
    """Undisturbed batches against the same with bad files strewn in, several in flight: equal bit for bit."""
    bad = [data for data, _ in bad_files().values()]
    good = [jpegs(16)[i : i + 6] for i in (0, 5, 9, 3, 7, 1)]
    undisturbed = make(name)
    expected = [decode(undisturbed, files).images for files in good]

    batches = [list(files) for files in good]
    ruined: list[set[int]] = [set(), {0}, {2, 5}, set(), {1}, set(range(6))]
    for batch, places in zip(batches, ruined, strict=True):
        for place in places:
            batch[place] = bad.pop(0)
    decoder = make(name, depth=depth)
    assert decoder.depth == depth
    results = []
    for i, batch in enumerate(batches):
        if i >= depth:
            results.append(decoder.collect())
        decoder.submit(batch)
    results += [decoder.collect() for _ in range(depth)]
    for result, images, places in zip(results, expected, ruined, strict=True):
        assert set(result.errors) == places
        for place in range(6):
            if place in places:
                assert not result.images[place].any()
            else:
                assert torch.equal(result.images[place], images[place])


@both
def test_all_kinds_together(make: Any, name: str) -> None:
    kinds = bad_files()
    decoder = make(name, batch=len(kinds) + 8)
    files = [*jpegs()[:3], *(data for data, _ in kinds.values()), *jpegs()[3:]]
    result = decode(decoder, files)
    assert sorted(result.errors) == list(range(3, 3 + len(kinds)))
    for (kind, (_, part)), place in zip(kinds.items(), range(3, 3 + len(kinds)), strict=True):
        assert part in result.errors[place], kind
    good = [i for i in range(len(files)) if i not in result.errors]
    assert torch.equal(result.images[good], decode(decoder, jpegs()).images)


@both
def test_limit_of_pixels(make: Any, name: str) -> None:
    small, large = encode(photo(size=(1000, 1000))), encode(photo(size=(1100, 1000)))
    decoder = make(name, Preprocess(resize=64, crop=(64, 64)), max_pixels=1_000_000)
    assert decode(decoder, [small, large, small]).errors == {
        1: "1100 x 1000 pixels (1.10 megapixels), over the limit of 1.00 megapixels"
    }
    thin = encode(photo(size=(3000, 1)), "PNG")
    expected = "3000 x 1 pixels would be resized to 192000 x 64, over the limit of 1.00 megapixels"
    assert decode(decoder, [thin]).errors == {0: expected}


@both
def test_pixels_beyond_pils_own_limit(make: Any, name: str) -> None:
    """PIL warns at 89 megapixels and refuses at 179; the limit here is ours."""
    data = png(14000, 13000, 1, 0, (b"\0" + b"\xff" * 1750) * 13000)  # 182 megapixels, white
    result = decode(make(name, Preprocess(interpolation="nearest")), [data])
    assert result.errors == {} and bool((result.images == 255).all())


@both
def test_images_stay_valid(make: Any, name: str) -> None:
    decoder = make(name, depth=3)
    held, copies = [], []
    for i in range(12):
        images = decode(decoder, jpegs(16)[i % 5 : i % 5 + 8]).images
        held.append(images)
        copies.append(images.clone())
    assert images.is_contiguous() and images.dtype == torch.uint8
    images.zero_()  # writable, and nobody else's
    copies[-1].zero_()
    decoder.close()
    del decoder
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


@both
def test_batches_of_any_size_come_in_order(make: Any, name: str) -> None:
    reference = decode(make(name), jpegs(16)).images
    decoder = make(name, depth=3)
    spans = [(0, 16), (3, 4), (5, 12), (0, 1), (9, 16), (2, 5)]
    for i, (start, stop) in enumerate(spans):
        decoder.submit(jpegs(16)[start:stop])
        if i >= 2:
            assert torch.equal(decoder.collect().images, reference[slice(*spans[i - 2])])
    for span in spans[-2:]:
        assert torch.equal(decoder.collect().images, reference[slice(*span)])


@both
def test_equal_for_any_number_of_threads_and_neighbours(make: Any, name: str) -> None:
    together = decode(make(name), jpegs()).images
    alone = make(name, threads=1, batch=1)
    assert torch.equal(together, torch.cat([decode(alone, [file]).images for file in jpegs()]))


@both
def test_misuse(make: Any, name: str) -> None:
    decoder = make(name, batch=2, depth=1)
    with pytest.raises(ValueError, match="expected 1 to 2 files, got 3"):
        decoder.submit(jpegs()[:3])
    with pytest.raises(ValueError, match="got 0"):
        decoder.submit([])
    decoder.submit(jpegs()[:2])
    with pytest.raises(RuntimeError, match="collect one first"):
        decoder.submit(jpegs()[:2])
    assert len(decoder.collect().images) == 2


def threads() -> set[int]:
    """Threads of this process."""
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


@both
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_threads_end(name: str) -> None:
    before = threads()
    decoder = make_decoder(name, Preprocess(), batch=8, threads=2)
    assert decode(decoder, [*jpegs()[:7], bad_files()["half"][0]]).errors.keys() == {7}  # salvage has threads too
    mine = threads() - before
    decoder.submit(jpegs())  # closing does not need an empty decoder
    decoder.close()
    decoder.close()
    for _ in range(100):
        if not (left := mine & threads()):
            break
        time.sleep(0.05)
    assert not left


@needs_dali
def test_native_stderr_keeps_the_terminal_clean(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, native_stderr(log.fileno()):
        decoder = make_decoder("dali", Preprocess(), batch=32, threads=1)
        assert decode(decoder, [data for data, _ in bad_files().values()]).errors
        decoder.close()
        print("still seen", file=sys.stderr)
    print("and after", file=sys.stderr)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "still seen\nand after\n")
    assert b"ERROR" in (tmp_path / "log").read_bytes()


def test_importing_does_not_import_dali() -> None:
    code = "import maxact.decode, sys; print('nvidia.dali' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_pictures(make: Any) -> None:
    """A dataset's pictures come out as the same picture's file does."""
    picture = photo("chelsea.png", (300, 280))
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    same = [picture, array, tensor, array / np.float32(255), tensor / 255, encode(picture, "PNG")]
    result = decode(make("auto", pictures=True), same)
    assert result.errors == {}
    assert all(torch.equal(result.images[0], image) for image in result.images)
    grey = [
        picture.convert("L"),
        np.asarray(picture.convert("L")),
        np.asarray(picture.convert("L"))[:, :, None],
    ]
    images = decode(make("torchvision", pictures=True), [*grey, picture.convert("RGBA")]).images
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert torch.equal(images[3], result.images[0])


def test_what_is_no_picture(make: Any) -> None:
    wrong = {
        "tuple is not a picture": (photo(), 3),
        "shape (5, 5, 2)": np.zeros((5, 5, 2), np.uint8),
        "shape (224,)": torch.zeros(224),
        "values outside 0..1": np.full((5, 5, 3), 200.0),
        "values outside": torch.full((3, 5, 5), float("nan")),
        "a picture of int64": np.zeros((5, 5, 3), np.int64),
    }
    result = decode(make("torchvision", pictures=True), [*wrong.values(), photo()])
    assert list(result.errors) == list(range(len(wrong)))
    for part, reason in zip(wrong, result.errors.values(), strict=True):
        assert part in reason
    assert result.images[-1].any()


def halves(picture: Image.Image) -> torch.Tensor:
    """A preprocess function."""
    if picture.width == 333:
        raise KeyError("no such\nthing")
    if picture.width == 299:
        return torch.zeros(3, 7, 7)
    if picture.width == 500:
        return picture  # type: ignore[return-value]
    pixels: torch.Tensor = v2.functional.pil_to_tensor(picture.resize((40, 30)))
    return pixels / 510


def test_preprocess_function(make: Any) -> None:
    preprocess = Preprocess(function=f"{__name__}:halves", crop=(30, 40))
    pictures = [photo("coffee.png", (width, 240)) for width in (320, 333, 299, 500, 321)]
    files = [encode(picture, "PNG") for picture in pictures]
    for given in (files, pictures):
        result = decode(make("auto", preprocess, pictures=given is pictures), [*given, b"<html>"])
        assert result.images.shape == (6, 3, 30, 40) and result.images.dtype == torch.float32
        assert torch.equal(result.images[0], halves(pictures[0]))
        assert torch.equal(result.images[4], halves(pictures[4]))
        assert not result.images[[1, 2, 3, 5]].any()
        assert result.errors.pop(5).startswith(("HTML", "bytes is not", "not an image"))
        kind = "PngImageFile" if given is files else "Image"
        assert result.errors == {
            1: "preprocess function: KeyError: 'no such\\nthing'",
            2: "preprocess function: gave a tensor [3, 7, 7], expected [3, 30, 40] (--crop sets the size)",
            3: f"preprocess function: gave {kind}, expected a tensor [3, 30, 40]",
        }


def test_choice(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function = Preprocess(function=f"{__name__}:halves")
    with pytest.raises(UsageError, match="expected auto, dali, torchvision, got 'opencv'"):
        make("opencv")
    with pytest.raises(UsageError, match="dali cannot take a dataset of pictures"):
        make("dali", pictures=True)
    with pytest.raises(UsageError, match=r"dali cannot take the preprocess function .*halves"):
        make("dali", function)
    assert type(make("auto", function)).__name__ == "TorchvisionDecoder"
    assert type(make("auto", pictures=True)).__name__ == "TorchvisionDecoder"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as if it were not installed
    assert type(make("auto")).__name__ == "TorchvisionDecoder"
    with pytest.raises(MaxactError, match="pip install nvidia-dali-cuda130") as caught:
        make("dali")
    assert "\n" not in str(caught.value)


@needs_dali
def test_auto_is_dali(make: Any) -> None:
    assert type(make("auto")).__name__ == "DaliDecoder"


@needs_dali
def test_dalis_messages() -> None:
    from maxact.decode_dali import _meaning, _raise_if_fatal

    message = (
        "Critical error in pipeline:\nError in CPU operator `nvidia.dali.fn.decoders.image`,\nwhich was used in the "
        'pipeline definition with the following traceback:\n\n  File "/x/cuda.py", line 1, in f\n    g()\n\n'
        "encountered:\n\n{}\nCurrent pipeline object is no longer valid."
    )
    plain = RuntimeError(message.format("[/opt/dali/a/b.cc:371] Failed to decode sample #0 : "))
    assert _meaning(plain) == "Failed to decode sample #0"
    _raise_if_fatal(plain)
    assert _meaning(RuntimeError("Critical error in pipeline:\n\nall wrong\n")) == "all wrong"
    assert _meaning(RuntimeError("")) == "RuntimeError"
    with pytest.raises(MaxactError, match=re.escape("dali failed (CUDA runtime API error")):
        _raise_if_fatal(RuntimeError(message.format("CUDA runtime API error cudaErrorMemoryAllocation (2):")))


@both
def test_a_picture_without_pixels_costs_only_itself(name: str) -> None:
    """A PNG whose header says 0 x 0; DALI's peek reports it without a word."""
    header = struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    files = [*jpegs()[:2], b"\x89PNG\r\n\x1a\n" + chunk]
    decoder = make_decoder(name, Preprocess(), batch=3, threads=1)
    decoded = decode(decoder, files)
    decoder.close()
    assert set(decoded.errors) == {2} and not decoded.images[2].any() and decoded.images[:2].any()
