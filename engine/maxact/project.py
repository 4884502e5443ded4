"""The loop of the second pass: a block's winners are read, projected, cut out, and given as arrays.

A block is one list of one tap and one chunk of its channels. What the names stand for: `inputs.Inputs` reads and
decodes the winning images while the block before is on the device; `patches` says which part of an image a winner's
field needs; `deconv.Projector` runs the network on those parts and back; `crops` cuts the pictures out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maxact import crops, patches
from maxact.config import ProjectConfig
from maxact.deconv import Projected, Projector, share
from maxact.fetch import FEW, Unreadable
from maxact.field import Field
from maxact.inputs import Input, Inputs, source_box
from maxact.models import Normalised
from maxact.numerics import kept_memory, numerics
from maxact.partial import BadImage
from maxact.preprocess import Preprocess
from maxact.results import Peaks
from maxact.tap import Tap
from maxact.winners import Layout
from maxact_kernels.boxes import smallest_boxes

TOLERANCE = 1e-4  # of a score, between a patch and the whole image
_TOLERANCE_16 = 0.3  # the same where the stored score is of 16 bits

Some = NDArray[np.int64]  # numbers of winners of a block, [n]


@dataclass(frozen=True)
class Block:
    """Some channels of one list of a tap, from `start` on, as many as a chunk of the arrays has.

    `peaks` are these channels' winners at the ranks that are shown, with -1 as image where there is nothing to do;
    `left` numbers the channels in which there is something, from 0 at the first of the block; `spread` [C] is the
    standard deviation of each channel, against which differences of scores are measured.
    """

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


@dataclass
class Result:
    """What a block gave: arrays as `Winners.write` takes them, with a row for each of its channels.

    `deviation` is the largest difference between a recomputed score and
    the stored one, relative as in `ledger.Ledger`.
    """

    block: Block
    arrays: dict[str, NDArray[Any]]
    bad: list[BadImage] = field(default_factory=list)
    deviation: float = 0.0


@dataclass
class Job:
    """All that a worker needs to project any block. `whole` are the taps that patches are not exact for, and grows."""

    network: nn.Module
    preprocess: Preprocess
    inputs: Inputs
    settings: ProjectConfig
    device: torch.device
    batch: int
    threads: int
    exact: bool  # the stored scores are of float32
    whole: set[str] = field(default_factory=set)
    undefined: set[str] = field(default_factory=set)  # activations that the method has no rule for
    unlit: int = 0  # winners whose activation was not above zero, so that it could not be the seed


def project(job: Job, blocks: Sequence[Block], stop: threading.Event) -> Iterator[Result]:
    """Projects blocks and gives what each of them gave, in order. `stop` ends it after the block in hand.

    Raises Unreadable where most images of a block cannot be read: the storage is gone, not some files.
    """
    network = Normalised(job.network, job.preprocess).to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with numerics(job.threads), kept_memory(), ThreadPoolExecutor(1, "maxact-inputs") as reader:
        ahead = reader.submit(job.inputs.get, blocks[0].images) if blocks else None
        for block, following in zip_longest(blocks, blocks[1:]):
            assert ahead is not None
            found, bad = ahead.result()  # the next block's images are read while this one is projected
            _check_readable(block, bad)
            ahead = reader.submit(job.inputs.get, following.images) if following else None
            result = _Winning(job, network, block, found).project()
            result.bad = bad
            yield result
            if stop.is_set():
                break


def _check_readable(block: Block, bad: Sequence[BadImage]) -> None:
    unread = [image for image in bad if image.stage == "read" and not image.error.startswith("changed")]
    if len(unread) > max(FEW, len(block.images) // 2):
        raise Unreadable(
            f"{block.place}: {len(unread)} of {len(block.images)} images cannot be read, the last of them "
            f"{unread[-1].key}: {unread[-1].error}; see that the disk is there, then run the same again"
        )


class _Winning:
    """The winners of one block whose images could be had, N of them, and the arrays that they fill.

    Winners of one image lie side by side, so that they share its forward pass where that is the whole image's.
    """

    def __init__(self, job: Job, network: Normalised, block: Block, found: dict[int, Input]) -> None:
        self._job, self._network, self._block, self._found = job, network, block, found
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
                for part, corners, signal in self._signals(projector):
                    if method == block.layout.methods[0]:
                        self._frame(part, corners, signal, outer[part])
                    self._keep(method, part, corners, signal)
                if block.layout.map and method == block.layout.methods[0]:
                    self._keep_maps(projector)
                job.undefined |= {f"{method}: {name}" for name in projector.undefined}
        return self._result

    def _signals(self, projector: Projector) -> Iterator[tuple[Some, NDArray[np.int64], torch.Tensor]]:
        """Some winners at a time: which, where their patches begin [n, 2], and their signals [n, 3, h, w] there."""
        block, job = self._block, self._job
        cut = patches.cut(block.field)
        everyone = np.arange(len(self._image))
        if self._position is None or cut.is_whole or block.tap.name in job.whole:
            yield from self._whole(projector, everyone)
            return
        height, width = cut.size
        batch = max(1, job.batch * cut.shape[0] * cut.shape[1] // (height * width))  # as many pixels as whole images
        wrong = []
        for part in np.split(everyone, range(batch, len(everyone), batch)):
            images, index = self._images(part)
            corners = cut.corner(self._position[part])
            patched = cut.take(images, index, corners)
            projected = projector(patched, range(len(part)), self._channel[part], cut.unit(self._position[part]))
            differs = self._deviation(projected, part) > (TOLERANCE if job.exact else _TOLERANCE_16)
            if differs.any():
                wrong.append(part[differs])
            same = ~differs
            if same.any():
                self._note(projected, part, same)
                yield part[same], corners[same], projected.signal.cpu()[torch.from_numpy(same)]
        if wrong:  # a patch is not enough, or the stored score is another: the whole image says which
            before = self._result.deviation
            self._result.deviation = 0.0
            yield from self._whole(projector, np.concatenate(wrong))
            if self._result.deviation <= TOLERANCE:
                job.whole.add(block.tap.name)
            self._result.deviation = max(before, self._result.deviation)

    def _whole(self, projector: Projector, part: Some) -> Iterator[tuple[Some, NDArray[np.int64], torch.Tensor]]:
        """As `_signals`, on whole images; the winners of one image share its forward pass."""
        for shared in share(self._image[part], self._job.batch):
            each = part[shared]
            images, index = self._images(each)
            position = None if self._position is None else self._position[each]
            projected = projector(images, index, self._channel[each], position)
            self._note(projected, each, np.ones(len(each), np.bool_))
            yield each, np.zeros((len(each), 2), np.int64), projected.signal.cpu()

    def _images(self, part: Some) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The images of some winners as the network takes them, each once [U, 3, H, W], and which is whose [n]."""
        numbers, index = np.unique(self._image[part], return_inverse=True)
        pixels = torch.stack([self._found[number].pixels for number in numbers.tolist()])
        with torch.inference_mode():
            images: torch.Tensor = self._network.normalise(pixels.to(self._job.device))
        return images, index

    def _deviation(self, projected: Projected, part: Some) -> NDArray[np.float32]:
        """How far the scores of some winners lie from the stored ones: see ledger.Ledger."""
        stored = self._stored[part]
        scale = np.maximum(np.maximum(np.abs(stored), self._spread[part]), np.finfo(np.float32).tiny)
        found = np.abs(projected.score.cpu().numpy() - stored) / scale
        return found.astype(np.float32)

    def _note(self, projected: Projected, part: Some, which: NDArray[np.bool_]) -> None:
        deviation = self._deviation(projected, part)[which]
        self._result.deviation = max(self._result.deviation, float(deviation.max(initial=0)))
        self._job.unlit += int(projected.unlit.cpu().numpy()[which].sum())

    def _places(self, part: Some) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._place[0][part], self._place[1][part]

    def _frame(self, part: Some, corners: NDArray[np.int64], signal: torch.Tensor, outer: crops.Boxes) -> None:
        """Where the pictures of some winners lie, and what the images show there."""
        block, places = self._block, self._places(part)
        energy = signal.square().sum(1).numpy()
        focus = smallest_boxes(energy, crops.SHARE) + np.tile(corners, 2).astype(np.int32)
        frame = crops.squares(focus, block.field.shape) if block.layout.cut == "focus" else outer
        self._arrays["focus_box"][places] = focus
        self._arrays["crop_box"][places] = frame
        for row, rank, image, box in zip(*places, self._image[part].tolist(), frame, strict=True):
            found = self._found[image]
            self._arrays["source_box"][row, rank] = source_box(box, self._job.preprocess, found.original)
            picture = crops.cut_out(crops.visible(found.pixels), box, block.layout.frame)
            self._arrays["crop"][row, rank] = picture.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()

    def _keep(self, method: str, part: Some, corners: NDArray[np.int64], signal: torch.Tensor) -> None:
        """The projections of some winners, in the frames of their pictures."""
        places = self._places(part)
        frame = self._arrays["crop_box"][places] - np.tile(corners, 2).astype(np.int32)
        for row, rank, box, each in zip(*places, frame, signal, strict=True):
            levels, scale = crops.quantise(crops.cut_out(each, box, self._block.layout.frame))
            self._arrays[f"projection/{method}"][row, rank] = levels
            self._arrays[f"projection_scale/{method}"][row, rank] = scale

    def _keep_maps(self, projector: Projector) -> None:
        """The whole activation maps of the winners."""
        for part in share(self._image, self._job.batch, rounds=len(self._image)):
            images, index = self._images(part)
            maps = projector.maps(images)  # [U, C, H, W]
            mine = maps[torch.from_numpy(index), torch.from_numpy(self._channel[part])]
            self._arrays["map"][self._places(part)] = mine.clamp(-65504, 65504).half().cpu().numpy()
