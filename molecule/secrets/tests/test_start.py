"""A start that can't have its secrets says why and fails closed; it works by itself as soon as it can have them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import httpx
import hvac
import pytest
from forge_events import Provisioning, answer, forgectl, release, settle
from forge_scenario import main_pid, podman, ready, show, until
from forge_vault import (
    CONTAINER,
    ROLE,
    STATE,
    changed,
    cursor,
    destroy_secret_ids,
    down,
    enrol,
    environment,
    said,
    sealed,
)
from testinfra.host import Host

Status = Callable[[], dict[str, Any]]
Cause = Callable[[hvac.Client], Any]

POLICY = "forge-inbox-app"
# Restarts a unit, and prints how many milliseconds its process was forge-launch before it became the app.
TIME_LAUNCH = """
import pathlib, subprocess, sys, time
def main_pid(unit):
    shown = subprocess.run(
        ["systemctl", "show", "--property=MainPID", "--property=ExecMainStartTimestampMonotonic", unit],
        capture_output=True, text=True, check=True,
    ).stdout
    found = dict(line.split("=") for line in shown.splitlines())
    return found["MainPID"], int(found["ExecMainStartTimestampMonotonic"]) / 1000
old, _ = main_pid(sys.argv[1])
subprocess.run(["systemctl", "restart", "--no-block", sys.argv[1]], check=True)
for _ in range(4000):
    if (found := main_pid(sys.argv[1]))[0] not in ("0", old):
        break
    time.sleep(0.005)
pid, began = found
comm = pathlib.Path(f"/proc/{pid}/comm")
while comm.read_text().strip() in ("(systemd)", "(sd-executor)", "sd-executor", "forge-launch", f"(h-launch)"):
    time.sleep(0.001)
print(time.monotonic() * 1000 - began)
"""
RETRIED = r"; next attempt in \d+\.\d s"
"""How a line ends that another attempt follows."""


@pytest.fixture(scope="module", autouse=True)
def _provisioned(host: Host, provisioning: Provisioning) -> None:
    """As the inventory says."""
    provisioning.ensure(host)


@contextmanager
def frozen(_vault: hvac.Client) -> Iterator[None]:
    """Stop the server's processes: it takes connections, and never answers."""
    podman("kill", "--signal", "STOP", CONTAINER)
    try:
        yield
    finally:
        podman("kill", "--signal", "CONT", CONTAINER)


@contextmanager
def impersonated(vault: hvac.Client) -> Iterator[None]:
    """Give the server a certificate for its address that its CA has not signed."""
    folder = STATE / "server"
    address = vault.url.split("//")[1].split(":")[0]
    for name in ("server.pem", "server.key"):
        shutil.copy2(folder / name, folder / f"{name}.kept")
    try:
        key, certificate = folder / "server.key", folder / "server.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        names = ["-subj", "/CN=vault", "-addext", f"subjectAltName=IP:{address}", "-days", "1"]
        subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        podman("kill", "--signal", "HUP", CONTAINER)
        yield
    finally:
        for name in ("server.pem", "server.key"):
            (folder / f"{name}.kept").replace(folder / name)
        podman("kill", "--signal", "HUP", CONTAINER)


@contextmanager
def wrong(vault: hvac.Client) -> Iterator[None]:
    """Destroy the host's secret ids."""
    destroy_secret_ids(vault)
    try:
        yield
    finally:
        enrol(vault)


@contextmanager
def limited(vault: hvac.Client, **limits: Any) -> Iterator[None]:
    """Give the host a secret id with limits that it has reached; the next one has none."""
    enrol(vault, **limits)
    try:
        yield
    finally:
        enrol(vault)


@contextmanager
def elsewhere(vault: hvac.Client) -> Iterator[None]:
    """Have the AppRole accept its secret ids from another network alone."""
    vault.auth.approle.create_or_update_approle(ROLE, secret_id_bound_cidrs=["192.0.2.0/24"])
    try:
        yield
    finally:
        vault.auth.approle.create_or_update_approle(ROLE, secret_id_bound_cidrs=[])


@contextmanager
def forbidden(vault: hvac.Client) -> Iterator[None]:
    """Take the policy away."""
    rules = vault.sys.read_policy(POLICY)["data"]["rules"]
    vault.sys.delete_policy(POLICY)
    try:
        yield
    finally:
        vault.sys.create_or_update_policy(POLICY, rules)


REJECTED = r"rejected this host's role id or secret id; it is wrong, expired or used up; run site\.yml"
CAUSES: dict[str, tuple[Cause, str, str]] = {
    "down": (
        down,
        "unreachable",
        rf"is unreachable \((Connection refused|No route to host|.*timed out.*)\); start it.*{RETRIED}",
    ),
    "frozen": (frozen, "unreachable", rf"is unreachable \(.*timed out.*\); start it.*{RETRIED}"),
    "sealed": (sealed, "sealed", rf"is sealed or not initialised; unseal it.*{RETRIED}"),
    "impersonated": (impersonated, "untrusted", r"the certificate of Vault at .* is not trusted by .*\(.*\); install"),
    "wrong": (wrong, "rejected", REJECTED),
    "expired": (lambda vault: limited(vault, ttl="8s"), "rejected", REJECTED),
    "used up": (lambda vault: limited(vault, num_uses=2), "rejected", REJECTED),
    "from elsewhere": (elsewhere, "address", r"refused the address of this host \(.*\); bind the secret id"),
    "forbidden": (forbidden, "denied", r"denied reading secret/forge/inbox/app; give the AppRole a policy"),
}
REPEATED = ("frozen", "impersonated", "expired", "used up", "from elsewhere")
"""The host behaves as it does for another of these causes; only the line that it leaves differs."""


@pytest.mark.parametrize(
    "cause",
    [pytest.param(cause, marks=pytest.mark.exhaustive if cause in REPEATED else ()) for cause in CAUSES],
)
def test_start_says_why_and_comes_back_by_itself(
    host: Host, vault: hvac.Client, client: httpx.Client, live: str, cause: str
) -> None:
    """One line an attempt with the cause and what to do, no secret in it; never gives up; works once it can."""
    broken, state, expected = CAUSES[cause]
    since = cursor(host)
    with broken(vault):
        # One that is used up is so after this.
        checked = until(lambda: (run := forgectl(host, "secrets", "check", "inbox", "--json")).rc == 6 and run, 30)
        assert json.loads(checked.stdout)["identities"]["app"]["state"] == state, checked.stdout
        host.check_output("systemctl restart --no-block %s", live)
        lines = until(lambda: said(host, since, live), 30)
        assert all(re.match(rf"forge-launch: inbox: .*{expected}", line) for line in lines), lines
        assert show(host, live, "ActiveState") == "activating"
        # To the last it does without what it can't have.
        assert cause != "forbidden" or not ready(client)
    assert until(lambda: ready(client), 60, every=0.2)


def test_waits_for_vault_within_one_start(host: Host, vault: hvac.Client, client: httpx.Client, live: str) -> None:
    """Sealed for a while: attempt after attempt by one and the same process, until it works; pauses differ."""
    since = cursor(host)
    with sealed(vault):
        host.check_output("systemctl restart --no-block %s", live)
        lines = until(lambda: len(found := said(host, since, live)) >= 4 and found, 30)
        pid = main_pid(host, live)
    assert until(lambda: ready(client), 30, every=0.2)
    assert main_pid(host, live) == pid
    pauses = {match[1] for line in lines if (match := re.search(r"next attempt in (\d+\.\d) s$", line))}
    assert len(pauses) > 1, lines


def test_slow_server(host: Host, client: httpx.Client, live: str) -> None:
    """It answers after seconds: starts take as long, and work at the first attempt."""
    since = cursor(host)
    ended = threading.Event()

    def slow_down() -> None:
        while not ended.is_set():
            podman("kill", "--signal", "STOP", CONTAINER)
            ended.wait(1.5)
            podman("kill", "--signal", "CONT", CONTAINER)
            ended.wait(0.1)

    slowing = threading.Thread(target=slow_down)
    slowing.start()
    try:
        host.check_output("systemctl restart %s", live)
        assert until(lambda: ready(client), 30, every=0.2)
    finally:
        ended.set()
        slowing.join()
    assert said(host, since, live) == []


VALUES = {
    "missing": (
        lambda values: values.pop("signing_key"),
        r"key signing_key is missing at secret/forge/inbox/app; FORGE_SIGNING_KEY needs it: write it there",
    ),
    "empty": (
        lambda values: values.update(signing_key=""),
        r"key signing_key at secret/forge/inbox/app is empty; FORGE_SIGNING_KEY needs a value: write it there",
    ),
    "no text": (
        lambda values: values.update(signing_key={"nested": token_urlsafe(24)}),
        r"key signing_key at secret/forge/inbox/app is not a string; FORGE_SIGNING_KEY needs one",
    ),
    "with a zero byte": (
        lambda values: values.update(signing_key="\0".join([token_urlsafe(24)] * 2)),
        r"key signing_key at secret/forge/inbox/app holds a NUL or an invalid character; FORGE_SIGNING_KEY cannot",
    ),
}


@pytest.mark.parametrize("what", VALUES)
def test_value_that_is_no_good_is_refused_at_the_gate(
    host: Host,
    vault: hvac.Client,
    client: httpx.Client,
    status: Status,
    source: Path,
    live: str,
    what: str,
) -> None:
    """By check, by a release; what serves still does, and is restarted with the values that it was started with."""
    change, expected = VALUES[what]
    before = status()["live"]
    with changed(vault, change):
        checked = forgectl(host, "secrets", "check", "inbox")
        assert checked.rc == 6
        assert re.search(expected, checked.stderr), checked.stderr
        if what == "missing":
            refused = release(host, source)
            assert refused.rc == 6, refused.stdout + refused.stderr
            assert re.search(expected, refused.stderr), refused.stderr
            host.check_output("systemctl restart %s", live)
            assert until(lambda: ready(client), 30, every=0.2)
    assert status()["live"] == before


def test_awkward_values_arrive_whole(host: Host, vault: hvac.Client, status: Status) -> None:
    """Quotes, `$`, backslashes, newlines, non-ASCII, and 60 KB of it: the process has it, character for character."""
    awkward = "'\"$HOME`\\{}%#\n\r\t é€ß 漢字 \U0001f980" + token_urlsafe(24)
    with changed(vault, lambda values: values.update(signing_key=awkward, partner_token=awkward * 1000)):
        answer(forgectl(host, "secrets", "rotate", "inbox", "--no-wait", "--json"))
        found = environment(host, f"inbox@{status()['live']['slot']}.service")
        settle(status)
    assert found["FORGE_SIGNING_KEY"] == awkward
    assert found["PARTNER_TOKEN"] == awkward * 1000
    assert len(found["PARTNER_TOKEN"].encode()) > 60_000


def test_start_costs_little(host: Host, live: str, client: httpx.Client) -> None:
    """From systemd's fork, over the opening of the credentials, to the app's own interpreter: what secrets cost."""
    milliseconds = []
    for _ in range(2):
        milliseconds.append(float(host.check_output("python3 -c %s %s", TIME_LAUNCH, live)))
        assert until(lambda: ready(client), 30, every=0.2)
    assert min(milliseconds) < 300, milliseconds
