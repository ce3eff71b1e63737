"""Migrations: refused, behind the maintenance page, failed half-way, and rolled back across."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from forge_events import (
    EventContext,
    answer,
    assert_one_live,
    copy_app,
    forgectl,
    history,
    kill_forgectl,
    psql,
    release,
    settle,
    upload,
)
from forge_scenario import Status, until
from testinfra.host import Host

MIGRATION = '''"""For a test."""

from alembic import op

revision: str = "0099"
down_revision: str | None = "{head}"
branch_labels: None = None
depends_on: None = None
{marks}


def upgrade() -> None:
    {body}
'''
HARMLESS = 'op.execute("CREATE TABLE added ()")'
# The code before it does not know the name.
SLOW = f'op.execute("SELECT pg_sleep(15)"); {HARMLESS}'
BREAKING = f'{HARMLESS}; op.execute("ALTER TABLE event RENAME COLUMN type TO kind")'
FAILING = f'{HARMLESS}; op.execute("SELECT 1 / 0")'
HALF_WAY = f"with op.get_context().autocommit_block(): {FAILING}"
MARKED = "backward_compatible: bool = True"


@pytest.fixture
def head(host: Host, status: Status) -> Iterator[str]:
    """The revision of the database, to which it returns with the release that was live."""
    before, found = status()["live"]["release"], psql(host, "SELECT version_num FROM alembic_version")
    yield found
    settle(status)
    psql(host, "DROP TABLE IF EXISTS added")
    psql(host, f"UPDATE alembic_version SET version_num = '{found}'")
    if psql(host, "SELECT count(*) FROM information_schema.columns WHERE column_name = 'kind'") == "1":
        psql(host, "ALTER TABLE event RENAME COLUMN kind TO type")
    answer(forgectl(host, "rollback", "inbox", "--to", before, "--breaking", "--json"))
    assert_one_live(host, status, before)


def with_migration(source: Path, head: str, body: str, marks: str = "") -> Path:
    """Add a migration to a source."""
    text = MIGRATION.format(head=head, marks=marks, body=body)
    (source / "migrations/versions/0099_test.py").write_text(text)
    return source


def fit(source: Path) -> None:
    """Make the code fit the breaking migration."""
    path = source / "src/inbox/events.py"
    path.write_text(path.read_text().replace('Column("type", Text', 'Column("kind", Text, key="type"'))


def at(host: Host) -> tuple[str, bool]:
    """The revision of the database, and whether the table of the tests is in it."""
    return psql(host, "SELECT version_num FROM alembic_version"), psql(host, "SELECT to_regclass('added')") == "added"


def test_unmarked_migration_is_refused(
    event: EventContext, host: Host, status: Status, source: Path, head: str
) -> None:
    """Before anything changes, with what to do; the plan says the same."""
    before = status()["live"]
    with event("a migration that is not marked"):
        refused = release(host, with_migration(source, head, HARMLESS))
        plan = answer(release(host, source, "--dry-run"))["plan"]
    assert refused.rc == 3
    assert "0099_test.py without backward_compatible = True" in refused.stderr
    assert "--breaking" in refused.stderr
    assert "migrate: migrations/versions/0099_test.py" in plan
    assert any("backward_compatible" in line for line in plan)
    assert (at(host), status()["live"]) == ((head, False), before)


def test_marked_migration_is_crossed_back_and_forth(
    event: EventContext, host: Host, status: Status, source: Path, head: str, tmp_path: Path
) -> None:
    """Once, before the new code starts; the older code runs on the new schema; two steps back are refused."""
    first = status()["live"]["release"]
    with event("a marked migration, and back"):
        second = answer(release(host, with_migration(source, head, HARMLESS, MARKED)))["release"]
        assert at(host) == ("0099", True)
        back = answer(forgectl(host, "rollback", "inbox", "--json"))
        assert back["release"] == first
        settle(status)
        forward = answer(forgectl(host, "rollback", "inbox", "--to", second, "--json"))
        assert forward["release"] == second
    third = with_migration(copy_app(tmp_path / "third"), head, HARMLESS, MARKED)
    text = (third / "migrations/versions/0099_test.py").read_text()
    text = text.replace('"0099"', '"0100"').replace(f'"{head}"', '"0099"').replace("added", "added_later")
    (third / "migrations/versions/0100_test.py").write_text(text)
    with event("two schemas further"):
        answer(release(host, third))
        refused = forgectl(host, "rollback", "inbox", "--to", first)
        psql(host, "DROP TABLE added_later")
    assert refused.rc == 3
    assert second in refused.stderr
    assert f"forgectl rollback inbox --to {first} --breaking" in refused.stderr


def test_breaking_migration_runs_behind_the_maintenance_page(
    host: Host, status: Status, source: Path, head: str, client: httpx.Client
) -> None:
    """Clients get 503 with Retry-After and nothing else; a rollback is refused."""
    before = status()["live"]["release"]
    fit(source)
    seen: set[tuple[int, str | None]] = set()
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answered = client.get("/v1/events?limit=1")
            seen.add((answered.status_code, answered.headers.get("retry-after")))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        done = release(host, with_migration(source, head, BREAKING), "--breaking")
    finally:
        ended.set()
        asking.join()
    new = answer(done)["release"]
    assert_one_live(host, status, new)
    assert at(host) == ("0099", True)
    assert {code for code, _ in seen} == {200, 503}
    assert all(retry for code, retry in seen if code == 503)
    assert client.get("/v1/events").status_code == 200
    refused = forgectl(host, "rollback", "inbox", "--to", before)
    assert refused.rc == 3
    assert "0099_test.py is not marked" in refused.stderr
    assert f"forgectl rollback inbox --to {before} --breaking" in refused.stderr


@pytest.mark.exhaustive
def test_breaking_migration_that_fails_brings_the_old_release_back(
    host: Host, status: Status, source: Path, head: str, client: httpx.Client
) -> None:
    """The schema is as it was, so the old code fits it, and the maintenance page goes."""
    before = status()["live"]["release"]
    failed = release(host, with_migration(source, head, FAILING), "--breaking")
    assert failed.rc == 4
    assert "the schema is as it was" in failed.stderr
    assert at(host) == (head, False)
    assert_one_live(host, status, before)
    assert client.get("/v1/events").status_code == 200
    assert status()["maintenance"] is None
    assert history(host)[-1]["outcome"] == "failed"


def test_candidate_that_fails_on_a_breaking_schema_leaves_the_maintenance_page(
    host: Host, status: Status, source: Path, head: str, client: httpx.Client
) -> None:
    """No code fits the schema, so none is started, not by a reboot either; released code that fits ends it."""
    with_migration(source, head, BREAKING)
    main = source / "src/inbox/main.py"
    whole = main.read_text()
    main.write_text(whole + '\nraise RuntimeError("broken on purpose")\n')
    failed = release(host, source, "--breaking")
    assert failed.rc == 4
    assert "clients get the maintenance page" in failed.stderr
    assert client.get("/v1/events").status_code == 503
    refused = forgectl(host, "rollback", "inbox", "--to", status()["live"]["release"])
    assert (refused.rc, "--breaking" in refused.stderr) == (3, True)
    assert host.run("forgectl boot inbox").rc == 0
    assert client.get("/v1/events").status_code == 503
    main.write_text(whole)
    fit(source)
    new = answer(release(host, source))["release"]
    assert_one_live(host, status, new)
    until(lambda: client.get("/v1/events").status_code == 200, 10)


def test_migration_that_stops_half_way_names_its_repair(
    event: EventContext, host: Host, status: Status, source: Path, head: str
) -> None:
    """What is not transactional stays in part: the failure says what to run, and then the same release works."""
    before = status()["live"]["release"]
    repair = f'{MARKED}\nrepair: str = "DROP TABLE added"'
    with event("a migration that stops half-way"):
        failed = release(host, with_migration(source, head, HALF_WAY, repair))
    assert failed.rc == 4
    assert "run 'DROP TABLE added'" in failed.stderr
    assert at(host) == (head, True)
    assert_one_live(host, status, before)


@pytest.mark.exhaustive
@pytest.mark.parametrize("breaking", [False, True])
def test_killed_while_it_migrates(
    event: EventContext, host: Host, status: Status, source: Path, head: str, breaking: bool
) -> None:
    """The migration goes on, the next command waits for its end, and then the release is whole."""
    archive = upload(with_migration(source, head, SLOW, "" if breaking else MARKED))
    command = ("release", "inbox", "--archive", archive, "--json", *(["--breaking"] if breaking else []))
    victim = "systemd-run --quiet --collect --unit=forge-victim forgectl" + " %s" * len(command)
    with event(f"killed while it migrates{', breaking' if breaking else ''}", strict=not breaking):
        host.check_output(victim, *command)
        until(lambda: migrating(host), 60)
        host.check_output("systemctl kill --signal=KILL forge-victim")
        done = forgectl(host, *command)
    assert "waiting for inbox-migrate@" in done.stderr
    assert_one_live(host, status, answer(done)["release"])
    assert (at(host), status()["maintenance"]) == (("0099", True), None)


def migrating(host: Host) -> str:
    """The units that migrate at present."""
    return str(host.check_output("systemctl list-units --no-legend --plain --state=activating 'inbox-migrate@*'"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_killed_as_the_maintenance_begins(
    host: Host, status: Status, source: Path, head: str, client: httpx.Client, delay: float
) -> None:
    """Nothing has changed yet, as the old slot is drained first: the next command brings the old release back."""
    before = status()["live"]["release"]
    archive = upload(with_migration(source, head, HARMLESS))
    kill_forgectl(host, "maintenance ...", "release", "inbox", "--archive", archive, "--breaking", delay=delay)
    answer(forgectl(host, "recover", "inbox", "--json"))
    assert_one_live(host, status, before)
    assert (at(host), status()["maintenance"]) == ((head, False), None)
    assert client.get("/v1/events").status_code == 200
