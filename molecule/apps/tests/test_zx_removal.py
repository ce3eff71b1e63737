"""An app leaves, comes back, is deleted and comes anew, while another serves: nobody else notices."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from forge_events import EventContext, answer, forgectl, kill_forgectl, psql, source, upload
from forge_scenario import playbook, until
from testinfra.host import Host

__all__ = ["source"]
PURGE = ("purge", "second", "--yes-purge", "second", "--json")
NAMES = "SELECT datname FROM pg_database UNION SELECT rolname FROM pg_roles"
# What keeps lines about everything that ever happened, and Ansible's and systemd's own notes.
LOGS = "/proc /sys /var/log /run/log /run/systemd /run/udev /var/lib/systemd /tmp /var/tmp".split()
UNITS = "systemctl list-units --all --plain --no-legend '*second*'"


def answers(client: httpx.Client) -> bool:
    """Whether its clients reach it."""
    try:
        return client.get("/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def site(host: Host, *, listed: bool, options: tuple[str, ...] = ()) -> str:
    """Run site.yml with the app in the inventory or without; what it printed."""
    apps = copy.deepcopy(host.ansible.get_variables()["apps"])
    if not listed:
        del apps["second"]
    done = playbook("--extra-vars", json.dumps({"apps": apps}), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def running(host: Host) -> list[str]:
    """Units of the app that do anything."""
    lines = host.check_output(UNITS).splitlines()
    found = [line.split()[0] for line in lines if line.split()[2] == "active"]
    return [unit for unit in found if not unit.endswith(".slice")]


def traces(host: Host) -> set[str]:
    """Every file of the app, by name, and its users and databases."""
    pruned = " -o ".join(f"-path {path}" for path in LOGS)
    names = host.run(
        f"find / -xdev \\( {pruned} \\) -prune -o \\( -name second -o -name 'second[@.-]*' -o -name '*@second.*' "
        "-o -name '*[.-]second' -o -name '*[.-]second.*' \\) -print"
    ).stdout
    users = host.run("getent passwd second second-migrate; getent group second second-migrate").stdout
    databases = [name for name in psql(host, NAMES).split() if name.startswith("second")]
    return {*names.split(), *users.split(), *databases, *host.run("ls -d /run/second").stdout.split()}


def removed(host: Host) -> Any:
    return json.loads(host.check_output("forgectl status second --json"))["removed"]


@pytest.fixture
def second(host: Host, client_of: Callable[[str], httpx.Client]) -> httpx.Client:
    """A client of the app that leaves, which is in service when a test begins."""
    if host.file("/etc/forge/apps/second.toml").exists:
        answer(forgectl(host, "restore", "second", "--json"))
    client = client_of("second.example.org")
    if not answers(client):
        site(host, listed=True)
        until(lambda: answers(client), 10)
    return client


def test_an_app_in_no_entry_goes_on_and_site_says_so(host: Host, second: httpx.Client) -> None:
    """It keeps its database and its certificate, and nothing changes."""
    said = site(host, listed=False)
    assert "second (second.example.org, www.second.example.org) is in no entry of the inventory" in " ".join(
        said.split()
    )
    assert "changed=0 " in said, said
    assert answers(second)
    # A connection that it opens now is let in.
    psql(host, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'second'")
    until(lambda: second.get("/ready").status_code == 200, 20)


def test_no_entry_may_take_what_such_an_app_has(host: Host) -> None:
    """Its domain and its database are refused, with the name of who has them."""
    apps = copy.deepcopy(host.ansible.get_variables()["apps"])
    apps["shop"] = apps.pop("second") | {"aliases": []}
    apps["shop"]["database"]["name"] = "second"
    done = playbook("--extra-vars", json.dumps({"apps": apps}))
    assert done.returncode != 0
    for line in ("apps.shop.domain", "apps.shop.database.name", "playbooks/remove.yml -e only=second"):
        assert line in done.stdout


def test_remove_is_refused_while_there_is_an_entry(second: httpx.Client) -> None:
    """The next site.yml would bring it back."""
    done = playbook("--extra-vars", "only=second", name="playbooks/remove.yml")
    assert done.returncode != 0
    assert "take its entry out of `apps` first" in " ".join(done.stdout.split())
    assert answers(second)


def test_removal_and_return_under_load(host: Host, event: EventContext, second: httpx.Client) -> None:
    """The other app loses nothing; all that the app has is kept; a reboot of its units changes nothing."""
    stored = second.post("/v1/events", json={"type": "t", "payload": {}}, headers={"Idempotency-Key": "kept"})
    assert stored.is_success, stored.text
    before = traces(host)
    assert forgectl(host, "remove", "second", "--dry-run", "--json").rc == 0
    assert answers(second)
    with event("removal of another app", idle=True):
        kept = answer(forgectl(host, "remove", "second", "--json"))["kept"]
    assert not answers(second)
    assert running(host) == []
    assert host.run("systemctl is-enabled forge-boot@second.service forge-recycle@second.timer").stdout.split() == [
        "disabled",
        "disabled",
    ]
    assert {"/srv/second", "/var/lib/second"} <= traces(host)
    assert "the database second with its roles" in kept
    # Sockets and what leads to them are gone with the slots.
    assert {path for path in before - traces(host) if not path.startswith(("/run/", "/etc/systemd/", "/proc/"))} == {
        "/etc/nginx/forge/second.conf"
    }
    assert removed(host)["done"]
    # Twice is once.
    assert not answer(forgectl(host, "remove", "second", "--json"))["changed"]
    for command in (("rollback", "second"), ("recycle", "second"), ("secrets", "rotate", "second")):
        refused = answer(forgectl(host, *command, "--json"), 3)
        assert "sudo forgectl restore second" in refused["error"]
    # What timers and a boot call has nothing to do, and is no failure.
    host.check_output("systemctl start forge-recycle@second.service forge-rotate@second.service")
    host.check_output("forgectl boot second")
    host.check_output("systemctl start forge-certificates.service")
    assert running(host) == []
    assert host.check_output("systemctl --failed --plain --no-legend") == ""

    with event("return of another app", idle=True):
        answer(forgectl(host, "restore", "second", "--json"))
    assert answers(second)
    assert second.get(f"/v1/events/{stored.json()['id']}").status_code == 200
    assert removed(host) is None
    assert not answer(forgectl(host, "restore", "second", "--json"))["changed"]
    # And the settings of the slot that it has now.
    assert before <= traces(host)
    assert host.run("systemctl is-enabled forge-boot@second.service").stdout.strip() == "enabled"


def test_a_removal_that_was_killed_goes_on(host: Host, second: httpx.Client) -> None:
    """While its slots drain; status says so meanwhile."""
    kill_forgectl(host, "draining", "remove", "second", delay=0.5)
    assert "HALF REMOVED" in host.check_output("forgectl status second")
    assert answer(forgectl(host, "remove", "second", "--json"))["changed"]
    assert running(host) == []
    assert not answers(second)


@pytest.mark.exhaustive
def test_the_entry_and_site_bring_it_back(host: Host, second: httpx.Client) -> None:
    """As a release does; a check says so."""
    answer(forgectl(host, "remove", "second", "--json"))
    assert "give second.example.org back" in " ".join(site(host, listed=True, options=("--check",)).split())
    assert not answers(second)
    site(host, listed=True)
    until(lambda: answers(second), 10)
    assert removed(host) is None
    assert "changed=0 " in site(host, listed=True)


def test_a_purge_leaves_nothing_and_the_app_comes_anew(
    host: Host, event: EventContext, second: httpx.Client, say: Callable[[str], None]
) -> None:
    """It asks, and goes on where it was killed. The app that is then added loses the other no request."""
    assert "sudo forgectl remove second" in answer(forgectl(host, *PURGE), 3)["error"]
    apps = {name: entry for name, entry in host.ansible.get_variables()["apps"].items() if name != "second"}
    extra = ("--extra-vars", json.dumps({"apps": apps}), "--extra-vars", "only=second")
    done = playbook(*extra, name="playbooks/remove.yml")
    assert done.returncode == 0, done.stdout
    assert "the database second with its roles" in done.stdout
    assert "changed=0 " in playbook(*extra, name="playbooks/remove.yml").stdout

    for command in (("purge", "second"), ("purge", "second", "--yes-purge", "inbox")):
        assert forgectl(host, *command).rc == 2
    before = traces(host)
    planned = answer(forgectl(host, "purge", "second", "--dry-run", "--json"))["deleted"]
    assert any("/var/lib/second" in each for each in planned)
    assert traces(host) == before
    kill_forgectl(host, "dropping the database", "purge", "second", "--yes-purge", "second", delay=0.02)
    assert "HALF PURGED" in host.check_output("forgectl status second")
    assert "a purge that has begun" in answer(forgectl(host, "restore", "second", "--json"), 3)["error"]
    found = answer(forgectl(host, *PURGE))
    say("\n    ".join(["kept:", *found["kept"]]))
    assert any("secrets and AppRoles" in each for each in found["kept"])
    assert traces(host) == set()
    assert running(host) == []
    assert not answer(forgectl(host, *PURGE))["changed"]
    host.check_output("systemctl start forge-certificates.service")
    assert "ALERT second" not in host.check_output("journalctl --unit=forge-certificates --since=-1min --output=cat")

    with event("another app is added", idle=True):
        site(host, listed=True)
    until(lambda: answers(second), 10)


@pytest.mark.exhaustive
def test_a_host_that_was_purged_is_as_the_inventory_says(host: Host, second: httpx.Client) -> None:
    """But for lines in lists, which are no use to anybody, until the next run: needrestart's, and PostgreSQL's."""
    assert answers(second)
    answer(forgectl(host, "remove", "second", "--json"))
    answer(forgectl(host, *PURGE))
    assert "is in no entry" not in site(host, listed=False)
    assert "changed=0 " in site(host, listed=False)


def test_an_app_is_changed_under_load(host: Host, event: EventContext, second: httpx.Client, source: Path) -> None:
    """A release of the other app is none of this one."""
    archive = upload(source)
    with event("release of another app"):
        answer(forgectl(host, "release", "second", "--archive", archive, "--json"))
    assert answers(second)
