"""What tests of hostile input share: how many examples they try, damage to files, and what may come of it.

MAXACT_FUZZ=N tries N examples of everything, drawn anew each time (`make fuzz`); without it the suite tries the same
few every time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from maxact.errors import MaxactError

T = TypeVar("T")
_FUZZ = os.environ.get("MAXACT_FUZZ")
EXTREMES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"9" * 12,
)
ODD = (
    *('"quoted"', "it's", "a\nb", "a\r\nb", "\t", "<script>alert(1)</script>", "</script>", "&amp;", "${x}", "`x`"),
    *("\u202egnp.exe", "\u200f\u2066", "\u2028\u2029", "\x1b[31mred", "猫" * 9, "e\u0301", "\U0001f408", "x" * 4000),
    *(
        "../../up",
        "/etc/passwd",
        "C:\\x",
        "nul",
        "-rf",
        "--top",
        "%s%n",
        "{0}",
        "=1+1",
        "'; drop table x",
        "\udcff\udc80",
    ),
)


def fuzz(examples: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """How many examples a property is tried on."""
    skipped = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=int(_FUZZ) if _FUZZ else examples,
        deadline=None,
        derandomize=not _FUZZ,
        database=None,
        suppress_health_check=skipped,
        print_blob=True,
    )


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, head: int = 128) -> bytes:
    """Bytes with some damage: more often than not among the first `head` or the last ones."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, len(data) - 1)
        place = draw(st.integers(0, min(head, last)) | st.integers(max(0, last - head), last) | st.integers(0, last))
        what = draw(st.sampled_from(("set", "extreme", "cut", "insert", "drop", "double")))
        if what == "set":
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif what == "extreme":
            value = draw(st.sampled_from(EXTREMES))
            data[place : place + len(value)] = value
        elif what == "cut":
            del data[place:]
        elif what == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=40))
        elif what == "drop":
            del data[place : place + draw(st.integers(1, 64))]
        else:
            data[place:place] = data[place : place + 64]
    return bytes(data)


# Values as JSON has them, of every kind that a reader does not expect
values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(
        [0, 1, -1, 2, 3, 1 << 31, 1 << 40, 1 << 63, 10**30, -(10**30), 0.5, -1.5, 1e300, float("inf"), float("nan")]
    )
    | st.sampled_from(["", "max", "top", "..", "/", "a/b", "fp32", "9", *ODD[:8]]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "size", "", "0"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def twisted(draw: st.DrawFn, whole: Any) -> Any:
    """A value of JSON in which something, at any depth, is gone, is another value, or is new."""
    if isinstance(whole, dict) and whole and draw(st.integers(0, 7)):
        name = draw(st.sampled_from(sorted(whole)))
        what = draw(st.sampled_from(("inside", "inside", "inside", "gone", "more")))
        if what == "gone":
            return {key: value for key, value in whole.items() if key != name}
        if what == "more":
            return whole | {draw(st.sampled_from(["", "x", "../x", "\n"])): draw(values)}
        return whole | {name: draw(twisted(whole[name]))}
    if isinstance(whole, list) and whole and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(whole) - 1))
        what = draw(st.sampled_from(("inside", "gone", "double")))
        new = {"inside": [draw(twisted(whole[place]))], "gone": [], "double": [whole[place]] * 2}[what]
        return [*whole[:place], *new, *whole[place + 1 :]]
    return draw(values)


def refusal(call: Callable[[], object]) -> str | None:
    """What a call says against it; None where it goes through. Anything but a MaxactError of one line fails."""
    try:
        call()
    except MaxactError as error:
        said = str(error)
        assert said and said.isprintable() and len(said) <= 8000, said
        return said
    return None


@contextmanager
def frugal(megabytes: int = 400) -> Iterator[None]:
    """What happens inside takes no more memory than so much, at any time."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _peak()
    yield
    assert _peak() - before < megabytes, f"{_peak() - before:.0f} MB"


def _peak() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
