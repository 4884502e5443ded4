"""Object stores and web servers as places of images: everything that maxact asks of fsspec.

A path is a URL as bytes. fsspec brings the connections, the credentials and the listings; where it says too little of
what it read, or of why it failed, the request is made here, over fsspec's own connection.

Whatever goes wrong is an OSError with a number and a reason, so that a lost server is to a reader what a lost disk is.
Everything may be called by many threads at once: one filesystem for each scheme and process, on fsspec's one event
loop. A forked process makes its own; nothing of this travels in a pickle.
"""

from __future__ import annotations

import email.utils
import errno
import io
import os
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urljoin

import fsspec
from fsspec.asyn import sync

from maxact import reasons
from maxact.errors import MaxactError
from maxact.limits import PAGE
from maxact.urls import links, plain, split

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}  # to fsspec's
AT_ONCE = 32  # requests while listing
PIECE = 8 << 20  # bytes of a request, where more are read at a time
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0  # without a connection, without a byte
PAUSES = (0.5, 1.0, 2.0, 4.0)  # while a server is busy, and in listing for all that may pass
UNKNOWN = 1  # `modified` where the server says nothing of the kind
_INT64 = 2**63 - 1  # as large as the catalog's numbers may be: a server may say anything

A = TypeVar("A")
B = TypeVar("B")


class Status(NamedTuple):
    """What a server says of a file.

    `modified` changes when the file does: for gs:// its generation, for s3:// the whole seconds of its modification
    time and digits of its ETag below them, for http(s):// its modification time, or digits of its ETag where it has
    none; all as nanoseconds. UNKNOWN where the server says nothing of the kind.
    """

    size: int
    modified: int
    folder: bool = False


class Item(NamedTuple):
    """A file or folder in a listing. No status: a web page lists names only."""

    name: str
    path: bytes
    folder: bool
    status: Status | None


class Got(NamedTuple):
    """A part of a file, or all of it, and the status of the file as the same answer gave it."""

    data: bytes
    size: int | None  # None: not said
    modified: int | None


# What a server is asked


def stat(path: bytes, patient: bool = True) -> Status:
    """Size and modification of a file, in one request, and whether it is a folder. OSError.

    patient: tried again where that may help, as it always should be while images are listed.
    """
    url = _text(path)
    fs, kind = _filesystem(url)

    def ask() -> Status:
        if kind == "http":
            return sync(fs.loop, _head, fs, url)  # type: ignore[no-any-return]
        info = fs.info(url)
        return _status(info, info["size"])._replace(folder=info["type"] == "directory")

    return _asked(ask, kind, patient)


def exists(path: bytes) -> bool:
    """Whether there is such a file. A store that may not be listed says of a missing file that access is denied."""
    try:
        return not stat(path).folder
    except (FileNotFoundError, PermissionError):
        return False


def listing(folder: bytes) -> list[Item]:
    """The files and folders in a folder, hidden ones too, in no order. OSError: FileNotFoundError where it has none."""
    url = _text(folder).rstrip("/")
    fs, kind = _filesystem(url)
    if kind == "http":
        base = urljoin(plain(url) + "/", ".")  # as its links are resolved
        return _linked(_asked(lambda: sync(fs.loop, _links, fs, base), kind, True), base)
    root = split(url)[0]
    items = []
    for info in _asked(lambda: fs.ls(url, detail=True), kind, True):
        whole = f"{root}{info['name']}"
        name = whole[len(url) + 1 :]
        is_folder = info["type"] == "directory"
        # An object "folder/" stands for the folder itself.
        if name.rstrip("/") and "/" not in name.rstrip("/") and (is_folder or not name.endswith("/")):
            path = whole.encode("utf-8", "surrogateescape")
            items.append(Item(name.rstrip("/"), path, is_folder, None if is_folder else _status(info, info["size"])))
    return items


def _linked(urls: Iterable[str], base: str) -> list[Item]:
    """What a web page links to directly below itself."""
    items = []
    for url in sorted(set(urls)):
        name = url[len(base) :] if url.startswith(base) else ""
        if name.rstrip("/") and "/" not in name.rstrip("/") and not name.startswith(("?", "#")):
            shown = unquote(plain(url)[len(base) :].rstrip("/"), errors="surrogateescape")
            items.append(Item(shown, url.encode("utf-8", "surrogateescape"), name.endswith("/"), None))
    return items


def read(path: bytes, start: int | None, length: int, patient: bool = False) -> Got:
    """`length` bytes from `start`, or a whole file that should have so many (start None). One request, no other.

    No more than that is ever read: of a whole file of another size no data, of a part beyond its end what there is.
    OSError: EOPNOTSUPP where the server sends a whole file, or another part, for a part.
    """
    url = _text(path)
    fs, kind = _filesystem(url)
    get = _get_s3 if kind == "s3" else _get_web
    got: Got = _asked(lambda: sync(fs.loop, get, fs, url, start, length), kind, patient)
    return got._replace(data=got.data[:length])


class File(io.RawIOBase):
    """A file that is read where it is asked for, at least one request each time: wrap it in a buffer for small reads.

    patient: as for `stat`. OSError, with ESTALE where it has been replaced since it was opened.
    """

    def __init__(self, path: bytes, patient: bool = True) -> None:
        self._path, self._patient, self._place = path, patient, 0
        self.status = stat(path, patient)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.status.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.status.size - self._place))
        starts = range(0, length, PIECE)
        several = ahead if len(starts) > 1 else map  # a row group may be large, and one connection alone is slow
        for start, data in zip(starts, several(partial(self._piece, length), starts), strict=True):
            buffer[start : start + len(data)] = data
        self._place += length
        return length

    def whole(self) -> bytes:
        """All of it, in one request."""
        return self._read(None, self.status.size)

    def _piece(self, length: int, start: int) -> bytes:
        return self._read(self._place + start, min(PIECE, length - start))

    def _read(self, start: int | None, size: int) -> bytes:
        got = read(self._path, start, size, self._patient)
        if len(got.data) < size or got.modified not in (None, self.status.modified):
            raise OSError(errno.ESTALE, "it was replaced while it was read")
        return got.data


def ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """What `map` gives, in order, with AT_ONCE calls on their way."""
    pool = ThreadPoolExecutor(AT_ONCE, "maxact-list")
    under_way: deque[Future[B]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == 2 * AT_ONCE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# How each kind of server is asked for bytes, on fsspec's event loop


def _span(start: int | None, length: int) -> str | None:
    return None if start is None else f"bytes={start}-{start + max(length, 1) - 1}"


def _check_part(start: int, span: str | None) -> None:
    """OSError: an answer is not the part of a file that was asked for, as its Content-Range says."""
    if span is None:
        raise OSError(errno.EOPNOTSUPP, "the server sends no parts of files (Range), only whole ones")
    if not span.lower().startswith(f"bytes {start}-"):
        raise OSError(errno.EOPNOTSUPP, f"the server sends another part of the file than was asked for ({span})")


async def _get_s3(fs: Any, url: str, start: int | None, length: int) -> Got:
    bucket, key, _ = fs.split_path(url)
    span = _span(start, length)
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **({"Range": span} if span else {}))
    except OSError as error:
        if reasons.http_status(error) == 416:
            return Got(b"", None, None)
        raise
    status, body = _status(answer, _whole(answer.get("ContentRange"), answer["ContentLength"])), answer["Body"]
    try:
        if start is not None:
            _check_part(start, answer.get("ContentRange"))
        data = b"" if start is None and status.size != length else await body.read()
    finally:
        body.close()
    return Got(data, status.size, status.modified)


async def _get_web(fs: Any, url: str, start: int | None, length: int) -> Got:
    """Of web servers and of gs://, which is one, too."""
    span = _span(start, length)
    async with await _request(fs, "GET", url, {"Range": span} if span else {}) as answer:
        if answer.status == 416:
            return Got(b"", None, None)
        answer.raise_for_status()
        size = _whole(answer.headers.get("Content-Range"), answer.headers.get("Content-Length"))
        modified: int | None = _status(answer.headers, 0).modified
        if modified == UNKNOWN or (url.startswith("g") and "X-Goog-Generation" not in answer.headers):
            modified = None
        if start is not None:
            _check_part(start, answer.headers.get("Content-Range", "") if answer.status == 206 else None)
        if span is None and size not in (None, length):
            return Got(b"", size, modified)
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > length:  # never much more than was asked for
                break
        return Got(bytes(data), len(data) if span is None else size, modified)


async def _links(fs: Any, url: str) -> list[str]:
    """What the page that a web server shows for a folder links to, as URLs."""
    async with await _request(fs, "GET", url, {}) as answer:
        answer.raise_for_status()
        if answer.content_type != "text/html":
            return []
        page = bytearray()
        async for chunk in answer.content.iter_any():
            page += chunk
            if len(page) > PAGE:
                raise OSError(errno.EFBIG, f"its page of links has more than {PAGE >> 20} MiB: give a list of URLs")
        return list(links(page.decode(answer.charset or "utf-8", "ignore"), url))


async def _head(fs: Any, url: str) -> Status:
    async with await _request(fs, "HEAD", url, {}) as answer:
        if answer.status not in (403, 405, 501) and "Content-Length" in answer.headers:
            return _of_headers(answer, None, answer.headers["Content-Length"])
    # Some servers answer nothing but GET, and a signed URL may allow nothing else.
    async with await _request(fs, "GET", url, {"Range": "bytes=0-0"}) as answer:
        return _of_headers(answer, answer.headers.get("Content-Range"), answer.headers.get("Content-Length"))


def _of_headers(answer: Any, span: str | None, length: str | None) -> Status:
    answer.raise_for_status()
    size, folder = _whole(span, length), answer.content_type == "text/html"
    if size is None and not folder:
        raise OSError(errno.EOPNOTSUPP, "the server does not say how large it is")
    return _status(answer.headers, size or 0)._replace(folder=folder)


async def _request(fs: Any, method: str, url: str, headers: dict[str, str]) -> Any:
    headers = {"Accept-Encoding": "identity", **headers}
    if url.startswith("g"):
        await fs._set_session()
        return await fs.session.request(
            method, fs.url(url), headers=fs._get_headers(headers), params=fs._get_params({})
        )
    session, options = await fs.set_session(), dict(fs.kwargs)
    headers = {**options.pop("headers", {}), **headers}
    return await session.request(method, fs.encode_url(url), allow_redirects=True, headers=headers, **options)


def _whole(span: str | None, length: str | int | None) -> int | None:
    """The size of a whole file: of an answer with a part of it what follows the slash in "bytes 0-99/1234"."""
    total = (span or "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None if length is None else int(length)


def _status(facts: Mapping[str, Any], size: int | None) -> Status:
    """From what a listing, fsspec's info or the headers of an answer say."""
    tag = str(facts.get("ETag") or "").removeprefix("W/").strip('"')
    digits = zlib.crc32(tag.encode("utf-8", "replace")) % 10**9
    if generation := facts.get("generation") or facts.get("X-Goog-Generation"):
        modified = int(generation) * 1000  # it counts microseconds
    elif when := facts.get("LastModified"):  # s3: milliseconds in some listings, seconds in every answer
        modified = int(when.timestamp()) * 10**9 + digits
    else:
        try:
            modified = int(email.utils.parsedate_to_datetime(facts["Last-Modified"]).timestamp()) * 10**9
        except (KeyError, ValueError, OverflowError):
            modified = digits
    return Status(min(int(size or 0), _INT64), modified % _INT64 or UNKNOWN)


# Connections

_lock = threading.Lock()
_made: dict[str, Any] = {}
_left: list[dict[str, Any]] = []


def forget() -> None:
    """Leaves all connections alone, for a forked process: it has no thread of fsspec's, so it must not even close them,
    and perhaps a lock that nobody will open."""
    global _lock, _made
    _left.append(_made)
    _lock, _made = threading.Lock(), {}


os.register_at_fork(after_in_child=forget)


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and which kind it is. MaxactError: there is none, or it is not installed."""
    scheme = url.partition("://")[0]
    kind = SCHEMES.get(scheme)
    if kind is None:
        raise MaxactError(f"{url} cannot be read: maxact reads s3://, gs:// and http(s):// besides files")
    with _lock:
        if kind not in _made:
            try:
                _made[kind] = _connect(kind)
            except ImportError as error:
                raise MaxactError(
                    f"{url} cannot be read: {reasons.line(error)}; pip install 'maxact[remote]'"
                ) from None
            except Exception as error:
                raise MaxactError(
                    f"{url} cannot be read: {reasons.line(error)}; {reasons.CREDENTIALS[kind]}"
                ) from error
        return _made[kind], kind


def _connect(kind: str) -> Any:
    # Listings are never kept: images are listed once, and a catalog of millions would stay in memory twice.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    given = fsspec.config.conf.get(kind, {})
    if kind == "s3":
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "max_pool_connections": 2 * AT_ONCE}
        limits |= {"retries": {"total_max_attempts": 1}} | given.get("config_kwargs", {})
        options["config_kwargs"] = limits
    else:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        name = "client_kwargs" if kind == "http" else "session_kwargs"
        options[name] = {"timeout": timeout, "trust_env": True} | given.get(name, {})
        if kind == "gs":
            options["requests_timeout"] = timeout
    fs: Any = fsspec.filesystem(kind, **options)
    fs.retries = 1  # who reads tries again (fetch.py), and who lists, below
    sync(fs.loop, fs.set_session if kind != "gs" else fs._set_session)
    return fs


# What goes wrong


def _asked(ask: Callable[[], A], kind: str, patient: bool) -> A:
    """What a request gives, its errors as OSErrors. A busy server is asked again, after pauses that grow; where
    `patient`, so is one that cannot be reached."""
    for pause in (*PAUSES, None):
        try:
            return ask()
        except MaxactError:
            raise
        except Exception as error:
            reason = reasons.as_oserror(error, kind)
            if pause is None or reason.errno in reasons.LASTING or not (patient or reason.errno == errno.EBUSY):
                raise reason from error
        time.sleep(pause * random.uniform(0.5, 1.0))  # not all threads at once
    raise AssertionError("unreachable")


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
