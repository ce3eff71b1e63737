"""release.py, migration.py and report.py as far as they need no systemd: plans, and what a rollback may cross."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import describe, staged
from forgectl import config, cutover, database, migration, release, report, staging, state
from forgectl.errors import Refused
from forgectl.layout import Layout
from forgectl.report import Candidate
from forgectl.state import Entry, Operation, Slotted, State


def plan(layout: Layout, **changes: Any) -> release.Result:
    options: dict[str, Any] = {"archive": None, "source_digest": "s" * 64, "breaking": False} | changes
    app = config.load(layout.description)
    return release.release(layout, app, dry_run=True, say=lambda _text: None, **options)


@pytest.mark.parametrize(
    ("live_sock", "live", "expected"),
    [(None, None, "blue"), (None, "blue", "green"), ("blue", None, "green"), ("green", "green", "blue")],
)
def test_the_slot_with_the_traffic_is_never_the_next_one(
    layout: Layout, live_sock: str | None, live: str | None, expected: str
) -> None:
    """Not even when the state is lost, as after an operator moved a damaged one away."""
    if live_sock:
        layout.live.symlink_to(f"{live_sock}.sock")
    if live:
        state.save(layout, State(live=Slotted("R1", live, "now")))
    result = plan(layout)
    assert result.slot == expected
    assert result.plan[-1].startswith(f"start slot {expected}")
    assert ("drain" in result.plan[-1]) == bool(live_sock or live)


def test_a_dry_run_answers_before_any_upload(layout: Layout) -> None:
    result = plan(layout)
    assert (result.changed, result.upload_needed, result.slot) == (True, True, "blue")
    assert result.plan[0].startswith("stage a new source")
    assert not list(layout.releases.iterdir())


def test_an_archive_with_another_digest_is_refused(layout: Layout, tmp_path: Path) -> None:
    source = tmp_path / "source.tar"
    source.touch()
    with pytest.raises(Refused, match="expected an archive with digest"):
        plan(layout, archive=source, source_digest="0" * 64)


DATABASE = """
[database]
placement = "local"
name = "inbox"
app_role = "inbox_app"
url = "postgresql://localhost/inbox"
[migration]
user = "inbox-migrate"
command = ["alembic", "upgrade", "head"]
path = "forge/inbox/migrate"
"""


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (["b"], []),
        # As after a restore.
        (["a"], ["b.py"]),
        ([], ["a.py", "b.py"]),
        # As after a rollback: a newer release was here.
        (["c"], []),
    ],
)
def test_what_is_live_is_released_again_when_the_database_lacks_its_migrations(
    layout: Layout, postgresql: str, monkeypatch: pytest.MonkeyPatch, at: list[str], expected: list[str]
) -> None:
    """It is no use to say that there is nothing to do while the code asks for what is not there."""
    monkeypatch.setattr(database, "ADMINISTRATION", postgresql)
    monkeypatch.setattr(release, "_serves", lambda *_: True)
    layout.description.write_text(describe() + DATABASE)
    record = staged(layout, 1, "ab")
    monkeypatch.setattr(staging, "digest_of", lambda *_: record.digest)
    state.save(layout, State(live=Slotted(record.id, "blue", "now")))
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE DATABASE inbox")
        try:
            with psycopg.connect(postgresql, dbname="inbox") as inside:
                inside.execute("CREATE TABLE alembic_version (version_num text)")
                for each in at:
                    inside.execute("INSERT INTO alembic_version VALUES (%s)", (each,))
            result = plan(layout, source_digest=record.source_digest)
        finally:
            connection.execute("DROP DATABASE inbox")
    assert result.changed == bool(expected)
    found = [line for line in result.plan if "since the database lacks it" in line]
    assert [line.rpartition("/")[2] for line in found] == expected
    # And while it is away nobody can tell.
    assert not plan(layout, source_digest=record.source_digest).changed


@pytest.mark.parametrize(
    ("older", "between", "newer", "why"),
    [
        ("a", "", "a", ""),
        ("a", "", "aB", ""),
        ("a", "", "ab", "b.py is not marked"),
        # What each mark speaks of is the release before it, and that is not the target.
        ("a", "aB", "aBC", "in between"),
        # Both came with one release.
        ("a", "a", "aBC", ""),
        ("a", "", "", "only in the older"),
    ],
)
def test_a_rollback_crosses_only_what_is_known_to_be_safe(
    layout: Layout, older: str, between: str, newer: str, why: str
) -> None:
    target = staged(layout, 1, older)
    if between:
        staged(layout, 2, between)
    live = staged(layout, 3, newer)
    if not why:
        assert migration.check_rollback(layout, live, target, breaking=False) == list(newer.lower()[1:])
        return
    with pytest.raises(Refused, match=why) as caught:
        migration.check_rollback(layout, live, target, breaking=False)
    if why != "only in the older":
        assert f"--to {target.id} --breaking" in str(caught.value)
        migration.check_rollback(layout, live, target, breaking=True)


def test_a_rollback_goes_to_what_was_live_before(layout: Layout) -> None:
    records = [staged(layout, number) for number in range(5)]
    present = State(live=Slotted(records[3].id, "blue", "now"))
    outcomes: dict[int, state.Outcome] = {0: "live", 1: "live", 2: "failed", 3: "live", 4: "rolled back"}
    for number, outcome in outcomes.items():
        present.record(Entry(records[number].id, "now", "me", outcome, {}))
    assert cutover.rollback_target(layout, present) == records[1]
    present.record(Entry(records[0].id, "now", "me", "live", {}, action="rollback"))
    assert cutover.rollback_target(layout, present) == records[0], "an operator went back from the other"
    present.live = Slotted(records[0].id, "blue", "now")
    assert cutover.rollback_target(layout, present) is None
    state.save(layout, present)
    app = config.load(layout.description)
    with pytest.raises(Refused, match="name one with --to"):
        release.rollback(layout, app, to=None, breaking=False, dry_run=True, say=print)


def test_a_rollback_goes_to_a_source_that_was_released_again(layout: Layout) -> None:
    """Whoever released the older source anew wanted to get rid of the one between."""
    records = [staged(layout, number) for number in range(3)]
    present = State(live=Slotted(records[2].id, "blue", "now"))
    for number in (0, 1, 0, 2):
        present.record(Entry(records[number].id, "now", "me", "live", {}))
    assert cutover.rollback_target(layout, present) == records[0]
    present.record(Entry(records[0].id, "now", "me", "live", {}, action="rollback"))
    present.live = Slotted(records[0].id, "green", "now")
    assert cutover.rollback_target(layout, present) == records[1], "it came before what was released again"


def test_a_rollback_goes_no_further_forward(layout: Layout) -> None:
    """Also where the history no longer says when an operator's own choice was live for the first time."""
    records = [staged(layout, number) for number in range(4)]
    present = State(live=Slotted(records[1].id, "blue", "now"))
    for number in (2, 3):
        present.record(Entry(records[number].id, "now", "me", "live", {}))
    present.record(Entry(records[1].id, "now", "me", "live", {}, action="rollback"))
    assert cutover.rollback_target(layout, present) is None
    # And forward again: from there, back to where that came from.
    present.record(Entry(records[3].id, "now", "me", "live", {}, action="rollback"))
    present.live = Slotted(records[3].id, "green", "now")
    assert cutover.rollback_target(layout, present) == records[1]


@pytest.mark.parametrize(
    ("phase", "action", "turned_back", "expected"),
    [
        ("watching", "release", False, 1),
        ("watching", "rollback", False, None),
        # It is through already, and only the slot that lost still drains.
        ("draining", "rollback", False, None),
        # The watch was quicker, or somebody else.
        ("draining", "release", True, None),
        ("draining", "release", False, 1),
        ("draining", "recycle", False, 1),
        # The verdict on it was that it does not stay.
        ("draining", "rollback", True, 0),
        ("draining", "recycle", True, 0),
    ],
)
def test_a_rollback_that_is_asked_for_twice_goes_back_once(
    layout: Layout, phase: state.Phase, action: state.Action, turned_back: bool, expected: int | None
) -> None:
    """Nervous operators ask twice, and a verdict may come right before one who is not."""
    records = [staged(layout, number) for number in range(4)]
    old, new = Slotted(records[1].id, "blue", "now"), Slotted(records[2].id, "green", "now")
    operation = Operation(phase, new.release, "green", old, "now", action=action)
    present = State(live=old if turned_back else new, operation=operation)
    for record in records[:3]:
        present.record(Entry(record.id, "now", "me", "live", {}))
    state.save(layout, present)
    app = config.load(layout.description)
    result = release.rollback(layout, app, to=None, breaking=False, dry_run=True, say=print)
    assert result.changed == (expected is not None)
    assert present.live
    assert result.release == (present.live.release if expected is None else records[expected].id)
    assert ("still warm" in " ".join(result.plan)) == (result.changed and phase == "watching")


def test_back_from_the_maintenance_page_is_what_it_interrupted(layout: Layout) -> None:
    """One release further back is one schema further off."""
    records = [staged(layout, 0, "a"), staged(layout, 1, "aB"), staged(layout, 2, "aBc")]
    present = State(live=Slotted(records[1].id, "blue", "now"), maintenance="the schema changed", schema=records[2].id)
    for record in records[:2]:
        present.record(Entry(record.id, "now", "me", "live", {}))
    state.save(layout, present)
    app = config.load(layout.description)
    result = release.rollback(layout, app, to=None, breaking=True, dry_run=True, say=print)
    assert (result.changed, result.release) == (True, records[1].id)
    with pytest.raises(Refused, match=f"--to {records[1].id} --breaking"):
        release.rollback(layout, app, to=None, breaking=False, dry_run=True, say=print)


def test_a_recycling_is_followed_by_no_other_at_once(layout: Layout) -> None:
    """What an app needs it will always use."""
    record = staged(layout, 1)
    present = State(live=Slotted(record.id, "blue", "2000-01-01T00:00:00+00:00"))
    recent = datetime.now(UTC).isoformat()
    present.record(Entry(record.id, recent, "me", "live", {}, action="recycle"))
    state.save(layout, present)
    app = config.load(layout.description)
    assert not release.recycle(layout, app, if_due=True, dry_run=True, say=print).changed


def test_forward_to_a_release_that_never_migrated_is_a_release(layout: Layout) -> None:
    live, target = staged(layout, 1, "a"), staged(layout, 2, "aB")
    with pytest.raises(Refused, match=r"needs b, which the database does not have; .* --source-digest s2"):
        migration.check_rollback(layout, live, target, breaking=True)


def test_a_plan_goes_by_the_schema_that_the_database_has(layout: Layout) -> None:
    """After a rollback over a migration it is not run once more."""
    live, newer = staged(layout, 1, "a"), staged(layout, 2, "aB")
    table = '[migration]\nuser = "m"\ncommand = ["alembic", "upgrade", "head"]\npath = "x"\n'
    layout.description.write_text(describe() + table)
    state.save(layout, State(live=Slotted(live.id, "blue", "now")))
    assert "migrate: migrations/versions/b.py" in plan(layout, source_digest="s2").plan
    state.save(layout, State(live=Slotted(live.id, "blue", "now"), schema=newer.id))
    assert not any("migrate" in line for line in plan(layout, source_digest="s2").plan)


def test_a_rollback_of_a_watched_rotation_goes_back_to_the_older_secrets(layout: Layout) -> None:
    """Of the same release."""
    record = staged(layout, 1)
    old, live = Slotted(record.id, "blue", "now", 3), Slotted(record.id, "green", "now", 4)
    operation = Operation("watching", record.id, "green", old, "now", action="rotation", secrets=4)
    layout.live.symlink_to("green.sock")
    state.save(layout, State(live=live, operation=operation))
    app = config.load(layout.description)
    result = release.rollback(layout, app, to=None, breaking=False, dry_run=True, say=print)
    assert result.changed
    assert result.plan == [
        "version 3 of the secrets instead of version 4",
        "move traffic back to slot blue, which is still warm",
    ]
    present = state.load(layout)
    entry = cutover.turn_back_on_request(layout, present)
    assert layout.live_slot() == "blue"
    assert (entry.secrets, entry.reason) == (3, "instead of version 4 of its secrets, which was being watched")
    assert state.load(layout).live == old
    refused = state.load(layout).refused(4)
    assert refused
    assert refused.outcome == "rolled back"


def test_a_release_with_a_leased_user_needs_the_unit_that_keeps_it(layout: Layout) -> None:
    """deploy.yml describes the app, and does not install what site.yml does."""
    staged(layout, 1)
    text = describe() + '[database]\nplacement = "external"\nname = "x"\napp_role = "x"\nurl = "x"\nvault_role = "x"\n'
    layout.description.write_text(text)
    app = config.load(layout.description)
    with pytest.raises(Refused, match=r"inbox-lease@\.service, which keeps the leased user; found none; run site\.yml"):
        release.release(layout, app, archive=None, source_digest="s1", breaking=False, dry_run=False, say=print)


def test_nothing_is_recycled_where_nothing_serves(layout: Layout) -> None:
    record = staged(layout, 1)
    app = config.load(layout.description)
    old = "2020-01-01T00:00:00+00:00"
    for present in (State(), State(live=Slotted(record.id, "blue", old), maintenance="R2 brings 0002")):
        state.save(layout, present)
        assert not release.recycle(layout, app, if_due=True, dry_run=True, say=print).changed
        with pytest.raises(Refused, match="expected inbox to"):
            release.recycle(layout, app, if_due=False, dry_run=True, say=print)


def test_another_release_has_to_wait_for_the_verdict(layout: Layout) -> None:
    old = Slotted("R1", "blue", "now")
    operation = Operation("watching", "R2", "green", old, "now", until=datetime.now(UTC).timestamp() + 7, by="me")
    with pytest.raises(Exception, match=r"release of R2 by me, watched for [67] s more") as caught:
        cutover.settle(layout, config.load(layout.description), State(operation=operation), print)
    assert getattr(caught.value, "exit_code", None) == 5


def test_a_plan_names_what_would_change_and_no_value_of_a_setting(tmp_path: Path) -> None:
    old, new = (
        Candidate(tmp_path / name, tmp_path / f"{name}.toml", tmp_path / f"{name}.d") for name in ("old", "new")
    )
    for folder in (old.source, new.source, old.inputs, new.inputs):
        folder.mkdir()
    (old.source / "requirements.txt").write_text("a==1 \\\n  --hash=x\nb==1\n")
    (new.source / "requirements.txt").write_text("a==2 \\\n  --hash=y\nc==1\n")
    (old.source / "gone.py").touch()
    for number in range(10):
        (new.source / f"new{number}.py").touch()
    (new.inputs / "slot.conf").touch()
    (new.inputs / "slot.conf").write_text("x")
    old.settings.write_text(describe())
    new.settings.write_text(describe().replace("count = 2", "count = 3").replace('"production"', '"staging"'))
    assert report.differences(old, new) == [
        "added: new0.py, new1.py, new2.py, new3.py, new4.py, new5.py, new6.py, new7.py and 2 more",
        "removed: gone.py",
        "changed: requirements.txt",
        "dependency a: 1 -> 2",
        "dependency b: 1 -> -",
        "dependency c: - -> 1",
        "setting settings.FORGE_ENVIRONMENT changed",
        "setting workers.count: 2 -> 3",
        "changed: slot.conf",
    ]
    assert report.differences(old, old) == ["no difference"]


def test_the_report_counts_requests_by_release_since_the_beginning(tmp_path: Path) -> None:
    log = tmp_path / "inbox.json"
    lines = [
        ("2026-01-01T00:00:00+00:00", "R1"),
        ("2026-01-01T02:00:05+01:00", "R1"),
        ("2026-01-01T01:00:06+00:00", "R2"),
    ]
    log.with_name("inbox.json.1").write_text(
        "".join(json.dumps({"timestamp": t, "release": r}) + "\n" for t, r in lines)
    )
    log.write_text('{"timestamp":"2026-01-01T01:00:07+00:00","release":""}\n{"cut off')
    found = report.served(log, datetime(2026, 1, 1, 1, 0, 5, 900_000, UTC))
    assert found == {"R1": 1, "R2": 1, "-": 1}
    assert report.requests_line(found) == "requests answered meanwhile: 1 by Nginx itself, 1 by R1, 1 by R2"
    assert report.served(tmp_path / "none.json", datetime.now(UTC)) == {}
