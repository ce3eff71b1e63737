"""forge-launch: what a unit's ExecStart runs. It reads the secrets and becomes the app, its migration or a command.

    forge-launch app NAME SLOT
    forge-launch migrate NAME RELEASE
    forge-launch command NAME SLOT COMMAND
    forge-launch ended NAME COMMAND

The last one is a command's ExecStopPost=, and says so when that did not end well.

The process that it becomes gets a clean environment: what systemd hands over, the release's settings, the secrets.
"""

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from forgectl import config
from forgectl.config import App, Database
from forgectl.errors import ForgeError, SecretsError
from forgectl.values import Fetched

# EX_CONFIG of sysexits.h
FAILED = 78
# systemd's RestartSec= is fixed; hosts that lost the same Vault must not come back to it at the same moment.
JITTER_SECONDS = 2.0
# Of the pauses between two attempts within one start.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 8.0
# The socket activation, readiness and watchdog protocols of systemd: sd_listen_fds(3), sd_notify(3).
PASSED_ON = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


def main(arguments: list[str] | None = None, root: Path = Path("/")) -> None:
    """Become the app, its migration or a command. Does not return; exits with 78 after a line that says why not."""
    arguments = sys.argv[1:] if arguments is None else arguments
    match arguments:
        case ["app" | "migrate" as mode, name, which]:
            command = ""
        case ["command" as mode, name, which, command]:
            pass
        case ["ended", name, command]:
            _tell(name, command)
            return
        case _:
            print("usage: " + " | ".join(line.strip() for line in (__doc__ or "").splitlines()[2:6]), file=sys.stderr)
            sys.exit(2)
    # This process becomes another before there is anything worth collecting; it saves a tenth of what imports take.
    gc.disable()
    try:
        _launch(mode, name, which, command, root)
    except ForgeError as error:
        print(f"forge-launch: {name}: {error}", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"forge-launch: {name}: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
    if mode != "migrate":
        time.sleep(_random() * JITTER_SECONDS)
    sys.exit(FAILED)


def _tell(name: str, command: str) -> None:
    """Say that a command did not end well, of which systemd.exec(5) hands over how: a line that is an error."""
    if (result := os.environ.get("SERVICE_RESULT", "success")) == "success":
        return
    how = " ".join(filter(None, (os.environ.get("EXIT_CODE"), os.environ.get("EXIT_STATUS"))))
    print(
        f"<3>ALERT {name}: the command {command} failed ({result}, {how}); see what it said: "
        f"sudo forgectl logs {name} --command {command}",
        file=sys.stderr,
    )


def _launch(mode: str, name: str, which: str, command: str, root: Path) -> None:
    home = root / "srv" / name
    # The real folder: the slot may point elsewhere before this process ends.
    release = Path(os.path.realpath(home / ("releases" if mode == "migrate" else "slots") / which))
    app = config.load(release / "settings.toml")
    source = release / "source"
    python = str(release / "venv" / "bin" / "python")
    environment = {
        "PATH": f"{release}/venv/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(root / "var/lib" / name),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.path.normpath(source / app.python_path),
        **{key: os.environ[key] for key in PASSED_ON if key in os.environ},
        **app.settings,
    }
    if mode != "migrate":
        path, variables, version = app.secrets.path, app.variables, _pinned(home / "slots" / f"{which}.secrets")
        program = (
            _program(app, release, command)
            if command
            else [*(python, "-m", "gunicorn", "-c", f"{release}/gunicorn.conf.py", app.module)]
        )
    else:
        if app.migration is None:
            raise ForgeError(f"expected a [migration] in {release}/settings.toml; found none; there is nothing to do")
        path, variables, version = app.migration.path, app.migration.variables, 0
        program = [python, "-m", *app.migration.command]
        environment.update(app.migration.settings)
    if mode == "app":
        environment["PROMETHEUS_MULTIPROC_DIR"] = metrics = f"/tmp/prometheus-{os.getpid()}-{time.time_ns()}"
        os.mkdir(metrics, 0o700)  # noqa: PTH102
    # Without patience there is one attempt, whose requests have the time that they always have.
    deadline = time.monotonic() + app.secrets.retry_seconds if app.secrets.retry_seconds else None
    values = _values(app, "migrate" if mode == "migrate" else "app", path, variables, version, deadline)
    if mode != "migrate" and app.database and app.leases:
        values |= _leased(app, app.database, which, root, deadline)
        variables = app.secrets.variables
    environment.update({variable: values[key] for variable, key in variables.items()})
    if app.database:
        if mode != "migrate":
            _name_the_user(app.database, environment, Fetched(values, version))
        key = app.database.migrate_key if mode == "migrate" else app.database.app_key
        _form_the_url(app.database, environment, values, key)
    os.chdir(source)
    os.execve(program[0], program, environment)


def _program(app: App, release: Path, name: str) -> list[str]:
    """What a command runs: a program of the release's environment, or a module."""
    if name not in app.commands:
        raise ForgeError(f"expected [commands.{name}] in {release}/settings.toml; found none; run site.yml")
    first, *rest = app.commands[name].command
    found = f"{release}/venv/bin/{first}"
    # A name with a folder in it is a file of nobody's.
    if "/" not in first and os.path.isfile(found):  # noqa: PTH113
        return [found, *rest]
    return [f"{release}/venv/bin/python", "-m", first, *rest]


def _values(
    app: App, identity: str, path: str, variables: dict[str, str], version: int, deadline: float | None
) -> dict[str, str]:
    """Key: value, of the identity that this unit has; only the client of the source in use is imported."""
    if app.secrets.source == "none":
        return {}
    if app.secrets.source == "systemd_creds":
        from forgectl import sealed

        return sealed.handed_over(credential("values"), app.name, identity, variables).values
    from forgectl import vault

    role_id, secret_id = credential("role-id"), credential("secret-id")

    def fetch() -> dict[str, str]:
        return vault.fetch(app.secrets, role_id, secret_id, path, variables, version, deadline).values

    return _patiently(fetch, deadline, app.name)


def _leased(app: App, database: Database, slot: str, root: Path, deadline: float | None) -> dict[str, str]:
    """What the app's secrets would hold without a lease: the user and its password, from the unit beside the slot."""
    from forgectl import lease
    from forgectl.database import USER_KEY
    from forgectl.layout import Layout

    def ask() -> dict[str, str]:
        user, password = lease.ask(Layout(app.name, root), slot)
        return {USER_KEY: user, database.app_key: password}

    return _patiently(ask, deadline, app.name)


def _name_the_user(database: Database, environment: dict[str, str], found: Fetched) -> None:
    """Put the role that the secrets name, beside its password, into the database's URL."""
    from forgectl import database as databases

    if databases.USER_KEY in found.values and database.url_variable in environment:
        url = environment[database.url_variable]
        environment[database.url_variable] = databases.with_user(url, databases.user(database, found))


def _form_the_url(database: Database, environment: dict[str, str], values: dict[str, str], key: str) -> None:
    """Write the database's URL as the app wants it, with the password that it may want there."""
    if not database.url_format or database.url_variable not in environment:
        return
    import re
    from urllib.parse import quote, urlsplit

    parts = urlsplit(environment[database.url_variable])
    user, _, host = parts.netloc.rpartition("@")
    fields = {"user": user, "host": host, "name": parts.path.removeprefix("/")}
    if database.wants_password:
        password = values.get(key)
        # What was released before anybody asked for it.
        if not isinstance(password, str) or not password:
            raise SecretsError("incomplete", f"expected a password under the key {key}; found none; write it there")
        # The other values are in a URL already; this one may hold anything.
        fields["password"] = quote(password, safe="")
    form = re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], database.url_format)
    environment[database.url_variable] = form


def _patiently(fetch: Callable[[], dict[str, str]], deadline: float | None, name: str) -> dict[str, str]:
    """What `fetch` returns, asked again until `deadline` of the monotonic clock while Vault is unreachable or sealed.

    Between two attempts is a random part of a pause that doubles ("full jitter"), so that the hosts that lost the same
    Vault do not come back to it in step: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.

    Raises:
        SecretsError: that of the last attempt, or one that no patience mends.
    """
    longest = FIRST_PAUSE_SECONDS
    while True:
        try:
            return fetch()
        except SecretsError as error:
            left = deadline - time.monotonic() if deadline else 0
            if error.state not in ("unreachable", "sealed") or left <= 0:
                raise
            pause = min(longest * _random(), left)
            print(f"forge-launch: {name}: {error}; next attempt in {pause:.1f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        longest = min(2 * longest, LONGEST_PAUSE_SECONDS)


def _random() -> float:
    """A number from 0 up to 1; the random module costs a start-up more than it gives."""
    return int.from_bytes(os.urandom(2), "big") / 65536


def _pinned(path: Path) -> int:
    """The version of the secrets that this slot was given, 0 for the newest."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


def credential(name: str) -> str:
    """One of the credentials that systemd has opened for this unit.

    Raises:
        SecretsError: there is none of that name.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise SecretsError("missing", "expected credentials from systemd; found none; start this through its unit")
    try:
        return (Path(folder) / name).read_text().strip()
    except OSError:
        raise SecretsError(
            "missing", f"expected the sealed credential {name}; found none; run site.yml to deliver it"
        ) from None


if __name__ == "__main__":
    main()
