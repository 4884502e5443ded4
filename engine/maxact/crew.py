"""Many workers at one pass: who gets which item, and what happens when one of them dies.

The rest of a run does not know of it: `Crew.run` takes items and gives what they gave, as the loop of one process does.
Workers are processes of this machine (`local.py`) or actors of a cluster (`run_ray.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol

from maxact.errors import MaxactError, OutOfMemory
from maxact.process import Hand, Tick
from maxact.worker import Begin, Done, Give, Given, Gone, I, Message, Order, P, Said, Stop, Want

DEATHS = 3  # of workers at one item, after which it is left aside
GRACE = 60.0  # seconds in which a worker ends after it was told to
STARTING = 3  # times as long a worker may be silent before its first batch
_LOOK = 0.5  # seconds from one look at the clock, and at `stop`, to the next

log = logging.getLogger("maxact")


class Contact(Protocol):
    """A worker, as its driver reaches it."""

    @property
    def name(self) -> str:
        """Where it runs, for people."""

    @property
    def ready(self) -> bool:
        """Whether it has begun to exist. One that waits for its turn in a cluster is not counted on."""

    def tell(self, order: Order, /) -> None:
        """Sends an order; what happens to a worker that is gone is said by `wait`."""

    def kill(self) -> None:
        """Ends it at once. Nothing more is heard of it."""


class Hirer(Protocol):
    """Starts workers of some kind, and hears them."""

    @property
    def places(self) -> Sequence[str]:
        """The names of the places where one worker each can run. There may be more of them later."""

    def hire(self, place: int) -> Contact:
        """Starts one. Returns at once."""

    def wait(self, seconds: float) -> Sequence[tuple[Contact, Message]]:
        """What workers have said, each in order; waits for it for that long."""


@dataclass(eq=False)
class _Member(Generic[I]):
    """A worker, and what is known of it."""

    place: int
    contact: Contact
    silent: float = 0.0  # seconds in which the driver has listened and it has said nothing
    items: dict[int, I] = field(default_factory=dict)  # that it has, by their numbers
    busy: bool = False
    known: bool = False  # a batch of it is through: until then it starts, and may compile, which takes longer
    deaths: int = 0  # of workers at its place, since something came from there
    retired: bool = False


class Crew(Generic[I, P]):
    """Some workers, replaced as they die.

    A worker that dies, or is silent for `stall` seconds, is replaced, and its items go to others. Which of several was
    its death is not known: from then on each of them is given to a worker that has nothing else, at another place if
    there is one. After three deaths an item is left aside, the others are finished, and then the run ends. A place
    where three workers die one after the other is given up while there are others.
    """

    def __init__(
        self,
        hirer: Hirer,
        *,
        stop: threading.Event,
        report: Callable[[Tick], None],
        stall: float,
    ) -> None:
        self._hirer, self._stop, self._report, self._stall = hirer, stop, report, stall
        self._members = [self._hire(place) for place in range(len(hirer.places))]
        self._deaths: dict[int, list[int]] = {}  # of each item, the places
        self._in_a_row = 0  # deaths since something was handed over
        self._hands = [Hand(name) for name in hirer.places]
        self._left: deque[I] = deque()
        self._aside: dict[int, str] = {}
        self._failure: MaxactError | None = None
        self._told: float | None = None  # seconds of listening since the workers were told to stop
        self._looked = time.monotonic()

    @property
    def hands(self) -> tuple[Hand, ...]:
        """What each worker has done, for people."""
        return tuple(self._hands)

    def run(self, items: Iterator[I]) -> Iterator[P]:
        """What some items gave, as it comes.

        `stop` ends it: finished items are still given, those in hand are dropped. Raises what a worker's loop raises
        (see `scan.scan`) after all that was finished; MaxactError for items that workers die of.
        """
        self._left = deque(items)
        self._failure, self._told, self._looked = None, None, time.monotonic()
        self._aside.clear()
        while True:
            self._begin()
            if not any(member.busy for member in self._members) and (self._is_ending() or not self._left):
                break
            for contact, message in self._hirer.wait(_LOOK):
                member = next((member for member in self._members if member.contact is contact), None)
                if member is not None:  # not of one that was replaced
                    yield from self._hear(member, message)
            self._look()
        if self._failure:
            raise self._failure
        if self._aside and not self._stop.is_set():
            words = "; ".join(self._aside.values())
            raise MaxactError(f"{words}; everything else is committed: run the same again to try once more")

    def _hire(self, place: int) -> _Member[I]:
        return _Member(place, self._hirer.hire(place))

    def _begin(self) -> None:
        """Wakes those that have nothing to do, as far as there is something."""
        if self._is_ending():
            return
        idle = [member for member in self._members if not member.busy and self._is_at_work(member)]
        able = [member for member in idle if self._candidate(member) is not None]
        for member in able[: len(self._left)]:
            member.busy, member.silent = True, 0.0
            member.contact.tell(Begin())

    def _is_ending(self) -> bool:
        return self._stop.is_set() or self._failure is not None

    def _hear(self, member: _Member[I], message: Message) -> Iterator[P]:
        member.silent = 0.0
        member.known |= isinstance(message, Tick | Given)
        hand = self._hands[member.place]
        hand.name = member.contact.name  # which knows by now where it is
        match message:
            case Tick():
                hand.tick(message.images)
                hand.state = f"at {member.items.get(message.shard, '')}"
                self._report(message)
            case Want():
                item = None if self._is_ending() else self._candidate(member)
                if item is not None:
                    self._left.remove(item)
                    member.items[item.index] = item
                member.contact.tell(Give(item))
            case Given(part):
                for index in part.touched:
                    member.items.pop(index, None)
                    self._deaths.pop(index, None)
                self._in_a_row = member.deaths = 0
                yield part
            case Done(error):
                member.busy = False
                hand.state = "idle"
                if isinstance(error, OutOfMemory):
                    self._lose(member, f"{error}; where it does so again, start again with a smaller --batch")
                    return
                if error is None and member.items and not self._stop.is_set():
                    raise RuntimeError(f"{member.contact.name} gave nothing for {list(member.items.values())}")
                self._failure = self._failure or error
                self._left.extendleft(reversed(member.items.values()))
                member.items.clear()
            case Said(level, text):
                log.log(level, "%s: %s", member.contact.name, text)
            case Gone(reason):
                self._lose(member, reason)

    def _candidate(self, member: _Member[I]) -> I | None:
        """The next item for a worker, if there is one: the suspects of an earlier death are given to it alone, and not
        where a worker has died at them already, unless that is so everywhere."""
        if any(index in self._deaths for index in member.items):
            return None
        fresh = next((item for item in self._left if item.index not in self._deaths), None)
        if fresh is not None or member.items:
            return fresh
        places = {each.place for each in self._members if self._is_at_work(each)}
        for item in self._left:
            died = self._deaths[item.index]
            if member.place not in died or places <= {*died}:
                return item
        return None

    @staticmethod
    def _is_at_work(member: _Member[I]) -> bool:
        """Whether one can count on it. What waits for room in a cluster may never come."""
        return member.contact.ready and not member.retired

    def _look(self) -> None:
        """Passes a stop on, and ends workers that are silent."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * _LOOK), now  # not the time in which nobody listened
        for place in range(len(self._members), 0 if self._is_ending() else len(self._hirer.places)):
            self._members.append(self._hire(place))
            self._hands.append(Hand(self._hirer.places[place]))
        if self._told is not None:
            self._told += passed
        elif self._stop.is_set():
            self._told = 0.0
            for member in self._members:
                member.contact.tell(Stop())
        for member in self._members:
            member.silent += passed
            if member.busy and (self._told or 0.0) > GRACE:
                member.contact.kill()
                member.busy = False
            elif member.busy and member.silent > self._stall * (1 if member.known else STARTING):
                self._lose(member, f"silent for {member.silent:.0f} s")

    def _lose(self, member: _Member[I], reason: str) -> None:
        """Replaces a worker. Raises MaxactError where that does not help."""
        member.contact.kill()
        member.busy = False
        items, member.items = list(member.items.values()), {}
        name = member.contact.name
        self._in_a_row += 1
        if self._stop.is_set():
            return
        had = f"; what it had is done again: {', '.join(map(str, items))}" if items else ""
        log.warning("%s: the worker died (%s)%s", name, reason, had)
        for item in reversed(items):
            died = self._deaths.setdefault(item.index, [])
            died.append(member.place)
            if len(died) < DEATHS:
                self._left.appendleft(item)
            else:
                self._aside[item.index] = f"{DEATHS} workers died at {item}, the last one: {reason}"
        if self._in_a_row > DEATHS * len(self._members):
            raise MaxactError(f"{name}: {self._in_a_row} workers died one after the other, the last one: {reason}")
        member.deaths += 1
        if member.deaths >= DEATHS and any(self._is_at_work(each) for each in self._members if each is not member):
            log.warning("%s: given up, the others go on", name)
            member.retired = True
            self._hands[member.place].state = "given up"
            return
        replaced = self._hire(member.place)
        replaced.deaths = member.deaths
        self._members[self._members.index(member)] = replaced
        self._hands[member.place].state = "replaced"
