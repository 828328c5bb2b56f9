"""How amounts become shades: the same in a picture and in a terminal."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from etha_ray.explanation.picture import HEATS
from etha_ray.report import format_bytes

_ALIKE = 1.05
"""How much an amount may exceed another and still have its shade."""
_LOG_FROM = 20
"""The largest amount over the least from which shades follow the logarithm."""


@dataclass(frozen=True)
class Scale:
    """Which shade an amount has.

    Attributes:
        steps: the largest amount of each shade, ascending; at most `HEATS`.
    """

    steps: tuple[int, ...]

    @classmethod
    def of(cls, amounts: Collection[int]) -> Scale:
        """A scale for these amounts, all above 0: a shade each if they are few, else equal steps, or equal factors over a wide range."""
        low, high = min(amounts), max(amounts)
        alike: list[tuple[int, int]] = []
        for amount in sorted(set(amounts)):
            least = alike.pop()[0] if alike and amount <= alike[-1][0] * _ALIKE else amount
            alike.append((least, amount))
        if len(alike) <= HEATS:
            return cls(tuple(most for _, most in alike))
        if high > low * _LOG_FROM:
            steps = [low * (high / low) ** ((number + 1) / HEATS) for number in range(HEATS)]
        else:
            steps = [low + (high - low) * (number + 1) / HEATS for number in range(HEATS)]
        return cls((*(math.ceil(step) for step in steps[:-1]), high))

    def shade(self, amount: int) -> int:
        """The number of the shade of one of the amounts, 0 for the faintest."""
        step = next(number for number, most in enumerate(self.steps) if amount <= most)
        return self._spread(step)

    def legend(self) -> list[tuple[int, str]]:
        """Each shade that is used, with its largest amount."""
        return [(self._spread(number), format_bytes(most)) for number, most in enumerate(self.steps)]

    def _spread(self, step: int) -> int:
        """Few amounts take shades far apart, and apart from an empty cell."""
        first = 0 if len(self.steps) == HEATS else 1
        return 2 if len(self.steps) == 1 else first + round(step * (HEATS - 1 - first) / (len(self.steps) - 1))
