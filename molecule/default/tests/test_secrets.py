"""Secrets come from Vault at each start and are nowhere else; a start that can't have them says why, in one line."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import hvac
import pytest
import requests
from forge_scenario import playbook, podman, secrets_at, until
from testinfra.host import Host

STATE = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "vault"
VAULT = f"forge-{os.environ['MOLECULE_SCENARIO_NAME']}-vault"
PATH = "forge/inbox/app"
ROLE = "forge-inbox-app"

# Looks for text in all files below some folders, and prints the files that hold any; what runs the search apart.
SEARCH = """
import base64, os, sys
needles = [base64.b64decode(text) for text in sys.argv[1].split()]
for top in sys.argv[2:]:
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                content = open(path, "rb").read()
                if any(needle in content for needle in needles):
                    print(path)
"""


def unseal(vault: hvac.Client) -> None:
    """Make the server usable again."""
    until(lambda: health(vault), 20)
    if vault.sys.is_sealed():
        vault.sys.submit_unseal_key(json.loads((STATE / "init.json").read_text())["keys"][0])
    until(lambda: health(vault) == 200, 20)


def health(vault: hvac.Client) -> int:
    """The server's own status: 200 while it serves, 503 while it is sealed, 0 while it does not listen."""
    try:
        return int(vault.session.get(f"{vault.url}/v1/sys/health", timeout=5).status_code)
    except requests.ConnectionError:
        return 0


@contextmanager
def down(vault: hvac.Client) -> Iterator[None]:
    """Stop the server."""
    podman("stop", "--time", "0", VAULT)
    try:
        yield
    finally:
        podman("start", VAULT)
        unseal(vault)


@contextmanager
def sealed(vault: hvac.Client) -> Iterator[None]:
    """Seal the server."""
    vault.sys.seal()
    try:
        yield
    finally:
        unseal(vault)


@contextmanager
def changed(vault: hvac.Client, change: Callable[[dict[str, str]], Any]) -> Iterator[None]:
    """Change the app's values."""
    before = secrets_at(vault, PATH)
    after = dict(before)
    change(after)
    vault.secrets.kv.v2.create_or_update_secret(PATH, after)
    try:
        yield
    finally:
        vault.secrets.kv.v2.create_or_update_secret(PATH, before)


@contextmanager
def rejected(vault: hvac.Client) -> Iterator[None]:
    """Destroy the host's secret ids; site.yml delivers a new one, and shows neither it nor its wrapping token."""
    for accessor in vault.auth.approle.list_secret_id_accessors(ROLE)["data"]["keys"]:
        vault.auth.approle.destroy_secret_id_accessor(ROLE, accessor)
    try:
        yield
    finally:
        run = playbook("--tags", "secrets", "-vvv")
        assert run.returncode == 0, run.stdout
        assert re.findall(r"(?<![\w.])(?:hv[sb]|s)\.[A-Za-z0-9_-]{20,}", run.stdout + run.stderr) == []
        assert [needle for needle in needles(secrets_at(vault, PATH)) if needle in run.stdout + run.stderr] == []


def needles(values: dict[str, str]) -> list[str]:
    """The random beginning and end of each value, which no encoding changes."""
    return [part for value in values.values() for part in (value[:16], value[-16:])]


CAUSES = {
    "down": (down, r"is unreachable \((Connection refused|No route to host|timed out)\); start it"),
    "sealed": (sealed, r"is sealed or not initialised; unseal it"),
    "rejected": (rejected, r"rejected this host's role id or secret id; .*run site\.yml with a Vault token"),
    "missing": (
        lambda vault: changed(vault, lambda values: values.pop("signing_key")),
        r"key signing_key is missing at secret/forge/inbox/app; FORGE_SIGNING_KEY needs it: write it there",
    ),
    "empty": (
        lambda vault: changed(vault, lambda values: values.update(signing_key="")),
        r"key signing_key at secret/forge/inbox/app is empty; FORGE_SIGNING_KEY needs a value: write it there",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_start_without_secrets_says_why(
    host: Host, vault: hvac.Client, client: httpx.Client, live: str, cause: str
) -> None:
    """One line an attempt with the cause and what to do, no value in it; tried again until it works, by itself."""
    broken, expected = CAUSES[cause]
    values = secrets_at(vault, PATH)
    cursor = host.check_output("journalctl --show-cursor --lines=0 | sed --quiet 's/^-- cursor: //p'")

    def said() -> list[str]:
        """The unit's own lines since; systemd's apart."""
        command = "journalctl --no-pager --output=cat --after-cursor=%s --unit=%s _COMM=forge-launch"
        return str(host.run(command, cursor, live).stdout).splitlines()

    with broken(vault):
        host.check_output("systemctl restart --no-block %s", live)
        lines = until(lambda: (found := said()) and len(found) >= 2 and found, 30)
        assert all(re.match(rf"forge-launch: inbox: .*{expected}", line) for line in lines), lines
        assert host.service(live).systemd_properties["StartLimitIntervalUSec"] == "0"
    journal = host.check_output("journalctl --no-pager --output=export --after-cursor=%s", cursor)
    assert [needle for needle in needles(values) if needle in journal] == []
    assert until(lambda: client.get("/ready").status_code == 200, 30, every=0.5)


def test_secrets_are_in_the_process_and_nowhere_else(host: Host, vault: hvac.Client, live: str) -> None:
    """No file, no property of a unit, no argument, no journal entry; and no process that another user may read."""
    migration = secrets_at(vault, "forge/inbox/migrate")
    values = secrets_at(vault, PATH) | {f"migrate_{key}": value for key, value in migration.items()}
    encoded = [base64.b64encode(part.encode()).decode() for part in needles(values)]
    environment = host.check_output("cat /proc/%s/environ", host.service(live).systemd_properties["MainPID"])
    assert all(needle in environment for needle in needles(secrets_at(vault, PATH)))
    # One copy on purpose, or a search that finds nothing would prove nothing.
    host.check_output("echo %s | base64 --decode > /dev/shm/on-purpose", encoded[0])
    folders = "/etc /srv /opt /var /home /root /tmp /usr/local /run /dev/shm"
    holding = host.check_output(f"python3 -c %s %s {folders}", SEARCH, " ".join(encoded))
    host.check_output("rm /dev/shm/on-purpose")
    assert holding == "/dev/shm/on-purpose"
    seen = "\n".join(
        host.check_output(command)
        for command in (
            "systemctl show '*'",
            "ps axeww --format=command",
            "runuser --user=nobody -- ps axeww --format=command",
            "journalctl --no-pager --output=export",
        )
    )
    # root's `ps` shows the environment of every process, the app's too: only there.
    shown = [line for line in seen.splitlines() if any(needle in line for needle in needles(values))]
    assert all("FORGE_SIGNING_KEY=" in line and "gunicorn" in line for line in shown), shown


def test_sealed_ids_are_for_root_alone(host: Host) -> None:
    """Neither the app's user nor the migration's can read the credentials, or the key that they are sealed with."""
    names = host.check_output("ls /etc/credstore.encrypted").split()
    sealed = (f"/etc/credstore.encrypted/{name}" for name in names)
    for path in (*sealed, "/var/lib/systemd/credential.secret"):
        for user in ("inbox", "inbox-migrate", "www-data"):
            assert "Permission denied" in host.run("runuser --user=%s -- cat %s", user, path).stderr
    identities = ("app", "migrate")
    assert names == sorted(f"forge.inbox.{which}.{name}" for which in identities for name in ("role-id", "secret-id"))


def test_token_of_a_start_is_revoked(host: Host, vault: hvac.Client, client: httpx.Client, live: str) -> None:
    """A start leaves no token behind."""

    def tokens() -> set[str]:
        return set(vault.auth.token.list_accessors()["data"]["keys"])

    before = tokens()
    host.check_output("systemctl restart %s", live)
    assert until(lambda: client.get("/ready").status_code == 200, 30, every=0.5)
    assert tokens() <= before


def test_identities_are_accepted_and_complete(host: Host) -> None:
    """As forgectl says, and shows no value."""
    found = json.loads(host.check_output("forgectl secrets check inbox --json"))
    assert {name: identity["state"] for name, identity in found["identities"].items()} == {"app": "ok", "migrate": "ok"}
    assert found["problems"] == []


@pytest.mark.parametrize(("own", "other"), [("app", "migrate"), ("migrate", "app")])
def test_identities_read_their_own_path_only(vault: hvac.Client, own: str, other: str) -> None:
    """The app may not have the migration's password, nor the migration the app's secrets."""
    role = f"forge-inbox-{own}"
    secret_id = vault.auth.approle.generate_secret_id(role)["data"]["secret_id"]
    identity = hvac.Client(url=vault.url, session=vault.session)
    try:
        identity.auth.approle.login(vault.auth.approle.read_role_id(role)["data"]["role_id"], secret_id)
        assert secrets_at(identity, f"forge/inbox/{own}")
        with pytest.raises(hvac.exceptions.Forbidden):
            secrets_at(identity, f"forge/inbox/{other}")
    finally:
        identity.logout(revoke_token=True)
        vault.auth.approle.destroy_secret_id(role, secret_id)
