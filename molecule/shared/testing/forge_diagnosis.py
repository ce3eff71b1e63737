"""Asking doctor on the scenario's host."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from forge_scenario import until
from testinfra.host import Host

CLEAN, WARNING, CRITICAL = 0, 10, 11
SECONDS = 30.0
"""A bound on a hang, on a machine that others use as well; on a quiet one it takes a second."""
PATIENCE = 180.0
"""Seconds until nothing is left of a fault: answers that failed count for a minute, on a busy machine longer."""


def doctor(host: Host, *arguments: str, before: str = "") -> dict[str, Any]:
    """What it says; it has to end, and in the way that its verdict says."""
    run = host.run(f"{before} timeout 60 forgectl doctor --json" + " %s" * len(arguments), *arguments)
    assert run.stdout.startswith("{"), (run.rc, run.stdout, run.stderr)
    found: dict[str, Any] = json.loads(run.stdout)
    assert run.rc == {"clean": CLEAN, "warning": WARNING, "critical": CRITICAL}[found["verdict"]], run.stderr
    assert found["seconds"] < SECONDS, found["checks"]
    return found


def codes(found: dict[str, Any]) -> set[tuple[str, str]]:
    """Code and subject of what somebody has to mend."""
    return {(each["code"], each["subject"]) for each in found["findings"] if each["severity"] != "note"}


def told(found: dict[str, Any], code: str, subject: str = "") -> dict[str, Any]:
    """The finding of that code."""
    matching = [each for each in found["findings"] if each["code"] == code and subject in ("", each["subject"])]
    assert matching, (code, subject, brief(found["findings"]))
    return dict(matching[0])


def brief(findings: Sequence[dict[str, Any]]) -> list[str]:
    """Findings, a line each."""
    return [f"{each['code']} {each['severity']} {each['subject']}: {each['title']}" for each in findings]


def is_clean(host: Host) -> bool:
    """Whether there is nothing to mend any more; what there is is printed."""
    found = doctor(host)
    print(brief(found["findings"]))
    return not codes(found)


@pytest.fixture(scope="module")
def well(host: Host) -> None:
    """Have nothing to mend before the first test of a file, whatever the file before it has done."""
    until(lambda: is_clean(host), PATIENCE, every=1)
