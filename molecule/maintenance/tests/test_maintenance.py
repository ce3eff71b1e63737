"""playbooks/maintenance.yml: apps are closed to clients and opened again from the control machine."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from forge_events import history
from forge_scenario import Status, playbook
from testinfra.host import Host

NAME = "playbooks/maintenance.yml"
REASON = "moving the disk of example.com, isn't it"


def changed(*arguments: str) -> int:
    """Run it; how many tasks changed something."""
    done = playbook(*(each for argument in arguments for each in ("-e", argument)), name=NAME)
    assert done.returncode == 0, done.stdout
    return sum(map(int, re.findall(r"changed=(\d+)", done.stdout)))


@pytest.fixture(autouse=True)
def _open(host: Host) -> Iterator[None]:
    yield
    host.run("forgectl maintenance inbox off")


def test_closed_and_opened(host: Host, client: httpx.Client, status: Status) -> None:
    """Once each; clients are told to come back, and the reason is for operators alone."""
    dry = playbook("--check", "-e", "mode=on", name=NAME)
    assert (dry.returncode, "changed=1" in dry.stdout, client.get("/ready").status_code) == (0, True, 200)
    arguments = ("mode=on", "only=inbox", f"reason='{REASON}'")
    assert [changed("mode=on", '{"reason": "' + REASON + '"}'), changed(*arguments[:2])] == [1, 0]
    answer = client.get("/v1/events")
    assert (answer.status_code, int(answer.headers["retry-after"]) > 0, REASON in answer.text) == (503, True, False)
    assert status()["maintenance_mode"]["reason"] == REASON
    assert [changed("mode=off"), changed("mode=off")] == [1, 0]
    assert client.get("/ready").status_code == 200
    assert [each["outcome"] for each in history(host)[-2:]] == ["on", "off"]


@pytest.mark.parametrize("arguments", [(), ("mode=maybe",), ("mode=on", "only=nothing"), ("mode=on", "only=")])
def test_bad_input_is_refused(arguments: tuple[str, ...], client: httpx.Client) -> None:
    done = playbook(*(each for argument in arguments for each in ("-e", argument)), name=NAME)
    assert done.returncode != 0
    assert "Expected -e mode=on or -e mode=off, and apps of the inventory: inbox." in " ".join(done.stdout.split())
    assert client.get("/ready").status_code == 200
