"""The contestants of bench/peers.py, each in a process of its own: `python contestants.py TASK.json`.

Every one finds, for the output of every convolution and linear layer of one network, the `top` images with the
highest maximum in each channel, and where in the map that is. The clock runs from files (or, for the bare forward
passes, from tensors in memory) to the complete lists. All of it is done three times: on the first images to warm up,
on the same again, and on all images, so that what comes once can be told from what each image costs. What was found is
written beside the measurement when the clock has stopped.

    forward             the bare network on decoded tensors: the limit
    forward-maxact      the same with maxact's settings of threads and allocator
    plain               ImageFolder, DataLoader, a forward hook on every layer, amax, torch.topk
    zennit-crp          FeatureVisualization with composite=None. Its forward pass feeds ActMax, which is read here, and
                        ActStats; a backward pass through the whole network feeds RelMax and RelStats, and no option
                        turns that off. A last batch of one image ends it with a TypeError.
    thingsvision        extract_features: every map of every layer to disk; what is wanted is found in that afterwards.
                        Installed without what it pins (numpy below 2, torchvision 0.15.2); two lines here make its
                        import succeed all the same.
    maxact              maxact.scan from the first line to the finished store, in an environment like the command line's

This file imports neither maxact nor torch before it knows for whom: each contestant gets what its own users get.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    Lists = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]  # image, score, position: [channel, rank]
    Found = dict[str, Lists]  # by layer

PHOTOGRAPHS = "photographs"  # the one class of the images' folder
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DUMPED = 128  # images whose maps thingsvision holds before it writes them: a GB of a ResNet-18's


@dataclass(frozen=True)
class Task:
    """What a contestant has to do. Images are square files of the network's size, in order of their names."""

    who: str
    network: str  # of torchvision
    weights: str  # a file with its state_dict
    images: str  # a folder that holds a folder of them
    out: str  # an empty folder
    side: int
    count: int
    few: int  # images to warm up with, and to tell what comes once from what each image costs
    batch: int
    top: int
    threads: int
    workers: int = 0  # processes of a DataLoader
    last: bool = False  # whether the network is channels_last, where it is for the contestant to choose


@dataclass(frozen=True)
class Measurement:
    """What it took: seconds and CPU seconds (of worker processes too) for the first images alone and for all of them,
    peak memory of the process, and what lies on disk in the end, in MB."""

    few_wall: float
    few_cpu: float
    wall: float
    cpu: float
    memory: float
    disk: float


Run = Callable[[int, Path], "Callable[[], Found]"]  # (first images, an empty folder) -> what reads the result


def build(task: Task) -> nn.Module:
    """The network, in evaluation mode and in the task's memory layout."""
    import torch
    from torchvision.models import get_model

    torch.set_num_threads(task.threads)
    network: nn.Module = get_model(task.network, weights=None)
    network.load_state_dict(torch.load(task.weights, weights_only=True))
    network.eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last) if task.last else network


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of which all of them record the output."""
    from torch import nn

    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def dataset(task: Task) -> Any:
    """(tensor [3, H, W], 0) for each image, as anybody's script reads it."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize(task.side), transforms.CenterCrop(task.side), transforms.ToTensor()]
    return ImageFolder(task.images, transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))


def loader(task: Task, count: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the first `count` images."""
    from torch.utils.data import DataLoader, Subset

    return DataLoader(Subset(dataset(task), range(count)), task.batch, num_workers=task.workers)


def arranged(task: Task, images: torch.Tensor) -> torch.Tensor:
    """Images in the layout of the network."""
    import torch

    return images.contiguous(memory_format=torch.channels_last) if task.last else images


def forward(task: Task) -> Run:
    """The bare network on tensors in memory."""
    import torch

    network = build(task)
    batches = [arranged(task, images) for images, _ in loader(task, task.count)]

    def run(count: int, out: Path) -> Callable[[], Found]:
        with torch.inference_mode():
            for images in batches[: count // task.batch]:
                network(images)
        return dict

    return run


def forward_maxact(task: Task) -> Run:
    """The bare network as a scan sets the process up for it."""
    from maxact.numerics import kept_memory, numerics

    inner = forward(task)

    def run(count: int, out: Path) -> Callable[[], Found]:
        with numerics(task.threads), kept_memory():
            return inner(count, out)

    return run


class Tally:
    """The strongest of every channel of every layer, as a short script keeps them: hooks, amax, topk."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.first = 0  # number of the batch's first image
        self.lists: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}  # score, image, position [C, k]

    def hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """What to register at the layer `name`."""
        return lambda module, inputs, output: self.add(name, output)

    def add(self, name: str, maps: torch.Tensor) -> None:
        """Takes a layer's output [N, C, H, W] or [N, C]."""
        import torch

        score = (maps.amax((2, 3)) if maps.ndim == 4 else maps).T  # [C, N]
        image = torch.arange(self.first, self.first + len(maps)).expand(score.shape)
        position = torch.full(score.shape, -1)
        if name in self.lists:
            before = self.lists[name]
            score, image, position = (
                torch.cat([old, new], 1) for old, new in zip(before, (score, image, position), strict=True)
            )
        score, rank = score.topk(min(self.top, score.shape[1]))
        image, position = image.gather(1, rank), position.gather(1, rank)
        # only what has just come in is looked for in its map: an argmax over everything costs six times the amax
        channel, place = (position < 0).nonzero(as_tuple=True)
        new = maps[image[channel, place] - self.first, channel]
        position[channel, place] = new.flatten(1).argmax(1) if maps.ndim == 4 else 0
        self.lists[name] = score, image, position

    def found(self) -> Found:
        """The lists."""
        each = self.lists.items()
        return {name: (image.numpy(), score.numpy(), position.numpy()) for name, (score, image, position) in each}


def plain(task: Task) -> Run:
    """The script that a researcher would write."""
    import torch

    network = build(task)

    def run(count: int, out: Path) -> Callable[[], Found]:
        tally = Tally(task.top)
        hooks = [module.register_forward_hook(tally.hook(name)) for name, module in layers(network).items()]
        with torch.inference_mode():
            for images, _ in loader(task, count):
                network(arranged(task, images))
                tally.first += len(images)
        for hook in hooks:
            hook.remove()
        torch.save(tally.lists, out / "lists.pt")
        return tally.found

    return run


def zennit_crp(task: Task) -> Run:
    """zennit-crp's FeatureVisualization."""
    import numpy as np

    visualization = importlib.import_module("crp.visualization")
    attribution = importlib.import_module("crp.attribution").CondAttribution(build(task))
    concept = importlib.import_module("crp.concepts").ChannelConcept()
    load = importlib.import_module("crp.helper").load_maximization
    names = list(layers(attribution.model))
    images = dataset(task)

    def run(count: int, out: Path) -> Callable[[], Found]:
        visual = visualization.FeatureVisualization(
            attribution, images, dict.fromkeys(names, concept), max_target="max", abs_norm=False, path=str(out)
        )
        for each in (visual.ActMax, visual.RelMax, visual.ActStats, visual.RelStats):
            each.SAMPLE_SIZE = task.top  # it keeps 40 else
        visual.run(None, 0, count, task.batch)

        def read() -> Found:
            found = {}
            for name in names:
                image, score, position = (np.asarray(part).T for part in load(visual.ActMax.PATH, name))
                found[name] = image, score, position
            return found

        return read

    return run


def thingsvision(task: Task) -> Run:
    """thingsvision's extract_features with all layers at once, then amax and topk over what it wrote."""
    import numpy as np

    sys.modules["triton"] = None  # type: ignore[assignment]  # its LLVM and TensorFlow's end the process together
    np.AxisError = np.exceptions.AxisError  # type: ignore[attr-defined]  # gone from numpy 2
    import torch

    network = build(task)
    package = importlib.import_module("thingsvision")
    data = importlib.import_module("thingsvision.utils.data")
    extractor = package.get_extractor_from_model(model=network, device="cpu", backend="pt")
    transforms = extractor.get_transformations(task.side, task.side)
    names = list(layers(network))
    folder = Path(task.images) / PHOTOGRAPHS
    files = sorted(path.name for path in folder.iterdir())

    def run(count: int, out: Path) -> Callable[[], Found]:
        images = data.ImageDataset(str(folder), str(out), "pt", file_names=files[:count], transforms=transforms)
        batches = data.DataLoader(images, task.batch, "pt")
        step = max(1, DUMPED // task.batch)
        extractor.extract_features(batches, module_names=names, output_dir=str(out), step_size=step)
        tally = Tally(task.top)
        for name in names:
            tally.first = 0
            # features_FROM-TO.npy, in which only TO is right for all layers but the first
            for path in sorted((out / name).glob("*.npy"), key=lambda path: int(path.stem.split("-")[-1])):
                maps = torch.from_numpy(np.load(path))
                tally.add(name, maps)
                tally.first += len(maps)
        return tally.found

    return run


def maxact_scan(task: Task) -> Run:
    """maxact itself."""
    import numpy as np

    import maxact

    network = build(task)
    folder = Path(task.images) / PHOTOGRAPHS

    def run(count: int, out: Path) -> Callable[[], Found]:
        store = maxact.scan(
            network,
            folder,
            out / "store.zarr",
            limit=count,
            at="module",
            top=task.top,
            resize=task.side,
            crop=task.side,
            batch=task.batch,
            precision="fp32",
            devices="cpu",
            threads=task.threads,
            decode_threads=task.threads,
        )

        def read() -> Found:
            found: Found = {}
            for name in store:
                peaks, columns = store[name].lists["max", "top"], store[name].tap.map[1]
                assert peaks.position is not None
                place = peaks.position.astype(np.int64) @ np.array([columns, 1])
                found[name] = peaks.image, peaks.score, place
            return found

        return read

    return run


CONTESTANTS: dict[str, Callable[[Task], Run]] = {
    "forward": forward,
    "forward-maxact": forward_maxact,
    "plain": plain,
    "zennit-crp": zennit_crp,
    "thingsvision": thingsvision,
    "maxact": maxact_scan,
}


def cpu() -> float:
    """CPU seconds of this process and of the children that have ended."""
    return sum(os.times()[:4])


def peak() -> float:
    """The peak of this process's resident memory in MB; getrusage's would begin with the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def clocked(run: Run, count: int, out: Path) -> tuple[float, float, Callable[[], Found]]:
    """Runs it into a new folder: seconds, CPU seconds, and what reads the result."""
    out.mkdir()
    begun, busy = time.perf_counter(), cpu()
    read = run(count, out)
    return time.perf_counter() - begun, cpu() - busy, read


def main() -> None:
    """Does the task of the file that is named, and leaves measurement.json and found.npz in its folder."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    if task.who.endswith("maxact"):
        importlib.import_module("maxact.environment").prepare()
    run = CONTESTANTS[task.who](task)
    if not task.count:  # only whether it can be imported was asked
        return
    import numpy as np

    place = Path(task.out)
    clocked(run, task.few, place / "warm-up")
    few_wall, few_cpu, _ = clocked(run, task.few, place / "few")
    wall, busy, read = clocked(run, task.count, place / "all")
    disk = sum(path.stat().st_size for path in (place / "all").rglob("*") if path.is_file()) / 2**20
    measured = Measurement(few_wall, few_cpu, wall, busy, peak(), disk)
    (place / "measurement.json").write_text(json.dumps(asdict(measured)))
    parts: dict[str, Any] = {f"{part}/{name}": lists[part] for name, lists in read().items() for part in range(3)}
    np.savez(place / "found.npz", **parts)


if __name__ == "__main__":
    main()
