"""forge-launch: what a unit's ExecStart runs. It reads the secrets and becomes the app, or the migration.

    forge-launch app NAME SLOT
    forge-launch migrate NAME RELEASE

The process that it becomes gets a clean environment: what systemd hands over, the release's settings, the secrets.
"""

import os
import sys
import time
from pathlib import Path

from forgectl import config, vault
from forgectl.errors import ForgeError, SecretsError

# EX_CONFIG of sysexits.h
FAILED = 78
# systemd's RestartSec= is fixed; hosts that lost the same Vault must not come back to it at the same moment.
JITTER_SECONDS = 2.0
# The socket activation, readiness and watchdog protocols of systemd: sd_listen_fds(3), sd_notify(3).
PASSED_ON = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


def main(arguments: list[str] | None = None, root: Path = Path("/")) -> None:
    """Become the app or its migration. Does not return; exits with 78 after one line when it cannot."""
    arguments = sys.argv[1:] if arguments is None else arguments
    match arguments:
        case ["app" | "migrate" as mode, name, which]:
            pass
        case _:
            print("usage: forge-launch app NAME SLOT | forge-launch migrate NAME RELEASE", file=sys.stderr)
            sys.exit(2)
    try:
        _launch(mode, name, which, root)
    except ForgeError as error:
        print(f"forge-launch: {name}: {error}", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"forge-launch: {name}: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
    if mode == "app":
        # 0 to 2 s from two random bytes; the random module costs a start-up more than it gives.
        time.sleep(int.from_bytes(os.urandom(2), "big") / 65536 * JITTER_SECONDS)
    sys.exit(FAILED)


def _launch(mode: str, name: str, which: str, root: Path) -> None:
    home = root / "srv" / name
    # The real folder: the slot may point elsewhere before this process ends.
    release = Path(os.path.realpath(home / ("slots" if mode == "app" else "releases") / which))
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
    if mode == "app":
        path, variables = app.secrets.path, app.secrets.variables
        command = [python, "-m", "gunicorn", "-c", f"{release}/gunicorn.conf.py", app.module]
        environment["PROMETHEUS_MULTIPROC_DIR"] = metrics = f"/tmp/prometheus-{os.getpid()}-{time.time_ns()}"
        os.mkdir(metrics, 0o700)  # noqa: PTH102
    else:
        if app.migration is None:
            raise ForgeError(f"expected a [migration] in {release}/settings.toml; found none; there is nothing to do")
        path, variables = app.migration.path, app.migration.variables
        command = [python, "-m", *app.migration.command]
        environment.update(app.migration.settings)
    values = vault.fetch(app.secrets, _credential("role-id"), _credential("secret-id"), path, variables)
    environment.update({variable: values[key] for variable, key in variables.items()})
    os.chdir(source)
    os.execve(python, command, environment)


def _credential(name: str) -> str:
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
