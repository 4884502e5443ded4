"""The errors that a user can mend: each is one line that says what is wrong, where, and what to do."""

import re

# how libraries say it that have no class for it: CUDA, cuBLAS and cuDNN, Triton, torch's allocator on a CPU
_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|DefaultCPUAllocator|bad_alloc|failed to allocate", re.IGNORECASE)

_LONGEST = 8000  # characters of a message: names may come from anywhere


class MaxactError(Exception):
    """A run that cannot go on. The command line prints the message alone and exits with `exit_code`.

    What does not print in a message, a line's end in a name for one, is escaped.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class UsageError(MaxactError):
    """A setting or an argument that cannot be meant as it stands."""

    exit_code = 2


class OutOfMemory(MaxactError):
    """A batch did not fit into the memory of the device."""


def is_memory(error: BaseException | str) -> bool:
    """Whether an error, or its message, says that the memory does not suffice."""
    if isinstance(error, MaxactError):
        return isinstance(error, OutOfMemory)
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return known or bool(_MEMORY.search(str(error)))


def one_line(text: str) -> str:
    """The text with all that does not print escaped, and no longer than can be looked at."""
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
