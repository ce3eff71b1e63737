"""The command line. Every command imports what it needs itself, so that --help is quick."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from forgectl.errors import FULL, INTERRUPTED, SECRETS, UNEXPECTED, ForgeError, Refused, explain

EPILOG = """\b
Exit codes:
  0  done, or nothing to do
  1  unexpected failure
  2  wrong usage
  3  refused; nothing was changed
  4  the new release failed before it took traffic; the old one serves, or
     after a breaking migration the maintenance page
  5  another command holds the app's lock, or a new release is being watched
  6  Vault or a secret is not usable
  7  the new release turned unready after the cutover; the old one serves again
  130  interrupted
"""

# After a boot, another command may be at work already; a release takes this long at most, as a rule.
BOOT_PATIENCE_SECONDS = 120.0

name_argument = click.argument("name")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
harmless_option = click.option("--dry-run", is_flag=True, expose_value=False, help="As without: it changes nothing.")
no_wait_option = click.option("--no-wait", is_flag=True, help="Do not wait for the verdict; `forgectl history` has it.")
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
    # Secrets pass through this process; a crash must not write them to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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

    with _archive(archive) as path, _locked(layout, "release", unless=dry_run):
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

    with _locked(layout, "rollback", unless=dry_run):
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

    with _locked(layout, "recycle", unless=dry_run):
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
@dry_run_option
@json_option
def recover(name: str, dry_run: bool, as_json: bool) -> None:
    """Repair what an interrupted command left behind for app NAME; each command that changes something does so."""
    layout, app = _app(name)
    from forgectl import cutover, state

    with _locked(layout, "recover", unless=dry_run):
        before = state.load(layout).operation
        if not dry_run:
            cutover.recover(layout, app, _say)
        after = state.load(layout).operation
    found = f"{before.phase} {before.release}" if before else None
    if as_json:
        _print_json({"app": name, "changed": before != after, "operation": found})
    else:
        click.echo(f"{name}: {found} was under way" if found else f"{name}: nothing to repair")


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
@click.option("-n", "--lines", default=20, show_default=True, help="How many cutovers, newest last.")
@harmless_option
@json_option
def history(name: str, lines: int, as_json: bool) -> None:
    """Show the cutovers of app NAME: what, when, by whom, how it ended, and why."""
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
        restored = present.live.release if present.live and not present.maintenance else None
    else:
        with _locked(layout, "boot", patience=BOOT_PATIENCE_SECONDS):
            restored = cutover.boot(layout, app, _say)
        present = state.load(layout)
    why = f"the maintenance page ({present.maintenance})" if present.maintenance else "nothing was released yet"
    if as_json:
        _print_json({"app": name, "release": restored, "maintenance": present.maintenance or None})
    else:
        click.echo(f"{name}: {restored} restored" if restored else f"{name}: {why}")


@forgectl.command()
@click.argument("name", required=False)
@harmless_option
@json_option
def status(name: str | None, as_json: bool) -> None:
    """Show what is live, whether it is ready, and how it got there; of one app or all."""
    from forgectl import status as statuses
    from forgectl.layout import names

    found = [statuses.of(*_app(each)) for each in ([name] if name else names())]
    if as_json:
        _print_json(found[0] if name else {"apps": {each["app"]: each for each in found}})
    else:
        click.echo("\n".join(map(statuses.text, found)) or "no app is described in /etc/forge/apps")


@forgectl.command()
@name_argument
@click.option("-n", "--lines", default=50, show_default=True, help="How many lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on as new lines come.")
@harmless_option
@json_option
def logs(name: str, lines: int, follow: bool, as_json: bool) -> None:
    """Show the log of app NAME: both slots and its migrations. With --json, journald's own objects, one a line."""
    layout, _ = _app(name)
    units = [f"--unit={pattern}" for pattern in (f"{layout.name}@*.service", f"{layout.name}-migrate@*.service")]
    command = ["journalctl", *units, f"--lines={lines}", f"--output={'json' if as_json else 'cat'}"]
    os.execvp("journalctl", [*command, "--follow"] if follow else [*command, "--no-pager"])


@forgectl.group()
def secrets() -> None:
    """The host's identities towards Vault."""


@secrets.command()
@name_argument
@click.option("--identity", type=click.Choice(["app", "migrate"]), required=True, help="Whose identity.")
@click.option("--role-id", required=True, help="Role id of its AppRole.")
@json_option
def enrol(name: str, identity: str, role_id: str, as_json: bool) -> None:
    """Unwrap a secret id for app NAME and seal it on this host; the response-wrapping token comes on standard input."""
    from forgectl import identity as identities

    layout, app = _app(name)
    token = sys.stdin.read().strip()
    if not token:
        raise Refused("expected a response-wrapping token on standard input; found nothing; pipe it in")
    with _locked(layout, f"secrets enrol --identity {identity}"):
        identities.enrol(layout, app, identity, role_id, token)
    if as_json:
        _print_json({"app": name, "identity": identity, "changed": True})
    else:
        click.echo(f"{name}: the {identity} identity works and is sealed")


@secrets.command()
@name_argument
@json_option
def check(name: str, as_json: bool) -> None:
    """Log in with each identity of app NAME and check every secret it refers to; prints no value."""
    from forgectl import identity as identities

    found = identities.check(*_app(name))
    if as_json:
        _print_json(found)
    else:
        for each, seen in found["identities"].items():
            click.echo(f"{name} ({each}): {seen['state']}")
    for problem in found["problems"]:
        click.echo(f"forgectl: {problem}", err=True)
    if found["problems"]:
        sys.exit(SECRETS)


@forgectl.group()
def database() -> None:
    """The local PostgreSQL."""


@database.command()
@name_argument
@dry_run_option
@json_option
def verifiers(name: str, dry_run: bool, as_json: bool) -> None:
    """Make the local PostgreSQL accept the passwords that Vault holds for the roles of app NAME."""
    from forgectl import database as databases
    from forgectl import identity as identities

    layout, app = _app(name)
    if app.database is None or app.database.placement != "local":
        raise Refused(f"expected {name} to have a database on this host; found none; its server is elsewhere")
    with _locked(layout, "database verifiers", unless=dry_run):
        values = {each: identities.fetch(layout, app, each) for each in identities.identities(app)}
        roles = databases.set_verifiers(
            databases.passwords(app.database, values["app"], values.get("migrate")), dry_run=dry_run
        )
    changed = any(result != "unchanged" for result in roles.values())
    if as_json:
        _print_json({"app": name, "changed": changed, "roles": roles})
    else:
        click.echo("\n".join(f"{role}: {result}" for role, result in roles.items()))


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
    if as_json:
        _print_json(result)
    elif dry_run and result.changed:
        click.echo("\n".join(result.plan))
    elif not result.changed:
        click.echo(f"{app.name}: {result.release} is {result.verdict} already; nothing to do")
    else:
        head = f"{app.name}: {result.release} is {result.verdict} in slot {result.slot}"
        click.echo("\n".join([head, *result.report]))


@contextmanager
def _locked(layout: Any, reason: str, unless: bool = False, **options: float) -> Iterator[None]:
    from forgectl import lock

    if unless:
        yield
    else:
        with lock.hold(layout, reason, **options):
            yield


def _app(name: str) -> tuple[Any, Any]:
    if os.geteuid() != 0:
        raise Refused("expected to be called by root; found another user; use sudo")
    import re

    from forgectl import config
    from forgectl.layout import Layout

    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
        raise click.UsageError(f"{name!r} is no name of an app")
    layout = Layout(name)
    return layout, config.load(layout.description)


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
