"""Paths that are URLs: `s3://bucket/key`, `gs://bucket/key`, `http(s)://host/path`. Nothing here asks a server."""

from __future__ import annotations

import os
import posixpath
import re
from urllib.parse import unquote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
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
