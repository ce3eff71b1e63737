"""What an operator does to a running host, and what its clients notice of it: nothing."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forge_load
import httpx
import pytest
from forge_events import (
    DRAINED,
    NGINX_AWAY,
    EventContext,
    answer,
    append,
    assert_one_live,
    forgectl,
    history,
    nginx_workers,
    psql,
    release,
    run_playbook,
    settle,
    table,
    touched,
)
from forge_load import lost_and_doubled
from forge_scenario import CONTAINER, PODMAN, Status, main_pid, show, until, weights_behind
from testinfra.host import Host

# An app around the app; `{unready}` decides over the readiness.
READINESS = """
import time as _time

_inner, _first = app, 0.0


async def app(scope, receive, send):
    global _first
    if scope["type"] == "http" and scope["path"] == "/ready":
        _first = _first or _time.monotonic()
        if {unready}:
            await send({{"type": "http.response.start", "status": 503, "headers": []}})
            await send({{"type": "http.response.body", "body": b""}})
            return
    await _inner(scope, receive, send)
"""
# Counts how many workers served at once, until so many different ones were seen. One that starts has inherited the
# listener, and serves once it holds its seat as well: a lock of its own.
COUNT_SERVING = """
import collections, json, subprocess, sys, time
master, path, enough = sys.argv[1], sys.argv[2], int(sys.argv[3])
sockets = [line.split() for line in open("/proc/net/unix")]
inode = next(fields[6] for fields in sockets if fields[3] == "00010000" and fields[-1] == path)
seen, pids, end = collections.Counter(), set(), time.monotonic() + 120
while len(pids) < enough and time.monotonic() < end:
    listening = set()
    for pid in open(f"/proc/{master}/task/{master}/children").read().split():
        pids.add(pid)
        # A connection may be closed between listing and reading it.
        links = subprocess.run(["find", f"/proc/{pid}/fd", "-lname", f"socket:?{inode}?"], capture_output=True).stdout
        if links:
            listening.add(pid)
    # Read last: whoever sits down meanwhile lets another leave, and that one is not to be missed.
    seated = {line.split()[4] for line in open("/proc/locks") if " POSIX " in line}
    seen[len(listening & seated)] += 1
    time.sleep(0.05)
print(json.dumps([len(pids), seen]))
"""
# Queries come through its standard input, and a transaction stays open between them.
PSQL = [
    *(str(PODMAN), "exec", "--interactive", CONTAINER, "runuser", "--user", "postgres", "--"),
    *("psql", "--quiet", "--no-psqlrc", "inbox"),
]
OPEN_TRANSACTIONS = """
SELECT count(*) FROM pg_stat_activity WHERE application_name = 'psql' AND state = 'idle in transaction'
"""
KINDS = set(itertools.product(("get", "page", "post"), ("1.1", "2")))
"""Of the paced requests."""
FAILING_MIGRATION = '''"""Fails half-way."""

from alembic import op

revision: str = "9999"
down_revision: str | None = "{head}"
branch_labels: None = None
depends_on: None = None
backward_compatible: bool = True


def upgrade() -> None:
    op.execute("CREATE TABLE half_way ()")
    op.execute("SELECT 1 / 0")
'''


def test_load_sees_what_fails(
    event: EventContext, host: Host, live: str, site: tuple[str, str, Path], rate: float
) -> None:
    """The control: without app, answers or Nginx each kind of request fails by either protocol; lost rows are seen."""
    with event("control: the app stopped", strict=False) as control:
        host.check_output("systemctl stop 'inbox@*.socket' 'inbox@*.service' && sleep 2 && forgectl boot inbox")
    answered = {(record.kind, record.protocol) for record in control.result.failed if record.status == 502}
    assert answered >= KINDS, control.result.counts()
    workers = f"$(pgrep --parent {main_pid(host, live)})"
    with forge_load.running(*site, rate=rate, timeout=1, extras=False) as impatient:
        host.check_output(f"kill -STOP {workers}; sleep 3; kill -CONT {workers}")
    late = {(record.kind, record.protocol) for record in impatient.result.failed if record.outcome == "timeout"}
    assert late == KINDS, impatient.result.counts()
    with event("control: Nginx stopped", strict=False) as control:
        host.check_output(NGINX_AWAY)
    cut = {record for record in control.result.failed if record.outcome in ("refused", "reset", "truncated")}
    assert {(record.kind, record.protocol) for record in cut} >= KINDS, control.result.counts()
    assert {follower.cut > 0 for follower in control.result.followers.values()} == {True}
    control.assert_nothing_lost()
    number, identity = next(iter(control.result.acknowledged.items()))
    psql(host, f"DELETE FROM event WHERE id = {identity}")
    columns = "idempotency_key, fingerprint, type, payload, size"
    psql(
        host,
        f"INSERT INTO event ({columns}) SELECT 'twice-' || idempotency_key, fingerprint, type, payload, size "
        f"FROM event WHERE payload->>'run' = '{control.result.run}' AND payload->>'n' = '{number + 2}'",
    )
    assert lost_and_doubled(control.result, iter(table(host, control.result.run))) == ({number}, {number + 2})


def test_deploy_and_rollback(event: EventContext, host: Host, status: Status, source: Path) -> None:
    """New code, the same again, back without an argument, and forward again."""
    before = status()["live"]["release"]
    with event("deploy of new code") as deploy:
        run = run_playbook(host, "playbooks/deploy.yml", source)
        assert run.returncode == 0, run.stdout + run.stderr
    new = status()["live"]["release"]
    assert new != before
    assert_one_live(host, status, new)
    # The streams were told to come back, and lost nothing by it.
    assert {name: follower.told > 0 for name, follower in deploy.result.followers.items()} == {
        "sse": True,
        "websocket": True,
    }
    with event("the same deploy again"):
        again = run_playbook(host, "playbooks/deploy.yml", source)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "changed=0 " in again.stdout
    with event("rollback"):
        back = run_playbook(host, "playbooks/rollback.yml")
        assert back.returncode == 0, back.stdout + back.stderr
    assert_one_live(host, status, before)
    with event("forward again"):
        forward = answer(forgectl(host, "rollback", "inbox", "--to", new, "--json"))
        assert (forward["changed"], forward["release"], forward["verdict"]) == (True, new, "live")
    assert_one_live(host, status, new)
    with event("back while the old slot is warm"):
        cut = answer(release(host, touched(source), "--no-wait"))
        assert cut["verdict"] == "watching"
        warm = answer(forgectl(host, "rollback", "inbox", "--json"))
        assert warm["release"] == new
        # Nothing was started: the traffic moved.
        assert set(warm["phases"]) == {"swap"}
    assert_one_live(host, status, new)


@pytest.mark.exhaustive
def test_site_with_nothing_to_change(event: EventContext, host: Host, status: Status) -> None:
    """Provisioning again restarts nothing; it goes back to the inventory's source first, which is a deploy."""
    with event("site.yml with the inventory's source"):
        run = run_playbook(host, "site.yml")
        assert run.returncode == 0, run.stdout + run.stderr
    live = status()["live"]
    with event("site.yml with nothing to change"):
        again = run_playbook(host, "site.yml")
        assert again.returncode == 0, again.stdout + again.stderr
        assert "changed=0 " in again.stdout
    assert status()["live"] == live


def crash_at_import(source: Path) -> None:
    append(source / "src/inbox/main.py", '\nraise RuntimeError("broken on purpose")\n')


def never_ready(source: Path) -> None:
    append(source / "src/inbox/main.py", READINESS.format(unready="True"))


def fail_to_migrate(source: Path) -> None:
    versions = source / "migrations/versions"
    head = max(
        re.findall(r'^revision: str = "(\d+)"', "\n".join(map(Path.read_text, versions.glob("*.py"))), re.MULTILINE)
    )
    (versions / "9999_fails.py").write_text(FAILING_MIGRATION.format(head=head))


def turn_unready(source: Path) -> None:
    append(source / "src/inbox/main.py", READINESS.format(unready="_time.monotonic() > _first + 5"))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (crash_at_import, 4, "RuntimeError: broken on purpose"),
        pytest.param(never_ready, 4, "/ready answers 503", marks=pytest.mark.exhaustive),
        (fail_to_migrate, 4, "division by zero"),
        (turn_unready, 7, "was rolled back"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_deploy(
    event: EventContext,
    host: Host,
    status: Status,
    source: Path,
    change: Callable[[Path], None],
    code: int,
    message: str,
) -> None:
    """The old release serves, the playbook fails and says why, and history shows how it ended."""
    before = status()["live"]["release"]
    schema = psql(host, "SELECT version_num FROM alembic_version")
    change(source)
    with event(f"deploy: {change.__name__.replace('_', ' ')}"):
        # The watch has to see what comes after five seconds.
        run = run_playbook(host, "playbooks/deploy.yml", source, app_watch_seconds=10)
    assert run.returncode == 2, run.stdout
    output = run.stdout + run.stderr
    assert message in output, output
    assert re.search(rf"\brc: {code}\b", output), output
    assert_one_live(host, status, before)
    assert psql(host, "SELECT version_num FROM alembic_version") == schema
    assert psql(host, "SELECT to_regclass('half_way') IS NULL") == "t"
    last = history(host)[-1]
    assert last["outcome"] == ("rolled back" if code == 7 else "failed")
    assert last["reason"]


def test_recycling_by_cutover(event: EventContext, host: Host, status: Status) -> None:
    """The same release in a fresh slot."""
    before = status()["live"]
    with event("recycling by cutover"):
        recycled = answer(forgectl(host, "recycle", "inbox", "--json"))
        assert recycled["changed"]
    after = status()["live"]
    assert (after["release"], after["slot"] != before["slot"]) == (before["release"], True)
    assert_one_live(host, status, before["release"])
    idle = answer(forgectl(host, "recycle", "inbox", "--if-due", "--json"))
    assert not idle["changed"]


def test_cutovers_get_the_cpu_after_what_serves(event: EventContext, host: Host) -> None:
    """And so does whatever belongs to them, though whoever is logged in weighs as much as all services."""
    with event("recycled, looked at"):
        assert weights_behind(host, "forgectl recycle inbox") == ("20", "20")
    for unit in ("forge-watch@inbox.service", "forge-recycle@inbox.service", "inbox-migrate@x.service"):
        assert (show(host, unit, "Slice"), show(host, unit, "CPUWeight")) == ("system.slice", "20")


@pytest.fixture
def recycling(host: Host, rate: float) -> Iterator[None]:
    """Workers that are to be replaced every four seconds: each of two answers half of the requests."""
    run = run_playbook(host, "playbooks/deploy.yml", app_max_requests=round(2 * rate))
    assert run.returncode == 0, run.stdout + run.stderr
    yield
    again = run_playbook(host, "playbooks/deploy.yml")
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.usefixtures("recycling")
def test_recycling_of_workers(event: EventContext, host: Host, status: Status) -> None:
    """With `max_requests` set low workers are replaced all the time, and never two at once."""
    settle(status)
    slot = status()["live"]["slot"]
    count = status()["workers"]["count"]
    with event("workers recycled"):
        master = str(main_pid(host, f"inbox@{slot}.service"))
        path = f"/run/inbox/{slot}.sock"
        sampled = host.check_output("python3 -c %s %s %s %s", COUNT_SERVING, master, path, str(count + 2))
        assert main_pid(host, f"inbox@{slot}.service") == int(master)
    workers, serving = json.loads(sampled)
    assert workers >= count + 2
    assert min(map(int, serving)) == count - 1, serving


def test_rotation_of_logs(event: EventContext, host: Host) -> None:
    """logrotate and journald start new files; Nginx opens its own anew without a reload."""
    with event("logrotate and journald rotation") as happening:
        for _ in range(5):
            host.check_output("logrotate --force /etc/logrotate.conf")
            host.check_output("journalctl --rotate")
            time.sleep(1)  # rotated files are named by the second
    newest = host.check_output("ls --sort=time /var/log/nginx/inbox.json-*").splitlines()[0]
    assert float(host.check_output("stat --format=%%.Y %s", newest)) > happening.began
    assert host.check_output("tail --lines=1 /var/log/nginx/inbox.json")


def test_changed_setting_of_nginx(event: EventContext, host: Host, client: httpx.Client) -> None:
    """A reload closes idle connections, in good order, and nothing else; afterwards the setting is in force."""
    changes: tuple[dict[str, Any], ...] = ({"nginx_hsts_seconds": 120}, {})
    served = []
    for variables in changes:
        before = nginx_workers(host)
        with event(f"site.yml, {variables or 'as before'}", idle=True):
            run = run_playbook(host, "site.yml", **variables)
            assert run.returncode == 0, run.stdout + run.stderr
            assert "changed=0 " not in run.stdout
        assert not set(before) & set(nginx_workers(host))
        served.append(client.get("/health").headers["strict-transport-security"])
    assert served[0] == "max-age=120"
    assert served[1] != served[0]


@pytest.mark.exhaustive
def test_replaced_certificate(event: EventContext, host: Host) -> None:
    """It is served at once."""
    command = "openssl s_client -connect localhost:443 -servername inbox.example.com </dev/null 2>/dev/null"
    served = f"{command} | openssl x509 -noout -fingerprint"
    before = host.check_output(served)
    with event("certificate replaced", idle=True):
        run = run_playbook(host, "site.yml", __nginx_renewal_days=398)
        assert run.returncode == 0, run.stdout + run.stderr
        assert until(lambda: host.check_output(served) != before, 10)


def test_late_commit_reaches_every_stream(event: EventContext, host: Host, source: Path) -> None:
    """An insert is held open until both followers have moved to the new slot: it comes once to each of them."""
    columns = "idempotency_key, fingerprint, type, payload, size"
    with event("an insert held open over a cutover") as happening:
        with subprocess.Popen(PSQL, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as late:
            assert late.stdin
            late.stdin.write(
                f"BEGIN; INSERT INTO event ({columns}) VALUES (gen_random_uuid(), '', 'late', '{{}}', 2);\n"
            )
            late.stdin.flush()
            until(lambda: psql(host, OPEN_TRANSACTIONS) == "1", 10)
            answer(release(host, source, "--no-wait"))
            followers = happening.result.followers.values()
            until(lambda: all(follower.told for follower in followers), DRAINED, every=0.5)
            time.sleep(3)  # they were told to come back within 2 s
            late.stdin.write("COMMIT;\n")
            late.stdin.close()
        assert late.returncode == 0
    identity = int(psql(host, "SELECT max(id) FROM event WHERE type = 'late'"))
    later = [event for event in happening.result.acknowledged.values() if event > identity]
    assert later
    for follower in happening.result.followers.values():
        assert follower.told > 0
        assert follower.seen.count(identity) == 1
        # It came late, after events with greater ids, and none of those was passed over for it.
        assert set(later) <= set(follower.seen)
