"""Many workers at one pass: who gets which item, and what happens when one of them dies.

The rest of a run does not know of it: `Crew.run` takes items and gives what they gave, as the loop of one process does.
Workers are processes of this machine (`local.py`) or actors of a cluster (`run_ray.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol

from maxact.errors import MaxactError, OutOfMemory
from maxact.process import Hand, Tick
from maxact.worker import Begin, Done, Give, Given, Gone, I, Message, Order, P, Said, Stop, Want

DEATHS = 3  # of workers at one item, after which it is left aside
GRACE = 60.0  # seconds in which a worker ends after it was told to
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
    heard: float
    items: dict[int, I] = field(default_factory=dict)  # that it has, by their numbers
    busy: bool = False


class Crew(Generic[I, P]):
    """Some workers, replaced as they die.

    A worker that dies, or is silent for `stall` seconds, is replaced, and its items go to others. Which of several was
    its death is not known: from then on each of them is given to a worker that has nothing else. After three deaths
    an item is left aside, the others are finished, and then the run ends.
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
        self._deaths: Counter[int] = Counter()
        self._in_a_row = 0  # deaths since something was handed over
        self._hands = [Hand(name) for name in hirer.places]
        self._aside: dict[int, str] = {}

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
        self._failure: MaxactError | None = None
        self._told = None if not self._stop.is_set() else time.monotonic()
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
        return _Member(place, self._hirer.hire(place), time.monotonic())

    def _begin(self) -> None:
        """Wakes those that have nothing to do, as far as there is something."""
        if self._is_ending():
            return
        idle = [member for member in self._members if not member.busy and member.contact.ready]
        for member in idle[: len(self._left)]:
            member.busy, member.heard = True, time.monotonic()
            member.contact.tell(Begin())

    def _is_ending(self) -> bool:
        return self._stop.is_set() or self._failure is not None

    def _hear(self, member: _Member[I], message: Message) -> Iterator[P]:
        member.heard = time.monotonic()
        hand = self._hands[member.place]
        hand.name = member.contact.name  # which knows by now where it is
        match message:
            case Tick():
                hand.tick(message.images)
                self._report(message)
            case Want():
                item = self._next(member)
                member.contact.tell(Give(item))
            case Given(part):
                for index in part.touched:
                    member.items.pop(index, None)
                    self._deaths.pop(index, None)
                self._in_a_row = 0
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

    def _next(self, member: _Member[I]) -> I | None:
        """The next item for a worker, if there is one: the suspects of an earlier death are given to it alone."""
        if self._is_ending() or any(self._deaths[index] for index in member.items):
            return None
        item = next((item for item in self._left if not self._deaths[item.index]), None)
        if item is None and self._left and not member.items:
            item = self._left[0]
        if item is not None:
            self._left.remove(item)
            member.items[item.index] = item
            self._hands[member.place].state = f"at {item}"
        return item

    def _look(self) -> None:
        """Passes a stop on, and ends workers that are silent."""
        now = time.monotonic()
        for place in range(len(self._members), 0 if self._is_ending() else len(self._hirer.places)):
            self._members.append(self._hire(place))
            self._hands.append(Hand(self._hirer.places[place]))
        if self._stop.is_set() and self._told is None:
            self._told = now
            for member in self._members:
                member.contact.tell(Stop())
        for member in self._members:
            if not member.busy:
                continue
            if self._told is not None and now - self._told > GRACE:
                member.contact.kill()
                member.busy = False
            elif now - member.heard > self._stall:
                self._lose(member, f"silent for {self._stall:.0f} s")

    def _lose(self, member: _Member[I], reason: str) -> None:
        """Replaces a worker. Raises MaxactError where that does not help."""
        member.contact.kill()
        member.busy = False
        items, member.items = list(member.items.values()), {}
        name = member.contact.name
        self._in_a_row += 1
        if self._stop.is_set():
            return
        log.warning("%s: the worker died (%s); a new one takes over%s", name, reason, "".join(f" {i}," for i in items))
        for item in reversed(items):
            self._deaths[item.index] += 1
            if self._deaths[item.index] < DEATHS:
                self._left.appendleft(item)
            else:
                self._aside[item.index] = f"{DEATHS} workers died at {item}, the last one: {reason}"
        if self._in_a_row > DEATHS * len(self._members):
            raise MaxactError(f"{name}: {self._in_a_row} workers died one after the other, the last one: {reason}")
        self._members[self._members.index(member)] = self._hire(member.place)
        self._hands[member.place].state = "replaced"
