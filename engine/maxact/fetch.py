"""Reading one image of a catalog, with patience, and what is said of one that cannot be read."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import tenacity

from maxact.archives import show
from maxact.catalog import Catalog, Entry
from maxact.errors import MaxactError
from maxact.partial import BadImage

FEW = 2  # so many that cannot be read are bad files, however few there are in all
_failed = [0]  # reads that were tried again, of this process


def _count(state: tenacity.RetryCallState) -> None:
    _failed[0] += 1


# A read that fails is tried again after these pauses, about 3 s in all: long enough for a server to come back to a
# mount, short enough for the few files that are really gone.
_again = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(OSError),
    wait=tenacity.wait_exponential(multiplier=0.2),
    stop=tenacity.stop_after_attempt(5),
    before_sleep=_count,
    reraise=True,
)


class Unreadable(MaxactError):
    """Too many images cannot be read: the storage is gone, not some files."""


def fetch(catalog: Catalog, entry: Entry) -> object:
    """What `catalog.read` gives, tried again where that may help. Raises as it does."""
    try:
        return catalog.read(entry)
    except OSError as error:
        if was_missing(entry) or _is_damage(error):
            raise
        return _again(catalog.read, entry)


def asked_again() -> int:
    """How many reads of this process have failed and were tried again: it grows while storage is gone."""
    return _failed[0]


def look(catalog: Catalog) -> None:
    """Raises MaxactError where not one of a few images can be read from this machine."""
    last = len(catalog) - 1
    unread = []
    for number in sorted({0, last // 2, last}) if last >= 0 else ():
        (entry,) = catalog.entries(number, number + 1)
        try:
            fetch(catalog, entry)
            return
        except MaxactError:
            raise
        except Exception as error:
            if was_missing(entry) or not is_unread(failure(entry, error)):
                return
            unread.append(f"{show(entry.source) or entry.key}: {_reason(error)}")
    if unread:
        raise MaxactError(f"the images cannot be read there ({'; '.join(unread)})")


def failure(entry: Entry, error: Exception) -> BadImage:
    """An image that could not be read, for the record."""
    return BadImage(entry.number, entry.key, "decode" if _is_damage(error) else "read", _reason(error))


def check_readable(what: str, images: int, bad: Sequence[BadImage]) -> None:
    """Raises Unreadable where more than a tenth, and more than a few, of some images cannot be read."""
    unread = [image for image in bad if is_unread(image)]
    if len(unread) > max(FEW, images // 10):
        raise Unreadable(
            f"{what}: {len(unread)} of {images} images cannot be read, the last of them {unread[-1].key}: "
            f"{unread[-1].error}; see that the disk is there, then run the same again"
        )


def is_unread(image: BadImage) -> bool:
    """Whether an image could not be read, now; one that has changed, or that is damaged, never can be."""
    return image.stage == "read" and not image.error.startswith("changed")


def was_missing(entry: Entry) -> bool:
    """Whether the file was already missing when the catalog was made."""
    return entry.length == 0 and entry.modified == 0


def _is_damage(error: Exception) -> bool:
    """Whether a Dataset's picture is damaged: PIL says so in an OSError that has no number."""
    return isinstance(error, OSError) and error.errno is None and not isinstance(error, ConnectionError | TimeoutError)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"
    return " ".join(str(error).split()) or type(error).__name__
