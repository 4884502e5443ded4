"""The command line: arguments to a call, errors to one line and an exit code.

What a command needs is imported when it runs, so that `maxact --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from maxact import commands
from maxact.environment import prepare
from maxact.errors import MaxactError, one_line

_MODEL = "a torchvision name (vgg16), timm:NAME, or package.module:callable that returns an nn.Module"
_IMAGES = (
    "a folder, a glob, a .txt, .csv or .parquet list, tar archives ('shards/{000..099}.tar'), "
    "or Parquet files that hold images; here or at s3://, gs:// or http(s)://"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives the exit code: 0, 1 for a failed run, 2 for a bad command line, 128 + a signal."""
    prepare()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    options = vars(_parser().parse_args(argv))
    command: Callable[..., int] = options.pop("command")
    try:
        return command(**options)
    except MaxactError as error:
        print(f"maxact: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("maxact: stopped; what was committed is kept", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `maxact info ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # standard output on a full disk, say
        print(f"maxact: {one_line(str(error))}", file=sys.stderr)
        return 1


def _size(text: str) -> int | tuple[int, int]:
    sides = text.lower().split("x")
    try:
        if len(sides) == 1:
            return int(text)
        height, width = map(int, sides)
        return height, width
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected pixels as N or HxW, got {text!r}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"maxact: {one_line(message)} (`{self.prog} --help` says more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "maxact",
        description="For every channel of every layer of a convolutional network, the images that activate it most.",
    )
    parser.add_argument("--version", action="version", version=f"maxact {version('maxact')}")
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    layers = subcommands.add_parser("layers", help="every tap of a network: name, kind, channels, map, field, stride")
    layers.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_network(layers)
    drawing = layers.add_argument_group("drawing")
    drawing.add_argument(
        "--draw", metavar="TAP", help="draw the field of the unit in the middle of a tap's map instead"
    )
    drawing.add_argument("--image", metavar="FILE", help="on this picture")
    drawing.add_argument("--out", metavar="FILE", default="field.png", help="the drawing (field.png)")
    layers.set_defaults(command=commands.layers)

    scan = subcommands.add_parser(
        "scan",
        help="first pass: find the strongest images of every channel",
        description="The same command again goes on with an unfinished store, or says that it is done.",
    )
    several = "; several with commas between them share one decoding, and STORE is the folder of their stores"
    scan.add_argument("model", metavar="MODEL[,MODEL...]", help=_MODEL + several)
    scan.add_argument("images", metavar="IMAGES", nargs="+", help=_IMAGES)
    scan.add_argument("store", metavar="STORE", help="the folder of the result")
    _add_images(scan)
    _add_network(scan)
    _add_pixels(scan)
    _add_lists(scan)
    _add_running(scan)
    scan.set_defaults(command=commands.scan)

    project = subcommands.add_parser(
        "project",
        help="second pass: what in the images drove each winner",
        description="The same command again goes on where it was stopped; other layers and channels are added.",
    )
    project.add_argument("store", metavar="STORE", help="a finished scan")
    _add_projection(project)
    project.set_defaults(command=commands.project)

    _add_render(subcommands)
    export = subcommands.add_parser("export", help="a store as one Parquet file, or its pooled values as many")
    export.add_argument("store", metavar="STORE")
    export.add_argument("out", metavar="OUT", help="the Parquet file; with --pooled a folder")
    export.add_argument(
        "--pooled",
        action="store_true",
        help="every image's value of every channel, of a scan with --pooled: a file for each tap and shard; "
        "the same command again goes on",
    )
    export.add_argument("--layers", action="append", metavar="GLOB", help="with --pooled, of these taps (may repeat)")
    export.add_argument("--quiet", action="store_true", help="no display, warnings only")
    export.set_defaults(command=commands.export)

    info = subcommands.add_parser("info", help="what is in a store, how it was made, what went wrong")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--json", action="store_true", dest="as_json", help="as JSON, with everything")
    info.set_defaults(command=commands.info)

    _add_bench(subcommands)
    _add_pack(subcommands)
    demo = subcommands.add_parser("demo", help="all of it on an embedded network and embedded photographs")
    demo.add_argument("out", metavar="OUT", nargs="?", default="demo", help="the folder of the result (demo)")
    demo.add_argument("--overwrite", action="store_true", help="start again")
    demo.add_argument("--quiet", action="store_true", help="no display, warnings only")
    demo.set_defaults(command=commands.demo)
    return parser


def _add_bench(subcommands: Any) -> None:
    bench = subcommands.add_parser(
        "bench",
        help="where the time goes on this machine, and how near its limit a scan is",
        description="Each stage of a scan alone, in turn, and the scan itself; nothing is kept.",
    )
    bench.add_argument("model", metavar="MODEL", help=_MODEL)
    bench.add_argument("images", metavar="IMAGES", nargs="+", help=_IMAGES)
    _add_images(bench)
    _add_network(bench)
    _add_lists(bench, pooled=False)
    how = bench.add_argument_group("how")
    how.add_argument("--devices", default="auto", metavar="D", help="cpu or cuda:N; of several, the first (auto)")
    _add_device(how)
    how.add_argument("--decoder", choices=("auto", "dali", "torchvision"), default="auto")
    _add_threads(how)
    measuring = bench.add_argument_group("measuring")
    measuring.add_argument("--rounds", type=int, default=3, metavar="N", help="times that everything is measured (3)")
    measuring.add_argument(
        "--seconds", type=float, default=6.0, metavar="N", help="of each stage, at least, in all rounds together (6)"
    )
    measuring.add_argument(
        "--sweep", action="store_true", help="try batches, threads and shares, and print the best command line"
    )
    measuring.add_argument("--json", metavar="FILE", help="write the result to FILE, too")
    measuring.add_argument("--picture", metavar="FILE", help="write it as a picture of bars (PNG)")
    measuring.add_argument("--quiet", action="store_true", help="no display")
    bench.set_defaults(command=commands.bench)


def _add_pack(subcommands: Any) -> None:
    pack = subcommands.add_parser(
        "pack",
        help="images made smaller, once, in archives that every later scan decodes faster",
        description="The same command again goes on with an unfinished pack, or says that it is done.",
    )
    pack.add_argument("images", metavar="IMAGES", nargs="+", help=_IMAGES)
    pack.add_argument("out", metavar="OUT", help="the folder of the result; give it as IMAGES to scan")
    _add_images(pack)
    how = pack.add_argument_group("packing")
    how.add_argument("--short-side", type=int, default=256, metavar="N", help="in pixels; none is enlarged (256)")
    how.add_argument("--quality", type=int, default=95, metavar="N", help="of JPEG, 1 to 100 (95)")
    how.add_argument("--shard-images", type=int, default=4096, metavar="N", help="images in an archive (4096)")
    how.add_argument("--max-megapixels", type=float, default=200.0, metavar="N", help="larger images are bad (200)")
    how.add_argument("--max-bad", type=int, metavar="N", help="bad images to bear (1 %% of all, but at least 10)")
    running = pack.add_argument_group("running")
    running.add_argument("--workers", type=int, metavar="N", help="threads that decode and encode (every core)")
    running.add_argument("--readers", type=int, default=16, metavar="N", help="threads that read files (16)")
    running.add_argument("--overwrite", action="store_true", help="delete the pack that is there and start again")
    running.add_argument("--quiet", action="store_true", help="no display, warnings only")
    pack.set_defaults(command=commands.pack)


def _add_render(subcommands: Any) -> None:
    render = subcommands.add_parser(
        "render",
        help="what people look at: a gallery site, mosaics, filters",
        description="Without --mosaic or --filters: a site for any browser, which needs no network and no server.",
    )
    render.add_argument("store", metavar="STORE", help="a projected store")
    render.add_argument("out", metavar="OUT", help="the folder of the result")
    which = render.add_argument_group("which channels")
    which.add_argument("--layers", action="append", metavar="GLOB", help="taps, globs too (may repeat; all)")
    which.add_argument("--channels", metavar="LIST", help="channels of each tap, as 0-63,171 (all that are projected)")
    which.add_argument("--label-names", metavar="FILE", help="what labels mean: LABEL WORDS in lines, CSV, or JSON")
    pictures = render.add_argument_group("pictures instead of the site")
    pictures.add_argument(
        "--mosaic", action="store_true", help="sheets of crops and of projections, with few channels a figure of each"
    )
    pictures.add_argument("--filters", action="store_true", help="the first layer's kernels")
    pictures.add_argument("--layout", choices=("square", "rows"), default="square", help="of a channel's winners")
    pictures.add_argument("--across", type=int, metavar="N", help="the N strongest winners of a whole tap instead")
    pictures.add_argument("--format", choices=("png", "pdf"), default="png")
    pictures.add_argument("--method", choices=("deconvnet", "guided", "gradient"), help="which projections (the first)")
    pictures.add_argument("--weights", metavar="W", help="for --filters, where the scanned weights are now")
    render.add_argument("--quiet", action="store_true", help="no display, warnings only")
    render.set_defaults(command=commands.render)


def _add_images(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which images")
    group.add_argument(
        "--where",
        action="append",
        metavar="LABEL",
        help="only images whose label matches (a glob; may repeat)",
    )
    group.add_argument("--sample", type=int, metavar="N", help="a random sample of N")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (0)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--weights",
        metavar="W",
        help="a torchvision weights name, a .safetensors or .pth file, or none (DEFAULT)",
    )
    group.add_argument(
        "--layers",
        action="append",
        metavar="GLOB",
        help="module paths to tap, globs too (may repeat; every convolution and linear layer)",
    )
    group.add_argument(
        "--at",
        choices=("norm", "module", "activation"),
        default="norm",
        help="where in a layer's chain: after its normalisation (norm), at the layer, after its activation",
    )
    group.add_argument(
        "--resize", type=int, metavar="N", help="short side in pixels; the network's own, as the next ones"
    )
    group.add_argument("--crop", type=_size, metavar="N|HxW", help="size of the model input in pixels")
    group.add_argument("--interpolation", choices=("nearest", "bilinear", "bicubic"))
    group.add_argument("--fit", choices=("crop", "squash", "pad"), help="how a picture comes to the input's shape")
    group.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of pixels from 0 to 1")
    group.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    group.add_argument(
        "--preprocess", metavar="MODULE:F", help="a function from picture to tensor, in place of all these"
    )


def _add_pixels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument("--decoder", choices=("auto", "dali", "torchvision"), default="auto")
    group.add_argument("--max-megapixels", type=float, default=200.0, metavar="N", help="larger images are bad (200)")
    group.add_argument("--skip-grey", action="store_true", help="leave out pictures without colour")
    _add_threads(group)
    group.add_argument("--max-bad", type=int, metavar="N", help="bad images to bear (1 %% of all, but at least 10)")
    group.add_argument("--retry-errors", action="store_true", help="scan the shards of recorded errors again")


def _add_lists(parser: argparse.ArgumentParser, pooled: bool = True) -> None:
    group = parser.add_argument_group("what to keep")
    group.add_argument(
        "--score", action="append", choices=("max", "mean"), help="what ranks an image (may repeat; max)"
    )
    group.add_argument("--top", type=int, default=50, metavar="K", help="strongest images per channel (50)")
    group.add_argument("--bottom", type=int, default=0, metavar="K", help="weakest images per channel (0)")
    if pooled:
        group.add_argument(
            "--pooled",
            choices=("max", "mean"),
            help="every image's value of every channel, too: 2 bytes of disk each",
        )


def _add_projection(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("which winners")
    which.add_argument("--layers", action="append", metavar="GLOB", help="taps, globs too (may repeat; all)")
    which.add_argument("--channels", metavar="LIST", help="channels of each tap, as 0-63,171 (all)")
    which.add_argument("--ranks", type=int, default=9, metavar="N", help="winners of every list (9)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--method",
        action="append",
        choices=("deconvnet", "guided", "gradient"),
        help="how the signal goes back (may repeat; deconvnet)",
    )
    how.add_argument("--seed", choices=("one", "activation"), default="one", help="what the signal starts with (one)")
    how.add_argument(
        "--crop",
        choices=("auto", "field", "focus"),
        default="auto",
        help="what to cut out: the field, a square around what the projection shows, or the field unless it covers "
        "over half of the input (auto)",
    )
    how.add_argument("--max-size", type=int, default=128, metavar="N", help="pixels of a crop's longer side (128)")
    how.add_argument(
        "--no-settle",
        action="store_false",
        dest="settle",
        help="after a 16-bit scan, keep its order instead of settling the shown ranks in float32",
    )
    how.add_argument("--weights", metavar="W", help="where the scanned weights are now, if not where they were")
    running = parser.add_argument_group("running")
    _add_devices(running)
    running.add_argument("--batch", type=int, metavar="N", help="images that the network runs on at once")
    running.add_argument(
        "--threads", type=int, metavar="N", help="of the network on a CPU, of each worker (every core)"
    )
    running.add_argument("--readers", type=int, default=16, metavar="N", help="threads that read files (16)")
    running.add_argument("--overwrite", action="store_true", help="delete what was projected and start again")
    running.add_argument("--quiet", action="store_true", help="no display, warnings only")


def _add_threads(group: Any) -> None:
    group.add_argument("--readers", type=int, default=16, metavar="N", help="threads that read files (16)")
    group.add_argument("--decode-threads", type=int, metavar="N", help="threads that decode (every core)")
    group.add_argument(
        "--hardware-share",
        type=float,
        metavar="F",
        help="of the JPEGs that a GPU's decoding hardware takes, where it has some (0.65)",
    )


def _add_devices(group: Any) -> None:
    group.add_argument(
        "--devices",
        default="auto",
        metavar="D",
        help="cpu; cuda (all), cuda:0, cuda:0-7, cuda:0,cuda:2: a process for each; cpu:4: four on the CPU (auto)",
    )
    group.add_argument(
        "--stall",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds of silence after which a worker is replaced (300)",
    )
    group.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="a Ray cluster, HOST:PORT, or auto: the one found from here, or one that is started here",
    )
    group.add_argument(
        "--cpus-per-worker", type=int, metavar="N", help="of a cluster (all of a node's, or a GPU's part of them)"
    )


def _add_device(group: Any) -> None:
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="fp32 on a CPU, fp16 on CUDA")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="one graph of the network and its taps by torch.compile (on CUDA, and in long scans where it is faster)",
    )
    group.add_argument("--batch", type=int, metavar="N", help="images in a batch")
    group.add_argument("--threads", type=int, metavar="N", help="of the network on a CPU, of each worker (every core)")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    _add_devices(group)
    _add_device(group)
    group.add_argument("--shard", type=int, metavar="N", help="images in a shard (4096)")
    group.add_argument("--overwrite", action="store_true", help="delete the store that is there and start again")
    group.add_argument("--quiet", action="store_true", help="no display, warnings only")
