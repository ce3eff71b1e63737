"""Rotation: a new version of an app's secrets goes into service by a cutover of the live release to a fresh slot.

A version that fails its check, does not get ready or is rolled back leaves the old one serving. The history remembers
it, so that it is tried again only now and then, or when an operator asks for it: what kept it from getting ready may
have been something else.

A new database password goes to the one of the app's two login roles that no slot uses, so that at every moment each
slot has a role and a password that PostgreSQL accepts. A crash after a step leaves this behind:

    the idle role has its verifier  nobody knows the password; the next call sets another
    role and password are written   the live slot keeps the version that it has; the next call, or the timer's, goes on
                                    with the cutover
    the cutover has begun           see forgectl.cutover; after a rollback both passwords are valid
    the old slot has stopped        the old role's password is taken before the cutover is forgotten, so whoever goes on
                                    with the draining does that, too
"""

from typing import TYPE_CHECKING

import msgspec

from forgectl import config, identity, lock, sealed, state
from forgectl import database as databases
from forgectl.config import App, Database
from forgectl.errors import CandidateFailed, Refused, SecretsError
from forgectl.layout import Layout
from forgectl.lock import person
from forgectl.state import Entry, State, hours_since, now
from forgectl.values import Fetched

# A version that is no good starts a slot in vain each time.
REFUSED_PAUSE_HOURS = 1.0

if TYPE_CHECKING:
    from forgectl.cutover import Say
    from forgectl.release import Result


def is_due(layout: Layout, app: App, say: "Say") -> bool:
    """Whether there is anything to do: a look that holds up nobody, since it takes no lock and asks Vault once.

    Raises:
        CandidateFailed: the newest version was refused before.
        SecretsError: it fails its check, as was written down before, or Vault is not usable.
    """
    present = state.load(layout)
    if present.operation:
        # One that nobody holds the lock for was interrupted; watching and draining go on by themselves.
        return present.operation.phase in ("maintenance", "starting") and lock.holder(layout) is None
    if present.live is None or present.maintenance or present.removed:
        return False
    if identity.renew(layout, app, say, dry_run=True):
        return True
    its_app = config.load(layout.settings(present.live.release))
    try:
        version = identity.fetch(layout, its_app, "app").version
    except SecretsError as error:
        if error.version and not present.refused(error.version):
            return True
        if error.state == "rejected" and app.secrets.rotation:
            return True
        raise
    if version == present.live.secrets:
        return False
    _need_untried(layout, present, version)
    return True


def rotate(layout: Layout, app: App, *, if_due: bool, database_password: bool, dry_run: bool, say: "Say") -> "Result":
    """Put the newest version of the secrets into service, and renew the host's own secret ids that expire soon.

    With `database_password` the database gets a new one before, unless one that was made earlier still waits for its
    cutover. With `if_due` a version that was refused is not tried again.

    Raises:
        Refused: nothing serves, or the database password is not this host's to change; nothing was changed.
        SecretsError: the version fails its check, or Vault is not usable; what served before still serves.
        CandidateFailed: the version did not get ready, now or earlier; what served before still serves.
    """
    from forgectl import cutover, release

    present = state.load(layout) if dry_run else cutover.recover(layout, app, say)
    if if_due and (present.live is None or present.operation or present.maintenance):
        return release.unchanged(app, "rotation", present)
    if not dry_run:
        cutover.refuse_while_watched(layout, present)
        if app.secrets.rotation:
            identity.forget_rejected(layout, app)
    live = release.find_live(layout, present)
    database = _own_database(live.app) if database_password else None
    renewed, problem = renew_ids(layout, app, say, dry_run=dry_run)
    newest = newest_secrets(layout, live.app, present, dry_run=dry_run)
    why = [f"{'renew' if dry_run else 'renewed'} the secret ids of: {', '.join(renewed)}"] if renewed else []
    if database and databases.user(database, newest) != idle_role(database, present):
        if dry_run:
            why.append(f"give {idle_role(database, present)} a new password, in PostgreSQL and among the secrets")
            newest = newest._replace(version=newest.version + 1)
        else:
            cutover.settle(layout, app, present, say)
            newest = change_password(layout, live.app, database, present, newest)
            why.append(f"{databases.user(database, newest)} has a new password")
    if present.live and newest.version == present.live.secrets:
        result = release.unchanged(app, "rotation", present)
        return msgspec.structs.replace(result, changed=bool(renewed), plan=why, report=why, problem=problem)
    if if_due:
        _need_untried(layout, present, newest.version)
    serving = present.serving_secrets
    why.append(f"version {newest.version} of the secrets instead of {serving}")
    if not dry_run:
        say("; ".join(why))
    try:
        result = release.fresh_slot(layout, live, present, "rotation", newest, why=why, dry_run=dry_run, say=say)
    except CandidateFailed as error:
        what = f"version {newest.version} of the secrets was refused, and {serving} serves"
        raise CandidateFailed(f"{what}: {error.summary}", error.log) from error
    return msgspec.structs.replace(result, secrets=newest.version, report=[*why, *result.report], problem=problem)


def serving(layout: Layout, app: App) -> Fetched:
    """The secrets of the live slot, whose password its role has to have; before there is one, the newest."""
    live = state.load(layout).live
    if live:
        its_app = config.load(layout.settings(live.release))
        if its_app.database == app.database:
            try:
                return identity.fetch(layout, its_app, "app", live.secrets)
            except SecretsError:
                # Whoever moves to another Vault has no way into the old one any more.
                if identity.same_source(its_app, app):
                    raise
    return identity.fetch(layout, app, "app")


def idle_role(database: Database, present: State) -> str:
    """The login role of the local database that no slot uses, once the last cutover has drained."""
    used = (present.live and present.live.database_user) or database.app_role
    return next(role for role in database.app_roles if role != used)


def change_password(layout: Layout, app: App, database: Database, present: State, newest: Fetched) -> Fetched:
    """Give the idle role a new password, in PostgreSQL first; returns the version of the secrets that has both.

    Raises:
        Refused: PostgreSQL does not answer.
        SecretsError: the secrets could not be written, so nothing uses the role.
    """
    role, password = idle_role(database, present), databases.new_password()
    databases.set_verifiers({role: password})
    changes = {database.app_key: password, databases.USER_KEY: role}
    if app.secrets.source == "systemd_creds":
        version, _ = sealed.change(layout, "app", changes)
    else:
        version = identity.write(layout, app, newest.values | changes, newest.version)
    return Fetched(newest.values | changes, version)


def generated(layout: Layout, app: App, identity: str, key: str) -> dict[str, str | None]:
    """A random value for a key of the sealed values, as changes of them.

    A password of the local database goes to the role that no slot uses, since it takes effect in PostgreSQL before
    anything starts with it.
    """
    changes: dict[str, str | None] = {key: sealed.generate()}
    database, present = app.database, state.load(layout)
    if database and database.placement == "local" and (identity, key) == ("app", database.app_key) and present.live:
        changes[databases.USER_KEY] = idle_role(database, present)
    return changes


def _own_database(app: App) -> Database:
    """The database whose password this host may change.

    Raises:
        Refused: there is none.
    """
    if app.database is None:
        raise Refused(f"expected {app.name} to have a database; found none; leave out --database-password")
    if app.database.vault_role:
        raise Refused(
            f"expected {app.name} to have a database password of its own; found that Vault leases it; for a new one "
            f"call `forgectl recycle {app.name}`"
        )
    if app.database.placement != "local":
        raise Refused(
            f"expected the database of {app.name} on this host; found an external one, whose roles are not this host's "
            f"to change; let Vault lease its roles (apps.{app.name}.database.vault_role), or do it by hand "
            f"(docs/secrets.md): give a second role a password there, write both in one version of the secrets "
            f"({databases.USER_KEY}, {app.database.app_key}), and call `forgectl secrets rotate {app.name}`"
        )
    if app.secrets.source == "vault":
        identity.need_rotation(app)
    return app.database


def renew_ids(layout: Layout, app: App, say: "Say", *, dry_run: bool) -> tuple[list[str], str]:
    """The identities that were, or would be, renewed, and what went wrong: that must not keep a new version waiting."""
    due = identity.renew(layout, app, say, dry_run=True)
    if dry_run or not due:
        return due, ""
    try:
        return identity.renew(layout, app, say), ""
    except SecretsError as error:
        left = identity.renew(layout, app, say, dry_run=True)
        return [each for each in due if each not in left], str(error)


def newest_secrets(layout: Layout, app: App, present: State, *, dry_run: bool) -> Fetched:
    """The newest version, after its check; that one failed it is written down once."""
    try:
        return identity.fetch(layout, app, "app")
    except SecretsError as error:
        if present.live and error.version and not present.refused(error.version) and not dry_run:
            present.record(
                Entry(
                    release=present.live.release,
                    at=now(),
                    by=person(),
                    outcome="failed",
                    phases={},
                    reason=str(error),
                    action="rotation",
                    secrets=error.version,
                )
            )
            state.save(layout, present)
        raise


def _need_untried(layout: Layout, present: State, version: int) -> None:
    refused = present.refused(version)
    if refused and hours_since(refused.at) < REFUSED_PAUSE_HOURS:
        raise CandidateFailed(
            f"version {version} of the secrets was refused at {refused.at}, and {present.serving_secrets} serves: "
            f"{refused.reason}; write a version that is right, or have it tried again: "
            f"`sudo forgectl secrets rotate {layout.name}`"
        )
