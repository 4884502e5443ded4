"""Paths that are URLs: `s3://bucket/key`, `gs://bucket/key`, `http(s)://host/path`. Nothing here asks a server."""

from __future__ import annotations

import html
import os
import posixpath
import re
from collections.abc import Iterator
from urllib.parse import unquote, urljoin

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HREF = re.compile(r"""<a\s[^<>]*?(?<![\w-])href\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+))""", re.IGNORECASE)
_WEB = (b"http://", b"https://")


def is_remote(path: str | bytes) -> bool:
    """Whether a path is a URL and no path of this machine."""
    if isinstance(path, bytes):
        return b"://" in path and not path.startswith(b"/") and is_remote(path[:32].decode("latin-1"))
    return _URL.match(path) is not None


def is_web(url: str | bytes) -> bool:
    """Whether it is one of a web server, which may have a query and escapes."""
    return (url if isinstance(url, bytes) else url.encode("utf-8", "surrogateescape")).startswith(_WEB)


def plain(url: str) -> str:
    """A URL without the query and the fragment that one of a web server may have."""
    return url.partition("#")[0].partition("?")[0] if is_web(url) else url


def beside(path: bytes, end: str) -> bytes:
    """The file that is named as the one at `path`, and then `end`: before the query, where a URL has one."""
    name = plain(text := path.decode("utf-8", "surrogateescape"))
    return (name + end + text[len(name) :]).encode("utf-8", "surrogateescape")


def folder(path: bytes) -> bytes:
    """The folder that a file is in; of a URL without its query, which was the file's."""
    return os.path.dirname(_plain(path))


def inside(folder: bytes, name: str) -> bytes:
    """A file in a folder; of a URL without its query, as folders are listed."""
    return os.path.join(_plain(folder), name.encode())


def _plain(path: bytes) -> bytes:
    return plain(path.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def split(url: str) -> tuple[str, list[str]]:
    """The scheme of a URL, with its slashes, and its components: the first is the bucket or the host."""
    scheme, slashes, rest = url.partition("://")
    return scheme + slashes, rest.rstrip("/").split("/")


def names(url: str) -> list[str]:
    """Its components, but as names of files and folders: without a query, and what a web server escapes in plain."""
    parts = split(plain(url))[1]
    return [unquote(part, errors="surrogateescape") for part in parts] if is_web(url) else parts


def resolve(place: bytes, path: bytes) -> bytes:
    """What `path` means in a file at the URL `place`: relative to its folder, unless it is absolute or a URL itself."""
    if is_remote(path) or path.startswith(b"/"):
        return path
    if not is_remote(place):
        return os.path.dirname(place) + b"/" + path
    root, (host, *folders) = split(plain(place.decode("utf-8", "surrogateescape")))
    whole = "/" + "/".join([*folders[:-1], path.decode("utf-8", "surrogateescape")])
    if any(part in (".", "..") for part in whole.split("/")):
        whole = posixpath.normpath(whole)
    return f"{root}{host}{whole}".encode("utf-8", "surrogateescape")


def links(page: str, base: str) -> Iterator[str]:
    """The URLs that a page of HTML at the URL `base` links to."""
    for link in _HREF.finditer(page):
        try:
            yield urljoin(base, html.unescape(link[1] or link[2] or link[3] or "").strip())
        except ValueError:  # none of a URL's form
            continue
