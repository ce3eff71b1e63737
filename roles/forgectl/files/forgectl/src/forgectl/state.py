"""What forgectl remembers of an app over a crash or a reboot: state.json, written atomically."""

from datetime import UTC, datetime
from typing import Literal

import msgspec

from forgectl.errors import Refused
from forgectl.layout import Layout, write_atomically

KEPT_STARTS = 5
KEPT_HISTORY = 100

Action = Literal["release", "rollback", "recycle", "rotation", "restore", "maintenance", "removal"]
Outcome = Literal["live", "failed", "rolled back", "on", "off", "removed"]
# Those of them that are no cutovers.
MODES = ("maintenance", "removal")
Phase = Literal["maintenance", "starting", "watching", "draining"]

# The reason of a cutover that somebody or something cut short, which says nothing about what it tried.
INTERRUPTED = "interrupted"


class Slotted(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A release in a slot, since when (RFC 3339, UTC), and the version of the secrets that it runs with.

    The version is 0 where nobody wrote it down: the slot then starts with the newest. `database_user` is the login role
    that these secrets name; empty without a database, and where nobody wrote it down: then it is the first one.
    """

    release: str
    slot: str
    since: str
    secrets: int = 0
    database_user: str = ""


class Operation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A cutover under way, from before its slot is touched until the slot that lost has stopped.

    maintenance  only of a breaking release: the old slot is stopped, the migration may run
    starting     `slot` is started; traffic still goes to `old`, or to the maintenance page
    watching     `slot` has the traffic, `old` is kept warm until the Unix time `until`
    draining     the verdict is in the history; whichever of both is not live is drained and stopped

    `began` (RFC 3339, UTC) names the operation; `phases` are in seconds. `previous` and `schema` are what the state had
    before; `revisions` is what the database was at before a breaking migration, null when nobody knows.
    """

    phase: Phase
    release: str
    slot: str
    old: Slotted | None
    began: str
    action: Action = "release"
    by: str = ""
    phases: dict[str, float] = {}
    breaking: bool = False
    until: float = 0
    previous: Slotted | None = None
    secrets: int = 0
    database_user: str = ""
    schema: str = ""
    revisions: list[str] | None = None


class Closed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The maintenance mode: since when (RFC 3339, UTC), by whom and why; the reason may be empty."""

    since: str
    by: str
    reason: str


class Removed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The app is out of service: since when (RFC 3339, UTC) and by whom.

    `timers` are those that ran; they do again once it is restored. Until it is `done`, and from the moment that a purge
    deletes something, the next command goes on.
    """

    since: str
    by: str
    timers: list[str] = []
    done: bool = False
    purging: bool = False


class Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One cutover in the history; `began` names its operation, phases are in seconds.

    Or one change of the maintenance mode, or a removal, with the release that was live; empty without one.
    """

    release: str
    at: str
    by: str
    outcome: Outcome
    phases: dict[str, float]
    reason: str = ""
    action: Action = "release"
    began: str = ""
    secrets: int = 0


class State(msgspec.Struct, forbid_unknown_fields=True):
    """The durable state of an app. `starts` are the measured seconds from start to ready, newest last.

    `schema` is the release whose migrations the database has, which after a rollback is newer than the live one.
    Clients get the maintenance page for either of two reasons, also after a reboot: `maintenance` says, in words, that
    no code fits the schema, and only releases and rollbacks change it; `closed` is the mode that an operator switches.
    With `removed` it has no slot and no site until it is restored or released.
    """

    version: Literal[1] = 1
    live: Slotted | None = None
    previous: Slotted | None = None
    operation: Operation | None = None
    starts: list[float] = []
    history: list[Entry] = []
    schema: str = ""
    maintenance: str = ""
    closed: Closed | None = None
    removed: Removed | None = None

    @property
    def page(self) -> bool:
        """Whether clients get the maintenance page."""
        return bool(self.maintenance or self.closed)

    @property
    def last_cutover(self) -> Entry | None:
        """How the newest cutover ended."""
        return next((entry for entry in reversed(self.history) if entry.action not in MODES), None)

    def record(self, entry: Entry) -> None:
        """Add an entry; it pushes out only one like it, since recyclings are many and rollbacks go by the releases."""
        alike = [each for each in self.history if each.action == entry.action]
        pushed_out = alike[0] if len(alike) >= KEPT_HISTORY else None
        self.history = [*(each for each in self.history if each is not pushed_out), entry]

    def measured(self, seconds: float) -> None:
        self.starts = [*self.starts, round(seconds, 3)][-KEPT_STARTS:]

    def entry(self, began: str) -> Entry | None:
        """How the operation that began then ended, if it has."""
        return next((entry for entry in reversed(self.history) if entry.began == began), None)

    @property
    def serving_secrets(self) -> str:
        """The version of the secrets that serves, in words."""
        return f"version {self.live.secrets}" if self.live and self.live.secrets else "an older version"

    def refused(self, version: int | None = None) -> Entry | None:
        """How the live release last refused a version of its secrets; None for one newer than those it runs with."""
        if self.live is None:
            return None
        tried = (
            entry
            for entry in reversed(self.history)
            if (entry.action, entry.release) == ("rotation", self.live.release)
            and entry.reason != INTERRUPTED
            and (entry.secrets > self.live.secrets if version is None else entry.secrets == version)
        )
        last = next(tried, None)
        return last if last and last.outcome != "live" else None

    def live_since(self, at: datetime) -> set[str]:
        """The releases that had the traffic at a time or later, as far as the history goes."""
        found: set[str] = set()
        for entry in reversed(self.history):
            if entry.action in MODES or entry.outcome not in ("live", "rolled back"):
                continue
            found.add(entry.release)
            # The verdict comes after the traffic.
            if entry.outcome == "live" and datetime.fromisoformat(entry.at) < at:
                break
        return found

    def lineage(self) -> list[str]:
        """The releases that passed their watch, in the order in which they went live; each once, where it did so last.

        Those that an operator has gone back from are not among them.
        """
        found: list[str] = []
        for entry in self.history:
            if entry.outcome != "live":
                continue
            if entry.action != "rollback":
                found = [release for release in found if release != entry.release]
            elif entry.release in found:
                found = found[: found.index(entry.release)]
            else:
                found = [release for release in found if release < entry.release]
            found.append(entry.release)
        return found


def now() -> str:
    """The time, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hours_since(at: str) -> float:
    """The hours since a time that now() gave."""
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() / 3600


def load(layout: Layout) -> State:
    """Read the state; an app that was never released has an empty one.

    Where the file was lost, what serves is known all the same, and nothing of what was before.

    Raises:
        Refused: the file is damaged, which no crash of forgectl can cause.
    """
    path = layout.state_dir / "state.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State(live=_serving(layout))
    except msgspec.DecodeError as error:
        raise Refused(
            f"expected the state of {layout.name} in {path}; found: {error}; restore it from a backup, or move it away "
            "and release again"
        ) from error


def _serving(layout: Layout) -> Slotted | None:
    """What is in the slot that has the traffic, which no release has before its state is written."""
    slot = layout.live_slot()
    release = layout.slot_release(slot) if slot else None
    if slot is None or release is None:
        return None
    began = datetime.fromtimestamp((layout.slots / slot).lstat().st_mtime, UTC)
    return Slotted(release, slot, began.isoformat(timespec="seconds"))


def save(layout: Layout, state: State) -> None:
    """Write the state so that it survives a power cut."""
    write_atomically(layout.state_dir / "state.json", msgspec.json.format(msgspec.json.encode(state), indent=2), 0o600)
