"""Bytes to pixels: DALI and torchvision behind one interface.

Sizes and crops are settled in Python by torchvision's rule (Preprocess.placement) from the sizes in the files'
headers, and every decoder is told them: so all place an image alike, and a bomb is refused before it is decoded.
EXIF rotation is never applied. Truncated files and GIF are refused.

decoder.py has the interface, decode_dali.py and decode_torchvision.py the decoders; only the former imports DALI.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from maxact.decode_torchvision import TorchvisionDecoder
from maxact.decoder import Decoded, Decoder, Settings
from maxact.errors import MaxactError, UsageError
from maxact.pictures import line
from maxact.preprocess import Preprocess

__all__ = ["MAX_PIXELS", "NAMES", "Decoded", "Decoder", "choose_decoder", "make_decoder", "native_stderr"]

NAMES = ("auto", "dali", "torchvision")
MAX_PIXELS = 200_000_000


def choose_decoder(name: str, preprocess: Preprocess, pictures: bool = False) -> str:
    """The decoder that `name` means here, dali or torchvision: "auto" is DALI where it is installed and can do it.

    DALI takes neither `pictures` (PIL, arrays, tensors) instead of bytes nor a preprocess function.
    Raises UsageError for what cannot be meant, MaxactError where DALI is wanted and missing.
    """
    if name not in NAMES:
        raise UsageError(f"decoder: expected {', '.join(NAMES)}, got {name!r}")
    python_only = pictures or preprocess.function is not None
    if name == "dali" and python_only:
        what = "a dataset of pictures" if pictures else f"the preprocess function {preprocess.function}"
        raise UsageError(f"decoder: dali cannot take {what}; use auto or torchvision")
    if name == "torchvision" or python_only:
        return "torchvision"
    try:
        importlib.import_module("nvidia.dali")
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        if name == "auto":
            return "torchvision"
        install = "pip install nvidia-dali-cuda130 (Linux only), or use the decoder torchvision"
        raise MaxactError(f"decoder: dali cannot be imported ({line(error)}); {install}") from error
    return "dali"


def make_decoder(
    name: str,
    preprocess: Preprocess,
    *,
    batch: int,
    threads: int,
    device: torch.device | str = "cpu",
    max_pixels: int = MAX_PIXELS,
    pictures: bool = False,
    depth: int = 2,
    hardware_share: float | None = None,
) -> Decoder:
    """The decoder that `name` means (see `choose_decoder`), for batches of at most `batch`.

    `depth` batches may be in flight. `hardware_share` of the JPEGs go to a GPU's decoding hardware, where it has some;
    None is DALI's own choice.
    """
    settings = Settings(preprocess, batch, threads, torch.device(device), max_pixels, depth, hardware_share)
    if choose_decoder(name, preprocess, pictures) == "torchvision":
        return TorchvisionDecoder(settings)
    from maxact.decode_dali import DaliDecoder

    if settings.device.type != "cpu" or sys.platform != "linux":
        return DaliDecoder(settings)
    with ThreadPoolExecutor(1, initializer=_give_way) as thread:
        return thread.submit(DaliDecoder, settings).result()


def _give_way() -> None:
    """Lets this thread, and those that it starts, give way to the others of the process.

    On a CPU the network's threads want every core at once and wait for the slowest; decoding fills what they leave.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)


@contextmanager
def native_stderr(log: int) -> Iterator[None]:
    """Send what C libraries print to standard error to the open descriptor `log`. Python's own still arrives.

    nvImageCodec (inside DALI), libpng and OpenCV print lines of their own about damaged files, and no setting stops
    them (DALI_NVIMGCODEC_LOG_LEVEL ends at errors). This is for the command line, which owns its process; inside,
    whoever writes to standard error has to look sys.stderr up anew. What a library says when it takes the process
    down is in the log; Python's own account of that (faulthandler) still arrives.
    """
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    os.dup2(log, 2)
    sys.stderr = open(os.dup(terminal), "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    watch = not faulthandler.is_enabled()
    if watch:
        faulthandler.enable(sys.stderr)
    try:
        yield
    finally:
        if watch:
            faulthandler.disable()
        sys.stderr.close()
        sys.stderr = before
        os.dup2(terminal, 2)
        os.close(terminal)
