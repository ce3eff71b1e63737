"""launch.py: the process that it becomes, and the line it leaves when it can't."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HARD_VALUES, SOURCE, Bao, describe
from forgectl.layout import Layout

# Stands where Gunicorn would: it tells what it was given.
TELL = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ), os.getcwd(), os.getpid(), sys.path]))"
VARIABLES = "".join(f'V_{key.upper()} = "{key}"\n' for key in HARD_VALUES)
LAUNCH = "import sys; from pathlib import Path; from forgectl.launch import main; main(sys.argv[2:], Path(sys.argv[1]))"


@pytest.fixture
def host(layout: Layout, bao: Bao, tmp_path: Path) -> Layout:
    """A release in slot blue, and credentials that Vault accepts."""
    bao.put("forge/inbox/app", HARD_VALUES)
    write(layout, describe(bao.address, str(bao.ca_file), VARIABLES))
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "role-id").write_text(bao.role_id)
    (credentials / "secret-id").write_text(bao.secret_id())
    return layout


def write(layout: Layout, settings: str) -> None:
    release = layout.releases / "R1"
    (release / "source/src/gunicorn").mkdir(parents=True, exist_ok=True)
    (release / "source/src/gunicorn/__main__.py").write_text(TELL)
    (release / "source/src/gunicorn/__init__.py").touch()
    (release / "venv/bin").mkdir(parents=True, exist_ok=True)
    (release / "venv/bin/python").unlink(missing_ok=True)
    (release / "venv/bin/python").symlink_to(sys.executable)
    (release / "settings.toml").write_text(settings)
    (layout.slots / "blue").unlink(missing_ok=True)
    (layout.slots / "blue").symlink_to("../releases/R1")


def launch(
    layout: Layout, mode: str = "app", which: str = "blue", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(layout.root), mode, "inbox", which],
        env={
            "PYTHONPATH": str(SOURCE),
            "PATH": os.environ["PATH"],
            "CREDENTIALS_DIRECTORY": str(layout.root / "credentials"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_app_gets_a_clean_environment(host: Layout) -> None:
    done = launch(
        host, LISTEN_FDS="1", LISTEN_PID="1", LISTEN_FDNAMES="x", NOTIFY_SOCKET="/n", WATCHDOG_USEC="5", LEFTOVER="no"
    )
    assert (done.returncode, done.stderr) == (0, "")
    arguments, environment, folder, _, path = json.loads(done.stdout)
    release = os.path.realpath(host.releases / "R1")
    assert arguments[1:] == ["-c", f"{release}/gunicorn.conf.py", "inbox.main:app"]
    assert folder == f"{release}/source"
    assert f"{release}/source/src" in path
    for key, value in HARD_VALUES.items():
        assert environment.pop(f"V_{key.upper()}") == value
    metrics = Path(environment.pop("PROMETHEUS_MULTIPROC_DIR"))
    assert metrics.stat().st_mode & 0o777 == 0o700
    metrics.rmdir()
    environment.pop("LC_CTYPE", None)
    assert environment == {
        "PATH": f"{release}/venv/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(host.app_state),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{release}/source/src",
        "FORGE_ENVIRONMENT": "production",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "x",
        "NOTIFY_SOCKET": "/n",
        "WATCHDOG_USEC": "5",
    }


def test_the_process_stays_the_same(host: Layout) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(host.root), "app", "inbox", "blue"],
        env={"PYTHONPATH": str(SOURCE), "CREDENTIALS_DIRECTORY": str(host.root / "credentials")},
        stdout=subprocess.PIPE,
    )
    out, _ = process.communicate()
    _, environment, _, pid, _ = json.loads(out)
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).rmdir()
    assert pid == process.pid  # systemd's LISTEN_PID and main process depend on it


def test_it_is_quick(host: Layout) -> None:
    """In processor time, of which a busy machine adds little; mostly it is Python and its imports."""
    seconds = []
    for _ in range(3):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        Path(json.loads(launch(host).stdout)[1]["PROMETHEUS_MULTIPROC_DIR"]).rmdir()
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
    assert min(seconds) < 0.8, seconds


def test_a_migration_has_settings_and_secrets_of_its_own(host: Layout, bao: Bao) -> None:
    bao.put("forge/inbox/migrate", {"password": "p"})
    write(
        host,
        describe(bao.address, str(bao.ca_file), VARIABLES)
        + '[migration]\nuser = "inbox-migrate"\ncommand = ["gunicorn", "head"]\npath = "forge/inbox/migrate"\n'
        + '[migration.settings]\nFORGE_ENVIRONMENT = "staging"\n[migration.variables]\nKEY = "password"\n',
    )
    arguments, environment, *_ = json.loads(launch(host, "migrate", "R1").stdout)
    assert arguments[1:] == ["head"]
    assert (environment["FORGE_ENVIRONMENT"], environment["KEY"]) == ("staging", "p")
    assert not [name for name in environment if name.startswith("V_")]


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        ("sealed", "is sealed or not initialised; unseal it (bao operator unseal), then the unit starts by itself"),
        ("rejected", "rejected this host's role id or secret id"),
        ("credential", "expected the sealed credential secret-id; found none"),
        ("key", "key nowhere is missing at secret/forge/inbox/app"),
        ("slot", "settings.toml; found no such file"),
        ("settings", "expected the description of an app in"),
    ],
)
def test_one_line_says_why_it_failed(host: Layout, bao: Bao, sealed_bao: Bao, breakage: str, expected: str) -> None:
    secret_id = host.root / "credentials/secret-id"
    was = secret_id.read_text()
    if breakage == "sealed":
        write(host, describe(sealed_bao.address, str(sealed_bao.ca_file), VARIABLES))
    elif breakage == "rejected":
        secret_id.write_text("wrong")
    elif breakage == "credential":
        secret_id.unlink()
    elif breakage == "key":
        write(host, describe(bao.address, str(bao.ca_file), 'FORGE_KEY = "nowhere"'))
    elif breakage == "slot":
        (host.slots / "blue").unlink()
    else:
        write(host, "name = 5")
    done = launch(host)
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr.startswith("forge-launch: inbox: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    for value in (was, *HARD_VALUES.values()):
        assert value not in done.stderr
