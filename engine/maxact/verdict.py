"""What `maxact bench` has measured, and what follows from it: the limit, the bottleneck, what would help."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maxact.loops import Cost
from maxact.sweep import Point, best, gains, of_one_precision

_NEAR = 0.05  # a network with taps that is slower than without by no more than this is held up by the network
_FULL = 0.8  # share of the cores that a network keeps busy below which there is more to be had
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
    def spread(self) -> tuple[float, float]:
        """Images per second in the slowest and in the fastest of the rounds."""
        walls = [cost.wall for cost in self.costs]
        return 1 / max(walls), 1 / min(walls)

    @property
    def cpu(self) -> float:
        """Seconds of CPU time per image: the median of the rounds."""
        return statistics.median(cost.cpu for cost in self.costs)

    @property
    def busy(self) -> float:
        """CPU cores that it keeps busy: the median of the rounds."""
        return statistics.median(cost.cpu / cost.wall for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        facts = {"name": self.name, "images per second": self.rate, "least and most": list(self.spread)}
        facts |= {"cpu seconds per image": self.cpu, "cores busy": self.busy}
        return facts | {"seconds per image": [asdict(cost) for cost in self.costs], "note": self.note}


@dataclass(frozen=True)
class Rule:
    """What the limit follows from, by names of stages: those that share so many cores, whose CPU times add up, and
    those that go on beside them. A scan is no faster than any of them all is alone, either."""

    shared: tuple[str, ...]
    beside: tuple[str, ...]
    cores: int = 1

    def parts(self, costs: Mapping[str, Cost]) -> dict[str, float]:
        """Seconds per image that make up those of the limit, by stage: each one's part of the work of the cores, or
        where one stage alone takes longer than that, its time on the clock."""
        work = {name: costs[name].cpu / self.cores for name in self.shared}
        slowest = max((*self.shared, *self.beside), key=lambda name: costs[name].wall)
        return work if sum(work.values()) >= costs[slowest].wall else {slowest: costs[slowest].wall}

    def limit(self, costs: Mapping[str, Cost]) -> float:
        """Images per second."""
        return 1 / sum(self.parts(costs).values())

    def __str__(self) -> str:
        if not self.shared:
            return f"the least of {', '.join(self.beside)}: these go on side by side"
        work = f"{self.cores} / ({' + '.join(f'CPU of {name}' for name in self.shared)})"
        alone = ", ".join((*self.shared, *self.beside))
        return f"the least of {work}, {alone}: decoding and the network share the cores, {self.cores} of them"


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
    def parts(self) -> dict[str, float]:
        """What the limit's seconds per image are made of (`Rule.parts`), from the stages' medians."""
        return self.rule.parts({stage.name: Cost(stage.wall, stage.cpu) for stage in self.stages})

    @property
    def limit(self) -> float:
        """What the stages allow, by the rule, from their medians."""
        return 1 / sum(self.parts.values())

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of the limit the scan reached in each round, of the limit that the round's own stages allow."""
        rounds = zip(*(stage.costs for stage in self.stages), strict=True)
        each = [dict(zip((stage.name for stage in self.stages), costs, strict=True)) for costs in rounds]
        return tuple(1 / costs["scan"].wall / self.rule.limit(costs) for costs in each)

    @property
    def share(self) -> float:
        """How much of the limit the scan reaches: the median of the rounds."""
        return statistics.median(self.shares)

    @property
    def network(self) -> str:
        """The stage that is the network alone, as the scan has it."""
        return "compiled forward" if self.settings["compile"] else "forward"

    @property
    def times(self) -> dict[str, float]:
        """Seconds per image of what holds a scan up. On a CPU that is each stage's part of the work of the cores, or
        where it takes longer than that, one stage alone, or the network and what its taps add."""
        network, taps = self[self.network], self["taps"]
        alone = {name: self[name].wall for name in ("read", "decode", "copy", "heaps") if name in self}
        if not self.rule.shared:
            slower = taps.wall >= (1 + _NEAR) * network.wall
            return alone | {network.name: network.wall} | ({"taps": taps.wall} if slower else {})
        chain = {network.name: network.wall, "taps": max(0.0, taps.wall - network.wall)}
        work = {network.name: network.cpu, "taps": max(0.0, taps.cpu - network.cpu)}
        work |= {name: self[name].cpu for name in ("decode", "heaps")}
        work = {name: cpu / self.rule.cores for name, cpu in work.items()}
        each = [work, chain, *({name: wall} for name, wall in alone.items())]
        return max(each, key=lambda times: sum(times.values()))

    @property
    def bottleneck(self) -> str:
        """The name of the stage that takes the most time."""
        times = self.times
        return max(times, key=lambda name: times[name])

    @property
    def advice(self) -> tuple[str, ...]:
        """What would help, most of all first. What was not measured is called a try."""
        return tuple(_advise(self))

    def rows(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """The stages as a table: its columns and its rows."""
        columns = (
            *("stage", "what", "img/s", "least to most", "ms an image", "CPU ms an image", "cores busy"),
            *("of the scan's time", ""),
        )
        whole = self["scan"].wall
        rows: list[tuple[object, ...]] = []
        for stage in self.stages:
            share = "" if stage.name == "store" else f"{stage.wall / whole:.0%}"
            spread = " to ".join(map(_digits, stage.spread)) if len(stage.costs) > 1 else ""
            numbers = (float(f"{number:.3g}") for number in (1000 * stage.wall, 1000 * stage.cpu, stage.busy))
            rate = float(f"{stage.rate:.3g}")
            rows.append((stage.name, _WORDS[stage.name], rate, spread, *numbers, share, stage.note))
        return columns, rows

    def tried(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """The points of a sweep as a table: of a setting what there is on the device, how fast the scan was with it,
        and how fast in the end, beside the first."""
        settings = [vars(point.setting) for point in self.points]
        names = [name for name in (settings or [{}])[0] if any(each[name] is not None for each in settings)]
        columns = (*(name.replace("_", " ") for name in names), "img/s", "again", "")
        again = [statistics.median(point.again) if point.again else None for point in self.points]
        return columns, [
            (*(each[name] for name in names), point.rate, repeated, point.error or "")
            for each, point, repeated in zip(settings, self.points, again, strict=True)
        ]

    def lines(self) -> list[str]:
        """The result in words."""
        lines = [
            f"limit       {_rate(self.limit)}, {self.rule}",
            f"scan        {_rate(self['scan'].rate)}, {self.share:.0%} of the limit{self._rounds()}; it waited for "
            f"images in {self.waiting:.0%} of its time",
            f"bottleneck  {self.bottleneck} ({_WORDS[self.bottleneck]})",
            *(f"            {words}" for words in self.advice),
        ]
        if self.command:
            lines.append(f"best        {self.command}")
        if self.exact:
            lines.append(f"in {self.settings['precision']:8} {self.exact}")
        return lines

    def _rounds(self) -> str:
        shares = self.shares
        return f" ({min(shares):.0%} to {max(shares):.0%} in {len(shares)} rounds)" if len(shares) > 1 else ""

    def to_json(self) -> dict[str, Any]:
        """As plain values, with everything that follows from what was measured."""
        rule = {"shared": [*self.rule.shared], "beside": [*self.rule.beside], "cores": self.rule.cores}
        return {
            **{name: getattr(self, name) for name in ("model", "weights", "images", "taps", "channels")},
            "settings": self.settings,
            "machine": self.machine,
            "stages": [stage.to_json() for stage in self.stages],
            "rule": rule | {"words": str(self.rule)},
            "limit": self.limit,
            "share": self.share,
            "shares": list(self.shares),
            "waiting": self.waiting,
            "bottleneck": self.bottleneck,
            "advice": list(self.advice),
            "sweep": [point.to_json() for point in self.points],
            "command": self.command,
            "exact": self.exact,
        }


def _rate(rate: float) -> str:
    return f"{rate:,.0f} img/s" if rate >= 10 else f"{rate:.2g} img/s"


def _digits(rate: float) -> str:
    return f"{float(f'{rate:.3g}'):,g}"


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
            if settings["hardware_share"] is not None:
                yield f"try another --hardware-share than {settings['hardware_share']}{swept}"
            yield f"try more --decode-threads than {settings['decode_threads']}, or a larger --batch{swept}"
    elif slowest == "copy":
        yield f"the copy to the device takes {share}: the decoder dali makes its pixels there"
    elif slowest == result.network:
        half = "fp16" if not on_cpu else "bf16" if result.machine["bf16"] == "yes" else ""
        tries = [f"--precision {half}"] if half and settings["precision"] == "fp32" else []
        tries += [] if settings["compile"] else ["--compile"]
        tries.append(f"{'or ' if tries else ''}another --batch than {settings['batch']}")
        yield f"the network itself takes {share}: try {', '.join(tries)}{swept}"
    elif slowest == "taps":
        yield f"the taps take {share}: try fewer --layers" + ("" if settings["compile"] else ", or --compile")
    else:
        yield f"counting peaks takes {share}: try fewer --layers, or a smaller --top"
    yield from _fill(result)
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
    if result.points:
        yield _gained("the best setting that was tried", result.points)
        exact = of_one_precision(result.points)
        if best(exact) != best(result.points):
            yield _gained(f"the best in {settings['precision']}", exact)


def _fill(result: Bench) -> Iterator[str]:
    """What helps a network that leaves cores of a CPU idle."""
    cores, settings, busy = result.rule.cores, result.settings, result[result.network].busy
    if result.rule.shared and cores > 1 and busy < _FULL * cores:
        workers = min(cores, max(2, math.ceil(cores / busy))) if busy else cores
        yield (
            f"the network alone keeps {busy:.1f} of {cores} cores busy: unless something else runs here, try a larger "
            f"--batch than {settings['batch']}, `--devices cpu:{workers}` with --threads {cores // workers} for each, "
            f"or other --threads than {settings['threads']}"
        )


def _gained(what: str, points: Sequence[Point]) -> str:
    """How much faster than the first point the best is, or the best of the others where it is not; measured again."""
    first, *others = points
    found = best(points)
    tried = [gains(first, point) for point in (others if found == first else [found]) if point.again]
    ratios = max(filter(None, tried), key=statistics.median, default=[])
    if not ratios:
        return f"{what} is this one" if found == first else f"{what} runs where this one failed"
    rounds = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds, in turn"
    ratio = f"{statistics.median(ratios):.2f} times as fast as this one ({rounds})"
    return f"{what} is this one; tried again, another was {ratio}" if found == first else f"{what} is {ratio}"
