"""Servers for tests: an object store (moto), and web servers with and without parts of files and lists of folders.

Each listens at a port of its own on this machine, can be stopped and comes back at the same port.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import boto3
from moto.server import ThreadedMotoServer

from maxact import remote


class _Listening(ThreadingHTTPServer):
    request_queue_size = 128  # or many at once wait for a second each


class Server:
    """An HTTP server that can be stopped and started again."""

    def __init__(self, handler: Any) -> None:
        self._handler, self.port = handler, 0
        self.start()

    def start(self) -> None:
        self._server = _Listening(("127.0.0.1", self.port), self._handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Web(SimpleHTTPRequestHandler):
    """Files of a folder. `said` counts the requests; what is set on the class says how the server behaves."""

    parts = True  # of files, by Range
    lists = True  # folders
    heads = True  # answers HEAD
    fails: ClassVar[dict[str, int]] = {}  # paths that end so, to the status of the answer
    said: ClassVar[Counter[str]] = Counter()

    def log_message(self, *words: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self.heads:
            return self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
        self._answer(super().do_HEAD)

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def _answer(self, whole: Any) -> None:
        self.said[self.command] += 1
        for end, status in self.fails.items():
            if self.path.endswith(end):
                return self.send_error(status)
        path, asked = self.translate_path(self.path), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if os.path.isdir(path) and not self.lists:
            return self.send_error(HTTPStatus.FORBIDDEN)
        if not (self.parts and asked and os.path.isfile(path)):
            return whole()  # type: ignore[no-any-return]
        data, start = Path(path).read_bytes(), int(asked[1])
        part = data[start : int(asked[2]) + 1]
        if not part:
            return self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Last-Modified", self.date_time_string(int(os.stat(path).st_mtime)))
        self.end_headers()
        self.wfile.write(part)


@contextmanager
def web(folder: Path, **behaviour: Any) -> Iterator[Server]:
    """A web server of a folder."""
    handler = type("Handler", (Web,), {"said": Counter(), "fails": {}} | behaviour)
    server = Server(functools.partial(handler, directory=str(folder)))
    server.said, server.fails = handler.said, handler.fails  # type: ignore[attr-defined]
    try:
        yield server
    finally:
        server.stop()


class Store:
    """An object store, and a bucket in it."""

    bucket = "images"

    def __init__(self) -> None:
        self.start(0)
        self.client = boto3.client("s3", endpoint_url=self.endpoint)
        self.client.create_bucket(Bucket=self.bucket)

    def start(self, port: int | None = None) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port if port is None else port, verbose=False)
        self._server.start()
        self.host, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        self._server.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, key: str, data: bytes) -> str:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)
        return f"s3://{self.bucket}/{key}"

    def copy(self, folder: Path, prefix: str) -> str:
        """Every file of a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{self.bucket}/{prefix}"

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)


@contextmanager
def store() -> Iterator[Store]:
    """An object store, and an environment in which it is found."""
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    with patch.dict(os.environ, keys):
        server = Store()
        with patch.dict(os.environ, {"AWS_ENDPOINT_URL": server.endpoint}):
            remote.forget()
            try:
                yield server
            finally:
                remote.forget()
                server.stop()
