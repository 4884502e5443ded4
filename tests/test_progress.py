"""What a person sees of a run."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from maxact import progress
from maxact.process import Progress
from maxact.progress import display, print_table
from stores import ARGUMENTS, command

log = logging.getLogger("maxact")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = log.level, list(log.handlers)
    yield
    assert (log.level, log.handlers) == before


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with display() as report:
        log.info("a message")
        report(Progress(100, 20, done=5))  # too soon for a line
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        report(Progress(100, 20, done=30, bad=2, grey=1, waited=0.0))
        report(Progress(100, 20, done=80))
        log.warning("a warning")
        log.debug("not this")
    log.info("nor this")
    out, err = capsys.readouterr()
    assert out == ""
    first, half, end, last = err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d a message", first)
    assert re.search(r" 50 of 100 images, [\d,.]+ img/s, \d+ s left, 0% waiting for images, 2 bad, 1 grey$", half)
    assert re.search(r" 100 of 100 images, [\d,.]+ img/s, \d+ s, 0% waiting for images$", end)
    assert last.endswith(" a warning")


def test_a_whole_that_is_not_known_yet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with display() as report:
        report(Progress(0, 0, done=2048, seconds=2.0, stage="listing"))
    assert re.search(r" listing 2048 images, 1,024 img/s, 2 s$", capsys.readouterr().err.strip())


def test_the_last_line_always_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with display() as report:
        report(Progress(10, 0, done=5))
        report(Progress(10, 0, done=10, waited=1e9))
    assert "10 of 10 images" in capsys.readouterr().err


def test_quiet_is_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    keep = Keep()
    log.addHandler(keep)
    try:
        with display(quiet=True) as report:
            log.info("a message")
            report(Progress(10, 0, done=10))
            log.warning("a warning")
    finally:
        log.removeHandler(keep)
    assert capsys.readouterr().err.splitlines()[0].endswith(" a warning")
    assert len(records) == 3 and records[0] == "a message"  # the log of the run has all of it


def test_messages_follow_standard_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A run may put another one there, so as to send elsewhere what C libraries print."""
    before = sys.stderr
    with display(), open(tmp_path / "other", "w") as other:
        sys.stderr = other
        try:
            log.warning("over there")
        finally:
            sys.stderr = before
    assert capsys.readouterr().err == ""
    assert (tmp_path / "other").read_text().endswith("over there\n")


def test_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), display():
        raise ZeroDivisionError


@contextmanager
def terminal() -> Iterator[tuple[Path, list[bytes]]]:
    """A terminal by its path, and what has come to it."""
    mine, its = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                shown.append(os.read(mine, 65536))
            except OSError:  # nobody has it open any more
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield Path(os.ttyname(its)), shown
    finally:
        os.close(its)
        reader.join()
        os.close(mine)


def test_a_terminal_shows_a_live_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as (path, shown):
        child = command("scan", "tiny:network", photos, tmp_path / "x", *ARGUMENTS, terminal=path)
        assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert "21/21" in text and "img/s" in text and "waiting for images" in text and "━" in text
    assert "tiny:network (weights as tiny:network returns them)" in " ".join(text.split())
    assert "21 of 21 images," not in text  # no plain lines
    assert child.out.startswith(f"{tmp_path}/x: 21 of 21 images; 3 taps")


def test_a_quiet_terminal(photos: Path, tmp_path: Path) -> None:
    with terminal() as (path, shown):
        child = command("scan", "tiny:network", photos, tmp_path / "x", *ARGUMENTS, "--quiet", terminal=path)
        assert child.wait() == 0
    assert (b"".join(shown), child.out) == (b"", "")


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("layer1.0.bn1", 64, 0.12345678, True, None), ("fc[bold]", 1000, 12345.678, False, "x" * 300)]
    print_table(("tap", "channels", "mean", "alive", "more"), rows, "a title")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].strip() == "a title"
    assert "fc[bold]" in out and "x" * 300 in out  # no markup, and nothing is cut off
    assert "1,000" in out and "0.1235" in out and "12,346" in out and "yes" in out and "no" in out
    (first,) = (line for line in lines if "layer1.0.bn1" in line)
    (second,) = (line for line in lines if "fc[bold]" in line)
    assert first.index("64") + 2 == second.index("1,000") + 5  # numbers stand on the right


def test_an_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("tap", "channels"), [])
    assert "channels" in capsys.readouterr().out
