"""Bad input against a host that serves: refused in one message, and nothing on the host has moved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forge_scenario import playbook, until
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[3]
FINGERPRINT = """
find /etc /srv /opt /usr/local /var/lib/forge /var/cache/forge -printf '%p %m %u %s %T@\\n' | sort
systemctl show --property=Id,ActiveState,ActiveEnterTimestamp 'inbox*' nginx.service 'postgresql*' 'forge*'
dpkg-query --show
"""


@pytest.fixture(scope="module", autouse=True)
def _undisturbed(host: Host) -> Iterator[None]:
    """Without what the host does by itself now and then: it takes locks, which would look like a change."""
    listed = "systemctl list-units --no-legend --plain"
    timers = [line.split()[0] for line in host.check_output(f"{listed} 'forge*.timer'").splitlines()]
    host.check_output(f"systemctl stop {' '.join(timers)}")
    assert until(lambda: not host.check_output(f"{listed} --state=activating 'forge*.service'"), 60)
    yield
    host.check_output(f"systemctl start {' '.join(timers)}")


@contextmanager
def unchanged(host: Host) -> Iterator[None]:
    """Compare files, units and packages before and after."""
    before = host.check_output(FINGERPRINT)
    yield
    assert set(host.check_output(FINGERPRINT).splitlines()) ^ set(before.splitlines()) == set()


def entry(**changes: Any) -> dict[str, Any]:
    """An entry of `apps` with changes."""
    identity = "00000000-0000-0000-0000-000000000000"
    whole = {
        "domain": "inbox.example.com",
        "source": "app",
        "module": "inbox.main:app",
        "python_path": "src",
        "secrets": {"role_id": identity, "variables": {"FORGE_DATABASE_PASSWORD": "database_password"}},
        "database": {"migration": {"role_id": identity}},
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def refusal(problems: int, *hidden: str, **variables: object) -> str:
    """Run site.yml with extra variables that must be refused for so many reasons, and show nothing of `hidden`."""
    run = playbook("--extra-vars", json.dumps(variables))
    assert run.returncode == 2, run.stdout
    assert re.search(r"ok=1 +changed=0 +unreachable=0 +failed=1 ", run.stdout), run.stdout
    everything = " ".join((run.stdout + run.stderr).split())
    said = everything.partition("msg:")[2]
    assert re.search(rf"refused vm: {problems} problems?\. Nothing was changed\.", said), said
    assert [said.count(f" {word}: ") for word in ("expected", "found", "do")] == [problems] * 3, said
    assert not [value for value in hidden if value in everything], "a secret is shown"
    return said


def test_inventory(host: Host) -> None:
    """Everything that is wrong in an inventory comes at once, without the secret that should not be in it."""
    secret = "correct-horse-battery-staple"  # pragma: allowlist secret
    with unchanged(host):
        said = refusal(
            5,
            secret,
            nginx_worker_conections=10,
            apps={
                "inbox": entry(domain=None, settings={"FORGE_SIGNING_KEY": secret}),
                "events": entry(domain="events.example.com", module="inbox.main:application", requests_timeout=5),
            },
        )
    assert "apps.inbox.domain" in said
    assert "nginx_worker_connections" in said
    assert "FORGE_SIGNING_KEY" in said
    assert "apps.events.module" in said
    assert "request_timeout" in said


def test_host(host: Host) -> None:
    """So does everything that the host lacks."""
    listener = "systemd-run --quiet --unit=forge-listener python3 -m http.server 8081 --bind 127.0.0.1"
    host.check_output(listener)
    try:
        with unchanged(host):
            said = refusal(
                5,
                preflight_ports=[80, 443, 8081],
                preflight_disk_minimum_mib=10**9,
                preflight_memory_minimum_mib=10**9,
                preflight_systemd_minimum=999,
                preflight_distributions={"Debian": ["11"]},
            )
    finally:
        host.check_output("systemctl stop forge-listener")
    assert re.search(r"port 8081.*python3", said, re.IGNORECASE)
    for wanted in ("memory", "disk", "systemd 999", "Debian 11"):
        assert wanted.casefold() in said.casefold(), wanted


def test_budget(host: Host) -> None:
    """Connections that do not fit are refused with the sum."""
    with unchanged(host):
        said = refusal(1, postgresql_max_connections=20)
    assert re.search(r"max_connections.*20", said)
    assert re.search(r"1 hosts x \d+ workers x 2 slots x \(5 pool_max \+ 1 listener\) = \d+", said), said


def test_locks(host: Host, tmp_path: Path) -> None:
    """A source whose lock is missing, pins a part by hash, or is older than the dependencies, is not uploaded."""
    for name in ("missing", "loose", "stale"):
        ignored = shutil.ignore_patterns(".*", "__pycache__", "tests")
        shutil.copytree(PROJECT / "app", tmp_path / name, ignore=ignored)
    (tmp_path / "missing" / "requirements.txt").unlink()
    loose = tmp_path / "loose" / "requirements.txt"
    loose.write_text(loose.read_text() + "idna==3.10\n")
    manifest = tmp_path / "stale" / "pyproject.toml"
    manifest.write_text(
        manifest.read_text().replace("dependencies = [", 'dependencies = [\n    "not-in-the-lock>=1",', 1)
    )
    apps = {
        "inbox": entry(source=str(tmp_path / "missing"), lock="requirements.txt"),
        "events": entry(source=str(tmp_path / "loose"), domain="events.example.com"),
        "orders": entry(source=str(tmp_path / "stale"), domain="orders.example.com"),
    }
    with unchanged(host):
        said = refusal(3, apps=apps)
    for name, found in {"inbox": "no such file", "events": "without", "orders": "not-in-the-lock is missing"}.items():
        assert re.search(rf"apps\.{name}\.lock expected: ((?! do: ).)* found: {found}", said), name
