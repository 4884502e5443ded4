"""What each command does. What it needs is imported when it runs, so that `maxact --help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any


def scan(model: str, images: list[str], store: str, quiet: bool, **settings: Any) -> int:
    """`maxact scan`."""
    from maxact.progress import display
    from maxact.run import scan, scan_together

    for name in ("layers", "where", "score"):
        settings[name] = settings[name] or (["max"] if name == "score" else [])
    source = images[0] if len(images) == 1 else images
    models = [name.strip() for name in model.split(",") if name.strip()] or [model]
    with display(quiet) as report:
        settings |= {"report": report, "native_log": True}
        if len(models) == 1:
            done = [scan(models[0], source, store, **settings)]
        else:
            weights = settings.pop("weights")
            each = weights.split(",") if weights else [None]
            settings["weights"] = each if len(each) > 1 else each[0]
            done = [*scan_together(_named(models), source, store, **settings)]
    if not quiet:
        for finished in done:
            print(f"{finished.path}: {_summary(finished)} (`maxact info {finished.path}` says more)")
    return 0


def _named(models: list[str]) -> dict[str, str] | list[str]:
    """NAME=MODEL, or MODEL, which is its own name: the networks by their names; where one is there twice, the names."""
    from maxact.errors import UsageError

    named = []
    for each in models:
        name, mark, network = (part.strip() for part in each.partition("="))
        if mark and not (name and network):
            raise UsageError(f"networks: expected NAME=MODEL, got {each!r}")
        named.append((name, network or name))
    return dict(named) if len(dict(named)) == len(named) else [name for name, _ in named]


def project(store: str, quiet: bool, channels: str | None, **settings: Any) -> int:
    """`maxact project`."""
    from maxact import run_project
    from maxact.choose import parse_channels
    from maxact.progress import display

    numbers = None if channels is None else parse_channels(channels)
    for name in ("layers", "method"):
        settings[name] = settings[name] or (["deconvnet"] if name == "method" else [])
    with display(quiet) as report:
        run_project.project(store, channels=numbers, report=report, native_log=True, **settings)
    if not quiet:
        print(f"{store}: projected (`maxact render {store} OUT` shows it)")
    return 0


def render(
    store: str,
    out: str,
    mosaic: bool,
    filters: bool,
    layers: list[str] | None,
    channels: str | None,
    label_names: str | None,
    layout: Any,
    across: int | None,
    format: Any,
    method: str | None,
    weights: str | None,
    quiet: bool,
) -> int:
    """`maxact render`."""
    from maxact.choose import parse_channels
    from maxact.errors import UsageError
    from maxact.process import show_bytes
    from maxact.progress import counting, display
    from maxact.render.filters import write_filters
    from maxact.render.gallery import measure, write_gallery
    from maxact.render.labels import read_label_names
    from maxact.render.mosaic import write_mosaics
    from maxact.run_project import scanned_model
    from maxact.store import Store

    if not mosaic and (layout != "square" or across is not None or method or (format != "png" and not filters)):
        raise UsageError("--layout, --across, --method and --format are for --mosaic; give it, too")
    opened = Store(store)
    which: dict[str, Any] = {
        "layers": layers or (),
        "channels": None if channels is None else parse_channels(channels),
        "label_names": read_label_names(Path(label_names)) if label_names else None,
    }
    files: list[Path] = []
    if filters:
        model = scanned_model(opened, None, weights)
        files += write_filters(model.network, Path(out), title=model.name, format=format)
    if mosaic:
        files += write_mosaics(opened, Path(out), layout=layout, across=across, format=format, method=method, **which)
    if not (filters or mosaic):
        need = measure(opened, layers=which["layers"], channels=which["channels"])
        with display(quiet) as report:
            if not quiet:
                print(f"{need.channels:,} channels, about {show_bytes(need.bytes)}", file=sys.stderr)
            files = [write_gallery(opened, Path(out), report=counting(report, "drawing", "sprites"), **which)]
    if not quiet:
        print(f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""))
    return 0


def layers(
    model: str,
    layers: list[str] | None,
    at: Any,
    draw: str | None,
    image: str | None,
    out: str,
    **loading: Any,
) -> int:
    """`maxact layers`."""
    from maxact.fields import of_taps
    from maxact.find import find_taps
    from maxact.models import load_model
    from maxact.progress import print_table

    loaded = load_model(model, **loading)
    found = find_taps(loaded, layers or (), at)
    fields = of_taps(loaded.network, found.taps, loaded.preprocess.crop)
    if draw is not None:
        return _draw(loaded, found, fields, draw, image, out)
    print_table(
        ("tap", "layer", "kind", "channels", "map", "field", "stride"),
        [
            (tap.name, tap.layer, tap.kind, tap.channels, _by(tap.map), *_describe(fields[tap.name]))
            for tap in found.taps
        ],
    )
    height, width = loaded.preprocess.crop
    print(f"{len(found.taps)} taps, {found.channels:,} channels; weights {loaded.weights}; input {height} x {width}")
    if found.idle:
        print(f"never run by the network: {', '.join(found.idle)}")
    return 0


def _describe(field: Any) -> tuple[str, str]:
    """A field's size and stride in words."""
    if field.is_global and not field.is_gated:
        return "whole input", ""
    gate = ", gated by the whole input" if field.is_gated else ""
    stride = "" if 0 in field.stride else _by(tuple(f"{pixels:g}" for pixels in field.stride))
    return _by(field.size) + gate, stride


def _by(sides: tuple[Any, ...]) -> str:
    return f"{sides[0]} x {sides[1]}"


def _draw(loaded: Any, found: Any, fields: Any, name: str, image: str | None, out: str) -> int:
    """Draws the field of the unit in the middle of a tap's map."""
    import numpy as np

    from maxact.catalog import Catalog
    from maxact.crops import visible
    from maxact.errors import UsageError
    from maxact.files import writing
    from maxact.inputs import Inputs
    from maxact.preprocess import near
    from maxact.render.field import draw as draw_field

    taps = {tap.name: tap for tap in found.taps}
    name = next((tap.name for tap in found.taps if tap.layer == name), name)
    if name not in taps:
        raise UsageError(f"draw: {loaded.name} has no tap {name!r}{near(name, list(taps))} (`maxact layers` lists all)")
    height, width = loaded.preprocess.crop
    pixels = np.full((height, width, 3), 160, np.uint8)
    if image is not None:
        catalog = Catalog.build(image, limit=1)
        with Inputs(catalog, loaded.preprocess, decoder="auto", max_pixels=200_000_000) as inputs:
            read, bad = inputs.get([0])
        if bad:
            raise UsageError(f"{bad[0].key}: {bad[0].error}")
        pixels = visible(read[0].pixels).round().byte().permute(1, 2, 0).numpy()
    rows, columns = taps[name].map
    with writing(Path(out)):
        try:
            draw_field(pixels, fields[name], (rows // 2, columns // 2)).save(out)
        except (ValueError, KeyError) as error:
            raise UsageError(f"out: expected a file such as field.png, got {out!r} ({error})") from error
    print(f"{out}: the field of the unit in row {rows // 2}, column {columns // 2} of {name}")
    return 0


def info(store: str, as_json: bool) -> int:
    """`maxact info`."""
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


def export(store: str, out: str, pooled: bool, layers: list[str] | None, quiet: bool) -> int:
    """`maxact export`."""
    from maxact.errors import UsageError
    from maxact.export import export, export_pooled
    from maxact.progress import counting, display

    if layers and not pooled:
        raise UsageError("--layers is for --pooled; give it, too")
    if pooled:
        with display(quiet) as report:
            files = export_pooled(store, out, layers=layers or (), report=counting(report, "writing", "files"))
        print(f"{out}: {files:,} files")
        return 0
    print(f"{out}: {export(store, out):,} rows")
    return 0


def bench(
    model: str,
    images: list[str],
    json: str | None,
    picture: str | None,
    quiet: bool,
    **settings: Any,
) -> int:
    """`maxact bench`."""
    _check_place("--json", json)
    _check_place("--picture", picture)
    from maxact.bench import bench
    from maxact.files import write_json
    from maxact.process import listing
    from maxact.progress import counting, display, print_table
    from maxact.render.bars import write_bars

    for name in ("layers", "where", "score"):
        settings[name] = settings[name] or (["max"] if name == "score" else [])
    source = images[0] if len(images) == 1 else images
    with display(quiet) as report:
        settings |= {"report": counting(report, "measuring", "stages"), "listed": listing(report)}
        result = bench(model, source, native_log=True, **settings)
    print_table(*result.rows(), title=f"{result.model}, {result.taps} taps, {result.channels:,} channels")
    if result.points:
        print_table(*result.tried(), title="settings tried")
    print("\n".join(result.lines()))
    if json:
        write_json(Path(json), result.to_json())
    if picture:
        write_bars(result, Path(picture))
    return 0


def _check_place(option: str, place: str | None) -> None:
    """Raises UsageError where no file can be put at the place that an option names, if it names one: before anything
    takes minutes."""
    from maxact.errors import UsageError

    if place is None:
        return
    path = Path(place)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with NamedTemporaryFile(prefix=f".{path.name}.", suffix=".part", dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{option}: {place} cannot be written ({reason}); choose another place") from error


def pack(images: list[str], out: str, quiet: bool, **settings: Any) -> int:
    """`maxact pack`."""
    from maxact.pack import pack
    from maxact.process import show_bytes
    from maxact.progress import display

    settings["where"] = settings["where"] or []
    source = images[0] if len(images) == 1 else images
    with display(quiet) as report:
        done = pack(source, out, report=report, native_log=True, **settings)
    if not quiet:
        bad = f", {done['bad']:,} bad (in {out}/errors.parquet)" if done["bad"] else ""
        size = show_bytes(done["bytes"])
        print(f"{out}: {done['packed']:,} of {done['images']:,} images{bad}; {done['archives']:,} archives, {size}")
    return 0


def demo(out: str, quiet: bool, overwrite: bool) -> int:
    """`maxact demo`."""
    from maxact import demo, run, run_project
    from maxact.progress import counting, display, print_table
    from maxact.render.gallery import write_gallery
    from maxact.render.mosaic import write_mosaics

    folder = Path(out)
    place = folder / "demo.zarr"
    running: dict[str, Any] = {"overwrite": overwrite, "native_log": True}
    with display(quiet) as report:
        count = demo.write_tiles(folder / "tiles")
        store = run.scan("maxact.demo:network", folder / "tiles", place, report=report, **running)
        channels = demo.telling_channels(store)
        store = run_project.project(store, channels=channels, method=demo.METHODS, report=report, **running)
        gallery = write_gallery(store, folder / "gallery", report=counting(report, "drawing", "sprites"))
        sheets = write_mosaics(store, folder / "mosaic", layers=demo.MOSAICS)
    rows = []
    for name in store:
        results = store[name]
        strongest = channels[name][0]
        best = results.top(strongest).slice(0, 1).to_pylist()[0]
        alive = results.tap.channels - int(results.dead.sum())
        rows.append((name, results.tap.kind, results.tap.channels, alive, strongest, best["score"], best["key"]))
    print_table(("tap", "kind", "channels", "alive", "channel", "highest", "in"), rows)
    print(f"scanned {count:,} tiles of photographs through EfficientNet-lite0, projected the winners of some channels")
    print(f"  the gallery: {gallery.resolve().as_uri()}")
    print(f"  mosaics, as in the papers: {sheets[0]} and {len(sheets) - 1} more")
    print(f"  the store: {place} (look inside with `maxact info {place}`)")
    return 0


def _summary(store: Any) -> str:
    facts = store.manifest.summary
    left_out = "".join(f", {facts[name]:,} {name}" for name in ("bad", "grey") if facts[name])
    channels = sum(tap.channels for tap in store.manifest.taps)
    return f"{facts['scanned']:,} of {facts['images']:,} images{left_out}; {len(store)} taps, {channels:,} channels"
