"""Fixtures: a real database, provisioned the way production is, and the application on it."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from cluster import Cluster, temporary_cluster
from inbox.application import create_app
from inbox.settings import Settings, get_settings

APP = Path(__file__).parent.parent
# Characters that break env files, shells, URLs and logs.
PASSWORD = "p@ss:w/rd?#%20 $HOME `x` \"q\" 'q' \\ \u00e4\u20ac ="  # noqa: S105 - made up  # pragma: allowlist secret
SIGNING_KEY = "a-signing-key-for-tests-$`\"'\\-0123456789"

Environ = dict[str, str]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the machine reaches a test, and no cached one leaves it."""
    for name in list(os.environ):
        if name.startswith(("FORGE_", "PG", "PROMETHEUS_")):
            monkeypatch.delenv(name)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with temporary_cluster() as running:
        escaped = PASSWORD.replace("'", "''")
        running.admin(
            "CREATE ROLE inbox_owner NOLOGIN",
            "CREATE ROLE inbox_rw NOLOGIN",
            f"CREATE ROLE inbox_migrate LOGIN PASSWORD '{escaped}' IN ROLE inbox_owner",
            "ALTER ROLE inbox_migrate SET role = inbox_owner",
            f"CREATE ROLE inbox_app LOGIN PASSWORD '{escaped}' IN ROLE inbox_rw",
        )
        yield running


def environ(cluster: Cluster, database: str, role: str = "inbox_app") -> Environ:
    """Return the variables that make a process use `database` through the unix socket."""
    host = quote(str(cluster.folder), safe="")
    return {
        "FORGE_ENVIRONMENT": "production",
        "FORGE_DATABASE_URL": f"postgresql+asyncpg://{role}@{host}:{cluster.port}/{database}",
        "FORGE_DATABASE_PASSWORD": PASSWORD,
        "FORGE_SIGNING_KEY": SIGNING_KEY,
    }


def migrate(
    cluster: Cluster, database: str, *arguments: str, folder: Path = APP, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run alembic in `folder` the way the migration unit does: without the application's signing key."""
    given = environ(cluster, database, "inbox_migrate") | variables
    del given["FORGE_SIGNING_KEY"]
    return subprocess.run(
        [sys.executable, "-m", "alembic", *(arguments or ("upgrade", "head"))],
        cwd=folder,
        env={"PATH": os.environ["PATH"]} | given,
        capture_output=True,
        text=True,
        check=False,
    )


def provision(cluster: Cluster, database: str, marker: str | None = "production") -> None:
    """Create a database with the rights and the marker that provisioning gives it."""
    cluster.admin(f"CREATE DATABASE {database} OWNER inbox_owner")
    cluster.admin(
        "ALTER SCHEMA public OWNER TO inbox_owner",
        "ALTER DEFAULT PRIVILEGES FOR ROLE inbox_owner GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO inbox_rw",
        database=database,
    )
    if marker:
        cluster.admin(f"ALTER DATABASE {database} SET forge.environment = '{marker}'")


@pytest.fixture(scope="session")
def migrated(cluster: Cluster) -> str:
    provision(cluster, "inbox")
    done = migrate(cluster, "inbox")
    assert done.returncode == 0, done.stdout + done.stderr
    return "inbox"


@pytest.fixture
def database(cluster: Cluster, migrated: str) -> str:
    """The name of an empty, migrated database marked `production`."""
    cluster.admin("TRUNCATE event RESTART IDENTITY", database=migrated)
    return migrated


@pytest.fixture
def make_settings(cluster: Cluster, database: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Build settings through the environment, as a process does."""

    def make(**variables: str) -> Settings:
        with monkeypatch.context() as patched:
            for name, value in (environ(cluster, database) | variables).items():
                patched.setenv(name, value)
            get_settings.cache_clear()
            return get_settings()

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
async def client(app: FastAPI, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:  # noqa: ARG001 - makes it async
    """A client of the application in this process."""
    async with running(app) as connected:
        yield connected


class running:  # noqa: N801 - used like a function
    """Run the application's lifespan, as a server does, and give a client of it."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._lifespan = app.router.lifespan_context(app)
        self.state: dict[str, Any] = {}

    async def __aenter__(self) -> httpx.AsyncClient:
        self.state = dict(await self._lifespan.__aenter__() or {})

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = dict(self.state)
            await self._app(scope, receive, send)

        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(with_state), base_url="http://inbox.test")
        return self._client

    async def __aexit__(self, *error: Any) -> None:  # noqa: ANN401 - the context manager protocol
        await self._client.aclose()
        await self._lifespan.__aexit__(*error)
