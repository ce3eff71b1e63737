"""What each check of doctor makes of what it sees: files below a root, canned answers of systemd, real servers."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forge_certificates
import msgspec
import psycopg
import pytest
from conftest import Bao, describe, staged
from forgectl import alerts, identity, lock, slots, state, systemd
from forgectl.doctor import manifest
from forgectl.doctor.checks import (
    certificates,
    commands,
    databases,
    drift,
    edge,
    exposure,
    logs,
    memory,
    network,
    operations,
    processes,
    releases,
    secrets,
    storage,
    units,
    updates,
)
from forgectl.doctor.checks import slots as slot_checks
from forgectl.doctor.findings import Finding
from forgectl.doctor.sight import CLOCKS, Process, Sight
from forgectl.errors import SecretsError
from forgectl.layout import Layout, replace_symlink
from forgectl.state import Closed, Entry, Operation, Removed, Slotted, State

ROOT = Path(__file__).parents[2]
NUMBER = 1
DATABASE = """
[database]
placement = "{placement}"
name = "{name}"
url = "{url}"
app_role = "inbox_app"
migrate_role = "inbox_migrate"
pool_max = {pool}
[migration]
user = "inbox-migrate"
command = ["alembic", "upgrade", "heads"]
path = "forge/inbox/migrate"
"""
HEALTHY = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "Result": "success",
    "NRestarts": "0",
    "ExecMainStatus": "0",
    "MainPID": "0",
    "Job": "",
    "UnitFileState": "enabled",
    "ConditionResult": "yes",
    "InvocationID": "",
    "MemoryMax": "infinity",
    "NeedDaemonReload": "no",
    "ActiveEnterTimestampMonotonic": "1",
    "ExecMainStartTimestampMonotonic": "1",
}


class Canned(Sight):
    """A host whose units and commands say what the test wants; the files below its root are real."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, is_root=True)
        self.said: dict[str, str | int] = {}
        self.states: dict[str, dict[str, str]] = {}
        self.entries: list[dict[str, Any]] = []

    def unit(self, name: str) -> Mapping[str, str]:
        """A unit that is well, but for what the test changed."""
        return {**HEALTHY, **self.states.get(name, {})}

    def attempt(self, *command: str, seconds: float = 5, data: str = "") -> "subprocess.CompletedProcess[str]":
        """What the test says of a program: its output, or its exit status; it has OpenSSL itself."""
        if command[0] == "openssl":
            return super().attempt(*command, seconds=seconds, data=data)
        answer = self.said.get(command[0], "")
        code, text = (answer, "") if isinstance(answer, int) else (0, answer)
        return subprocess.CompletedProcess(command, code, text, "it failed")

    def now(self, name: str) -> Mapping[str, str]:
        """The same, whenever it is asked."""
        return self.unit(name)

    def journal(self, *_: str, **__: Any) -> list[dict[str, Any]]:
        """What the test put there."""
        return self.entries


Look = Callable[[Sight], Iterable[Finding]]


@pytest.fixture
def sight(layout: Layout) -> Canned:
    """A host with one app, in whose blue slot a release is live."""
    record = staged(layout, NUMBER, "A")
    replace_symlink(layout.slots / "blue", f"../releases/{record.id}")
    layout.live.symlink_to("blue.sock")
    state.save(layout, State(live=Slotted(record.id, "blue", state.now(), 1)))
    return Canned(layout.root)


@pytest.fixture
def change(layout: Layout) -> Callable[..., None]:
    """Change the state of the app."""

    def changed(**changes: Any) -> None:
        state.save(layout, msgspec.structs.replace(state.load(layout), **changes))

    return changed


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No name server answers, which libc finds out after ten seconds; and checks have little time."""
    over, resolve = threading.Event(), socket.getaddrinfo

    def silent(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith(".example.com"):
            over.wait(10)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(databases, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(secrets, "HEALTH_SECONDS", 0.2)
    yield
    over.set()


def codes(look: Look, sight: Sight) -> list[str]:
    return [finding.code for finding in look(sight)]


def only(look: Look, sight: Sight) -> Finding:
    (finding,) = look(sight)
    assert finding.title
    assert finding.mend
    assert "\n" not in finding.title
    return finding


def write(sight: Sight, path: str, text: str) -> Path:
    target = sight.at(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def microseconds(seconds_ago: float) -> str:
    return str(int((time.clock_gettime(time.CLOCK_MONOTONIC) - seconds_ago) * 1e6))


def entry(text: str, ago: float = 0.0, **fields: str) -> dict[str, Any]:
    return {"MESSAGE": text, "__REALTIME_TIMESTAMP": str(int((time.time() - ago) * 1e6)), **fields}


class TestSlots:
    """F201, F202, F203 and F211."""

    def test_one_that_runs(self, sight: Canned) -> None:
        assert codes(slot_checks.services, sight) == []

    @pytest.mark.parametrize(
        ("unit", "title"),
        [
            ({"ActiveState": "failed", "Result": "exit-code"}, "its live service is failed (exit-code)"),
            ({"ActiveState": "activating", "SubState": "auto-restart", "Result": "oom-kill"}, "again and again"),
            ({"ActiveState": "activating", "SubState": "start"}, "is still starting"),
            ({"NRestarts": "3", "ActiveEnterTimestampMonotonic": "NOW"}, "was restarted 3 times, last"),
        ],
    )
    def test_one_that_does_not(self, sight: Canned, unit: dict[str, str], title: str) -> None:
        sight.states["inbox@blue.service"] = {
            name: microseconds(1) if value == "NOW" else value for name, value in unit.items()
        }
        found = only(slot_checks.services, sight)
        assert (found.code, found.subject, found.severity) == ("F201", "inbox", "critical")
        assert title in found.title

    @pytest.mark.parametrize(
        ("unit", "word", "mend"),
        [
            ({"ActiveState": "inactive"}, "", "sudo systemctl start inbox@blue.service"),
            (
                {"ActiveState": "activating", "SubState": "auto-restart"},
                "forge-launch: inbox: Vault at https://vault.example.com:8200 is sealed",
                "sudo forgectl secrets check inbox",
            ),
            ({"ActiveState": "activating", "SubState": "auto-restart"}, "OSError", "sudo forgectl rollback inbox"),
            ({"NRestarts": "3", "ActiveEnterTimestampMonotonic": "NOW"}, "OSError", "sudo forgectl rollback inbox"),
        ],
        ids=["stopped", "no secrets", "ends", "ended"],
    )
    def test_what_brings_it_back(
        self, sight: Canned, change: Callable[..., None], layout: Layout, unit: dict[str, str], word: str, mend: str
    ) -> None:
        """By why it does not run; without a release to go back to, what it says is all there is."""
        sight.states["inbox@blue.service"] = {
            name: microseconds(1) if value == "NOW" else value for name, value in unit.items()
        }
        sight.entries = [entry(word)]
        if "rollback" in mend:
            assert only(slot_checks.services, sight).mend == "sudo forgectl logs inbox --lines=30"
            first = staged(layout, 0, "A")
            change(
                history=[Entry(each, state.now(), "", "live", {}) for each in (first.id, sight.apps[0].live.release)]
            )
            before, sight = sight, Canned(layout.root)
            sight.states, sight.entries = before.states, before.entries
        assert only(slot_checks.services, sight).mend == mend

    def test_one_that_came_back_is_a_note(self, sight: Canned) -> None:
        sight.states["inbox@blue.service"] = {"NRestarts": "1", "ActiveEnterTimestampMonotonic": microseconds(60)}
        assert only(slot_checks.services, sight).severity == "note"

    @pytest.mark.parametrize(
        ("apart", "since", "severity"),
        [(2, 9, "critical"), (2, 30, "note"), (120, 200, "critical"), (120, 300, "note")],
    )
    def test_a_loop_is_over_when_it_has_run_for_longer(
        self, sight: Canned, apart: int, since: int, severity: str
    ) -> None:
        """A slow one takes longer to be sure of than one that ends at once."""
        sight.entries = [entry("Scheduled restart job", since + apart * number) for number in (2, 1, 0)]
        unit = {"NRestarts": "5", "ActiveEnterTimestampMonotonic": microseconds(since)}
        sight.states["inbox@blue.service"] = unit
        assert only(slot_checks.services, sight).severity == severity

    def test_one_that_lacks_a_variable(self, sight: Canned) -> None:
        """Why is what the launcher said last."""
        sight.states["inbox@blue.service"] = {"ActiveState": "activating", "SubState": "auto-restart"}
        sight.entries = [entry("forge-launch: inbox: key signing_key is missing at secret/forge/inbox/app")]
        found = list(slot_checks.services(sight))
        assert [each.code for each in found] == ["F211", "F201"]
        assert "signing_key is missing" in found[0].title

    def test_readiness(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(slots, "probe", lambda *_: 200)
        assert codes(slot_checks.readiness, sight) == []
        monkeypatch.setattr(slots, "probe", lambda *_: 503)
        found = only(slot_checks.readiness, sight)
        assert found.title == "it runs and is not ready: /ready answers 503"
        assert found.mend == "sudo forgectl logs inbox --lines=10", "a fresh slot would wait for the same"
        monkeypatch.setattr(slots, "probe", lambda *_: None)
        found = only(slot_checks.readiness, sight)
        assert "does not answer within" in found.title
        assert found.mend == "sudo forgectl recycle inbox"
        sight.states["inbox@blue.service"] = {"ActiveState": "failed"}
        assert codes(slot_checks.readiness, sight) == []

    def test_sockets(self, sight: Canned, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
        """The listener has to be there, Nginx's to open, and what the live link leads to."""
        found = only(slot_checks.sockets, sight)
        assert (found.code, found.title) == ("F203", f"{layout.socket('blue')} is not there")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(layout.socket("blue")))
            layout.socket("blue").chmod(0o660)
            monkeypatch.setattr(slot_checks, "_group", lambda _: "www-data")
            assert codes(slot_checks.sockets, sight) == []
            layout.socket("blue").chmod(0o666)
            assert "0666" in only(slot_checks.sockets, sight).title
            assert only(slot_checks.sockets, sight).mend == "sudo forgectl recycle inbox"
            layout.socket("blue").chmod(0o660)
            replace_symlink(layout.live, "green.sock")
            found = only(slot_checks.sockets, sight)
            assert "leads to green.sock, and slot blue is live" in found.title
            assert found.mend == "sudo forgectl boot inbox"
            layout.live.unlink()
            assert "leads to nowhere" in only(slot_checks.sockets, sight).title
        sight.states["inbox@blue.socket"] = {"ActiveState": "failed", "Result": "resources"}
        assert "inbox@blue.socket is failed (resources)" in only(slot_checks.sockets, sight).title

    def test_one_that_was_removed_has_none_of_it(self, sight: Canned, change: Callable[..., None]) -> None:
        change(removed=Removed(state.now(), "me", [], done=True))
        sight.states["inbox@blue.service"] = {"ActiveState": "failed"}
        for look in (slot_checks.services, slot_checks.readiness, slot_checks.sockets, releases.variables):
            assert codes(look, sight) == []


class TestOperations:
    """F301, F302 and F303."""

    def test_nothing_under_way(self, sight: Canned) -> None:
        assert codes(operations.operations, sight) == codes(operations.maintenance, sight) == []

    def test_a_lock_that_is_held_for_long(
        self, sight: Canned, layout: Layout, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
    ) -> None:
        """A short one is somebody at work, and what is under way is not half-way then."""
        change(operation=Operation("starting", "r", "green", None, state.now()))
        with lock.hold(layout, "release"):
            assert codes(operations.operations, sight) == []
            monkeypatch.setattr(operations, "HELD_SECONDS", -1.0)
            found = only(operations.operations, sight)
        assert found.code == "F301"
        assert "release by" in found.title

    @pytest.mark.parametrize(
        ("phase", "watch", "expected"),
        [
            ("starting", "inactive", ["F302"]),
            ("starting", "active", ["F302"]),
            ("maintenance", "inactive", ["F302"]),
            ("watching", "active", []),
            ("draining", "activating", []),
            ("watching", "inactive", ["F302"]),
        ],
    )
    def test_a_cutover_that_nobody_goes_on_with(
        self, sight: Canned, change: Callable[..., None], phase: Any, watch: str, expected: list[str]
    ) -> None:
        change(operation=Operation(phase, "r", "green", None, state.now()))
        sight.states["forge-watch@inbox.service"] = {"ActiveState": watch}
        assert codes(operations.operations, sight) == expected

    def test_one_that_begins_while_doctor_looks(
        self, sight: Canned, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody held the lock a moment ago, and somebody is at work now."""
        assert sight.apps
        change(operation=Operation("starting", "r", "green", None, state.now()))
        somebody = lock.Holder(1, "me", "release", time.time())
        answers = iter([None, somebody])
        monkeypatch.setattr(lock, "holder", lambda _: next(answers))
        assert codes(operations.operations, sight) == []

    def test_a_removal_that_nobody_goes_on_with(self, sight: Canned, change: Callable[..., None]) -> None:
        change(removed=Removed(state.now(), "me", []))
        assert only(operations.operations, sight).mend == "sudo forgectl remove inbox"

    def test_maintenance(self, sight: Canned, layout: Layout, change: Callable[..., None]) -> None:
        """Whoever began it ends it in another way; and a page that nobody knows of is one all the same."""
        layout.maintenance.touch()
        assert only(operations.maintenance, sight).mend == "sudo forgectl maintenance inbox off"
        change(closed=Closed("2026-01-01T00:00:00+00:00", "me", "moving the database"))
        found = only(operations.maintenance, Canned(layout.root))
        assert (found.code, found.severity) == ("F303", "critical")
        assert found.title.endswith(": moving the database")
        change(maintenance="no code fits the schema")
        assert "no code fits the schema" in only(operations.maintenance, Canned(layout.root)).title


class TestProcesses:
    """F204 to F207 and F210."""

    def test_kills(self, sight: Canned) -> None:
        """One is a note once it is over; several, or one just now, are none. A timeout kills in the same words."""
        assert codes(processes.kills, sight) == []
        killed = "Worker (pid:7) was sent SIGKILL! Perhaps out of memory?"
        sight.entries = [entry(killed, 600)]
        assert (only(processes.kills, sight).code, only(processes.kills, sight).severity) == ("F204", "note")
        sight.entries = [entry(killed, 5)]
        assert only(processes.kills, sight).severity == "warning"
        sight.entries = [entry(killed.replace("7", str(n)), 600 - 10 * n) for n in range(3)]
        assert only(processes.kills, sight).title.startswith("3 of its workers were killed for the memory")
        sight.entries = [entry("WORKER TIMEOUT (pid:7)", 10), entry(killed, 9)]
        found = only(processes.kills, sight)
        assert found.code == "F205"
        assert "its event loop stood still" in found.title

    def test_what_systemd_and_gunicorn_say_of_one_kill_counts_once(self, sight: Canned) -> None:
        of_systemd = entry("A process of this unit has been killed", 600, MESSAGE_ID=processes.OUT_OF_MEMORY)
        sight.entries = [of_systemd, entry("Worker (pid:7) was sent SIGKILL!", 599.5)]
        assert only(processes.kills, sight).title.startswith("one of its workers was")

    def test_memory(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        sight.states["inbox@blue.service"] = {"MemoryMax": str(100 * 2**20)}
        monkeypatch.setattr(systemd, "memory", lambda _: 84 * 2**20)
        assert codes(processes.memory, sight) == []
        monkeypatch.setattr(systemd, "memory", lambda _: 86 * 2**20)
        assert only(processes.memory, sight).title == "its workers have 86 MiB of the 100 MiB that they may have"
        sight.states.clear()
        assert codes(processes.memory, sight) == []

    def test_descriptors(self, sight: Canned) -> None:
        sight.__dict__["processes"] = [Process(7, 1, "inbox@blue.service", "gunicorn")]
        write(sight, "/proc/7/limits", "Max open files            10                   20                   files\n")
        for number in range(8):
            write(sight, f"/proc/7/fd/{number}", "")
        found = only(processes.descriptors, sight)
        assert (found.code, found.title) == (
            "F210",
            "process 7 (gunicorn) of inbox@blue.service: 8 of 10 open files",
        )
        sight.at("/proc/7/fd/0").unlink()
        assert codes(processes.descriptors, sight) == []

    def test_event_loops(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of three real processes: one that sleeps, one that ticks as a loop does, one that works."""
        scripts = [
            "import time; time.sleep(60)",
            "import time\nwhile True: time.sleep(0.1)",
            "while True: pass",
        ]
        running = [subprocess.Popen(["python3", "-c", script]) for script in scripts]
        try:
            time.sleep(0.7)
            sight.root = Path("/")
            sight.__dict__["apps"] = Canned(sight.at("/")).apps
            app = SimpleNamespace(name="inbox")
            watched = [Process(each.pid, 1, "inbox@blue.service", "gunicorn") for each in running]
            monkeypatch.setattr(processes, "_workers", lambda *_: watched)
            sight.__dict__["apps"] = [SimpleNamespace(in_service=True, name=app.name)]
            found = only(processes.event_loops, sight)
        finally:
            for each in running:
                each.kill()
                each.wait()
        assert found.code == "F207"
        assert found.title == "the event loop of 1 of its 3 workers stands still while the CPU idles"
        assert f"worker {running[0].pid} " in found.evidence[0]

    def test_a_loop_that_only_works_is_not_asleep(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a core of its own it gives the CPU to nobody, either."""
        seconds = iter([1.0, 2.0, 2.0, 2.05])
        monkeypatch.setattr(processes, "WATCHED_SECONDS", 0.0)
        monkeypatch.setattr(processes, "_workers", lambda *_: [Process(7, 1, "inbox@blue.service", "gunicorn")])
        monkeypatch.setattr(processes, "_turns", lambda *_: processes.Turns(5, next(seconds)))
        assert codes(processes.event_loops, sight) == []
        assert codes(processes.event_loops, sight) == ["F207"]


class TestReleases:
    """F209 and F211."""

    def seal(self, layout: Layout, release: str) -> None:
        layout.releases.chmod(0o751)
        for path in sorted((layout.releases / release).rglob("*"), reverse=True):
            path.chmod(0o550 if path.is_dir() else 0o440)
        (layout.releases / release).chmod(0o550)

    def test_files(self, sight: Canned, layout: Layout) -> None:
        """Nobody may write them, the app may read them, and they are what they were."""
        release = sight.apps[0].live.release
        self.seal(layout, release)
        assert codes(releases.intact, sight) == []
        settings = layout.releases / release / "settings.toml"
        settings.chmod(0o640)
        found = only(releases.intact, sight)
        assert "0640" in found.title
        assert found.mend == "sudo forgectl recover inbox"
        settings.chmod(0o400)
        assert "1 files of its live release have the wrong owner or mode" in only(releases.intact, sight).title
        settings.chmod(0o440)
        if os.geteuid() == 0:
            shutil.chown(settings, "nobody")
            assert only(releases.intact, sight).code == "F209"
            os.chown(settings, 0, -1)
        assert codes(releases.intact, sight) == []
        (layout.releases / release).rename(layout.releases / "elsewhere")
        assert only(releases.intact, sight).title == f"its live release {release} is gone"

    def test_content(self, sight: Canned, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
        from forgectl import staging
        from forgectl.errors import Refused

        self.seal(layout, sight.apps[0].live.release)

        def changed(*_: object) -> None:
            raise Refused("expected it as it was staged; found changed files")

        monkeypatch.setattr(staging, "check_intact", changed)
        assert only(releases.intact, sight).title == "its live release was changed since it was made"
        monkeypatch.setattr(releases, "MOST_FILES", 1)
        assert codes(releases.intact, sight) == []

    def test_variables(self, sight: Canned) -> None:
        """Names alone; and not of the launcher, which has yet to get them."""
        sight.states["inbox@blue.service"] = {"MainPID": "7"}
        started = "LISTEN_FDS=1\0"
        write(sight, "/proc/7/cmdline", "python\0-m\0gunicorn")
        write(sight, "/proc/7/environ", f"{started}FORGE_ENVIRONMENT=production\0")
        assert codes(releases.variables, sight) == []
        write(sight, "/proc/7/environ", f"{started}OTHER=hunter2\0")
        found = only(releases.variables, sight)
        assert found.title == "1 variables of its release are not in its environment: FORGE_ENVIRONMENT"
        assert "hunter2" not in str(found.document())
        write(sight, "/proc/7/cmdline", "python\0/opt/forge/forgectl/bin/forge-launch\0app")
        assert codes(releases.variables, sight) == []


def test_the_newest_of_the_journal(tmp_path: Path) -> None:
    """Oldest first; also where --lines counts from --since, as before systemd 254."""

    class Older(Sight):
        def run(self, *command: str, **_: Any) -> str:
            entries = [f'{{"MESSAGE": "{number}"}}' for number in range(9)]
            return "\n".join((entries[::-1] if "--reverse" in command else entries)[:2])

    assert [each["MESSAGE"] for each in Older(tmp_path, is_root=True).journal(lines=2)] == ["7", "8"]


def test_commands(sight: Canned, layout: Layout) -> None:
    """F208: one that goes on, and one on a schedule."""
    release = sight.apps[0].live.release
    beside = '[commands.{}]\ncommand = ["inbox.x"]\nmemory_max_mib = 64\nstop_seconds = 5\n'
    text = describe() + beside.format("mails") + beside.format("report") + 'schedule = "daily"\n'
    (layout.releases / release / "settings.toml").write_text(text)
    sight = Canned(layout.root)
    assert codes(commands.commands, sight) == []
    sight.states["inbox.mails@blue.service"] = {"ActiveState": "activating", "SubState": "auto-restart"}
    found = only(commands.commands, sight)
    assert found.title.startswith("command mails: it does not run (activating")
    assert found.mend == "sudo forgectl logs inbox --command mails --lines=20"
    sight.states["inbox.mails@blue.service"] = {"NRestarts": "7", "ActiveEnterTimestampMonotonic": microseconds(2)}
    found = only(commands.commands, sight)
    assert found.title == "command mails: it ends again and again, restarted 7 times"
    assert found.mend == "sudo forgectl logs inbox --command mails --lines=20"
    sight.states["inbox.mails@blue.service"] = {"NRestarts": "7", "ActiveEnterTimestampMonotonic": microseconds(60)}
    assert codes(commands.commands, sight) == []
    sight.states["inbox.mails@blue.service"] = {"ActiveState": "inactive"}
    assert only(commands.commands, sight).mend == "sudo systemctl start inbox.mails@blue.service"
    sight.states["inbox.mails@blue.service"] = {"ActiveState": "activating", "SubState": "auto-restart"}
    with lock.hold(layout, "release"):
        assert codes(commands.commands, sight) == []
    sight.states["inbox.mails@blue.service"] = {"ActiveState": "inactive", "Job": "17"}
    assert codes(commands.commands, sight) == []
    sight.states = {"inbox.report.service": {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "3"}}
    found = only(commands.commands, sight)
    assert found.title == "command report: its last run failed (exit-code, exit status 3)"
    assert found.mend == "sudo systemctl start inbox.report.service"
    with lock.hold(layout, "release"):
        assert only(commands.commands, sight) == found, "whoever has the lock can't have caused that"
    sight.states = {"inbox.report.timer": {"ActiveState": "inactive"}}
    assert only(commands.commands, sight).mend == "sudo systemctl start inbox.report.timer"


class TestSecrets:
    """F401 to F405, and F211 of a version that lacks something: a real Vault."""

    @pytest.fixture
    def signed_in(
        self, sight: Canned, layout: Layout, bao: Bao, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., list[Finding]]:
        """What is found, with these credentials and this version in service."""

        def look(secret_id: str | None = None, version: int = 1, server: Bao = bao) -> list[Finding]:
            text = describe(server.address, str(server.ca_file), 'FORGE_SIGNING_KEY = "signing_key"\n')
            for path in (layout.description, layout.releases / sight.apps[0].live.release / "settings.toml"):
                path.write_text(text)
            present = state.load(layout)
            live = msgspec.structs.replace(present.live, secrets=version) if present.live else None
            state.save(layout, msgspec.structs.replace(present, live=live))
            given = (server.role_id, secret_id or server.secret_id())
            monkeypatch.setattr(identity, "_credentials", lambda *_: given)
            return list(secrets.secrets(Canned(layout.root)))

        return look

    def test_all_is_well(self, signed_in: Callable[..., list[Finding]], bao: Bao) -> None:
        bao.put("forge/inbox/app", {"signing_key": "a" * 40})
        assert signed_in(version=newest(bao)) == []

    def test_sealed_and_unreachable(self, signed_in: Callable[..., list[Finding]], sealed_bao: Bao, bao: Bao) -> None:
        """Without a login, which would only wait."""
        (found,) = signed_in("x", server=sealed_bao)
        assert (found.code, "is sealed" in found.title, found.mend) == ("F401", True, "bao operator unseal")
        assert found.evidence[0].startswith("GET ")
        gone = SimpleNamespace(address="https://127.0.0.1:1", ca_file=bao.ca_file, role_id="", secret_id=str)
        (found,) = signed_in("x", server=gone)
        assert (found.code, "is unreachable" in found.title) == ("F401", True)

    @pytest.mark.usefixtures("deaf")
    def test_name_that_nobody_resolves(self, signed_in: Callable[..., list[Finding]], bao: Bao) -> None:
        """Without DNS that is what is said, in time, and not that the check took too long."""
        gone = SimpleNamespace(address="https://vault.example.com", ca_file=bao.ca_file, role_id="", secret_id=str)
        (found,) = signed_in("x", server=gone)
        assert (found.code, "vault.example.com was not resolved within 0.2 s" in found.title) == ("F401", True)

    def test_rejected(self, signed_in: Callable[..., list[Finding]]) -> None:
        (found,) = signed_in("00000000-0000-0000-0000-000000000000")
        assert (found.code, found.subject) == ("F402", "inbox")
        assert "0000" not in str(found.document())

    def test_newer(self, signed_in: Callable[..., list[Finding]], bao: Bao, layout: Layout) -> None:
        """A note until it was refused; and one that fails its check says why, with no value."""
        bao.put("forge/inbox/app", {"signing_key": "a" * 40})
        version = bao.client.secrets.kv.v2.read_secret_version("forge/inbox/app", raise_on_deleted_version=True)[
            "data"
        ]["metadata"]["version"]
        (found,) = signed_in(version=version - 1)
        assert (found.code, found.severity) == ("F404", "note")
        present = state.load(layout)
        release = present.live.release if present.live else ""
        present.record(
            Entry(release, state.now(), "me", "failed", {}, "it did not get ready", "rotation", secrets=version)
        )
        state.save(layout, present)
        (found,) = signed_in(version=version - 1)
        assert (found.code, found.evidence) == ("F405", ("history: it did not get ready",))
        bao.put("forge/inbox/app", {"signing_key": ""})
        (found,) = signed_in(version=version)
        assert (found.code, "key signing_key" in found.title) == ("F405", True)
        (found,) = signed_in(version=version + 1)
        assert found.code == "F211"

    def test_secret_ids(self, sight: Canned, layout: Layout) -> None:
        """By what is written down: missing, near its end, past it."""
        assert "no secret id on this host" in only(secrets.secret_ids, sight).title
        layout.credentials.mkdir(parents=True)
        for part in identity.PARTS:
            layout.sealed("app", part).write_text("sealed")
        assert codes(secrets.secret_ids, sight) == []
        now = datetime.now(UTC)
        for left, expected in ((15, []), (8, ["F403"]), (-1, ["F402"])):
            ends = now + timedelta(days=left)
            record = identity.Record((ends - timedelta(days=30)).isoformat(), ends.isoformat(), "accessor")
            identity._keep(layout, {"app": record})
            assert codes(secrets.secret_ids, sight) == expected

    def test_sealed_values(self, sight: Canned, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without Vault nobody is asked but the host's own key."""
        text = describe().replace("[secrets]", '[secrets]\nsource = "systemd_creds"')
        (layout.releases / sight.apps[0].live.release / "settings.toml").write_text(text)

        def lacks(*_: object, **__: object) -> None:
            raise SecretsError("missing", "expected to open it with this host's key; found: no")

        monkeypatch.setattr(identity, "fetch", lacks)
        assert codes(secrets.secrets, Canned(layout.root)) == ["F402"]


@pytest.mark.usefixtures("logins")
class TestDatabases:
    """F501, F502 and F304: a real PostgreSQL."""

    @pytest.fixture
    def described(self, sight: Canned, layout: Layout) -> Callable[..., Canned]:
        """The app with such a database."""

        def give(
            placement: str = "local", name: str = "postgres", url: str = "postgresql://x/x", pool: int = 1
        ) -> Canned:
            text = describe() + DATABASE.format(placement=placement, name=name, url=url, pool=pool)
            (layout.releases / sight.apps[0].live.release / "settings.toml").write_text(text)
            return Canned(layout.root)

        return give

    def test_reached(self, described: Callable[..., Canned], postgresql: str) -> None:
        """With the schema that the release was made for, everything is well; with another, it is not."""
        (found,) = databases.databases(described())
        assert (found.code, "is at no revision, and its live release was made for a" in found.title) == ("F304", True)
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute("CREATE TABLE alembic_version (version_num text)")
            try:
                connection.execute("INSERT INTO alembic_version VALUES ('a')")
                assert codes(databases.databases, described()) == []
            finally:
                connection.execute("DROP TABLE alembic_version")

    def test_a_schema_on_its_way_is_none_of_both(
        self, described: Callable[..., Canned], layout: Layout, postgresql: str
    ) -> None:
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute("CREATE TABLE alembic_version (version_num text)")
            try:
                connection.execute("INSERT INTO alembic_version VALUES ('between')")
                assert codes(databases.databases, described()) == ["F304"]
                with lock.hold(layout, "release"):
                    assert codes(databases.databases, described()) == []
            finally:
                connection.execute("DROP TABLE alembic_version")

    @pytest.mark.parametrize(("migrations", "expected"), [("AB", []), ("Ab", ["F304"])], ids=["marked", "not marked"])
    def test_after_a_rollback_the_newer_schema_is_right(
        self, described: Callable[..., Canned], layout: Layout, postgresql: str, migrations: str, expected: list[str]
    ) -> None:
        """Where its migrations are marked as compatible: else somebody forced it, and it may not fit."""
        newer = staged(layout, 2, migrations)
        present = state.load(layout)
        state.save(layout, msgspec.structs.replace(present, schema=newer.id))
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute("CREATE TABLE alembic_version (version_num text)")
            try:
                connection.execute("INSERT INTO alembic_version VALUES ('b')")
                found = list(databases.databases(described()))
                assert [each.code for each in found] == expected
                for each in found:
                    assert "of " + newer.id + " is not marked as compatible" in each.title
                    assert each.mend == f"sudo forgectl rollback inbox --to {newer.id}"
            finally:
                connection.execute("DROP TABLE alembic_version")

    def test_connections(
        self,
        described: Callable[..., Canned],
        postgresql: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Those that are open, and those that may be."""
        (found, _) = databases.databases(described(pool=1000))
        assert found.code == "F502"
        assert "the apps of this host may open" in found.title
        monkeypatch.setattr(databases, "NEAR", 0.01)
        with psycopg.connect(postgresql):
            (found, _) = databases.databases(described())
        assert (found.code, found.subject) == ("F502", "host")
        assert re.search(r"^\d+ of the \d+ connections that PostgreSQL has for apps are taken$", found.title)

    def test_down(self, described: Callable[..., Canned], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from forgectl import database

        monkeypatch.setattr(database, "ADMINISTRATION", f"host={tmp_path} dbname=postgres user=postgres")
        found = only(databases.databases, described())
        assert (found.code, found.severity, found.mend) == ("F501", "critical", "sudo systemctl start postgresql")

    def test_elsewhere(self, described: Callable[..., Canned]) -> None:
        """Whether somebody listens is all that can be told without a password."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"postgresql+asyncpg://inbox_app@127.0.0.1:{server.getsockname()[1]}/inbox"
            assert codes(databases.databases, described("external", "inbox", url)) == []
        found = only(databases.databases, described("external", "inbox", url))
        assert (found.code, "Connection refused" in found.title) == ("F501", True)

    @pytest.mark.parametrize(
        ("url", "place"),
        [
            ("postgresql+asyncpg://u@db.example.com/inbox", ("db.example.com", 5432)),
            ("postgresql://u@db.example.com:6432/inbox?ssl=require", ("db.example.com", 6432)),
            ("postgresql://u@[2001:db8::1]:6432/inbox", ("2001:db8::1", 6432)),
            ("postgresql://u@%2Frun%2FPG/inbox", ("/run/PG", 5432)),
            ("postgresql://u@/inbox?host=/run/PG&port=6432", ("/run/PG", 6432)),
            ("postgresql://u@/inbox", ("localhost", 5432)),
        ],
    )
    def test_where_it_is(self, url: str, place: tuple[str, int]) -> None:
        assert databases._place(url) == place

    def test_elsewhere_in_other_forms(self, described: Callable[..., Canned], tmp_path: Path) -> None:
        """What is said of it, and what looks again, can be called as it stands."""
        found = only(databases.databases, described("external", "inbox", "postgresql://u@[::1]:1/inbox"))
        assert found.title.startswith("its database at [::1]:1 is unreachable: ")
        assert found.mend == "timeout 5 bash -c '</dev/tcp/::1/1'"
        found = only(databases.databases, described("external", "inbox", f"postgresql://u@/inbox?host={tmp_path}"))
        assert found.title.startswith(f"its database at {tmp_path}/.s.PGSQL.5432 is unreachable: ")
        assert found.mend == f"ls -l {tmp_path}/.s.PGSQL.5432"

    @pytest.mark.usefixtures("deaf")
    def test_elsewhere_without_names(self, described: Callable[..., Canned]) -> None:
        """Without DNS that is what is said, in time, and not that the check took too long."""
        found = only(databases.databases, described("external", "inbox", "postgresql://db.example.com/inbox"))
        assert (found.code, "db.example.com was not resolved within 0.2 s" in found.title) == ("F501", True)

    def test_elsewhere_under_a_name_that_is_none(self, described: Callable[..., Canned]) -> None:
        found = only(databases.databases, described("external", "inbox", f"postgresql://{'a' * 64}.example.com/inbox"))
        assert (found.code, "is no name of a host" in found.title) == ("F501", True)


SERVED = certificates._served


class TestCertificates:
    """F101 to F104."""

    @pytest.fixture
    def given(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Canned]:
        """Nginx gives a certificate with so many days left of so many, or the placeholder."""

        def give(left: float, lifetime: float = 90, name: str = "inbox.example.com") -> Canned:
            pem = certificate(left, lifetime, name)
            monkeypatch.setattr(certificates, "_served", lambda _: ssl.PEM_cert_to_DER_cert(pem))
            write(sight, "/etc/nginx/tls/live/inbox.pem", "its key\n" + pem)
            return sight

        write(
            sight,
            "/etc/forge/certificates.toml",
            'source = "own_ca"\nalert_days = 14\n[apps]\ninbox = ["inbox.example.com"]\n',
        )
        return give

    @pytest.mark.parametrize(
        ("left", "lifetime", "expected"),
        [(60, 90, []), (15, 90, []), (13, 90, ["F101"]), (3, 10, []), (1, 10, ["F101"]), (-1, 90, ["F102"])],
    )
    def test_ends(self, given: Callable[..., Canned], left: float, lifetime: float, expected: list[str]) -> None:
        """A short life is no reason to call somebody for most of it."""
        assert codes(certificates.certificates, given(left, lifetime)) == expected

    def test_says_how_long(self, given: Callable[..., Canned]) -> None:
        found = only(certificates.certificates, given(6.2))
        assert found.title == "the certificate of inbox.example.com expires in 6 days"
        assert found.mend == "ansible-playbook -i inventory/production site.yml --tags nginx"
        assert only(certificates.certificates, given(-0.5)).title.endswith("expired 12 hours ago")

    def test_placeholder(self, given: Callable[..., Canned]) -> None:
        """That is the name that forge-certificates gives it."""
        assert certificates.PLACEHOLDER == forge_certificates.PLACEHOLDER
        assert codes(certificates.certificates, given(3000, 3650, certificates.PLACEHOLDER)) == ["F104"]

    def test_rules_are_those_of_the_program_that_renews(self) -> None:
        assert certificates.ALERTED_AT == forge_certificates.ALERTED_AT

    def test_renewal(self, given: Callable[..., Canned], monkeypatch: pytest.MonkeyPatch) -> None:
        sight = given(60)
        assert codes(certificates.renewal, sight) == []
        sight.states["forge-certificates.timer"] = {"ActiveState": "inactive"}
        assert only(certificates.renewal, sight).title == "nobody looks after the certificates: the timer is off"
        sight.states = {"forge-certificates.service": {"Result": "timeout"}}
        assert only(certificates.renewal, sight).title == "the last look at the certificates failed"
        sight.states = {"forge-certificates.service": {"InvocationID": "abc"}}
        sight.entries = [entry("ALERT inbox: the old certificate serves, and no new one is in service: no", -60)]
        assert only(certificates.renewal, sight).subject == "inbox"
        # Mended since: the file is newer than the line.
        sight.entries = [entry("ALERT inbox: the old certificate serves, and no new one is in service: no", 60)]
        assert codes(certificates.renewal, sight) == []
        monkeypatch.setattr(certificates, "_served", lambda _: b"another")
        assert "does not serve the newest" in only(certificates.renewal, sight).title

    @pytest.mark.parametrize("domain", ["a..example.com", "ü" * 64 + ".example.com", ".example.com", "", "a\0b"])
    def test_domain_that_is_none(
        self, given: Callable[..., Canned], domain: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of one that somebody wrote by hand that is said, and the other apps are looked at all the same."""
        sight = given(-1)
        text = f'source = "own_ca"\n[apps]\ninbox = [{json.dumps(domain)}]\n'
        write(sight, "/etc/forge/certificates.toml", text)
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setattr(certificates, "_served", lambda name: SERVED(name, server.getsockname()[1]))
            found = only(certificates.certificates, sight)
            assert (found.code, found.subject, "is no name that a client" in found.title) == ("F005", "inbox", True)
            assert codes(certificates.renewal, sight) == []

    def test_nobody_answers(self, given: Callable[..., Canned], monkeypatch: pytest.MonkeyPatch) -> None:
        """What is on the disk is what clients would get."""
        sight = given(-1)
        monkeypatch.setattr(certificates, "_served", lambda _: None)
        assert codes(certificates.certificates, sight) == ["F102"]


class TestEdge:
    """F801 to F803."""

    def test_nginx(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(edge, "_refused", lambda _: "")
        assert codes(edge.nginx, sight) == []
        monkeypatch.setattr(edge, "_refused", lambda port: "Connection refused" if port == 443 else "")
        assert only(edge.nginx, sight).evidence[1] == "127.0.0.1:443: Connection refused"
        sight.states["nginx.service"] = {"ActiveState": "failed", "Result": "signal"}
        assert only(edge.nginx, sight).title == "Nginx is failed"

    def test_configuration(self, sight: Canned) -> None:
        assert codes(edge.configuration, sight) == []
        sight.said["nginx"] = 1
        assert only(edge.configuration, sight).title == "Nginx would not take its configuration: it failed"

    @pytest.mark.parametrize(
        ("good", "bad", "newest", "expected"),
        [
            (1000, 9, 9, None),
            (10000, 50, 50, None),
            (900, 100, 100, "critical"),
            (900, 100, 0, "note"),
            (0, 10, 10, "critical"),
        ],
    )
    def test_errors(
        self, sight: Canned, layout: Layout, good: int, bad: int, newest: int, expected: str | None
    ) -> None:
        """Of the last hour; `newest` of the bad ones came last of all."""
        layout.access_log.parent.mkdir(parents=True)
        statuses = [502] * (bad - newest) + [200] * good + [502] * newest
        now = time.time()
        lines = []
        for number, status in enumerate(statuses):
            at = datetime.fromtimestamp(now - 300 + 299 * number / len(statuses), UTC).isoformat(timespec="seconds")
            lines.append(json.dumps({"timestamp": at, "status": status, "path": "/v1/events"}))
        old = datetime.fromtimestamp(now - 7200, UTC).isoformat(timespec="seconds")
        lines[:0] = [json.dumps({"timestamp": old, "status": 500})] * 1000 + ["half a li"]
        layout.access_log.write_text("\n".join(lines))
        found = list(edge.errors(sight))
        assert [each.severity for each in found] == ([expected] if expected else [])
        if found:
            assert found[0].title.startswith(f"{bad} of {good + bad} answers of the last hour were 5xx")
            assert found[0].mend == "sudo forgectl logs --app inbox --errors", "no release need be why"

    @pytest.mark.parametrize(
        ("statuses", "apart", "ago", "expected"),
        [
            # An outage of two minutes; then somebody asks twice a minute, and all is well.
            ([502] * 20 + [200] * 20, 30.0, 0, "note"),
            # While it lasts, and as long as nobody can tell.
            ([502] * 20, 30.0, 0, "critical"),
            ([502] * 20 + [200] * 2, 30.0, 0, "critical"),
            # It is over, or nobody knows.
            ([502] * 20, 1.0, 400, "note"),
            # One of a thousand is no outage, and one of fifty may be.
            ([502] * 100 + [200] * 3999 + [502], 0.05, 0, "note"),
            ([502] * 100 + [200] * 49 + [502], 0.2, 0, "critical"),
        ],
    )
    def test_errors_say_what_clients_get_now(
        self, sight: Canned, layout: Layout, statuses: list[int], apart: float, ago: float, expected: str
    ) -> None:
        self.log(layout.access_log, statuses, ago, apart)
        assert only(edge.errors, sight).severity == expected

    def test_errors_that_nobody_can_tell(self, sight: Canned, layout: Layout) -> None:
        self.log(layout.access_log, [502] * 20, 400)
        assert only(edge.errors, sight).evidence[1] == "nobody asked in the last 5 min"

    def test_maintenance_is_no_error(self, sight: Canned, layout: Layout) -> None:
        """What Nginx answers 503 by itself is the page; what the app does is none."""
        page: list[Any] = [(503, {"upstream_status": "", "release": ""})] * 100
        self.log(layout.access_log, [200] * 20 + page, 0)
        assert codes(edge.errors, sight) == []
        self.log(layout.access_log, [503] * 20 + page, 0, upstream_status="503", release="r1")
        found = only(edge.errors, sight)
        assert found.title.startswith("20 of 20 answers of the last hour were 5xx (100.0%)")
        assert found.evidence[2] == "100 more met the maintenance page"

    def log(
        self, path: Path, answers: Sequence[int | tuple[int, dict[str, str]]], ago: float, apart: float = 1.0, **of: str
    ) -> None:
        """So many requests, each so many seconds after the one before; the last of them so many seconds ago."""
        began = time.time() - ago - apart * len(answers)
        fields = [({**of}, answer) if isinstance(answer, int) else (answer[1], answer[0]) for answer in answers]
        statuses = [{"status": status, **more} for more, status in fields]
        times = [datetime.fromtimestamp(began + apart * n, UTC).isoformat() for n in range(len(statuses))]
        lines = [
            json.dumps({"timestamp": at, **status, "path": f"/v1/events/{n}", "user_agent": "x" * 100})
            for n, (at, status) in enumerate(zip(times, statuses, strict=True))
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, ""]))

    def test_errors_in_what_was_rotated(self, sight: Canned, layout: Layout) -> None:
        """A busy log is rotated several times in an hour."""
        now = int(time.time())
        log = layout.access_log
        self.log(log.with_name(f"{log.name}-20260101-{now - 400}"), [200, 502] * 50, 400)
        self.log(log.with_name(f"{log.name}-20260101-{now - 200}"), [502] * 50, 200)
        self.log(log, [200] * 60, 0)
        found = only(edge.errors, sight)
        assert found.severity == "note"
        assert found.title.startswith("100 of 210 answers of the last hour were 5xx")
        assert "most often /v1/events/* (100)" in found.evidence[0]

    def test_errors_in_a_log_that_is_too_long(
        self, sight: Canned, layout: Layout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It says of how much of the hour it speaks."""
        self.log(layout.access_log, [502] * 3000, 0)
        monkeypatch.setattr(edge, "LOG_BYTES", layout.access_log.stat().st_size // 10)
        found = only(edge.errors, sight)
        assert re.match(r"\d+ of \d+ answers of the last 5 min, of which more is not read, were 5xx", found.title)

    def test_errors_of_one_that_was_removed(self, sight: Canned, layout: Layout, change: Callable[..., None]) -> None:
        """There is nothing left to go back to."""
        self.log(layout.access_log, [502] * 100, 0)
        change(removed=Removed(state.now(), "me", [], done=True))
        assert codes(edge.errors, sight) == []


class TestStorage:
    """F601, F602 and F605."""

    @pytest.fixture
    def mounted(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Canned]:
        """File systems with so much left, of 100 blocks of 1 MiB and 100 inodes."""

        def mount(**left: tuple[int, int]) -> Canned:
            lines, known = ["proc /proc proc rw 0 0", "x /media/cd ext4 ro 0 0", "n /net nfs4 rw 0 0"], {}
            for number, (name, (free, inodes)) in enumerate(left.items()):
                path = "/" if name == "root" else f"/{name}"
                lines.append(f"dev{number} {path} {'tmpfs' if name == 'tmp' else 'ext4'} rw,relatime 0 0")
                known[str(sight.at(path))] = SimpleNamespace(
                    f_blocks=100, f_bfree=free, f_bavail=free, f_frsize=2**20, f_files=100, f_favail=inodes
                )
            write(sight, "/proc/self/mounts", "\n".join(lines))
            monkeypatch.setattr(storage, "_room", lambda _, path: known[str(sight.at(path))])
            monkeypatch.setattr(storage, "_device", lambda _, path: path)
            return sight

        return mount

    def test_room(self, mounted: Callable[..., Canned]) -> None:
        assert codes(storage.disks, mounted(root=(11, 11), tmp=(11, 11))) == []
        found = list(storage.disks(mounted(root=(9, 50), srv=(50, 9), tmp=(0, 50))))
        assert {(each.code, each.title) for each in found} == {
            ("F601", "/ is 91% full: 9 MiB of 100 MiB left"),
            ("F602", "/srv has 9 of 100 inodes left"),
            ("F605", "/tmp is full: 0 bytes of 100 MiB left"),
        }

    def test_each_disk_once(self, mounted: Callable[..., Canned], monkeypatch: pytest.MonkeyPatch) -> None:
        """What is mounted at several places is one; what is in memory for the system alone is none."""
        sight = mounted(root=(1, 50), srv=(1, 50))
        monkeypatch.setattr(storage, "_device", lambda *_: 1)
        assert [mount.path for mount in storage.mounts(sight)] == ["/"]
        write(sight, "/proc/self/mounts", "t /run/user/0 tmpfs rw 0 0\nt /run/credentials/x tmpfs rw 0 0\n")
        assert storage.mounts(sight) == []


def test_memory(sight: Canned) -> None:
    """F606, by what is left and by who waits; F204 of a host that ran out."""
    write(sight, "/proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 60000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n")
    write(
        sight, "/proc/pressure/memory", "some avg10=0.00 avg60=19.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00\n"
    )
    assert codes(memory.memory, sight) == []
    write(sight, "/proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 40000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n")
    assert only(memory.memory, sight).title == "39 MiB of 977 MiB memory are left"
    write(sight, "/proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 900000 kB\n")
    write(sight, "/proc/pressure/memory", "some avg10=0.00 avg60=21.00 avg300=0.00 total=0\n")
    assert only(memory.memory, sight).title == "something waited for memory in 21.00 % of the last minute"
    write(sight, "/proc/pressure/memory", "")
    sight.entries = [entry("Out of memory: Killed process 7 (postgres) total-vm:1kB")]
    found = only(memory.memory, sight)
    assert (found.code, found.subject, found.severity) == ("F204", "host", "note")
    assert "killed: postgres" in found.title


class TestLogs:
    """F603 and F604."""

    def test_journal(self, sight: Canned) -> None:
        write(sight, "/etc/systemd/journald.conf.d/50-forge.conf", "[Journal]\nSystemMaxUse=1M\n")
        assert "in memory alone" in only(logs.journal, sight).title
        path = write(sight, "/var/log/journal/id/system.journal", "x" * 2**20)
        assert codes(logs.journal, sight) == []
        path.with_name("system@1.journal").write_text("x" * 2**20)
        assert only(logs.journal, sight).mend == "sudo journalctl --vacuum-size=1M"
        path.unlink()
        dropped = entry("Suppressed 40 messages from inbox@blue.service", 10, UNIT="inbox@blue.service")
        sight.entries = [dropped, dropped]
        found = only(logs.journal, sight)
        assert found.title == "inbox@blue.service said more than the journal takes: 80 lines were lost in the last hour"
        sight.entries = [entry("Suppressed 40 messages from inbox@blue.service", 600)]
        assert only(logs.journal, sight).severity == "note"

    def test_rotation(self, sight: Canned) -> None:
        write(sight, "/etc/logrotate.d/forge", "/x {\n    maxsize 1M\n}\n")
        write(sight, "/var/log/nginx/inbox.json", "x" * 2**20)
        assert codes(logs.rotation, sight) == []
        write(sight, "/var/log/nginx/inbox.json", "x" * (2**21 + 1))
        assert "has grown to 2 MiB" in only(logs.rotation, sight).title
        write(sight, "/var/log/nginx/inbox.json", "")
        sight.states = {"logrotate.timer": {"ActiveState": "inactive"}}
        assert only(logs.rotation, sight).mend == "sudo systemctl enable --now logrotate.timer"
        sight.states = {"logrotate.service": {"Result": "exit-code"}}
        assert only(logs.rotation, sight).title == "the last rotation of the logs failed"


class TestNetwork:
    """F607 to F609."""

    def test_interfaces_and_routes(self, sight: Canned) -> None:
        """By the kernel alone; one that refuses whatever goes there is no way out."""
        assert "no interface is up" in only(network.network, sight).title
        write(sight, "/sys/class/net/lo/operstate", "unknown\n")
        write(sight, "/sys/class/net/eth0/operstate", "down\n")
        assert only(network.network, sight).title == "no interface is up (eth0 down)"
        write(sight, "/sys/class/net/eth0/operstate", "up\n")
        assert "no default route" in only(network.network, sight).title
        head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        write(sight, "/proc/net/route", head + "eth0\t0000580A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n")
        assert codes(network.network, sight) == ["F609"]
        write(sight, "/proc/net/route", head + "eth0\t00000000\t0100580A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n")
        assert codes(network.network, sight) == []
        write(sight, "/proc/net/route", head + "*\t00000000\t00000000\t0200\t0\t0\t0\t00000000\t0\t0\t0\n")
        assert codes(network.network, sight) == ["F609"]
        zero = "0" * 32
        write(sight, "/proc/net/ipv6_route", f"{zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n")
        assert codes(network.network, sight) == ["F609"]
        write(sight, "/proc/net/ipv6_route", f"{zero} 00 {zero} 00 {zero} 00000400 1 0 00450003 eth0\n")
        assert codes(network.network, sight) == []

    def test_name_servers(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        """Any answer will do, and of several any server."""
        assert only(network.names, sight).title == "no name server is named"
        write(sight, "/etc/resolv.conf", "search example.com\nnameserver 127.0.0.1\n")
        with answering() as port:
            monkeypatch.setattr(network, "DNS_PORT", port)
            assert codes(network.names, sight) == []
        assert only(network.names, sight).title == "no name server answers (127.0.0.1)"
        monkeypatch.setattr(network, "ANSWER_SECONDS", 0.2)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            monkeypatch.setattr(network, "DNS_PORT", silent.getsockname()[1])
            assert "timed out" in only(network.names, sight).evidence[1]
        write(sight, "/etc/resolv.conf", "nameserver dns.example.com\n")
        assert only(network.names, sight).evidence[1] == "dns.example.com: Name or service not known"

    def test_clock(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        keepers = {name: {"ActiveState": "inactive"} for name in CLOCKS}
        sight.states = keepers
        assert only(network.clock, sight).title == "nobody keeps the clock"
        keepers[CLOCKS[0]] = {"ActiveState": "inactive", "ConditionResult": "no"}
        write(sight, "/run/systemd/container", "podman")
        assert codes(network.clock, sight) == []
        keepers[CLOCKS[0]] |= {"LoadState": "masked", "UnitFileState": "masked"}
        assert codes(network.clock, sight) == ["F607"]
        keepers[CLOCKS[0]] = {"ActiveState": "active"}
        monkeypatch.setattr(network, "SETTLE_SECONDS", 0.0)
        for said, expected in (("yes\n", []), ("no\n", ["F607"])):
            sight.said["timedatectl"] = said
            assert codes(network.clock, sight) == expected


class TestUpdates:
    """F701 and F702."""

    def test_updates(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new host, or one that was off, makes up for it in its next night."""
        assert codes(updates.updates, sight) == []
        config = write(sight, updates.CONFIG, 'APT::Periodic::Unattended-Upgrade "1";\n')
        assert codes(updates.updates, sight) == []
        monkeypatch.setattr(updates, "uptime", lambda: 1e9)
        assert codes(updates.updates, sight) == []
        os.utime(config, (0, 0))
        found = list(updates.updates(sight))
        assert [each.title for each in found] == [
            "package lists were last fetched never",
            "security updates were last installed never",
        ]
        for path in (updates.FETCHED, updates.RAN):
            write(sight, path, "")
        assert codes(updates.updates, sight) == []
        sight.states = {"apt-daily-upgrade.timer": {"ActiveState": "inactive"}}
        assert "the timer is off" in only(updates.updates, sight).title
        sight.states = {"apt-daily-upgrade.service": {"Result": "exit-code"}}
        assert "the last installation of security updates failed" in only(updates.updates, sight).title
        sight.states = {}
        packages = {"a": "installed", "b": "half-configured"}
        paragraphs = [f"Package: {name}\nStatus: install ok {how}\n" for name, how in packages.items()]
        write(sight, "/var/lib/dpkg/status", "\n".join(paragraphs))
        write(sight, updates.DPKG_LOCK, "")
        assert only(updates.updates, sight).title == "1 packages are installed in part: b"

    def test_updates_that_every_night_leaves_out(self, sight: Canned) -> None:
        """Until somebody has installed something: the next night says whether it was that."""
        write(sight, updates.CONFIG, 'APT::Periodic::Unattended-Upgrade "1";\n')
        packages = write(sight, updates.PACKAGES, "Package: a\nStatus: hold ok installed\n")
        os.utime(packages, (0, 0))
        write(sight, updates.KEPT_BACK, "a libc6")
        assert only(updates.updates, sight).title == "2 security updates were held back: a, libc6"
        os.utime(packages, (2**32, 2**32))
        assert codes(updates.updates, sight) == []

    def test_packages_while_they_are_installed(self, sight: Canned) -> None:
        """Of each of them dpkg says for a moment that it is there in part."""
        write(sight, updates.CONFIG, 'APT::Periodic::Unattended-Upgrade "1";\n')
        write(sight, "/var/lib/dpkg/status", "Package: b\nStatus: install ok unpacked\n")
        path = write(sight, updates.DPKG_LOCK, "")
        hold = (
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
        )
        call = [sys.executable, "-c", hold, str(path)]
        with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as somebody:
            assert somebody.stdout
            somebody.stdout.readline()
            assert codes(updates.updates, sight) == []
            somebody.communicate(b"\n")
        assert codes(updates.updates, sight) == ["F702"]

    def test_reboot(self, sight: Canned) -> None:
        write(sight, "/proc/sys/kernel/osrelease", "6.12.9-amd64\n")
        write(sight, "/boot/vmlinuz-6.12.9-amd64", "")
        assert codes(updates.reboot, sight) == []
        write(sight, "/boot/vmlinuz-6.12.10-amd64", "")
        write(sight, "/etc/systemd/system/forge-reboot.service", "ExecStart=/x --window 03:00-04:00\n")
        found = only(updates.reboot, sight)
        assert found.severity == "note"
        assert found.title == (
            "a reboot is pending, and comes in the window 03:00-04:00: kernel 6.12.10-amd64 is installed, "
            "6.12.9-amd64 runs"
        )
        write(sight, "/etc/systemd/system/forge-reboot.service", "ExecStart=/x\n")
        write(sight, "/run/reboot-required", "")
        write(sight, "/run/reboot-required.pkgs", "libc6\nlibc6\n")
        assert only(updates.reboot, sight).title.endswith("there is no window for it: libc6")


class TestUnits:
    """F703, F704 and F804."""

    def test_failed(self, sight: Canned) -> None:
        """Of the platform, and those that nobody else tells of."""
        sight.said["systemctl"] = "\n".join(
            f"{unit} loaded failed failed x"
            for unit in (
                *("forge-reboot.service", "forge-rotate@inbox.service", "inbox-migrate@r.service", "fail2ban.service"),
                *("inbox@blue.service", "logrotate.service", "backup.service", "nginx.service"),
            )
        )
        found = list(units.units(sight))
        assert [(each.code, each.subject, each.title) for each in found] == [
            ("F704", "host", "forge-reboot.service failed"),
            ("F704", "inbox", "forge-rotate@inbox.service failed"),
            ("F704", "inbox", "inbox-migrate@r.service failed"),
            ("F704", "host", "fail2ban.service failed"),
        ]

    def test_timers(self, sight: Canned) -> None:
        """One that is enabled and does not run; a removed app has none."""
        sight.states["forge-rotate@inbox.timer"] = {"ActiveState": "inactive"}
        assert only(units.units, sight).mend == "sudo systemctl start forge-rotate@inbox.timer"
        sight.states["forge-rotate@inbox.timer"] = {"ActiveState": "inactive", "UnitFileState": "disabled"}
        assert codes(units.units, sight) == []

    def test_alerts(self, sight: Canned) -> None:
        failing = {"since": 1.0, "attempts": 5, "error": "HTTP 500"}
        write(sight, "/var/lib/forge-alerts/webhook.json", json.dumps({"failing": failing}))
        write(sight, "/var/lib/forge-alerts/mail.json", json.dumps({"failing": None}))
        write(sight, "/var/lib/forge-alerts/command.json", '{"failing": "yes"}')
        found = only(units.alerts, sight)
        assert (found.code, found.title) == ("F804", "no alert gets through by webhook, after 5 attempts: HTTP 500")
        sight.said["systemctl"] = "forge-alerts.service loaded failed failed x"
        assert only(units.units, sight).code == "F804"

    def test_alerts_are_read_from_files_alone(
        self, sight: Canned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The unit that writes them is not root, and what it may not read it gets nobody to quote."""
        secret = tmp_path / "secret.json"
        secret.write_text(json.dumps({"failing": {"attempts": 5, "error": "the secret"}}))
        folder = sight.at("/var/lib/forge-alerts")
        folder.mkdir(parents=True)
        (folder / "webhook.json").symlink_to(secret)
        os.mkfifo(folder / "mail.json")
        monkeypatch.setattr(alerts, "STATE_BYTES", 1000)
        (folder / "command.json").write_text(json.dumps({"failing": {"attempts": 5, "error": "x" * 1000}}))
        found = list(units.alerts(sight))
        assert [each.title.partition(" can't be read: ")[::2] for each in found] == [
            ("what became of alerts by command", "File too large"),
            ("what became of alerts by webhook", "no regular file"),
            ("what became of alerts by mail", "no regular file"),
        ]
        assert "the secret" not in str([each.document() for each in found])

    def test_alerts_in_a_state_that_is_none(self, sight: Canned) -> None:
        """Such as one that is nested deeper than anybody can read."""
        write(sight, "/var/lib/forge-alerts/webhook.json", "[" * 100_000)
        write(sight, "/var/lib/forge-alerts/mail.json", '"failing"')
        assert codes(units.alerts, sight) == []

    @pytest.mark.parametrize(
        ("config", "unit", "expected"),
        [
            ("[mail]\n", {"ActiveState": "active"}, []),
            ("[mail]\n", {"ActiveState": "inactive"}, ["F804"]),
            ("[mail]\n", {"ActiveState": "inactive", "Job": "17"}, []),
            ("[mail]\n", {"ActiveState": "activating", "SubState": "auto-restart"}, ["F804"]),
            ("[mail]\n", {"ActiveState": "failed"}, []),
            ("repeat_minutes = 60\n", {"ActiveState": "inactive"}, []),
            ("[mail\n", {"ActiveState": "active"}, ["F804"]),
            (None, {"ActiveState": "inactive"}, []),
        ],
    )
    def test_alerts_that_nobody_delivers(
        self, sight: Canned, config: str | None, unit: dict[str, str], expected: list[str]
    ) -> None:
        """One that failed is told of with the failed units, and one that waits for the network is on its way."""
        if config is not None:
            write(sight, "/etc/forge/alerts.toml", config)
        sight.states["forge-alerts.service"] = unit
        assert codes(units.alerts, sight) == expected

    def test_exposure(self, sight: Canned) -> None:
        """What docs/host.md promises is what is held."""
        page = (ROOT / "docs/host.md").read_text()
        rows = dict(re.findall(r"^\| `([^`]+)`(?:, [^|]+)? \| [\d.]+ \| ([\d.]+) \|$", page, re.MULTILINE))
        held = {
            "NAME@SLOT.service": exposure.SLOT,
            "forge-watch@NAME.service": exposure.OTHER,
            "forge-reboot.service": exposure.OTHER,
            "nginx.service": exposure.SERVER,
        }
        assert {unit: rows.get(unit) for unit in held} == {unit: str(limit) for unit, limit in held.items()}
        said = "→ Overall exposure level for {}: {} OK 🙂\n"
        sight.said["systemd-analyze"] = said.format("nginx.service", 2.5) + said.format("inbox@blue.service", 1.5)
        assert codes(exposure.exposure, sight) == []
        sight.said["systemd-analyze"] = said.format("nginx.service", 9.6) + said.format("inbox@blue.service", 1.6)
        found = list(exposure.exposure(sight))
        assert [(each.code, each.subject) for each in found] == [("F703", "host"), ("F703", "inbox")]

    def test_exposure_of_many_apps(self, sight: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each unit takes a tenth of a second: of what all have in common one is looked at."""
        for name in ("one", "two", "three"):
            write(sight, f"/etc/forge/apps/{name}.toml", describe().replace("inbox", name))
        asked: list[str] = []

        def attempt(*command: str, **_: Any) -> "subprocess.CompletedProcess[str]":
            asked.extend(command)
            return subprocess.CompletedProcess(command, 0, "exposure level for nginx.service: 1.0", "")

        monkeypatch.setattr(sight, "attempt", attempt)
        assert codes(exposure.exposure, sight) == []
        assert len(sight.apps) == 4
        assert sum(unit.startswith("forge-watch@") for unit in asked) == 1


class TestDrift:
    """F006 beyond the manifest."""

    @pytest.fixture
    def released(self, sight: Canned, layout: Layout) -> Path:
        """Its live release, as it was made from what lies in /etc/forge/apps."""
        release = layout.releases / sight.apps[0].live.release
        for name in ("gunicorn.conf.py", "slot.conf", "forge_worker.py"):
            shutil.copy(layout.inputs / name, release / name)
        shutil.copy(layout.description, release / "settings.toml")
        layout.drop_in("blue").parent.mkdir(parents=True)
        shutil.copy(release / "slot.conf", layout.drop_in("blue"))
        return release

    def test_units_of_slots(self, sight: Canned, layout: Layout, released: Path) -> None:
        assert codes(drift.files, sight) == []
        layout.drop_in("blue").write_text("[Service]\nMemoryMax=1G\n")
        assert "is not the slot.conf of" in only(drift.files, sight).title
        shutil.copy(released / "slot.conf", layout.drop_in("blue"))
        sight.states["inbox@blue.service"] = {"NeedDaemonReload": "yes"}
        assert codes(drift.files, sight) == []
        sight.states["nginx.service"] = {"NeedDaemonReload": "yes"}
        assert "NeedDaemonReload=yes" in only(drift.files, sight).title

    @pytest.mark.parametrize("look", [slot_checks.services, slot_checks.sockets, drift.files])
    def test_what_a_cutover_changed_meanwhile_is_not_said(
        self, sight: Canned, layout: Layout, released: Path, change: Callable[..., None], look: Look
    ) -> None:
        """The state is read before what it tells of, and all of that may be another's by then."""
        live = sight.apps[0].live
        sight.states |= {"inbox@blue.service": {"ActiveState": "inactive"}, "inbox@blue.socket": {"ActiveState": "x"}}
        layout.drop_in("blue").write_text("[Service]\nMemoryMax=1G\n")
        replace_symlink(layout.live, "green.sock")
        assert codes(look, sight) != []
        change(live=msgspec.structs.replace(live, slot="green"))
        assert codes(look, sight) == []
        assert released.exists()

    @pytest.mark.usefixtures("released")
    def test_settings_that_no_release_has(self, layout: Layout) -> None:
        """Those of any release on the host will do: after a rollback the newest are not live."""
        layout.description.write_text(layout.description.read_text() + "# changed\n")
        (layout.inputs / "gunicorn.conf.py").write_text("workers = 3\n")
        found = only(drift.files, Canned(layout.root))
        assert found.title == "its settings in /etc/forge/apps are in no release: inbox.toml, inbox.d/gunicorn.conf.py"
        newer = staged(layout, 2)
        for name in ("gunicorn.conf.py", "slot.conf", "forge_worker.py"):
            shutil.copy(layout.inputs / name, layout.releases / newer.id / name)
        shutil.copy(layout.description, layout.releases / newer.id / "settings.toml")
        assert codes(drift.files, Canned(layout.root)) == []

    @pytest.mark.usefixtures("released")
    def test_what_mends_it(self, sight: Canned) -> None:
        """site.yml writes its files anew; what it did not write, and what it only told the kernel, is mended here."""
        write(sight, "/etc/sysctl.d/90-forge.conf", "net.ipv4.tcp_syncookies = 1\n")
        setting = write(sight, "/proc/sys/net/ipv4/tcp_syncookies", "1\n")
        manifest.record(sight.root, since=0.0, whole=True)
        setting.write_text("0\n")
        assert only(drift.files, sight).mend == "sudo /usr/lib/systemd/systemd-sysctl /etc/sysctl.d/90-forge.conf"
        setting.write_text("1\n")
        write(sight, "/etc/nginx/conf.d/extra.conf", "")
        found = only(drift.files, sight)
        assert (found.mend, found.title) == (
            "sudo mv --backup=numbered /etc/nginx/conf.d/extra.conf /root/",
            "1 not as site.yml left it: /etc/nginx/conf.d/extra.conf",
        )
        sight.at("/etc/sysctl.d/90-forge.conf").write_text("net.ipv4.tcp_syncookies = 2\n")
        assert only(drift.files, sight).mend == "ansible-playbook -i inventory/production site.yml"

    def test_firewall(self, sight: Canned) -> None:
        assert codes(drift.firewall, sight) == []
        write(sight, "/etc/forge/firewall.nft", "")
        assert only(drift.firewall, sight).title == "the firewall is not loaded"
        sight.said["nft"] = "table inet f2b-table\ntable inet forge\n"
        assert codes(drift.firewall, sight) == []


def newest(bao: Bao) -> int:
    """The newest version of the app's secrets."""
    answer = bao.client.secrets.kv.v2.read_secret_version("forge/inbox/app", raise_on_deleted_version=True)
    return int(answer["data"]["metadata"]["version"])


def certificate(left: float, lifetime: float, name: str) -> str:
    """A certificate in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    ends = datetime.now(UTC) + timedelta(days=left)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(ends - timedelta(days=lifetime))
        .not_valid_after(ends)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


class answering:  # noqa: N801 - used as a function
    """A name server that refuses to answer, which is an answer; its port."""

    def __enter__(self) -> int:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        port: int = self._socket.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._thread.join(5)
        self._socket.close()

    def _answer(self) -> None:
        query, client = self._socket.recvfrom(512)
        self._socket.sendto(query[:2] + b"\x81\x85" + query[4:], client)
