"""The scenario's server with the secrets: what may befall it, and what its administrator does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hvac
import requests
from forge_scenario import CONTAINER as HOST
from forge_scenario import Status, main_pid, playbook, podman, secrets_at, until
from forge_search import SHORTEST
from testinfra.host import Host

STATE = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "vault"
CONTAINER = f"forge-{os.environ['MOLECULE_SCENARIO_NAME']}-vault"
PATH = "forge/inbox/app"
"""Where the app's values are."""
ROLE = "forge-inbox-app"
"""The app's AppRole."""
SOURCE = ("--tags", "forgectl,secrets,postgresql,app")
"""Options of site.yml: the roles that another source of the secrets changes something for."""


def health(vault: hvac.Client) -> int:
    """The server's own status: 200 while it serves, 503 while it is sealed, 0 while it does not answer."""
    try:
        return int(vault.session.get(f"{vault.url}/v1/sys/health", timeout=5).status_code)
    except requests.RequestException:
        return 0


def unseal_key() -> str:
    """What its administrator types to unseal it."""
    return str(json.loads((STATE / "init.json").read_text())["keys"][0])


def unseal(vault: hvac.Client) -> None:
    """Make the server usable again."""
    until(lambda: health(vault), 20)
    if vault.sys.is_sealed():
        vault.sys.submit_unseal_key(unseal_key())
    until(lambda: health(vault) == 200, 20)


@contextmanager
def down(vault: hvac.Client) -> Iterator[None]:
    """Stop the server."""
    podman("stop", "--time", "0", CONTAINER)
    try:
        yield
    finally:
        podman("start", CONTAINER)
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
def changed(vault: hvac.Client, change: Callable[[dict[str, str]], Any], path: str = PATH) -> Iterator[None]:
    """Change the values at a path, and go back to those of before, each time as a new version."""
    before = secrets_at(vault, path)
    after = dict(before)
    change(after)
    write(vault, after, path)
    try:
        yield
    finally:
        write(vault, before, path)


def write(vault: hvac.Client, values: Mapping[str, Any], path: str = PATH) -> None:
    """Write a new version of a path."""
    vault.secrets.kv.v2.create_or_update_secret(path, dict(values))


def put(vault: hvac.Client, **values: str) -> None:
    """Change some of the app's values in a new version."""
    write(vault, secrets_at(vault, PATH) | values)


def accessors(vault: hvac.Client, role: str = ROLE) -> list[str]:
    """The secret ids that an AppRole has."""
    try:
        found: list[str] = vault.auth.approle.list_secret_id_accessors(role)["data"]["keys"]
    except hvac.exceptions.InvalidPath:
        return []
    return found


def destroy_secret_ids(vault: hvac.Client, role: str = ROLE) -> None:
    """Make every secret id of an AppRole worthless."""
    for accessor in accessors(vault, role):
        vault.auth.approle.destroy_secret_id_accessor(role, accessor)


def deliver(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Have site.yml give the host what it needs of secret ids."""
    run = playbook("--tags", "secrets", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def enrol(vault: hvac.Client, identity: str = "app", **limits: Any) -> None:
    """Give the host another secret id of an identity, without Ansible; `limits` are those of the API, as ttl."""
    role = f"forge-inbox-{identity}"
    wrapped = vault.write_data(f"auth/approle/role/{role}/secret-id", data=limits, wrap_ttl="60s")
    role_id = vault.auth.approle.read_role_id(role)["data"]["role_id"]
    command = f"exec --interactive {HOST} forgectl secrets enrol inbox --identity {identity} --role-id {role_id}"
    podman(*command.split(), input=wrapped["wrap_info"]["token"].encode())


def passed(container: str = CONTAINER) -> dict[str, str]:
    """Every secret that ever passed through a server which logs them (--audit), by a name."""
    names: dict[str, str] = {}
    for line in podman("exec", container, "cat", "/vault/data/wire.log").stdout.splitlines():
        entry = json.loads(line)
        for kind, secret in _secrets_in(entry):
            names.setdefault(secret, f"{kind} {len(names)} of {entry['request']['path']}")
    # What is shorter would be found by chance, and is no secret: the name of a database user, or no value at all.
    return {name: secret for secret, name in names.items() if len(secret) >= SHORTEST}


def _secrets_in(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The secrets in a request or an answer, each with its kind."""
    request, answer = entry["request"], entry.get("response") or {}
    if "wrap_info" in answer:
        yield "wrapping token", answer["wrap_info"]["token"]
    for holder in (request, entry.get("auth") or {}, answer.get("auth") or {}):
        if token := holder.get("client_token"):
            yield "token", token
    for data in (request.get("data") or {}, answer.get("data") or {}):
        for key in ("secret_id", "token", "password"):
            if isinstance(data.get(key), str):
                yield key, data[key]
        if request.get("mount_type") == "kv" and isinstance(data.get("data"), dict):
            yield from (("value", text) for text in _texts(data["data"]))


def _texts(value: Any) -> Iterator[str]:
    """All text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def ends(values: Mapping[str, str]) -> list[str]:
    """The random beginning and end of each value, which no encoding changes."""
    return [part for value in values.values() for part in (value[:16], value[-16:])]


def cursor(host: Host) -> str:
    """Where the journal ends now."""
    command = "journalctl --sync && journalctl --show-cursor --lines=0 | sed --quiet 's/^-- cursor: //p'"
    return str(host.check_output(command))


def journal(host: Host, since: str, *filters: str) -> list[str]:
    """The lines of the journal since then, as journalctl's filters choose them."""
    command = "journalctl --sync && journalctl --no-pager --output=cat --after-cursor=%s" + " %s" * len(filters)
    return str(host.run(command, since, *filters).stdout).splitlines()


def said(host: Host, since: str, unit: str) -> list[str]:
    """What forge-launch has said in a unit since then; systemd's own lines apart."""
    return journal(host, since, f"--unit={unit}", "_COMM=forge-launch")


def timer(host: Host) -> None:
    """Do what the timer of rotation does, and wait for its unit; whether that failed is for the alerts to say."""
    host.run("systemctl start forge-rotate@inbox.service")


def alerts(host: Host, since: str) -> list[str]:
    """The alert lines of the app since then, as on-call finds them."""
    return journal(host, since, "--priority=err", "--grep=^ALERT inbox: ")


def environment(host: Host, unit: str) -> dict[str, str]:
    """The environment of a unit's main process; asked for past Ansible, which writes down what it does."""
    raw = podman("exec", HOST, "cat", f"/proc/{main_pid(host, unit)}/environ").stdout
    return dict(pair.decode().split("=", 1) for pair in raw.split(b"\0") if pair)


def serving(host: Host, status: Status) -> dict[str, str]:
    """The environment of what serves."""
    return environment(host, f"inbox@{status()['live']['slot']}.service")
