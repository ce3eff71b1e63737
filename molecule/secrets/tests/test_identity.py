"""The host's own identity: delivered sealed, renewed before its end, worthless elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import hvac
import pytest
from forge_events import Provisioning, forgectl, run_playbook
from forge_scenario import CONTAINER, podman, ready, until
from forge_vault import ROLE, STATE, deliver, destroy_secret_ids, timer
from testinfra.host import Host

Status = Callable[[], dict[str, Any]]

IDENTITIES = ("app", "migrate", "rotate")
ELSEWHERE = "192.0.2.0/24"
# Somebody on the way: looks into the envelope before it is handed over.
INTERCEPTOR = """\
#!/usr/bin/python3
import ssl, subprocess, sys, tomllib, urllib.request
command = ["/opt/forge/forgectl/bin/forgectl", *sys.argv[1:]]
if "enrol" not in sys.argv:
    sys.exit(subprocess.run(command).returncode)
token = sys.stdin.read()
with open("/etc/forge/apps/inbox.toml", "rb") as file:
    secrets = tomllib.load(file)["secrets"]
url, headers = secrets["address"] + "/v1/sys/wrapping/unwrap", {"X-Vault-Token": token.strip()}
request = urllib.request.Request(url, method="POST", headers=headers)
urllib.request.urlopen(request, context=ssl.create_default_context(cafile=secrets["ca_file"])).read()
sys.exit(subprocess.run(command, input=token.encode()).returncode)
"""


@pytest.fixture(scope="module", autouse=True)
def _provisioned(host: Host, provisioning: Provisioning) -> None:
    """As the inventory says."""
    provisioning.ensure(host)


@pytest.fixture
def intercepted(host: Host) -> Iterator[None]:
    """Somebody on the host opens every wrapped secret id first."""
    command = "/usr/local/sbin/forgectl"
    host.check_output("mv %s %s.real", command, command)
    write = f"cat > {command} && chmod 0755 {command}"
    podman("exec", "--interactive", CONTAINER, "sh", "-c", write, input=INTERCEPTOR.encode())
    yield
    host.check_output("mv %s.real %s", command, command)


# Says of each secret id that it was made long ago and ends in two days.
AGE = """
import datetime, json, pathlib
path = pathlib.Path("/var/lib/forge/inbox/identities.json")
found = json.loads(path.read_text())
soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=2)
for record in found.values():
    record.update(issued="2020-01-01T00:00:00+00:00", expires=soon.isoformat())
path.write_text(json.dumps(found))
"""


def secret_id(identity: str = "app") -> str:
    """The secret id of an identity, as only root on the host can have it."""
    path = f"/etc/credstore.encrypted/forge.inbox.{identity}.secret-id"
    command = ("exec", CONTAINER, "systemd-creds", "decrypt", "--name=secret-id", path, "-")
    return str(podman(*command, text=True).stdout)


def logs_in(vault: hvac.Client, secret: str, role: str = ROLE) -> bool:
    """Whether a secret id works from here, which is not the host."""
    here = hvac.Client(url=vault.url, session=vault.session)
    role_id = vault.auth.approle.read_role_id(role)["data"]["role_id"]
    try:
        here.auth.approle.login(role_id, secret)
    except hvac.exceptions.VaultError:
        return False
    here.logout(revoke_token=True)
    return True


def accessor(host: Host, identity: str) -> str:
    """What the host knows its secret id of an identity by; it is no secret."""
    return str(json.loads(host.check_output("cat /var/lib/forge/inbox/identities.json"))[identity]["accessor"])


def accessors(vault: hvac.Client, identity: str) -> list[str]:
    """The secret ids that an identity's AppRole has."""
    try:
        found: list[str] = vault.auth.approle.list_secret_id_accessors(f"forge-inbox-{identity}")["data"]["keys"]
    except hvac.exceptions.InvalidPath:
        return []
    return found


def check(host: Host) -> dict[str, str]:
    """The state of each identity."""
    found = json.loads(forgectl(host, "secrets", "check", "inbox", "--json").stdout)
    return {name: identity["state"] for name, identity in found["identities"].items()}


def test_control_machine_gets_wrapped_secret_ids_and_nothing_else(vault: hvac.Client) -> None:
    """Its token opens no secret, gets no bare secret id, and none that stays wrapped for long."""
    token = (STATE / "control.token").read_text().strip()
    control = hvac.Client(url=vault.url, session=vault.session, token=token)
    for identity in IDENTITIES:
        role = f"auth/approle/role/forge-inbox-{identity}/secret-id"
        assert control.write_data(role, data={}, wrap_ttl="120s")["wrap_info"]["token"]
        for too_long in (None, "1h"):
            with pytest.raises(hvac.exceptions.VaultError):
                control.write_data(role, data={}, wrap_ttl=too_long)
    for path in ("secret/data/forge/inbox/app", "secret/data/forge/inbox/migrate", "sys/policies/acl/forge-control"):
        with pytest.raises(hvac.exceptions.Forbidden):
            control.read(path)


def test_who_am_i(host: Host) -> None:
    """As whom Vault knows the host, under which policies, and until when; no secret in it."""
    found = json.loads(host.check_output("forgectl secrets whoami inbox --json"))
    for name in IDENTITIES:
        identity = found["identities"][name]
        assert identity["approle"] == f"forge-inbox-{name}"
        assert f"forge-inbox-{name}" in identity["policies"]
        assert identity["token_ttl"] <= 300
        assert identity["issued"] < identity["expires"]
    assert secret_id() not in json.dumps(found)


def test_check_run_asks_for_nothing(host: Host, vault: hvac.Client) -> None:
    """It says that it would deliver, and makes no secret id."""
    destroy_secret_ids(vault)
    dry = deliver("--check", "--diff")
    assert "changed=0 " not in dry.stdout
    assert accessors(vault, "app") == []
    assert check(host)["app"] == "rejected"


@pytest.mark.usefixtures("intercepted")
def test_wrapping_token_that_was_used_stops_the_run(host: Host, vault: hvac.Client) -> None:
    """And says that it was intercepted: the secret id in it was never sealed on the host."""
    destroy_secret_ids(vault)
    run = run_playbook(host, "site.yml", options=("--tags", "secrets"))
    assert run.returncode == 2, run.stdout
    assert re.search(r"someone else unwrapped it; .*treat the secret id as stolen", run.stdout), run.stdout
    assert check(host)["app"] == "rejected"


def test_rejected_secret_id_is_replaced_once(host: Host, vault: hvac.Client) -> None:
    """The run delivers one, that works; the next one has nothing to do."""
    destroy_secret_ids(vault)
    assert "changed=0 " not in deliver().stdout
    assert check(host)["app"] == "ok"
    assert accessors(vault, "app") == [accessor(host, "app")]
    assert "changed=0 " in deliver().stdout
    assert accessors(vault, "app") == [accessor(host, "app")]


def test_secret_id_near_its_end_is_replaced(host: Host, vault: hvac.Client, status: Status) -> None:
    """By the timer's unit, each of the three, in time: the old ones are destroyed, and no slot is touched."""
    before = status()["live"]
    old = {identity: accessor(host, identity) for identity in IDENTITIES}
    host.check_output("python3 -c %s", AGE)
    assert set(check(host).values()) == {"expiring"}
    timer(host)
    assert check(host) == dict.fromkeys(IDENTITIES, "ok")
    for identity in IDENTITIES:
        assert old[identity] not in accessors(vault, identity)
        assert accessor(host, identity) in accessors(vault, identity)
    assert status()["live"] == before


@pytest.mark.exhaustive
def test_bound_to_addresses(host: Host, vault: hvac.Client, client: httpx.Client, live: str) -> None:
    """By the inventory: with wrong ones the run says so, and the host keeps what works; else a theft is in vain."""

    def provision(*cidrs: str) -> subprocess.CompletedProcess[str]:
        tags = ("--tags", "forgectl,secrets")
        return run_playbook(host, "site.yml", options=tags, secrets_bound_cidrs=list(cidrs))

    stolen = secret_id()
    assert logs_in(vault, stolen)
    run = provision(ELSEWHERE)
    assert run.returncode == 2, run.stdout
    assert "refused the address of this host" in run.stdout
    host.check_output("systemctl restart %s", live)
    assert until(lambda: ready(client), 30, every=0.2)

    address = f"{host.ansible.get_variables()['ansible_host']}/32"
    run = provision(address)
    assert run.returncode == 0, run.stdout
    assert check(host) == dict.fromkeys(IDENTITIES, "ok")
    whoami = json.loads(host.check_output("forgectl secrets whoami inbox --json"))
    for identity in IDENTITIES:
        assert whoami["identities"][identity]["bound_cidrs"] == [address]
        assert not logs_in(vault, secret_id(identity), f"forge-inbox-{identity}")
    assert not logs_in(vault, stolen)

    run = provision()
    assert run.returncode == 0, run.stdout
    assert logs_in(vault, secret_id())
