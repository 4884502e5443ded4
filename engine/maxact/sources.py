"""Where images come from: folders, globs, lists, archives and Datasets, each as a stream of rows.

Paths are bytes from end to end, as the file system gives them; text is made of them only for keys, labels, sorting and
messages, as UTF-8 with lone surrogates for what is none. So neither the locale nor odd names change what is found.
"""

import errno
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, islice, takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar

from braceexpand import braceexpand
from natsort import natsort_keygen

from maxact import archives, groups, limits, listed, packed, remote, urls
from maxact.archives import Row, printable, show, text
from maxact.errors import MaxactError, UsageError
from maxact.listed import MISSING
from maxact.urls import is_remote

# The last ones can be decoded by no decoder here; they are listed so that they show as bad instead of missing.
IMAGES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2"),
        *("gif", "avif", "heic", "heif"),
    )
)
LISTS = frozenset(["txt", "lst", "list", ""])
ARCHIVES = frozenset(["tar", "parquet"])
COMPRESSED = frozenset(["tgz", "tbz", "tbz2", "txz", "tzst", "gz", "bz2", "xz", "zst"])
FILES = IMAGES | LISTS - {""} | ARCHIVES | COMPRESSED | {"csv"}

_WEB = "few web servers list their folders: give a list (.txt, .csv, .parquet) of URLs, or tar archives"

natural: Callable[[str], object] = natsort_keygen()

A = TypeVar("A")
Entry = os.DirEntry[bytes] | remote.Item


class Place(NamedTuple):
    """One file or folder that a source names."""

    path: bytes  # absolute, or a URL
    pattern: tuple[str, ...]  # the components below the folder `path` that are to be matched; () for a file
    key: str  # what the keys of its images start with
    label: str  # of the files directly in it


def find(source: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Iterator[Row]:
    """The images of one folder, glob, list, archive or picture, here or at a URL.

    MaxactError: it is missing, cannot be read or indexed, or holds no image.
    """
    name = os.fsdecode(source)
    far = is_remote(name)
    name = name if far else os.path.expanduser(name)
    found = False
    for several, places in groupby(_far_places(name) if far else _places(name), _is_archive):
        for row in _each(_at, places, far and several):
            found = True
            yield row
    if not found and urls.is_web(name):
        raise MaxactError(f"{printable(name)} shows no images: {_WEB}")
    if not found:
        raise MaxactError(
            f"{printable(name)} holds no images: looked for files that end in .jpg, .png, .webp, … in any case, "
            "and not in hidden folders"
        )


def _places(name: str) -> Iterator[Place]:
    """The files and folders that a name with braces and wildcards stands for; the name of a thing that exists wins."""
    if _exists(name):
        path = Path(name).absolute()
        yield Place(os.fsencode(path), ("**",) if path.is_dir() else (), "" if path.is_dir() else path.name, "")
        return
    if not _magic(name):
        raise MaxactError(f"{printable(name)} does not exist")
    try:
        names = _expand(name)
    except ValueError:
        raise MaxactError(f"{printable(name)} does not exist, and its braces do not pair up") from None
    # Keys are relative to the folder that all of them share: the components before the first wildcard or brace.
    base = sum(1 for _ in takewhile(lambda part: not _magic(part), Path(name).absolute().parts))
    for each in names:
        path = Path(each).absolute()
        below: tuple[str, ...]
        if _exists(path):
            key, below = "/".join(path.parts[base:]), ("**",) if path.is_dir() else ()
        elif _magic(each):
            fixed = [*takewhile(lambda part: not _magic(part), path.parts)]
            # A folder that matches stands for all that is in it.
            key, below = "/".join(fixed[base:]), (*path.parts[len(fixed) :], "**")
            path = Path(*fixed)
        else:
            raise MaxactError(f"{printable(each)} does not exist (one of {printable(name)})")
        yield Place(os.fsencode(path), below, key, os.path.basename(os.path.normpath(path)))


def _expand(name: str) -> list[str]:
    """The names that a name with braces stands for. ValueError: they do not pair up. UsageError: too many."""
    if "{" not in name:
        return [name]
    try:
        limits.check_ranges(name)
    except ValueError as error:
        raise UsageError(f"{printable(name)}: {error}") from None
    names = list(islice(braceexpand(name), limits.NAMES + 1))
    if len(names) > limits.NAMES:
        raise UsageError(f"{printable(name)}: its braces stand for more than {limits.NAMES:,} names")
    return names


def _exists(path: str | Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in MISSING and error.errno != errno.EACCES:
            return False
        raise MaxactError(f"cannot read {printable(str(path))}: {error.strerror}") from None
    except ValueError:  # a zero byte
        return False
    return True


def _magic(name: str, letters: str = "*?[{") -> bool:
    return any(letter in name for letter in letters)


def _far_places(url: str) -> Iterator[Place]:
    """The same for a URL. What ends like a file is taken for one without asking: its index is asked for soon enough."""
    magic = partial(_magic, letters="*[{" if urls.is_web(url) else "*?[{")  # what follows ? is a query there
    names = urls.names(url)
    if not names[0]:
        raise MaxactError(f"{printable(url)} names no bucket or host")
    bucket_is_magic = magic(names[0]) and not urls.is_web(url)
    if not bucket_is_magic and (is_folder := _far_is_folder(url, magic(url))) is not None:
        key = "" if is_folder else names[-1]
        yield Place(_encode(url), ("**",) if is_folder else (), key, "")
        return
    try:
        expanded = _expand(url)
    except ValueError:
        raise MaxactError(f"{printable(url)} does not exist, and its braces do not pair up") from None
    base = sum(1 for _ in takewhile(lambda part: not magic(part), names))
    for each in expanded:
        root, parts = urls.split(each)
        fixed = [*takewhile(lambda part: not magic(part), parts)]
        if not fixed:
            raise MaxactError(f"{printable(url)}: a wildcard cannot stand for a bucket or a host")
        if len(fixed) == len(parts):
            below: tuple[str, ...] = ("**",) if _far_is_folder(each, False) else ()
        else:
            each, below = root + "/".join(fixed), (*parts[len(fixed) :], "**")
        names = urls.names(each)
        yield Place(_encode(each), below, "/".join(names[base:]), names[-1])


def _encode(url: str) -> bytes:
    return url.rstrip("/").encode("utf-8", "surrogateescape")


def _far_is_folder(url: str, magic: bool) -> bool | None:
    """Whether a URL names a folder; None where it is a pattern, and no name of anything."""
    if not magic and archives.suffix(urls.names(url)[-1]) in FILES and not url.endswith("/"):
        return False
    try:
        return remote.stat(url.encode("utf-8", "surrogateescape")).folder
    except OSError as error:
        if magic and isinstance(error, FileNotFoundError | PermissionError):
            return None
        advice = f"; {_WEB}" if urls.is_web(url) else ""
        raise MaxactError(f"cannot read {printable(url)}: {error.strerror}{advice}") from None


def _is_archive(place: Place) -> bool:
    return not place.pattern and archives.suffix(place.key) in ARCHIVES


def _at(place: Place) -> Iterator[Row]:
    return _folder(place) if place.pattern else _file(place.path, place.key)


def _each(rows: Callable[[A], Iterator[Row]], items: Iterable[A], far: bool) -> Iterator[Row]:
    """The rows of one item after the other; far away, of several at a time."""
    if not far:
        return chain.from_iterable(map(rows, items))
    return chain.from_iterable(remote.ahead(lambda item: list(rows(item)), items))


def _folder(place: Place) -> Iterator[Row]:
    """The picture files of a folder, or where it has none, the images in its archives."""
    found = False
    for row in (remote.ahead if urls.is_web(place.path) else map)(_picture, _walk(place, IMAGES)):
        found = True
        yield row
    if not found:
        packed.check_finished(place.path, whole=place.pattern == ("**",))
        held = (each for each in _walk(place, ARCHIVES) if not packed.is_record(each[2].path))
        yield from _each(lambda each: _file(each[2].path, each[0]), held, is_remote(place.path))


def _picture(found: tuple[str, str, Entry]) -> Row:
    key, label, entry = found
    if isinstance(entry, remote.Item) and entry.status:
        return key, label, entry.path, 0, entry.status.size, entry.status.modified
    return key, label, entry.path, 0, *listed.length_and_modified(entry.path)


def _walk(place: Place, suffixes: frozenset[str]) -> Iterator[tuple[str, str, Entry]]:
    """Key, label and entry of every file below a folder that matches its pattern, in natural order.

    Links to folders are followed, but never into a folder that the walk is already inside. The last component of the
    pattern must be "**", which matches any number of components.
    """
    pattern, last = place.pattern, len(place.pattern) - 1

    def reach(states: Iterable[int], name: str) -> frozenset[int]:
        """The components of the pattern that the next name may match, after those that `name` matched."""
        moved = (i if pattern[i] == "**" else i + 1 for i in states if _matches(name, pattern[i]))
        return frozenset(j for i in moved for j in starts(i))

    def starts(i: int) -> Iterator[int]:
        yield i
        if pattern[i] == "**" and i < last:  # "**" may match nothing
            yield from starts(i + 1)

    def check_depth(folder: bytes, above: int) -> None:
        if above >= limits.DEEP:
            raise MaxactError(f"{show(folder)}: lies in more than {limits.DEEP} folders, one in the other")

    def visit(
        folder: bytes, key: str, label: str, states: frozenset[int], above: frozenset[tuple[int, int]]
    ) -> Iterator[tuple[str, str, Entry]]:
        with archives.reading(folder):
            status = os.stat(folder)
        check_depth(folder, len(above))
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        everything = last in states
        for name, is_folder, entry in _listing(folder, suffixes):
            reached = states if everything else reach(states, name)
            if is_folder and reached:
                yield from visit(entry.path, f"{key}{name}/", name, reached, above | {here})
            elif last in reached:
                yield key + name, label, entry

    def visit_far(
        folder: bytes,
        listing: list[tuple[str, bool, remote.Item]],
        key: str,
        label: str,
        states: frozenset[int],
        above: int,
    ) -> Iterator[tuple[str, str, Entry]]:
        check_depth(folder, above)  # a server's folders may go on for ever, as where one is a link to itself
        everything = last in states
        reached = [states if everything else reach(states, name) for name, _, _ in listing]
        folders = [
            entry.path for (_, is_folder, entry), then in zip(listing, reached, strict=True) if is_folder and then
        ]
        below = remote.ahead(partial(_far_listing, suffixes=suffixes), folders)
        for (name, is_folder, entry), then in zip(listing, reached, strict=True):
            if is_folder and then:
                yield from visit_far(entry.path, next(below), f"{key}{name}/", name, then, above + 1)
            elif not is_folder and last in then:
                yield key + name, label, entry

    first, key = frozenset(starts(0)), place.key and place.key + "/"
    if is_remote(place.path):
        return visit_far(place.path, _far_listing(place.path, suffixes), key, place.label, first, 0)
    return visit(place.path, key, place.label, first, frozenset())


def _matches(name: str, component: str) -> bool:
    return component == "**" or fnmatch.fnmatchcase(name, component)


def _listing(folder: bytes, suffixes: frozenset[str]) -> list[tuple[str, bool, os.DirEntry[bytes]]]:
    """Name, whether it is a folder, and entry, of the folders and the files with these suffixes; none is hidden."""
    listing = []
    with archives.reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            name = text(entry.name)
            if not name.startswith("."):
                is_folder = _is_folder(entry)
                if is_folder or archives.suffix(name) in suffixes:
                    listing.append((name, is_folder, entry))
    # The name itself settles the order of what is naturally equal, as 1.jpg and 01.jpg are.
    listing.sort(key=lambda item: (natural(item[0]), item[0]))
    return listing


def _far_listing(folder: bytes, suffixes: frozenset[str]) -> list[tuple[str, bool, remote.Item]]:
    """The same of a URL."""
    with archives.reading(folder):
        found = [(item.name, item.folder, item) for item in remote.listing(folder) if not item.name.startswith(".")]
    found = [item for item in found if item[1] or archives.suffix(item[0]) in suffixes]
    return sorted(found, key=lambda item: (natural(item[0]), item[0]))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _file(path: bytes, key: str) -> Iterator[Row]:
    """The images that a single file is, holds or lists."""
    suffix = archives.suffix(key)
    if suffix in IMAGES:
        label = "".join(urls.names(text(path))[-2:-1]) if is_remote(path) else listed.parent(key, path)
        return iter([(key, label, path, 0, *listed.length_and_modified(path))])
    if suffix == "tar":
        return packed.rows(path) or archives.tar_rows(path, key, IMAGES)
    if suffix == "parquet":
        if groups.holds_images(path):
            return groups.parquet_rows(path, key)
        return listed.rows(path, groups.parquet_paths(path))
    if suffix == "csv":
        return listed.rows(path, listed.csv_lines(path, IMAGES))
    if suffix in LISTS:
        return listed.rows(path, listed.text_lines(path))
    if suffix in COMPRESSED:
        raise MaxactError(f"{show(path)} is compressed, so its images cannot be read one by one: unpack it")
    raise MaxactError(
        f"{show(path)} cannot be indexed: give a folder, a glob, a list (.txt, .csv, .parquet), .tar archives or "
        ".parquet files with images"
    )


def items(dataset: object) -> Iterator[Row]:
    """The rows of a map-style Dataset: its indices, with labels where it has `targets`. No item is fetched.

    UsageError: it is none.
    """
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        count = None
    if count is None or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"images must be a path, a list of paths, or a Dataset with a length and items by number, "
            f"not {type(dataset).__name__}"
        )
    if not count:
        raise MaxactError(f"the {type(dataset).__name__} holds no images")
    labels = _targets(dataset, count)
    for index in range(count):
        yield f"item/{index}", labels[index] if labels else "", b"", index, -1, 0


def _targets(dataset: object, count: int) -> Sequence[str] | None:
    targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != count:
        return None
    classes = getattr(dataset, "classes", None)
    values = targets.tolist() if hasattr(targets, "tolist") else targets
    if classes is None or not all(isinstance(value, int) and 0 <= value < len(classes) for value in values):
        return [str(value) for value in values]
    # torchvision's ImageNet names a class by a tuple of synonyms.
    names = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes]
    return [names[value] for value in values]
