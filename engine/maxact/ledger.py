"""What a second pass has done so far: one small file in the store, replaced whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maxact.errors import MaxactError
from maxact.files import replace_file
from maxact.partial import BadImage
from maxact.sound import expect, is_count, is_words


@dataclass
class Ledger:
    """The settings of the pass, for every list (`tap/score/end`) the channels that are done, and what went wrong.

    `deviation` is the largest difference between a recomputed score and the stored one, as a share of the stored one
    or of the channel's standard deviation, whichever is larger; `settled` the same between the float32 scores that
    settled the order and the 16-bit ones of the scan. `whole` names the taps whose winners had to be projected on
    whole images. `clean` is false while the arrays of an earlier pass are deleted.
    """

    settings: dict[str, Any]
    done: dict[str, list[int]] = field(default_factory=dict)
    bad: dict[int, BadImage] = field(default_factory=dict)
    deviation: float = 0.0
    settled: float = 0.0
    whole: list[str] = field(default_factory=list)
    clean: bool = True

    def left(self, place: str, channels: Iterable[int]) -> list[int]:
        """Those of some channels of a list that are not done."""
        done = set(self.done.get(place, ()))
        return [channel for channel in channels if channel not in done]

    def add(self, place: str, channels: Iterable[int]) -> None:
        """Counts channels as done."""
        self.done[place] = sorted({*self.done.get(place, ()), *channels})

    def facts(self) -> dict[str, Any]:
        """What the store says of the pass."""
        return self.settings | {"deviation": self.deviation, "settled": self.settled, "whole": self.whole}

    def save(self, path: Path) -> None:
        """Writes it, all or nothing. Raises OSError where that cannot be done."""
        values = asdict(self) | {"bad": [asdict(bad) for bad in self.bad.values()]}
        replace_file(path, lambda aside: aside.write_text(json.dumps(values)))

    def check(self) -> None:
        """Raises ValueError where a part is not of its kind."""
        numbers = all(isinstance(number, int | float) for number in (self.deviation, self.settled))
        expect(isinstance(self.settings, dict) and numbers and isinstance(self.clean, bool), "settings")
        expect(is_words(self.whole) and isinstance(self.done, dict), "lists")
        for place, channels in self.done.items():
            expect(place.count("/") == 2 and all(map(is_count, channels)), place)

    @classmethod
    def load(cls, path: Path) -> Ledger | None:
        """What `save` wrote; None where nothing was. Raises MaxactError where the file is damaged."""
        try:
            values = json.loads(path.read_text())
            bad = {each["image"]: BadImage.from_json(each) for each in values.pop("bad")}
            ledger = cls(**values, bad=bad)
            ledger.check()
            return ledger
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MaxactError(f"{path}: is damaged ({error}); project again with --overwrite") from error
