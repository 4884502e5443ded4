"""What a person sees of a run: a live display on a terminal, plain lines elsewhere, and tables. Only here is rich."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from maxact.process import Hand, Progress

LINE_SECONDS = 30.0  # between two lines where there is no terminal


@contextmanager
def display(quiet: bool = False) -> Iterator[Callable[[Progress], None]]:
    """Shows the run inside the block: messages always, and how far it is by calling what this gives.

    On a terminal that is one live line, elsewhere a plain line every 30 s; `quiet` shows warnings only.
    """
    logger = logging.getLogger("maxact")
    console = Console(stderr=True)
    live = console.is_terminal and not quiet
    handler: logging.Handler
    if live:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False, markup=False)
    else:
        handler = _Plain()
    handler.setFormatter(logging.Formatter("%(message)s" if live else "%(asctime)s %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if live:
            with _live(console) as report:
                yield report
        else:
            yield _Lines(logger)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def counting(report: Callable[[Progress], None], stage: str, unit: str) -> Callable[[int, int], None]:
    """A report of done and total, for work that knows no more of itself."""
    begun = time.monotonic()

    def tell(done: int, total: int) -> None:
        report(Progress(total, 0, done, seconds=time.monotonic() - begun, stage=stage, unit=unit))

    return tell


class _Plain(logging.Handler):
    """Prints messages to what is standard error at the time: a run may put another one there."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _Display(Bar):
    """The line of a run, and under it one for each of its workers."""

    hands: tuple[Hand, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is shown."""
        yield from super().get_renderables()
        if self.hands:
            table = Table.grid(padding=(0, 2))
            table.add_column()
            table.add_column(justify="right")
            for hand in self.hands:
                table.add_row(f"  {hand.name}", _hand_rate(hand), Text(hand.state, no_wrap=True, overflow="ellipsis"))
            yield table


@contextmanager
def _live(console: Console) -> Iterator[Callable[[Progress], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[rest]}"),
    )
    with _Display(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None, rate="", rest="", start=True)
        stage = None

        def report(progress: Progress) -> None:
            nonlocal stage
            bar.hands = progress.hands
            if progress.stage != stage:
                stage = progress.stage
                bar.reset(task, description=stage)
            bar.update(
                task,
                total=progress.total or None,  # None leaves it as it is, unknown at first
                completed=progress.before + progress.done,
                rate=_rate(progress),
                rest=_rest(progress),
            )

        yield report


class _Lines:
    """A plain line now and then, and one at the end."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        at = progress.before + progress.done
        known = progress.total > 0
        if now - self._said < LINE_SECONDS and not (known and at >= progress.total):
            return
        self._said = now
        seconds = max(progress.seconds, 1e-9)
        rate = progress.done / seconds
        left = f"{(progress.total - at) / rate:,.0f} s left" if at < progress.total and rate else f"{seconds:,.0f} s"
        of = f" of {progress.total}" if known else ""
        words = [f"{progress.stage} {at}{of} {progress.unit}", _rate(progress), left, _rest(progress)]
        words += [f"{hand.name} {_hand_rate(hand) or hand.state}" for hand in progress.hands]
        self._logger.info("%s", ", ".join(filter(None, words)))


def _rate(progress: Progress) -> str:
    unit = {"images": "img"}.get(progress.unit, progress.unit)
    return f"{_digits(progress.done / max(progress.seconds, 1e-9))} {unit}/s"


def _hand_rate(hand: Hand) -> str:
    return f"{_digits(hand.rate)}/s" if hand.images else ""


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _rest(progress: Progress) -> str:
    """The share of time spent waiting for images, and the images left out, where there are any."""
    parts = []
    if progress.stage == "scanning":
        parts.append(f"{progress.waited / max(progress.seconds, 1e-9):.0%} waiting for images")
    if progress.bad:
        parts.append(f"{progress.bad} bad")
    if progress.grey:
        parts.append(f"{progress.grey} grey")
    return ", ".join(parts)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table on standard output. Numbers stand on the right; nothing is cut off where there is no terminal."""
    shown = [[_cell(value) for value in row] for row in rows]
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        numeric = all(cell[1] for row in shown if (cell := row[index])[0])
        table.add_column(name, justify="right" if numeric and shown else "left", overflow="fold")
    for row in shown:
        table.add_row(*(Text(cell[0]) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    console.print(table)


def _cell(value: object) -> tuple[str, bool]:
    """The text of a cell, and whether it is a number."""
    if isinstance(value, bool) or value is None:
        return ("" if value is None else "yes" if value else "no"), False
    if isinstance(value, int):
        return f"{value:,}", True
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}", True
    return str(value), False
