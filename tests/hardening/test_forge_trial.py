"""`forge-trial` on a host of files and stand-ins for its commands: whatever becomes of it, the old state comes back."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forge_trial
import pytest
from forge_trial import Record, Trial, TrialError

OLD = {"ssh": "PasswordAuthentication no # old\n", "firewall": "# old\n"}
NEW = {"ssh": "PasswordAuthentication no # new\n", "firewall": "# new\n"}
HERE = "203.0.113.10"
AWAY = "198.51.100.7"
MAIN = "# The distribution's\nInclude /etc/ssh/sshd_config.d/*.conf\n"
BEGAN = 5000.0
LISTENER, MONITOR, SESSION, SHELL, TMUX = 100, 200, 201, 202, 300


class Killed(BaseException):
    """What SIGKILL is to a process: nothing of it runs afterwards."""


class Host:
    """What the program's commands would have done: which files are in force, and which timers are armed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.force: dict[str, str | None] = {"ssh": None, "firewall": None}
        self.timers: set[str] = set()
        self.broken: set[str] = set()
        self.listening = f'LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid={LISTENER},fd=3))\n'
        self.peer = AWAY
        self.trial = Trial(root)

    def run(self, *command: str) -> str:
        """Stand in for the commands."""
        if " ".join(command[:3]) in self.broken or command[0] in self.broken:
            raise TrialError(f"{command[0]} failed")
        match command:
            case ("systemctl", "reload-or-restart", unit):
                name = "ssh" if unit == "ssh.service" else "firewall"
                self.force[name] = self.trial.files[name].read_text() if self.trial.files[name].exists() else None
            case ("systemctl", "stop", "forge-firewall.service"):
                self.force["firewall"] = None
            case ("systemctl", "stop", timer):
                self.timers.discard(timer.removesuffix(".timer"))
            case ("systemd-run", *options):
                self.timers.add(next(option for option in options if option.startswith("--unit=")).partition("=")[2])
            case ("sshd", "-T", "-f", main):
                drop_ins = sorted((Path(main).parent / "sshd_config.d").glob("*.conf"))
                return "port 22\n" + drop_ins[0].read_text().lower().partition(" #")[0] + "\n"
            case ("ss", "-Htnp", *_):
                return (
                    f'0 0 {HERE}:22 {self.peer}:4711 users:(("sshd",pid={SESSION},fd=4),("sshd",pid={MONITOR},fd=4))\n'
                )
            case ("ss", "-Hltnp"):
                return self.listening
            case ("ip", *_, address):
                return json.dumps([{"type": "local"}] if address == HERE else [{"dst": address}])
        return ""

    def processes(self, began: float) -> None:
        """A session of sshd that came in at `began`, and a terminal multiplexer that nobody's session is above."""
        self.process(LISTENER, 1, "/usr/sbin/sshd", 10.0)
        self.process(MONITOR, LISTENER, "/usr/lib/openssh/sshd-session", began)
        self.process(SESSION, MONITOR, "/usr/lib/openssh/sshd-session", BEGAN + 1000)
        self.process(SHELL, SESSION, "/usr/bin/bash", BEGAN + 1000)
        self.process(TMUX, 1, "/usr/bin/tmux", BEGAN + 1000)

    def process(self, pid: int, parent: int, program: str, began: float) -> None:
        """Lay out what /proc says of a process."""
        folder = self.root / "proc" / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        ticks = int(began * os.sysconf("SC_CLK_TCK"))
        (folder / "stat").write_text(f"{pid} (a (name) S) S {parent} {' '.join(['0'] * 17)} {ticks} 0\n")
        (folder / "exe").unlink(missing_ok=True)
        (folder / "exe").symlink_to(program)

    def state(self) -> dict[str, Any]:
        """All that a trial may change: what lies in the folders, and what is in force."""
        folders = [path.parent for path in self.trial.files.values() if path.parent.exists()]
        files = {str(path): path.read_text() for folder in folders for path in folder.iterdir()}
        return {"files": files, "force": dict(self.force), "pending": self.trial.pending()}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host that was never provisioned."""
    for name in ("etc/ssh/sshd_config.d", "run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/ssh/sshd_config").write_text(MAIN)
    (tmp_path / "etc/ssh/sshd_config.d/provider.conf").write_text("PasswordAuthentication yes\n")
    made = Host(tmp_path)
    monkeypatch.setattr(forge_trial, "_run", made.run)
    monkeypatch.setattr(forge_trial, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(forge_trial, "_now", lambda: BEGAN)
    monkeypatch.setattr(Trial, "ssh_active", lambda _: True)
    monkeypatch.setattr(Trial, "firewall_loaded", lambda _: made.force["firewall"] is not None)
    return made


@pytest.fixture
def provisioned(host: Host) -> Host:
    """One that was."""
    for name, content in OLD.items():
        host.trial.files[name].parent.mkdir(exist_ok=True)
        host.trial.files[name].write_text(content)
        host.force[name] = content
    return host


def steps(monkeypatch: pytest.MonkeyPatch, last: int) -> Callable[[], int]:
    """Kill whoever takes more than `last` steps; return what counts them."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if count == last:
                raise Killed
            count += 1
            return function(*arguments, **options)

        return step

    for name in ("_run", "_write", "_sync"):
        monkeypatch.setattr(forge_trial, name, counted(getattr(forge_trial, name)))
    monkeypatch.setattr(os, "link", counted(os.link))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    return lambda: count


def test_nothing_to_change(provisioned: Host) -> None:
    """No trial."""
    before = provisioned.state()
    assert provisioned.trial.begin(OLD, 60) == {"changed": False, "before": {}}
    assert provisioned.state() == before
    assert not provisioned.timers


def test_confirmed(provisioned: Host) -> None:
    """The new files stay, nothing lies beside them, and no timer is left; a later undo finds nothing to do."""
    answer = provisioned.trial.begin(NEW, 60)
    assert (answer["changed"], answer["before"]) == (True, OLD)
    assert provisioned.timers == {f"forge-trial-{answer['id']}"}
    provisioned.processes(began=BEGAN + 0.5)
    provisioned.trial.confirm(answer["id"], SHELL)
    assert provisioned.force == NEW
    assert {path.name: path.read_text() for path in provisioned.trial.files["ssh"].parent.iterdir()} == {
        "00-forge.conf": NEW["ssh"],
        "provider.conf": "PasswordAuthentication yes\n",
    }
    assert [path.name for path in provisioned.trial.files["firewall"].parent.iterdir()] == ["firewall.nft"]
    assert not provisioned.timers
    assert not provisioned.trial.undo(answer["id"], boot=False)
    assert provisioned.force == NEW


@pytest.mark.parametrize("boot", [False, True])
@pytest.mark.parametrize("name", ["host", "provisioned"])
def test_undone(name: str, boot: bool, request: pytest.FixtureRequest) -> None:
    """Everything is as before, on a host that had none of the files as well."""
    host: Host = request.getfixturevalue(name)
    before = host.state()
    answer = host.trial.begin(NEW, 60)
    assert host.state()["force"] == NEW
    if boot:
        # Nothing has been started yet.
        host.force = dict(before["force"])
    assert host.trial.undo(answer["id"], boot=boot)
    assert host.state() == before


def test_only_one_file_changes(provisioned: Host) -> None:
    """The other one is left alone, its inode as well."""
    inode = provisioned.trial.files["firewall"].stat().st_ino
    answer = provisioned.trial.begin(OLD | {"ssh": NEW["ssh"]}, 60)
    assert answer["before"] == {"ssh": OLD["ssh"]}
    assert provisioned.trial.undo(None, boot=False)
    assert provisioned.trial.files["firewall"].stat().st_ino == inode
    assert provisioned.force == OLD


def test_rules_that_are_gone_are_loaded_again(provisioned: Host) -> None:
    """Somebody flushed the tables by hand: that needs a trial, too."""
    provisioned.force["firewall"] = None
    answer = provisioned.trial.begin(OLD, 60)
    assert (answer["changed"], answer["before"]) == (True, {})
    assert provisioned.force == OLD
    assert answer["id"] in next(iter(provisioned.timers))


def test_a_second_trial_undoes_the_first(provisioned: Host) -> None:
    """What nobody confirmed is not what the second one goes back to; and the first can't be confirmed any more."""
    first = provisioned.trial.begin(NEW, 60)
    newest = {"ssh": "PasswordAuthentication no # newest\n", "firewall": "# newest\n"}
    second = provisioned.trial.begin(newest, 60)
    assert second["before"] == OLD
    assert provisioned.timers == {f"forge-trial-{second['id']}"}
    provisioned.processes(began=BEGAN + 1)
    with pytest.raises(TrialError, match="this trial is over"):
        provisioned.trial.confirm(first["id"], SHELL)
    assert not provisioned.trial.undo(first["id"], boot=False)
    assert provisioned.force == newest
    provisioned.trial.undo(second["id"], boot=False)
    assert provisioned.force == OLD


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("sshd", "sshd failed"),
        ("nft", "nft failed"),
        ("systemd-run", "systemd-run failed; the old configuration is in force"),
    ],
)
def test_what_is_no_good_changes_nothing(provisioned: Host, broken: str, message: str) -> None:
    """Neither a file nor what is in force."""
    before = provisioned.state()
    provisioned.broken.add(broken)
    with pytest.raises(TrialError, match=message):
        provisioned.trial.begin(NEW, 60)
    assert provisioned.state() == before


def test_passwords_that_another_file_allows(provisioned: Host) -> None:
    """A file that sshd reads first."""
    (provisioned.root / "etc/ssh/sshd_config.d/00-aaa.conf").write_text("PasswordAuthentication yes\n")
    before = provisioned.state()
    with pytest.raises(TrialError, match="allows passwords"):
        provisioned.trial.begin(NEW, 60)
    (provisioned.root / "etc/ssh/sshd_config").write_text("# no Include\n")
    with pytest.raises(TrialError, match="does not include"):
        provisioned.trial.begin(NEW, 60)
    assert provisioned.state() == before


def test_a_full_disk(provisioned: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full from the start: nothing changes. Full during the trial: it can still be undone, without a write."""

    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, f"No space left on device: {path} ({len(content)})")

    before = provisioned.state()
    with monkeypatch.context() as patch:
        patch.setattr(forge_trial, "_write", full)
        with pytest.raises(TrialError, match="No space left"):
            provisioned.trial.begin(NEW, 60)
    assert provisioned.state() == before
    provisioned.trial.begin(NEW, 60)
    with monkeypatch.context() as patch:
        patch.setattr(forge_trial, "_write", full)
        assert provisioned.trial.undo(None, boot=False)
    assert provisioned.state() == before


def killed_at_every_step(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Have `act` killed before its first step, its second, and so on; yield whether it was."""
    last = 0
    while True:
        with monkeypatch.context() as patch:
            counted = steps(patch, last)
            try:
                act()
            except Killed:
                assert counted() == last
                killed = True
            else:
                killed = False
        yield killed
        if not killed:
            return
        last += 1


@pytest.mark.parametrize("rescue", ["timer", "boot", "begin"])
@pytest.mark.parametrize("name", ["host", "provisioned"])
def test_killed_while_it_begins(
    name: str, rescue: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever step: the timer, a reboot or the next run puts it back; without a timer there is nothing to."""
    host: Host = request.getfixturevalue(name)
    before = host.state()
    rounds = 0
    for killed in killed_at_every_step(lambda: host.trial.begin(NEW, 60), monkeypatch):
        rounds += 1
        files = {name: path.read_text() for name, path in host.trial.files.items() if path.exists()}
        if rescue == "timer":
            if not host.timers:
                # Whoever reads the files finds the old ones.
                assert files == ({} if name == "host" else OLD)
                assert host.force == before["force"]
            for timer in list(host.timers):
                host.timers.discard(timer)
                host.trial.undo(timer.removeprefix("forge-trial-"), boot=False)
            host.trial.undo(None, boot=False)
        elif rescue == "boot":
            host.timers.clear()
            host.trial.undo(None, boot=True)
            host.force = {name: path.read_text() if path.exists() else None for name, path in host.trial.files.items()}
        # The next run that wants what is there.
        host.trial.finish()
        assert host.state() == before, f"killed at step {rounds}" if killed else "undone"
        assert not host.timers
    assert rounds > 15


@pytest.mark.parametrize("boot", [False, True])
@pytest.mark.parametrize("name", ["host", "provisioned"])
def test_killed_while_it_undoes(
    name: str, boot: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd starts it again, or the next boot does."""
    host: Host = request.getfixturevalue(name)
    before = host.state()

    def act() -> None:
        host.trial.undo(None, boot=boot)

    host.trial.begin(NEW, 60)
    rounds = 0
    for _ in killed_at_every_step(act, monkeypatch):
        rounds += 1
        host.trial.undo(None, boot=boot)
        if boot:
            host.force = dict(before["force"])
        assert host.state() == before
        host.trial.begin(NEW, 60)
    assert rounds > 4


def test_killed_while_it_confirms(provisioned: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either it is confirmed, and stays so, or it is undone: never something in between."""
    outcomes = set()
    begun: dict[str, Any] = {}

    def act() -> None:
        provisioned.trial.confirm(begun["id"], SHELL)

    begun = provisioned.trial.begin(NEW, 60)
    provisioned.processes(began=BEGAN + 1)
    for _ in killed_at_every_step(act, monkeypatch):
        provisioned.trial.undo(begun["id"], boot=False)
        provisioned.trial.finish()
        assert provisioned.force in (OLD, NEW)
        for name, path in provisioned.trial.files.items():
            assert path.read_text() == provisioned.force[name]
            assert not [file.name for file in path.parent.iterdir() if file.name.startswith(".")]
        outcomes.add(provisioned.force["ssh"])
        for name, path in provisioned.trial.files.items():
            path.write_text(OLD[name])
            provisioned.force[name] = OLD[name]
        begun = provisioned.trial.begin(NEW, 60)
    assert outcomes == {OLD["ssh"], NEW["ssh"]}


@pytest.mark.parametrize(
    ("began", "process", "peer", "message"),
    [
        (BEGAN - 0.1, SHELL, AWAY, "one from before the change"),
        (BEGAN + 1, TMUX, AWAY, "found none above this process"),
        (BEGAN + 1, SHELL, HERE, "found one from this host"),
        (BEGAN + 1, SHELL, "127.0.0.1", "found one from this host"),
        (BEGAN + 1, SHELL, "[::1]", "found one from this host"),
    ],
    ids=["old connection", "terminal multiplexer", "own address", "loopback", "loopback of IPv6"],
)
def test_who_may_not_confirm(provisioned: Host, began: float, process: int, peer: str, message: str) -> None:
    """Whoever got in before, or did not come through the firewall; it goes on, and is undone."""
    answer = provisioned.trial.begin(NEW, 60)
    provisioned.processes(began)
    provisioned.peer = peer
    with pytest.raises(TrialError, match=message):
        provisioned.trial.confirm(answer["id"], process)
    assert provisioned.trial.undo(answer["id"], boot=False)
    assert provisioned.force == OLD


def test_a_process_of_sshd_for_each_connection(provisioned: Host) -> None:
    """With ssh.socket no sshd listens; systemd does."""
    answer = provisioned.trial.begin(NEW, 60)
    provisioned.processes(BEGAN + 1)
    provisioned.process(MONITOR, 1, "/usr/sbin/sshd (deleted)", BEGAN + 1)
    provisioned.listening = 'LISTEN 0 4096 *:22 *:* users:(("systemd",pid=1,fd=40))\n'
    provisioned.peer = f"[::ffff:{AWAY}]"
    provisioned.trial.confirm(answer["id"], SHELL)
    assert provisioned.force == NEW


def test_this_process_is_dated_as_the_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of `in_force` is that of /proc."""
    monkeypatch.setattr(forge_trial, "SSHD", (Path("/proc/self/exe").readlink().name,))
    earlier = time.clock_gettime(time.CLOCK_BOOTTIME)
    (_, began), *_ = forge_trial._ancestors(Path("/proc"), os.getpid())
    assert 0 < began <= earlier + 0.02


def test_the_record_is_what_was_written(provisioned: Host) -> None:
    """Whole, and read back the same."""
    record = Record("a1", 60, {"/etc/forge/firewall.nft": False}, ssh_active=True, in_force=1.5)
    provisioned.trial.write(record)
    assert provisioned.trial.pending() == record
