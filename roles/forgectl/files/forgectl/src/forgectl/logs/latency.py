"""Quantiles of many durations in little memory: counts in classes, each a twentieth wider than the one before."""

import math
from collections import Counter

# The shortest that Nginx tells from nothing, in seconds, and the ratio of two neighbours.
SHORTEST, RATIO = 0.001, 1.05
_SCALE = 1 / math.log(RATIO)


class Latencies:
    """Durations in seconds. A quantile is off by a fortieth at most; there are some 250 classes up to a minute."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[int(math.log(seconds / SHORTEST) * _SCALE) + 1 if seconds >= SHORTEST else 0] += 1

    def quantiles(self, *shares: float) -> list[float | None]:
        """The durations that these shares (0 to 1) of all do not exceed; None without any."""
        total = self._counts.total()
        if not total:
            return [None for _ in shares]
        classes = sorted(self._counts.items())
        return [_middle(_class_of(classes, math.ceil(total * share))) for share in shares]


def _class_of(classes: list[tuple[int, int]], rank: int) -> int:
    seen = 0
    for number, count in classes:
        seen += count
        if seen >= rank:
            return number
    return classes[-1][0]


def _middle(number: int) -> float:
    # What Nginx gives as nothing took less than a millisecond.
    return round(SHORTEST * RATIO ** (number - 0.5), 4) if number else SHORTEST / 2
