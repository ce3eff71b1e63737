"""The program that reboots a host: when it does, when it waits, and that it never does so twice for one reason."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import time
from pathlib import Path

import forge_reboot
import pytest
import yaml
from forge_reboot import LEAVING, Host, Window, ask, look, reasons, report, resume

ROOT = Path(__file__).resolve().parents[2]
OPEN, NOON, WINDOW = time(3, 20), time(12), Window.parse("03:00-04:00")
NOBODY = json.dumps({"type": "a(ssssuu)", "data": [[["sleep:shutdown", "apt", "a delay only", "delay", 0, 1]]]})
# Takes a lock as another process would.
HOLD = """
import fcntl, sys
file = open(sys.argv[2], "r+")
getattr(fcntl, sys.argv[1])(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@dataclass
class Fake:
    """A host in a folder, whose commands answer as they are told to, and how it went."""

    root: Path
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """What there was while Nginx was stopped."""

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Answer a command by the longest beginning that is known; success without a word otherwise."""
        line = " ".join(command)
        self.asked.append(line)
        if line == "systemctl stop nginx.service":
            self.seen += [name for name in (LEAVING, "run/forge-reboot/stopped") if (self.root / name).exists()]
        known = max((each for each in self.answers if line.startswith(each)), key=len, default="")
        status, output = self.answers.get(known, (0, ""))
        return subprocess.CompletedProcess(command, status, output, output if status else "")

    @property
    def host(self) -> Host:
        return Host(self.root, self.run, lambda seconds: self.asked.append(f"sleep {seconds:g}"))

    @property
    def did(self) -> list[str]:
        """What changed the host."""
        changes = ("systemctl stop", "systemctl start", "systemctl --check")
        return [line for line in self.asked if line.startswith(changes)]

    def need(self, *packages: str) -> None:
        """Have packages ask for a reboot."""
        (self.root / "run/reboot-required").touch()
        (self.root / "run/reboot-required.pkgs").write_text("".join(f"{package}\n" for package in packages))

    def boot(self) -> None:
        """Do to /run what a boot does."""
        for path in (self.root / "run").glob("reboot-required*"):
            path.unlink()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """A host on which nothing is under way and nobody asks for a reboot; none that is asked for ever comes."""
    for folder in ("run", "var/lib/dpkg", "var/lib/forge/inbox"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("lock-frontend", "lock"):
        (tmp_path / "var/lib/dpkg" / name).touch()
    (tmp_path / "var/lib/forge/inbox/state.json").write_text('{"operation": null}')
    return Fake(tmp_path, {"busctl": (0, NOBODY)})


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("03:00-04:00", ["03:00", "03:59"], ["02:59", "04:00", "15:30"]),
        ("23:30-00:30", ["23:30", "00:00", "00:29"], ["00:30", "23:29", "12:00"]),
        ("05:00-05:00", ["05:00", "04:59"], []),
    ],
)
def test_window(window: str, inside: list[str], outside: list[str]) -> None:
    parsed = Window.parse(window)
    assert all(parsed.includes(time.fromisoformat(each)) for each in inside)
    assert not any(parsed.includes(time.fromisoformat(each)) for each in outside)


@pytest.mark.parametrize("text", ["", "03:00", "3-4", "03:00-", "03:00-25:00", "night"])
def test_no_window(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Window.parse(text)


def test_nothing_asks_for_it(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(fake.host, WINDOW, OPEN) == 0
    assert (fake.did, said(capsys)) == ([], "")


def test_reasons_are_told_apart(fake: Fake) -> None:
    """By package, by kernel, and by what needrestart leaves alone; what it restarts itself is none."""
    assert reasons(fake.host) == set()
    fake.need("linux-image-6.1.0-31-amd64", "libc6", "libc6")
    fake.answers["needrestart"] = (
        0,
        "NEEDRESTART-VER: 3.6\nNEEDRESTART-KCUR: 6.1.0-30-amd64\nNEEDRESTART-KEXP: 6.1.0-31-amd64\n"
        "NEEDRESTART-KSTA: 3\nNEEDRESTART-SVC: postgresql@15-main.service\nNEEDRESTART-SVC: nginx.service\n"
        "NEEDRESTART-SVC: inbox@blue.service\nNEEDRESTART-SVC: dbus.service\n",
    )
    assert reasons(fake.host) == {
        "linux-image-6.1.0-31-amd64 was updated",
        "libc6 was updated",
        "kernel 6.1.0-31-amd64 is installed, 6.1.0-30-amd64 runs",
        "postgresql@15-main.service runs with what was replaced",
        "dbus.service runs with what was replaced",
    }
    (fake.root / "run/reboot-required.pkgs").unlink()
    fake.answers["needrestart"] = (0, "NEEDRESTART-KCUR: 6.1.0-31-amd64\nNEEDRESTART-KSTA: 1\n")
    assert reasons(fake.host) == {"an update asks for it"}


def test_drains_then_reboots(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Nginx says so on each connection for a while, stops, and only then the host goes down."""
    fake.need("libc6")
    look(fake.host, WINDOW, OPEN)
    drained = [f"sleep {forge_reboot.LEAVING_SECONDS}", "systemctl stop nginx.service"]
    assert fake.asked.index(drained[0]) < fake.asked.index(drained[1])
    assert fake.did[:2] == [drained[1], "systemctl --check-inhibitors=yes reboot"]
    assert fake.seen == [LEAVING, "run/forge-reboot/stopped"]
    assert "<5>rebooting: libc6 was updated\n" in said(capsys)


RUNNING = "inbox.beat@blue.service loaded active running x\ninbox.tick.service loaded active running x\n"
TIMERS = "inbox.tick.timer loaded active waiting x\n"


def test_commands_end_while_clients_are_served(fake: Fake) -> None:
    """Of apps alone; and what a timer began is not made twice by a host that does not go down."""
    fake.need("libc6")
    fake.answers["systemctl list-units"] = (0, RUNNING + TIMERS)
    look(fake.host, WINDOW, OPEN)
    (asked,) = (line for line in fake.asked if line.startswith("systemctl list-units"))
    assert asked.split()[-2:] == ["inbox.*.timer", "inbox.*.service"]
    assert fake.did == [
        "systemctl stop inbox.beat@blue.service inbox.tick.service inbox.tick.timer",
        "systemctl stop nginx.service",
        "systemctl --check-inhibitors=yes reboot",
        "systemctl start nginx.service inbox.beat@blue.service inbox.tick.timer",
    ]


def test_without_nginx_there_is_nothing_to_drain_and_to_start(fake: Fake) -> None:
    fake.need("libc6")
    fake.answers["systemctl is-active"] = (3, "")
    look(fake.host, WINDOW, OPEN)
    assert fake.did == ["systemctl --check-inhibitors=yes reboot"]


@pytest.mark.parametrize(
    ("window", "now", "expected"),
    [
        (WINDOW, NOON, "<5>a reboot is due (libc6 was updated); it waits for the window"),
        (None, OPEN, "<3>ALERT host: a reboot is due (libc6 was updated), and base_reboot_window names no time for it"),
    ],
)
def test_only_in_the_window(
    fake: Fake, capsys: pytest.CaptureFixture[str], window: Window | None, now: time, expected: str
) -> None:
    fake.need("libc6")
    assert look(fake.host, window, now) == 0
    assert fake.did == []
    assert expected in said(capsys)


def by_forgectl(root: Path) -> tuple[str, Path]:
    lock = root / "var/lib/forge/inbox/lock"
    lock.write_text('{"pid": 1, "by": "admin", "reason": "release", "since": 1.0}')
    return "flock", lock


def by_apt(root: Path) -> tuple[str, Path]:
    return "lockf", root / "var/lib/dpkg/lock-frontend"


def by_unattended_upgrades(root: Path) -> tuple[str, Path]:
    lock = root / "run/unattended-upgrades.lock"
    lock.touch()
    return "lockf", lock


@pytest.mark.parametrize(
    ("holder", "expected"),
    [
        (by_forgectl, "inbox: release is under way"),
        (by_apt, "packages are being installed (lock-frontend)"),
        (by_unattended_upgrades, "packages are being installed (unattended-upgrades.lock)"),
    ],
)
def test_waits_for_whoever_holds_a_lock(
    fake: Fake,
    capsys: pytest.CaptureFixture[str],
    holder: Callable[[Path], tuple[str, Path]],
    expected: str,
) -> None:
    """And reboots when that is over, without a trace of having waited."""
    fake.need("libc6")
    command = [sys.executable, "-c", HOLD, *map(str, holder(fake.root))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        assert look(fake.host, WINDOW, OPEN) == 0
        assert fake.did == []
        assert f"it waits, since {expected}" in said(capsys)
        process.communicate()
    look(fake.host, WINDOW, OPEN)
    assert "systemctl --check-inhibitors=yes reboot" in fake.did


@pytest.mark.parametrize("phase", ["maintenance", "starting", "watching", "draining"])
def test_waits_for_a_cutover_that_holds_no_lock(fake: Fake, capsys: pytest.CaptureFixture[str], phase: str) -> None:
    fake.need("libc6")
    state = {"operation": {"phase": phase, "action": "release"}}
    (fake.root / "var/lib/forge/inbox/state.json").write_text(json.dumps(state))
    look(fake.host, WINDOW, OPEN)
    assert fake.did == []
    assert f"inbox: a release is under way ({phase})" in said(capsys)


@pytest.mark.parametrize(
    ("what", "mode", "blocks"),
    [
        ("shutdown", "block", True),
        ("sleep:shutdown", "block-weak", True),
        ("shutdown", "delay", False),
        ("sleep", "block", False),
    ],
)
def test_waits_for_inhibitors(
    fake: Fake, capsys: pytest.CaptureFixture[str], what: str, mode: str, *, blocks: bool
) -> None:
    fake.need("libc6")
    fake.answers["busctl"] = (0, json.dumps({"data": [[[what, "backup", "it copies", mode, 0, 7]]]}))
    look(fake.host, WINDOW, OPEN)
    assert ("systemctl --check-inhibitors=yes reboot" not in fake.did) == blocks
    assert ("it waits, since backup inhibits it: it copies" in said(capsys)) == blocks


def test_waits_while_nobody_tells_of_inhibitors(fake: Fake) -> None:
    fake.need("libc6")
    fake.answers["busctl"] = (1, "no such name")
    look(fake.host, WINDOW, OPEN)
    assert fake.did == []


def test_nothing_begins_while_it_drains(fake: Fake) -> None:
    """A release or apt that comes meanwhile finds the locks taken, and by whom."""
    fake.need("libc6")
    found: list[object] = []

    def probe(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if list(command) == ["systemctl", "stop", "nginx.service"]:
            lock = fake.root / "var/lib/forge/inbox/lock"
            with lock.open("a+") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(json.loads(lock.read_text())["reason"])
            code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
            taken = [sys.executable, "-c", code, str(fake.root / "var/lib/dpkg/lock-frontend")]
            found.append(subprocess.run(taken, capture_output=True, check=False).returncode)
        return fake.run(command)

    look(Host(fake.root, probe, lambda _: None), WINDOW, OPEN)
    assert found == ["reboot", 1]
    assert (fake.root / "var/lib/forge/inbox/lock").read_text() == ""


@pytest.mark.parametrize("answer", [(1, "Operation inhibited"), (0, "")])
def test_a_reboot_that_does_not_come_leaves_nginx_serving(
    fake: Fake, capsys: pytest.CaptureFixture[str], answer: tuple[int, str]
) -> None:
    """Refused, or accepted and not carried out: the host serves, an alert says so, and it is not tried again."""
    fake.need("libc6")
    fake.answers["systemctl --check-inhibitors"] = answer
    assert look(fake.host, WINDOW, OPEN) == 1
    assert fake.did[-1] == "systemctl start nginx.service"
    assert not (fake.root / LEAVING).exists()
    assert "<3>ALERT host: a reboot was due, but" in said(capsys)
    fake.asked.clear()
    assert look(fake.host, WINDOW, OPEN) == 0
    assert fake.did == []
    assert "<3>ALERT host: a reboot did not mend this, and is not tried again: libc6 was updated" in said(capsys)


def test_whatever_ends_it_leaves_nginx_serving(fake: Fake) -> None:
    """Killed between the drain and the reboot: what systemd runs after it starts Nginx; but not at a shutdown."""
    marker = fake.root / "run/forge-reboot/stopped"
    marker.parent.mkdir()
    marker.write_text("nginx.service\n")
    fake.answers["systemctl is-system-running"] = (1, "stopping\n")
    assert resume(fake.host) == 0
    assert fake.did == []
    fake.answers["systemctl is-system-running"] = (0, "running\n")
    assert resume(fake.host) == 0
    assert fake.did == ["systemctl start nginx.service"]
    assert resume(fake.host) == 0
    assert fake.did == ["systemctl start nginx.service"]


def test_once_for_each_reason(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """What a boot did not mend is reported; what is new reboots; what was mended may ask for it again."""
    stuck = "NEEDRESTART-KCUR: 6.1.0-30\nNEEDRESTART-KEXP: 6.1.0-31\nNEEDRESTART-KSTA: 3\n"
    fake.answers["needrestart"] = (0, stuck)
    fake.need("libc6")
    look(fake.host, WINDOW, OPEN)
    fake.boot()
    fake.asked.clear()
    said(capsys)
    for _ in range(3):
        assert look(fake.host, WINDOW, OPEN) == 0
        assert fake.did == []
        assert "ALERT host: a reboot did not mend this" in said(capsys)
    fake.need("libc6")
    look(fake.host, WINDOW, OPEN)
    assert "systemctl --check-inhibitors=yes reboot" in fake.did
    fake.boot()
    fake.answers["needrestart"] = (0, "")
    look(fake.host, WINDOW, OPEN)
    assert not fake.host.record.exists()


def test_a_damaged_record_reboots_nothing(fake: Fake) -> None:
    fake.need("libc6")
    fake.host.record.write_text('["libc6 was')
    look(fake.host, WINDOW, OPEN)
    assert fake.did == []


def test_the_flag_is_the_one_that_nginx_looks_for() -> None:
    nginx = yaml.safe_load((ROOT / "roles/nginx/vars/main.yml").read_text())
    assert nginx["__nginx_leaving"] == f"/{LEAVING}"
    assert nginx["__nginx_leaving_seconds"] == forge_reboot.LEAVING_SECONDS


def test_report_names_no_unit_twice_that_was_replaced(fake: Fake) -> None:
    """An old Nginx and an old slot that finish what they have; and what waits for a reboot."""
    fake.host.replacers.mkdir(parents=True)
    units = ("nginx.service", "inbox@blue.service", "inbox@green.service", "dbus.service")
    for unit in units:
        (fake.host.replacers / unit).touch()
    fake.answers["needrestart"] = (0, "".join(f"NEEDRESTART-SVC: {unit}\n" for unit in units))
    (fake.root / "run/inbox").mkdir()
    (fake.root / "run/inbox/live.sock").symlink_to("blue.sock")
    assert report(fake.host)["outdated"] == ["inbox@blue.service", "nginx.service"]
    (fake.root / "run/nginx.pid.oldbin").touch()
    assert report(fake.host)["outdated"] == ["inbox@blue.service"]


def test_report_changes_nothing(fake: Fake) -> None:
    """What is due, what was tried in vain, and what is outdated though something replaces it without a loss."""
    fake.need("libc6", "dbus")
    fake.host.record.write_text('["dbus was updated", "gone meanwhile"]')
    fake.host.replacers.mkdir(parents=True)
    (fake.host.replacers / "nginx.service").touch()
    fake.answers["needrestart"] = (
        0,
        "NEEDRESTART-SVC: nginx.service\nNEEDRESTART-SVC: getty@tty1.service\n"
        "NEEDRESTART-SVC: postgresql@15-main.service\n",
    )
    before = fake.host.record.read_text()
    assert report(fake.host) == {
        "due": ["libc6 was updated", "postgresql@15-main.service runs with what was replaced"],
        "tried": ["dbus was updated"],
        "outdated": ["nginx.service"],
    }
    assert (fake.host.record.read_text(), fake.did) == (before, [])
    fake.host.record.write_text("{")
    assert report(fake.host)["due"] == []
    fake.host.record.unlink()
    fake.boot()
    assert report(fake.host)["due"] == ["postgresql@15-main.service runs with what was replaced"]


@pytest.mark.parametrize("window", [WINDOW, None])
def test_asked_for_it_reboots_at_any_time_once(fake: Fake, window: Window | None) -> None:
    fake.need("libc6")
    fake.host.asked.touch()
    look(fake.host, window, NOON)
    assert "systemctl --check-inhibitors=yes reboot" in fake.did
    assert not fake.host.asked.exists()


def test_asked_for_it_waits_for_what_is_under_way(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """And is not remembered: whoever asked was told."""
    fake.need("libc6")
    fake.host.asked.touch()
    lock = fake.root / "var/lib/forge/inbox/lock"
    lock.touch()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        look(fake.host, WINDOW, NOON)
    assert "it waits, since inbox:" in said(capsys)
    assert (fake.did, fake.host.asked.exists()) == ([], False)
    look(fake.host, WINDOW, NOON)
    assert fake.did == []


@pytest.mark.parametrize(
    ("begins", "says", "ended"),
    [(True, "", 0), (False, "it waits, since a migration is under way\n", 1), (False, "", 1)],
)
def test_asking(fake: Fake, capsys: pytest.CaptureFixture[str], begins: bool, says: str, ended: int) -> None:
    """Returns when it drains, and fails with what is in the way."""
    states = iter(
        ["ActiveState=inactive\nJob=77\n", "ActiveState=activating\nJob=77\n", "ActiveState=inactive\nJob=\n"]
    )

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        answer = fake.run(command)
        if command[1] == "show":
            answer.stdout = next(states)
            if begins and "activating" in answer.stdout:
                fake.host.begun.parent.mkdir()
                fake.host.begun.touch()
        return answer

    fake.answers["journalctl --unit"] = (0, says)
    assert ask(Host(fake.root, run, lambda _: None)) == ended
    assert "systemctl start --no-block forge-reboot.service" in fake.asked
    assert fake.host.asked.exists() is begins
    if ended:
        assert (says.strip() or "none is due") in said(capsys)
