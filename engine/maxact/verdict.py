"""What `maxact bench` has measured, and what follows from it: the limit, the bottleneck, what would help."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from maxact.loops import Cost
from maxact.sweep import Point

_NEAR = 0.05  # a network with taps that is slower than without by no more than this is held up by the network
_WAITS = 0.1  # share of its time that a scan may wait for images before that is worth a word
_WORDS = {
    "read": "files into memory",
    "decode": "files in memory to pixels",
    "copy": "pixels to the device",
    "forward": "the network alone",
    "compiled forward": "the network alone, compiled",
    "taps": "the network with its taps",
    "heaps": "counting peaks",
    "store": "writing the result",
    "scan": "all together",
}


@dataclass(frozen=True)
class Stage:
    """A stage by its name, what an image cost in each round, and what else there is to say."""

    name: str
    costs: tuple[Cost, ...]
    note: str = ""

    @property
    def wall(self) -> float:
        """Seconds per image: the median of the rounds."""
        return statistics.median(cost.wall for cost in self.costs)

    @property
    def rate(self) -> float:
        """Images per second."""
        return 1 / self.wall

    @property
    def cpu(self) -> float:
        """Seconds of CPU time per image: the median of the rounds."""
        return statistics.median(cost.cpu for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        facts = {"name": self.name, "images per second": self.rate, "cpu seconds per image": self.cpu}
        return facts | {"seconds per image": [asdict(cost) for cost in self.costs], "note": self.note}


@dataclass(frozen=True)
class Rule:
    """What the limit follows from, by names of stages: those that share the cores, whose times add up, and those that
    go on beside them, the slowest of which counts."""

    shared: tuple[str, ...]
    beside: tuple[str, ...]

    def limit(self, rates: Mapping[str, float]) -> float:
        """Images per second."""
        together = [1 / sum(1 / rates[name] for name in self.shared)] if self.shared else []
        return min([*together, *(rates[name] for name in self.beside)])

    def __str__(self) -> str:
        together = [f"1 / ({' + '.join(f'1 / {name}' for name in self.shared)})"] if self.shared else []
        parts = ", ".join([*together, *self.beside])
        why = "decoding and the network share the cores" if self.shared else "these go on side by side"
        return f"the least of {parts}: {why}"


@dataclass(frozen=True)
class Bench:
    """What was measured. Rates are images per second; of a stage the median of the rounds."""

    model: str
    weights: str
    images: int
    taps: int
    channels: int
    settings: dict[str, Any]
    machine: dict[str, str]
    stages: tuple[Stage, ...]
    rule: Rule
    waiting: float  # share of the scan's time in which the network waited for images
    points: tuple[Point, ...] = ()  # of a sweep; the first is the setting that the stages were measured with
    command: str = ""  # the command line of a sweep's best
    exact: str = ""  # and of the best of those with the precision that was measured, where that is another

    def __getitem__(self, name: str) -> Stage:
        """A stage. Raises KeyError."""
        return {stage.name: stage for stage in self.stages}[name]

    def __contains__(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)

    @property
    def limit(self) -> float:
        """What the stages allow, by the rule."""
        return self.rule.limit({stage.name: stage.rate for stage in self.stages})

    @property
    def share(self) -> float:
        """How much of the limit the scan reaches."""
        return self["scan"].rate / self.limit

    @property
    def network(self) -> str:
        """The stage that is the network alone, as the scan has it."""
        return "compiled forward" if self.settings["compile"] else "forward"

    @property
    def times(self) -> dict[str, float]:
        """Seconds per image of what holds a scan up: for taps and heaps on a CPU only what they add."""
        times = {name: self[name].wall for name in ("read", "decode", "copy") if name in self}
        times |= {self.network: self[self.network].wall, "taps": self["taps"].wall, "heaps": self["heaps"].wall}
        if self.rule.shared:
            times["taps"] = max(0.0, times["taps"] - times[self.network])
        elif times["taps"] < (1 + _NEAR) * times[self.network]:
            del times["taps"]
        return times

    @property
    def bottleneck(self) -> str:
        """The name of the stage that takes the most time."""
        times = self.times
        if self.rule.shared:  # reading goes on beside all the others, so it counts only where it is slower than all
            others = {name: time for name, time in times.items() if name != "read"}
            if times["read"] < sum(others.values()):
                times = others
        return max(times, key=lambda name: times[name])

    @property
    def advice(self) -> tuple[str, ...]:
        """What would help, most of all first. What was not measured is called a try."""
        return tuple(_advise(self))

    def rows(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """The stages as a table: its columns and its rows."""
        columns = ("stage", "what", "img/s", "ms an image", "CPU ms an image", "of the scan's time", "")
        whole = self["scan"].wall
        rows: list[tuple[object, ...]] = []
        for stage in self.stages:
            share = "" if stage.name == "store" else f"{stage.wall / whole:.0%}"
            numbers = (float(f"{number:.3g}") for number in (stage.rate, 1000 * stage.wall, 1000 * stage.cpu))
            rows.append((stage.name, _WORDS[stage.name], *numbers, share, stage.note))
        return columns, rows

    def tried(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """The points of a sweep as a table."""
        names = tuple(vars(self.points[0].setting)) if self.points else ()
        columns = (*(name.replace("_", " ") for name in names), "img/s", "")
        return columns, [(*vars(point.setting).values(), point.rate, point.error or "") for point in self.points]

    def lines(self) -> list[str]:
        """The result in words."""
        lines = [
            f"limit       {_rate(self.limit)}, {self.rule}",
            f"scan        {_rate(self['scan'].rate)}, {self.share:.0%} of the limit; it waited for images in "
            f"{self.waiting:.0%} of its time",
            f"bottleneck  {self.bottleneck} ({_WORDS[self.bottleneck]})",
            *(f"            {words}" for words in self.advice),
        ]
        if self.command:
            lines.append(f"best        {self.command}")
        if self.exact:
            lines.append(f"in {self.settings['precision']:8} {self.exact}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As plain values, with everything that follows from what was measured."""
        return {
            **{name: getattr(self, name) for name in ("model", "weights", "images", "taps", "channels")},
            "settings": self.settings,
            "machine": self.machine,
            "stages": [stage.to_json() for stage in self.stages],
            "rule": {"shared": [*self.rule.shared], "beside": [*self.rule.beside], "words": str(self.rule)},
            "limit": self.limit,
            "share": self.share,
            "waiting": self.waiting,
            "bottleneck": self.bottleneck,
            "advice": list(self.advice),
            "sweep": [point.to_json() for point in self.points],
            "command": self.command,
            "exact": self.exact,
        }


def _rate(rate: float) -> str:
    return f"{rate:,.0f} img/s" if rate >= 10 else f"{rate:.2g} img/s"


def _advise(result: Bench) -> Iterator[str]:
    settings, slowest, times = result.settings, result.bottleneck, result.times
    share = f"{min(1.0, times[slowest] / result['scan'].wall):.0%} of the scan's time"
    swept = "" if result.points else "; --sweep tries these"
    on_cpu = bool(result.rule.shared)
    if slowest == "read":
        yield (
            f"reading takes longer than all else: try more --readers than {settings['readers']}, a disk that is "
            "nearer, or `maxact pack`, once, for smaller files"
        )
    elif slowest == "decode":
        yield f"decoding takes {share}: `maxact pack`, once, makes images that are decoded faster"
        if not on_cpu:
            yield f"try another --hardware-share than {settings['hardware_share']}{swept}"
            yield f"try more --decode-threads than {settings['decode_threads']}, or a larger --batch{swept}"
    elif slowest == "copy":
        yield f"the copy to the device takes {share}: the decoder dali makes its pixels there"
    elif slowest == result.network:
        half = "bf16" if on_cpu else "fp16"
        tries = [f"--precision {half}"] if settings["precision"] == "fp32" else []
        tries += [] if settings["compile"] else ["--compile"]
        tries.append(f"or another --batch than {settings['batch']}")
        yield f"the network itself takes {share}: try {', '.join(tries)}{swept}"
    elif slowest == "taps":
        yield f"the taps take {share}: try fewer --layers" + ("" if settings["compile"] else ", or --compile")
    else:
        yield f"counting peaks takes {share}: try fewer --layers, or a smaller --top"
    if result.network != "forward":
        gain = result["forward"].wall / result[result.network].wall
        yield f"compiled, the network runs {gain:.2f} times as fast as it does otherwise"
    if result.waiting > _WAITS and slowest not in ("read", "decode"):
        reading = result["read"].wall > result["decode"].wall
        option = (
            f"--readers than {settings['readers']}"
            if reading
            else f"--decode-threads than {settings['decode_threads']}"
        )
        yield f"the network waits for images in {result.waiting:.0%} of the time: try more {option}"
    rates = [point.rate for point in result.points if point.rate]
    if rates and result.points[0].rate:
        yield f"the best setting that was tried is {max(rates) / result.points[0].rate:.2f} times as fast as this one"
