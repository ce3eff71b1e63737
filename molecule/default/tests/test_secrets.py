"""Secrets come from Vault at each start and are nowhere else; a start that can't have them says why, in one line."""

from __future__ import annotations

import base64
import json
import re

import httpx
import hvac
import pytest
from forge_scenario import ready, secrets_at, until
from forge_vault import PATH, cursor, ends, said, sealed
from testinfra.host import Host

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


def test_start_without_secrets_says_why(host: Host, vault: hvac.Client, client: httpx.Client, live: str) -> None:
    """One line an attempt with the cause and what to do; tried again until it works, by itself."""
    since = cursor(host)
    with sealed(vault):
        host.check_output("systemctl restart --no-block %s", live)
        lines = until(lambda: len(found := said(host, since, live)) >= 2 and found, 30)
        assert all(re.match(r"forge-launch: inbox: .*is sealed or not initialised; unseal it", line) for line in lines)
        assert host.service(live).systemd_properties["StartLimitIntervalUSec"] == "0"
    assert until(lambda: ready(client), 30, every=0.5)


def test_secrets_are_in_the_process_and_nowhere_else(host: Host, vault: hvac.Client, live: str) -> None:
    """No file, no property of a unit, no argument, no journal entry; and no process that another user may read."""
    migration = secrets_at(vault, "forge/inbox/migrate")
    values = secrets_at(vault, PATH) | {f"migrate_{key}": value for key, value in migration.items()}
    encoded = [base64.b64encode(part.encode()).decode() for part in ends(values)]
    environment = host.check_output("cat /proc/%s/environ", host.service(live).systemd_properties["MainPID"])
    assert all(needle in environment for needle in ends(secrets_at(vault, PATH)))
    # One copy on purpose, or a search that finds nothing would prove nothing.
    host.check_output("echo %s | base64 --decode > /dev/shm/on-purpose", encoded[0])
    folders = "/etc /srv /opt /var /home /root /tmp /usr/local /run /dev/shm"
    holding = host.check_output(f"python3 -c %s %s {folders}", SEARCH, " ".join(encoded))
    host.check_output("rm /dev/shm/on-purpose")
    assert holding == "/dev/shm/on-purpose"
    seen = "\n".join(
        # The journal has the length of a text of several lines before it, in binary.
        host.run_expect([0], command).stdout_bytes.decode(errors="ignore")
        for command in (
            "systemctl show '*'",
            "ps axeww --format=command",
            "runuser --user=nobody -- ps axeww --format=command",
            "journalctl --no-pager --output=export",
        )
    )
    # root's `ps` shows the environment of every process, the app's too: only there.
    shown = [line for line in seen.splitlines() if any(needle in line for needle in ends(values))]
    assert all("FORGE_SIGNING_KEY=" in line and "gunicorn" in line for line in shown), shown


def test_sealed_ids_are_for_root_alone(host: Host) -> None:
    """Neither the app's user nor the migration's can read the credentials, or the key that they are sealed with."""
    names = host.check_output("ls /etc/credstore.encrypted").split()
    sealed = (f"/etc/credstore.encrypted/{name}" for name in names)
    for path in (*sealed, "/var/lib/systemd/credential.secret"):
        for user in ("inbox", "inbox-migrate", "www-data"):
            assert "Permission denied" in host.run("runuser --user=%s -- cat %s", user, path).stderr
    identities = ("app", "migrate", "rotate")
    assert names == sorted(f"forge.inbox.{which}.{name}" for which in identities for name in ("role-id", "secret-id"))


def test_token_of_a_start_is_revoked(host: Host, vault: hvac.Client, client: httpx.Client, live: str) -> None:
    """A start leaves no token behind."""

    def tokens() -> set[str]:
        return set(vault.auth.token.list_accessors()["data"]["keys"])

    before = tokens()
    host.check_output("systemctl restart %s", live)
    assert until(lambda: ready(client), 30, every=0.5)
    assert tokens() <= before


def test_identities_are_accepted_and_complete(host: Host) -> None:
    """As forgectl says, and shows no value."""
    found = json.loads(host.check_output("forgectl secrets check inbox --json"))
    states = {name: identity["state"] for name, identity in found["identities"].items()}
    assert states == dict.fromkeys(("app", "migrate", "rotate"), "ok")
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
