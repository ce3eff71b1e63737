"""lease.py as a process beside a real Vault and PostgreSQL; the tests stand in for systemd."""

import json
import os
import pwd
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from conftest import ROOT_TOKEN, SOURCE, Bao, admits, describe
from forgectl import config, identity, lease, release, slots, state, systemd
from forgectl.config import App
from forgectl.errors import Refused, SecretsError
from forgectl.layout import Layout

ROOT = Path(__file__).parents[2]
# Seconds; far more than a start of Python takes on a machine that is busy with other tests.
TTL, MAX_TTL = 12, 30
PASSWORD = "of-the-database-engine"  # pragma: allowlist secret
DATABASE = """
[database]
placement = "external"
name = "inbox"
url = "postgresql+asyncpg://nobody@db.example.com/inbox?ssl=require"
app_role = "inbox_app"
vault_role = "inbox"
"""
KEEP = """
import signal, sys
from pathlib import Path
from forgectl import lease
from forgectl.layout import Layout

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
say = lambda text: print(text, file=sys.stderr, flush=True)
lease.keep(Layout("inbox", Path(sys.argv[1])), "blue", say)
"""
# Says what it was asked, and of a unit the state that the test wrote.
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$FORGE_TEST/asked"
[ "$1" != show ] || printf 'ActiveState=%s\\nJob=\\n' "$(cat "$FORGE_TEST/state")"
"""


class Line(socketserver.ThreadingTCPServer):
    """The way to Vault, which the tests can cut: a TCP relay on a port of its own."""

    # Vault leaves a connection that somebody kept open for five minutes; its relay is nothing to wait for.
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        self.cut = False
        line = self

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if line.cut:
                    return
                with socket.create_connection(("127.0.0.1", port)) as server:
                    back = threading.Thread(target=_pump, args=(server, self.request), daemon=True)
                    back.start()
                    _pump(self.request, server)
                    back.join()

        super().__init__(("127.0.0.1", 0), Relay)
        self.address = f"https://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,)).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class Unit:
    """The unit beside slot blue, as systemd runs it: credentials, readiness, and the store of open files."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.folder = layout.root / "unit"
        self.folder.mkdir()
        (self.folder / "systemctl").write_text(SYSTEMCTL)
        (self.folder / "systemctl").chmod(0o755)
        self.slot_is("active")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.folder / "notify"))
        self._notify.settimeout(10)
        self.stored: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def slot_is(self, found: str) -> None:
        (self.folder / "state").write_text(found)

    def start(self) -> "Unit":
        """Start it, with what an earlier process stored, and wait until it is ready."""
        environment = {
            "PYTHONPATH": str(SOURCE),
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "CREDENTIALS_DIRECTORY": str(self.layout.root / "credentials"),
            "NOTIFY_SOCKET": str(self.folder / "notify"),
            "FORGE_TEST": str(self.folder),
        }
        kept = self.stored[-1] if self.stored else None
        if kept is not None:
            environment |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "lease"}
        command = [sys.executable, "-c", KEEP, str(self.layout.root)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                # The shell becomes the process, so its number is the one that systemd would set.
                ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "-", *command],
                env=environment,
                stderr=log,
                pass_fds=[] if kept is None else [3],
                preexec_fn=None if kept is None else lambda: os.dup2(kept, 3),
            )
        while self._hear() != "READY=1":
            pass
        return self

    def _hear(self) -> str:
        data, descriptors, _, _ = socket.recv_fds(self._notify, 4096, 1)
        self.stored += descriptors
        return data.decode()

    def leased(self) -> tuple[str, str]:
        """User and password, once they are there; also takes what it stored meanwhile."""
        found = lease.ask(self.layout, "blue")
        self._notify.settimeout(0.1)
        with suppress(TimeoutError):
            while True:
                self._hear()
        self._notify.settimeout(10)
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self._process
        self._process.send_signal(number)
        return self._process.wait(10)

    def wait(self) -> int:
        assert self._process
        return self._process.wait(15)

    def close(self) -> None:
        # pytest shows it when the test fails.
        print(self.log)
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for descriptor in self.stored:
            os.close(descriptor)
        self._notify.close()

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    @property
    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def due(self) -> str:
        return lease.due(self.layout, "blue")


def until(condition: Callable[[], Any], seconds: float) -> float:
    """Wait until a condition holds; returns the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def engine(bao: Bao, postgresql: str) -> Iterator[str]:
    """What docs/vault.md says, as it stands there but for the server's address and the times; the app's role id."""
    page = (ROOT / "docs/vault.md").read_text().partition("## Leased database users")[2]
    queries, commands = (re.search(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for kind in ("sql", "sh"))
    assert queries
    assert commands
    place = dict(part.split("=") for part in postgresql.split())
    script = commands[1]
    for was, becomes in (
        ("db.example.com:5432/inbox?sslmode=verify-full", f"127.0.0.1:{place['port']}/postgres?sslmode=disable"),
        ("default_ttl=1h max_ttl=24h", f"default_ttl={TTL}s max_ttl={MAX_TTL}s"),
        ("token_period=1h token_explicit_max_ttl=24h", f"token_period={TTL}s token_explicit_max_ttl={2 * MAX_TTL}s"),
    ):
        assert was in script
        script = script.replace(was, becomes)
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE ROLE inbox_rw")
        connection.execute(queries[1].replace("'...'", f"'{PASSWORD}'").encode())
    bao.client.sys.create_or_update_policy(
        "forge-inbox-app", 'path "secret/data/forge/inbox/app" { capabilities = ["read"] }'
    )
    environment = {"BAO_ADDR": bao.address, "BAO_TOKEN": ROOT_TOKEN, "BAO_CACERT": str(bao.ca_file)}
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        env={"PATH": os.environ["PATH"], "HOME": str(bao.ca_file.parent), **environment},
        input=PASSWORD,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    yield str(bao.client.auth.approle.read_role_id("forge-inbox-app")["data"]["role_id"])
    bao.client.sys.disable_secrets_engine("database")
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("DROP ROLE inbox_rw")
        connection.execute("DROP ROLE vault")


def secret_id(bao: Bao, approle: str = "forge-inbox-app") -> str:
    return str(bao.client.auth.approle.generate_secret_id(approle)["data"]["secret_id"])


@pytest.fixture
def line(bao: Bao) -> Iterator[Line]:
    with Line(bao.port) as line:
        yield line
        line.shutdown()


@pytest.fixture
def host(layout: Layout, bao: Bao, line: Line, engine: str) -> Layout:
    """A release in slot blue whose database user is leased, and the folders that systemd makes."""
    variables = 'FORGE_SIGNING_KEY = "signing_key"\nFORGE_DATABASE_PASSWORD = "database_password"\n'
    folder = layout.releases / "R1"
    folder.mkdir()
    (folder / "settings.toml").write_text(describe(line.address, str(bao.ca_file), variables) + DATABASE)
    (layout.slots / "blue").symlink_to("../releases/R1")
    layout.lease_folder("blue").mkdir(parents=True)
    (layout.root / "credentials").mkdir()
    (layout.root / "credentials/role-id").write_text(engine)
    (layout.root / "credentials/secret-id").write_text(secret_id(bao))
    return layout


@pytest.fixture
def unit(host: Layout) -> Iterator[Unit]:
    unit = Unit(host)
    yield unit
    unit.close()


def users(postgresql: str) -> list[str]:
    """The users that Vault made and has not removed."""
    with psycopg.connect(postgresql) as connection:
        rows = connection.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-%' ORDER BY rolname").fetchall()
        return [row[0] for row in rows]


@pytest.fixture(autouse=True)
def _no_user_stays(bao: Bao, engine: str, postgresql: str) -> Iterator[None]:
    yield
    assert engine
    bao.client.sys.revoke_prefix("database/creds/inbox")
    until(lambda: not users(postgresql), 10)


def test_the_user_lives_as_long_as_the_slot(unit: Unit, postgresql: str) -> None:
    user, password = unit.start().leased()
    assert admits(postgresql, user, password)
    unit.slot_is("inactive")
    assert unit.end() == 0
    assert unit.asked[-1].startswith("show ")
    assert unit.asked[-1].endswith(" inbox@blue.service")
    # Long before its time.
    until(lambda: not users(postgresql), TTL / 2)
    assert not admits(postgresql, user, password)
    assert password not in unit.log


def test_it_is_renewed_and_then_replaced_in_time(unit: Unit, postgresql: str) -> None:
    """Renewed for as long as Vault gives the whole TTL; the next user is asked for while the present one works."""
    began = time.monotonic()
    user, password = unit.start().leased()
    until(lambda: time.monotonic() - began > TTL + 1, TTL + 2)
    assert unit.due == ""
    assert admits(postgresql, user, password)
    until(lambda: unit.asked, MAX_TTL)
    assert admits(postgresql, user, password)
    assert time.monotonic() - began < MAX_TTL
    assert unit.asked[0] == "start --no-block forge-recycle@inbox.service"
    assert re.match(r"the lease of its database user can be renewed no further and ends in \d+ s", unit.due)
    # Nobody came: the on-call has to know, once, while there is still something to be done.
    until(lambda: "ALERT" in unit.log, MAX_TTL)
    assert admits(postgresql, user, password)
    alert = next(line for line in unit.log.splitlines() if "ALERT" in line)
    assert re.match(r"<3>ALERT inbox: the database user of slot blue ends in \d+ s: no cutover has", alert), alert
    # And then, rather than nothing, whatever systemd starts in the slot gets another.
    until(lambda: "is lost: it has ended" in unit.log, MAX_TTL)
    second, password = unit.leased()
    assert second != user
    assert admits(postgresql, second, password)
    assert unit.log.count("ALERT") == 2


def test_a_crash_loses_no_lease(unit: Unit, postgresql: str) -> None:
    user, password = unit.start().leased()
    assert len(unit.stored) == 1
    assert unit.end(signal.SIGKILL) == -signal.SIGKILL
    assert lease_error(unit).state == "unreachable"
    unit.start()
    assert unit.leased() == (user, password)
    time.sleep(TTL + 0.5)
    assert admits(postgresql, user, password)
    assert users(postgresql) == [user]
    assert len(unit.stored) == 1
    unit.slot_is("failed")
    assert unit.end() == 0
    until(lambda: not users(postgresql), 5)


def lease_error(unit: Unit) -> SecretsError:
    with pytest.raises(SecretsError) as caught:
        unit.leased()
    return caught.value


@pytest.mark.parametrize("found", ["active", "activating", "deactivating"])
def test_a_restart_beside_a_slot_that_runs_revokes_nothing(unit: Unit, postgresql: str, found: str) -> None:
    leased = unit.start().leased()
    unit.slot_is(found)
    assert unit.end() == 0
    assert admits(postgresql, *leased)
    assert "slot blue still runs, so its lease is not revoked; it lasts" in unit.log
    unit.start()
    assert unit.leased() == leased


def test_a_lease_that_is_gone_is_replaced_and_told(unit: Unit, bao: Bao, postgresql: str) -> None:
    user, _ = unit.start().leased()
    bao.client.sys.revoke_prefix("database/creds/inbox")
    until(lambda: "ALERT" in unit.log, TTL)
    alert = next(line for line in unit.log.splitlines() if "ALERT" in line)
    assert alert.startswith(f"<3>ALERT inbox: the lease of {user}, the database user of slot blue, is lost: Vault at ")
    until(lambda: unit.leased()[0] != user, TTL)
    assert admits(postgresql, *unit.leased())
    assert unit.due == "its database user is gone"
    # Again with the next user: the fresh slot of the first time may not have got one.
    until(lambda: unit.asked.count("start --no-block forge-recycle@inbox.service") == 2, 1)


def test_nobody_notices_an_outage_that_is_short(unit: Unit, line: Line, postgresql: str) -> None:
    leased = unit.start().leased()
    line.cut = True
    until(lambda: "is unreachable" in unit.log, TTL)
    until(lambda: "ALERT" in unit.log, TTL)
    assert re.search(
        r"<3>ALERT inbox: the database user of slot blue ends in \d+ s: Vault at .* is unreachable", unit.log
    )
    line.cut = False
    # Longer than the quarter that was left, and over before Vault renews it no further.
    time.sleep(TTL / 2)
    assert unit.leased() == leased
    assert admits(postgresql, *leased)
    assert unit.log.count("ALERT") == 1
    assert unit.due == ""


def test_it_waits_for_vault_and_says_so(unit: Unit, line: Line, postgresql: str) -> None:
    line.cut = True
    unit.start()
    error = lease_error(unit)
    assert error.state == "unreachable"
    assert f"Vault at {line.address} is unreachable" in str(error)
    line.cut = False
    until(lambda: "leased" in unit.log, 10)
    assert admits(postgresql, *unit.leased())


@pytest.mark.parametrize("options", [{"token_type": "batch"}, {"token_num_uses": 9}])
def test_a_token_that_cannot_be_kept_is_refused(
    unit: Unit, bao: Bao, postgresql: str, options: dict[str, str | int]
) -> None:
    bao.client.auth.approle.create_or_update_approle("fleeting", token_policies=["forge-inbox-lease"], **options)
    enrol(unit, bao, "fleeting")
    error = lease_error(unit.start())
    assert error.state == "denied"
    assert "AppRole fleeting that can be renewed" in str(error)
    assert "set token_type=service and token_num_uses=0 there" in str(error)
    assert users(postgresql) == []
    bao.client.auth.approle.delete_role("fleeting")


def enrol(unit: Unit, bao: Bao, approle: str) -> None:
    role_id = bao.client.auth.approle.read_role_id(approle)["data"]["role_id"]
    (unit.layout.root / "credentials/role-id").write_text(role_id)
    (unit.layout.root / "credentials/secret-id").write_text(secret_id(bao, approle))


def test_a_rejected_secret_id_is_told_and_opened_anew(unit: Unit) -> None:
    """systemd opens credentials when a process starts: one that was renewed since helps the next only."""
    (unit.layout.root / "credentials/secret-id").write_text("wrong")
    error = lease_error(unit.start())
    assert (error.state, "rejected this host's role id or secret id" in str(error)) == ("rejected", True)
    assert unit.wait() == 1


def test_only_the_app_is_served(host: Layout) -> None:
    said: list[str] = []
    held = lease.Held("t", 60, 1e9, "l", 60, 1e9, True, "user", "hunter2")
    desk = lease.Desk(host.lease_folder("blue") / "socket", os.getuid() + 1, said.append)
    desk.hand_out(held)
    with pytest.raises(SecretsError, match=r"inbox-lease@blue.service has no database user yet"):
        lease.ask(host, "blue")
    assert said == [
        f"refused the database user to process {os.getpid()} of user {os.getuid()}; it is for user {os.getuid() + 1}"
    ]
    lease.Desk(host.lease_folder("blue") / "socket", os.getuid(), said.append).hand_out(held)
    assert lease.ask(host, "blue") == ("user", "hunter2")
    assert (host.lease_folder("blue") / "socket").stat().st_mode & 0o777 == 0o660


def test_a_release_without_a_lease_has_no_such_unit(host: Layout, bao: Bao) -> None:
    (host.releases / "R1/settings.toml").write_text(describe(bao.address, str(bao.ca_file)))
    with pytest.raises(Refused, match="found that it does not"):
        lease.keep(host, "blue", print)


def app_of(host: Layout) -> App:
    return config.load(host.releases / "R1/settings.toml")


def test_the_gate_asks_whether_it_may(host: Layout, bao: Bao, engine: str, postgresql: str) -> None:
    app = app_of(host)
    lease.check(app, engine, secret_id(bao))
    with pytest.raises(SecretsError, match="AppRole inbox to be allowed database/creds/inbox; found that it is not"):
        lease.check(app, bao.role_id, bao.secret_id())
    assert users(postgresql) == []


def test_what_is_leased_is_asked_of_nobody_else(host: Layout) -> None:
    assert identity.needed(app_of(host), "app") == {"FORGE_SIGNING_KEY": "signing_key"}
    text = (host.releases / "R1/settings.toml").read_text().replace('vault_role = "inbox"', "")
    (host.releases / "R1/settings.toml").write_text(text)
    assert identity.needed(app_of(host), "app").keys() == {"FORGE_SIGNING_KEY", "FORGE_DATABASE_PASSWORD"}


LAUNCH = "import sys; from pathlib import Path; from forgectl.launch import main; main(sys.argv[2:], Path(sys.argv[1]))"
TELL = "import json, os; print(json.dumps(dict(os.environ)))"


def launch(host: Layout) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(host.root), "app", "inbox", "blue"],
        env={
            "PYTHONPATH": str(SOURCE),
            "PATH": os.environ["PATH"],
            "CREDENTIALS_DIRECTORY": str(host.root / "credentials"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def program(host: Layout, bao: Bao) -> Layout:
    """Something in slot blue that tells what environment it got."""
    bao.put("forge/inbox/app", {"signing_key": "s"})
    settings = host.releases / "R1/settings.toml"
    url = 'FORGE_DATABASE_URL = "postgresql+asyncpg://nobody@db.example.com/inbox?ssl=require"'
    text = settings.read_text().replace("[settings]\n", f"[settings]\n{url}\n")
    settings.write_text(text.replace("[secrets]\n", "[secrets]\nretry_seconds = 0\n"))
    package = host.releases / "R1/source/src/gunicorn"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(TELL)
    (package / "__init__.py").touch()
    (host.releases / "R1/venv/bin").mkdir(parents=True)
    (host.releases / "R1/venv/bin/python").symlink_to(sys.executable)
    return host


def test_the_app_starts_with_the_leased_user(program: Layout) -> None:
    desk = lease.Desk(program.lease_folder("blue") / "socket", os.getuid(), print)
    desk.hand_out(lease.Held("t", 60, 1e9, "l", 60, 1e9, True, "v-approle-inbox-x:y", "p@ss/word"))
    done = launch(program)
    assert (done.returncode, done.stderr) == (0, "")
    environment = json.loads(done.stdout)
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).rmdir()
    assert environment["FORGE_DATABASE_PASSWORD"] == "p@ss/word"  # pragma: allowlist secret
    assert environment["FORGE_SIGNING_KEY"] == "s"
    url = urlsplit(environment["FORGE_DATABASE_URL"])
    assert (url.username, url.password, url.hostname, url.query) == (
        "v-approle-inbox-x%3Ay",
        None,
        "db.example.com",
        "ssl=require",
    )


def test_the_app_does_not_start_without(program: Layout) -> None:
    done = launch(program)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"forge-launch: inbox: expected the database user at {program.lease_folder('blue')}")
    desk = lease.Desk(program.lease_folder("blue") / "socket", os.getuid(), print)
    desk.explain(SecretsError("denied", "Vault denied a database user"))
    assert launch(program).stderr == "forge-launch: inbox: Vault denied a database user\n"


def test_a_due_lease_makes_a_recycling_due(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one that has just failed: there may be no time for a pause."""
    monkeypatch.setattr(systemd, "memory", lambda _unit: 0)
    monkeypatch.setattr(systemd, "memory_limit", lambda _unit: 0)
    present = state.State(live=state.Slotted("R1", "blue", state.now()))
    present.record(state.Entry("R1", state.now(), "x", "failed", {}, action="recycle"))
    assert release._due(host, app_of(host), present) == ""
    (host.lease_folder("blue") / "due").write_text("it ends")
    assert release._due(host, app_of(host), present) == "it ends"
    other = state.State(live=state.Slotted("R1", "green", state.now()))
    assert release._due(host, app_of(host), other) == ""


def test_the_lease_ends_after_its_slot(host: Layout, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{unit.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FORGE_TEST", str(unit.folder))
    host.drop_in("blue").parent.mkdir(parents=True)
    host.drop_in("blue").touch()
    slots.stop(host, "blue")
    assert [line for line in unit.asked if line.startswith("stop")] == ["stop inbox@blue.socket inbox@blue.service"]
    host.lease_template.touch()
    slots.stop(host, "blue")
    assert [line for line in unit.asked if line.startswith("stop")][1:] == [
        "stop inbox@blue.socket inbox@blue.service",
        "stop inbox-lease@blue.service",
    ]


def test_the_user_of_the_tests_is_the_apps(host: Layout) -> None:
    """Or the unit above would serve nobody."""
    assert pwd.getpwnam(app_of(host).user).pw_uid == os.getuid()
