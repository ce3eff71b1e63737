"""What every scenario's tests share: a scenario without tests fails, and a failing test shows the journal."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host  # type: ignore[import-untyped]

JOURNAL_LINES = 40
WATCHED = pytest.StashKey[list[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a scenario that brings no test of its own.

    Raises:
        pytest.UsageError: no test was collected below the scenario's folder.
    """
    tests = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]) / "tests"
    # A scenario may borrow the tests of another by a symlink.
    if not any(tests.resolve() in item.path.resolve().parents for item in session.items):
        raise pytest.UsageError(
            f"Expected: tests of the scenario in {tests}. Found: none. Do: add a test_*.py with a test."
        )


@pytest.fixture
def unit(host: Host, request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Look a systemd unit up by its full name; if the test fails, the unit's journal is part of the report."""
    watched = request.node.stash.setdefault(WATCHED, [])

    def look_up(name: str) -> Any:
        watched.append(name)
        return host.service(name)

    return look_up


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the journals of the units that the test looked at, and of all that have failed."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and call.when != "teardown" and host is not None:
        failed = host.run("systemctl list-units --state=failed --no-legend --plain").stdout
        names = [*item.stash.get(WATCHED, []), *(line.split()[0] for line in failed.splitlines() if line.strip())]
        for name in dict.fromkeys(names):
            journal = host.run("journalctl --no-pager --lines=%s --unit=%s", str(JOURNAL_LINES), name).stdout
            report.sections.append((f"journal of {name}", journal))
    return report
