"""What forgectl remembers of an app over a crash or a reboot: state.json, written atomically."""

from typing import Literal

import msgspec

from forgectl.errors import Refused
from forgectl.layout import Layout, write_atomically

KEPT_STARTS = 5
KEPT_HISTORY = 50


class Slotted(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A release in a slot, and since when (RFC 3339, UTC)."""

    release: str
    slot: str
    since: str


class Operation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A cutover under way, from before its slot is touched until the old slot has stopped.

    `starting` becomes `draining` in the same write that makes the new slot the live one.
    """

    phase: Literal["starting", "draining"]
    release: str
    slot: str
    old_slot: str | None
    began: str


class Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One release in the history; phases in seconds."""

    release: str
    at: str
    by: str
    outcome: Literal["live", "failed"]
    phases: dict[str, float]
    reason: str = ""


class State(msgspec.Struct, forbid_unknown_fields=True):
    """The durable state of an app. `starts` are the measured seconds from start to ready, newest last."""

    version: Literal[1] = 1
    live: Slotted | None = None
    previous: Slotted | None = None
    operation: Operation | None = None
    starts: list[float] = []
    history: list[Entry] = []

    def record(self, entry: Entry) -> None:
        self.history = [*self.history, entry][-KEPT_HISTORY:]

    def measured(self, seconds: float) -> None:
        self.starts = [*self.starts, round(seconds, 3)][-KEPT_STARTS:]


def load(layout: Layout) -> State:
    """Read the state; an app that was never released has an empty one.

    Raises:
        Refused: the file is damaged, which no crash of forgectl can cause.
    """
    path = layout.state_dir / "state.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State()
    except msgspec.DecodeError as error:
        raise Refused(
            f"expected the state of {layout.name} in {path}; found: {error}; restore it from a backup, or move it away "
            "and release again"
        ) from error


def save(layout: Layout, state: State) -> None:
    """Write the state so that it survives a power cut."""
    write_atomically(layout.state_dir / "state.json", msgspec.json.format(msgspec.json.encode(state), indent=2), 0o600)
