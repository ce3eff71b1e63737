#!/usr/bin/python3
"""Reboot this host when an update asks for it: in its window, when nothing is under way, and once for each reason.

usage: forge-reboot [--window 03:00-04:00]    local time; without a window it only says that a reboot is due
       forge-reboot --resume                  start what was stopped for a reboot that did not come
       forge-reboot --report                  what is due and what runs with replaced files, as one JSON object
       forge-reboot --ask                     reboot now, outside the window too, if one is due; the drain is the same

forge-reboot.timer calls it. It drains first: what apps run beside their servers ends, which may take an hour, while
clients are served; then Nginx announces the end of each connection, closes its ports and finishes what is under way.
Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from datetime import time as clock
from pathlib import Path

# While it exists, each answer of Nginx ends its connection; and for how long that goes on before Nginx stops.
LEAVING = "run/forge-nginx-leaving"
LEAVING_SECONDS = 5
# A host takes less to stop its services, as a rule; one that takes longer does not reboot.
REBOOT_SECONDS = 300
# apt, dpkg, and unattended-upgrades, which lets go of the others between two steps.
PACKAGE_LOCKS = ("var/lib/dpkg/lock-frontend", "var/lib/dpkg/lock", "run/unattended-upgrades.lock")
# What needrestart leaves alone, and only a reboot brings up to date.
DEFERRED = re.compile(r"^(postgresql|dbus|systemd-logind)\b")
# Of `needrestart -b -k`: an upgrade of the running kernel is installed, compatible with it or not.
KERNEL_UPGRADES = ("2", "3")
UNIT = "forge-reboot.service"
ASK_SECONDS = 0.5


@dataclass(frozen=True)
class Window:
    """A span of every day, in local time; it may go over midnight."""

    start: clock
    end: clock

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read a span such as 03:00-04:00.

        Raises:
            ValueError: it is none.
        """
        start, _, end = text.partition("-")
        return cls(clock.fromisoformat(start), clock.fromisoformat(end))

    def includes(self, now: clock) -> bool:
        """Tell whether the window is open."""
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end


@dataclass(frozen=True)
class Host:
    """The host below `root`, which is / but in tests, and how its commands are run."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]] = field(
        default=lambda command: subprocess.run(command, capture_output=True, text=True, check=False)
    )
    sleep: Callable[[float], None] = time.sleep

    @property
    def record(self) -> Path:
        """The reasons for which it was rebooted, until they are gone."""
        return self.root / "var/lib/forge/reboot.json"

    @property
    def stopped(self) -> Path:
        """The units that are stopped for a reboot, one on each line; gone with the unit."""
        return self.root / "run/forge-reboot/stopped"

    @property
    def begun(self) -> Path:
        """Nothing is in the way, and it drains; gone with the unit."""
        return self.root / "run/forge-reboot/begun"

    @property
    def asked(self) -> Path:
        """Somebody wants it now; whoever looks next takes that away."""
        return self.root / "run/forge-reboot-asked"

    @property
    def replacers(self) -> Path:
        """Programs that replace a unit without a loss, each under its name; needrestart calls them."""
        return self.root / "etc/needrestart/restart.d"


def say(text: str) -> None:
    """Tell the journal."""
    print(f"<5>{text}", file=sys.stderr, flush=True)


def alert(text: str) -> None:
    """Tell whoever reads the alerts: one line with priority err, as sd-daemon(3) has it."""
    print(f"<3>ALERT host: {text}", file=sys.stderr, flush=True)


def asked_needrestart(host: Host) -> list[tuple[str, str]]:
    """What needrestart says of the kernel and of each unit that runs with replaced files."""
    looked = host.run(["needrestart", "-b", "-k", "-l"])
    if looked.returncode:
        say(f"needrestart does not tell what is outdated: {' '.join(looked.stderr.split())}")
    parts = [line.partition(": ") for line in looked.stdout.splitlines()]
    return [(name, value) for name, _, value in parts]


def reasons(host: Host, told: Sequence[tuple[str, str]] | None = None) -> set[str]:
    """Why a reboot is due, in words that stay the same until that is over; `told` is what needrestart says."""
    found = set()
    if (host.root / "run/reboot-required").exists():
        listed = host.root / "run/reboot-required.pkgs"
        packages = set(listed.read_text().split()) if listed.exists() else set()
        found |= {f"{package} was updated" for package in packages} or {"an update asks for it"}
    told = asked_needrestart(host) if told is None else told
    kernel = dict(told)
    if kernel.get("NEEDRESTART-KSTA") in KERNEL_UPGRADES:
        found.add(f"kernel {kernel.get('NEEDRESTART-KEXP', '?')} is installed, {kernel.get('NEEDRESTART-KCUR')} runs")
    outdated = [unit for name, unit in told if name == "NEEDRESTART-SVC"]
    return found | {f"{unit} runs with what was replaced" for unit in outdated if DEFERRED.match(unit)}


def report(host: Host) -> dict[str, list[str]]:
    """Why a reboot is due, what one was tried for in vain, and which units can be replaced that should have been."""
    told = asked_needrestart(host)
    present, before = reasons(host, told), recorded(host)
    outdated = {unit for name, unit in told if name == "NEEDRESTART-SVC"}
    return {
        "due": sorted(present - before if before is not None else ()),
        "tried": sorted(present & before if before is not None else present),
        "outdated": sorted(
            unit
            for unit in outdated
            if (host.replacers / unit).exists() and not DEFERRED.match(unit) and not _drains(host, unit)
        ),
    }


def _drains(host: Host, unit: str) -> bool:
    """Whether what is outdated of a unit was replaced already, and finishes what it has."""
    if unit == "nginx.service":
        return (host.root / "run/nginx.pid.oldbin").exists()
    name, _, slot = unit.removesuffix(".service").partition("@")
    live = host.root / "run" / name / "live.sock"
    return live.is_symlink() and live.readlink().name != f"{slot}.sock"


def recorded(host: Host) -> set[str] | None:
    """The reasons for which a reboot was tried; None where nobody can tell."""
    try:
        return set(json.loads(host.record.read_text()))
    except FileNotFoundError:
        return set()
    except ValueError:
        return None


def tried(host: Host, present: set[str]) -> set[str]:
    """Those of the present reasons that a reboot was tried for already; what is over is forgotten."""
    # A damaged record must not let it reboot night by night.
    before = present if (found := recorded(host)) is None else found
    if gone := before - present:
        remember(host, before - gone)
    return before & present


def remember(host: Host, these: set[str]) -> None:
    """Write down for what reasons a reboot was tried, so that a crash leaves the old record or the new."""
    if not these:
        host.record.unlink(missing_ok=True)
        return
    new = host.record.with_suffix(".new")
    with new.open("w") as file:
        json.dump(sorted(these), file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(host.record)


@contextmanager
def obstacles(host: Host) -> Iterator[list[str]]:
    """What is under way, in words; where nothing is, nothing can begin inside the block either."""
    with ExitStack() as stack:
        yield [*_apps(host, stack), *_packages(host, stack), *_inhibitors(host)]


def _apps(host: Host, stack: ExitStack) -> Iterator[str]:
    """Releases, migrations and the like: take the lock that forgectl takes for each, in its own words."""
    for folder in sorted(path.parent for path in (host.root / "var/lib/forge").glob("*/state.json")):
        lock = stack.enter_context((folder / "lock").open("a+"))
        lock.seek(0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield f"{folder.name}: {_field(lock.read(), 'reason') or 'a command'} is under way"
            continue
        lock.truncate()
        holder = {"pid": os.getpid(), "by": "root", "reason": "reboot", "since": time.time()}
        stack.callback(lock.truncate, 0)
        lock.write(json.dumps(holder))
        lock.flush()
        operation = json.loads((folder / "state.json").read_text()).get("operation")
        if operation:
            yield f"{folder.name}: a {operation['action']} is under way ({operation['phase']})"


def _field(text: str, name: str) -> str:
    try:
        return str(json.loads(text)[name])
    except (ValueError, LookupError, TypeError):
        return ""


def _packages(host: Host, stack: ExitStack) -> Iterator[str]:
    """What installs or removes packages."""
    for path in (host.root / name for name in PACKAGE_LOCKS):
        if path.exists():
            lock = stack.enter_context(path.open("r+"))
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                yield f"packages are being installed ({path.name})"
                return


def _inhibitors(host: Host) -> Iterator[str]:
    """Whoever has asked systemd not to go down: systemd-inhibit(1)."""
    login = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
    asked = host.run(["busctl", "--json=short", "call", *login, "ListInhibitors"])
    if asked.returncode:
        yield f"systemd-logind does not tell who inhibits it: {' '.join(asked.stderr.split())}"
        return
    for what, who, why, mode, *_ in json.loads(asked.stdout)["data"][0]:
        if "shutdown" in what.split(":") and mode.startswith("block"):
            yield f"{who} inhibits it: {why}"


def drain(host: Host) -> None:
    """Have commands, then Nginx, finish what is under way and take nothing new; units say how long that may take."""
    host.stopped.parent.mkdir(exist_ok=True)
    running = commands(host)
    # A run that a timer began is not made twice.
    again = [unit for unit in running if "@" in unit or unit.endswith(".timer")]
    if again:
        host.stopped.write_text("".join(f"{unit}\n" for unit in again))
    if running:
        _stop(host, *running)
    if host.run(["systemctl", "is-active", "--quiet", "nginx.service"]).returncode:
        return
    host.stopped.write_text("".join(f"{unit}\n" for unit in ("nginx.service", *again)))
    (host.root / LEAVING).touch()
    host.sleep(LEAVING_SECONDS)
    _stop(host, "nginx.service")


def _stop(host: Host, *units: str) -> None:
    stop = host.run(["systemctl", "stop", *units])
    if stop.returncode:
        say(f"{', '.join(units)} did not stop as it should: {' '.join(stop.stderr.split())}")


def commands(host: Host) -> list[str]:
    """What apps run beside their servers, and the timers of it: units that are NAME.COMMAND, as no other's are."""
    names = sorted(path.parent.name for path in (host.root / "var/lib/forge").glob("*/state.json"))
    patterns = [f"{name}.*.{kind}" for name in names for kind in ("timer", "service")]
    if not patterns:
        return []
    options = ("--plain", "--no-legend", "--state=active,activating,reloading")
    lines = host.run(["systemctl", "list-units", *options, *patterns]).stdout.splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def resume(host: Host) -> int:
    """Start again what was stopped for a reboot that did not come."""
    if not host.stopped.exists() or host.run(["systemctl", "is-system-running"]).stdout.strip() == "stopping":
        return 0
    (host.root / LEAVING).unlink(missing_ok=True)
    units = host.stopped.read_text().split()
    start = host.run(["systemctl", "start", *units])
    if start.returncode:
        what = ", ".join(units)
        alert(f"stopped for a reboot that did not come, {what} does not start: {' '.join(start.stderr.split())}")
        return 1
    host.stopped.unlink()
    say(f"up again: {', '.join(units)}")
    return 0


def reboot(host: Host, why: set[str]) -> int:
    """Reboot, for these reasons; a host that does not go down serves again."""
    host.begun.parent.mkdir(exist_ok=True)
    host.begun.touch()
    try:
        drain(host)
        # Before it is tried: one that ends in a crash is not tried again either.
        remember(host, why)
        asked = host.run(["systemctl", "--check-inhibitors=yes", "reboot"])
        if asked.returncode:
            trouble = f"systemd refuses it: {' '.join(asked.stderr.split())}"
        else:
            # systemd ends this process.
            host.sleep(REBOOT_SECONDS)
            trouble = f"it did not come within {REBOOT_SECONDS} s"
    finally:
        resumed = resume(host)
    alert(f"a reboot was due, but {trouble}; reboot by hand: sudo systemctl reboot")
    return resumed or 1


def look(host: Host, window: Window | None, now: clock) -> int:
    """Look whether a reboot is due and may be; if so, reboot."""
    wanted = host.asked.exists()
    # For this time alone, however it ends.
    host.asked.unlink(missing_ok=True)
    present = reasons(host)
    stuck = tried(host, present)
    if stuck:
        alert(f"a reboot did not mend this, and is not tried again: {'; '.join(sorted(stuck))}")
    due = "; ".join(sorted(present - stuck))
    if not due:
        return 0
    if window is None and not wanted:
        alert(f"a reboot is due ({due}), and base_reboot_window names no time for it: sudo systemctl reboot")
        return 0
    if window and not wanted and not window.includes(now):
        say(f"a reboot is due ({due}); it waits for the window")
        return 0
    with obstacles(host) as found:
        if found:
            say(f"a reboot is due ({due}); it waits, since {'; '.join(found)}")
            return 0
        say(f"rebooting: {due}")
        return reboot(host, present)


def ask(host: Host) -> int:
    """Have the unit reboot now; return once it drains, or fail with what is in the way."""
    began = time.time()
    host.asked.touch()
    start = host.run(["systemctl", "start", "--no-block", UNIT])
    while start.returncode == 0 and not host.begun.exists() and _is_at_work(host):
        host.sleep(ASK_SECONDS)
    if host.begun.exists():
        print("it drains, and goes down then")
        return 0
    host.asked.unlink(missing_ok=True)
    host.run(["journalctl", "--sync"])
    said = host.run(["journalctl", f"--unit={UNIT}", f"--since=@{began:.6f}", "--output=cat", "--no-pager"]).stdout
    why = " ".join((start.stderr or said).split()) or "none is due"
    print(f"forge-reboot: expected to reboot now; found: {why}", file=sys.stderr)
    return 1


def _is_at_work(host: Host) -> bool:
    shown = host.run(["systemctl", "show", "--property=ActiveState,Job", UNIT]).stdout
    found = dict(line.partition("=")[::2] for line in shown.splitlines())
    return found.get("ActiveState") not in ("inactive", "failed") or found.get("Job", "") not in ("", "0")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="forge-reboot", description="Reboot when an update asks for it.")
    parser.add_argument("--window", type=Window.parse, help="when it may, as 03:00-04:00; never without one")
    parser.add_argument("--resume", action="store_true", help="start Nginx again after a reboot that did not come")
    parser.add_argument("--report", action="store_true", help="print what is due, and change nothing")
    parser.add_argument("--ask", action="store_true", help="reboot now, if one is due; needs its service")
    arguments = parser.parse_args()
    host = Host()
    if arguments.report:
        print(json.dumps(report(host)))
        return 0
    if arguments.ask:
        return ask(host)
    if arguments.resume:
        return resume(host)
    return look(host, arguments.window, datetime.now().astimezone().time())


if __name__ == "__main__":
    sys.exit(main())
