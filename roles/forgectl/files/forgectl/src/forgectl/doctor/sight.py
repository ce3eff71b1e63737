"""What the checks look at: files below a root, commands with a time limit, and what was read once for all of them."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from forgectl import config, cutover, state
from forgectl.config import App
from forgectl.errors import ForgeError
from forgectl.layout import SLOTS, Layout, names
from forgectl.scrub import Scrubber
from forgectl.state import Slotted, State

# What a command gets; the checks that call it get a little more.
COMMAND_SECONDS = 1.8
HOUR = 3600.0
# Of a line that is quoted, what is looked at.
LONGEST_WORDS = 16 * 1024
NGINX = "nginx.service"
# So many restarts at about the same distance are a loop, until it has run for twice that.
RESTARTS, DISTANCES, LEAST_SECONDS = 3, 2, 10.0
# SD_MESSAGE_UNIT_RESTART_SCHEDULED of sd-messages.h.
RESTARTED = "5eb03494b6584870a536b337290809b3"  # pragma: allowlist secret
# Whoever keeps the clock, by systemd's names on the supported distributions.
CLOCKS = ("systemd-timesyncd.service", "chrony.service", "ntpsec.service", "ntp.service", "openntpd.service")
PROPERTIES = (
    *("Id", "LoadState", "ActiveState", "SubState", "Result", "NRestarts", "ExecMainStatus", "MainPID", "Job"),
    *("UnitFileState", "ConditionResult", "InvocationID", "MemoryMax", "LimitNOFILE", "NeedDaemonReload"),
    *("ActiveEnterTimestampMonotonic", "ExecMainStartTimestampMonotonic", "ExecMainExitTimestampMonotonic"),
    *("LastTriggerUSec", "InactiveEnterTimestampMonotonic"),
)


class Unseen(Exception):
    """A check could not look: why, in words."""


@dataclass(frozen=True)
class Process:
    """A process: its parent, its unit, and its name."""

    pid: int
    parent: int
    unit: str
    name: str


@dataclass(frozen=True)
class AppSight:
    """An app, as far as its files can be read.

    Attributes:
        described: Its newest description.
        running: The settings of its live release, which may differ.
        broken: Which of its files are no good, and why.
    """

    layout: Layout
    described: App | None
    running: App | None
    state: State | None
    broken: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name."""
        return self.layout.name

    @property
    def app(self) -> App | None:
        """What is known of it: of what runs, rather than of what will."""
        return self.running or self.described

    @property
    def in_service(self) -> bool:
        """Whether it has a live release and was not removed."""
        return self.state is not None and self.state.live is not None and not self.state.removed

    @property
    def live(self) -> Slotted:
        """Its live slot, of one in service."""
        if self.state is None or self.state.live is None:
            raise Unseen(f"{self.name} has no live release")
        return self.state.live

    def back(self) -> str:
        """The command that goes back to the release before; where there is none, the one that shows what it says."""
        if self.state and cutover.rollback_target(self.layout, self.state):
            return f"sudo forgectl rollback {self.name}"
        return f"sudo forgectl logs {self.name} --lines=30"

    def moved(self) -> bool:
        """Whether its state is another than when it was read, as after a cutover: what was seen since may be of either.

        A command says in the state that it begins before it changes anything.
        """
        try:
            return state.load(self.layout) != self.state
        except (ForgeError, OSError):
            return True

    @property
    def service(self) -> str:
        """The unit of its live slot."""
        return self.layout.service(self.live.slot)


@dataclass
class Sight:
    """One look at the host."""

    root: Path = Path("/")
    is_root: bool = field(default_factory=lambda: os.geteuid() == 0)
    only: str | None = None
    patience: float = 1.0
    """By how much all limits of time are stretched, on a host that has no CPU to spare."""
    _lock: Lock = field(default_factory=Lock)

    def run(self, *command: str, seconds: float = COMMAND_SECONDS, ok: Sequence[int] = (0,), data: str = "") -> str:
        """Run a command, in no language but English, and return what it printed.

        Raises:
            Unseen: there is no such command, it failed, or it did not end.
        """
        done = self.attempt(*command, seconds=seconds, data=data)
        if done.returncode not in ok:
            words = " ".join(done.stderr.split())[-300:] or f"exit status {done.returncode}"
            raise Unseen(f"{' '.join(command[:2])}: {words}")
        return done.stdout

    def attempt(
        self, *command: str, seconds: float = COMMAND_SECONDS, data: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """The same, however it ended.

        Raises:
            Unseen: there is no such command, or it did not end.
        """
        try:
            return subprocess.run(
                command,
                input=data,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"},
                timeout=seconds * self.patience,
                check=False,
            )
        except FileNotFoundError:
            raise Unseen(f"{command[0]} is not installed") from None
        except subprocess.TimeoutExpired:
            raise Unseen(f"{' '.join(command[:2])} did not end within {seconds * self.patience:.1f} s") from None

    def read(self, path: str | Path) -> str:
        """The text of a file below the root; empty where there is none.

        Raises:
            Unseen: it can't be read.
        """
        try:
            return self.at(path).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise Unseen(f"{path}: {error.strerror}") from None

    def at(self, path: str | Path) -> Path:
        """A path below the root."""
        return self.root / str(path).lstrip("/")

    @cached_property
    def apps(self) -> Sequence[AppSight]:
        """The apps that this host knows, or the one that was asked for."""
        known = [name for name in names(self.root) if self.only in (None, name)]
        return [_app(Layout(name, self.root), self.is_root) for name in known]

    @property
    def serving(self) -> list[AppSight]:
        """Those that are in service."""
        return [app for app in self.apps if app.in_service]

    @property
    def provisioned(self) -> bool:
        """Whether provisioning ever came as far as to say which apps there are."""
        return bool(names(self.root)) or self.at("/var/lib/forge/manifest.json").exists()

    def unit(self, name: str) -> Mapping[str, str]:
        """The properties of a unit; of all that checks ask for, systemd is asked once.

        Raises:
            Unseen: systemd does not answer.
        """
        with self._lock:
            known = self._units
            if name not in known:
                known |= self._show([name])
            return known[name]

    def now(self, name: str) -> Mapping[str, str]:
        """The properties of a unit as they are now, for what may change while doctor looks.

        Raises:
            Unseen: systemd does not answer.
        """
        return self._show([name])[name]

    @cached_property
    def _units(self) -> dict[str, dict[str, str]]:
        wanted = [NGINX, "forge-certificates.timer", "forge-certificates.service", "forge-reboot.timer"]
        wanted += ["logrotate.timer", "logrotate.service", *CLOCKS]
        wanted += [
            "apt-daily-upgrade.timer",
            "apt-daily-upgrade.service",
            "forge-firewall.service",
            "forge-alerts.service",
        ]
        for app in self.apps:
            layout = app.layout
            for slot in SLOTS:
                # Of one that never ran a release there is no [Service], of which systemd would complain.
                if layout.drop_in(slot).exists():
                    wanted += [layout.service(slot), layout.socket_unit(slot), *layout.command_units(slot)]
            wanted += [*layout.timed_units(), *layout.timers(), layout.watch_unit(), layout.boot_unit()]
        return self._show(wanted)

    def _show(self, units: Sequence[str]) -> dict[str, dict[str, str]]:
        output = self.run("systemctl", "show", "--property", ",".join(PROPERTIES), "--", *units)
        blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in output.strip().split("\n\n")]
        # Not each kind of unit has all of them.
        return {unit: dict.fromkeys(PROPERTIES, "") | block for unit, block in zip(units, blocks, strict=True)}

    @cached_property
    def processes(self) -> Sequence[Process]:
        """What runs."""
        return list(_processes(self.root))

    def tree(self, unit: str) -> list[Process]:
        """The processes of a unit."""
        return [process for process in self.processes if process.unit == unit]

    def journal(self, *matches: str, since: float = HOUR, lines: int = 100) -> list[dict[str, Any]]:
        """The newest entries that match, as journald has them, oldest first; `since` is seconds ago."""
        if not self.is_root:
            return []
        at = f"--since=@{time.time() - since:.0f}"
        # Where there is a --since, journalctl before systemd 254 has --lines count from there, but for --reverse.
        newest = ("--reverse", f"--lines={lines}")
        output = self.run("journalctl", "--quiet", "--no-pager", "--output=json", at, *newest, *matches)
        found = []
        for line in output.splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found[::-1]

    def loops(self, unit: str) -> bool:
        """Whether one that runs was restarted so often, and so lately, that it may well end once more."""
        found = self.unit(unit)
        if int(found["NRestarts"] or 0) < RESTARTS:
            return False
        times = [moment(entry) for entry in self.journal(f"MESSAGE_ID={RESTARTED}", f"UNIT={unit}", lines=RESTARTS)]
        distance = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        return ago(found["ActiveEnterTimestampMonotonic"]) < max(LEAST_SECONDS, DISTANCES * distance)

    def last_words(self, unit: str, lines: int = 3) -> tuple[str, ...]:
        """What a unit's processes said last, a line each, without the middle of long ones."""
        said = [message(entry) for entry in self.journal(f"_SYSTEMD_UNIT={unit}", since=24 * HOUR, lines=lines)]
        # An app that fails may quote what it was given, and findings go to pages and tickets.
        scrub = Scrubber({})
        return tuple(f"journal of {unit}: {shorten(scrub(text[:LONGEST_WORDS]))}" for text in said)


def message(entry: Mapping[str, Any]) -> str:
    """The text of an entry of the journal, which is bytes where it is no UTF-8."""
    text = entry.get("MESSAGE", "")
    return bytes(text).decode(errors="replace") if isinstance(text, list) else str(text or "")


def moment(entry: Mapping[str, Any]) -> float:
    """When an entry was written, in Unix time."""
    return int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6


def shorten(text: str, start: int = 120, end: int = 160) -> str:
    """One line, without its middle where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= start + end else f"{line[:start]} ... {line[-end:]}"


def ago(monotonic: str) -> float:
    """The seconds since one of systemd's times (microseconds, monotonic); infinite for never."""
    return time.clock_gettime(time.CLOCK_MONOTONIC) - int(monotonic) / 1e6 if monotonic.strip("0") else float("inf")


def uptime() -> float:
    """The seconds since this host was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def span(seconds: float) -> str:
    """A length of time for people."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(number: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _app(layout: Layout, is_root: bool) -> AppSight:
    described, running, present = None, None, None
    broken = []
    if is_root:
        try:
            described = config.load(layout.description)
        except (ForgeError, OSError) as error:
            broken.append(str(error))
        try:
            present = state.load(layout)
        except (ForgeError, OSError) as error:
            broken.append(str(error))
        if present and present.live:
            try:
                running = config.load(layout.settings(present.live.release))
            except (ForgeError, OSError) as error:
                broken.append(str(error))
    return AppSight(layout, described, running, present, tuple(broken))


def _processes(root: Path) -> Iterator[Process]:
    for folder in (root / "proc").glob("[0-9]*"):
        # Any of them may end meanwhile.
        with suppress(OSError, IndexError, ValueError):
            name, _, fields = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            unit = re.findall(r"[^/\n]+\.(?:service|scope)(?=$|/)", (folder / "cgroup").read_text(), re.MULTILINE)
            yield Process(int(folder.name), int(fields.split()[1]), unit[-1] if unit else "", name)
