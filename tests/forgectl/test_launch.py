"""launch.py: the process that it becomes, and the line it leaves when it can't."""

import json
import os
import re
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import HARD_VALUES, SOURCE, Bao, describe
from forgectl import vault
from forgectl.layout import Layout

# Stands where Gunicorn would: it tells what it was given.
TELL = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ), os.getcwd(), os.getpid(), sys.path]))"
VARIABLES = "".join(f'V_{key.upper()} = "{key}"\n' for key in HARD_VALUES)
# As a URL has it, of a password with what means something there.
LOGIN = "inbox_app:p%40%2F%25%20x"
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


def patient(seconds: float, description: str) -> str:
    """A description whose starts go on asking for so long."""
    return description.replace("[secrets]\n", f"[secrets]\nretry_seconds = {seconds}\n")


def launch(layout: Layout, mode: str = "app", *which: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(layout.root), mode, "inbox", *(which or ("blue",))],
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "postgresql+asyncpg://inbox_app@%2Frun/inbox"),
        ("inbox_app_2", "postgresql+asyncpg://inbox_app_2@%2Frun/inbox"),
        ("postgres", ""),
    ],
)
def test_the_secrets_name_the_user_in_the_url(host: Layout, bao: Bao, name: str | None, expected: str) -> None:
    bao.put("forge/inbox/app", {**HARD_VALUES, **({"database_user": name} if name else {})})
    url = '"postgresql+asyncpg://inbox_app@%2Frun/inbox"'
    description = describe(bao.address, str(bao.ca_file), VARIABLES).replace("[settings]", f"[settings]\nURL = {url}")
    database = f'placement = "local"\nname = "inbox"\napp_role = "inbox_app"\nurl = {url}\nurl_variable = "URL"\n'
    write(host, f"{description}[database]\n{database}")
    done = launch(host)
    if not expected:
        assert (done.returncode, "expected inbox_app or inbox_app_2 under the key" in done.stderr) == (78, True)
        return
    environment = json.loads(done.stdout)[1]
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).rmdir()
    assert environment["URL"] == expected


def test_a_password_that_a_url_wants_and_nobody_has_stops_the_start(host: Layout) -> None:
    """An app that connects without one would say so much later, if at all."""
    url = '"postgresql+asyncpg://inbox_app@db.example.com/inbox"'
    text = (host.releases / "R1/settings.toml").read_text().replace("[settings]", f"[settings]\nURL = {url}")
    database = f'placement = "external"\nname = "inbox"\napp_role = "inbox_app"\nurl = {url}\nurl_variable = "URL"\n'
    write(host, f'{text}[database]\n{database}url_format = "postgres://{{user}}:{{password}}@{{host}}/{{name}}"\n')
    done = launch(host)
    assert (done.returncode, done.stdout) == (78, "")
    assert "expected a password under the key database_password; found none" in done.stderr


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "postgresql+psycopg://{user}:{password}@/{name}?host=/run",
            "postgresql+psycopg://" + LOGIN + "@/inbox?host=/run",
        ),
        ("postgres://{user}:{password}@{host}/{name}", "postgres://" + LOGIN + "@%2Frun/inbox"),
        ("mysql://{name}", "mysql://inbox"),
    ],
)
def test_the_url_has_the_form_that_the_app_wants(host: Layout, bao: Bao, form: str, expected: str) -> None:
    bao.put("forge/inbox/app", {**HARD_VALUES, "database_password": "p@/% x"})  # pragma: allowlist secret
    url = '"postgresql+asyncpg://inbox_app@%2Frun/inbox"'
    variables = VARIABLES + 'PASSWORD = "database_password"\n'
    description = describe(bao.address, str(bao.ca_file), variables).replace("[settings]", f"[settings]\nURL = {url}")
    database = f'placement = "local"\nname = "inbox"\napp_role = "inbox_app"\nurl = {url}\nurl_variable = "URL"\n'
    write(host, f'{description}[database]\n{database}url_format = "{form}"\n')
    environment = json.loads(launch(host).stdout)[1]
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).rmdir()
    assert environment["URL"] == expected


def test_an_app_without_secrets_asks_nobody(host: Layout) -> None:
    plain = describe().replace(describe().partition("[secrets]")[2], '\nsource = "none"\n')
    write(host, plain)
    done = launch(host, CREDENTIALS_DIRECTORY="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    Path(json.loads(done.stdout)[1]["PROMETHEUS_MULTIPROC_DIR"]).rmdir()


COMMAND = '[commands.beat]\ncommand = ["{first}", "--twice"]\nmemory_max_mib = 64\nstop_seconds = 5\n'


def test_a_command_gets_what_the_app_gets(host: Layout, bao: Bao) -> None:
    """But for what is the server's."""
    write(host, describe(bao.address, str(bao.ca_file), VARIABLES) + COMMAND.format(first="gunicorn"))
    arguments, environment, folder, *_ = json.loads(launch(host, "command", "blue", "beat").stdout)
    assert arguments[1:] == ["--twice"]
    assert folder == f"{os.path.realpath(host.releases / 'R1')}/source"
    assert environment["FORGE_ENVIRONMENT"] == "production"
    assert environment["V_DOLLAR"] == HARD_VALUES["dollar"]
    assert "PROMETHEUS_MULTIPROC_DIR" not in environment


def test_a_command_may_be_a_program_of_the_environment(host: Layout, bao: Bao) -> None:
    write(host, describe(bao.address, str(bao.ca_file), VARIABLES) + COMMAND.format(first="tell"))
    program = host.releases / "R1/venv/bin/tell"
    program.write_text("#!/bin/sh\necho $0 $1\n")
    program.chmod(0o755)
    release = os.path.realpath(host.releases / "R1")
    assert launch(host, "command", "blue", "beat").stdout == f"{release}/venv/bin/tell --twice\n"


def test_a_command_that_the_release_lacks_is_told(host: Layout) -> None:
    done = launch(host, "command", "blue", "beat")
    assert (done.returncode, "expected [commands.beat] in" in done.stderr) == (78, True)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("success", ""),
        ("exit-code", "<3>ALERT inbox: the command beat failed (exit-code, exited 1); see what it said: "),
        ("timeout", "<3>ALERT inbox: the command beat failed (timeout, killed KILL); see what it said: "),
    ],
)
def test_the_end_of_a_command_is_told_if_it_was_none_in_order(host: Layout, result: str, said: str) -> None:
    code, status = ("killed", "KILL") if result == "timeout" else ("exited", "1")
    done = launch(host, "ended", "beat", SERVICE_RESULT=result, EXIT_CODE=code, EXIT_STATUS=status)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (f"{said}sudo forgectl logs inbox --command beat\n" if said else "")


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
    """And there is no second attempt, for all that the budget allows, where patience mends nothing."""
    secret_id = host.root / "credentials/secret-id"
    was = secret_id.read_text()
    if breakage == "sealed":
        write(host, patient(0, describe(sealed_bao.address, str(sealed_bao.ca_file), VARIABLES)))
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


def test_a_start_waits_for_vault_to_be_unsealed(host: Layout, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One line an attempt, with a pause that differs."""
    server = Bao(tmp_path_factory.mktemp("unsealed"))
    try:
        server.put("forge/inbox/app", HARD_VALUES)
        write(host, patient(30, describe(server.address, str(server.ca_file), VARIABLES)))
        (host.root / "credentials/role-id").write_text(server.role_id)
        (host.root / "credentials/secret-id").write_text(server.secret_id())
        server.client.sys.seal()
        threading.Timer(4, server.unseal).start()
        began = time.monotonic()
        done = launch(host)
        took = time.monotonic() - began
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    environment = json.loads(done.stdout)[1]
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).rmdir()
    assert environment["V_QUOTES"] == HARD_VALUES["quotes"]
    assert 4 < took < 30
    lines = done.stderr.splitlines()
    pattern = r"forge-launch: inbox: Vault at \S+ is sealed or not initialised; .*; next attempt in (\d+\.\d) s"
    pauses = [float(match[1]) for line in lines if (match := re.fullmatch(pattern, line))]
    assert len(pauses) == len(lines) >= 2
    assert len(set(pauses)) > 1


@pytest.mark.parametrize("kind", ["sealed", "down", "silent", "slow"])
def test_a_start_gives_up_when_its_budget_is_spent(host: Layout, sealed_bao: Bao, kind: str) -> None:
    """However the server is not there: also one that takes connections and says nothing, before or after TLS."""
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket())
        other.bind(("127.0.0.1", 0))
        if kind == "silent":
            other.listen()
        elif kind == "slow":
            other.listen()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            folder = sealed_bao.ca_file.parent
            context.load_cert_chain(folder / "vault-cert.pem", folder / "vault-key.pem")
            other = stack.enter_context(context.wrap_socket(other, server_side=True))
            connections: list[Any] = []
            answering = threading.Thread(target=lambda: connections.append(other.accept()))
            answering.start()
            stack.callback(lambda: [connection.close() for connection, _ in connections])
            stack.callback(answering.join)
        address = sealed_bao.address if kind == "sealed" else f"https://127.0.0.1:{other.getsockname()[1]}"
        write(host, patient(3, describe(address, str(sealed_bao.ca_file), VARIABLES)))
        began = time.monotonic()
        done = launch(host)
        took = time.monotonic() - began
    assert done.returncode == 78
    *attempts, last = done.stderr.splitlines()
    assert all("; next attempt in " in line for line in attempts)
    assert "next attempt" not in last
    # Also on a busy machine less than a single request would have without the budget.
    assert 3 < took < vault.TIMEOUT_SECONDS
    assert attempts or kind in ("silent", "slow")


def test_a_start_without_a_budget_asks_once(host: Layout, sealed_bao: Bao) -> None:
    write(host, patient(0, describe(sealed_bao.address, str(sealed_bao.ca_file), VARIABLES)))
    assert launch(host).stderr.count("\n") == 1
