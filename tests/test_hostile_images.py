"""Image files that mean harm: a damaged one costs nobody but itself, and no header takes the memory."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hostile import damaged, frugal, fuzz
from maxact import decode_dali, pictures
from maxact.catalog import Catalog
from maxact.crops import cut_out, visible
from maxact.decode import make_decoder
from maxact.decoder import Decoder
from maxact.inputs import Inputs, source_box
from maxact.pictures import Refused, open_thumb
from maxact.preprocess import Preprocess
from maxact.repack import PackConfig, smaller
from support import photograph

NAMES = ("dali", "torchvision")
FIT = Preprocess(resize=20, crop=(16, 16))
LIMIT = 4_000_000


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def whole() -> dict[str, bytes]:
    colour = photograph(0, 24)
    grey, palette = colour.convert("L"), colour.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette.info["transparency"] = 3
    return {
        "jpeg": encode(colour, "JPEG"),
        "progressive": encode(colour, "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        "cmyk": encode(colour.convert("CMYK"), "JPEG"),
        "grey": encode(grey, "JPEG"),
        "png": encode(colour, "PNG"),
        "palette": encode(palette, "PNG"),
        "deep": encode(deep, "PNG"),
        "bit": encode(grey.convert("1"), "PNG"),
        "webp": encode(colour, "WEBP"),
        "lossless": encode(colour.convert("RGBA"), "WEBP", lossless=True),
        "gif": encode(palette, "GIF"),
        "tiff": encode(colour, "TIFF"),
        "lzw": encode(colour, "TIFF", compression="tiff_lzw"),
        "deflate": encode(grey, "TIFF", compression="tiff_adobe_deflate"),
        "bmp": encode(colour, "BMP"),
        "bmp of 8 bits": encode(palette, "BMP"),
        "ppm": encode(colour, "PPM"),
        "jpeg 2000": encode(colour, "JPEG2000"),
    }


WHOLE = whole()
GOOD = encode(photograph(1, 24), "JPEG")


@pytest.fixture(scope="module")
def decoders() -> Iterator[dict[str, Decoder]]:
    made = {name: make_decoder(name, FIT, batch=3, threads=1, max_pixels=LIMIT) for name in NAMES}
    yield made
    for decoder in made.values():
        decoder.close()


@pytest.fixture(scope="module")
def good(decoders: dict[str, Decoder]) -> dict[str, torch.Tensor]:
    found = {}
    for name, decoder in decoders.items():
        decoder.submit([GOOD])
        found[name] = decoder.collect().images[0].clone()
    return found


@pytest.mark.filterwarnings("ignore")  # PIL warns of some damage, and reads on
@fuzz(40)
@given(st.sampled_from(sorted(WHOLE)).flatmap(lambda name: damaged(WHOLE[name], 200)))
def test_a_damaged_file_costs_only_itself(
    decoders: dict[str, Decoder], good: dict[str, torch.Tensor], data: bytes
) -> None:
    for name, decoder in decoders.items():
        decoder.submit([GOOD, data, GOOD])
        found = decoder.collect()
        assert torch.equal(found.images[0], good[name]) and torch.equal(found.images[2], good[name])
        assert set(found.errors) <= {1}
        for reason in found.errors.values():
            assert reason and len(reason) <= 200 and len(reason.splitlines()) == 1
            assert not found.images[1].any()
    try:
        packed = smaller(data, PackConfig(short_side=16, max_megapixels=LIMIT / 1e6))
    except Refused as refused:
        assert len(str(refused).splitlines()) == 1
    else:
        pictures.open_picture(packed)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def lies() -> dict[str, bytes]:
    """Headers that say that there is far more than there is."""
    most = 1 << 30
    bomb = zlib.compress(bytes(1 << 26), 9)
    jpeg, webp = bytearray(WHOLE["jpeg"]), bytearray(WHOLE["lossless"])
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = b"\xff\xff\xff\xff"
    start = webp.index(b"VP8L") + 9
    webp[start : start + 4] = b"\xff\xff\xff\x0f"
    bmp = bytearray(WHOLE["bmp"])
    bmp[18:26] = struct.pack("<ii", most, most)
    tiff = bytearray(WHOLE["tiff"])
    for tag in (256, 257, 278):  # width, height, rows in a strip: of the little-endian directory
        place = tiff.index(struct.pack("<H", tag), int.from_bytes(tiff[4:8], "little"))
        tiff[place + 2 : place + 12] = struct.pack("<HII", 4, 1, most)
    j2k = bytearray(WHOLE["jpeg 2000"])
    place = j2k.index(b"\xff\x51") + 6
    j2k[place : place + 8] = struct.pack(">II", most, most)
    return {
        "png": png(most, most, b""),
        "png of one row": png(most, 1, b""),
        "png with text": png(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"zTXt", b"a\0\0" + bomb)),
        "png with a profile": png(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"iCCP", b"a\0\0" + bomb)),
        "png with too much": png(8, 8, bomb),
        "jpeg": bytes(jpeg),
        "webp": bytes(webp),
        "bmp": bytes(bmp),
        "bmp upside down": bytes(bmp[:22]) + struct.pack("<i", -most) + bytes(bmp[26:]),
        "tiff": bytes(tiff),
        "ppm": b"P6 %d %d 255\n" % (most, most),
        "ppm of digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
        "jpeg 2000": bytes(j2k),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", lies())
def test_headers_that_lie(decoders: dict[str, Decoder], good: dict[str, torch.Tensor], name: str) -> None:
    data = lies()[name]
    with frugal(300):
        for each, decoder in decoders.items():
            decoder.submit([GOOD, data])
            found = decoder.collect()
            assert torch.equal(found.images[0], good[each])
            assert name in ("png with text", "png with a profile", "png with too much") or 1 in found.errors


@pytest.mark.parametrize("name", NAMES)
def test_many_large_pictures_are_not_decoded_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred pictures of 200 megapixels in one batch would take 60 GB."""
    monkeypatch.setattr(decode_dali, "_AT_ONCE", 2 * 24 * 24)
    monkeypatch.setattr(pictures, "_LARGE", 100)
    files = [encode(photograph(3 * number, 24), "PNG") for number in range(7)]
    files[4] = files[4][:-30]
    files.insert(2, encode(photograph(0, 60), "PNG"))  # by itself beyond what may be decoded at once
    for batch in (8, 1):
        found, each = [], make_decoder(name, FIT, batch=batch, threads=2)
        plain = make_decoder("torchvision", FIT, batch=8, threads=1)
        for start in range(0, 8, batch):
            each.submit(files[start : start + batch])
            decoded = each.collect()
            found += [None if place in decoded.errors else decoded.images[place] for place in range(batch)]
        plain.submit(files)
        expected = plain.collect()
        assert [image is None for image in found] == [place in expected.errors for place in range(8)]
        for image, wanted in zip(found, expected.images, strict=True):
            assert image is None or (image.int() - wanted.int()).abs().max() <= 40
        each.close()
        plain.close()


@pytest.mark.filterwarnings("ignore")
@fuzz(5)
@given(st.lists(st.sampled_from(sorted(WHOLE)).flatmap(lambda name: damaged(WHOLE[name])), min_size=1, max_size=4))
def test_crops_of_what_could_be_read(tmp_path: Path, files: list[bytes]) -> None:
    for number, data in enumerate([GOOD, *files]):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    paths = [tmp_path / f"{number}.jpg" for number in range(len(files) + 1)]
    catalog = Catalog.build(paths)
    with Inputs(catalog, FIT, decoder="torchvision", max_pixels=LIMIT) as inputs:
        found, bad = inputs.get(range(len(paths)))
    assert 0 in found and sorted([*found, *(image.image for image in bad)]) == list(range(len(paths)))
    for image in found.values():
        box = np.array([-4, -4, 20, 20], np.int32)
        assert cut_out(visible(image.pixels), box, (9, 9)).shape == (3, 9, 9)
        assert np.isfinite(source_box(box, FIT, image.original)).all()


def test_an_image_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.jpg", "wb") as file:
        file.truncate(1 << 40)  # takes no room
    catalog = Catalog.build(tmp_path)
    with frugal(100), Inputs(catalog, FIT, decoder="torchvision", max_pixels=LIMIT) as inputs:
        _, (bad,) = inputs.get([0])
    assert (bad.stage, bad.error) == ("decode", "1,024 GiB: no image is so large")


def test_a_thumb_that_is_a_bomb() -> None:
    with pytest.raises(Refused, match="no model input is so large"):
        open_thumb(png(20_000, 20_000, b""))
