"""A refusal that an operator can act on, and the one message that carries all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Shorter values would turn ordinary words of a message into asterisks; no message prints a value on purpose anyway.
SHORTEST_MASKED = 5


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        where: The variable, file or host property, for example `apps.inbox.domain`.
        expected: What would have been right.
        found: What is there; never a secret value.
        do: What the operator changes.
    """

    where: str
    expected: str
    found: str
    do: str


class Refusal(Exception):
    """A refusal raised where it is found; `option` is that of the entry which is to be mended."""

    def __init__(self, option: str, expected: str, found: str, do: str) -> None:
        super().__init__(f"expected {expected}; found {found}; {do}")
        self.option, self.expected, self.found, self.do = option, expected, found, do

    def problem(self, entry: str) -> Problem:
        """Return it as a problem of the entry whose path is `entry`."""
        return Problem(f"{entry}.{self.option}", self.expected, self.found, self.do)


def render(problems: Sequence[Problem], host: str, secrets: Iterable[str] = ()) -> str:
    """Return the failure message for `host`: every problem, numbered, with every one of `secrets` masked."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"Preflight refused {host}: {count}. Nothing was changed."]
    for number, problem in enumerate(problems, start=1):
        lines += [
            "",
            f"{number}. {problem.where}",
            f"   expected: {problem.expected}",
            f"   found: {problem.found}",
            f"   do: {problem.do}",
        ]
    return mask("\n".join(lines), secrets)


def mask(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with every occurrence of a secret replaced; the longest first, as one may contain another."""
    for secret in sorted({value for value in secrets if len(value) >= SHORTEST_MASKED}, key=len, reverse=True):
        text = text.replace(secret, "********")
    return text
