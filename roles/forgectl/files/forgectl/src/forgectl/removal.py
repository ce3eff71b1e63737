"""Taking an app out of service, bringing it back, and deleting what it left.

What a kill at any step leaves behind, the next call of the same command completes: each step may be repeated, `removed`
is in the state before the first of them, and says that they are `done` after the last. The folder of the state goes
last of all, so that a purge knows itself until its end.

    remove   timers stop, the site goes, Nginx is reloaded as for everything else, both slots are drained and stopped
    restore  the live release starts in a fresh slot through the gate of every cutover; then site and timers come back
    release  does the same with the release that it makes: the entry in the inventory and site.yml bring an app back
    purge    the database and its roles, certificates, credentials, units, folders, logs, users
"""

import grp
import pwd
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from forgectl import commands, config, cutover, database, identity, slots, staging, state, systemd
from forgectl.config import App, Database
from forgectl.cutover import Say
from forgectl.errors import ForgeError, Refused, explain
from forgectl.layout import SLOTS, Layout, fsync, names, write_atomically
from forgectl.lock import person
from forgectl.state import Entry, Removed, State, now

NGINX = "nginx.service"


class Result(msgspec.Struct, frozen=True):
    """What a command did, or would do: `kept` is what is left for a restore, `deleted` what a purge deletes."""

    app: str
    action: Literal["remove", "restore", "purge"]
    changed: bool
    plan: list[str] = []
    kept: list[str] = []
    deleted: list[str] = []

    def keeping(self, more: list[str]) -> "Result":
        """The same, with more that is kept."""
        return msgspec.structs.replace(self, kept=[*self.kept, *more])


def refuse(layout: Layout) -> None:
    """Check that an app is in service.

    Raises:
        Refused: it is not.
    """
    if removed := state.load(layout).removed:
        raise Refused(
            f"expected {layout.name} to be in service; found that {removed.by} removed it at {removed.since}; "
            + _next(layout, removed)
        )


def remove(layout: Layout, app: App, *, dry_run: bool, say: Say) -> Result:
    """Take an app out of service and keep all that it has. The caller holds the lock, and has recovered.

    Raises:
        Locked: a new release is being watched.
        Refused: Nginx does not take its configuration; the app serves as before.
    """
    present = state.load(layout)
    kept = belongings(layout, app)
    if present.removed and (present.removed.done or present.removed.purging):
        return Result(layout.name, "remove", changed=False, kept=kept)
    if dry_run:
        plan = [
            "stop its timers",
            f"take {app.domain} away from Nginx, by a reload that loses no request of the others",
            "drain and stop its slots",
        ]
        return Result(layout.name, "remove", changed=True, plan=plan, kept=kept)
    cutover.settle(layout, app, present, say)
    if present.removed is None:
        wanted = [timer for timer in layout.timers() if systemd.is_wanted(timer)]
        present.removed = Removed(now(), person(), wanted)
        state.save(layout, present)
    say("stopping its timers ...")
    systemd.disable(*layout.timers(), layout.boot_unit())
    systemd.stop(layout.watch_unit())
    commands.pause(layout)
    say("taking its site away from Nginx ...")
    try:
        _move(layout.site, layout.removed_site)
        systemd.reload(NGINX)
    except ForgeError as error:
        _move(layout.removed_site, layout.site)
        _start_timers(layout, present.removed)
        if present.live:
            commands.hand_over(layout, present.live.slot)
        present.removed = None
        state.save(layout, present)
        raise Refused(f"{error}; {layout.name} serves as before; mend that (nginx -t), then try again") from error
    say("draining it ...")
    for slot in SLOTS:
        slots.drain(layout, slot)
    layout.live.unlink(missing_ok=True)
    layout.live_files.unlink(missing_ok=True)
    present.removed = msgspec.structs.replace(present.removed, done=True)
    _record(present, "removed")
    state.save(layout, present)
    return Result(layout.name, "remove", changed=True, kept=kept)


@contextmanager
def returning(layout: Layout, present: State, say: Say) -> Iterator[None]:
    """Around what brings a slot of a removed app up: then it gets its site and timers back. Else it does nothing.

    Raises:
        Refused: Nginx does not take the site; the app stays out of service, and the next call tries again.
    """
    if present.removed is None:
        yield
        return
    # From here on something may run, which another removal is to stop.
    present.removed = msgspec.structs.replace(present.removed, done=False)
    state.save(layout, present)
    try:
        yield
    except BaseException:
        present = state.load(layout)
        if present.removed and layout.live_slot() is None:
            present.removed = msgspec.structs.replace(present.removed, done=True)
            state.save(layout, present)
        raise
    _reopen(layout, say)


def _reopen(layout: Layout, say: Say) -> None:
    present = state.load(layout)
    if present.removed is None:
        raise ForgeError(f"expected {layout.name} to be out of service; found that it is not; report this")
    say("giving its site back to Nginx ...")
    slots.ensure_socket_folder(layout)
    slots.maintenance(layout, on=present.page)
    try:
        # One that site.yml has written meanwhile is newer.
        if layout.site.exists():
            layout.removed_site.unlink(missing_ok=True)
        _move(layout.removed_site, layout.site)
        systemd.reload(NGINX)
    except ForgeError as error:
        _move(layout.site, layout.removed_site)
        again = f"sudo forgectl restore {layout.name}"
        raise Refused(f"{error}; {layout.name} runs, but clients do not reach it; mend that, then: {again}") from error
    _start_timers(layout, present.removed)
    if present.live and not present.maintenance:
        # A removal that was killed early has stopped those on a schedule, and no slot.
        commands.hand_over(layout, present.live.slot)
    present.removed = None
    _record(present, "live")
    state.save(layout, present)


def refuse_while_purged(layout: Layout, present: State) -> None:
    """Check that nothing of an app was deleted yet.

    Raises:
        Refused: a purge has begun.
    """
    if present.removed and present.removed.purging:
        raise Refused(
            f"expected all that belongs to {layout.name}; found a purge that has begun; "
            + _next(layout, present.removed)
        )


def refuse_what_another_has(layout: Layout, app: App) -> None:
    """Check that nobody got the names or the database of a removed app meanwhile.

    Raises:
        Refused: an app in service has one of them.
    """
    site = layout.site if layout.site.exists() else layout.removed_site
    wanted = _server_names(site) if site.exists() else {app.domain}
    for other in sorted(layout.site.parent.glob("*.conf")):
        if other != layout.site and (shared := sorted(wanted & _server_names(other))):
            raise Refused(
                f"expected {', '.join(shared)} to be free for {layout.name}; found that {other.stem} serves it; take "
                f"it away from {other.stem} first, or give {layout.name} another domain in its entry and run site.yml"
            )
    db = app.database
    if db and db.placement == "local" and (user := _shared_with(layout, db.name, in_service=True)):
        raise Refused(
            f"expected the database {db.name} to be free for {layout.name}; found that {user} uses it; remove {user} "
            f"first, or give {layout.name} another database in its entry and run site.yml"
        )


def half_purged(root: Path) -> list[str]:
    """The apps of which a purge that was killed left nothing but the folder of their state."""
    folders = sorted(path for path in (root / "var/lib/forge").glob("*/") if path.is_dir())
    return [path.name for path in folders if not Layout(path.name, root).description.exists()]


def is_gone(layout: Layout) -> bool:
    """Whether this host knows nothing of an app, or no more."""
    return not layout.description.exists() and not layout.state_dir.exists()


def purge(layout: Layout, *, dry_run: bool, say: Say) -> Result:
    """Delete all that a removed app left. The caller holds the lock.

    Raises:
        Refused: it is in service, or PostgreSQL or certbot refuse; what is left is for the next call.
    """
    present = state.load(layout)
    if not layout.description.exists() and not (layout.state_dir / "state.json").exists():
        # A purge that was killed at its last step.
        if not dry_run:
            _delete(layout.state_dir)
        return Result(layout.name, "purge", changed=True, deleted=[str(layout.state_dir)])
    if present.removed is None or not (present.removed.done or present.removed.purging):
        raise Refused(
            f"expected {layout.name} to be out of service; found that it is not; call `sudo forgectl remove "
            f"{layout.name}` first, which can be undone"
        )
    # It goes last but for the state: without it, all that it tells of is deleted.
    app = config.load(layout.description) if layout.description.exists() else None
    deleted = belongings(layout, app) if app else [str(layout.state_dir)]
    if dry_run:
        kept = _spared(layout, app) if app else []
        deleted = _without(deleted, kept)
        plan = [*(f"delete {each}" for each in deleted), *(f"keep {each}" for each in kept)]
        return Result(layout.name, "purge", changed=True, plan=plan, kept=kept, deleted=deleted)
    present.removed = msgspec.structs.replace(present.removed, purging=True)
    state.save(layout, present)
    kept = _spared(layout, app) if app else []
    if app:
        _drop_databases(layout, app, say)
        _delete_certificates(layout, say)
        say("deleting credentials, units, folders and logs ...")
        for slot in SLOTS:
            slots.stop(layout, slot)
        spared = _state_of_another(layout, app)
        for path in _paths(layout):
            if not (spared and path == layout.app_state):
                _delete(path)
        systemd.daemon_reload()
        for user in (f"{app.user}-migrate", app.user):
            _delete_user(user)
        _delete(layout.inputs)
        _delete(layout.description)
    _delete(layout.state_dir)
    return Result(layout.name, "purge", changed=True, kept=kept, deleted=_without(deleted, kept))


def belongings(layout: Layout, app: App) -> list[str]:
    """What an app has on this host, in words."""
    known = staging.records(layout)
    sealed = sorted(layout.credentials.glob(f"forge.{layout.name}.*"))
    certificates = [path for path in _certificates(layout) if path.exists() or path.is_symlink()]
    found = [f"{len(known)} releases and their environments: {layout.home}", f"its own state: {layout.app_state}"]
    found += [f"the database {name} with its roles" for name in _databases(layout, app)]
    if sealed:
        found.append(f"{len(sealed)} sealed credentials: {layout.credentials}/forge.{layout.name}.*")
    if certificates:
        found.append(f"certificate and key: {', '.join(map(str, certificates))}")
    found.append(f"access logs: {layout.access_log}*")
    found.append(f"the user {app.user}" + (f" and {app.migration.user}" if app.migration else ""))
    return found


def elsewhere(app: App) -> list[str]:
    """What neither a removal nor a purge touches, in words."""
    found = [f"lines of {app.name} in the journal, until they are old enough to go"]
    if app.secrets.source == "vault":
        kinds = ", ".join(identity.identities(app))
        found.append(f"secrets and AppRoles ({kinds}) in {app.secrets.address}; see docs/several-apps.md")
    if app.database and app.database.placement != "local":
        found.append(f"the database {app.database.name} on its own server")
    return found


def _next(layout: Layout, removed: Removed) -> str:
    again = f"sudo forgectl restore {layout.name}"
    delete = f"sudo forgectl purge {layout.name}"
    if removed.purging:
        return f"`{delete}` ends it"
    return f"`{again}` brings it back, `{delete}` deletes what it left"


def _record(present: State, outcome: state.Outcome) -> None:
    release = present.live.release if present.live else ""
    present.record(Entry(release, now(), person(), outcome, {}, action="removal"))


def _start_timers(layout: Layout, removed: Removed) -> None:
    # Its boot unit would wait for the lock, and has nothing to do before the next boot.
    systemd.enable(layout.boot_unit(), now=False)
    if removed.timers:
        systemd.enable(*removed.timers, now=True)


def _move(path: Path, to: Path) -> None:
    if path.exists():
        path.replace(to)
        fsync(to.parent)


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ForgeError(f"{explain(error)}; mend that, then try again, which goes on here") from error


def _paths(layout: Layout) -> list[Path]:
    """All files and folders but description and state; each name is the app's alone, whatever others are called."""
    name = layout.name
    # Not NAME-*, which another app may be called.
    patterns = [
        (layout.credentials, f"forge.{name}.*"),
        (layout.units, f"{name}@*"),
        # With the folder of a drop-in for a unit of that name, they would be somebody else's.
        (layout.units, f"{name}.*.service"),
        (layout.units, f"{name}.*.timer"),
        (layout.units, f"{name}-migrate@*"),
        (layout.units, f"{name}-lease@*"),
        (layout.root / "run/systemd/system.control", f"{name}@*"),
        (layout.root / "etc/needrestart/restart.d", f"{name}@*"),
        (layout.access_log.parent, f"{layout.access_log.name}*"),
        # When a timer last ran: of another app of this name, it would make up for runs that nobody missed.
        (layout.root / "var/lib/systemd/timers", f"stamp-{name}.*.timer"),
        (layout.root / "var/lib/systemd/timers", f"stamp-forge-*@{name}.timer"),
        (layout.root / "run/forge-lease", f"{name}-blue"),
        (layout.root / "run/forge-lease", f"{name}-green"),
    ]
    singles = [
        layout.home,
        layout.app_state,
        layout.cache,
        layout.sockets,
        layout.removed_site,
        layout.root / "etc/tmpfiles.d" / f"forge-{name}.conf",
    ]
    return [*(path for folder, pattern in patterns for path in sorted(folder.glob(pattern))), *singles]


def _certificates(layout: Layout) -> list[Path]:
    tls = layout.root / "etc/nginx/tls"
    lineage = layout.root / "etc/letsencrypt/live" / layout.name
    return [tls / f"{layout.name}.key", tls / f"{layout.name}.pem", tls / "live" / f"{layout.name}.pem", lineage]


def _server_names(site: Path) -> set[str]:
    """The host names that a site is for."""
    found = re.findall(r"^\s*server_name\s+([^;]+);", site.read_text(errors="replace"), re.MULTILINE)
    return {name for each in found for name in each.split()}


def _shared_with(layout: Layout, name: str, *, in_service: bool = False) -> str | None:
    """Another app of this host that uses the same local database."""
    for other in names(layout.root):
        if other == layout.name or (in_service and state.load(Layout(other, layout.root)).removed):
            continue
        its = Layout(other, layout.root)
        described = config.load(its.description)
        # An older release of the other may come back as well.
        if name in (_local(described) if in_service else _databases(its, described)):
            return other
    return None


def _local(app: App) -> dict[str, Database]:
    """The database of an app on this host, by its name."""
    return {app.database.name: app.database} if app.database and app.database.placement == "local" else {}


def _databases(layout: Layout, app: App) -> dict[str, Database]:
    """The same with those that only releases name which are older than a change of the entry."""
    found: dict[str, Database] = {}
    for record in staging.records(layout):
        # What nobody can read can't be released either.
        with suppress(Refused):
            found |= _local(config.load(layout.settings(record.id)))
    return _local(app) | found


def _spared(layout: Layout, app: App) -> list[str]:
    """What a purge keeps, since somebody else has it, in words that begin as those of belongings()."""
    found = [
        f"the database {name} with its roles, which {other} uses"
        for name in _databases(layout, app)
        if (other := _shared_with(layout, name))
    ]
    if owner := _state_of_another(layout, app):
        found.append(f"its own state: {layout.app_state}, which belongs to {owner}")
    return found + [
        f"{path}, which another site names"
        for path in _certificates(layout)
        if path.exists() and _is_named(layout, path)
    ]


def _state_of_another(layout: Layout, app: App) -> str:
    """Who owns the folder of an app's state, if that is not the app: then somebody else had it first."""
    if not layout.app_state.exists():
        return ""
    owner = layout.app_state.stat().st_uid
    try:
        return "" if pwd.getpwnam(app.user).pw_uid == owner else f"uid {owner}"
    except KeyError:
        return f"uid {owner}"


def _without(deleted: list[str], kept: list[str]) -> list[str]:
    return [each for each in deleted if not any(reason.startswith(each) for reason in kept)]


def _drop_databases(layout: Layout, app: App, say: Say) -> None:
    for name, db in _databases(layout, app).items():
        if _shared_with(layout, name):
            continue
        say(f"dropping the database {name} ...")
        roles = {*db.app_roles, *(f"{name}_{suffix}" for suffix in ("migrate", "rw", "owner"))}
        database.drop(name, sorted(roles))


def _is_named(layout: Layout, path: Path) -> bool:
    """Whether somebody's configuration of Nginx names a file, or one in a folder."""
    nginx = layout.root / "etc/nginx"
    files = [nginx / "nginx.conf", *(nginx / "conf.d").glob("*.conf"), *(nginx / "forge").glob("*.conf")]
    files += (nginx / "sites-enabled").glob("*")
    # Nginx takes a relative path for one in its own folder.
    name = str(path.relative_to(nginx) if path.is_relative_to(nginx) else path.relative_to(layout.root))
    wanted = re.compile(rf"[\s/]{re.escape(name)}[;/]")
    return any(wanted.search(file.read_text(errors="replace")) for file in files if file.is_file())


def _delete_certificates(layout: Layout, say: Say) -> None:
    *files, lineage = _certificates(layout)
    for path in files:
        if not _is_named(layout, path):
            _delete(path)
    if lineage.is_dir() and not _is_named(layout, lineage):
        say("deleting what certbot keeps of it ...")
        systemd.run("certbot", "delete", "--cert-name", layout.name, "--non-interactive")
    # Whom forge-certificates looks after; site.yml would write the same.
    described = layout.root / "etc/forge/certificates.toml"
    if described.exists():
        text = described.read_text()
        without = re.sub(rf"^{re.escape(layout.name)} = .*\n", "", text, flags=re.MULTILINE)
        if without != text:
            write_atomically(described, without.encode(), 0o644)


def _delete_user(name: str) -> None:
    try:
        pwd.getpwnam(name)
        systemd.run("userdel", name)
    except KeyError:
        pass
    try:
        grp.getgrnam(name)
        systemd.run("groupdel", name)
    except KeyError:
        pass
