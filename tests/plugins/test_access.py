"""Who would be locked out is told before anything changes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from forge.access import Connection, host_problems
from forge.specs import read_options

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = read_options(ROOT / "roles", "hardening")
KEY = Connection("ssh", password=False)
SSH = {"user": "admin", "client": "198.51.100.7", "keys": 1, "ports": [22], "includes": True}


def found(
    values: dict[str, Any] | None = None,
    ssh: dict[str, Any] | None = None,
    connection: Connection = KEY,
    firewalls: dict[str, str] | None = None,
) -> list[str]:
    """Where there is a problem, and what was found there."""
    probe = {"ssh": SSH | (ssh or {}), "firewalls": firewalls or {}}
    return [f"{item.where}: {item.found}" for item in host_problems(OPTIONS, values or {}, probe, connection)]


@pytest.mark.parametrize(
    ("values", "ssh"),
    [
        ({}, {}),
        ({}, {"keys": None}),
        ({"hardening_ssh_root_login": True}, {"user": "root"}),
        ({"hardening_ssh_from": ["192.0.2.0/24", "198.51.100.7"]}, {}),
        ({"hardening_ssh_from": ["2001:db8::/32"]}, {"client": "2001:db8::7"}),
        # That it is no network is reported as such.
        ({"hardening_ssh_from": ["office"]}, {}),
    ],
)
def test_who_gets_in_afterwards(values: dict[str, Any], ssh: dict[str, Any]) -> None:
    """By a key of their own, from a network that may, as a user who may."""
    assert found(values, ssh) == []


def test_who_would_not() -> None:
    """By a password, without a key, as root, from elsewhere; or not over SSH at all."""
    where = "the connection to the host"
    password = Connection("ssh", password=True)
    assert found(connection=password) == [f"{where}: a password (ansible_password, or --ask-pass)"]
    # The key is what is missing in both cases.
    assert len(found(connection=password, ssh={"keys": 0})) == 1
    assert found(ssh={"keys": 0}) == ["authorized keys of admin on the host: none"]
    assert found(ssh={"user": "root"}) == [f"{where}: root"]
    assert found({"hardening_ssh_from": ["192.0.2.0/24"]}) == [
        "hardening_ssh_from: 198.51.100.7 is in none of 192.0.2.0/24"
    ]
    assert found(connection=Connection("local", password=False)) == [f"{where}: local"]
    assert found(ssh={"client": ""}) == [f"{where}: no session of sshd's above Ansible's own"]


def test_what_has_a_say_besides() -> None:
    """Other firewalls, each with its way out; and an sshd that would not read the drop-in."""
    others = {"ufw": "it is enabled", "/etc/nftables.conf": "rules"}
    assert found(firewalls=others) == ["ufw on the host: it is enabled", "/etc/nftables.conf on the host: rules"]
    assert found(ssh={"includes": False}) == ["/etc/ssh/sshd_config on the host: none"]


@pytest.mark.parametrize(
    ("run", "skip", "judged"),
    [
        (["all"], [], True),
        (["hardening"], [], True),
        (["all"], ["hardening"], False),
        (["app"], [], False),
    ],
)
def test_the_connection_is_judged_where_the_role_runs(run: list[str], skip: list[str], judged: bool) -> None:
    """So that --skip-tags, which a refusal names, helps."""
    spec = importlib.util.spec_from_file_location("preflight_action", ROOT / "plugins/action/preflight.py")
    assert spec is not None
    assert spec.loader is not None
    action = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(action)
    play = {"ansible_run_tags": run, "ansible_skip_tags": skip, "ansible_play_role_names": ["base", "hardening"]}
    assert action._roles_that_run(play) == (["base", "hardening"] if judged else ["base"])
