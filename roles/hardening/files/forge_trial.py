#!/usr/bin/python3
"""Try a new configuration of SSH and the firewall: it stays if somebody comes in by a new connection, or is undone.

`begin` reads a plan from its input, puts the new files in place and arms a timer that undoes them. `confirm` keeps
them, but only when it is called over an SSH connection from elsewhere that came in after they were in force: one from
before proves nothing. `undo` puts the old files back; the timer calls it, and the next boot if there is still something
to undo. Whoever is locked out has to wait for the timer, and nobody has to be there.

The old files stay on the disk under another name, so that undoing is a rename: it works on a full disk. Being killed
between any two steps leaves something that the timer, the next boot or the next `begin` puts right.
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROGRAM = "/usr/local/sbin/forge-trial"
SSH_UNIT = "ssh.service"
FIREWALL_UNIT = "forge-firewall.service"
# sshd takes a moment to begin anew after the signal; what the old one still accepts must not pass for a new connection.
SETTLE_SECONDS = 1.0
COMMAND_SECONDS = 30
SSHD = ("sshd", "sshd-session")
INCLUDE = re.compile(r"(?im)^(\s*include\s+)(?:/etc/ssh/)?sshd_config\.d/")


class TrialError(Exception):
    """Something that an operator has to know; nothing of the host's configuration has changed, unless it says so."""


@dataclass(frozen=True)
class Record:
    """A trial under way, as it is written down before anything changes.

    Attributes:
        id: What whoever began it confirms it by.
        seconds: How long it lasts.
        existed: For each file, whether there was one before.
        ssh_active: Whether sshd ran as a service rather than for each connection.
        in_force: When the new configuration was in force, in seconds since the machine started; 0 before that.
    """

    id: str
    seconds: int
    existed: dict[str, bool]
    ssh_active: bool
    in_force: float = 0.0


class Trial:
    """The host below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.files = {
            "ssh": root / "etc/ssh/sshd_config.d/00-forge.conf",
            "firewall": root / "etc/forge/firewall.nft",
        }
        self.record = root / "var/lib/forge-trial/pending.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock; it ends with its holder."""
        path = self.root / "run/forge-trial.lock"
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def compare(self, wanted: dict[str, str]) -> dict[str, Any]:
        """Return whether something has to be done, and the present content of what differs."""
        before = {name: _read(self.files[name]) for name in wanted}
        differs = {name: before[name] for name, content in wanted.items() if before[name] != content}
        return {"changed": bool(differs) or not self.firewall_loaded(), "before": differs}

    def begin(self, wanted: dict[str, str], seconds: int) -> dict[str, Any]:
        """Put the files of the plan into force for a while; a trial that is under way is undone first.

        Raises:
            TrialError: the new configuration is no good, or could not be put into force; the old one is.
        """
        with self.alone():
            self.finish()
            answer = self.compare(wanted)
            if not answer["changed"]:
                return answer
            changing = {self.files[name]: wanted[name] for name in answer["before"]}
            self.check(wanted)
            record = Record(
                secrets.token_hex(8), seconds, {str(path): path.exists() for path in changing}, self.ssh_active()
            )
            try:
                self.prepare(changing)
                self.write(record)
                self.arm(record)
                for path in changing:
                    path.with_name(f".{path.name}.new").replace(path)
                    _sync(path.parent)
                self.apply(record)
                time.sleep(SETTLE_SECONDS)
                self.write(Record(**asdict(record) | {"in_force": _now()}))
            except (OSError, subprocess.SubprocessError, TrialError) as error:
                self.finish()
                self.disarm(record.id)
                raise TrialError(f"{_reason(error)}; the old configuration is in force") from error
            return answer | {"id": record.id, "seconds": seconds}

    def confirm(self, identity: str, process: int) -> None:
        """Keep what is being tried.

        Raises:
            TrialError: there is no such trial any more, or `process` does not belong to a new connection.
        """
        with self.alone():
            record = self.pending()
            if record is None or record.id != identity or not record.in_force:
                raise TrialError("this trial is over: the old configuration is back in force")
            self.judge(process, record.in_force)
            # From here on it is confirmed; the rest is tidying up, which the next trial would do as well.
            self.record.unlink()
            _sync(self.record.parent)
            self.disarm(record.id)
            self.tidy()

    def undo(self, identity: str | None, *, boot: bool) -> bool:
        """Put the old files back if that trial, or any, is under way; at boot nothing has read the new ones yet."""
        with self.alone():
            record = self.pending()
            if record is None or identity not in (None, record.id):
                return False
            self.restore(record, running=not boot)
            if identity is None and not boot:
                self.disarm(record.id)
            return True

    def finish(self) -> None:
        """Undo a trial that is under way, and remove what a killed one left."""
        if (record := self.pending()) is not None:
            self.restore(record, running=True)
            self.disarm(record.id)
        self.tidy()

    # Steps

    def check(self, wanted: dict[str, str]) -> None:
        """Test both files, as parts of a whole, before they are anywhere where somebody reads them."""
        with tempfile.TemporaryDirectory(dir=self.root / "run") as name:
            folder = Path(name)
            (folder / "sshd_config.d").mkdir()
            own = self.files["ssh"]
            for path in own.parent.glob("*.conf"):
                if path != own:
                    (folder / "sshd_config.d" / path.name).symlink_to(path)
            (folder / "sshd_config.d" / own.name).write_text(wanted["ssh"])
            main, found = INCLUDE.subn(
                lambda match: f"{match[1]}{folder}/sshd_config.d/", (self.root / "etc/ssh/sshd_config").read_text()
            )
            if not found:
                raise TrialError(f"/etc/ssh/sshd_config does not include {own.parent}")
            (folder / "sshd_config").write_text(main)
            (folder / "firewall.nft").write_text(wanted["firewall"])
            effective = _run("sshd", "-T", "-f", str(folder / "sshd_config"))
            if "passwordauthentication no" not in effective.splitlines():
                raise TrialError(f"a file that sshd reads before {own} allows passwords")
            _run("nft", "--check", "--file", str(folder / "firewall.nft"))

    def prepare(self, changing: dict[Path, str]) -> None:
        """Lay the new files beside the old ones, and give the old ones a second name."""
        for path, content in changing.items():
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.new")
            _write(new, content)
            if path.exists():
                os.link(path, path.with_name(f".{path.name}.before"))
            _sync(path.parent)

    def write(self, record: Record) -> None:
        """Write the record down, whole."""
        self.record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.record.with_suffix(".new")
        _write(new, json.dumps(asdict(record)))
        new.replace(self.record)
        _sync(self.record.parent)

    def pending(self) -> Record | None:
        """Return the trial that is under way."""
        content = _read(self.record)
        return None if content is None else Record(**json.loads(content))

    def arm(self, record: Record) -> None:
        """Have systemd undo the trial, whatever becomes of this process and of the connection."""
        timing = (f"--on-active={record.seconds}s", "--timer-property=AccuracySec=100ms")
        again = ("--property=Restart=on-failure", "--property=RestartSec=5s")
        unit = ("--quiet", "--collect", f"--unit={_unit(record.id)}")
        _run("systemd-run", *unit, *timing, *again, PROGRAM, "undo", record.id)

    def disarm(self, identity: str) -> None:
        """Take the timer away; where that fails it finds nothing to do."""
        with suppress(TrialError):
            _run("systemctl", "stop", f"{_unit(identity)}.timer")

    def restore(self, record: Record, *, running: bool) -> None:
        """Put the old files back and into force. Each step may have been done before."""
        for name, existed in record.existed.items():
            path = Path(name)
            before = path.with_name(f".{path.name}.before")
            if before.exists():
                # A rename of one name of a file onto another of the same file would do nothing.
                before.replace(path) if not _same(before, path) else before.unlink()
            elif not existed:
                path.unlink(missing_ok=True)
            _sync(path.parent)
        if running:
            self.apply(record)
        self.record.unlink(missing_ok=True)
        _sync(self.record.parent)

    def tidy(self) -> None:
        """Remove what lies beside the files; only when no trial is under way."""
        for path in self.files.values():
            for ending in ("new", "before"):
                path.with_name(f".{path.name}.{ending}").unlink(missing_ok=True)

    def apply(self, record: Record) -> None:
        """Have the firewall and sshd read their files."""
        if self.files["firewall"].exists():
            _run("systemctl", "reload-or-restart", FIREWALL_UNIT)
        else:
            _run("systemctl", "stop", FIREWALL_UNIT)
        if record.ssh_active:
            # One that ended over a bad configuration may have been started too often to be started again.
            _run("systemctl", "reset-failed", SSH_UNIT)
            _run("systemctl", "reload-or-restart", SSH_UNIT)

    def judge(self, process: int, in_force: float) -> None:
        """Refuse whoever did not come in by a new connection from elsewhere.

        Raises:
            TrialError: it says why.
        """
        sockets = _run("ss", "-Htnp", "state", "established")
        listening = _pids(_run("ss", "-Hltnp"))
        chain = [item for item in _ancestors(self.root / "proc", process) if item[0] not in listening]
        if not chain:
            raise TrialError("expected an SSH session; found none above this process")
        # The first process of a connection is there before anybody has logged in on it.
        if chain[-1][1] < in_force:
            raise TrialError("expected a new connection; found one from before the change, which proves nothing")
        peers = {_peer(line) for line in sockets.splitlines() if _pids(line) & {pid for pid, _ in chain}}
        if not peers:
            raise TrialError("expected a connection of that SSH session; found none")
        for peer in peers:
            if ipaddress.ip_address(peer).is_loopback or '"local"' in _run("ip", "-json", "route", "get", peer):
                raise TrialError(f"expected a connection from elsewhere; found one from this host, {peer}")

    def ssh_active(self) -> bool:
        """Tell whether sshd runs as a service."""
        return subprocess.run(("systemctl", "is-active", "--quiet", SSH_UNIT), check=False).returncode == 0

    def firewall_loaded(self) -> bool:
        """Tell whether the kernel has the table."""
        command = ("nft", "list", "table", "inet", "forge")
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _unit(identity: str) -> str:
    return f"forge-trial-{identity}"


def _run(*command: str) -> str:
    """Run a command and return what it prints.

    Raises:
        TrialError: it failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise TrialError(f"{' '.join(command[:2])}: {said}")
    return done.stdout


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _write(path: Path, content: str) -> None:
    """Write a file that is on the disk when this returns."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _now() -> float:
    """Return the seconds since the machine started, which is how the kernel dates processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _ancestors(proc: Path, process: int) -> Iterator[tuple[int, float]]:
    """Yield those processes of sshd that are above `process`, with when they began; the nearest first."""
    while process > 1:
        # The name, in parentheses, may hold anything.
        fields = (proc / str(process) / "stat").read_text().rpartition(")")[2].split()
        with suppress(OSError):
            if (proc / str(process) / "exe").readlink().name.removesuffix(" (deleted)") in SSHD:
                yield process, int(fields[19]) / os.sysconf("SC_CLK_TCK")
        process = int(fields[1])


def _pids(listing: str) -> set[int]:
    return {int(number) for number in re.findall(r"pid=(\d+)", listing)}


def _peer(line: str) -> str:
    """Return the address of the other side in a line of `ss` with one state."""
    return line.split()[3].rpartition(":")[0].strip("[]").partition("%")[0].removeprefix("::ffff:")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("begin", help="try what the plan on the input says")
    begin.add_argument("--check", action="store_true", help="only say what would change")
    confirm = commands.add_parser("confirm", help="keep it; over a new SSH connection")
    confirm.add_argument("id")
    undo = commands.add_parser("undo", help="put the old configuration back now")
    undo.add_argument("id", nargs="?", help="only if this trial is under way")
    undo.add_argument("--boot", action="store_true", help="the services are yet to start")
    commands.add_parser("status", help="the trial that is under way")
    arguments = parser.parse_args()
    trial = Trial()
    try:
        if arguments.command == "begin":
            plan = json.load(sys.stdin)
            wanted = {name: plan[name] for name in trial.files}
            answer = trial.compare(wanted) if arguments.check else trial.begin(wanted, plan["seconds"])
            print(json.dumps(answer))
        elif arguments.command == "confirm":
            trial.confirm(arguments.id, os.getpid())
            print("confirmed")
        elif arguments.command == "undo":
            done = trial.undo(arguments.id, boot=arguments.boot)
            print("the old configuration of SSH and the firewall is back" if done else "there is nothing to undo")
        else:
            record = trial.pending()
            print(json.dumps(None if record is None else asdict(record)))
    except (TrialError, OSError, subprocess.SubprocessError) as error:
        print(f"forge-trial: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
