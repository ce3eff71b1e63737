"""Migrations: once for each database, before any slot starts, and never under code that cannot live with them."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from forgectl import database, schema, staging, systemd
from forgectl.config import App
from forgectl.cutover import Cutover
from forgectl.errors import CandidateFailed, ForgeError, Refused
from forgectl.layout import Layout
from forgectl.schema import Revision
from forgectl.staging import Record


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
        if app.uses_alembic:
            known = schema.revisions(layout.releases / record.id / "source")
            at = schema.current(connection) if connection else (live and live.schema_heads) or []
            revisions = schema.pending(known, at)
            if not revisions:
                cutover.note_schema(record)
                return
            if live and (unfit := incompatible(revisions)):
                if not breaking:
                    raise Refused(refusal(layout.name, unfit))
                cutover.interrupt_service(record.id, f"{record.id} brings {', '.join(each.id for each in unfit)}")
        try:
            _run_unit(layout, record.id, revisions, connection, cutover)
        except ForgeError as error:
            cutover.fail(record.id, error, undone=_unchanged(revisions, connection))
            raise
        cutover.note_schema(record)


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
    crossed = schema.missing_in(schema.revisions(layout.releases / present.id / "source"), target.schema_heads)
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
    layout: Layout, release: str, revisions: Sequence[Revision] | None, connection: object, cutover: Cutover
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


def _repair(revisions: Sequence[Revision] | None, connection: object) -> str:
    """What to do after a failure: the first revision that the database does not have is the one that failed."""
    if revisions is None:
        return "mend it and release again"
    left = _left(revisions, connection)
    if left and not left[0].transactional:
        failed = left[0]
        return (
            f"{failed.file} is not transactional and may have stopped half-way: run {failed.repair!r}, then try again"
        )
    return "the schema is as it was; mend it and release again"


def _unchanged(revisions: Sequence[Revision] | None, connection: object) -> bool:
    return revisions is not None and len(_left(revisions, connection)) == len(revisions)


def _left(revisions: Sequence[Revision], connection: object) -> list[Revision]:
    applied = set(schema.current(connection)) if connection else set()  # type: ignore[arg-type]
    for index, each in enumerate(revisions):
        if each.id in applied:
            return list(revisions[index + 1 :])
    return list(revisions)
