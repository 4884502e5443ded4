"""The DALI decoder. The only file that imports DALI.

Nothing here has run on CUDA yet. Comments say what is expected there.
"""

from __future__ import annotations

import io
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

from maxact.decoder import Decoded, Settings
from maxact.errors import MaxactError, OutOfMemory, is_memory
from maxact.pictures import Refused, alone, line, open_picture, rgb
from maxact.preprocess import Placement

# Read when DALI is loaded: OpenCV, inside it, would print about damaged files.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
dali: Any = import_module("nvidia.dali")  # untyped but for part of its operators
fn, types = dali.fn, dali.types
to_torch_tensor: Any = import_module("nvidia.dali.plugin.pytorch.torch_utils").to_torch_tensor
Pipeline = Any

_TRAILER = 4096  # bytes that may stand behind a JPEG's end
_AT_ONCE = 1 << 29  # pixels that are decoded at once: pictures in their own size, of which a batch can hold many

# What DALI raises for a batch that it cannot decode.
DALI_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass(frozen=True)
class _Item:
    """An image to decode."""

    data: bytes
    shape: tuple[int, int]  # height, width
    placement: Placement


@dataclass
class _Flight:
    """A batch on its way. DALI reads the bytes where they lie, so they are kept here as long as it may."""

    n: int
    items: dict[int, _Item]  # place in the batch -> image; those that the headers ruled out are missing
    errors: dict[int, str]
    at_once: bool  # else it is decoded in parts, when it is collected


class DaliDecoder:
    """One pipeline reads the sizes from the headers, a second decodes and resizes what the crop shows.

    An error loses its whole batch, does not say which file it was, and harms no other batch (checked on the CPU
    with one to three batches in flight). So a lost batch is decoded again in parts, until the bad images are found.

    On CUDA, JPEGs are decoded by nvJPEG: its pixels differ from those of the CPU by a few levels, and those of its
    hardware decoder from its others. What has no JPEG's end is left to PIL there, as other formats are everywhere:
    whether it is bad must not depend on the device.
    """

    def __init__(self, settings: Settings) -> None:
        self.depth = settings.depth
        self._settings = settings
        self._cuda = settings.device.type == "cuda"
        self._pool = ThreadPoolExecutor(settings.threads, "decode")
        self._peek = self._peek_pipeline()
        self._decode = self._made(settings.batch, settings.depth)
        self._spare: Pipeline = None  # decodes lost batches; made for the first
        # after the pipelines, so that they are freed after them
        self._flights: deque[_Flight] = deque()
        self._read: deque[tuple[torch.cuda.Event, _Flight]] = deque()  # of which the GPU may still read the bytes

    def submit(self, files: Sequence[bytes]) -> None:
        self._settings.check(files, len(self._flights))
        errors = {i: "the file is empty" for i, file in enumerate(files) if not file}
        shapes = self._shapes({i: f for i, f in enumerate(files) if self._takes(f)}, errors)
        for i, file in enumerate(files):
            if file and not self._takes(file):
                try:
                    picture = open_picture(file)
                    shapes[i] = picture.height, picture.width
                except Refused as refused:
                    errors[i] = line(refused)
        items = {}
        for i, shape in sorted(shapes.items()):
            try:
                items[i] = _Item(files[i], shape, self._settings.place(*shape))
            except Refused as refused:
                errors[i] = line(refused)
        at_once = sum(map(_pixels, items.values())) <= _AT_ONCE
        if at_once:
            items = self._plain(items, errors)
        if items and at_once:
            with _fatal():
                self._feed(self._decode, list(items.values()))
                self._decode.schedule_run()
        self._flights.append(_Flight(len(files), items, errors, at_once))

    def collect(self) -> Decoded:
        flight = self._flights.popleft()
        try:
            return self._collect(flight)
        finally:
            if self._cuda:
                self._keep(flight)

    def _collect(self, flight: _Flight) -> Decoded:
        n, items = flight.n, list(flight.items.items())
        if not items:
            return Decoded(self.blank(n), flight.errors)
        if not flight.at_once:
            images = self.blank(n)
            for part in _parts(items, (self._settings.batch + 1) // 2):
                if plain := self._plain(dict(part), flight.errors):
                    flight.items |= plain  # what is decoded now
                    self._decode_part(list(plain.items()), images, flight.errors)
            return Decoded(images, flight.errors)
        try:
            images = self._share(self._decode)
        except DALI_ERRORS as error:
            images = self.blank(n)
            self._salvage(items, error, images, flight.errors)
            return Decoded(images, flight.errors)
        if len(items) < n:
            some, images = images, self.blank(n)
            images[list(flight.items)] = some
        return Decoded(images, flight.errors)

    def close(self) -> None:
        self._peek = self._decode = self._spare = None  # DALI ends its threads with the last reference,
        self._flights.clear()  # and only then do they no longer read these bytes
        self._read.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _salvage(
        self, items: list[tuple[int, _Item]], error: Exception, images: torch.Tensor, errors: dict[int, str]
    ) -> None:
        """Decode what failed together with `error` again, by halves, until only the bad ones are left.

        The good ones come out as they would have. Halves, because they keep all threads busy: a bad image costs
        about as much as its batch once more.
        """
        if self._cuda or "bad_alloc" not in str(error):  # a header that lies asks the CPU for more than there is
            _raise_if_fatal(error)
        if len(items) == 1:
            ((place, item),) = items
            errors[place] = self._why(item.data, error)
            return
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            self._decode_part(half, images, errors)

    def _decode_part(self, items: list[tuple[int, _Item]], images: torch.Tensor, errors: dict[int, str]) -> None:
        """Decode a part of a batch, and again by halves where that fails."""
        if self._spare is None:
            self._spare = self._made((self._settings.batch + 1) // 2, 1)
        self._feed(self._spare, [item for _, item in items])
        self._spare.schedule_run()
        try:
            images[[place for place, _ in items]] = self._share(self._spare)
        except DALI_ERRORS as error:
            self._salvage(items, error, images, errors)

    def blank(self, n: int) -> torch.Tensor:
        shape = (n, *self._settings.preprocess.crop, 3)
        return torch.zeros(shape, dtype=torch.uint8, device=self._settings.device)

    def _keep(self, flight: _Flight) -> None:
        """Keeps what was collected until the GPU has made its pixels, and lets those go that it has made."""
        made = torch.cuda.Event()  # type: ignore[no-untyped-call]
        made.record(torch.cuda.current_stream(self._settings.device))
        self._read.append((made, flight))
        while self._read and self._read[0][0].query():  # type: ignore[no-untyped-call]
            self._read.popleft()

    def _takes(self, file: bytes) -> bool:
        """Whether DALI is to decode a file: see the class."""
        return file[:3] == b"\xff\xd8\xff" and (not self._cuda or b"\xff\xd9" in file[-_TRAILER:])

    def _plain(self, items: dict[int, _Item], errors: dict[int, str]) -> dict[int, _Item]:
        """The same items, with what is no JPEG decoded to plain pixels; `errors` gains what cannot be.

        Damaged PNG and TIFF files crash DALI's own decoders for them, or never come back. PIL's pixels are the same.
        """
        others = [i for i, item in items.items() if not self._takes(item.data)]
        for i, made in zip(others, self._pool.map(_as_ppm, [items[i] for i in others]), strict=True):
            if isinstance(made, bytes):
                items[i] = replace(items[i], data=made)
            else:
                errors[i] = made
                del items[i]
        return items

    def _shapes(self, files: dict[int, bytes], errors: dict[int, str]) -> dict[int, tuple[int, int]]:
        """Height and width of each file by its header; `errors` gains those that have none."""
        if not files:
            return {}
        try:
            self._peek.feed_input("files", [np.frombuffer(file, np.uint8) for file in files.values()])
            self._peek.schedule_run()
            (shapes,) = self._peek.share_outputs()
            sizes = shapes.as_array().tolist()  # per file: height, width, channels
            self._peek.release_outputs()
        except DALI_ERRORS as error:
            places = list(files)
            if len(places) == 1:
                errors[places[0]] = self._why(files[places[0]], error)
                return {}
            middle = len(places) // 2
            halves = places[:middle], places[middle:]
            first, second = (self._shapes({i: files[i] for i in half}, errors) for half in halves)
            return first | second
        return {i: (height, width) for i, (height, width, _) in zip(files, sizes, strict=True)}

    def _why(self, data: bytes, error: Exception) -> str:
        """Why DALI refused a file. It hardly says ("Failed to decode sample #0"), so PIL is asked first."""
        try:
            picture = open_picture(data)
        except Refused as refused:
            return line(refused)
        try:
            if picture.height * picture.width <= self._settings.max_pixels:
                picture.load()
        except Exception as reason:
            return line(f"{picture.format}: {line(reason)}")
        return line(f"{picture.format}: DALI cannot decode it ({_meaning(error)})")

    @property
    def _padded(self) -> bool:
        """Whether the crop can reach beyond a resized picture."""
        preprocess = self._settings.preprocess
        if preprocess.fit == "crop":
            return preprocess.resize < max(preprocess.crop)
        return preprocess.fit == "pad"

    def _feed(self, pipeline: Pipeline, items: list[_Item]) -> None:
        """Hand a batch to a decode pipeline.

        Only what the crop shows is resized, a third less work than all for ImageNet's shapes: rows and columns
        first..last of the resized picture, which come from start..stop of the picture as it is, [y, x] each.
        """
        crop = np.array(self._settings.preprocess.crop)
        resized = np.array([item.placement.size for item in items])  # [N, 2], as all below
        corner = np.array([item.placement.start for item in items])
        scale = np.array([item.shape for item in items]) / resized
        first, last = np.maximum(corner, 0), np.minimum(corner + crop, resized)
        pipeline.feed_input("files", [np.frombuffer(item.data, np.uint8) for item in items])
        pipeline.feed_input("start", (first * scale).astype(np.float32))
        pipeline.feed_input("stop", (last * scale).astype(np.float32))
        if self._padded:
            pipeline.feed_input("size", (last - first).astype(np.float32))
            pipeline.feed_input("offset", np.minimum(corner, 0).astype(np.int32))

    def _share(self, pipeline: Pipeline) -> torch.Tensor:
        """The oldest batch of a decode pipeline, uint8 [N, H, W, 3].

        On a CPU it lies in DALI's own memory, freed with the tensor: each batch has memory of its own as long as
        someone holds it, which is how DALI's dynamic executor (the default) works. On CUDA it is copied, on torch's
        current stream, which DALI makes wait for the batch: what DALI lends there is given back by a thread of DALI's
        that waits for the whole device.
        """
        stream = torch.cuda.current_stream(self._settings.device) if self._cuda else None
        (images,) = pipeline.share_outputs(cuda_stream=stream)
        tensor: torch.Tensor = to_torch_tensor(images.as_tensor(), copy=self._cuda)
        pipeline.release_outputs()
        return tensor

    def _made(self, batch: int, depth: int) -> Pipeline:
        with _fatal():
            return self._decode_pipeline(batch, depth)

    def _peek_pipeline(self) -> Pipeline:
        """Files -> height, width, channels. 40,000 headers a second on one core."""
        pipeline = dali.Pipeline(self._settings.batch, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True)
            pipeline.set_outputs(fn.peek_image_shape(files, adjust_orientation=False))
        pipeline.build()
        return pipeline

    def _decode_pipeline(self, batch: int, depth: int) -> Pipeline:
        """Files -> uint8 [N, H, W, 3]. It is returned with all threads running and nothing in flight."""
        preprocess, device = self._settings.preprocess, self._settings.device
        gpu = None
        options: dict[str, Any] = {"device": "cpu"}
        if self._cuda:
            gpu = torch.cuda.current_device() if device.index is None else device.index
            options = {
                "device": "mixed",
                "jpeg_fancy_upsampling": True,  # chroma as on the CPU
                # Buffers of the hardware decoder only grow: they start at a usual photograph's size.
                "preallocate_height_hint": 1024,
                "preallocate_width_hint": 1024,
            }
            if self._settings.hardware_share is not None:
                options["hw_decoder_load"] = self._settings.hardware_share
        kind = {"nearest": types.INTERP_NN, "bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

        def source(name: str, dtype: Any) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=1)

        pipeline = dali.Pipeline(batch, num_threads=self._settings.threads, device_id=gpu, prefetch_queue_depth=depth)
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True)
            images = fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False, **options)
            images = fn.resize(
                images,
                roi_start=source("start", types.FLOAT),
                roi_end=source("stop", types.FLOAT),
                size=source("size", types.FLOAT) if self._padded else preprocess.crop,
                interp_type=kind[preprocess.interpolation],
                antialias=True,
            )
            if self._padded:
                images = fn.slice(
                    images,
                    start=source("offset", types.INT32),
                    shape=preprocess.crop,
                    axes=(0, 1),
                    out_of_bounds_policy="pad",
                    fill_values=self._settings.fill,
                )
            pipeline.set_outputs(images)
        pipeline.build()
        # A pipeline's first schedule_run starts `depth` batches and every later one starts one. So the first ones
        # are dummies; they also start every thread here.
        black = io.BytesIO()
        Image.new("RGB", (64, 64)).save(black, "JPEG")
        for _ in range(depth):
            self._feed(pipeline, [_Item(black.getvalue(), (64, 64), preprocess.placement(64, 64))])
        pipeline.schedule_run()
        for _ in range(depth):
            self._share(pipeline)
        return pipeline


def _as_ppm(item: _Item) -> bytes | str:
    """An image of another format as the plainest file that DALI takes, or why it is bad."""
    source = ""
    try:
        picture = open_picture(item.data)
        source = f"{picture.format}: "
        with alone(picture):
            picture = rgb(picture)
        if (picture.height, picture.width) != item.shape:
            raise Refused(f"{source}its size is not the one that it begins with")
        return b"P6\n%d %d\n255\n" % picture.size + picture.tobytes()
    except Refused as refused:
        return line(refused)
    except Exception as error:
        return line(f"{source}{line(error)}")


def _pixels(item: _Item) -> int:
    return item.shape[0] * item.shape[1]


def _parts(items: list[tuple[int, _Item]], most: int) -> Iterator[list[tuple[int, _Item]]]:
    """At most so many items, and pixels, at a time; one that has more alone."""
    part: list[tuple[int, _Item]] = []
    for item in items:
        if part and (len(part) == most or sum(_pixels(each) for _, each in part) + _pixels(item[1]) > _AT_ONCE):
            yield part
            part = []
        part.append(item)
    yield part


def _meaning(error: Exception) -> str:
    """What one of DALI's messages says, without its preamble, traceback, epilogue and place in its sources."""
    frame = ("Critical error in pipeline", "Current pipeline object")
    lines = [text.strip() for text in str(error).rpartition("encountered:")[2].splitlines()]
    for text in lines:
        if text and not text.startswith(frame):
            return line(re.sub(r"^\[\S+:\d+\]\s*", "", text).rstrip(" :"))
    return type(error).__name__


@contextmanager
def _fatal() -> Iterator[None]:
    """Whatever DALI raises inside cannot be blamed on a file; where the memory is short it says so."""
    try:
        yield
    except DALI_ERRORS as error:
        _raise_if_fatal(error)
        raise


def _raise_if_fatal(error: Exception) -> None:
    """What no file can be blamed for ends the run instead of being recorded as a bad image."""
    meaning = _meaning(error)
    if is_memory(meaning) or re.search(r"\bcuda|\bnvml", meaning, re.IGNORECASE):
        advice = "try a smaller batch, or the decoder torchvision"
        kind = OutOfMemory if is_memory(meaning) else MaxactError
        raise kind(f"decoder: dali failed ({meaning}); {advice}") from error
