"""New secrets go into service under load, and nobody notices; what is no good leaves the old ones serving."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import hvac
import pytest
from forge_events import (
    NGINX_AWAY,
    Provisioning,
    Unnoticed,
    answer,
    append,
    assert_one_live,
    forgectl,
    history,
    kill_forgectl,
    psql,
    release,
    run_playbook,
    settle,
)
from forge_scenario import secrets_at
from forge_vault import PATH, alerts, changed, cursor, down, put, sealed, serving, timer
from testinfra.host import Host

Status = Callable[[], dict[str, Any]]

OF_A_START = ("PROMETHEUS_MULTIPROC_DIR", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID")
"""Variables that are others with every start."""
CHANGE = ("secrets", "rotate", "inbox", "--database-password", "--json")
# An app around the app, which turns unready with the first traffic that it gets, if its secret says so.
TURNS_UNREADY = """
import os as _os

_inner, _served = app, False


async def app(scope, receive, send):
    global _served
    if scope["type"] == "http" and scope["path"] == "/ready":
        if _os.environ["PARTNER_TOKEN"].startswith("bad-") and _served:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
    elif scope["type"] == "http":
        _served = True
    await _inner(scope, receive, send)
"""
# Runs a command, and kills it with SIGKILL as soon as a role of PostgreSQL has another verifier.
KILL_AT_VERIFIER = """
import os, pwd, subprocess, sys, time
import psycopg
role, command = sys.argv[1], sys.argv[2:]
os.seteuid(pwd.getpwnam("postgres").pw_uid)
with psycopg.connect("host=/var/run/postgresql dbname=postgres user=postgres", autocommit=True) as connection:
    os.seteuid(0)
    def verifier():
        return connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (role,)).fetchone()
    before = verifier()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and verifier() == before:
        time.sleep(0.001)
    process.kill()
    print(process.wait(), verifier() != before)
"""


@pytest.fixture(scope="module", autouse=True)
def _provisioned(host: Host, provisioning: Provisioning) -> None:
    """As the inventory says."""
    provisioning.ensure(host)


def roles(host: Host) -> set[str]:
    """The login roles of the app that have a password."""
    return set(
        psql(host, "SELECT rolname FROM pg_authid WHERE rolname ~ '^inbox_app' AND rolpassword IS NOT NULL").split()
    )


def test_load_sees_what_fails(unnoticed: Unnoticed, host: Host) -> None:
    """The control: without Nginx for a moment, somebody notices."""
    with pytest.raises(AssertionError), unnoticed("control: Nginx stopped"):
        host.check_output(NGINX_AWAY)


def test_database_password(unnoticed: Unnoticed, host: Host, vault: hvac.Client, status: Status, source: Path) -> None:
    """The other role serves with a new password, the old one has none any more; a deploy goes on with it."""
    old, old_values = serving(host, status), secrets_at(vault, PATH)
    (used,) = roles(host)
    with unnoticed("rotation of the database password"):
        run = run_playbook(host, "playbooks/rotate_secrets.yml", database_password=True)
        assert run.returncode == 0, run.stdout
    new = serving(host, status)
    (now_used,) = roles(host)
    assert now_used != used
    assert f"//{now_used}@" in new["FORGE_DATABASE_URL"]
    assert new["FORGE_DATABASE_PASSWORD"] != old["FORGE_DATABASE_PASSWORD"]
    values = secrets_at(vault, PATH)
    assert (values["database_user"], values["database_password"]) == (now_used, new["FORGE_DATABASE_PASSWORD"])
    kept = {name: value for name, value in old_values.items() if not name.startswith("database_")}
    assert kept.items() <= values.items()
    append(source / "src/inbox/main.py", TURNS_UNREADY)
    with unnoticed("a deploy after it"):
        answer(release(host, source))
    assert roles(host) == {now_used}
    assert f"//{now_used}@" in serving(host, status)["FORGE_DATABASE_URL"]


# What is wrong with a version: exit code for an operator, and what on-call is told.
BAD: dict[str, tuple[Callable[[dict[str, str]], Any], int, str]] = {
    "fails its check": (lambda values: values.pop("partner_token"), 6, r"key partner_token is missing"),
    "is refused by the app": (
        lambda values: values.update(signing_key=token_urlsafe(16)),
        4,
        r"expected /ready of .* to answer 200",
    ),
    "turns unready": (lambda values: values.update(partner_token=f"bad-{token_urlsafe(32)}"), 7, r"and .* was ready"),
}


@pytest.mark.parametrize("why", BAD)
def test_bad_rotation(unnoticed: Unnoticed, host: Host, vault: hvac.Client, status: Status, why: str) -> None:
    """What served goes on with the old values; on-call is told each time, and the timer does not try it again.

    It may have had the traffic: the code is that of the deploy above, which turns unready with a value like that.
    """
    change, code, message = BAD[why]
    before, values = status()["live"], serving(host, status)
    since = cursor(host)
    with unnoticed(f"a version that {why}"), changed(vault, change):
        timer(host)
        settle(status)
        (alert,) = alerts(host, since)
        assert re.search(message, alert), alert
        last = history(host)[-1]
        assert (last["action"], last["outcome"]) == ("rotation", "rolled back" if code == 7 else "failed")
        timer(host)
        settle(status)
        assert history(host)[-1] == last
        assert len(alerts(host, since)) == 2
        # An operator may have it tried again.
        if code != 7:
            again = forgectl(host, "secrets", "rotate", "inbox")
            assert (again.rc, bool(re.search(message, again.stderr))) == (code, True), again.stderr
    assert_one_live(host, status, before["release"])
    assert (status()["live"]["slot"], serving(host, status)) == (before["slot"], values)


@pytest.mark.parametrize(
    "by", ["the timer", pytest.param("playbooks/rotate_secrets.yml", marks=pytest.mark.exhaustive)]
)
def test_good_rotation(unnoticed: Unnoticed, host: Host, vault: hvac.Client, status: Status, by: str) -> None:
    """The same release in the other slot with the new value; the rest of its environment is as it was."""
    before, old = status()["live"], serving(host, status)
    fresh = token_urlsafe(48)
    since = cursor(host)
    with unnoticed(f"rotation by {by}"):
        put(vault, partner_token=fresh)
        if by == "the timer":
            timer(host)
        else:
            run = run_playbook(host, by)
            assert run.returncode == 0, run.stdout
    after, new = status()["live"], serving(host, status)
    assert (after["release"], after["slot"] != before["slot"]) == (before["release"], True)
    assert new["PARTNER_TOKEN"] == fresh
    assert {name for name in new if new[name] != old[name]} <= {"PARTNER_TOKEN", *OF_A_START}
    assert_one_live(host, status, before["release"])
    assert (history(host)[-1]["action"], history(host)[-1]["outcome"]) == ("rotation", "live")
    timer(host)
    assert status()["live"] == after
    assert alerts(host, since) == []


STEPS = {
    "the verifier was set": "",
    "both were written": " instead of ",
    "the traffic moves": "swap ...",
}


@pytest.mark.exhaustive
def test_killed_while_the_database_password_changes(unnoticed: Unnoticed, host: Host, status: Status) -> None:
    """SIGKILL after each step: what serves has a password that works; the same command again ends it."""
    before = status()["live"]["release"]
    with unnoticed("forgectl killed while it rotates the database password"):
        for step, said in STEPS.items():
            (used,) = roles(host)
            if said:
                kill_forgectl(host, said, *CHANGE)
            else:
                idle = "inbox_app" if used == "inbox_app_2" else "inbox_app_2"
                python = "/opt/forge/forgectl/bin/python -c %s %s forgectl" + " %s" * len(CHANGE)
                assert host.check_output(python, KILL_AT_VERIFIER, idle, *CHANGE) == "-9 True"
            ended = answer(forgectl(host, *CHANGE))
            assert ended["verdict"] == "live", (step, ended)
            assert_one_live(host, status, before)
            assert len(roles(host)) == 1, step
    (used,) = roles(host)
    assert f"//{used}@" in serving(host, status)["FORGE_DATABASE_URL"]


@pytest.mark.exhaustive
def test_vault_restarted_while_the_app_runs(
    unnoticed: Unnoticed, host: Host, vault: hvac.Client, status: Status
) -> None:
    """Stopped, started, sealed, unsealed: clients notice nothing, and no slot moves."""
    before = status()["live"]
    with unnoticed("Vault stopped, and sealed"):
        for broken in (down, sealed):
            with broken(vault):
                assert forgectl(host, "secrets", "check", "inbox").rc == 6
        assert forgectl(host, "secrets", "check", "inbox").rc == 0
    assert status()["live"] == before
