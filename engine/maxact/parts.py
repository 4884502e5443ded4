"""Parts of large files at URLs, as the members of an archive are, read ahead where they are read in a row."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from maxact import remote
from maxact.remote import Got

BLOCK = 4 << 20  # bytes of a request; also how far from the last part the next one may be to count as being in a row
AHEAD = 8  # blocks that are fetched while the ones before them are used: one connection alone is slow
KEPT = 32  # blocks in memory
RUN = 4  # parts near each other that make a row: two alone may be chance


class Parts:
    """Reads parts of files. For many threads at once, which may be some parts ahead of each other.

    A part is one request for itself, until some in a row were each near the last one. Then it is cut out of blocks, and
    those that follow are on their way already: so what is read in a row costs few requests, and what is picked out
    here and there few bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[bytes, tuple[int, int]] = {}  # where each file's last part ended, and how many were in a row
        self._blocks: OrderedDict[tuple[bytes, int], Future[Got]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def read(self, path: bytes, start: int, length: int) -> Got:
        """As `remote.read` gives it; the status may be some parts old. OSError."""
        indices = range(start // BLOCK, (start + max(length, 1) - 1) // BLOCK + 1)
        with self._lock:
            end, row = self._rows.get(path, (0, 0))
            row = row + 1 if length <= BLOCK and abs(start - end) <= BLOCK else 0
            self._rows[path] = start + length, row
            blocks = [self._block(path, index) for index in indices] if row >= RUN else []
        if not blocks:
            return remote.read(path, start, length)
        try:
            got = [block.result() for block in blocks]
        except BaseException:
            with self._lock:  # so that a retry asks again
                for index in indices:
                    self._blocks.pop((path, index), None)
            raise
        self._fetch(path, range(indices.stop, indices.stop + min(AHEAD, row // RUN)), got[-1].size or 0)
        data, skip = b"".join(part.data for part in got), start - indices.start * BLOCK
        if any(part.modified != got[0].modified for part in got):  # replaced between two blocks
            return remote.read(path, start, length)
        return got[0]._replace(data=data[skip : skip + length])

    def _block(self, path: bytes, index: int) -> Future[Got]:
        """A block that is there or on its way. Under the lock."""
        block = self._blocks.get((path, index))
        if block is None:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(AHEAD, "maxact-ahead")
            block = self._pool.submit(remote.read, path, index * BLOCK, BLOCK)
            self._blocks[path, index] = block
            if len(self._blocks) > KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end((path, index))
        return block

    def _fetch(self, path: bytes, indices: range, size: int) -> None:
        """Sends for some blocks of a file of `size` bytes."""
        with self._lock:
            for index in indices:
                if index * BLOCK < size:
                    self._block(path, index)

    def close(self) -> None:
        """Forgets all blocks; a later `read` fetches them again."""
        with self._lock:
            self._blocks.clear()
            self._rows.clear()
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None
