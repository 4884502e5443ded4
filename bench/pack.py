"""What `maxact pack` gains: images per second of the decoder on original files and on packed ones, all in memory.

Measured in turn, several rounds. Beside them what packing itself costs, how far the model inputs of packed images are
from those of the originals, and how long the catalog takes to list archives by their index and by their headers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from common import arguments, finish, interleaved, median, photographs, seconds
from decode import rate
from maxact.catalog import Catalog, Entry, Shard
from maxact.config import cores
from maxact.decode import make_decoder
from maxact.pack import pack
from maxact.packed import SUFFIX, write_index
from maxact.preprocess import Preprocess
from maxact.repack import Archive


def read(catalog: Catalog) -> list[bytes]:
    """The bytes of all images."""
    return [data for entry in catalog.entries(0, len(catalog)) if isinstance(data := catalog.read(entry), bytes)]


def inputs(files: Sequence[bytes], decoder: str) -> Iterator[torch.Tensor]:
    """The model inputs of files, [H, W, 3] each."""
    made = make_decoder(decoder, Preprocess(), batch=len(files), threads=cores())
    made.submit(files)
    yield from made.collect().images.float()
    made.close()


def distance(originals: Sequence[bytes], packed: Sequence[bytes], decoder: str) -> float:
    """Levels of 255 by which the model inputs differ, on average."""
    pairs = zip(inputs(originals, decoder), inputs(packed, decoder), strict=True)
    return float(torch.stack([(a - b).abs().mean() for a, b in pairs]).mean())


def write_members(folder: Path, members: int) -> None:
    """Archives of 4,096 small members each, with their indexes."""
    for index, start in enumerate(range(0, members, 4096)):
        stop = min(start + 4096, members)
        names = [f"n{number % 1000:08}/n{number % 1000:08}_{number}" for number in range(start, stop)]
        entries = [Entry(start + i, f"{name}.JPEG", name[:9], b"", 0, 0, 0) for i, name in enumerate(names)]
        part = Archive(Shard(index, start, stop))
        path = folder / f"{index:06}.tar"
        part.write(((entry, bytes(1024)) for entry in entries), path)
        write_index(path, part.rows)


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "",
        images="",
        files=512,
        batch=32,
        short_side=256,
        quality=95,
        threads=cores(),
        decoder="dali",
        devices="cpu",
        seconds=2.0,
        rounds=5,
        members=128_000,
    )
    source = photographs(args.images)
    with tempfile.TemporaryDirectory() as folder:
        out, catalogs = Path(folder) / "out", {"original": Catalog.build(source, limit=args.files)}
        options = {"limit": args.files, "workers": args.threads, "short_side": args.short_side, "quality": args.quality}
        packing = [seconds(lambda: pack(source, out, overwrite=True, **options)) for _ in range(args.rounds)]
        catalogs["packed"] = Catalog.build(out)
        files = {name: read(catalog) for name, catalog in catalogs.items()}
        how = (Preprocess(), args.batch, args.threads, args.devices, args.seconds)
        runs = {name: partial(rate, args.decoder, [*data], *how) for name, data in files.items()}
        measured = interleaved(runs, args.rounds)
        members = Path(folder) / "members"
        members.mkdir()
        write_members(members, args.members)
        by_index = median([seconds(lambda: Catalog.build(members)) for _ in range(3)])
        for path in members.glob(f"*{SUFFIX}"):
            path.unlink()
        by_headers = median([seconds(lambda: Catalog.build(members)) for _ in range(3)])
        levels = distance(files["original"], files["packed"], args.decoder)
    rates = {name: median(values) for name, values in measured.items()}
    gain = median([b / a for a, b in zip(measured["original"], measured["packed"], strict=True)])
    sizes = {name: sum(len(data) for data in each) / len(each) for name, each in files.items()}
    rows = [(name, len(files[name]), sizes[name] / 1000, rates[name]) for name in files]
    details = {
        "gain": gain,
        "packing img/s": len(files["original"]) / median(packing),
        "mean difference of model inputs, levels": levels,
        "listing": {"members": args.members, "by index s": by_index, "by headers s": by_headers},
        "measured": measured,
    }
    finish("pack", ("files", "images", "kB an image", f"{args.decoder} img/s"), rows, details, args.json)
    print(f"{gain:.2f} times the rate; packing {details['packing img/s']:.0f} img/s; inputs {levels:.2f} levels apart")
    print(f"{args.members} members listed in {by_index:.2f} s by index, {by_headers:.2f} s by headers")


if __name__ == "__main__":
    main()
