"""Real parts for forgectl's tests: OpenBao with TLS, PostgreSQL, and an app's folders below a temporary root."""

import os
import pwd
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hvac
import msgspec
import psycopg
import pytest

SOURCE = Path(__file__).parents[2] / "roles/forgectl/files/forgectl/src"
sys.path.insert(0, str(SOURCE))

from forgectl import config, database  # noqa: E402
from forgectl.layout import Layout  # noqa: E402
from forgectl.staging import Record  # noqa: E402

ROOT_TOKEN = "root-of-a-throwaway-server"
# Everything that breaks env files, shells and unit files.
HARD_VALUES = {
    "quotes": """a "double" and a 'single' \\ backslash""",
    "dollar": "$HOME ${PATH} $(id) `id` %n %%",
    "newlines": "-----BEGIN KEY-----\nline\r\n\ttab\n",
    "foreign": "pässwörd Ключ 鍵 🔑 \u00a0",
    "long": "x" * 60 * 1024,
    "spaces": "  # not a comment = ",
}

APP = """
name = "inbox"
user = "{user}"
domain = "inbox.example.com"
module = "inbox.main:app"
python_path = "src"
keep_releases = 2
[timeouts]
request = 60
app_graceful = 62
gunicorn_graceful = 65
stop = 70
heartbeat = 120
proxy_idle = 60
app_keepalive = 75
connect = 2
start = 60
[workers]
count = 2
reasons = ["2 cores"]
[settings]
FORGE_ENVIRONMENT = "production"
[secrets]
address = "{address}"
ca_file = "{ca_file}"
path = "forge/inbox/app"
[secrets.variables]
{variables}
"""

REVISION = """
revision = "{id}"
down_revision = {down!r}
backward_compatible: bool = {compatible}
"""


@contextmanager
def no_room(size: int = 0) -> Iterator[None]:
    """Let the kernel refuse whatever grows a file beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Bao:
    """An OpenBao server in dev mode with TLS, on a free port of loopback."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"https://127.0.0.1:{self.port}"
        self.ca_file = folder / "vault-ca.pem"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("bao", "server", "-dev", "-dev-tls", f"-dev-tls-cert-dir={folder}"),
                    *(f"-dev-root-token-id={ROOT_TOKEN}", f"-dev-listen-address=127.0.0.1:{self.port}"),
                    "-dev-no-store-token",
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(folder)},
            )
        self.client = self._connect(folder)
        self.client.sys.enable_auth_method("approle")
        self.client.sys.create_or_update_policy("inbox", 'path "secret/data/forge/inbox/*" { capabilities = ["read"] }')
        self.client.auth.approle.create_or_update_approle("inbox", token_policies=["inbox"], token_ttl="5m")
        self.role_id = self.client.auth.approle.read_role_id("inbox")["data"]["role_id"]

    def secret_id(self) -> str:
        return str(self.client.auth.approle.generate_secret_id("inbox")["data"]["secret_id"])

    def wrapped(self, path: str = "auth/approle/role/inbox/secret-id") -> str:
        answer = self.client.adapter.post(f"/v1/{path}", wrap_ttl="60s")
        return str(answer["wrap_info"]["token"])

    def put(self, path: str, values: dict[str, Any]) -> None:
        self.client.secrets.kv.v2.create_or_update_secret(path, values)

    def secrets(self, **changes: Any) -> config.Secrets:
        return msgspec.structs.replace(
            config.Secrets(address=self.address, ca_file=str(self.ca_file), path="forge/inbox/app"), **changes
        )

    def unseal(self) -> None:
        """With the key that a server in dev mode writes into its log."""
        key = next(line for line in self._log.read_text().splitlines() if line.startswith("Unseal Key: "))
        self.client.sys.submit_unseal_key(key.removeprefix("Unseal Key: "))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _connect(self, folder: Path) -> hvac.Client:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if self.ca_file.exists():
                client = hvac.Client(self.address, token=ROOT_TOKEN, verify=str(self.ca_file))
                try:
                    if client.is_authenticated() and "secret/" in client.sys.list_mounted_secrets_engines()["data"]:
                        return client
                except Exception:  # noqa: BLE001 - whatever it is, the server is not up yet
                    time.sleep(0.05)
            time.sleep(0.05)
        raise RuntimeError((folder / "log").read_text())


@pytest.fixture(scope="session")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    """A server with an AppRole that may read forge/inbox/*."""
    server = Bao(tmp_path_factory.mktemp("bao"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def sealed_bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    """A server that has been sealed."""
    server = Bao(tmp_path_factory.mktemp("sealed"))
    server.client.sys.seal()
    yield server
    server.stop()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """The folders of an app below a temporary root, as provisioning makes them."""
    layout = Layout("inbox", tmp_path)
    for folder in (layout.releases, layout.venvs, layout.slots, layout.state_dir, layout.sockets, layout.inputs):
        folder.mkdir(parents=True)
    (layout.inputs / "gunicorn.conf.py").write_text("workers = 2\n")
    (layout.inputs / "slot.conf").write_text("[Service]\nType=notify\n")
    (layout.inputs / "forge_worker.py").write_text("class Worker: ...\n")
    layout.description.write_text(describe())
    return layout


def describe(address: str = "https://127.0.0.1:1", ca_file: str = "/ca.pem", variables: str = "") -> str:
    """An app's NAME.toml; its user is the one who runs the tests."""
    user = pwd.getpwuid(os.getuid()).pw_name
    return APP.format(user=user, address=address, ca_file=ca_file, variables=variables)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Conninfo of a superuser of a temporary cluster that asks everyone else for a SCRAM password.

    It listens on loopback too, for servers that know no unix socket.
    """
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    # Not pytest's own folder: the path of a unix socket has at most 107 characters, and root's is private.
    folder = Path(tempfile.mkdtemp(prefix="forge-pg-"))
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        with (folder / "out").open("a") as out:
            subprocess.run(
                [programs / program, "-D", folder / "data", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                check=True,
                cwd=folder,
                user=user,
                extra_groups=[] if user else None,
            )

    run("initdb", "-U", "admin", "-A", "trust", "--no-sync", "--locale=C.UTF-8")
    (folder / "data/pg_hba.conf").write_text(
        "local all admin trust\nlocal all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-k {folder} -h 127.0.0.1 -p {port} -F", "start")
    yield f"host={folder} port={port} user=admin dbname=postgres"
    run("pg_ctl", "-w", "-m", "fast", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def logins(postgresql: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The two roles that the app logs in as, on a cluster that lets anybody in as its administrator."""
    monkeypatch.setattr(database, "ADMINISTRATION", postgresql)
    roles = ("inbox_app", "inbox_app_2")
    with psycopg.connect(postgresql, autocommit=True) as connection:
        for role in roles:
            connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        yield roles
        for role in roles:
            connection.execute(f"DROP ROLE {role}".encode())


def admits(postgresql: str, role: str, password: str) -> bool:
    """Whether the cluster lets a role in with a password."""
    try:
        with psycopg.connect(postgresql, user=role, password=password) as connection:
            return connection.execute("SELECT current_user").fetchone() == (role,)
    except psycopg.OperationalError as error:
        if "password authentication failed" not in str(error):
            raise
        return False


def staged(layout: Layout, number: int, revisions: str = "") -> Record:
    """A release whose Alembic revisions are the letters of `revisions`; a capital one is marked as compatible."""
    name = f"20260101-00000{number}-{'a' * 12}"
    versions = layout.releases / name / "source/migrations/versions"
    versions.mkdir(parents=True)
    (versions.parents[1] / "alembic.ini").write_text("[alembic]\nscript_location = migrations\n")
    below = None
    for letter in revisions:
        text = REVISION.format(id=letter.lower(), down=below, compatible=letter.isupper())
        (versions / f"{letter.lower()}.py").write_text(text)
        below = letter.lower()
    record = Record(name, f"d{number}", f"s{number}", "venv", "now", "me", [below] if below else [])
    (layout.releases / name / "release.json").write_bytes(msgspec.json.encode(record))
    (layout.releases / name / "settings.toml").write_text(describe())
    return record
