"""How much memory a slot has: written to the journal whenever its timer looks, and read from there."""

import re

from forgectl.layout import Layout
from forgectl.logs import journal

WRITTEN = "slot {slot} has {used} of {limit} bytes of memory"
READ = re.compile(r"slot (?:blue|green) has (?P<used>\d+) of (?P<limit>\d+) bytes of memory")


def line(slot: str, used: int, limit: int) -> str:
    """What is written; without a limit that is 0."""
    return WRITTEN.format(slot=slot, used=used, limit=limit)


def since(layout: Layout, began: float) -> list[tuple[float, int, int]]:
    """Unix time, bytes and limit, each time that somebody looked."""
    found = []
    for entry in journal.entries([f"_SYSTEMD_UNIT=forge-recycle@{layout.name}.service"], since=began):
        if match := READ.fullmatch(entry.message):
            found.append((entry.at, int(match["used"]), int(match["limit"])))
    return found
