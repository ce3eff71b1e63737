"""The command line. Every command imports what it needs itself, so that --help is quick."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import click

from forgectl.errors import (
    DONE,
    FULL,
    INTERRUPTED,
    SECRETS,
    UNEXPECTED,
    CandidateFailed,
    ForgeError,
    Locked,
    Refused,
    explain,
)

EPILOG = """\b
Exit codes:
  0  done, or nothing to do
  1  unexpected failure
  2  wrong usage
  3  refused; nothing was changed
  4  the new release, or version of the secrets, failed before it took traffic;
     the old one serves, or after a breaking migration the maintenance page
  5  another command holds the app's lock, or a new release is being watched
  6  Vault or a secret is not usable
  7  it turned unready after the cutover; the old one serves again
  130  interrupted
"""

DOCTOR_EPILOG = """\b
Exit codes:
  0   nothing is wrong; there may be notes
  1   unexpected failure
  2   wrong usage
  10  warnings: it will come to that
  11  critical: clients notice it
"""

# After a boot, another command may be at work already; a release takes this long at most, as a rule.
BOOT_PATIENCE_SECONDS = 120.0
# The actions that a timer begins.
ROUTINES = ("recycle", "rotation")
NOTHING_OF_IT = "{}: nothing of it is on this host; nothing to do"

name_argument = click.argument("name")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
harmless_option = click.option("--dry-run", is_flag=True, expose_value=False, help="As without: it changes nothing.")
no_wait_option = click.option("--no-wait", is_flag=True, help="Do not wait for the verdict; `forgectl history` has it.")
identity_option = click.option(
    "--identity", type=click.Choice(["app", "migrate"]), default="app", show_default=True, help="Whose secrets."
)
breaking_option = click.option(
    "--breaking",
    is_flag=True,
    help="Allow migrations that the live release does not fit: maintenance page, no automatic rollback.",
)
unfit_option = click.option(
    "--breaking", is_flag=True, help="Go even to a release that does not fit the schema, or may not."
)


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a source."""
    digest = click.option(
        "--source-digest", metavar="SHA256", help="Digest of the archive; enough for a source that is known here."
    )
    archive = click.option(
        "--archive", metavar="FILE", help="Tar archive of the source; - reads it in base64 from standard input."
    )
    return archive(digest(command))


def main() -> NoReturn:
    """Run the command line, and turn failures into one message and an exit code."""

    def interrupt(number: int, _frame: object) -> None:
        # It ends the command the way Ctrl-C does.
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    # Secrets pass through this process; a crash must not write them to the disk. Of all limits this one alone keeps the
    # kernel from handing them to a program for cores as well.
    # Who called may have set 0 for good, and infinity is -1.
    limit = min(1, resource.getrlimit(resource.RLIMIT_CORE)[1] % 2**64)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    try:
        code = forgectl.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = _failed(
            "interrupted; the next command ends what was begun (forgectl recover NAME, forgectl status)", INTERRUPTED
        )
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ForgeError as error:
        code = _failed(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in FULL:
            raise
        code = _failed(explain(error), UNEXPECTED)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forgectl")
def forgectl() -> None:
    """Releases, secrets and state of the apps on this host."""


@forgectl.command()
@name_argument
@source_options
@breaking_option
@no_wait_option
@dry_run_option
@json_option
def release(
    name: str,
    archive: str | None,
    source_digest: str | None,
    breaking: bool,
    no_wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put a source into service with the present settings of app NAME.

    Starts it in the idle slot beside the old release, waits until it is ready, moves the traffic by one atomic rename,
    and watches it while the old release is warm: one that turns unready is rolled back by itself. Then the old one is
    drained and stopped. What is live already is left alone.
    """
    _need_source(archive, source_digest)
    layout, app = _app(name)
    from forgectl import release as releases

    # Of one that was removed, it is what brings it back.
    with _archive(archive) as path, _turn(layout, app, "release", unless=dry_run, even_removed=True):
        result = releases.release(
            layout, app, archive=path, source_digest=source_digest, breaking=breaking, dry_run=dry_run, say=_say
        )
    _conclude(layout, app, result, dry_run=dry_run, wait=not no_wait, as_json=as_json)


@forgectl.command()
@name_argument
@click.option("--to", metavar="RELEASE", help="The release to go to; without it, the one that was live before.")
@unfit_option
@no_wait_option
@dry_run_option
@json_option
def rollback(name: str, to: str | None, breaking: bool, no_wait: bool, dry_run: bool, as_json: bool) -> None:
    """Go back to an older release of app NAME with its own settings, through the same gate as a release.

    The newer release stays on the host, for going forward again with --to.
    """
    layout, app = _app(name)
    from forgectl import release as releases

    # While a rotation is watched, it goes back to the older secrets.
    with _turn(layout, app, "rollback", unless=dry_run, waits_for=("recycle",)):
        result = releases.rollback(layout, app, to=to, breaking=breaking, dry_run=dry_run, say=_say)
    _conclude(layout, app, result, dry_run=dry_run, wait=not no_wait, as_json=as_json)


@forgectl.command()
@name_argument
@click.option("--if-due", is_flag=True, help="Only when memory or age ask for it; what the timer calls.")
@no_wait_option
@dry_run_option
@json_option
def recycle(name: str, if_due: bool, no_wait: bool, dry_run: bool, as_json: bool) -> None:
    """Move the live release of app NAME to a fresh slot: new workers, and no request lost."""
    layout, app = _app(name)
    from forgectl import release as releases

    # A timer need not know of a removal.
    with _turn(layout, app, "recycle", unless=dry_run, waits_for=() if if_due else ROUTINES, even_removed=if_due):
        result = releases.recycle(layout, app, if_due=if_due, dry_run=dry_run, say=_say)
    _conclude(layout, app, result, dry_run=dry_run, wait=not no_wait, as_json=as_json)


@forgectl.command()
@name_argument
@source_options
@dry_run_option
@json_option
def stage(name: str, archive: str | None, source_digest: str | None, dry_run: bool, as_json: bool) -> None:
    """Make a release of app NAME ready on disk, with its environment, and start nothing."""
    _need_source(archive, source_digest)
    layout, app = _app(name)
    from forgectl import release as releases
    from forgectl import systemd

    systemd.step_back()
    with _archive(archive) as path, _locked(layout, "stage", unless=dry_run):
        result = releases.stage(layout, app, archive=path, source_digest=source_digest, dry_run=dry_run, say=_say)
    if as_json:
        _print_json(result)
    elif dry_run and result.changed:
        click.echo("\n".join(result.plan))
    else:
        click.echo(f"{name}: {result.release} is staged" + ("" if result.changed else " already; nothing to do"))


@forgectl.command()
@name_argument
def watch(name: str) -> None:
    """Watch the new release of app NAME, then drain the old one; forge-watch@NAME.service calls this."""
    layout, app = _app(name)
    from forgectl import cutover

    cutover.follow(layout, app, _say)


@forgectl.command()
@name_argument
@click.argument("slot", type=click.Choice(["blue", "green"]))
def lease(name: str, slot: str) -> None:
    """Keep the leased database user of a slot of app NAME; NAME-lease@SLOT.service calls this."""
    layout, _ = _app(name)
    from forgectl import lease as leases

    leases.keep(layout, slot, _say)


@forgectl.command()
@name_argument
@dry_run_option
@json_option
def recover(name: str, dry_run: bool, as_json: bool) -> None:
    """Repair what an interrupted command left behind for app NAME; each command that changes something does so.

    It also gives the releases in the slots the owner and modes back with which they were staged.
    """
    layout, app = _app(name)
    from forgectl import cutover, state
    from forgectl import release as releases

    with _locked(layout, "recover", unless=dry_run):
        before = state.load(layout).operation
        # First: what is started again has to be readable.
        sealed = releases.put_right(layout, dry_run=dry_run, say=_say)
        if not dry_run:
            cutover.recover(layout, app, _say)
        after = state.load(layout).operation
    found = f"{before.phase} {before.release}" if before else None
    if as_json:
        changed = before != after or (bool(sealed) and not dry_run)
        _print_json({"app": name, "changed": changed, "operation": found, "permissions": sealed})
    else:
        lines = [f"{name}: {each} had other permissions than it was staged with" for each in sealed]
        lines += [f"{name}: {found} was under way"] if found else []
        click.echo("\n".join(lines) or f"{name}: nothing to repair")


@forgectl.command()
@name_argument
@dry_run_option
@json_option
def prune(name: str, dry_run: bool, as_json: bool) -> None:
    """Remove the releases of app NAME beyond keep_releases, and environments that none of the others uses.

    What is live, what was live before, and what a rollback would go to always stay.
    """
    layout, app = _app(name)
    from forgectl import release as releases

    with _locked(layout, "prune", unless=dry_run):
        removed = releases.prune(layout, app, dry_run=dry_run, say=_say)
    if as_json:
        _print_json({"app": name, "changed": bool(removed), "removed": removed})
    else:
        verb = "would remove" if dry_run else "removed"
        click.echo("\n".join(f"{verb} {each}" for each in removed) or "nothing to do")


@forgectl.command()
@name_argument
@click.option("-n", "--lines", default=20, show_default=True, help="How many entries, newest last.")
@harmless_option
@json_option
def history(name: str, lines: int, as_json: bool) -> None:
    """Show the cutovers of app NAME, and when its maintenance mode changed: by whom, how it ended, and why."""
    layout, _ = _app(name)
    from forgectl import state
    from forgectl import status as statuses

    present = state.load(layout)
    if as_json:
        _print_json({"app": name, "history": present.history[-lines:], "operation": present.operation})
    else:
        click.echo("\n".join(statuses.history(present, lines)) or f"{name}: nothing was released yet")


@forgectl.command()
@name_argument
@dry_run_option
@json_option
def boot(name: str, dry_run: bool, as_json: bool) -> None:
    """Bring the live release of app NAME back after a boot; harmless at any other time."""
    layout, app = _app(name)
    from forgectl import cutover, state

    if dry_run:
        present = state.load(layout)
        restored = present.live.release if present.live and not (present.maintenance or present.removed) else None
    else:
        with _locked(layout, "boot", patience=BOOT_PATIENCE_SECONDS):
            restored = cutover.boot(layout, app, _say)
        present = state.load(layout)
    why = f"the maintenance page ({present.maintenance})" if present.maintenance else "nothing was released yet"
    if present.removed:
        why = f"out of service since {present.removed.since}"
    if as_json:
        _print_json({"app": name, "release": restored, "maintenance": present.maintenance or None})
    else:
        click.echo(f"{name}: {restored} restored" if restored else f"{name}: {why}")


@forgectl.command()
@name_argument
@click.argument("mode", type=click.Choice(["on", "off"]))
@click.option("--reason", default="", metavar="TEXT", help="For status and history; clients are not told.")
@dry_run_option
@json_option
def maintenance(name: str, mode: str, reason: str, dry_run: bool, as_json: bool) -> None:
    """Close app NAME to clients, who get 503 and Retry-After, or open it again.

    It stays closed over releases, rollbacks and reboots, while the app itself goes on behind the page. The page of a
    breaking migration is another matter, which this neither begins nor ends.
    """
    layout, _ = _app(name)
    from forgectl import maintenance as maintenances

    with _locked(layout, f"maintenance {mode}", unless=dry_run):
        found = maintenances.switch(layout, on=mode == "on", reason=reason, dry_run=dry_run)
    if as_json:
        _print_json(found)
    else:
        verb = "would be" if dry_run else "is"
        click.echo(f"{name}: maintenance mode {verb} {mode}" + ("" if found["changed"] else " already; nothing to do"))
    if mode == "off" and found["maintenance"]:
        _say(f"clients still get the maintenance page ({found['maintenance']}), which a release that fits ends")


@forgectl.command()
@name_argument
@dry_run_option
@json_option
def remove(name: str, dry_run: bool, as_json: bool) -> None:
    """Take app NAME out of service, in good order, and keep all that it has; `forgectl restore NAME` undoes it.

    Its timers stop, Nginx no longer knows its domain, and its slots are drained and stopped; no other app loses a
    request. So does an app whose entry is gone from the inventory: site.yml itself stops nothing.
    """
    layout = _layout(name)
    from forgectl import removal

    if removal.is_gone(layout):
        # As in a play over hosts of which not all have it.
        if as_json:
            _print_json(removal.Result(name, "remove", changed=False))
        else:
            click.echo(NOTHING_OF_IT.format(name))
        return
    layout, app = _app(name)
    with _turn(layout, app, "remove", unless=dry_run, even_removed=True):
        result = removal.remove(layout, app, dry_run=dry_run, say=_say)
    if as_json:
        _print_json(result)
        return
    _tell_removal(result, "out of service", dry_run)
    click.echo("kept:\n" + "\n".join(f"  {each}" for each in result.kept))
    click.echo(f"back into service: sudo forgectl restore {name}; to delete all of that: sudo forgectl purge {name}")


@forgectl.command()
@name_argument
@dry_run_option
@json_option
def restore(name: str, dry_run: bool, as_json: bool) -> None:
    """Bring app NAME back into service that was removed: the release that was live, its site and its timers.

    A release of it does the same, and so do its entry in the inventory and site.yml.
    """
    layout, app = _app(name)
    from forgectl import release as releases

    with _turn(layout, app, "restore", unless=dry_run, even_removed=True):
        result = releases.restore(layout, app, dry_run=dry_run, say=_say)
    _print_json(result) if as_json else _tell_removal(result, "in service", dry_run)


@forgectl.command()
@name_argument
@click.option("--yes-purge", metavar="NAME", help="The name once more; without it, it is asked for at a terminal.")
@dry_run_option
@json_option
def purge(name: str, yes_purge: str | None, dry_run: bool, as_json: bool) -> None:
    """Delete for good all that app NAME, which was removed, has left on this host.

    Its database and roles, releases, state, credentials, certificates, access logs, units and users. What another app
    uses is kept, and what lies elsewhere, such as its secrets in Vault, is named.
    """
    from forgectl import removal

    layout = _layout(name)
    if removal.is_gone(layout):
        result = removal.Result(name, "purge", changed=False)
    else:
        if not dry_run:
            _need_name(name, yes_purge)
        away = removal.elsewhere(_app(name)[1]) if layout.description.exists() else []
        with _locked(layout, "purge", unless=dry_run):
            result = removal.purge(layout, dry_run=dry_run, say=_say)
        result = result.keeping(away)
    if as_json:
        _print_json(result)
        return
    if not result.changed:
        click.echo(NOTHING_OF_IT.format(name))
        return
    _tell_removal(result, "deleted", dry_run)
    if not dry_run:
        click.echo("kept:\n" + "\n".join(f"  {each}" for each in result.kept))


def _need_name(name: str, given: str | None) -> None:
    if given is None and sys.stdin.isatty():
        given = click.prompt(f"This can't be undone. Name of the app to delete from {os.uname().nodename}", err=True)
    if given != name:
        raise click.UsageError(f"this can't be undone: confirm it with --yes-purge {name}; --dry-run shows what goes")


def _tell_removal(result: Any, what: str, dry_run: bool) -> None:
    if dry_run and result.changed:
        click.echo("\n".join(result.plan))
    else:
        click.echo(f"{result.app}: {what}" + ("" if result.changed else " already; nothing to do"))


@forgectl.command()
@click.argument("name", required=False)
@harmless_option
@json_option
def status(name: str | None, as_json: bool) -> None:
    """Show what is live, whether it is ready, and how it got there; of one app or all.

    Of all, one whose files are broken is named with the reason, and the exit code is 3.
    """
    from forgectl import status as statuses

    if name:
        found = statuses.of(*_app(name))
        if as_json:
            _print_json(found)
        else:
            click.echo(statuses.text(found))
        return
    from forgectl import removal
    from forgectl.layout import names

    _need_root()
    apps, broken = {}, {}
    for each in names():
        try:
            apps[each] = statuses.of(*_app(each))
        except (Refused, click.UsageError) as error:
            broken[each] = str(error)
    left = removal.half_purged(Path("/"))
    if as_json:
        _print_json({"apps": apps, "broken": broken, "half_purged": left})
    else:
        reasons = [f"{each}  BROKEN: {why}" for each, why in broken.items()]
        halves = [f"{each}: HALF PURGED; sudo forgectl purge {each} ends it" for each in left]
        click.echo(
            "\n".join([*map(statuses.text, apps.values()), *reasons, *halves])
            or "no app is described in /etc/forge/apps"
        )
    if broken:
        sys.exit(Refused.exit_code)


@forgectl.command(epilog=DOCTOR_EPILOG)
@click.option("--app", "name", metavar="NAME", help="Of the apps, look at this one alone.")
@harmless_option
@json_option
def doctor(name: str | None, as_json: bool) -> NoReturn:
    """Say what is wrong with this host and its apps, with the evidence, what mends it and the page that tells more.

    It changes nothing, asks nobody who is not needed, takes less than 3 seconds, and gets the CPU after whatever
    serves. Anybody may call it, root sees everything. docs/doctor.md has the findings and what --json prints.
    """
    from forgectl import systemd
    from forgectl.doctor import runner, table
    from forgectl.doctor.sight import Sight
    from forgectl.layout import names

    if name is not None and name not in names():
        raise click.UsageError(f"{name!r} is no app of this host; it has: {', '.join(names()) or 'none'}")
    systemd.step_back()
    # It takes longer to import than anything else here.
    from forgectl.doctor.checks import CHECKS

    report = runner.examine(Sight(only=name), CHECKS)
    if as_json:
        _print_json(report.document())
    else:
        click.echo(table.text(report, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    sys.stdout.flush()
    # A check that hangs in the kernel has a thread that nothing else would end.
    os._exit(report.exit_code)


@forgectl.command()
@click.option("--since", type=float, metavar="SECONDS", help="Unix time at which the run of site.yml began.")
@click.option("--whole", is_flag=True, help="It was one of all of site.yml.")
@click.option("--accept", is_flag=True, help="Take all that is here for what provisioning left; for people.")
@dry_run_option
@json_option
def provisioned(since: float | None, whole: bool, accept: bool, dry_run: bool, as_json: bool) -> None:
    """Write down what provisioning left on this host, for doctor to find what changes; site.yml calls this at its end.

    No content is kept, only digests, modes and owners. What was changed or added by hand before a run stays a
    difference, until it is put right or accepted.
    """
    if os.geteuid() != 0:
        raise Refused("expected to be called by root; found another user; use sudo")
    if since is None and not accept:
        raise click.UsageError("say when the run began (--since), or that all that is here is right (--accept)")
    from forgectl.doctor import manifest

    changed = manifest.record(Path("/"), since=since or 0.0, whole=whole, accept=accept, dry_run=dry_run)
    if as_json:
        _print_json({"changed": changed, "manifest": manifest.MANIFEST})
    else:
        click.echo(f"{manifest.MANIFEST}: {'written' if changed else 'nothing to do'}")


@forgectl.command()
@click.argument("name", required=False)
@click.option("--app", "only", metavar="NAME", help="Of what follows, this app's alone.")
@click.option("--request", "request_id", metavar="ID", help="One request on its way: Nginx, app, PostgreSQL.")
@click.option("--slowest", is_flag=True, help="The slowest requests.")
@click.option("--errors", is_flag=True, help="Errors of Nginx, app and PostgreSQL, and alerts, by how often.")
@click.option("--since", metavar="WHEN", help="15m, 2h, 1d, 03:00 or 2026-01-31T03:00; without it, the last hour.")
@click.option("-n", "--lines", type=click.IntRange(min=1), help="How many lines (50), or of each list (10).")
@click.option("-f", "--follow", is_flag=True, help="Go on as it comes; Ctrl-C ends it.")
@click.option("--command", metavar="COMMAND", help="With NAME: of one of its commands alone.")
@harmless_option
@json_option
def logs(
    name: str | None,
    only: str | None,
    request_id: str | None,
    slowest: bool,
    errors: bool,
    since: str | None,
    lines: int | None,
    follow: bool,
    command: str | None,
    as_json: bool,
) -> None:
    """Show what logs say: of an app, of a request, or of the last hour.

    \b
    forgectl logs NAME            the app's own log: both slots, migrations, commands; --json: journald's objects
    forgectl logs --request ID    the request with that id, which each answer has as X-Request-ID
    forgectl logs                 the slowest requests and the errors of the last hour, of all apps

    --follow shows errors and requests of a second or more as they come, or what comes of one request id. It prints one
    object a line with --json, as the others print one.
    """
    viewed = bool(request_id or slowest or errors or not name)
    if (name and only and name != only) or (command and (viewed or not name)):
        raise click.UsageError("one app: NAME or --app; --command goes with NAME and no list")
    from datetime import UTC, datetime

    from forgectl.logs import window

    try:
        began = window.since(since, datetime.now(UTC).astimezone()) if since else None
    except ValueError as error:
        raise click.UsageError(f"--since: {error}") from None
    if name and not viewed:
        _own_log(name, command, began, lines, follow, as_json)
    from forgectl import systemd
    from forgectl.logs import command as views

    chosen = _apps(name or only)
    systemd.step_back()
    try:
        if follow:
            views.follow(chosen, request_id, slowest, errors, as_json)
        elif request_id:
            views.request(chosen, request_id, began, as_json)
        else:
            views.last_hour(chosen, began, lines, slowest, errors, as_json)
    except KeyboardInterrupt:
        # Of what would go on for ever it is the end; a list is cut off.
        sys.exit(DONE if follow else INTERRUPTED)
    except BrokenPipeError:
        # As with `head`: there is nobody to tell, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _own_log(
    name: str, command: str | None, since: float | None, lines: int | None, follow: bool, as_json: bool
) -> None:
    """Become journalctl, with the log of an app."""
    layout, _ = _app(name)
    patterns = [f"{name}@*.service", f"{name}-migrate@*.service", f"{name}.*.service"]
    if command:
        patterns = [layout.command_unit(command, "*"), layout.scheduled_units(command)[0]]
    call = ["journalctl", "--no-pager", *(f"--unit={pattern}" for pattern in patterns)]
    # A span of time is shown as a whole unless somebody counts.
    if since is None:
        call.append(f"--lines={lines or 50}")
    elif lines:
        call += _from_newest(call, since, lines)
    else:
        call += [f"--since=@{since:.6f}", "--no-tail"]
    os.execvp("journalctl", [*call, f"--output={'json' if as_json else 'cat'}", *(["--follow"] if follow else [])])


def _from_newest(call: list[str], since: float, lines: int) -> list[str]:
    """Options of journalctl for the newest entries of a span: before systemd 254, --lines counts from --since on."""
    import json

    from forgectl import systemd

    span = f"--since=@{since:.6f}"
    form = ("--output=json", "--output-fields=PRIORITY", "--quiet")
    newest = systemd.run(*call, span, "--reverse", f"--lines={lines}", *form).splitlines()
    return [f"--cursor={json.loads(newest[-1])['__CURSOR']}" if newest else span, "--no-tail"]


@forgectl.command()
@click.argument("name", required=False)
@harmless_option
@json_option
def day(name: str | None, as_json: bool) -> None:
    """Show the last day in steps of five minutes: requests, latency, errors, memory, releases; of one app or all."""
    chosen = _apps(name)
    from forgectl import systemd
    from forgectl.logs import command as views

    systemd.step_back()
    views.day(chosen, as_json)


def _apps(name: str | None) -> list[tuple[Any, Any]]:
    """One app or all; one whose description is broken is told of, and no reason to show nothing of the others."""
    if name:
        return [_app(name)]
    from forgectl.layout import names

    found = []
    _layout("any")
    for each in names():
        try:
            found.append(_app(each))
        except Refused as error:
            _say(f"forgectl: {error}")
    return found


@forgectl.group()
def secrets() -> None:
    """The secrets of the apps: the host's identities towards Vault or, without Vault, the sealed values."""


@secrets.command()
@name_argument
@click.option("--identity", type=click.Choice(["app", "migrate", "rotate"]), required=True, help="Whose identity.")
@click.option("--role-id", required=True, help="Role id of its AppRole.")
@click.option(
    "--bound-cidr", "bound_cidrs", multiple=True, help="Where the secret id works from, if not anywhere; once for each."
)
@json_option
def enrol(name: str, identity: str, role_id: str, bound_cidrs: tuple[str, ...], as_json: bool) -> None:
    """Unwrap a secret id for app NAME and seal it on this host; the response-wrapping token comes on standard input."""
    from forgectl import identity as identities

    layout, app = _app(name)
    token = sys.stdin.read().strip()
    if not token:
        raise Refused("expected a response-wrapping token on standard input; found nothing; pipe it in")
    with _locked(layout, f"secrets enrol --identity {identity}"):
        identities.enrol(layout, app, identity, role_id, token, list(bound_cidrs), _say)
    if as_json:
        _print_json({"app": name, "identity": identity, "changed": True})
    else:
        click.echo(f"{name}: the {identity} identity works and is sealed")


@secrets.command()
@name_argument
@json_option
def check(name: str, as_json: bool) -> None:
    """Log in with each identity of app NAME and check every secret it refers to; prints no value.

    Says until when each secret id lasts; `expiring` is one with less than a third of its life left, and no failure.
    """
    from forgectl import identity as identities

    found = identities.check(*_app(name))
    if as_json:
        _print_json(found)
    else:
        for each, seen in found["identities"].items():
            until = f", until {seen['expires']}" if seen.get("expires") else ""
            click.echo(f"{name} ({each}): {seen['state']}{until}")
    for problem in found["problems"]:
        click.echo(f"forgectl: {problem}", err=True)
    if found["problems"]:
        sys.exit(SECRETS)


@secrets.command()
@name_argument
@json_option
def whoami(name: str, as_json: bool) -> None:
    """Show who Vault takes the identities of app NAME for, until when each lasts, and how it is sealed."""
    from forgectl import identity as identities

    layout, app = _app(name)
    identities.need_source(app, "vault", "there is nobody to ask")
    found = identities.whoami(layout, app)
    if as_json:
        _print_json(found)
    else:
        for each, seen in found["identities"].items():
            click.echo("\n".join([f"{name} ({each}): {seen['state']}", *_described(seen)]))
    for problem in found["problems"]:
        click.echo(f"forgectl: {problem}", err=True)
    if found["problems"]:
        sys.exit(SECRETS)


def _described(seen: dict[str, Any]) -> Iterator[str]:
    """An identity's properties for people, one a line."""
    if "approle" in seen:
        yield f"  AppRole {seen['approle']}, policies {', '.join(seen['policies'])}; tokens live {seen['token_ttl']} s"
    if "role_id" in seen:
        yield f"  role id {seen['role_id']}; sealed with: {seen['sealed_with']}"
    if seen["issued"] is None:
        yield "  its secret id is from before records were kept: nobody knows until when it lasts"
    else:
        until = f"lasts until {seen['expires']}" if seen["expires"] else "has no end"
        bound = f"from {', '.join(seen['bound_cidrs'])} alone" if seen["bound_cidrs"] else "from any address"
        yield f"  its secret id of {seen['issued']} {until} and works {bound}"


@secrets.command()
@name_argument
@click.option("--if-due", is_flag=True, help="Leave alone a version that was refused; what the timer calls.")
@click.option("--database-password", is_flag=True, help="Make a new one, for a database on this host.")
@no_wait_option
@dry_run_option
@json_option
def rotate(name: str, if_due: bool, database_password: bool, no_wait: bool, dry_run: bool, as_json: bool) -> None:
    """Put the newest version of the secrets of app NAME into service: the live release in a fresh slot.

    It passes the same gate as a release and is watched the same way; one that fails leaves the old version serving.
    Renews the host's own secret ids that expire soon, too, where the app has a rotate identity. With --if-due, what
    goes wrong is one line for the journal with priority err, which begins with ALERT NAME.
    """
    if if_due and database_password:
        raise click.UsageError("--if-due looks for what others wrote; call --database-password without it")
    layout, app = _app(name)
    from forgectl import rotation

    with _alerting(name, if_due):
        if if_due and not rotation.is_due(layout, app, _say):
            if as_json:
                _print_json({"app": name, "action": "rotation", "changed": False})
            return
        with _turn(layout, app, "secrets rotate", unless=dry_run, waits_for=() if if_due else ROUTINES):
            result = rotation.rotate(
                layout, app, if_due=if_due, database_password=database_password, dry_run=dry_run, say=_say
            )
        _conclude(layout, app, result, dry_run=dry_run, wait=not no_wait and result.changed, as_json=as_json)
    if result.problem:
        _alert(name, result.problem) if if_due else _say(f"forgectl: {result.problem}")
        sys.exit(SECRETS)


@secrets.command("set")
@name_argument
@click.argument("key")
@identity_option
@click.option("--generate", is_flag=True, help="Make a random value of 48 characters that nobody sees; reads nothing.")
@dry_run_option
@json_option
def set_(name: str, key: str, identity: str, generate: bool, dry_run: bool, as_json: bool) -> None:
    """Seal a new value of KEY for app NAME on this host, where its secrets come without Vault.

    The value comes on standard input, in UTF-8, exactly as it is but for one newline at its end, which echo and editors
    add: a value that ends in a newline is given two. At a terminal it is asked for, twice, and not shown. Each change
    is a new version of the app's secrets, which the next release or `forgectl secrets rotate NAME` puts into service.
    """
    _change(name, key, identity, None if generate else lambda: _value(key), dry_run, as_json)


@secrets.command()
@name_argument
@click.argument("key")
@identity_option
@dry_run_option
@json_option
def unset(name: str, key: str, identity: str, dry_run: bool, as_json: bool) -> None:
    """Remove KEY from the sealed values of app NAME, as a new version."""
    _change(name, key, identity, lambda: None, dry_run, as_json)


def _change(
    name: str, key: str, identity: str, value: Callable[[], str | None] | None, dry_run: bool, as_json: bool
) -> None:
    """Seal what `value` returns, None for nothing; without it a value that is made here."""
    from forgectl import identity as identities
    from forgectl import rotation, sealed

    layout, app = _app(name)
    where = app.migration.path if app.migration and identity == "migrate" else app.secrets.path
    instead = f"use `bao kv patch -mount={app.secrets.kv_mount} {where} {key}=-`"
    identities.need_source(app, "systemd_creds", instead)
    needed = identities.needed(app, identity)
    if not key.isprintable() or not key:
        raise click.UsageError("KEY has to be printable text")
    given = {key: value()} if value else {}
    with _locked(layout, f"secrets {'unset' if given.get(key, '') is None else 'set'} {key}", unless=dry_run):
        changes = given or rotation.generated(layout, app, identity, key)
        version, changed = sealed.change(layout, identity, changes, dry_run=dry_run)
    new = changes[key]
    users = [variable for variable, wanted in needed.items() if wanted == key]
    if new is None and users:
        _say(f"{', '.join(users)} of {name} needs {key}: releases are refused until it is set again")
    elif new is not None and not users:
        _say(f"nothing of {name} refers to {key} yet; check the spelling, or map a variable to it in the inventory")
    if as_json:
        _print_json({"app": name, "identity": identity, "key": key, "version": version, "changed": changed})
    elif changed:
        verb = f"{'would be' if dry_run else 'is'} {'sealed' if new is not None else 'removed'}"
        click.echo(f"{name} ({identity}): {key} {verb}: version {version}")
    else:
        click.echo(f"{name} ({identity}): nothing to do; version {version}")


def _value(key: str) -> str:
    if sys.stdin.isatty():
        return str(click.prompt(key, hide_input=True, confirmation_prompt=True, err=True))
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        # The error itself would quote the bytes.
        raise Refused("expected UTF-8 on standard input; found other bytes; encode the value, as base64 does") from None


@forgectl.command("inspect")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--name", default="", help="Name of the entry; without it that of the project.")
@click.option(
    "--module", default="", help="The callable, as package.module:name, where it is not the one that is found."
)
@click.option("--python-path", default="", metavar="FOLDER", help="Folder inside PATH that goes onto sys.path.")
@click.option("--entry", "entry_only", is_flag=True, help="Print the entry of `apps` alone.")
@harmless_option
@json_option
def inspect_(path: Path, name: str, module: str, python_path: str, entry_only: bool, as_json: bool) -> None:
    """Say whether the app in PATH will run, what has to be done first, and the entry of `apps` to start from.

    PATH is a folder, a wheel or an sdist. It is read and never run, so it needs neither root nor a host. Ends with 0
    when the app will run once the entry is filled in, and with 1 when something has to be done first.
    """
    from forge.inspection import draft, judge, text
    from forge.source_files import SourceError

    try:
        report = draft.draft(judge.inspect(path, name=name, module=module, python_path=python_path))
    except SourceError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        _print_json(report.document())
    else:
        click.echo(report.entry_text if entry_only else text.render(report), nl=False)
    sys.exit(0 if report.will_run else UNEXPECTED)


@forgectl.group()
def database() -> None:
    """The local PostgreSQL."""


@database.command()
@name_argument
@dry_run_option
@json_option
def verifiers(name: str, dry_run: bool, as_json: bool) -> None:
    """Make the local PostgreSQL accept the passwords among the secrets of app NAME for its roles."""
    from forgectl import database as databases
    from forgectl import identity as identities
    from forgectl import rotation

    layout, app = _app(name)
    if app.database is None or app.database.placement != "local":
        raise Refused(f"expected {name} to have a database on this host; found none; its server is elsewhere")
    with _locked(layout, "database verifiers", unless=dry_run):
        found = rotation.serving(layout, app)
        migrate = identities.fetch(layout, app, "migrate") if app.migration else None
        roles = databases.set_verifiers(databases.passwords(app.database, found, migrate), dry_run=dry_run)
    changed = any(result != "unchanged" for result in roles.values())
    if as_json:
        _print_json({"app": name, "changed": changed, "roles": roles})
    else:
        click.echo("\n".join(f"{role}: {result}" for role, result in roles.items()))


@forgectl.group("alerts")
def alerts_() -> None:
    """Whether the alert lines of the journal reach somebody."""


@alerts_.command("status")
@harmless_option
@json_option
def alerts_status(as_json: bool) -> None:
    """Show where alerts go, and whether they arrive there."""
    _need_root()
    from forgectl import alerts

    found = alerts.status()
    _print_json(found) if as_json else click.echo("\n".join(alerts.text(found)))


@alerts_.command("test")
@click.option("--wait", "patience", default=60.0, show_default=True, metavar="SECONDS", help="How long it may take.")
@json_option
def alerts_test(patience: float, as_json: bool) -> None:
    """Send a test line the way of every alert, and say where it has arrived; ends with 1 where it has not."""
    _need_root()
    from forgectl import alerts

    found = alerts.test(patience)
    missing = [name for name, channel in found["channels"].items() if not channel["arrived"]]
    if as_json:
        _print_json(found)
    else:
        for name, channel in found["channels"].items():
            why = f": {channel['failing']['error']}" if channel["failing"] else "; see journalctl -u forge-alerts"
            said = f"delivered after {channel['seconds']} s" if channel["arrived"] else f"NOT DELIVERED{why}"
            click.echo(f"{name}: {said}")
    if missing:
        sys.exit(UNEXPECTED)


@forgectl.command("support-bundle")
@click.option("-o", "--output", metavar="FILE", help="Where to; - for standard output. By default here, by its name.")
@click.option("--since", default="-24h", show_default=True, metavar="TIME", help="How far logs go back: journalctl(1).")
@json_option
def support_bundle(output: str | None, since: str, as_json: bool) -> None:
    """Write one file with what somebody else needs to help: state, logs, configuration; without secrets.

    What is in it, and what was left out or scrubbed, is in its manifest. The file is for its owner alone.
    """
    _need_root()
    from forgectl import support

    to_stdout = output == "-"
    if to_stdout and (as_json or sys.stdout.isatty()):
        raise click.UsageError("--output - writes an archive: lead it into a file, without --json")
    if output and not to_stdout and not Path(output).absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder {Path(output).absolute().parent}")
    data, manifest = support.bundle(since=since)
    if to_stdout:
        sys.stdout.buffer.write(data)
        return
    path = Path(output or f"{manifest['name']}.tar.gz").absolute()
    support.write(path, data)
    if as_json:
        _print_json({"file": str(path), "bytes": len(data), "manifest": manifest})
    else:
        left = [part["name"] for part in manifest["parts"] if "left_out" in part]
        click.echo(f"{path}: {len(manifest['parts']) - len(left)} parts, {len(data) // 1024} KiB")
        click.echo(f"taken out: {sum(manifest['scrubbed']['taken_out'].values())} secrets, by their value or shape")
        if left:
            click.echo(f"not to be had: {', '.join(left)}")
        click.echo(manifest["note"])


@contextmanager
def _archive(name: str | None) -> Iterator[Path | None]:
    """The file of an archive; what comes through standard input is kept in memory."""
    if name != "-":
        yield Path(name) if name else None
        return
    import base64
    import tempfile

    with tempfile.NamedTemporaryFile(dir="/run", prefix="forge-archive-") as file:
        try:
            file.write(base64.b64decode(sys.stdin.buffer.read()))
        except ValueError as error:
            raise Refused(f"expected an archive in base64 on standard input; found: {error}") from error
        file.flush()
        yield Path(file.name)


def _need_source(archive: str | None, source_digest: str | None) -> None:
    if archive is None and source_digest is None:
        raise click.UsageError("name the source: --archive FILE or --source-digest SHA256")


def _conclude(layout: Any, app: Any, result: Any, *, dry_run: bool, wait: bool, as_json: bool) -> None:
    """Wait for the verdict if there is one to come, and say how it went."""
    from forgectl import release as releases

    if wait and not dry_run and result.began and result.verdict == "watching":
        result = releases.concluded(layout, result, _say)
    what = f"version {result.secrets} of the secrets" if result.action == "rotation" else result.release
    if as_json:
        _print_json(result)
    elif dry_run and result.changed:
        click.echo("\n".join(result.plan))
    elif not result.changed:
        click.echo(f"{app.name}: {what} is {result.verdict} already; nothing to do")
    else:
        click.echo("\n".join([f"{app.name}: {what} is {result.verdict} in slot {result.slot}", *result.report]))


def _alert(name: str, text: str) -> None:
    """One line that the journal takes for an error: sd-daemon(3)."""
    _say(f"<3>ALERT {name}: {' '.join(text.split())}")


@contextmanager
def _alerting(name: str, on: bool) -> Iterator[None]:
    """Turn a failure into an alert; that another command is at work is none."""
    try:
        yield
    except Locked:
        raise
    except ForgeError as error:
        if not on:
            raise
        text = error.summary if isinstance(error, CandidateFailed) else str(error)
        _alert(name, text)
        if "--json" in sys.argv:
            _print_json({"changed": False, "error": text, "exit_code": error.exit_code})
        sys.exit(error.exit_code)


@contextmanager
def _locked(layout: Any, reason: str, unless: bool = False, **options: float) -> Iterator[None]:
    from forgectl import lock

    if unless:
        yield
    else:
        with lock.hold(layout, reason, **options):
            yield


@contextmanager
def _turn(
    layout: Any,
    app: Any,
    reason: str,
    unless: bool,
    waits_for: Collection[str] = ROUTINES,
    even_removed: bool = False,
) -> Iterator[None]:
    """The lock, after the verdict on what a timer began; as a rule only of an app that is in service."""
    from forgectl import cutover, removal

    with nullcontext() if unless else cutover.turn(layout, app, reason, _say, waits_for):
        if not even_removed:
            removal.refuse(layout)
        yield


def _app(name: str) -> tuple[Any, Any]:
    layout = _layout(name)
    from forgectl import config

    return layout, config.load(layout.description)


def _need_root() -> None:
    if os.geteuid() != 0:
        raise Refused("expected to be called by root; found another user; use sudo")


def _layout(name: str) -> Any:
    _need_root()
    import re

    from forgectl.layout import Layout

    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
        raise click.UsageError(f"{name!r} is no name of an app")
    return Layout(name)


def _failed(message: str, code: int) -> int:
    _say(f"forgectl: {message}")
    if "--json" in sys.argv:
        _print_json({"changed": False, "error": message, "exit_code": code})
    return code


def _say(text: str) -> None:
    try:
        click.echo(text, err=True)
    except OSError:
        # A terminal that is gone ends no release, and is written to no more, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.encode(value))
