"""Looking at any app of a host, as a client, as its operator and from inside its release."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from forge_events import answer, forgectl, upload
from forge_scenario import ToHost, main_pid, playbook, until
from forge_wire import address, trust
from testinfra.host import Host

EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
SOURCES, CA = EPHEMERAL / "sources", EPHEMERAL / "tls" / "ca.pem"
LOCKS = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent / "locks"
SETTLED = 120.0
"""Seconds within which every cutover has its verdict."""


def entries(host: Host) -> dict[str, Any]:
    """A copy of the inventory's apps."""
    apps: dict[str, Any] = copy.deepcopy(host.ansible.get_variables()["apps"])
    return apps


def domain(host: Host, app: str) -> str:
    """The name under which clients reach an app."""
    return str(entries(host)[app]["domain"])


@contextmanager
def browser(host: Host, app: str, **options: Any) -> Iterator[httpx.Client]:
    """A client of an app, through Nginx and TLS."""
    transport = ToHost(address(host), verify=trust())
    with httpx.Client(base_url=f"https://{domain(host, app)}", transport=transport, timeout=60, **options) as client:
        yield client


def state(host: Host, app: str) -> dict[str, Any]:
    """What `forgectl status` says of an app."""
    return answer(forgectl(host, "status", app, "--json"))


def settled(host: Host, app: str) -> dict[str, Any]:
    """The same, once nothing is under way."""
    found: dict[str, Any] = until(
        lambda: (now := state(host, app)) and not now["operation"] and now, SETTLED, every=0.5
    )
    return found


def live_unit(host: Host, app: str) -> str:
    """The service of an app's live slot."""
    return f"{app}@{state(host, app)['live']['slot']}.service"


def record(host: Host, app: str) -> dict[str, Any]:
    """The record of the live release."""
    status = state(host, app)
    document: dict[str, Any] = json.loads(
        host.file(f"/srv/{app}/releases/{status['live']['release']}/release.json").content_string
    )
    # An operator sees where it comes from as well.
    assert status["source"] == document["source"]
    return document


def run_inside(host: Host, app: str, *arguments: str, **environment: str) -> str:
    """Run the Python of an app's live release as the app's user."""
    python = f"/srv/{app}/slots/{state(host, app)['live']['slot']}/venv/bin/python"
    command = ["env", "--chdir=/", *(f"{name}={value}" for name, value in environment.items()), python, *arguments]
    return str(host.check_output(f"runuser --user {app} --{' %s' * len(command)}", *command))


def deployed(*arguments: str, only: str, apps: dict[str, Any] | None = None) -> str:
    """Deploy apps as a person would, with other entries if need be; what was said, on one line."""
    variables = {"only": only} | ({"apps": apps} if apps else {})
    run = playbook("--extra-vars", json.dumps(variables), *arguments, name="playbooks/deploy.yml", before=["nice"])
    assert run.returncode == 0, run.stdout
    return " ".join(run.stdout.split())


def archive(source: Path) -> str:
    """Put a changed source of `plain` on the host, with the lock that goes along; returns where it lies there."""
    lock = source / ".forge" / "requirements.txt"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text((LOCKS / "plain.txt").read_text())
    return upload(source)


def beats(host: Host) -> dict[str, int]:
    """Process by unit, of the command of `plain` that goes on, where it runs."""
    units = (f"plain.beat@{slot}.service" for slot in ("blue", "green"))
    return {unit: pid for unit in units if (pid := main_pid(host, unit))}


def trail(host: Host, command: str) -> list[tuple[int, str, str]]:
    """Process, release and what it did, of each line that a command of `plain` left; oldest first."""
    lines = (line.split() for line in host.check_output("cat /var/lib/plain/trail").splitlines())
    return [(int(process), release, what) for name, process, release, what in lines if name == command]
