"""What an app runs beside its server, from the same release: commands that go on for ever, and some on a schedule.

    NAME.COMMAND@SLOT.service           goes on as long as its slot, beside that of the other slot during a cutover
    NAME.COMMAND.service and .timer     begins when it is due, with the release that is live then

systemd starts no unit twice, so a run that outlasts its release, or the time between two, keeps the next one waiting.
Each unit is the slot's own (slot.conf of the release), sandbox, limits and credentials included, with another program.
"""

import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from forgectl import config, systemd
from forgectl.config import App, Command
from forgectl.errors import Refused
from forgectl.layout import Layout, write_atomically

# A command that ends at once is not started again at the pace of a server, on which clients wait.
RESTART_SECONDS = 5

UNIT = """\
# Made by forgectl of {release}; what comes last counts.
{body}
[Unit]
Description={app}: {name}
Wants=network-online.target
After=network-online.target postgresql.service
# Restarted for ever, as the server is.
StartLimitIntervalSec=0

[Service]
Type=exec
NotifyAccess=none
ExecStart=
ExecStart=/opt/forge/forgectl/bin/forge-launch command {app} {slot} {name}
# One line for the journal when it did not end well.
ExecStopPost=-/opt/forge/forgectl/bin/forge-launch ended {app} {name}
Restart={restart}
RestartSec={pause}
TimeoutStopSec={stop}
MemoryMax={memory}M
# That of its slots, so that an app with many has no larger share of the CPU; and in there what serves goes first.
Slice={slice}
CPUWeight={weight}
SyslogIdentifier={app}.{name}
"""

TIMER = """\
# Made by forgectl of {release}.
[Unit]
Description={app}: {name}, when it is due

[Timer]
OnCalendar={schedule}
AccuracySec=1s
# What was due while the host was down is made up for.
Persistent=yes
"""


def check_schedules(app: App) -> None:
    """Check that systemd understands when the commands of an app are due.

    Raises:
        Refused: it does not.
    """
    for name, command in app.commands.items():
        if not command.schedule:
            continue
        done = subprocess.run(
            ["systemd-analyze", "calendar", "--", command.schedule], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Refused(
                f"expected apps.{app.name}.commands.{name}.schedule to be a time of systemd's, as in *-*-* 03:00:00 or "
                f"hourly; found {command.schedule!r}; correct it (man systemd.time)"
            )


def check_programs(layout: Layout, app: App, release: str) -> None:
    """Check that a release, with its environment, holds what its commands name; nothing of it is run.

    Raises:
        Refused: it does not.
    """
    folder = layout.releases / release
    for name, command in app.commands.items():
        first = command.command[0]
        if program(folder, first):
            continue
        package = first.partition(".")[0]
        folders = [folder / "source" / app.python_path, *(folder / "venv").glob("lib/python*/site-packages")]
        if not all(part.isidentifier() for part in first.split(".")) or (
            package not in sys.stdlib_module_names
            and not any((path / package).is_dir() or any(path.glob(f"{package}.*")) for path in folders)
        ):
            raise Refused(
                f"expected apps.{app.name}.commands.{name} to begin with a Python module, or a program of the "
                f"environment; found {first!r}, which is neither; correct `command`, or add its package to the lock"
            )


def program(release: Path, name: str) -> Path | None:
    """The program of that name in a release's environment."""
    path = release / "venv" / "bin" / name
    return path if "/" not in name and path.is_file() else None


def write(layout: Layout, slot: str, release: str) -> bool:
    """Give the commands of a release that go on their units in a slot; tells whether systemd has to know."""
    app = config.load(layout.settings(release))
    wanted = {
        layout.command_unit(name, slot): _unit(layout, slot, release, app, name, command)
        for name, command in app.commands.items()
        if not command.schedule
    }
    return _put(layout, layout.command_units(slot), wanted)


def start(layout: Layout, slot: str) -> None:
    """Ask for those of a slot; one that runs is left alone."""
    if units := layout.command_units(slot):
        systemd.start(*units, block=False)


def stop(layout: Layout, slot: str) -> None:
    """Stop those of a slot before its server, which does not wait for them."""
    if units := layout.command_units(slot):
        systemd.stop(*units)


def schedule(layout: Layout, slot: str) -> None:
    """Have those on a schedule run from the release in a slot from now on; a run that has begun is left alone."""
    release = layout.slot_release(slot)
    if release is None:
        # Nothing that a hand-over should fail for: there is none to run them from.
        return
    app = config.load(layout.settings(release))
    wanted: dict[str, str] = {}
    for name, command in app.commands.items():
        if command.schedule:
            service, timer = layout.scheduled_units(name)
            wanted[service] = _unit(layout, slot, release, app, name, command)
            wanted[timer] = TIMER.format(release=release, app=layout.name, name=name, schedule=command.schedule)
    present = layout.timed_units()
    if gone := [unit for unit in present if unit.endswith(".timer") and unit not in wanted]:
        systemd.stop(*gone)
    # How it is to be stopped, and who may stop it, is in the file: that stays as long as a run of what is gone goes on.
    lasting = [unit for unit in present if unit.endswith(".service") and unit not in wanted and systemd.is_up(unit)]
    changed = _put(layout, [unit for unit in present if unit not in lasting], wanted)
    if changed or (wanted and systemd.is_behind(*wanted)):
        systemd.daemon_reload()
    if timers := [unit for unit in wanted if unit.endswith(".timer")]:
        systemd.start(*timers)


def hand_over(layout: Layout, slot: str) -> None:
    """Start what belongs to a slot that has the traffic now; what the other one has is stopped with that."""
    start(layout, slot)
    schedule(layout, slot)


def pause(layout: Layout) -> None:
    """Stop those on a schedule, and their timers, until the next hand-over: the code does not fit the schema."""
    if units := layout.timed_units():
        systemd.stop(*sorted(units, key=lambda unit: not unit.endswith(".timer")))


def running_since(layout: Layout) -> datetime | None:
    """When the oldest run on a schedule began that still goes on; it keeps the release that was live then."""
    runs = [unit for unit in layout.timed_units() if unit.endswith(".service") and systemd.is_up(unit)]
    return min(map(systemd.started, runs), default=None)


def trouble(layout: Layout, slot: str, *, ever: bool = False) -> str:
    """Which command of a slot does not go on, in words, or `ever` did not; empty when all do."""
    for unit in layout.command_units(slot):
        found = systemd.show(unit)
        ended = found["ActiveState"] in ("failed", "inactive") and found["Job"] == "0"
        if ended or found["SubState"] == "auto-restart" or (ever and found["NRestarts"] != "0"):
            return f"{unit} ended ({found['Result']}, exit status {found['ExecMainStatus']})"
    return ""


def describe(layout: Layout, app: App, slot: str) -> dict[str, dict[str, Any]]:
    """The commands of the live release and how they are; times are as systemd prints them, empty for none."""
    found: dict[str, dict[str, Any]] = {}
    for name, command in app.commands.items():
        service, timer = layout.scheduled_units(name)
        if command.schedule:
            times = systemd.properties(timer, "ActiveState", "NextElapseUSecRealtime", "LastTriggerUSec")
            run = systemd.show(service)
            found[name] = {
                "unit": service,
                "schedule": command.schedule,
                "state": "running" if run["ActiveState"] in ("active", "activating") else "waiting",
                "timer": times["ActiveState"],
                "last": times["LastTriggerUSec"],
                "last_result": run["Result"],
                "next": times["NextElapseUSecRealtime"],
            }
        else:
            unit = layout.command_unit(name, slot)
            run = systemd.show(unit)
            state = "running" if run["ActiveState"] == "active" else run["SubState"]
            found[name] = {"unit": unit, "schedule": None, "state": state, "restarts": int(run["NRestarts"])}
    return found


def _unit(layout: Layout, slot: str, release: str, app: App, name: str, command: Command) -> str:
    return UNIT.format(
        release=release,
        # The instance is the slot, also of a unit that is none.
        body=(layout.releases / release / "slot.conf").read_text().replace("%i", slot),
        app=app.name,
        name=name,
        slot=slot,
        restart="no" if command.schedule else "always",
        pause=RESTART_SECONDS,
        stop=command.stop_seconds,
        memory=command.memory_max_mib,
        # What systemd gives the instances of a template, whose name it escapes (systemd.slice(5)).
        slice="system-" + app.name.replace("-", r"\x2d") + ".slice",
        weight=systemd.BEHIND,
    )


def _put(layout: Layout, present: list[str], wanted: Mapping[str, str]) -> bool:
    """Make units be there and no others of `present`; what is right already is left alone."""
    changed = False
    for unit in present:
        if unit not in wanted:
            (layout.units / unit).unlink()
            changed = True
    for unit, text in wanted.items():
        path = layout.units / unit
        if not path.exists() or path.read_text() != text:
            write_atomically(path, text.encode(), 0o644)
            changed = True
    return changed
