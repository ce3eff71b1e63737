"""What the tests of this scenario share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import hvac
import pytest
from forge_apps import SOURCES, browser, run_inside
from forge_events import Ledger, append, event, ledger, say, site
from forge_public import EMAIL, MAKE_RASTER, PASSWORD, RASTER, said, work
from forge_scenario import secrets_at
from testinfra.host import Host

__all__ = ["event", "ledger", "say", "site"]


@pytest.fixture
def rate(ledger: Ledger) -> float:
    """Requests a second around an event: what one host with eight apps always takes; scenario `release` has more."""
    ledger.rate = 40.0
    return ledger.rate


@pytest.fixture
def client_of(host: Host) -> Iterator[Callable[[str], httpx.Client]]:
    """Make a client of an app, through Nginx and TLS."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(browser(host, app))


@pytest.fixture
def rogue(client_of: Callable[[str], httpx.Client]) -> httpx.Client:
    """A client of the app that does what it is told to."""
    return client_of("rogue")


@pytest.fixture
def plain(client_of: Callable[[str], httpx.Client]) -> httpx.Client:
    """A client of the app that a stranger may have written."""
    return client_of("plain")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of that app's source that differs from all before."""
    copy = Path(shutil.copytree(SOURCES / "plain", tmp_path / "plain"))
    append(copy / "main.py", f"VARIANT = {time.time()}\n")
    return copy


@pytest.fixture(scope="session")
def raster() -> Callable[[Host], str]:
    """Make what titiler shall serve, in its state folder, with the GDAL that it came with."""
    made: list[str] = []

    def make(host: Host) -> str:
        if not made:
            run_inside(host, "titiler", "-c", MAKE_RASTER, RASTER)
            made.append(RASTER)
        return RASTER

    return make


@pytest.fixture(scope="session")
def administrator(vault: hvac.Client) -> Callable[[Host], dict[str, str]]:
    """Log in at fractal as its first user, whom its own command makes, as its documentation asks for."""
    headers: dict[str, str] = {}

    def log_in(host: Host) -> dict[str, str]:
        if not headers:
            kept = secrets_at(vault, "forge/fractal/app")
            run_inside(
                host,
                "fractal",
                *("-m", "fractal_server", "init-db-data"),
                *("--admin-email", EMAIL, "--admin-pwd", PASSWORD, "--admin-project-dir", "/var/lib/fractal"),
                LANG="C.UTF-8",
                JWT_SECRET_KEY=kept["signing_key"],
                POSTGRES_HOST="/var/run/postgresql",
                POSTGRES_DB="fractal",
                POSTGRES_USER=kept["database_user"],
                POSTGRES_PASSWORD=kept["database_password"],
            )
            with browser(host, "fractal") as client:
                answer = client.post("/auth/token/login/", data={"username": EMAIL, "password": PASSWORD})
                headers["authorization"] = f"Bearer {answer.raise_for_status().json()['access_token']}"
                # What it is asked for under load.
                client.post("/auth/group/", json={"name": f"group {time.time()}"}, headers=headers).raise_for_status()
        return headers

    return log_in


@pytest.fixture(scope="session")
def tracker() -> Callable[[Host], dict[str, str]]:
    """Log in at timetagger."""
    headers: dict[str, str] = {}

    def log_in(host: Host) -> dict[str, str]:
        if not headers:
            with browser(host, "timetagger") as client:
                headers["authtoken"] = said(client, PASSWORD).raise_for_status().json()["token"]
                # What it is asked for under load.
                client.put("/timetagger/api/v2/records", json=[work("key0")], headers=headers).raise_for_status()
        return headers

    return log_in
