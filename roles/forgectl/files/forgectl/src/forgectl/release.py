"""What an operator asks for: release a source, roll back, recycle, stage, prune."""

import grp
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from forgectl import (
    commands,
    config,
    cutover,
    identity,
    lease,
    migration,
    removal,
    report,
    schema,
    slots,
    staging,
    state,
    systemd,
    venv,
)
from forgectl.config import App
from forgectl.cutover import Cutover, Say
from forgectl.errors import CandidateFailed, Refused, SecretsError
from forgectl.layout import SLOTS, Layout
from forgectl.logs import memory
from forgectl.report import Candidate
from forgectl.staging import Record
from forgectl.state import Action, State, hours_since
from forgectl.values import Fetched

# A recycling is not tried again at once: what failed would fail again, and what an app needs it will always use.
RECYCLE_PAUSE_HOURS = 1.0


class Result(msgspec.Struct, frozen=True):
    """What a command did, or would do; phases in seconds, `requests` by the release that answered them.

    Of a rotation, `secrets` is the version of the secrets, and `problem` what went wrong beside it.
    """

    app: str
    action: Action
    changed: bool
    release: str | None = None
    previous: str | None = None
    slot: str | None = None
    verdict: str = ""
    upload_needed: bool = False
    plan: list[str] = []
    phases: dict[str, float] = {}
    requests: dict[str, int] = {}
    report: list[str] = []
    began: str = ""
    secrets: int = 0
    problem: str = ""


class Live(NamedTuple):
    """The live release and its own description of the app."""

    record: Record
    app: App


def release(
    layout: Layout,
    app: App,
    *,
    archive: Path | None,
    source_digest: str | None,
    breaking: bool,
    dry_run: bool,
    say: Say,
) -> Result:
    """Put a source with the present settings into service, or say what that would do.

    Raises:
        Refused: nothing was changed.
        SecretsError: a secret is not usable; nothing was changed.
        CandidateFailed: the new release failed, what served before still serves.
    """
    if app.leases and not layout.lease_template.exists():
        raise Refused(f"expected {layout.lease_template}, which keeps the leased user; found none; run site.yml")
    commands.check_schedules(app)
    present = state.load(layout) if dry_run else cutover.recover(layout, app, say)
    source_digest = _source_digest(archive, source_digest)
    removal.refuse_while_purged(layout, present)
    digest = staging.digest_of(layout, source_digest)
    known = staging.records(layout)
    live = _live(known, present)
    staged, donor = _on_disk(known, digest, source_digest)
    is_live = staged and live and staged.id == live.id and _serves(layout, present) and not present.removed
    lacking = migration.lacking(layout, app, staged) if is_live and staged else []
    if is_live and not lacking:
        return unchanged(app, "release", present)
    result = _begun(layout, app, present, "release", staged, live)
    if dry_run:
        plan = _release_plan(layout, app, present, live, staged, donor, archive, breaking)
        plan = [f"migrate, since the database lacks it: {each.file}" for each in lacking] + plan
        if present.removed:
            plan.append(f"give {app.domain} back to Nginx: {present.removed.by} removed it at {present.removed.since}")
        return msgspec.structs.replace(result, upload_needed=donor is None, plan=plan)
    _need_source(archive, donor, source_digest)
    cutover.settle(layout, app, present, say)
    change = Cutover(layout, app, present, say, "release")
    with change.phases("secrets"):
        change.take(identity.fetch(layout, app, "app"))
        its_migration = identity.fetch(layout, app, "migrate").values if app.migration else {}
    staged = _complete(layout, app, change.phases, staged, archive, donor, digest, source_digest)
    if app.migration:
        with change.phases("migrate"):
            migration.run(layout, app, staged, live, its_migration, change, breaking=breaking)
    its_migration.clear()
    with removal.returning(layout, present, say):
        return _cut_over(layout, change, staged, live, result)


def rollback(layout: Layout, app: App, *, to: str | None, breaking: bool, dry_run: bool, say: Say) -> Result:
    """Go back to the release that was live before, or to the one named, with its own settings.

    While that one's slot is still warm, only the traffic moves. The newer release stays, for going forward again.

    Raises:
        Refused: there is none, it is damaged, or it does not fit the present schema.
        CandidateFailed: it did not get ready; what served before still serves.
    """
    present = state.load(layout) if dry_run else cutover.recover(layout, app, say)
    known = staging.records(layout)
    live = _require_live(app, known, present)
    if to is None and _goes_back(present):
        # Asked for twice: the second must neither go forward again nor further back.
        return unchanged(app, "rollback", present)
    watched = present.operation if present.operation and present.operation.phase == "watching" else None
    warm = watched.old if watched and watched.action != "recycle" else None
    # From the maintenance page, "back" is what it interrupted.
    back = live.id if present.maintenance else warm.release if warm else None
    target = _target(layout, known, present, to or back)
    # Of a rotation, the older secrets of the same release are still warm.
    older_secrets = watched is not None and watched.action == "rotation" and to is None
    if target.id == live.id and not older_secrets and _serves(layout, present):
        return unchanged(app, "rollback", present)
    result = _begun(layout, app, present, "rollback", target, live)
    if present.maintenance and not breaking:
        raise Refused(
            f"expected the schema that {live.id} was written for; found another ({present.maintenance}); release code "
            f"that fits it, or go back in spite of it: forgectl rollback {app.name} --to {target.id} --breaking"
        )
    newest = _of_schema(known, present) or live
    crossed = migration.check_rollback(layout, newest, target, breaking=breaking)
    staging.check_intact(layout, target)
    its_app = config.load(layout.settings(target.id))
    if dry_run:
        plan = [
            *(
                [f"version {warm.secrets} of the secrets instead of {present.serving_secrets}"]
                if warm and older_secrets
                else report.differences(Candidate.of(layout, live), Candidate.of(layout, target))
            ),
            *(f"the schema keeps {each}, which {target.id} does not know" for each in crossed),
            f"move traffic back to slot {result.slot}, which is still warm"
            if warm and warm.release == target.id
            else _cutover_plan(layout, its_app, present),
        ]
        return msgspec.structs.replace(result, plan=plan)
    if warm and warm.release == target.id:
        found = cutover.lasting_trouble(layout, warm.slot)
        if found and not slots.trouble(layout, slots.other(warm.slot)):
            raise CandidateFailed(
                f"expected {target.id}, which is warm in slot {warm.slot}, to be ready; found: {found}; {live.id} "
                "still serves and is still watched; see what both said (forgectl logs)"
            )
        entry = cutover.turn_back_on_request(layout, present)
        line = f"swap {entry.phases['swap']:.2f} s"
        return msgspec.structs.replace(result, verdict="live", phases=entry.phases, report=[line], began=entry.began)
    cutover.settle(layout, app, present, say)
    change = Cutover(layout, its_app, present, say, "rollback")
    with change.phases("secrets"):
        if secrets := _secrets_to_go_back_with(layout, its_app, live, present, say):
            change.take(secrets)
    with change.phases("environment"):
        _build(layout, its_app, target)
    return _cut_over(layout, change, target, live, result)


def recycle(layout: Layout, app: App, *, if_due: bool, dry_run: bool, say: Say) -> Result:
    """Move the live release to a fresh slot, against slow leaks; with `if_due` only when memory or age ask for it."""
    present = state.load(layout) if dry_run else cutover.recover(layout, app, say)
    if if_due and present.live and not (dry_run or present.removed or present.maintenance):
        # The timer looks every few minutes: that is the series of `forgectl day`.
        service = layout.service(present.live.slot)
        say(memory.line(present.live.slot, systemd.memory(service), systemd.memory_limit(service)))
    due = _due(layout, app, present)
    if if_due and (not due or present.operation or present.removed):
        return unchanged(app, "recycle", present)
    live = find_live(layout, present)
    if due and not dry_run:
        say(due)
    # With the secrets that it has: it is for a rotation to find out whether newer ones are any good.
    return fresh_slot(layout, live, present, "recycle", None, why=[due] if due else [], dry_run=dry_run, say=say)


def restore(layout: Layout, app: App, *, dry_run: bool, say: Say) -> removal.Result:
    """Bring back what was live when the app was removed, through the same gate as a release.

    Raises:
        Refused: a purge has begun, another app has its domain or database now, its secret id has ended, or Nginx does
            not take the site.
        CandidateFailed: the release did not get ready; the app stays out of service.
    """
    present = state.load(layout) if dry_run else cutover.recover(layout, app, say)
    if present.removed is None:
        return removal.Result(app.name, "restore", changed=False)
    removal.refuse_while_purged(layout, present)
    # What comes back is the release with its own settings, not what its entry said last.
    removal.refuse_what_another_has(layout, config.load(layout.settings(present.live.release)) if present.live else app)
    # Under the page of a breaking migration nothing ran, and after a restore that was killed it runs already.
    starts = present.live is not None and not present.maintenance and not _serves(layout, present)
    plan = [f"give {app.domain} back to Nginx"]
    live = find_live(layout, present) if starts else None
    if live:
        identity.refuse_expired(layout, live.app)
        plan = [f"start {live.record.id} and wait until it is ready", *plan]
    if not dry_run:
        with removal.returning(layout, present, say):
            if live:
                fresh_slot(layout, live, present, "restore", None, why=[], dry_run=False, say=say)
    return removal.Result(app.name, "restore", changed=True, plan=plan)


def fresh_slot(
    layout: Layout,
    live: Live,
    present: State,
    action: Action,
    secrets: Fetched | None,
    *,
    why: list[str],
    dry_run: bool,
    say: Say,
) -> Result:
    """Move the live release to a fresh slot, with these secrets or, for None, with those of the slot it has now."""
    record, app = live
    result = _begun(layout, app, present, action, record, record)
    if dry_run:
        return msgspec.structs.replace(result, plan=[*why, _cutover_plan(layout, app, present)])
    cutover.settle(layout, app, present, say)
    change = Cutover(layout, app, present, say, action)
    if secrets:
        change.take(secrets)
    return _cut_over(layout, change, record, record, result)


def find_live(layout: Layout, present: State) -> Live:
    """What serves now.

    Raises:
        Refused: nothing does.
    """
    live = _live(staging.records(layout), present)
    if live is None:
        raise Refused(f"expected {layout.name} to have a live release; found none; release one first")
    if present.maintenance:
        raise Refused(
            f"expected {layout.name} to serve; found the maintenance page ({present.maintenance}); release code that "
            "fits the schema first"
        )
    return Live(live, config.load(layout.settings(live.id)))


def stage(
    layout: Layout, app: App, *, archive: Path | None, source_digest: str | None, dry_run: bool, say: Say
) -> Result:
    """Make a release and its environment ready on disk, and start nothing.

    Raises:
        Refused: the source is not here or not usable.
        Locked: a new release is being watched.
    """
    present = state.load(layout) if dry_run else cutover.recover(layout, app, say)
    source_digest = _source_digest(archive, source_digest)
    digest = staging.digest_of(layout, source_digest)
    staged, donor = _on_disk(staging.records(layout), digest, source_digest)
    if staged and venv.is_complete(layout, staged.venv):
        return Result(app.name, "release", changed=False, release=staged.id)
    result = Result(app.name, "release", changed=True, upload_needed=donor is None)
    if dry_run:
        plan = [f"stage {staged.id if staged else 'a new release'}"]
        return msgspec.structs.replace(result, release=staged.id if staged else None, plan=plan)
    _need_source(archive, donor, source_digest)
    cutover.refuse_while_watched(layout, present)
    phases = cutover.Phases(say)
    staged = _complete(layout, app, phases, staged, archive, donor, digest, source_digest)
    return msgspec.structs.replace(
        result, release=staged.id, previous=present.live.release if present.live else None, phases=phases.seconds
    )


def put_right(layout: Layout, *, dry_run: bool, say: Say) -> list[str]:
    """Give the releases in the slots the owner and modes that they were staged with; returns those that lacked them."""
    found = []
    for record in staging.records(layout):
        if record.id in map(layout.slot_release, SLOTS):
            try:
                its_app = config.load(layout.settings(record.id))
            except Refused as error:
                # What is under way is recovered all the same.
                say(f"the permissions of {record.id} stay as they are: {error}")
                continue
            if staging.put_right(layout, its_app, record, _group(its_app), dry_run=dry_run):
                found.append(record.id)
    return found


def prune(layout: Layout, app: App, *, dry_run: bool, say: Say) -> list[str]:
    """Remove releases beyond keep_releases and unused environments; returns what was, or would be, removed."""
    if dry_run:
        releases, venvs = staging.prunable(layout, app, cutover.needed(layout, state.load(layout)))
        return [record.id for record in releases] + [path.name for path in venvs]
    present = cutover.recover(layout, app, say)
    return staging.prune(layout, app, cutover.needed(layout, present))


def concluded(layout: Layout, result: Result, say: Say) -> Result:
    """Wait for the verdict on a watched cutover, and tell of the requests that clients sent meanwhile.

    Raises:
        RolledBack: the old release has the traffic back.
    """
    seconds = config.load(layout.settings(result.release or "")).watch_seconds
    say(f"watching for {seconds:g} s ...")
    entry = cutover.await_verdict(layout, result.began, seconds)
    if entry.outcome != "live":
        raise cutover.verdict_error(entry, state.load(layout))
    requests = report.served(layout.access_log, datetime.fromisoformat(result.began))
    return msgspec.structs.replace(
        result,
        verdict=entry.outcome,
        requests=requests,
        report=[*result.report, *filter(None, (report.requests_line(requests), entry.reason))],
    )


def _begun(
    layout: Layout, app: App, present: State, action: Action, target: Record | None, live: Record | None
) -> Result:
    """The result of a cutover, before it; `target` is None while it is not staged yet."""
    return Result(
        app=app.name,
        action=action,
        changed=True,
        release=target.id if target else None,
        previous=live.id if live else None,
        slot=slots.other(cutover.occupied(layout, present)),
    )


def _cut_over(layout: Layout, change: Cutover, target: Record, live: Record | None, result: Result) -> Result:
    lines = (
        report.differences(Candidate.of(layout, live), Candidate.of(layout, target))
        if live and live.id != target.id
        else []
    )
    if not config.load(layout.settings(target.id)).ready_path:
        lines.append("the app has no readiness path: each worker counted as ready once it took requests")
    slot = change.run(target.id)
    seconds = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in change.phases.seconds.items())
    return msgspec.structs.replace(
        result,
        release=target.id,
        slot=slot,
        verdict="watching" if change.watched else "live",
        phases=change.phases.seconds,
        report=[*lines, seconds],
        began=change.began,
    )


def _release_plan(
    layout: Layout,
    app: App,
    present: State,
    live: Record | None,
    staged: Record | None,
    donor: Record | None,
    archive: Path | None,
    breaking: bool,
) -> list[str]:
    schema_of = _of_schema(staging.records(layout), present) or live
    with _candidate(layout, staged, donor, archive) as candidate:
        if candidate is None:
            return [
                "stage a new source; upload it, or pipe it in, to see what would change",
                _cutover_plan(layout, app, present),
            ]
        lines = report.differences(Candidate.of(layout, live), candidate) if live else ["the first release"]
        name = venv.name((candidate.source / app.lock).read_bytes()) if (candidate.source / app.lock).is_file() else ""
        if not venv.is_complete(layout, name):
            lines.append("build the virtual environment of its lock")
        if app.uses_alembic:
            revisions = schema.pending(schema.revisions(candidate.source), (schema_of and schema_of.schema_heads) or [])
            lines += [f"migrate: {each.file}" for each in revisions]
            if live and (unfit := migration.incompatible(revisions)):
                lines.append("show the maintenance page meanwhile" if breaking else migration.refusal(app.name, unfit))
        elif app.migration:
            lines.append(f"migrate: {' '.join(app.migration.command)}")
    return [*lines, _cutover_plan(layout, app, present)]


@contextmanager
def _candidate(
    layout: Layout, staged: Record | None, donor: Record | None, archive: Path | None
) -> Iterator[Candidate | None]:
    """The release that would be made; an archive is unpacked in memory, since a plan writes nothing to the disk."""
    if staged:
        yield Candidate.of(layout, staged)
    elif donor:
        yield Candidate(layout.releases / donor.id / "source", layout.description, layout.inputs)
    elif archive and archive.exists():
        folder = Path(tempfile.mkdtemp(dir="/run", prefix="forge-plan-"))
        try:
            staging.unpack(archive, folder / "source")
            yield Candidate(folder / "source", layout.description, layout.inputs)
        finally:
            shutil.rmtree(folder)
    else:
        yield None


def _cutover_plan(layout: Layout, app: App, present: State) -> str:
    occupied = cutover.occupied(layout, present)
    line = f"start slot {slots.other(occupied)}, wait for {app.readiness}, move the traffic"
    return line + (f", watch it for {app.watch_seconds:g} s, drain slot {occupied}" if occupied else "")


def _source_digest(archive: Path | None, source_digest: str | None) -> str:
    if archive is not None and archive.exists():
        found = staging.digest_file(archive)
        if source_digest not in (None, found):
            raise Refused(f"expected an archive with digest {source_digest}; found {found}; upload {archive} again")
        return found
    if source_digest is None:
        raise Refused(f"expected an archive at {archive}; found none; upload it")
    return source_digest


def _need_source(archive: Path | None, donor: Record | None, source_digest: str) -> None:
    if donor is None and (archive is None or not archive.exists()):
        where = f" or in {archive}" if archive else ""
        raise Refused(
            f"expected the source {source_digest[:12]} on this host{where}; found none; name its archive with --archive"
        )


def _on_disk(known: list[Record], digest: str, source_digest: str) -> tuple[Record | None, Record | None]:
    """The release itself, and one whose source it can have."""
    newest = known[::-1]
    return (
        next((record for record in newest if record.digest == digest), None),
        next((record for record in newest if record.source_digest == source_digest), None),
    )


def _live(known: list[Record], present: State) -> Record | None:
    return next((record for record in known if present.live and record.id == present.live.release), None)


def _require_live(app: App, known: list[Record], present: State) -> Record:
    if live := _live(known, present):
        return live
    raise Refused(f"expected {app.name} to have a live release; found none; release one first")


def _of_schema(known: list[Record], present: State) -> Record | None:
    """The release whose migrations the database has."""
    return next((record for record in known if record.id == present.schema), None)


def _goes_back(present: State) -> bool:
    """Whether the cutover under way is one back: a rollback that stands, or what was turned back."""
    operation = present.operation
    if operation is None or operation.phase not in ("watching", "draining"):
        return False
    return operation.action in (("release", "rotation") if present.live == operation.old else ("rollback",))


def _target(layout: Layout, known: list[Record], present: State, to: str | None) -> Record:
    names = ", ".join(record.id for record in known)
    if to:
        if found := next((record for record in known if record.id == to), None):
            return found
        raise Refused(f"expected the release {to} on this host; found {names}; name one of these with --to")
    if target := cutover.rollback_target(layout, present):
        return target
    raise Refused(
        f"expected a release that was live before and passed its watch; found none among {names}; name one with "
        "--to, or release another source"
    )


def _serves(layout: Layout, present: State) -> bool:
    """Whether the live slot is where state.json says, and its unit is up or on its way."""
    operation = present.operation
    if present.live is None or present.maintenance or layout.live_slot() != present.live.slot:
        return False
    return (operation is None or operation.phase in ("watching", "draining")) and systemd.is_wanted(
        layout.service(present.live.slot)
    )


def unchanged(app: App, action: Action, present: State) -> Result:
    """Nothing to do; when the live release is being watched, its verdict is still to come."""
    live, operation = present.live, present.operation
    watching = operation is not None and operation.phase == "watching"
    return Result(
        app=app.name,
        action=action,
        changed=False,
        release=live.release if live else None,
        previous=present.previous.release if present.previous else None,
        slot=live.slot if live else None,
        verdict="watching" if watching else "live",
        began=operation.began if operation and watching else "",
        secrets=live.secrets if live else 0,
    )


def _complete(
    layout: Layout,
    app: App,
    phases: cutover.Phases,
    staged: Record | None,
    archive: Path | None,
    donor: Record | None,
    digest: str,
    source_digest: str,
) -> Record:
    """A release that is whole on disk, with its environment."""
    if staged is None:
        with phases("stage"):
            staged = staging.stage(
                layout,
                app,
                digest=digest,
                source_digest=source_digest,
                archive=archive,
                donor=donor,
                group=_group(app),
            )
    else:
        staging.check_intact(layout, staged)
    with phases("environment"):
        _build(layout, app, staged)
    commands.check_programs(layout, app, staged.id)
    return staged


def _build(layout: Layout, app: App, record: Record) -> None:
    venv.build(layout, layout.releases / record.id / "source" / app.lock, _group(app))


def _group(app: App) -> int:
    """The group that may read what is made for an app."""
    return grp.getgrnam(app.user).gr_gid


def _due(layout: Layout, app: App, present: State) -> str:
    """Why the live slot is to be recycled; empty when it is not."""
    if present.live is None or present.maintenance:
        return ""
    if why := lease.due(layout, present.live.slot):
        return why
    last = present.last_cutover
    if last and last.action == "recycle" and hours_since(last.at) < RECYCLE_PAUSE_HOURS:
        return ""
    service = layout.service(present.live.slot)
    hours, used, limit = hours_since(present.live.since), systemd.memory(service), systemd.memory_limit(service)
    if app.recycle_after_hours and hours > app.recycle_after_hours:
        return f"slot {present.live.slot} is {hours:.0f} h old, more than {app.recycle_after_hours:g}"
    if app.recycle_memory_percent and limit and used > limit * app.recycle_memory_percent / 100:
        return (
            f"slot {present.live.slot} uses {used >> 20} MiB, more than {app.recycle_memory_percent:g} % of "
            f"{limit >> 20} MiB"
        )
    return ""


def _secrets_to_go_back_with(layout: Layout, app: App, live: Record, present: State, say: Say) -> Fetched | None:
    """The newest secrets, or None for those of the live slot, since no fault of newer ones may bar the way back."""
    comparable = identity.same_source(app, config.load(layout.settings(live.id)))
    serving = present.live.secrets if present.live and comparable else 0
    try:
        newest = identity.fetch(layout, app, "app")
    except SecretsError as error:
        if not serving:
            raise
        say(f"staying with {present.serving_secrets} of the secrets: {error}")
        return None
    refused = present.refused(newest.version)
    if refused and serving:
        say(
            f"staying with {present.serving_secrets} of the secrets: version {newest.version} was refused: "
            f"{refused.reason}"
        )
        return None
    return newest
