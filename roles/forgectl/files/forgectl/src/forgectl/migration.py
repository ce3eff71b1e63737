"""Migrations: once for each database, before any slot starts, and never under code that cannot live with them."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from forgectl import database, schema, staging, systemd
from forgectl.config import App
from forgectl.cutover import Cutover
from forgectl.errors import CandidateFailed, ForgeError, Refused
from forgectl.layout import Layout
from forgectl.schema import Revision
from forgectl.staging import Record

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any] | None


def run(
    layout: Layout,
    app: App,
    record: Record,
    live: Record | None,
    values: Mapping[str, str],
    cutover: Cutover,
    *,
    breaking: bool,
) -> None:
    """Bring the database to the schema of a release, under its migration lock; `values` are the migration's secrets.

    Where Alembic migrates, a database that is there already is left alone. What another tool would do is not known: it
    is run with each release, and has to be compatible and repeatable.

    Raises:
        Refused: a migration is not marked as compatible with the running code, and `breaking` does not allow that.
        CandidateFailed: the migration failed; code serves as before, and so is the schema when it is transactional.
    """
    db = app.database
    held = database.migration_lock(database.migration_url(db), values[db.migrate_key]) if db else nullcontext()
    with held as connection:
        revisions: Sequence[Revision] | None = None
        unfit: Sequence[Revision] = []
        at: list[str] = []
        if app.uses_alembic:
            known = schema.revisions(layout.releases / record.id / "source")
            at = schema.current(connection) if connection else (live and live.schema_heads) or []
            revisions = schema.pending(known, at)
            if not revisions:
                cutover.note_schema(record)
                return
            unfit = incompatible(revisions) if live else []
            if unfit and not breaking:
                raise Refused(refusal(layout.name, unfit))
        try:
            if unfit:
                why = f"{record.id} brings {', '.join(each.id for each in unfit)}"
                cutover.interrupt_service(record.id, why, at if connection else None)
            cutover.note_schema(record)
            _run_unit(layout, record.id, revisions, connection, cutover)
        except BaseException as error:
            # Also Ctrl-C: the page must not stay for a schema that is as it was.
            cutover.fail(record.id, error, undone=_unchanged(revisions, connection))
            raise


def lacking(layout: Layout, app: App, record: Record) -> list[Revision]:
    """What of a release's migrations the database of this host lacks, as after a restore of an older one.

    Of one elsewhere, which only the migration's role may ask, nobody knows; nor of one that does not answer.
    """
    if app.database is None or app.database.placement != "local" or not app.uses_alembic:
        return []
    try:
        at = database.revisions(app.database.name)
        # A database that is ahead has what a newer release brought, before somebody went back.
        return schema.pending(schema.revisions(layout.releases / record.id / "source"), at)
    except Refused:
        return []


def incompatible(revisions: Sequence[Revision]) -> list[Revision]:
    """Those that the running release is not known to live with."""
    return [each for each in revisions if not each.backward_compatible]


def refusal(name: str, unfit: Sequence[Revision]) -> str:
    """Why a release is refused, and what to do."""
    files = ", ".join(each.file for each in unfit)
    return (
        f"expected migrations that the running code can live with; found {files} without backward_compatible = True; "
        "split the change in two releases (first add, later remove) and mark each, or deploy it behind the maintenance "
        f"page, without an automatic rollback: --breaking (playbooks/deploy.yml -e only={name} -e breaking=true)"
    )


def check_rollback(layout: Layout, present: Record, target: Record, *, breaking: bool) -> list[str]:
    """Check that a release can live with the schema of the `present` one; returns the revisions that it does not know.

    A mark speaks of the release before its own: one schema further back nobody tried.

    Raises:
        Refused: it cannot, or nobody knows, and `breaking` does not allow that.
    """
    if present.schema_heads is None or target.schema_heads is None or present.schema_heads == target.schema_heads:
        return []
    known = schema.revisions(layout.releases / present.id / "source")
    if target.id > present.id and (unknown := sorted(set(target.schema_heads) - known.keys())):
        raise Refused(
            f"expected {target.id} to be of the present schema or an older one; found that it needs "
            f"{', '.join(unknown)}, which the database does not have; release it: forgectl release {layout.name} "
            f"--source-digest {target.source_digest}"
        )
    crossed = schema.missing_in(known, target.schema_heads)
    between = [
        each.id
        for each in staging.records(layout)
        if target.id < each.id < present.id and each.schema_heads not in (target.schema_heads, present.schema_heads)
    ]
    if unfit := incompatible(crossed):
        why = f"{', '.join(each.file for each in unfit)} is not marked backward_compatible = True"
    elif between:
        why = (
            f"{', '.join(each.id for each in crossed)} are marked as compatible with the release before each, and "
            f"{between[-1]} lies in between; roll back to that one"
        )
    else:
        why = ""
    if why and not breaking:
        raise Refused(
            f"expected {target.id} to fit the present schema; found that {why}. To go back all the same: "
            f"forgectl rollback {layout.name} --to {target.id} --breaking"
        )
    return [each.id for each in crossed]


def _run_unit(
    layout: Layout, release: str, revisions: Sequence[Revision] | None, connection: "Connection", cutover: Cutover
) -> None:
    unit = layout.migration_unit(release)
    began = time.time() - 0.05
    try:
        systemd.start(unit)
    except KeyboardInterrupt:
        # It goes on without us; the database stays locked for other hosts until it has ended.
        cutover.say(f"interrupted; waiting for {unit}, because half a migration is worse than a late one")
        systemd.wait_ended(unit)
        raise
    except ForgeError:
        lines = systemd.journal(unit, began)
        systemd.stop(unit)
        summary = f"the migration {unit} failed; {_repair(revisions, connection)}"
        raise CandidateFailed(summary, lines) from None


def _repair(revisions: Sequence[Revision] | None, connection: "Connection") -> str:
    """What to do after a failure: the first revision that the database does not have is the one that failed."""
    if revisions is None:
        return "mend it and release again"
    left = _left(revisions, connection)
    if left is None:
        return "the database does not answer, so how far it came is not known; bring it back, then release again"
    if left and not left[0].transactional:
        failed = left[0]
        return (
            f"{failed.file} is not transactional and may have stopped half-way: run {failed.repair!r}, then try again"
        )
    return "the schema is as it was; mend it and release again"


def _unchanged(revisions: Sequence[Revision] | None, connection: "Connection") -> bool | None:
    """Whether the database lacks all of them still; None when it does not answer."""
    if revisions is None:
        return False
    left = _left(revisions, connection)
    return None if left is None else len(left) == len(revisions)


def _left(revisions: Sequence[Revision], connection: "Connection") -> list[Revision] | None:
    """Those that the database does not have yet; None when it does not answer."""
    try:
        applied = set(schema.current(connection)) if connection else set()
    except Refused:
        return None
    for index, each in enumerate(revisions):
        if each.id in applied:
            return list(revisions[index + 1 :])
    return list(revisions)
