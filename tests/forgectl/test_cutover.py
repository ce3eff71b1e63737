"""cutover.py and migration.py as a state machine: killed at every change, then repaired.

systemd is a table of units here. Everything else is real: the files, the slots' sockets and the HTTP over them, and
where a schema is asked for, PostgreSQL and Vault's API.
"""

import http.server
import itertools
import os
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import msgspec
import psycopg
import pytest
from conftest import Bao, describe, staged
from forgectl import (
    commands,
    config,
    cutover,
    identity,
    lock,
    maintenance,
    migration,
    release,
    slots,
    staging,
    state,
    status,
    systemd,
)
from forgectl.cutover import Cutover
from forgectl.errors import CandidateFailed, ForgeError, Locked, Refused
from forgectl.layout import SLOTS, Layout
from forgectl.staging import Record
from forgectl.state import Action, Entry, Slotted, State
from forgectl.values import Fetched

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "os.chown", "os.utime")
# One that goes on, and one that a timer starts.
COMMANDS = """
[commands.beat]
command = ["inbox.beat"]
memory_max_mib = 64
stop_seconds = 5
[commands.tick]
command = ["inbox.tick"]
memory_max_mib = 64
stop_seconds = 5
schedule = "hourly"
"""
STOPPED = {"ActiveState": "inactive", "SubState": "dead", "Result": "success", "NRestarts": "0", "Job": "0"} | {
    "ExecMainStatus": "0",
    "MainPID": "0",
}


class Killed(BaseException):
    """SIGKILL: what is killed does not clean up, so each further change is refused by the same."""


class Answers(socketserver.ThreadingUnixStreamServer):
    """The workers of one slot: they answer as the release in it would, while its service is up."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: "Host", slot: str) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if (status := host.answer(slot, self.path)) is None:
                    return
                self.send_response(status)
                self.send_header("X-Forge-Worker", str(host.next_worker(slot)))
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

            def address_string(self) -> str:
                return "unix"

        super().__init__(str(host.layout.socket(slot)), Handler)
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()


class Host:
    """A host with two releases at least, one of them live in slot blue, whose systemd is a table.

    Attributes:
        units: the properties of each unit that was ever started.
        statuses: what a release answers on its readiness path, one after the other; then, and otherwise, 200.
        broken: releases whose service ends at once.
        on_migration: what a migration's unit does.
        meanwhile: what happens at the next look at a unit, as if by another process.
        left: changes until the kill; None for no kill.
    """

    current: "Host | None" = None

    def __init__(self, root: Path) -> None:
        self.layout = Layout("inbox", root)
        self.units: dict[str, dict[str, str]] = {}
        self.statuses: dict[str, Iterator[int]] = {}
        self.broken: set[str] = set()
        self.on_migration: Callable[[], None] = lambda: None
        self.meanwhile: Callable[[], None] | None = None
        self.left: int | None = None
        self.said: list[str] = []
        self.sealed: dict[str, str] = {}
        self._workers = dict.fromkeys(SLOTS, 0)
        here = self.layout
        for folder in (here.releases, here.venvs, here.slots, here.state_dir, here.sockets, here.inputs, here.units):
            folder.mkdir(parents=True)
        self._servers = [Answers(self, slot) for slot in SLOTS]
        self.settings = describe().replace("keep_releases = 2", "keep_releases = 5\nwatch_seconds = 0.05")
        self.settings = self.settings.replace("start = 60", "start = 1\npool_exit = 0.001") + COMMANDS
        self.describe(self.settings)

    def __enter__(self) -> Self:
        Host.current = self
        return self

    def __exit__(self, *_error: object) -> None:
        Host.current = None
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def describe(self, text: str) -> None:
        """What the next release is told, as site.yml does."""
        self.settings = text
        self.layout.description.write_text(text)

    @property
    def app(self) -> config.App:
        """The newest description."""
        return config.load(self.layout.description)

    @property
    def state(self) -> State:
        return state.load(self.layout)

    def stage(self, number: int, revisions: str = "") -> Record:
        """A release with the settings of now."""
        record = staged(self.layout, number, revisions)
        folder = self.layout.releases / record.id
        (folder / "settings.toml").write_text(self.settings)
        (folder / "slot.conf").write_text("[Service]\n")
        return record

    def make_live(self, record: Record, slot: str = "blue") -> None:
        slots.prepare(self.layout, slot, record.id, 0)
        slots.start(self.layout, slot)
        slots.swap(self.layout, slot)
        commands.hand_over(self.layout, slot)
        state.save(self.layout, State(live=Slotted(record.id, slot, "2026-01-01T00:00:00+00:00")))

    def change(self, action: Action = "release", app: config.App | None = None) -> Cutover:
        return Cutover(self.layout, app or self.app, self.state, self.say, action)

    def say(self, text: str) -> None:
        self.said.append(text)

    def recover(self) -> State:
        return cutover.recover(self.layout, self.app, self.say)

    def follow(self) -> None:
        """What forge-watch@inbox.service does."""
        cutover.follow(self.layout, self.app, self.say)
        self.units.pop(self.layout.watch_unit(), None)

    def repair(self) -> None:
        """What the next command does, and the watch beside it."""
        self.recover()
        if self.units.get(self.layout.watch_unit()):
            self.follow()

    def reboot(self) -> None:
        """All units are gone and so is /run; then what comes up by itself does, and the next command."""
        self.boot()
        self.repair()

    def boot(self) -> None:
        """All units are gone and so is /run; then what comes up by itself does."""
        self.units.clear()
        for name in ("live.sock", ".live.sock.new", "maintenance"):
            (self.layout.sockets / name).unlink(missing_ok=True)
        cutover.boot(self.layout, self.app, self.say)

    def is_up(self, slot: str | None) -> bool:
        return slot is not None and self.show(self.layout.service(slot))["ActiveState"] == "active"

    def assert_served(self) -> None:
        """Whoever asks gets the app or, when that is meant, the maintenance page."""
        present = self.state
        if present.live or self.layout.live_slot():
            assert self.is_up(self.layout.live_slot()) or self.layout.maintenance.exists(), present

    def assert_whole(self) -> None:
        """Nothing is under way, and state, traffic, units and page say the same."""
        present = self.state
        assert present.operation is None, present
        assert self.layout.maintenance.exists() == present.page, present
        self.assert_commands(present.live.slot if present.live and not present.maintenance else None)
        if present.live is None:
            assert not any(map(self.is_up, SLOTS)), present
            return
        # After a reboot nothing leads anywhere, and under the page nothing has to.
        assert self.layout.live_slot() in ((None, present.live.slot) if present.maintenance else (present.live.slot,))
        assert self.layout.slot_release(present.live.slot) == present.live.release
        # Static files are those of what serves.
        if self.layout.live_slot():
            assert self.layout.live_files.readlink() == self.layout.slots / present.live.slot
        assert self.is_up(present.live.slot) != bool(present.maintenance), present
        assert not self.is_up(slots.other(present.live.slot)), present

    def assert_commands(self, live: str | None) -> None:
        """Those of the live slot run, from its release, and no others."""
        running = {unit for unit, found in self.units.items() if ".beat@" in unit and found["ActiveState"] == "active"}
        assert running == ({self.layout.command_unit("beat", live)} if live else set())
        service, timer = self.layout.scheduled_units("tick")
        assert (timer in self.units) == bool(live)
        if live:
            release = str(self.layout.slot_release(live))
            for unit in (*running, service):
                text = (self.layout.units / unit).read_text()
                assert release in text.splitlines()[0]
                assert f" inbox {live} " in text

    def close(self, on: bool = True, reason: str = "", dry_run: bool = False) -> dict[str, Any]:
        """What `forgectl maintenance inbox on` does, or off."""
        return maintenance.switch(self.layout, on=on, reason=reason, dry_run=dry_run)

    # The workers of a slot.

    def answer(self, slot: str, path: str) -> int | None:
        """What a request gets; None: nothing."""
        if not self.is_up(slot):
            return None
        app = config.load(self.layout.releases / str(self.layout.slot_release(slot)) / "settings.toml")
        if path == app.ready_path:
            return next(self.statuses.get(str(self.layout.slot_release(slot)), iter(())), 200)
        return 200 if path == app.health_path else 404

    def next_worker(self, slot: str) -> int:
        """Whose turn it is."""
        app = config.load(self.layout.releases / str(self.layout.slot_release(slot)) / "settings.toml")
        self._workers[slot] = (self._workers[slot] + 1) % app.workers.count
        return self._workers[slot]

    # What stands for systemd.

    def decrypt(self, _path: Path, name: str) -> str:
        return self.sealed[name]

    def run(self, *_command: str, **_options: object) -> bytes:
        self.point()
        return b""

    def start(self, *units: str, block: bool = True) -> None:  # noqa: ARG002
        for unit in units:
            self.point()
            if "-migrate@" in unit:
                self.on_migration()
            elif self.units.get(unit, STOPPED)["ActiveState"] != "active":
                # The counter of restarts is over the life of a unit, from one start to the stop.
                ends = any(
                    unit == self.layout.service(slot) and self.layout.slot_release(slot) in self.broken
                    for slot in SLOTS
                )
                self.units[unit] = STOPPED | {"ActiveState": "failed" if ends else "active", "SubState": "running"}

    def restart(self, unit: str) -> None:
        self.stop(unit)
        self.start(unit)

    def stop(self, *units: str) -> None:
        for unit in units:
            self.point()
            self.units.pop(unit, None)

    def show(self, unit: str) -> dict[str, str]:
        todo, self.meanwhile = self.meanwhile, None
        if todo:
            todo()
        return self.units.get(unit, STOPPED)

    def active_units(self, _pattern: str) -> list[str]:
        return []

    def journal(self, _unit: str, _since: float, _lines: int = 30) -> str:
        return ""

    # Being killed.

    def point(self) -> None:
        """A change: the kill may come before it."""
        if self.left is None:
            return
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def killed_at(self, step: int, work: Callable[[], object]) -> bool:
        """Do some work that is killed before its `step`-th change; false if it came to its end."""
        self.left = step
        try:
            work()
        except Killed:
            return True
        except ForgeError as error:
            self.say(str(error))
        finally:
            self.left = None
        return False


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    host = Host.current
    if host is None or host.left is None or threading.current_thread() is not threading.main_thread():
        return
    flags = arguments[2] if event == "open" else 0
    if event in CHANGES or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
        host.point()


sys.addaudithook(audit)


@pytest.fixture
def new_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Host]]:
    """Makes hosts; the newest one's table stands for systemd."""
    for name in ("run", "start", "restart", "stop", "show", "active_units", "journal", "decrypt"):
        monkeypatch.setattr(systemd, name, lambda *a, _name=name, **k: getattr(Host.current, _name)(*a, **k))
    monkeypatch.setattr(systemd, "step_back", lambda: None)
    monkeypatch.setattr(cutover, "WATCH_EVERY_SECONDS", 0.002)
    monkeypatch.setattr(slots, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(slots, "NEXT_WORKER_SECONDS", 0.0)
    # A kill is none of the disk: what the kernel was told, it keeps.
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    number = 0

    def make() -> Host:
        nonlocal number
        number += 1
        if Host.current:
            Host.current.__exit__()
        return Host(tmp_path / str(number)).__enter__()

    yield make
    if Host.current:
        Host.current.__exit__()


@pytest.fixture
def host(new_host: Callable[[], Host]) -> Host:
    """A host where the first of two releases is live."""
    return two_releases(new_host())


def two_releases(host: Host) -> Host:
    host.make_live(host.stage(1))
    host.stage(2)
    return host


def name(number: int) -> str:
    """The name of a staged release."""
    return f"20260101-00000{number}-{'a' * 12}"


def watch(host: Host, seconds: float = 10.0, action: Action = "release") -> None:
    """Have the second release watched beside the first for so long; its watch is not running yet."""
    host.change(action).run(name(2))
    present = host.state
    assert present.operation
    assert present.operation.phase == "watching"
    present.operation = msgspec.structs.replace(present.operation, until=time.time() + seconds)
    state.save(host.layout, present)


def release_first(host: Host) -> None:
    host.change().run(name(1))


def release_second(host: Host) -> None:
    host.change().run(name(2))


def release_broken(host: Host) -> None:
    host.broken.add(name(2))
    host.change().run(name(2))


def break_service(host: Host) -> None:
    change = host.change()
    change.interrupt_service(name(2), "the schema changes", ["a"])
    change.run(name(2))


def break_in_vain(host: Host) -> None:
    change = host.change()
    change.interrupt_service(name(2), "the schema changes", ["a"])
    change.fail(name(2), ForgeError("the migration failed"), undone=True)


def turn_back(host: Host) -> None:
    cutover.turn_back_on_request(host.layout, host.state)


WORKS: list[tuple[Callable[[Host], None], int]] = [
    (release_first, 15),
    (release_second, 15),
    (release_broken, 15),
    (break_service, 25),
    (break_in_vain, 15),
]


@pytest.mark.parametrize("repair", [Host.repair, Host.reboot])
@pytest.mark.parametrize(("work", "steps"), WORKS)
def test_killed_at_any_step_of(
    new_host: Callable[[], Host], work: Callable[[Host], None], steps: int, repair: Callable[[Host], None]
) -> None:
    """Before and after the repair, clients are served; after it, all that forgectl knows is true."""
    step, killed = 0, True
    while killed:
        host = new_host()
        if work is release_first:
            host.stage(1)
        else:
            two_releases(host)
        killed = host.killed_at(step, lambda: work(host))  # noqa: B023
        host.assert_served()
        repair(host)
        host.assert_whole()
        step += 1
    assert step > steps


@pytest.mark.parametrize("repair", [Host.repair, Host.reboot])
def test_killed_at_any_step_of_a_warm_rollback(new_host: Callable[[], Host], repair: Callable[[Host], None]) -> None:
    """While the watch runs, as it does: it goes on with what it finds."""
    ends: list[str] = []
    step, killed = 0, True
    while killed:
        host = two_releases(new_host())
        watch(host, 0.1)
        found: list[bool] = []
        host.meanwhile = lambda: found.append(host.killed_at(step, lambda: turn_back(host)))  # noqa: B023
        host.follow()
        killed = found[0]
        host.assert_served()
        repair(host)
        host.assert_whole()
        assert host.state.live
        ends.append(host.state.live.release)
        step += 1
    # From the rename on it has happened, whatever was not written down.
    assert ends == sorted(ends, reverse=True)
    assert set(ends) == {name(1), name(2)}
    assert step > 5


@pytest.mark.parametrize("repair", [Host.repair, Host.reboot])
@pytest.mark.parametrize(("work", "steps"), WORKS)
def test_nothing_opens_a_closed_app(
    new_host: Callable[[], Host], work: Callable[[Host], None], steps: int, repair: Callable[[Host], None]
) -> None:
    """Not a release, however it ends, nor its repair, nor a reboot; and behind the page each does its work."""
    step, killed = 0, True
    while killed:
        host = two_releases(new_host())
        host.close(reason="a test")
        killed = host.killed_at(step, lambda: work(host))  # noqa: B023
        assert host.layout.maintenance.exists(), step
        repair(host)
        host.assert_whole()
        assert host.state.closed
        host.close(on=False)
        host.assert_whole()
        live = host.state.live
        assert killed or (live and live.release) == name(2 if work in (release_second, break_service) else 1)
        step += 1
    assert step > steps


@pytest.mark.parametrize("repair", [Host.repair, Host.reboot])
@pytest.mark.parametrize("on", [True, False])
def test_killed_at_any_step_of_a_change_of_the_mode(
    new_host: Callable[[], Host], on: bool, repair: Callable[[Host], None]
) -> None:
    """Afterwards page and state agree, and the same command again does what it says."""
    step, killed = 0, True
    while killed:
        host = two_releases(new_host())
        if not on:
            host.close()
        killed = host.killed_at(step, lambda: host.close(on))  # noqa: B023
        repair(host)
        host.assert_whole()
        host.close(on)
        host.assert_whole()
        assert (host.state.closed is not None) == on
        step += 1
    assert step > 3


def test_a_database_elsewhere_may_have_its_password_where_the_app_alone_looks(host: Host) -> None:
    """Under a key that nobody told of, or leased."""
    section = (
        '[database]\nplacement = "external"\nname = "inbox"\napp_role = "inbox_login"\nurl = "postgresql://db/inbox"\n'
    )
    host.describe(f"{host.settings}{section}")
    change = host.change()
    change.take(Fetched({"signing_key": "x"}, 3))
    assert (change._secrets, change._database_user) == (3, "inbox_login")


def test_a_run_of_a_dropped_command_is_stopped_with_the_others(host: Host) -> None:
    """Its unit goes with the first hand-over after its end."""
    tick, _ = host.layout.scheduled_units("tick")
    host.start(tick)
    host.describe(host.settings.partition("[commands.tick]")[0])
    host.stage(3)
    host.change().run(name(3))
    host.follow()
    assert host.units[tick]["ActiveState"] == "active"
    assert host.layout.timed_units() == [tick]
    commands.pause(host.layout)
    assert tick not in host.units
    commands.schedule(host.layout, str(host.layout.live_slot()))
    assert host.layout.timed_units() == []


def test_a_run_keeps_the_release_that_it_began_with(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is released meanwhile; and not what was live only before it."""
    host.stage(3)
    tick, _ = host.layout.scheduled_units("tick")

    def go_live(number: int) -> None:
        host.change().run(name(number))
        host.follow()

    go_live(2)
    began = datetime.now(UTC) + timedelta(seconds=1)
    monkeypatch.setattr(systemd, "started", lambda _unit: began)
    host.start(tick)
    present = host.state
    later = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
    present.history += [Entry(name(number), later, "me", "live", {}) for number in (3, 4)]
    present.live, present.previous = (Slotted(name(number), "blue", later) for number in (6, 5))
    assert cutover.needed(host.layout, present) >= {name(number) for number in (2, 3, 4, 5, 6)}
    assert name(1) not in cutover.needed(host.layout, present)
    host.stop(tick)
    assert name(2) not in cutover.needed(host.layout, present)


def test_clients_are_served_while_commands_end_before_a_breaking_migration(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose time to end is theirs, and may be an hour."""
    pages: dict[str, bool] = {}
    stop = host.stop

    def note(*units: str) -> None:
        pages.update({unit: host.layout.maintenance.exists() for unit in units if unit not in pages})
        stop(*units)

    monkeypatch.setattr(host, "stop", note)
    host.change().interrupt_service(name(2), "the schema changes", ["a"])
    assert not any(map(host.is_up, SLOTS))
    assert pages == {
        "inbox.tick.timer": False,
        "inbox.tick.service": False,
        "inbox.beat@blue.service": False,
        "inbox@blue.socket": True,
        "inbox@blue.service": True,
    }


def test_the_mode_is_changed_once_and_written_down(host: Host) -> None:
    """The second time changes nothing; the history tells when, who and why, the status that it is so."""
    assert host.close(reason="a new disk", dry_run=True)["changed"]
    assert not host.layout.maintenance.exists()
    first = host.close(reason="a new disk")
    again = host.close(reason="another")
    assert (first["changed"], again["changed"]) == (True, False)
    assert again["maintenance_mode"] == first["maintenance_mode"]
    found = status.of(host.layout, host.app)
    assert found["maintenance_mode"] == {"since": found["maintenance_mode"]["since"], "by": lock.person()} | {
        "reason": "a new disk"
    }
    assert f"MAINTENANCE MODE since {found['maintenance_mode']['since']}" in status.text(found)
    assert found["last"] is None
    assert [host.close(on=False)["changed"], host.close(on=False)["changed"]] == [True, False]
    assert status.of(host.layout, host.app)["maintenance_mode"] is None
    lines = status.history(host.state, 10)
    assert [line.split("  ", 1)[1] for line in lines] == [
        f"maintenance  {name(1)}  on by {lock.person()}; a new disk",
        f"maintenance  {name(1)}  off by {lock.person()}",
    ]


def test_a_page_that_somebody_removed_comes_back_with_the_same_command(host: Host) -> None:
    """Whoever closes an app means that clients see it."""
    host.close()
    host.layout.maintenance.unlink()
    assert host.close()["changed"]
    assert host.layout.maintenance.exists()


def test_the_page_of_a_breaking_migration_is_not_the_operators(host: Host) -> None:
    """Neither of the two ends the other's: it goes with the later of them."""
    host.close()
    change = host.change()
    change.interrupt_service(name(2), "the schema changes", ["a"])
    assert host.close(on=False)["maintenance"] == "the schema changes"
    assert host.layout.maintenance.exists()
    host.close()
    host.change().run(name(2))
    assert (host.state.maintenance, host.layout.maintenance.exists()) == ("", True)
    host.close(on=False)
    assert not host.layout.maintenance.exists()


def test_a_closed_app_is_recycled_and_comes_back_after_a_boot(host: Host) -> None:
    """It works behind the page, so that it serves the moment it is opened."""
    host.close()
    assert release.recycle(host.layout, host.app, if_due=False, dry_run=True, say=host.say).plan
    host.boot()
    assert host.layout.maintenance.exists()
    host.assert_whole()


def test_an_app_can_be_closed_before_its_first_release(new_host: Callable[[], Host]) -> None:
    """It is released behind the page."""
    host = new_host()
    host.close()
    host.boot()
    host.stage(1)
    host.change().run(name(1))
    host.assert_whole()
    assert host.layout.maintenance.exists()


def test_a_rollback_is_watched_by_the_settings_of_its_own_release(host: Host) -> None:
    """Settings belong to a release: the newest description says nothing of an older one."""
    host.describe(host.settings.replace("keep_releases", 'ready_path = "/able"\nkeep_releases'))
    host.make_live(host.stage(3))
    its_app = config.load(host.layout.releases / name(1) / "settings.toml")
    host.change("rollback", its_app).run(name(1))
    host.follow()
    host.assert_whole()
    assert host.state.live
    assert (host.state.live.release, host.state.history[-1].outcome) == (name(1), "live")
    assert status.of(host.layout, host.app)["ready"] is True


def test_the_old_release_is_asked_for_what_its_own_settings_name(host: Host) -> None:
    """Or a release that turns unready would keep the traffic, as if the old one were no better."""
    host.describe(host.settings.replace("keep_releases", 'ready_path = "/able"\nkeep_releases'))
    host.stage(3)
    host.change().run(name(3))
    host.statuses[name(3)] = itertools.repeat(503)
    host.follow()
    host.assert_whole()
    assert host.state.history[-1].outcome == "rolled back"


@pytest.mark.parametrize(
    ("new", "old", "outcome"),
    [
        ({"SubState": "auto-restart", "ActiveState": "activating"}, {}, "rolled back"),
        ({"NRestarts": "1"}, {}, "rolled back"),
        ({"ActiveState": "failed"}, {"NRestarts": "9"}, "rolled back"),
        ({"NRestarts": "1"}, {"SubState": "auto-restart", "ActiveState": "activating"}, "live"),
        ({"ActiveState": "activating", "Job": "7"}, {}, "live"),
    ],
)
def test_a_command_that_ends_turns_the_release_back(
    host: Host, new: dict[str, str], old: dict[str, str], outcome: str
) -> None:
    """Unless that of the old release does not run either; what restarted long ago and runs is no reason."""
    watch(host, 0.3)
    for slot, found in (("green", new), ("blue", old)):
        host.units[host.layout.command_unit("beat", slot)] |= found
    host.follow()
    last = host.state.history[-1]
    assert last.outcome == outcome
    assert ("inbox.beat@green.service ended" in last.reason) == bool(outcome == "rolled back" or old)


def test_a_verdict_is_awaited_for_as_long_as_the_release_is_watched(host: Host) -> None:
    change = host.change()
    change.run(name(2))
    host.follow()
    host.describe(host.settings.replace("watch_seconds = 0.05", "watch_seconds = 300"))
    result = release.Result("inbox", "release", changed=True, release=name(2), began=change.began)
    assert release.concluded(host.layout, result, host.say).verdict == "live"
    assert "watching for 0.05 s ..." in host.said


def test_more_workers_in_the_new_settings_keep_the_old_release_from_nothing(host: Host) -> None:
    """It comes back with as many as it has."""
    host.describe(host.settings.replace("count = 2", "count = 4"))
    host.stage(3)
    change = host.change()
    change.interrupt_service(name(3), "the schema changes", ["a"])
    change.fail(name(3), ForgeError("the migration failed"), undone=True)
    host.assert_whole()
    assert not host.state.maintenance


def test_restarts_of_long_ago_do_not_keep_the_old_release_from_coming_back(host: Host) -> None:
    """The counter of a unit is over its life, and an interrupted drain leaves it running."""
    change = host.change()
    host.meanwhile = interrupted
    with pytest.raises(KeyboardInterrupt):
        change.interrupt_service(name(2), "the schema changes", ["a"])
    assert host.is_up("blue")
    host.units[host.layout.service("blue")]["NRestarts"] = "2"
    change.fail(name(2), KeyboardInterrupt(), undone=True)
    host.assert_whole()
    assert not host.state.maintenance


def test_a_live_release_that_does_not_come_back_stops_no_command(host: Host) -> None:
    """The page stays, what failed first is what is told, and the release that mends it is made."""
    change = host.change()
    change.interrupt_service(name(2), "the schema changes", ["a"])
    host.broken.add(name(1))
    change.fail(name(2), ForgeError("the migration failed"), undone=True)
    host.assert_served()
    assert any("does not come back" in line for line in host.said)
    assert [entry.reason for entry in host.state.history] == ["the migration failed"]
    host.recover()
    host.change().run(name(2))
    host.repair()
    host.assert_whole()
    assert not host.state.maintenance


def test_a_release_under_the_page_is_not_recycled(host: Host) -> None:
    """Its code does not fit the schema."""
    present = host.state
    present.maintenance = "the schema changed"
    state.save(host.layout, present)
    result = release.recycle(host.layout, host.app, if_due=True, dry_run=True, say=host.say)
    assert not result.changed
    with pytest.raises(Refused, match="found the maintenance page"):
        release.recycle(host.layout, host.app, if_due=False, dry_run=True, say=host.say)


def test_nothing_is_recycled_where_nothing_was_released(new_host: Callable[[], Host]) -> None:
    host = new_host()
    assert not release.recycle(host.layout, host.app, if_due=True, dry_run=False, say=host.say).changed
    with pytest.raises(Refused, match="expected inbox to have a live release; found none"):
        release.recycle(host.layout, host.app, if_due=False, dry_run=False, say=host.say)


@pytest.mark.parametrize(("unready", "outcome"), [(1, "live"), (1000, "failed")])
def test_a_rollback_in_the_watch_asks_as_often_as_the_watch(host: Host, unready: int, outcome: str) -> None:
    """One slow answer of the warm slot is no verdict; where it stays unready, what serves goes on and is told."""
    watch(host)
    host.statuses[name(1)] = itertools.repeat(503, unready)

    def rollback() -> release.Result:
        return release.rollback(host.layout, host.app, to=None, breaking=False, dry_run=False, say=host.say)

    if outcome == "live":
        assert (rollback().release, host.layout.live_slot()) == (name(1), "blue")
        return
    with pytest.raises(CandidateFailed, match="still serves and is still watched"):
        rollback()
    assert host.layout.live_slot() == "green"
    # When both are unready, the operator decides.
    host.statuses[name(2)] = itertools.repeat(503)
    assert (rollback().release, host.layout.live_slot()) == (name(1), "blue")


@pytest.mark.parametrize("action", ["release", "rollback", "recycle", "rotation"])
def test_a_deploy_waits_for_what_a_timer_began(host: Host, action: Action) -> None:
    """Without the lock, which the verdict needs; of another deploy it is told."""
    watch(host, 0.3, action)
    # Its unit died: nobody else would start it again.
    host.units.clear()
    for slot in SLOTS:
        slots.start(host.layout, slot)
    follows = threading.Timer(0.2, host.follow)
    waits = action in ("recycle", "rotation")
    if waits:
        follows.start()
    with cutover.turn(host.layout, host.app, "release", host.say, ("recycle", "rotation")):
        found = host.state
        assert (found.operation is not None and found.operation.phase == "watching") != waits
        assert found.history == [] or found.history[-1].outcome == "live"
        assert lock.holder(host.layout)
        assert waits or host.layout.watch_unit() in host.units
    assert (f"waiting for the verdict on a {action}" in host.said) == waits
    if waits:
        follows.join()


def test_a_source_that_is_not_here_is_asked_for(host: Host) -> None:
    """Before Vault is, and before anything waits for an older cutover."""
    for file in staging.INPUTS:
        (host.layout.inputs / file).touch()
    with pytest.raises(Refused, match=r"expected the source 0{12} on this host; found none; name its archive with --a"):
        release.release(
            host.layout, host.app, archive=None, source_digest="0" * 64, breaking=False, dry_run=False, say=host.say
        )


@pytest.mark.parametrize(("seconds", "watched"), [("0.05", True), ("0", False)])
def test_what_is_not_watched_is_live_at_once(host: Host, seconds: str, watched: bool) -> None:
    host.describe(host.settings.replace("watch_seconds = 0.05", f"watch_seconds = {seconds}"))
    host.stage(3)
    change = host.change()
    change.run(name(3))
    assert change.watched == watched


def test_nothing_is_staged_while_a_release_is_watched(host: Host) -> None:
    """It may take the lock for a quarter of an hour, which the watch needs to turn back."""
    for file in staging.INPUTS:
        (host.layout.inputs / file).touch()
    watch(host)
    with pytest.raises(Locked, match=r"release of .*, watched for"):
        release.stage(host.layout, host.app, archive=None, source_digest="s1", dry_run=False, say=host.say)
    assert len(list(host.layout.releases.iterdir())) == 2


# With a schema.


@pytest.fixture
def with_schema(new_host: Callable[[], Host], bao: Bao, postgresql: str) -> Iterator[Callable[[], Host]]:
    """Makes hosts whose live release has revision a, and whose second brings b, which the first can't live with."""
    server = psycopg.conninfo.conninfo_to_dict(postgresql)
    place = f"{str(server['host']).replace('/', '%2F')}:{server['port']}"
    secrets = {"role-id": bao.role_id, "secret-id": bao.secret_id()}
    bao.put("forge/inbox/migrate", {"database_password": "p"})
    extra = f"""
[database]
placement = "external"
name = "postgres"
app_role = "inbox_app"
migrate_role = "inbox_migrate"
url = "postgresql://inbox_app@{place}/postgres"
[migration]
user = "inbox-migrate"
command = ["alembic", "upgrade", "head"]
path = "forge/inbox/migrate"
"""
    with psycopg.connect(postgresql, autocommit=True) as admin:
        admin.execute("CREATE ROLE inbox_migrate LOGIN PASSWORD 'p'")
        admin.execute("CREATE TABLE alembic_version (version_num text)")
        admin.execute("GRANT ALL ON alembic_version TO inbox_migrate")

        def bring_b() -> None:
            admin.execute("UPDATE alembic_version SET version_num = 'b'")

        def make() -> Host:
            host = new_host()
            host.describe(
                host.settings.replace("https://127.0.0.1:1", bao.address).replace("/ca.pem", str(bao.ca_file)) + extra
            )
            host.sealed = secrets
            host.layout.credentials.mkdir(parents=True, exist_ok=True)
            for part in identity.PARTS:
                host.layout.sealed("migrate", part).touch()
            host.make_live(host.stage(1, "a"))
            host.stage(2, "ab")
            host.on_migration = bring_b
            admin.execute("DELETE FROM alembic_version")
            admin.execute("INSERT INTO alembic_version VALUES ('a')")
            return host

        yield make
        admin.execute("DROP TABLE alembic_version")
        admin.execute("DROP ROLE inbox_migrate")


def migrate(host: Host, number: int = 2, *, breaking: bool = True) -> Cutover:
    """Bring the database to the schema of a release."""
    records = {record.id: record for record in staging.records(host.layout)}
    change = host.change()
    present = host.state
    live = records[present.live.release] if present.live else None
    values = {"database_password": "p"}
    migration.run(host.layout, host.app, records[name(number)], live, values, change, breaking=breaking)
    return change


def at(postgresql: str) -> str:
    """The revision of the database."""
    with psycopg.connect(postgresql) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchall()[0][0])


def break_schema(host: Host) -> None:
    migrate(host).run(name(2))


@pytest.mark.parametrize("repair", [Host.repair, Host.reboot])
def test_killed_at_any_step_of_a_breaking_release(
    with_schema: Callable[[], Host], repair: Callable[[Host], None], postgresql: str
) -> None:
    """What served comes back when the schema is as it was; otherwise the page stays until code comes that fits."""
    seen: set[tuple[bool, str]] = set()
    step, killed = 0, True
    while killed:
        host = with_schema()
        killed = host.killed_at(step, lambda: break_schema(host))  # noqa: B023
        host.assert_served()
        repair(host)
        host.assert_whole()
        live = host.state.live
        assert live
        moved = at(postgresql) == "b"
        assert bool(host.state.maintenance) == (moved and live.release == name(1))
        # Whatever came of it, the same release works then.
        host.change().run(name(2)) if moved else break_schema(host)
        host.repair()
        host.assert_whole()
        seen.add((moved, live.release))
        step += 1
    assert seen == {(False, name(1)), (True, name(1)), (True, name(2))}


def test_a_breaking_release_killed_after_a_rollback_over_a_migration(
    with_schema: Callable[[], Host], postgresql: str
) -> None:
    """The schema is newer than the code that serves, and has not moved all the same."""
    host = with_schema()
    host.on_migration()
    host.stage(3, "abc")
    present = host.state
    present.schema = name(2)
    state.save(host.layout, present)
    killed = host.change()
    killed.interrupt_service(name(3), "3 brings c", ["b"])
    killed.note_schema(staging.records(host.layout)[2])
    host.repair()
    host.assert_whole()
    assert (host.state.maintenance, host.state.schema, host.layout.live_slot()) == ("", name(2), "blue")
    assert at(postgresql) == "b"


def interrupted() -> None:
    raise KeyboardInterrupt


def failed() -> None:
    raise ForgeError("the unit failed")


@pytest.mark.parametrize(("happens", "error"), [(interrupted, KeyboardInterrupt), (failed, CandidateFailed)])
def test_a_migration_that_did_nothing_gives_the_old_release_back(
    with_schema: Callable[[], Host], happens: Callable[[], None], error: type[BaseException]
) -> None:
    """Also when it was Ctrl-C: the page does not stay for a schema that is as it was."""
    host = with_schema()
    present = host.state
    present.schema = name(1)
    state.save(host.layout, present)
    host.on_migration = happens
    with pytest.raises(error):
        migrate(host)
    host.assert_whole()
    assert (host.state.maintenance, host.state.schema) == ("", name(1))
    assert host.state.history[-1].outcome == "failed"


def test_a_page_that_was_there_before_stays_when_a_migration_fails(with_schema: Callable[[], Host]) -> None:
    """The old release did not fit the schema before it either."""
    host = with_schema()
    host.stage(3, "abc")
    host.on_migration()
    present = host.state
    present.maintenance, present.schema = "b came", name(2)
    state.save(host.layout, present)
    slots.maintenance(host.layout, on=True)
    slots.stop(host.layout, "blue")
    host.on_migration = failed
    with pytest.raises(CandidateFailed):
        migrate(host, 3)
    host.assert_whole()
    assert (host.state.maintenance, host.state.schema) == ("b came", name(2))


def test_ctrl_c_while_the_old_release_drains(with_schema: Callable[[], Host], monkeypatch: pytest.MonkeyPatch) -> None:
    host = with_schema()
    monkeypatch.setattr(slots, "drain", lambda *_arguments: interrupted())
    with pytest.raises(KeyboardInterrupt):
        migrate(host)
    host.assert_whole()
    assert not host.state.maintenance


@pytest.mark.parametrize("breaking", [True, False])
def test_a_database_that_goes_away_in_a_migration(
    with_schema: Callable[[], Host], postgresql: str, breaking: bool
) -> None:
    """How far it came is not known: that is said and written down, and the next command finds out."""
    host = with_schema()
    if not breaking:
        host.stage(3, "aB")

    def shut_down() -> None:
        with psycopg.connect(postgresql, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'forgectl'")
        raise ForgeError("the unit failed")

    host.on_migration = shut_down
    with pytest.raises(CandidateFailed, match="the database does not answer"):
        migrate(host, 2 if breaking else 3, breaking=breaking)
    host.assert_served()
    assert [entry.outcome for entry in host.state.history] == ["failed"]
    assert any("maintenance page" in line for line in host.said) == breaking
    host.repair()
    host.assert_whole()
    assert not host.state.maintenance
    assert [entry.outcome for entry in host.state.history] == ["failed"]


def test_a_rollback_after_a_killed_migration_is_judged_by_what_may_be_there(with_schema: Callable[[], Host]) -> None:
    """The unit goes on without the command that asked for it, so the database may have what the release brings."""
    host = with_schema()
    host.stage(3, "aB")

    def killed() -> None:
        host.left = 0
        host.point()

    host.on_migration = killed
    assert host.killed_at(1000, lambda: migrate(host, 3, breaking=False))
    assert host.state.schema == name(3)


def test_boot_shows_the_page_when_nobody_can_say_how_far_a_migration_came(with_schema: Callable[[], Host]) -> None:
    """Vault or the database may come up later than this host."""
    host = with_schema()
    host.change().interrupt_service(name(2), "the schema changes", ["a"])
    host.sealed = {"role-id": "none", "secret-id": "none"}
    host.boot()
    assert host.layout.maintenance.exists()
    assert any("left to the next command" in line for line in host.said)
