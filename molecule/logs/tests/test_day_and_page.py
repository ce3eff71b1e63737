"""forgectl day, and playbooks/doctor.yml: the last day of an app in numbers, and the page of all hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from forge_scenario import Status, playbook, until
from testinfra.host import Host

Asked = Callable[..., dict[str, Any]]


def test_the_day_counts_every_request(host: Host, client: httpx.Client, asked: Asked, status: Status) -> None:
    """As many as there were, in the right step and class; and who was released when."""
    host.check_output("systemctl start forge-recycle@inbox.service")

    def counted() -> tuple[int, int]:
        day = asked("day", "inbox")["apps"]["inbox"]
        return sum(day["requests"][-2:]), sum(day["answers"]["4xx"][-2:])

    before = counted()
    for _ in range(20):
        assert client.get("/v1/events?limit=1").status_code == 200
    for _ in range(3):
        assert client.get("/nowhere").status_code == 404
    until(lambda: counted() == (before[0] + 23, before[1] + 3), 30)

    document = asked("day")
    day = document["apps"]["inbox"]
    assert {len(day[name]) for name in ("requests", "p50", "p95", "p99", "memory")} == {288}
    assert document["step"] == 300
    quick, slow = day["p50"][-1] or day["p50"][-2], day["p99"][-1] or day["p99"][-2]
    assert 0 < quick <= slow < 30
    live = status()["live"]["release"]
    assert live in [each["release"] for each in day["happened"] if each["outcome"] == "live"]
    # What the timer wrote down before it was asked, and what it is now.
    assert host.check_output("journalctl --unit=forge-recycle@inbox.service --output=cat --grep='bytes of memory'")
    assert 20 << 20 < day["memory"][-1] < day["memory_limit"]
    assert len(host.check_output("forgectl day").splitlines()) >= 5


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """The host, one that is off, and one that was never provisioned: this machine."""
    folder = tmp_path / "inventory"
    source = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    subprocess.run(["cp", "--recursive", "--dereference", source, folder], check=True)
    more = {
        "off": {"ansible_host": "127.0.0.1", "ansible_port": 1},
        "bare": {"ansible_connection": "local", "ansible_become": False},
    }
    (folder / "more.yml").write_text(yaml.safe_dump({"all": {"hosts": more}}))
    return folder


def page(inventory: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the playbook as a person would."""
    return playbook(
        "--inventory", str(inventory), "--extra-vars", f"page={target}", *options, name="playbooks/doctor.yml"
    )


def test_the_page_of_all_hosts(inventory: Path, tmp_path: Path) -> None:
    """A row for each host, whatever it answers; plots of the one that does; the verdict fails the run."""
    target = tmp_path / "hosts.html"
    done = page(inventory, target)
    assert done.returncode == 2, done.stdout
    html = target.read_text()
    assert re.search(r"^bare +unknown +was never provisioned", done.stdout, re.MULTILINE)
    assert re.search(r"^off +unknown +does not answer: .*refused", done.stdout, re.MULTILINE)
    assert re.search(r"^vm +(clean|warning|critical|unknown) ", done.stdout, re.MULTILINE)
    rows = re.findall(r'<td class="host"><a href="#host-\d+">(\w+)</a>', html)
    assert sorted(rows) == ["bare", "off", "vm"]
    assert html.count("<svg ") == 4
    assert re.search(r"<h4>Requests/s</h4><span class=\"dim\">[1-9][\d,]* in all", html)
    # Whoever opens it fetches nothing.
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)[^\s"'>)]+""", html) == []
    assert "<script" not in html
    assert target.stat().st_mode & 0o777 == 0o600
    failed = re.findall(r"^(\w+) +: .*failed=(\d)", done.stdout, re.MULTILINE)
    assert {"off", "bare"} <= {name for name, count in failed if count == "1"}


def test_who_decides_what_fails(inventory: Path, tmp_path: Path) -> None:
    """Nothing, where somebody only wants the page; and only those that are asked for are on it."""
    done = page(inventory, tmp_path / "hosts.html", "--extra-vars", "fail_on=never", "--limit", "vm")
    assert (done.returncode, "off" in done.stdout) == (0, False), done.stdout
    refused = page(inventory, Path("/nowhere/hosts.html"), "--limit", "vm")
    assert refused.returncode == 2
    assert "expected to write /nowhere/hosts.html" in refused.stdout


@pytest.mark.exhaustive
def test_a_forgectl_without_doctor_is_a_row(host: Host, inventory: Path, tmp_path: Path) -> None:
    """As a host has that was not provisioned since."""
    older = (
        "#!/bin/sh\n[ $1 = day ] && exec /opt/forge/forgectl/bin/forgectl \"$@\"\necho 'No such command' >&2; exit 2\n"
    )
    host.check_output("mv /usr/local/sbin/forgectl /usr/local/sbin/forgectl.away")
    try:
        host.check_output("printf %s > /usr/local/sbin/forgectl && chmod 755 /usr/local/sbin/forgectl", older)
        done = page(inventory, tmp_path / "hosts.html", "--limit", "vm")
    finally:
        host.check_output("mv /usr/local/sbin/forgectl.away /usr/local/sbin/forgectl")
    assert re.search(
        r"^vm +unknown +has an older forgectl, without `forgectl doctor`; run site.yml$", done.stdout, re.MULTILINE
    )
    assert (tmp_path / "hosts.html").read_text().count("<svg ") == 4


def test_the_document_is_one_line(host: Host) -> None:
    """What prints before it, as a login does, is no part of it."""
    assert json.loads(host.check_output("forgectl day --json | tail --lines=1"))["schema"] == 1
