"""The command line: arguments to a call, errors to one line and an exit code.

What a command needs is imported when it runs, so that `maxact --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from maxact.environment import prepare
from maxact.errors import MaxactError

_MODEL = "a torchvision name (vgg16), timm:NAME, or package.module:callable that returns an nn.Module"
_IMAGES = (
    "a folder, a glob, a .txt, .csv or .parquet list, tar archives ('shards/{000..099}.tar'), "
    "or Parquet files that hold images"
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
        print(f"maxact: {error}", file=sys.stderr)
        return 1


def _scan(model: str, images: list[str], store: str, quiet: bool, **settings: Any) -> int:
    from maxact.progress import display
    from maxact.run import scan

    for name in ("layers", "where", "score"):
        settings[name] = settings[name] or (["max"] if name == "score" else [])
    with display(quiet) as report:
        source = images[0] if len(images) == 1 else images
        done = scan(model, source, store, report=report, native_log=True, **settings)
    if not quiet:
        print(f"{store}: {_summary(done)} (`maxact info {store}` says more)")
    return 0


def _layers(model: str, layers: list[str] | None, at: Any, **loading: Any) -> int:
    from maxact.models import load_model
    from maxact.progress import print_table
    from maxact.run import find_taps

    loaded = load_model(model, **loading)
    found = find_taps(loaded, layers or (), at)
    rows = [(tap.name, tap.layer, tap.kind, tap.channels, f"{tap.map[0]} x {tap.map[1]}") for tap in found.taps]
    print_table(("tap", "layer", "kind", "channels", "map"), rows)
    height, width = loaded.preprocess.crop
    print(f"{len(found.taps)} taps, {found.channels:,} channels; weights {loaded.weights}; input {height} x {width}")
    if found.idle:
        print(f"never run by the network: {', '.join(found.idle)}")
    return 0


def _info(store: str, as_json: bool) -> int:
    from maxact.info import describe
    from maxact.progress import print_table
    from maxact.store import Store

    facts = describe(Store(store))
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if name not in ("taps", "errors"):
            print(f"{name:14} {value if isinstance(value, str) else json.dumps(value)}")
    if facts["taps"]:
        print()
        print_table(tuple(facts["taps"][0]), [tuple(tap.values()) for tap in facts["taps"]])
    if facts["errors"]:
        print()
        print_table(tuple(facts["errors"][0]), [tuple(bad.values()) for bad in facts["errors"][:20]], "bad images")
        if len(facts["errors"]) > 20:
            print(f"and {len(facts['errors']) - 20} more, in errors.parquet")
    return 0


def _export(store: str, out: str) -> int:
    from maxact.export import export

    print(f"{out}: {export(store, out):,} rows")
    return 0


def _demo(out: str, quiet: bool, overwrite: bool) -> int:
    import numpy as np

    from maxact import demo, run
    from maxact.files import writing
    from maxact.progress import display, print_table
    from maxact.render.sheet import contact_sheet, telling_channels

    folder = Path(out)
    with display(quiet) as report:
        count = demo.write_tiles(folder / "tiles")
        store = run.scan(
            "maxact.demo:network",
            folder / "tiles",
            folder / "demo.zarr",
            overwrite=overwrite,
            report=report,
            native_log=True,
        )
    sheet = contact_sheet(store, telling_channels(store))
    with writing(folder / "sheet.png"):
        sheet.save(folder / "sheet.png")
    rows = []
    for name in store:
        results = store[name]
        strongest = int(np.nan_to_num(results.stats["max"], nan=-np.inf).argmax())
        best = results.top(strongest).slice(0, 1).to_pylist()[0]
        alive = results.tap.channels - int(results.dead.sum())
        rows.append((name, results.tap.kind, results.tap.channels, alive, best["score"], best["key"]))
    print_table(("tap", "kind", "channels", "alive", "highest", "in"), rows)
    print(f"scanned {count:,} tiles of photographs through EfficientNet-lite0")
    print(f"  the strongest tiles of some channels: {folder / 'sheet.png'}")
    print(f"  the store: {folder / 'demo.zarr'} (look inside with `maxact info {folder / 'demo.zarr'}`)")
    return 0


def _summary(store: Any) -> str:
    facts = store.manifest.summary
    left_out = "".join(f", {facts[name]:,} {name}" for name in ("bad", "grey") if facts[name])
    channels = sum(tap.channels for tap in store.manifest.taps)
    return f"{facts['scanned']:,} of {facts['images']:,} images{left_out}; {len(store)} taps, {channels:,} channels"


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
        self.exit(2, f"maxact: {message} (`{self.prog} --help` says more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "maxact",
        description="For every channel of every layer of a convolutional network, the images that activate it most.",
    )
    parser.add_argument("--version", action="version", version=f"maxact {version('maxact')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    layers = commands.add_parser("layers", help="every tap of a network: name, kind, channels, map")
    layers.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_network(layers)
    layers.set_defaults(command=_layers)

    scan = commands.add_parser(
        "scan",
        help="first pass: find the strongest images of every channel",
        description="The same command again goes on with an unfinished store, or says that it is done.",
    )
    scan.add_argument("model", metavar="MODEL", help=_MODEL)
    scan.add_argument("images", metavar="IMAGES", nargs="+", help=_IMAGES)
    scan.add_argument("store", metavar="STORE", help="the folder of the result")
    _add_images(scan)
    _add_network(scan)
    _add_pixels(scan)
    _add_lists(scan)
    _add_running(scan)
    scan.set_defaults(command=_scan)

    export = commands.add_parser("export", help="a store as one Parquet file")
    export.add_argument("store", metavar="STORE")
    export.add_argument("out", metavar="OUT", help="the Parquet file")
    export.set_defaults(command=_export)

    info = commands.add_parser("info", help="what is in a store, how it was made, what went wrong")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--json", action="store_true", dest="as_json", help="as JSON, with everything")
    info.set_defaults(command=_info)

    demo = commands.add_parser("demo", help="all of it on an embedded network and embedded photographs")
    demo.add_argument("out", metavar="OUT", nargs="?", default="demo", help="the folder of the result (demo)")
    demo.add_argument("--overwrite", action="store_true", help="start again")
    demo.add_argument("--quiet", action="store_true", help="no display, warnings only")
    demo.set_defaults(command=_demo)
    return parser


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
    group.add_argument("--readers", type=int, default=16, metavar="N", help="threads that read files (16)")
    group.add_argument("--decode-threads", type=int, metavar="N", help="threads that decode (every core)")
    group.add_argument("--max-bad", type=int, metavar="N", help="bad images to bear (1 %% of all, but at least 10)")
    group.add_argument("--retry-errors", action="store_true", help="scan the shards of recorded errors again")


def _add_lists(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to keep")
    group.add_argument(
        "--score", action="append", choices=("max", "mean"), help="what ranks an image (may repeat; max)"
    )
    group.add_argument("--top", type=int, default=50, metavar="K", help="strongest images per channel (50)")
    group.add_argument("--bottom", type=int, default=0, metavar="K", help="weakest images per channel (0)")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="fp32 on a CPU, fp16 on CUDA")
    group.add_argument("--batch", type=int, metavar="N", help="images in a batch")
    group.add_argument("--shard", type=int, metavar="N", help="images in a shard (4096)")
    group.add_argument("--threads", type=int, metavar="N", help="of the network on a CPU (every core)")
    group.add_argument("--overwrite", action="store_true", help="delete the store that is there and start again")
    group.add_argument("--quiet", action="store_true", help="no display, warnings only")


if __name__ == "__main__":
    sys.exit(main())
