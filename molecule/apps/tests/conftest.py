"""What the tests of this scenario share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from forge_apps import SOURCES, browser
from forge_events import Ledger, append, event, ledger, say, site
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
