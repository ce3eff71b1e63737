"""The maintenance mode: an operator closes an app to clients until it is opened again, over releases and reboots.

It shares its page with breaking migrations and nothing else: neither of the two ends the other.
"""

from typing import Any

import msgspec

from forgectl import slots, state
from forgectl.layout import Layout
from forgectl.lock import person
from forgectl.state import Closed, Entry, now


def switch(layout: Layout, *, on: bool, reason: str, dry_run: bool) -> dict[str, Any]:
    """Close an app to clients, or open it, and write down who did; a mode that is on keeps its reason.

    It asks neither Vault nor the database, and repairs nothing that a cutover left behind: it has to work when all of
    those are in trouble. The caller holds the lock. Returns the mode as one JSON-ready object, with what else keeps
    the page.

    Raises:
        Refused: the app has no folder for its page.
    """
    present = state.load(layout)
    moved = on != (present.closed is not None)
    if moved:
        present.closed = Closed(now(), person(), reason) if on else None
        release = present.live.release if present.live else ""
        outcome: state.Outcome = "on" if on else "off"
        present.record(Entry(release, now(), person(), outcome, {}, reason, "maintenance"))
    # Somebody may have been killed between state and page.
    stale = layout.maintenance.exists() != on and (on or not present.page)
    changed = moved or stale
    if changed and not dry_run:
        slots.ensure_socket_folder(layout)
        # A page that no state tells of would stay for ever: so it goes before the state, and comes after it.
        if not present.page:
            slots.maintenance(layout, on=False)
        if moved:
            state.save(layout, present)
        if on:
            slots.maintenance(layout, on=True)
    return {
        "app": layout.name,
        "changed": changed,
        "maintenance_mode": msgspec.to_builtins(present.closed),
        "maintenance": present.maintenance or None,
    }
