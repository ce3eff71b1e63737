"""An app leaves, comes back, is deleted and comes anew, while another serves: nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from forge_apps import deployed, entries
from forge_events import EventContext, answer, forgectl, kill_forgectl, psql
from forge_scenario import playbook, until
from testinfra.host import Host

PURGE = ("purge", "rogue", "--yes-purge", "rogue", "--json")
NAMES = "SELECT datname FROM pg_database UNION SELECT rolname FROM pg_roles"
# What keeps lines about everything that ever happened, and Ansible's and systemd's own notes.
LOGS = "/proc /sys /var/log /run/log /run/systemd /run/udev /var/lib/systemd /tmp /var/tmp".split()
UNITS = "systemctl list-units --all --plain --no-legend '*rogue*'"


def answers(client: httpx.Client) -> bool:
    """Whether its clients reach it."""
    try:
        return client.get("/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def site(host: Host, *, listed: bool, options: tuple[str, ...] = ()) -> str:
    """Run site.yml with the app in the inventory or without; what it printed."""
    apps = entries(host)
    if not listed:
        del apps["rogue"]
    done = playbook("--extra-vars", json.dumps({"apps": apps}), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tried(client: httpx.Client, *tries: str) -> list[str]:
    """What came of each, as a program of the app's own finds it."""
    answer = client.post("/try", json=[each.split(" ", 1) for each in tries])
    assert answer.status_code == 200, answer.text
    found: dict[str, str] = answer.json()
    return list(found.values())


def running(host: Host) -> list[str]:
    """Units of the app that do anything."""
    lines = host.check_output(UNITS).splitlines()
    found = [line.split()[0] for line in lines if line.split()[2] == "active"]
    return [unit for unit in found if not unit.endswith(".slice")]


def traces(host: Host) -> set[str]:
    """Every file of the app, by name, and its users and databases."""
    pruned = " -o ".join(f"-path {path}" for path in LOGS)
    names = host.run(
        f"find / -xdev \\( {pruned} \\) -prune -o \\( -name rogue -o -name 'rogue[@.-]*' -o -name '*@rogue.*' "
        "-o -name '*[.-]rogue' -o -name '*[.-]rogue.*' \\) -print"
    ).stdout
    users = host.run("getent passwd rogue rogue-migrate; getent group rogue rogue-migrate").stdout
    databases = [name for name in psql(host, NAMES).split() if name.startswith("rogue")]
    return {*names.split(), *users.split(), *databases, *host.run("ls -d /run/rogue").stdout.split()}


def removed(host: Host) -> Any:
    return json.loads(host.check_output("forgectl status rogue --json"))["removed"]


@pytest.fixture
def rogue(host: Host, client_of: Callable[[str], httpx.Client]) -> httpx.Client:
    """A client of the app that leaves, which is in service when a test begins."""
    if host.file("/etc/forge/apps/rogue.toml").exists:
        answer(forgectl(host, "restore", "rogue", "--json"))
    client = client_of("rogue")
    if not answers(client):
        site(host, listed=True)
        until(lambda: answers(client), 10)
    return client


@pytest.mark.exhaustive
def test_an_app_in_no_entry_goes_on_and_site_says_so(host: Host, rogue: httpx.Client) -> None:
    """It keeps its database and its certificate, and nothing changes."""
    site(host, listed=True)
    said = site(host, listed=False)
    assert "rogue (rogue.example.org, www.rogue.example.org) is in no entry of the inventory" in " ".join(said.split())
    assert "changed=0 " in said, said
    assert answers(rogue)
    # A connection that it opens now is let in.
    assert tried(rogue, "query SELECT 1")


def test_remove_is_refused_while_there_is_an_entry(rogue: httpx.Client) -> None:
    """The next site.yml would bring it back."""
    done = playbook("--extra-vars", "only=rogue", name="playbooks/remove.yml")
    assert done.returncode != 0
    assert "take its entry out of `apps` first" in " ".join(done.stdout.split())
    assert answers(rogue)


def test_removal_and_return_under_load(host: Host, event: EventContext, rogue: httpx.Client) -> None:
    """The other app loses nothing; all that the app has is kept; a reboot of its units changes nothing."""
    stored = tried(rogue, "query INSERT INTO kept VALUES ('a word') RETURNING word", "write /var/lib/rogue/word")
    assert stored == ["[<Record word='a word'>]", "written"]
    before = traces(host)
    assert forgectl(host, "remove", "rogue", "--dry-run", "--json").rc == 0
    assert answers(rogue)
    with event("removal of another app", idle=True):
        kept = answer(forgectl(host, "remove", "rogue", "--json"))["kept"]
    assert not answers(rogue)
    assert running(host) == []
    assert host.run("systemctl is-enabled forge-boot@rogue.service forge-recycle@rogue.timer").stdout.split() == [
        "disabled",
        "disabled",
    ]
    assert {"/srv/rogue", "/var/lib/rogue"} <= traces(host)
    assert "the database rogue with its roles" in kept
    # Sockets and what leads to them are gone with the slots.
    assert {path for path in before - traces(host) if not path.startswith(("/run/", "/etc/systemd/", "/proc/"))} == {
        "/etc/nginx/forge/rogue.conf"
    }
    assert removed(host)["done"]
    # Twice is once.
    assert not answer(forgectl(host, "remove", "rogue", "--json"))["changed"]
    for command in (("rollback", "rogue"), ("recycle", "rogue"), ("secrets", "rotate", "rogue")):
        refused = answer(forgectl(host, *command, "--json"), 3)
        assert "sudo forgectl restore rogue" in refused["error"]
    # What timers and a boot call has nothing to do, and is no failure.
    host.check_output("systemctl start forge-recycle@rogue.service forge-rotate@rogue.service")
    host.check_output("forgectl boot rogue")
    host.check_output("systemctl start forge-certificates.service")
    assert running(host) == []
    assert host.check_output("systemctl --failed --plain --no-legend") == ""

    with event("return of another app", idle=True):
        answer(forgectl(host, "restore", "rogue", "--json"))
    assert answers(rogue)
    row, file = tried(rogue, "query SELECT DISTINCT word FROM kept", "read /var/lib/rogue/word")
    assert (row, set(file)) == (stored[0], {"x"})
    assert removed(host) is None
    assert not answer(forgectl(host, "restore", "rogue", "--json"))["changed"]
    # And the settings of the slot that it has now.
    assert before <= traces(host)
    assert host.run("systemctl is-enabled forge-boot@rogue.service").stdout.strip() == "enabled"


@pytest.mark.exhaustive
def test_a_removal_that_was_killed_goes_on(host: Host, rogue: httpx.Client) -> None:
    """While its slots drain; status says so meanwhile."""
    kill_forgectl(host, "draining", "remove", "rogue", delay=0.5)
    assert "HALF REMOVED" in host.check_output("forgectl status rogue")
    assert answer(forgectl(host, "remove", "rogue", "--json"))["changed"]
    assert running(host) == []
    assert not answers(rogue)


@pytest.mark.exhaustive
def test_the_entry_and_site_bring_it_back(host: Host, rogue: httpx.Client) -> None:
    """As a release does; a check says so."""
    answer(forgectl(host, "remove", "rogue", "--json"))
    assert "give rogue.example.org back" in " ".join(site(host, listed=True, options=("--check",)).split())
    assert not answers(rogue)
    site(host, listed=True)
    until(lambda: answers(rogue), 10)
    assert removed(host) is None
    assert "changed=0 " in site(host, listed=True)


def remove_playbook(host: Host) -> str:
    """Remove the app from the control machine, its entry gone; what was printed."""
    apps = {name: entry for name, entry in entries(host).items() if name != "rogue"}
    done = playbook("--extra-vars", json.dumps({"apps": apps, "only": "rogue"}), name="playbooks/remove.yml")
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_purge_leaves_nothing(host: Host, rogue: httpx.Client, say: Callable[[str], None]) -> None:
    """It asks, says what it will delete, and what it leaves: secrets, which are elsewhere."""
    assert answers(rogue)
    assert "sudo forgectl remove rogue" in answer(forgectl(host, *PURGE), 3)["error"]
    assert "the database rogue with its roles" in remove_playbook(host)
    for command in (("purge", "rogue"), ("purge", "rogue", "--yes-purge", "inbox")):
        assert forgectl(host, *command).rc == 2
    before = traces(host)
    planned = answer(forgectl(host, "purge", "rogue", "--dry-run", "--json"))["deleted"]
    assert any("/var/lib/rogue" in each for each in planned)
    assert traces(host) == before
    found = answer(forgectl(host, *PURGE))
    say("\n    ".join(["kept:", *found["kept"]]))
    assert any("secrets and AppRoles" in each for each in found["kept"])
    assert_gone(host)


def assert_gone(host: Host) -> None:
    """Nothing of it is left, and nobody misses it."""
    assert traces(host) == set()
    assert running(host) == []
    assert not answer(forgectl(host, *PURGE))["changed"]
    host.check_output("systemctl start forge-certificates.service")
    assert "ALERT rogue" not in host.check_output("journalctl --unit=forge-certificates --since=-1min --output=cat")


@pytest.mark.exhaustive
def test_a_purge_goes_on_where_it_was_killed_and_the_app_comes_anew(
    host: Host, event: EventContext, rogue: httpx.Client
) -> None:
    """The app that is then added loses the other no request."""
    assert answers(rogue)
    remove_playbook(host)
    assert "changed=0 " in remove_playbook(host)
    kill_forgectl(host, "dropping the database", "purge", "rogue", "--yes-purge", "rogue", delay=0.02)
    assert "HALF PURGED" in host.check_output("forgectl status rogue")
    assert "a purge that has begun" in answer(forgectl(host, "restore", "rogue", "--json"), 3)["error"]
    answer(forgectl(host, *PURGE))
    assert_gone(host)
    with event("another app is added", idle=True):
        site(host, listed=True)
    until(lambda: answers(rogue), 10)


@pytest.mark.exhaustive
def test_a_host_that_was_purged_is_as_the_inventory_says(host: Host, rogue: httpx.Client) -> None:
    """But for lines in lists, which are no use to anybody, until the next run: needrestart's, and PostgreSQL's."""
    assert answers(rogue)
    answer(forgectl(host, "remove", "rogue", "--json"))
    answer(forgectl(host, *PURGE))
    assert "is in no entry" not in site(host, listed=False)
    assert "changed=0 " in site(host, listed=False)


@pytest.mark.exhaustive
def test_an_app_is_changed_under_load(host: Host, event: EventContext, rogue: httpx.Client) -> None:
    """A release of the other app is none of this one."""
    apps = entries(host)
    apps["rogue"]["settings"] = {"FORGE_VARIANT": "another"}
    with event("release of another app"):
        deployed(only="rogue", apps=apps)
    assert answers(rogue)
    deployed(only="rogue")
