"""The loop of the second pass: a block's winners are read, projected, cut out, and given as arrays.

A block is one list of one tap and one chunk of its channels. What the names stand for: `inputs.Inputs` reads and
decodes the winning images while the block before is on the device; `patches` says which part of an image a winner's
field needs; `deconv.Projector` runs the network on those parts and back; `crops` cuts the pictures out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maxact import crops, patches
from maxact.catalog import Catalog
from maxact.config import ProjectConfig, RunConfig, ScanConfig, cores
from maxact.deconv import Projected, Projector, share
from maxact.fetch import check_readable
from maxact.field import Field
from maxact.inputs import Input, Inputs, source_box
from maxact.models import Normalised
from maxact.numerics import current, kept_memory, numerics
from maxact.partial import BadImage
from maxact.preprocess import Preprocess
from maxact.process import Tick
from maxact.results import Peaks
from maxact.tap import Tap
from maxact.winners import Layout
from maxact_kernels.boxes import smallest_boxes

TOLERANCE = 1e-4  # of a score, between a patch and the whole image
_WORTH = 0.75  # share of the work up to which winners run one by one, rather than share an image's forward pass
_PROBES = 4  # whole images that decide it where patches do not give the stored scores

Some = NDArray[np.int64]  # numbers of winners of a block, [n]


@dataclass(frozen=True)
class Block:
    """Some channels of one list of a tap, from `start` on, as many as a chunk of the arrays has.

    `peaks` are these channels' winners at the ranks that are shown, with -1 as image where there is nothing to do;
    `left` numbers the channels in which there is something, from 0 at the first of the block; `spread` [C] is the
    standard deviation of each channel, against which differences of scores are measured. `index` is its number in the
    pass.
    """

    index: int
    tap: Tap
    field: Field
    place: str
    layout: Layout
    start: int
    left: NDArray[np.int64]
    peaks: Peaks
    spread: NDArray[np.float32]

    @property
    def winners(self) -> int:
        """How many there are."""
        return int((self.peaks.image >= 0).sum())

    @property
    def images(self) -> list[int]:
        """The winning images, each once, in order."""
        return np.unique(self.peaks.image[self.peaks.image >= 0]).tolist()  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return f"{self.place}, channels {self.start} to {self.start + len(self.peaks.image) - 1}"


@dataclass
class Result:
    """What a block gave: arrays as `Winners.write` takes them, with a row for each of its channels.

    `bad` are the images that could not be had. `deviation` is the largest difference between a recomputed score and
    the stored one, relative as in `ledger.Ledger`. `whole`: whether parts of images did not give the scores of whole
    ones; `undefined`: activations that a method has no rule for; `unlit`: how many winners had an activation that was
    not above zero, so that it could not be the seed.
    """

    block: Block
    arrays: dict[str, NDArray[Any]]
    bad: list[BadImage] = field(default_factory=list)
    deviation: float = 0.0
    whole: bool = False
    undefined: set[str] = field(default_factory=set)
    unlit: int = 0

    @property
    def touched(self) -> frozenset[int]:
        """The number of its block."""
        return frozenset({self.block.index})


@dataclass(frozen=True)
class Job:
    """All that a worker needs to project any block; `scanned` are the settings of the scan."""

    network: nn.Module
    preprocess: Preprocess
    catalog: Catalog
    scanned: ScanConfig
    settings: ProjectConfig
    run: RunConfig
    device: torch.device
    batch: int  # images that the network runs on at once
    convolutions: Sequence[tuple[Tap, Field]]  # every one on the way, in the order in which they run

    def on(self, run: RunConfig) -> Job:
        """The same for one worker, whose device and threads `run` says."""
        return replace(self, run=run, device=run.torch_device())


def project(
    job: Job, blocks: Iterator[Block], stop: threading.Event, report: Callable[[Tick], None]
) -> Iterator[Result]:
    """Projects blocks and gives what each of them gave, in order: it depends on nothing but the job and the block.
    `stop` ends it, and drops the block in hand. `report` is told of some winners at a time.

    Raises Unreadable where more than a tenth of a block's images cannot be read: the storage is gone, not some files.
    """
    network = Normalised(job.network, job.preprocess).to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scanned, run = job.scanned, job.run
    images = Inputs(
        job.catalog,
        job.preprocess,
        decoder=scanned.decoder,
        max_pixels=int(scanned.max_megapixels * 1e6),
        readers=run.readers,
    )
    with (
        current(job.device),
        images as inputs,
        numerics(run.threads or cores()),
        kept_memory(),
        ThreadPoolExecutor(1, "maxact-inputs") as reader,
    ):
        ahead: Future[tuple[dict[int, Input], list[BadImage]]] | None = None
        for block, following in pairwise(chain(blocks, [None])):
            assert block is not None
            found, bad = ahead.result() if ahead else inputs.get(block.images)
            check_readable(block.place, len(block.images), bad)
            # the next block's images are read while this one is projected
            ahead = reader.submit(inputs.get, following.images) if following else None
            result = _Winning(job, network, block, found, stop, report).project()
            if stop.is_set():
                return
            result.bad = bad
            yield result


class _Some(NamedTuple):
    """Some winners: which, where the parts of their images begin [n, 2], and their signals [n, 3, h, w] there."""

    part: Some
    corner: NDArray[np.int64]
    signal: torch.Tensor


class _Winning:
    """The winners of one block whose images could be had, N of them, and the arrays that they fill.

    Winners of one image lie side by side, so that they share its forward pass where that is the whole image's.
    """

    def __init__(
        self,
        job: Job,
        network: Normalised,
        block: Block,
        found: dict[int, Input],
        stop: threading.Event,
        report: Callable[[Tick], None],
    ) -> None:
        self._job, self._network, self._block, self._found = job, network, block, found
        self._stop, self._report = stop, report
        layout, peaks = block.layout, block.peaks
        there = np.isin(peaks.image, list(found))
        order = np.argsort(peaks.image[there], kind="stable")
        rows, ranks = (axis[order] for axis in np.nonzero(there))
        self._place = rows, ranks  # of each winner in the arrays
        self._image = peaks.image[rows, ranks]
        self._channel = rows + block.start
        self._stored = peaks.score[rows, ranks]
        self._spread = block.spread[rows]
        self._position = None if peaks.position is None else peaks.position[rows, ranks]  # [N, 2]
        self._arrays = {
            name: np.full((len(peaks.image), layout.shown, *rest), fill, kind)
            for name, (rest, kind, _, fill) in layout.arrays().items()
        }
        self._result = Result(block, self._arrays)

    def project(self) -> Result:
        """Fills the arrays."""
        block, job = self._block, self._job
        if not len(self._image):
            return self._result
        clipped, outer = crops.boxes(block.field, self._position, len(self._image))
        self._arrays["box"][self._place] = clipped
        for method in block.layout.methods:
            with Projector(self._network, block.tap, method, job.settings.seed) as projector:
                for some in self._signals(projector):
                    if method == block.layout.methods[0]:
                        self._frame(some, clipped, outer)
                    self._keep(method, some)
                    self._report(Tick(block.index, False, len(some.part), (), 0, 0.0))
                    if self._stop.is_set():
                        return self._result
                if block.layout.map and method == block.layout.methods[0]:
                    self._keep_maps(projector)
                self._result.undefined |= {f"{method}: {name}" for name in projector.undefined}
        return self._result

    def _signals(self, projector: Projector) -> Iterator[_Some]:
        """Some winners at a time, projected on the parts of their images that their fields need."""
        block, job = self._block, self._job
        cut = patches.cut(block.field)
        windows = patches.Windows(cut, block.tap, job.convolutions, self._network.network)
        everyone = np.arange(len(self._image))
        if self._position is None or (cut.is_whole and windows.work > _WORTH):
            yield from self._whole(projector, everyone)
            return
        height, width = cut.size
        batch = max(1, job.batch * cut.shape[0] * cut.shape[1] // (height * width))  # as many pixels as whole images
        for start in range(0, len(everyone), batch):
            if self._result.whole:
                yield from self._whole(projector, everyone[start:])
                return
            part = everyone[start : start + batch]
            pixels, index = self._pixels(part)
            corner = cut.corner(self._position[part])
            patched = self._normalised(cut.take(pixels, index, corner))
            unit, needed = cut.unit(self._position[part]), windows.at(self._position[part])
            projected = projector(patched, range(len(part)), self._channel[part], unit, needed)
            if self._is_exact(projector, projected, part):
                yield self._noted(projected, part, corner)
            else:
                self._result.whole = True
                yield from self._whole(projector, part)

    def _is_exact(self, projector: Projector, projected: Projected, part: Some) -> bool:
        """Whether patches give the scores of whole images: those that were stored, or, where some differ from them,
        those of the few that differ most, worked out here."""
        deviation = self._deviation(projected, part)
        doubtful = np.flatnonzero(~(deviation <= TOLERANCE))
        if not len(doubtful):
            return True
        worst = doubtful[np.argsort(-np.nan_to_num(deviation[doubtful], nan=np.inf), kind="stable")[:_PROBES]]
        pixels, index = self._pixels(part[worst])
        maps = projector.maps(self._normalised(pixels))
        assert self._position is not None
        row, column = self._position[part[worst]].T
        exact = maps[index, self._channel[part[worst]], row, column].cpu().numpy()
        found = projected.score.cpu().numpy()[worst]
        scale = np.maximum(np.abs(exact), self._spread[part[worst]])
        return bool((np.abs(found - exact) <= TOLERANCE * scale).all())

    def _whole(self, projector: Projector, part: Some) -> Iterator[_Some]:
        """As `_signals`, on whole images; the winners of one image share its forward pass."""
        for shared in share(self._image[part], self._job.batch):
            each = part[shared]
            pixels, index = self._pixels(each)
            position = None if self._position is None else self._position[each]
            projected = projector(self._normalised(pixels), index, self._channel[each], position)
            if self._block.layout.map:
                self._keep_map(each, projected.map)
            yield self._noted(projected, each, np.zeros((len(each), 2), np.int64))

    def _pixels(self, part: Some) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The images of some winners, each once, [U, 3, H, W], and which is whose [n]."""
        numbers, index = np.unique(self._image[part], return_inverse=True)
        pixels = torch.stack([self._found[number].pixels for number in numbers.tolist()])
        return pixels.permute(0, 3, 1, 2) if pixels.dtype == torch.uint8 else pixels, index

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images or parts of them [N, 3, h, w] as the network takes them, on its device."""
        pixels = pixels.permute(0, 2, 3, 1) if pixels.dtype == torch.uint8 else pixels
        with torch.inference_mode():
            images: torch.Tensor = self._network.normalise(pixels.to(self._job.device))
        return images

    def _deviation(self, projected: Projected, part: Some) -> NDArray[np.float32]:
        """How far the scores of some winners lie from the stored ones: see ledger.Ledger."""
        stored = self._stored[part]
        scale = np.maximum(np.maximum(np.abs(stored), self._spread[part]), np.finfo(np.float32).tiny)
        found = np.abs(projected.score.cpu().numpy() - stored) / scale
        return found.astype(np.float32)

    def _noted(self, projected: Projected, part: Some, corner: NDArray[np.int64]) -> _Some:
        deviation = self._deviation(projected, part)
        self._result.deviation = max(self._result.deviation, float(np.nan_to_num(deviation, nan=np.inf).max()))
        self._result.unlit += int(projected.unlit.sum())
        return _Some(part, corner, projected.signal.cpu())

    def _places(self, part: Some) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._place[0][part], self._place[1][part]

    def _frame(self, some: _Some, clipped: crops.Boxes, outer: crops.Boxes) -> None:
        """Where the pictures of some winners lie, and what the images show there."""
        block, places = self._block, self._places(some.part)
        focus = self._focus(some, clipped[some.part])
        frame = crops.squares(focus, block.field.shape) if block.layout.cut == "focus" else outer[some.part]
        self._arrays["focus_box"][places] = focus
        self._arrays["crop_box"][places] = frame
        for row, rank, image, box in zip(*places, self._image[some.part].tolist(), frame, strict=True):
            found = self._found[image]
            self._arrays["source_box"][row, rank] = source_box(box, self._job.preprocess, found.original)
            picture = crops.cut_out(crops.visible(found.pixels), box, block.layout.frame)
            self._arrays["crop"][row, rank] = picture.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()

    def _focus(self, some: _Some, field: crops.Boxes) -> crops.Boxes:
        """The focus boxes, inside the fields; the field itself where the projection is zero."""
        energy = some.signal.square().sum(1).numpy()
        corners = np.tile(some.corner, 2).astype(np.int32)
        if self._block.field.is_gated:  # through the gate, all of the image has a part in it
            for each, (y0, x0, y1, x1) in zip(energy, field - corners, strict=True):
                each[:y0], each[y1:], each[:, :x0], each[:, x1:] = 0, 0, 0, 0
        boxes = smallest_boxes(energy, crops.SHARE)
        return np.where(np.any(boxes, axis=1, keepdims=True), boxes + corners, field)

    def _keep(self, method: str, some: _Some) -> None:
        """The projections of some winners, in the frames of their pictures."""
        places = self._places(some.part)
        frame = self._arrays["crop_box"][places] - np.tile(some.corner, 2).astype(np.int32)
        for row, rank, box, each in zip(*places, frame, some.signal, strict=True):
            levels, scale = crops.quantise(crops.cut_out(each, box, self._block.layout.frame))
            self._arrays[f"projection/{method}"][row, rank] = levels
            self._arrays[f"projection_scale/{method}"][row, rank] = scale

    def _keep_maps(self, projector: Projector) -> None:
        """The whole activation maps of the winners that were projected on parts of their images."""
        left = np.flatnonzero(np.isnan(self._arrays["map"][self._place]).all((1, 2)))
        for part in share(self._image[left], self._job.batch, rounds=max(1, len(left))):
            pixels, index = self._pixels(left[part])
            maps = projector.maps(self._normalised(pixels))  # [U, C, H, W]
            self._keep_map(left[part], maps[torch.from_numpy(index), torch.from_numpy(self._channel[left[part]])])

    def _keep_map(self, part: Some, maps: torch.Tensor) -> None:
        self._arrays["map"][self._places(part)] = maps.clamp(-65504, 65504).half().cpu().numpy()
