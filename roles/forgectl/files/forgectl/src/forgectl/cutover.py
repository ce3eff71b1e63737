"""The state machine of a cutover: start the idle slot, gate it, swap, watch, drain the slot that lost, record.

What a crash at any step leaves behind, and how `recover` at the start of the next command repairs it:

    staging, pruning    releases/.ID.incomplete, removed; a release folder appears and disappears by one rename
    building            an environment without its .complete marker, built anew; its unit is stopped
    migrating           the migration's unit may still run, and is waited for: half a migration is worse than a late one
    maintenance         the old release is started again, unless the schema has moved on without it; the flag of the
                        page comes after the state that tells of it, and goes before
    starting            live.sock leads to the old slot: the new one is stopped
    between the rename of live.sock and the write after it
                        "starting", live.sock leads to the new slot: traffic decides, so the new one is watched.
                        After a reboot there is no live.sock, and the old one is started: it was not stopped yet
    watching, draining  forge-watch@NAME.service goes on with it, and systemd starts that again when it dies; after a
                        reboot as well, since the database may still know a password that no slot uses any more
    maintenance mode    the state decides; the page goes before it and comes after it, and is shown again

What a rotation of the database password does before its cutover, rotation.py says.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import msgspec

from forgectl import commands, database, identity, lock, schema, slots, staging, state, systemd
from forgectl.config import App
from forgectl.errors import CandidateFailed, ForgeError, Locked, Refused, RolledBack, SecretsError, explain
from forgectl.layout import SLOTS, Layout
from forgectl.lock import person
from forgectl.state import INTERRUPTED, Action, Entry, Operation, Outcome, Phase, Slotted, State, now
from forgectl.values import Fetched

Say = Callable[[str], None]

WATCH_EVERY_SECONDS = 0.25
# One slow or lost answer is no verdict.
FAILURES = 3
# The lock is held for a moment while a command looks around, and for as long as a release takes to start.
LOCK_PATIENCE_SECONDS = 900.0
# What the watch may take beyond its time: its own start, three answers that do not come, a restart of its unit.
VERDICT_PATIENCE_SECONDS = 60.0


class Phases:
    """The seconds that each phase took; announces each one as it begins."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block as the phase `name`."""
        began = time.monotonic()
        self._say(f"{name} ...")
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 3)


class Cutover:
    """One cutover, from the decision to the start of the watch. The caller holds the lock."""

    def __init__(self, layout: Layout, app: App, present: State, say: Say, action: Action) -> None:
        self.phases = Phases(say)
        self.say = say
        self._layout, self._app, self._state, self._action = layout, app, present, action
        self._breaking = False
        self._revisions: list[str] | None = None
        # What the new slot starts with: what the live one has, unless take() says otherwise.
        self._secrets = present.live.secrets if present.live else 0
        self._database_user = present.live.database_user if present.live else ""
        self._schema_before, self._maintenance_before = present.schema, present.maintenance
        self.began = datetime.now(UTC).isoformat(timespec="milliseconds")

    def take(self, secrets: Fetched) -> None:
        """Have the new slot start with these secrets, which were checked.

        Where they name the database role that the live slot does not use, the local server gets its verifier first.

        Raises:
            Refused: the server does not answer, or has no such role.
            SecretsError: they change the password of the role that the live slot uses.
        """
        self._secrets = secrets.version
        if db := self._app.database:
            role = self._database_user = database.user(db, secrets)
            live = self._state.live
            if not db.has_own_roles or not live:
                return
            passwords = {role: secrets.values[db.app_key]}
            if role != (live.database_user or db.app_role):
                database.set_verifiers(passwords)
            elif secrets.version != live.secrets and database.set_verifiers(passwords, dry_run=True) != {
                role: "unchanged"
            }:
                other = next(each for each in db.app_roles if each != role)
                raise SecretsError(
                    "incomplete",
                    f"expected the password of {role} as the live slot has it, since it can't change under its user; "
                    f"found another in version {secrets.version}; put the old one back, or name {other} beside it, "
                    f"under {database.USER_KEY}; for a new one call `sudo forgectl secrets rotate {self._layout.name} "
                    "--database-password`",
                    secrets.version,
                )

    def interrupt_service(self, release: str, reason: str, revisions: list[str] | None) -> None:
        """Show the maintenance page and stop what serves: its code cannot live with what comes.

        `revisions` is what the database is at before it, None when nobody knows.
        """
        self._breaking, self._revisions = True, revisions
        with self.phases("maintenance"):
            self._state.operation = self._operation("maintenance", release)
            self._state.maintenance = reason
            state.save(self._layout, self._state)
            # While these take their time to end, clients are served.
            commands.pause(self._layout)
            if self._state.live:
                commands.stop(self._layout, self._state.live.slot)
            slots.maintenance(self._layout, on=True)
            if self._state.live:
                slots.drain(self._layout, self._state.live.slot)

    def note_schema(self, record: staging.Record) -> None:
        """Remember whose migrations the database has, or may get from now on: a killed command takes nothing back."""
        self._state.schema = record.id
        state.save(self._layout, self._state)

    @property
    def watched(self) -> bool:
        """Whether a verdict is still to come."""
        return self._state.operation is not None and self._state.operation.phase == "watching"

    def fail(self, release: str, error: BaseException, *, undone: bool | None) -> None:
        """Put a failure before the start into the history; what was interrupted goes on if the schema was `undone`.

        None: nobody knows whether it was. The next command finds out.
        """
        self._record_failure(release, error)
        if undone:
            self._state.schema = self._schema_before
        if undone and self._maintenance_before:
            # The old release did not fit what was there before either.
            self._state.maintenance = self._maintenance_before
        if undone is False or self._maintenance_before:
            self._state.operation = None
        state.save(self._layout, self._state)
        if undone and self._state.operation:
            _bring_back(self._layout, self._state, self.say)
        self._tell_maintenance()

    def run(self, release: str) -> str:
        """Start a release in the idle slot, send the traffic there, and start the watch. Returns the slot.

        Raises:
            CandidateFailed: it did not get ready; what served before still serves.
        """
        layout, present = self._layout, self._state
        operation = self._operation("starting", release)
        present.operation = operation
        state.save(layout, present)
        try:
            with self.phases("start"):
                slots.ensure_socket_folder(layout)
                slots.stop(layout, operation.slot)
                slots.prepare(layout, operation.slot, release, operation.secrets)
                systemd.set_weight(layout.service(operation.slot), slots.STARTING_WEIGHT)
                slots.start(layout, operation.slot)
                limit = slots.deadline(self._app, present.starts)
                present.measured(slots.wait_ready(layout, operation.slot, limit))
            with self.phases("swap"):
                systemd.set_weight(layout.service(operation.slot), slots.SERVING_WEIGHT)
                slots.swap(layout, operation.slot)
        except BaseException as error:
            self._abort(error)
            raise
        try:
            commit(layout, present)
        except (ForgeError, OSError) as error:
            raise ForgeError(
                f"{release} takes all traffic, but the rest failed: {_words(error)}; mend that and call "
                f"`forgectl recover {layout.name}`, which ends it"
            ) from error
        return operation.slot

    def _operation(self, phase: Phase, release: str) -> Operation:
        return Operation(
            phase=phase,
            release=release,
            slot=slots.other(occupied(self._layout, self._state)),
            old=self._state.live,
            began=self.began,
            action=self._action,
            by=person(),
            phases=self.phases.seconds,
            breaking=self._breaking,
            previous=self._state.previous,
            secrets=self._secrets,
            database_user=self._database_user,
            schema=self._schema_before,
            revisions=self._revisions,
        )

    def _record_failure(self, release: str, error: BaseException) -> None:
        reason = _words(error)
        self._state.record(
            Entry(
                release, now(), person(), "failed", self.phases.seconds, reason, self._action, self.began, self._secrets
            )
        )

    def _abort(self, error: BaseException) -> None:
        """End a cutover that failed or was interrupted; once traffic has moved, the next command completes it.

        Raises:
            CandidateFailed: what failed was systemd or the disk; other failures say so themselves.
        """
        operation = self._state.operation
        if operation is None or self._layout.live_slot() == operation.slot:
            return
        try:
            slots.stop(self._layout, operation.slot)
            self._state.operation = None
            self._record_failure(operation.release, error)
            state.save(self._layout, self._state)
        except (ForgeError, OSError) as second:
            self.say(f"the next command ends this: {_words(second)}")
        self._tell_maintenance()
        if isinstance(error, (ForgeError, OSError)) and not isinstance(error, (CandidateFailed, Refused)):
            what = f"{operation.release} could not be started"
            raise CandidateFailed(f"{what}: {_words(error)}; then try again") from error

    def _tell_maintenance(self) -> None:
        if not self._state.maintenance:
            return
        if self._state.operation and self._state.operation.phase == "maintenance":
            self.say(
                "clients get the maintenance page until the old release serves again, which the next command tries: "
                f"forgectl recover {self._layout.name}"
            )
        else:
            self.say(
                "clients get the maintenance page, because the schema has changed: release code that fits it, or go "
                f"back in spite of it with `forgectl rollback {self._layout.name} --to RELEASE --breaking`"
            )


def occupied(layout: Layout, present: State) -> str | None:
    """The slot that must not be touched: where traffic goes, or, before live.sock is restored, where it went."""
    return layout.live_slot() or (present.live.slot if present.live else None)


def commit(layout: Layout, present: State) -> None:
    """Write down that traffic goes to the new slot, and have it watched while the old one is warm.

    Without an old slot to go back to there is nothing to watch for.
    """
    operation = _under_way(present)
    watch_seconds = slots.settings(layout, operation.slot).watch_seconds
    if present.live and present.live.release != operation.release:
        present.previous = present.live
    present.live = _slotted(operation)
    present.maintenance = ""
    if operation.old and watch_seconds and not operation.breaking and slots.is_up(layout, operation.old.slot):
        present.operation = msgspec.structs.replace(operation, phase="watching", until=time.time() + watch_seconds)
    else:
        conclude(present, "live")
    # Before the state: a flag that no state tells of would stay for ever, and commands that were not started, too.
    slots.maintenance(layout, on=present.page)
    commands.hand_over(layout, present.live.slot)
    state.save(layout, present)
    if present.operation:
        systemd.restart(layout.watch_unit())


def conclude(present: State, outcome: Outcome, reason: str = "") -> None:
    """Put the verdict on a cutover into the history; what is left is to drain the slot that lost."""
    operation = _under_way(present)
    present.record(
        Entry(
            release=operation.release,
            at=now(),
            by=operation.by,
            outcome=outcome,
            phases=operation.phases,
            reason=reason,
            action=operation.action,
            began=operation.began,
            secrets=operation.secrets,
        )
    )
    present.operation = msgspec.structs.replace(operation, phase="draining") if operation.old else None


def turn_back(layout: Layout, present: State, reason: str) -> None:
    """Send the traffic back to the old slot, which is still warm, and write it down."""
    operation = _under_way(present)
    if operation.old is None:
        raise ForgeError("expected an old slot to go back to; found none; report this")
    slots.swap(layout, operation.old.slot)
    commands.hand_over(layout, operation.old.slot)
    present.live, present.previous = operation.old, operation.previous
    conclude(present, "rolled back", reason)


def turn_back_on_request(layout: Layout, present: State) -> Entry:
    """Do so because an operator wants it: the newer release is rolled back, the older one is live again."""
    began = time.monotonic()
    operation = _under_way(present)
    turn_back(layout, present, f"{person()} asked for it")
    what = f"version {operation.secrets} of its secrets" if operation.action == "rotation" else operation.release
    entry = Entry(
        release=present.live.release if present.live else "",
        at=now(),
        by=person(),
        outcome="live",
        phases={"swap": round(time.monotonic() - began, 3)},
        reason=f"instead of {what}, which was being watched",
        action="rollback",
        began=datetime.now(UTC).isoformat(timespec="milliseconds"),
        secrets=present.live.secrets if present.live else 0,
    )
    present.record(entry)
    state.save(layout, present)
    return entry


def await_verdict(layout: Layout, began: str, limit: float) -> Entry:
    """Wait until a cutover has its verdict, at most `limit` seconds beyond the watch's patience.

    Raises:
        ForgeError: it did not come.
    """
    deadline = time.monotonic() + limit + VERDICT_PATIENCE_SECONDS
    while (entry := state.load(layout).entry(began)) is None:
        if time.monotonic() > deadline:
            unit = layout.watch_unit()
            raise ForgeError(
                f"expected a verdict of {unit}; found none after {limit + VERDICT_PATIENCE_SECONDS:.0f} s; see "
                f"`journalctl -u {unit}`, then call `forgectl recover {layout.name}`"
            )
        time.sleep(0.1)
    return entry


@contextmanager
def turn(layout: Layout, app: App, reason: str, say: Say, waits_for: Collection[str]) -> Iterator[None]:
    """Hold the lock, but not before the verdict on one of these actions: nobody has to know of what a timer began.

    Raises:
        Locked: another command is at work.
    """
    while True:
        with lock.hold(layout, reason):
            # It also goes on with a watch that died, whose verdict would never come.
            operation = recover(layout, app, say).operation
            if operation is None or operation.phase != "watching" or operation.action not in waits_for:
                yield
                return
        # The watch needs the lock to decide.
        say(f"waiting for the verdict on a {operation.action}")
        await_verdict(layout, operation.began, max(0.0, operation.until - time.time()))


def verdict_error(entry: Entry, present: State) -> RolledBack:
    """What to tell the person whose release, or version of the secrets, was rolled back."""
    if entry.action == "rotation":
        return RolledBack(
            f"version {entry.secrets} of the secrets was rolled back, and {present.serving_secrets} serves: "
            f"{entry.reason}; see what the app said (forgectl logs), and write a version that is right"
        )
    name = present.live.release if present.live else "the old release"
    return RolledBack(
        f"{entry.release} was rolled back, and {name} serves: {entry.reason}; see what it said (forgectl logs), mend "
        "it and release again"
    )


def follow(layout: Layout, app: App, say: Say) -> None:
    """Watch and drain whatever cutover is under way: the work of forge-watch@NAME.service.

    Decides under the lock, but watches and drains without it, so that a rollback need not wait.
    """
    while operation := state.load(layout).operation:
        if operation.phase == "watching":
            outcome, reason = _observe(layout, operation)
            with lock.hold(layout, "watch", patience=LOCK_PATIENCE_SECONDS):
                present = state.load(layout)
                if present.operation != operation:
                    continue
                if operation.old and layout.live_slot() == operation.old.slot:
                    # Who turned it back died, or found no room, before writing it down: traffic decides.
                    outcome, reason = "rolled back", "an interrupted rollback"
                if outcome == "live":
                    conclude(present, outcome, reason)
                else:
                    turn_back(layout, present, reason)
                state.save(layout, present)
            say(f"{operation.release}: {outcome}" + (f": {reason}" if reason else ""))
        elif operation.phase == "draining":
            seconds = _drain(layout, state.load(layout))
            with lock.hold(layout, "drain", patience=LOCK_PATIENCE_SECONDS):
                present = state.load(layout)
                if present.operation == operation:
                    finish(layout, app, present, seconds, say)
        else:
            return


def settle(layout: Layout, app: App, present: State, say: Say) -> None:
    """Get both slots free for a new cutover: drain what still drains. The caller holds the lock.

    From here on, this process gets the CPU after what serves.

    Raises:
        Locked: a verdict is still to come.
    """
    systemd.step_back()
    if present.operation is None:
        return
    refuse_while_watched(layout, present)
    say("waiting until the last cutover has drained")
    # Or it might stop, a little later, what starts in that slot next.
    systemd.stop(layout.watch_unit())
    finish(layout, app, present, _drain(layout, present), say)


def refuse_while_watched(layout: Layout, present: State) -> None:
    """Check that no verdict is to come: who holds the lock for long would keep the watch from turning back.

    Raises:
        Locked: it is.
    """
    operation = present.operation
    if operation is None or operation.phase != "watching":
        return
    hint = f", or call `forgectl rollback {layout.name}`" if operation.action == "release" else ""
    raise Locked(
        f"{layout.name} is locked ({operation.action} of {operation.release} by {operation.by}, watched for "
        f"{max(0.0, operation.until - time.time()):.0f} s more); wait{hint}"
    )


def lasting_trouble(layout: Layout, slot: str) -> str:
    """What keeps a slot from serving, in words; empty when it was ready once of as many times as the watch asks."""
    found = ""
    for _ in range(FAILURES):
        if not (found := slots.trouble(layout, slot)):
            break
        time.sleep(WATCH_EVERY_SECONDS)
    return found


def finish(layout: Layout, app: App, present: State, seconds: float, say: Say) -> None:
    """Forget a cutover that has drained, and remove what is old: releases, and the password that no slot uses.

    Raises:
        Refused: the local PostgreSQL does not answer; the cutover is not forgotten, and this is to be called again.
    """
    operation = _under_way(present)
    _expire_password(app, operation, present)
    present.history = [
        msgspec.structs.replace(entry, phases=entry.phases | {"drain": seconds})
        if entry.began == operation.began and entry.action == operation.action
        else entry
        for entry in present.history
    ]
    present.operation = None
    state.save(layout, present)
    try:
        staging.prune(layout, app, needed(layout, present))
    except OSError as error:
        say(f"old releases were left: {explain(error)}")


def _expire_password(app: App, operation: Operation, present: State) -> None:
    """Take the password of a login role of the local database that the slot which lost was the last to use."""
    db, old, live = app.database, operation.old, present.live
    if db is None or not db.has_own_roles or old is None or live is None:
        return
    before, after = (each.database_user or db.app_role for each in (old, live))
    if before != after and before in db.app_roles:
        database.expire(before)


def needed(layout: Layout, present: State) -> set[str]:
    """The releases that must stay: what is live, what was, where a rollback would go, and whose schema there is.

    And what a run of a scheduled command began with.
    """
    target = rollback_target(layout, present)
    slotted = {each.release for each in (present.live, present.previous) if each}
    since = commands.running_since(layout)
    began_with = present.live_since(since) if since else set()
    return slotted | began_with | {present.schema} | ({target.id} if target else set())


def rollback_target(layout: Layout, present: State) -> staging.Record | None:
    """What was live before the live release, passed its watch and is still there."""
    if present.live is None:
        return None
    lineage, live = present.lineage(), present.live.release
    before = lineage[: lineage.index(live)] if live in lineage else lineage
    known = {record.id: record for record in staging.records(layout)}
    return next((known[release] for release in reversed(before) if release in known), None)


def recover(layout: Layout, app: App, say: Say) -> State:
    """Repair what a command that was killed left behind; see the module's table. The caller holds the lock.

    Raises:
        OSError: the disk is full; nothing got worse.
    """
    present = state.load(layout)
    for leftover in layout.releases.glob(".*.incomplete"):
        shutil.rmtree(leftover)
    for unit in systemd.active_units(f"{layout.name}-migrate@*.service"):
        say(f"waiting for {unit}, which an interrupted command began")
        systemd.wait_ended(unit)
    if present.closed:
        slots.maintenance(layout, on=True)
    # Whoever was killed between the two links of a swap has sent nobody to the other slot but those who ask for files.
    if (serving := layout.live_slot()) and not slots.serves_files(layout, serving):
        slots.serve_files(layout, serving)
    operation = present.operation
    if operation is None:
        return present
    if operation.phase == "starting" and layout.live_slot() == operation.slot:
        say(f"ending the interrupted {operation.action} of {operation.release}")
        commit(layout, present)
    elif operation.phase == "starting":
        say(f"ending the interrupted {operation.action} of {operation.release}")
        slots.stop(layout, operation.slot)
        conclude(present, "failed", INTERRUPTED)
        present.operation = None
        state.save(layout, present)
    elif operation.phase == "maintenance":
        say(f"ending the interrupted {operation.action} of {operation.release}")
        # It may have been killed right before that.
        slots.maintenance(layout, on=True)
        moved = _schema_moved(layout, app, operation)
        if present.entry(operation.began) is None:
            conclude(present, "failed", INTERRUPTED)
        if moved:
            commands.pause(layout)
            if present.live:
                slots.stop(layout, present.live.slot)
            present.operation = None
            state.save(layout, present)
            say(f"the schema is that of {operation.release} already: release it again, to end the maintenance")
        else:
            present.schema, present.operation = operation.schema, operation
            _bring_back(layout, present, say)
            # When it did not come back, the state on disk keeps the operation: each command tries again, and the
            # release or rollback that mends it overwrites it.
            present.operation = None
    elif not systemd.is_wanted(layout.watch_unit()):
        systemd.restart(layout.watch_unit())
    return present


def boot(layout: Layout, app: App, say: Say) -> str | None:
    """Bring the live release back after a boot: its listener, live.sock, and its service without waiting for it."""
    present = state.load(layout)
    if present.removed:
        return None
    rebooted = layout.live_slot() is None
    slots.ensure_socket_folder(layout)
    try:
        if rebooted:
            _after_reboot(layout, present)
        present = recover(layout, app, say)
    except (ForgeError, OSError) as error:
        # What was live is live until a release says otherwise, and to start it takes no room, Vault or database.
        say(f"an interrupted release is left to the next command: {_words(error)}")
    live = present.live
    slots.maintenance(layout, on=present.page)
    if live is None or present.maintenance:
        return None
    if not (layout.releases / live.release / "release.json").exists():
        raise ForgeError(
            f"expected the live release in {layout.releases / live.release}; found none; restore it from a backup"
        )
    slots.prepare(layout, live.slot, live.release, live.secrets)
    slots.start(layout, live.slot)
    if layout.live_slot() != live.slot:
        slots.swap(layout, live.slot)
    commands.hand_over(layout, live.slot)
    return live.release


def _after_reboot(layout: Layout, present: State) -> None:
    """End what a reboot cut short and cannot go on: no slot is warm any more."""
    operation = present.operation
    if operation is None:
        return
    if operation.phase == "starting" and operation.breaking:
        # The old code does not fit the schema any more; the new one is started for ever, as any live release.
        present.live = _slotted(operation)
        present.maintenance = ""
    elif operation.phase in ("maintenance", "starting"):
        return
    if operation.phase != "draining":
        conclude(present, "live", "the host was rebooted before the verdict")
        state.save(layout, present)


def _observe(layout: Layout, operation: Operation) -> tuple[Outcome, str]:
    """Watch a new slot to its verdict, "live" or "rolled back", and why; ends early when somebody else has decided."""
    old = operation.old
    if old is None:
        raise ForgeError("expected an old slot beside the one that is watched; found none; report this")
    # The wall clock may jump.
    watch_seconds = slots.settings(layout, operation.slot).watch_seconds
    deadline = time.monotonic() + min(watch_seconds, operation.until - time.time())
    failures = 0
    while state.load(layout).operation == operation and layout.live_slot() == operation.slot:
        if slots.restarts(layout, operation.slot):
            failures, found = FAILURES, f"{layout.service(operation.slot)} ended and was restarted"
        elif found := commands.trouble(layout, operation.slot, ever=True):
            failures = FAILURES
        else:
            found = slots.trouble(layout, operation.slot)
            failures = failures + 1 if found else 0
        over = time.monotonic() >= deadline
        if failures >= FAILURES:
            others = slots.trouble(layout, old.slot) or commands.trouble(layout, old.slot)
            if not others:
                return "rolled back", f"{found}, and {old.release} was ready"
            if over:
                return "live", f"{found}, but {old.release} was no better: {others}"
        elif over and not failures:
            return "live", ""
        time.sleep(WATCH_EVERY_SECONDS)
    return "live", ""


def _drain(layout: Layout, present: State) -> float:
    """Drain the slot that lost: whichever is not live. Returns the seconds that took."""
    began = time.monotonic()
    for slot in SLOTS:
        if not present.live or slot != present.live.slot:
            slots.drain(layout, slot)
    return round(time.monotonic() - began, 3)


def _bring_back(layout: Layout, present: State, say: Say) -> None:
    """Start the live release again after a maintenance that changed nothing; when it does not get ready, say so."""
    if live := present.live:
        say(f"starting {live.release} again")
        # Whatever an interrupted drain left of it: its restarts are counted anew, and nobody is sent there meanwhile.
        slots.maintenance(layout, on=True)
        slots.stop(layout, live.slot)
        slots.start(layout, live.slot)
        limit = slots.deadline(slots.settings(layout, live.slot), present.starts)
        try:
            slots.wait_ready(layout, live.slot, limit)
        except CandidateFailed as error:
            say(f"{live.release} does not come back: {error}")
            return
        slots.swap(layout, live.slot)
        commands.hand_over(layout, live.slot)
    present.operation = None
    present.maintenance = ""
    slots.maintenance(layout, on=present.page)
    state.save(layout, present)


def _schema_moved(layout: Layout, app: App, operation: Operation) -> bool:
    """Whether an interrupted migration has changed the schema under the release that was live."""
    if app.database is None or operation.revisions is None:
        return True
    password = identity.fetch(layout, app, "migrate").values[app.database.migrate_key]
    with database.migration_lock(database.migration_url(app.database), password) as connection:
        return schema.current(connection) != operation.revisions


def _slotted(operation: Operation) -> Slotted:
    """What is live once traffic goes to the new slot."""
    return Slotted(operation.release, operation.slot, now(), operation.secrets, operation.database_user)


def _under_way(present: State) -> Operation:
    if present.operation is None:
        raise ForgeError("expected a cutover under way; found none; report this")
    return present.operation


def _words(error: BaseException) -> str:
    """What went wrong, for the operator."""
    match error:
        case CandidateFailed():
            return error.summary
        case ForgeError():
            return str(error)
        case OSError():
            return explain(error)
        case KeyboardInterrupt():
            return INTERRUPTED
    return type(error).__name__
