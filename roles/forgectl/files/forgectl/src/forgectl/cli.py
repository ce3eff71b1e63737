"""The command line. Every command imports what it needs itself, so that --help is quick."""

import os
import resource
import signal
import sys
from collections.abc import Iterator
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
  4  the new release failed; the old one serves
  5  another command holds the app's lock
  6  Vault or a secret is not usable
  130  interrupted
"""

# After a boot, another command may be at work already; a release takes this long at most, as a rule.
BOOT_PATIENCE_SECONDS = 120.0

name_argument = click.argument("name")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")


class _Signalled(KeyboardInterrupt):
    """A signal that ends the command the way Ctrl-C does."""


def main() -> NoReturn:
    """Run the command line, and turn failures into one message and an exit code."""

    def interrupt(number: int, _frame: object) -> None:
        raise _Signalled(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    # Secrets pass through this process; a crash must not write them to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        code = forgectl.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = _failed("interrupted; what served still serves, and the next command ends what was begun", INTERRUPTED)
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
@click.option("--archive", type=click.Path(path_type=Path, dir_okay=False), help="Tar archive of the source.")
@click.option(
    "--source-digest", metavar="SHA256", help="Digest of the archive; enough for a source that is known here."
)
@dry_run_option
@json_option
def release(name: str, archive: Path | None, source_digest: str | None, dry_run: bool, as_json: bool) -> None:
    """Put a source into service with the present settings of app NAME.

    Starts it in the idle slot beside the old release, waits until it is ready, moves traffic by one atomic rename,
    drains the old release and stops it. What is live already is left alone.
    """
    if archive is None and source_digest is None:
        raise click.UsageError("name the source: --archive FILE or --source-digest SHA256")
    layout, app = _app(name)
    from forgectl import release as releases

    with _locked(layout, "release", unless=dry_run):
        result = releases.release(layout, app, archive=archive, source_digest=source_digest, dry_run=dry_run, say=_say)
    if as_json:
        _print_json(result)
    elif not result.changed:
        click.echo(f"{name}: {result.release} is live already; nothing to do")
    elif dry_run:
        click.echo("\n".join(f"would {line}" if not line.startswith("the ") else line for line in result.plan))
    else:
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in result.phases.items())
        click.echo(f"{name}: {result.release} is live in slot {result.slot}; {phases}")


@forgectl.command()
@name_argument
def boot(name: str) -> None:
    """Bring the live release of app NAME back after a boot; harmless at any other time."""
    layout, app = _app(name)
    from forgectl import release as releases

    with _locked(layout, "boot", patience=BOOT_PATIENCE_SECONDS):
        restored = releases.boot(layout, app, _say)
    click.echo(f"{name}: {restored} restored" if restored else f"{name}: nothing was released yet")


@forgectl.command()
@click.argument("name", required=False)
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
def logs(name: str, lines: int, follow: bool) -> None:
    """Show the log of app NAME: both slots and its migrations."""
    layout, _ = _app(name)
    units = [f"--unit={pattern}" for pattern in (f"{layout.name}@*.service", f"{layout.name}-migrate@*.service")]
    command = ["journalctl", *units, f"--lines={lines}", "--output=cat"]
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
