"""What goes wrong with an app: each fault for real under load, with the commands of its runbook."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import hvac
import pytest
from forge_events import answer, append, copy_app, kill_forgectl, psql, release, settle, upload
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import Status, main_pid, ready, reboot, show, until
from forge_vault import PATH, put, timer
from testinfra.host import Host

SEEN, LOOK, MEND, MENDED = "What you see", "Look", "Mend", "See that it is mended"
# Of this session: a release of an earlier one has to start all the same.
BROKEN = f"/var/lib/inbox/broken-{uuid.uuid4().hex}"
# A release that does what it is told to; and that does not start where something is that it did not expect.
FAULTY = f'''

import os
import time
from pathlib import Path

if Path("{BROKEN}").exists():
    raise RuntimeError("found what nobody expected: {BROKEN}")
kept = []


@app.post("/v1/faults/block")
async def block(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@app.post("/v1/faults/eat")
async def eat(mib: int) -> int:
    for _ in range(mib // 4):
        kept.append(os.urandom(4096) * 1024)
    return os.getpid()


@app.post("/v1/faults/open")
async def open_files(count: int) -> int:
    try:
        for _ in range(count):
            kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    return os.getpid()
'''
# Once in a while its worker ends under a request.
CRASHING = """

import os
from itertools import count

requests, plain = count(1), app.__class__.__call__


async def crashing(self, scope, receive, send):
    if scope["type"] == "http" and scope["method"] == "POST" and next(requests) % 100 == 0:
        os._exit(1)
    await plain(self, scope, receive, send)


app.__class__.__call__ = crashing
"""


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of that release."""
    folder = copy_app(tmp_path_factory.mktemp("faulty") / "app")
    append(folder / "src/inbox/main.py", FAULTY)
    return folder


@pytest.fixture
def faulty(host: Host, status: Status, variant: Path) -> str:
    """Have that release live, above one that is not; returns its id."""
    settle(status)
    found = answer(release(host, variant))["release"]
    settle(status)
    return str(found)


def service(status: Status) -> str:
    """The unit of the live slot."""
    return f"inbox@{status()['live']['slot']}.service"


def test_memory(
    host: Host, status: Status, faulty: str, client: httpx.Client, fault: FaultContext, runbooks: Runbooks
) -> None:
    """The worker that ate it dies and is replaced; what is left is for a fresh slot."""
    page = "memory-growing"
    limit = int(show(host, service(status), "MemoryMax")) // 2**20
    with fault("a worker eats memory until its limit") as happening:
        assert client.post(f"/v1/faults/eat?mib={limit}").status_code == 502
        happening.told("F204")
        runbooks.follow(page, "A process was killed")
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, MEND)
    runbooks.follow(page, MENDED)
    assert status()["live"]["release"] == faulty


@pytest.mark.exhaustive
def test_memory_that_grows(
    host: Host, status: Status, faulty: str, client: httpx.Client, fault: FaultContext, runbooks: Runbooks
) -> None:
    """It is said before anything dies."""
    page = "memory-growing"
    assert status()["live"]["release"] == faulty
    limit = int(show(host, service(status), "MemoryMax")) // 2**20
    used = int(show(host, service(status), "MemoryCurrent")) // 2**20
    with fault("memory grows") as happening:
        assert client.post(f"/v1/faults/eat?mib={limit * 9 // 10 - used}").status_code == 200
        happening.told("F206")
        runbooks.follow(page, "Memory is near its limit")
        happening.mended_by(page)
        runbooks.follow(page, MEND)
    assert happening.hurt == []


@pytest.mark.exhaustive
def test_file_descriptors(
    status: Status, faulty: str, client: httpx.Client, fault: FaultContext, runbooks: Runbooks
) -> None:
    """A worker without any is replaced by nobody but a person."""
    page = "file-descriptors"
    with fault("file descriptors exhausted") as happening:
        client.post("/v1/faults/open?count=20000")
        happening.told("F210")
        runbooks.follow(page, SEEN)
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, MEND)
    runbooks.follow(page, MENDED)
    assert status()["live"]["release"] == faulty


@pytest.mark.exhaustive
def test_event_loop(faulty: str, client: httpx.Client, fault: FaultContext, runbooks: Runbooks) -> None:
    """All workers stand still: who does is found, says where, and is replaced."""
    page = "event-loop-blocked"
    with fault("event loop blocked") as happening:
        block(client, workers=2, seconds=50)
        happening.told("F207")
        runbooks.follow(page, SEEN)
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        assert "in block" in runbooks.follow(page, MEND)
    runbooks.follow(page, MENDED)
    assert faulty


def block(client: httpx.Client, *, workers: int, seconds: int) -> None:
    """Have so many workers stand still: who does takes no connection, so the next one goes to another."""
    for _ in range(workers):
        with pytest.raises(httpx.ReadTimeout):
            # A connection of its own each time.
            client.post(f"/v1/faults/block?seconds={seconds}", timeout=1, headers={"connection": "close"})


@pytest.mark.exhaustive
def test_workers_killed_on_timeout(
    host: Host,
    status: Status,
    faulty: str,
    variant: Path,
    client: httpx.Client,
    fault: FaultContext,
    runbooks: Runbooks,
) -> None:
    """With a shorter heartbeat than anybody may set: Gunicorn kills and replaces, and a rollback ends it."""
    page = "workers-killed-on-timeout"
    with shorter_heartbeat(host):
        answer(release(host, variant))
        settle(status)
    assert status()["live"]["release"] != faulty
    with fault("workers killed on timeout") as happening:
        block(client, workers=1, seconds=50)
        happening.told("F205")
        runbooks.follow(page, SEEN)
        assert "in block" in runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, MEND)
    runbooks.follow(page, MENDED)
    assert status()["live"]["release"] == faulty


@contextmanager
def shorter_heartbeat(host: Host) -> Iterator[None]:
    """Have the next release with another one."""
    path = "/etc/forge/apps/inbox.d/gunicorn.conf.py"
    host.check_output("cp --preserve=all %s /root/gunicorn.conf.py", path)
    try:
        host.check_output("sed --in-place 's/^timeout = .*/timeout = 6/' %s", path)
        yield
    finally:
        host.check_output("mv /root/gunicorn.conf.py %s", path)


@pytest.mark.exhaustive
def test_master_killed(host: Host, status: Status, fault: FaultContext) -> None:
    """systemd starts another one, on the socket that it kept open."""
    unit = service(status)
    before = main_pid(host, unit)
    with fault("Gunicorn's master killed") as happening:
        host.check_output("systemctl kill --kill-who=main --signal=KILL %s", unit)
        until(lambda: main_pid(host, unit) not in (0, before), 30)
    assert happening.page == ""


@pytest.mark.exhaustive
def test_reboot(client: httpx.Client, status: Status, fault: FaultContext) -> None:
    """What was live is live again."""
    before = status()["live"]
    with fault("host rebooted") as happening:
        reboot(client, patience=30)
        until(lambda: ready(client), 60)
    assert happening.hurt
    assert status()["live"] == before


@pytest.mark.exhaustive
def test_half_finished(host: Host, status: Status, source: Path, fault: FaultContext, runbooks: Runbooks) -> None:
    """Killed before the swap: nobody notices, and one command cleans up."""
    page = "half-finished-release"
    before = status()["live"]
    with fault("half-finished deploy") as happening:
        kill_forgectl(host, "start ...", "release", "inbox", "--archive", upload(source), delay=1.0)
        happening.told("F302")
        runbooks.follow(page, "Something was interrupted")
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, "End what was interrupted")
    runbooks.follow(page, MENDED)
    assert (happening.hurt, status()["live"]) == ([], before)


# Stops who holds the lock, and has it hold it since an hour ago: in the same file, on which the lock is.
HANGS = """
import json, os, signal
with open("/var/lib/forge/inbox/lock", "r+") as file:
    holder = json.load(file)
    os.kill(holder["pid"], signal.SIGSTOP)
    holder["since"] -= 3600
    file.seek(0)
    json.dump(holder, file)
    file.truncate()
"""


@pytest.mark.exhaustive
def test_lock_held(host: Host, status: Status, source: Path, fault: FaultContext, runbooks: Runbooks) -> None:
    """A command hangs: who it is, is told; without it the next one works."""
    page = "half-finished-release"
    append(source / "src/inbox/main.py", "\nimport time\ntime.sleep(20)\n")
    with fault("a command hangs") as happening:
        host.check_output("systemd-run --quiet --collect forgectl release inbox --archive %s", upload(source))
        until(lambda: (status()["operation"] or {}).get("phase") == "starting", 60)
        host.check_output("python3 -c %s", HANGS)
        happening.told("F301")
        runbooks.follow(page, "Something holds the lock")
        happening.mended_by(page)
        runbooks.follow(page, "Free the lock")
        assert status()["lock"] is None
    assert happening.hurt == []


def test_release_permissions(host: Host, status: Status, fault: FaultContext, runbooks: Runbooks) -> None:
    """Who starts can't read the code: a crash becomes an outage, until the permissions are right again."""
    page = "release-permissions"
    live = status()["live"]
    with fault("wrong permissions on the release folder") as happening:
        host.check_output("chmod --recursive go= /srv/inbox/releases/%s", live["release"])
        host.check_output("systemctl kill --kill-who=main --signal=KILL %s", f"inbox@{live['slot']}.service")
        happening.told("F209", "F201")
        runbooks.follow(page, SEEN)
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, MEND)
    runbooks.follow(page, MENDED)
    assert status()["live"] == live


@pytest.mark.exhaustive
def test_variables(host: Host, vault: hvac.Client, status: Status, fault: FaultContext, runbooks: Runbooks) -> None:
    """Somebody deleted them in Vault, and then the app had to start."""
    page = "variables-not-arriving"
    newest = vault.secrets.kv.v2.read_secret_metadata(PATH)["data"]["current_version"]
    with fault("variables do not arrive") as happening:
        vault.secrets.kv.v2.delete_latest_version_of_secret(PATH)
        host.check_output("systemctl kill --kill-who=main --signal=KILL %s", service(status))
        happening.told("F211")
        runbooks.follow(page, "The app does not start any more")
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, "A secret is gone from Vault")
    runbooks.follow(page, MENDED)
    assert vault.secrets.kv.v2.read_secret_metadata(PATH)["data"]["current_version"] == newest


@pytest.mark.exhaustive
def test_release_without_its_variable(host: Host, status: Status, source: Path, runbooks: Runbooks) -> None:
    """It never takes traffic, and what it needs is said."""
    append(source / "src/inbox/main.py", '\nimport os\nos.environ["SHOP_KEY"]\n')
    before = status()["live"]
    assert release(host, source).rc == 4
    said = runbooks.follow("variables-not-arriving", "A release fails")
    assert "it needs the environment variable SHOP_KEY: set it in apps.inbox.settings" in said
    assert status()["live"] == before


@pytest.mark.exhaustive
def test_service_exits(host: Host, status: Status, faulty: str, fault: FaultContext, runbooks: Runbooks) -> None:
    """What it needs has changed under a release that was well: the one before serves."""
    page = "service-exits-right-after-start"
    try:
        with fault("the service exits right after its start") as happening:
            host.check_output("touch %s && systemctl kill --kill-who=main --signal=KILL %s", BROKEN, service(status))
            happening.told("F201")
            runbooks.follow(page, SEEN)
            # It may be on its way to that, still.
            until(lambda: BROKEN in host.check_output("forgectl logs inbox --lines=30"), 60)
            assert "found what nobody expected" in runbooks.follow(page, LOOK)
            happening.mended_by(page)
            runbooks.follow(page, MEND)
    finally:
        host.check_output("rm %s", BROKEN)
    runbooks.follow(page, MENDED)
    assert status()["live"]["release"] != faulty


# A server that somebody started by hand, at the address of a slot.
STRAY = """
import os, socket, sys, time
os.unlink(sys.argv[1])
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
time.sleep(3600)
"""


@pytest.mark.exhaustive
def test_address(host: Host, status: Status, fault: FaultContext, runbooks: Runbooks) -> None:
    """Nginx is led to a stranger, who is sent away."""
    page = "address-already-in-use"
    live = status()["live"]
    with fault("the address is in use already") as happening:
        path = f"/run/inbox/{live['slot']}.sock"
        host.check_output("systemd-run --quiet --collect --unit=stray python3 -c %s %s", STRAY, path)
        happening.told("F203")
        runbooks.follow(page, SEEN)
        assert "python3" in runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, MEND)
    runbooks.follow(page, MENDED)
    assert host.run("systemctl is-active stray").stdout.strip() == "inactive"
    assert status()["live"]["slot"] != live["slot"]


# Somebody's transaction that nobody ends.
LOCKER = """
(echo 'BEGIN; LOCK TABLE event IN ACCESS EXCLUSIVE MODE;'; sleep 3600) |
    runuser --user postgres -- psql --quiet --no-psqlrc inbox
"""


@pytest.mark.exhaustive
def test_not_ready(host: Host, fault: FaultContext, runbooks: Runbooks) -> None:
    """Everybody waits for a lock, until whoever has it is sent away."""
    page = "live-but-not-ready"
    with fault("live but not ready") as happening:
        host.check_output("systemd-run --quiet --collect --unit=locker bash -c %s", LOCKER)
        happening.told("F202")
        runbooks.follow(page, SEEN)
        runbooks.follow(page, LOOK)
        assert "LOCK TABLE event" in runbooks.follow(page, "Is it the database?")
        happening.mended_by(page)
        runbooks.follow(page, MEND)
        host.check_output("systemctl stop locker")
    runbooks.follow(page, MENDED)


@pytest.mark.exhaustive
def test_errors_during_a_rollout(
    host: Host, status: Status, source: Path, fault: FaultContext, runbooks: Runbooks
) -> None:
    """A release whose workers die under requests passes its gate; who looks sees which it is, and goes back."""
    page = "errors-during-a-rollout"
    append(source / "src/inbox/main.py", CRASHING)
    before = status()["live"]["release"]
    with fault("502s during a rollout") as happening:
        answer(release(host, source, "--no-wait"))
        until(lambda: "502" in {str(record.status) for record in happening.result.failed}, 60)
        runbooks.follow(page, SEEN)
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, MEND)
    runbooks.follow(page, MENDED)
    assert status()["live"]["release"] == before


@pytest.mark.exhaustive
def test_schema(host: Host, fault: FaultContext, runbooks: Runbooks) -> None:
    """It is one migration behind, as after a restore; nobody notices but doctor."""
    page = "schema-mismatch"
    with fault("the schema is not the release's") as happening:
        restore_older_schema(host)
        happening.told("F304")
        runbooks.follow(page, SEEN)
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, "Without the control machine")
    runbooks.follow(page, MENDED)
    assert happening.hurt == []
    assert psql(host, SCHEMA) == "event_type_xid_id_idx|0002"


@pytest.mark.exhaustive
def test_schema_by_a_deploy(host: Host, status: Status, runbooks: Runbooks) -> None:
    """Of what is live already, which is left alone otherwise."""
    page = "schema-mismatch"
    # Its own source is live.
    runbooks.follow("variables-not-arriving", "A setting or a mapping is missing")
    settle(status)
    live = status()["live"]
    runbooks.follow(page, "The database is behind")
    assert status()["live"] == live
    restore_older_schema(host)
    runbooks.follow(page, "The database is behind")
    settle(status)
    assert psql(host, SCHEMA) == "event_type_xid_id_idx|0002"
    now = status()["live"]
    assert (now["release"], now["slot"] != live["slot"]) == (live["release"], True)


SCHEMA = "SELECT to_regclass('event_type_xid_id_idx'), version_num FROM alembic_version"


def restore_older_schema(host: Host) -> None:
    """Have the database as the first migration left it."""
    psql(host, "DROP INDEX event_type_xid_id_idx")
    psql(host, "UPDATE alembic_version SET version_num = '0001'")


@pytest.mark.exhaustive
def test_command(host: Host, fault: FaultContext, runbooks: Runbooks) -> None:
    """It is on a schedule, and the server goes on without it."""
    page, untidy = "command-failed", "/var/lib/inbox/untidy"
    try:
        with fault("a command of the app fails") as happening:
            host.check_output("touch %s", untidy)
            assert host.run("systemctl start --wait inbox.tidy.service").rc
            happening.told("F208")
            runbooks.follow(page, SEEN)
            assert "the disk is untidy" in runbooks.follow(page, LOOK)
            host.check_output("rm %s", untidy)
            happening.mended_by(page)
            runbooks.follow(page, MEND)
    finally:
        host.check_output("rm --force %s", untidy)
    runbooks.follow(page, MENDED)
    assert happening.hurt == []


@pytest.mark.exhaustive
def test_secrets_not_in_service(
    host: Host, vault: hvac.Client, status: Status, fault: FaultContext, runbooks: Runbooks
) -> None:
    """A version that is no good is refused, and the next one is put into service."""
    page = "secrets-not-in-service"
    with fault("newer secrets are not in service") as happening:
        put(vault, partner_token="")
        timer(host)
        happening.told("F405")
        runbooks.follow(page, "The newest version was refused")
        runbooks.follow(page, LOOK)
        happening.mended_by(page)
        runbooks.follow(page, "Write one that is right", {"value": "of the partner"})
        happening.told("F404")
        runbooks.follow(page, "A newer version waits")
        runbooks.follow(page, "Put it into service")
    runbooks.follow(page, MENDED)
    newest = vault.secrets.kv.v2.read_secret_metadata(PATH)["data"]["current_version"]
    assert status()["live"]["secrets"] == newest
