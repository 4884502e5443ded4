"""Messages between two processes of one machine, over a socket: arrays are not copied into pickles."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_HEAD = struct.Struct("!QI")  # bytes of the pickle, number of buffers beside it
_SIZE = struct.Struct("!Q")  # bytes of a buffer


class Wire:
    """One end of a socket. One thread at a time may send, and one receive."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: object) -> None:
        """Sends anything that can be pickled. Raises OSError where the other end has gone."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        sizes = b"".join(_SIZE.pack(each.nbytes) for each in raw)
        self._end.sendall(_HEAD.pack(len(pickled), len(raw)) + sizes + pickled)
        for each in raw:
            self._end.sendall(each)

    def receive(self) -> Any:
        """The next message, its arrays writable. Raises EOFError, or OSError, where the other end has gone."""
        length, count = _HEAD.unpack(self._read(_HEAD.size))
        sizes = [_SIZE.unpack(self._read(_SIZE.size))[0] for _ in range(count)]
        pickled = self._read(length)
        return pickle.loads(pickled, buffers=[self._read(size) for size in sizes])

    def hang_up(self) -> None:
        """Ends it for both, whoever waits for what."""
        self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back."""
        self._end.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            got = self._end.recv_into(view[done:])
            if not got:
                raise EOFError
            done += got
        return data
