"""Every variable that was overridden is in force on the live host."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from forge_scenario import Status, show, until
from forge_wire import tls, trust
from testinfra.host import Host

STATE = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
ROLES = Path(__file__).resolve().parents[3] / "roles"
# What a throwaway host can't show, and why.
NOT_OVERRIDDEN = {
    "base_apt_proxy": "there is no proxy",
    "base_swap_mib": "a container has no swap of its own",
    "base_kernel_settings": "the kernel is that of the machine",
    "secrets_no_log": "would print wrapping tokens",  # pragma: allowlist secret
    "secrets_vault_token": "set by every scenario",  # pragma: allowlist secret
    "nginx_tls_ca_name": "of another source of certificates",
    "nginx_acme_directory": "of another source of certificates",
    "nginx_acme_email": "of another source of certificates",
    "nginx_acme_ca_file": "of another source of certificates",
    "nginx_acme_key_type": "of another source of certificates",
    "health_path": "fixed by the app",
    "ready_path": "fixed by the app",
    "metrics_path": "fixed by the app",
    "settings_prefix": "fixed by the app",
    "commands": "scenario shape",
    "executable_memory": "scenario shape",
    "stream_timeout": "scenario shape",
    "websocket_timeout": "scenario shape",
    "lock": "the app has one",
    "build_packages": "all it needs is built already; scenario sources",
    "module": "the app has one",
    "static": "the app has none; scenario edge",
    "nginx_http3": "Debian 12 has none; scenario edge",
    "secrets_source": "the other one is in scenario secrets",
    "secrets_database_mount": "there is no other database server",
    "apps.database.vault_role": "there is no other database server",
    "preflight_sources": "of a play that releases nothing",
    "apps.database.placement": "there is no other server",
    "apps.database.url": "of an external server",
    "apps.database.migration_url": "of an external server",
    "apps.database.url_variable": "fixed by the app",
    "apps.database.pool_variable": "fixed by the app",
    "apps.database.url_format": "fixed by the app",
    "apps.database.password_key": "fixed by the values in Vault",
    "apps.database.migration.password_key": "fixed by the values in Vault",
    "apps.database.migration.variables": "fixed by the app",
}


def options(role: str, entry_point: str) -> dict[str, dict[str, Any]]:
    """Read the options of a role's entry point."""
    specification = yaml.safe_load((ROLES / role / "meta/argument_specs.yml").read_text())
    return dict(specification["argument_specs"][entry_point]["options"])


def unchanged(where: str, values: dict[str, Any], specification: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Name the options that are unset or at their default."""
    for name, option in specification.items():
        path = f"{where}{name}"
        if path in NOT_OVERRIDDEN or name in NOT_OVERRIDDEN:
            continue
        if name not in values or ("default" in option and values[name] == option["default"]):
            yield path
        elif isinstance(values[name], dict) and "options" in option:
            yield from unchanged(f"{path}.", values[name], option["options"])


@pytest.fixture
def variables(host: Host) -> dict[str, Any]:
    """The variables of the host, as they stand in the inventory."""
    return dict(host.ansible.get_variables())


def test_every_variable_is_overridden(variables: dict[str, Any]) -> None:
    """A new variable needs a value here, or a reason above."""
    found = [
        path
        for role in sorted(path.name for path in ROLES.iterdir())
        for path in unchanged("", variables, options(role, "main"))
    ]
    found += unchanged("apps.", variables["apps"]["inbox"], options("app", "entry"))
    assert found == []


def test_files_are_the_certificate(client: httpx.Client) -> None:
    """Nginx serves the certificate that was brought along, the only one that the client trusts, for the alias too."""
    assert client.get("/ready").status_code == 200
    assert client.get("https://www.events.example.org/ready").status_code == 200


def test_certificate_is_looked_at(host: Host) -> None:
    """As often as the inventory says, and called for as early."""
    assert host.service("forge-certificates.timer").is_running
    assert "OnUnitInactiveUSec=6h" in show(host, "forge-certificates.timer", "TimersMonotonic")
    assert show(host, "forge-certificates.timer", "RandomizedDelayUSec") == "1h 30min"
    assert "alert_days = 30" in host.check_output("cat /etc/forge/certificates.toml")


def test_edge(host: Host, client: httpx.Client) -> None:
    """No HSTS, no IPv6, the smaller body; and the client is whom the load balancer names."""
    answer = client.get("/health", headers={"X-Real-IP": "192.0.2.7"})
    assert "strict-transport-security" not in answer.headers
    assert answer.headers["content-security-policy"] == "default-src 'self'"
    assert client.post("/v1/events", content=b" " * 65 * 1024).status_code == 413
    assert client.post("/v1/large", content=b" " * 65 * 1024).status_code == 404
    assert not host.socket("tcp://:::443").is_listening
    assert host.socket("tcp://0.0.0.0:443").is_listening
    entry = host.check_output("grep %s /var/log/nginx/inbox.json", answer.headers["x-request-id"])
    assert '"client":"192.0.2.7"' in entry


def test_limits_of_a_client(client: httpx.Client) -> None:
    """The second stream is one too many, and only for the same client."""
    stream = {"Accept": "text/event-stream", "X-Real-IP": "192.0.2.8"}
    with client.stream("GET", "/v1/events/stream", headers=stream) as first:
        assert first.status_code == 200
        assert client.get("/v1/events/stream", headers=stream).status_code == 429
        with client.stream("GET", "/v1/events/stream", headers=stream | {"X-Real-IP": "192.0.2.9"}) as other:
            assert other.status_code == 200


def test_modern_profile_knows_no_older_tls(host: Host) -> None:
    """TLS 1.3 alone."""
    context = trust()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"), tls(host, "events.example.org", context):
        pass


def test_updates_are_for_a_person(host: Host) -> None:
    """None comes by itself; whoever asks gets more than security's; and a reboot that is due is only told of."""
    assert 'Unattended-Upgrade "0"' in host.check_output("apt-config dump APT::Periodic::Unattended-Upgrade")
    said = host.run("unattended-upgrade --dry-run --debug 2>&1").stdout
    (allowed,) = {line for line in said.splitlines() if line.startswith("Allowed origins are: ")}
    assert "label=Debian-Security, origin=Debian," in allowed
    host.check_output("touch /run/reboot-required")
    try:
        host.check_output("systemctl start forge-reboot.service")
        told = host.check_output("journalctl --unit=forge-reboot.service --priority=err --output=cat")
    finally:
        host.check_output("rm /run/reboot-required")
    assert "ALERT host: a reboot is due (an update asks for it), and base_reboot_window names no time" in told


def test_app_runs_within_its_limits(host: Host, status: Status, live: str) -> None:
    """One worker, and the limits of the entry on its slot."""
    assert status()["workers"]["count"] == 1
    master = host.service(live).systemd_properties["MainPID"]
    assert len(host.check_output("pgrep --parent %s", master).split()) == 1
    shown = host.service(live).systemd_properties
    assert int(shown["MemoryMax"]) == 400 * 2**20
    assert shown["CPUQuotaPerSecUSec"] == "1.500000s"
    assert shown["TasksMax"] == "100"
    assert shown["TimeoutStopUSec"] == "15s"


def test_worker_leaves_after_its_requests(host: Host, live: str, client: httpx.Client) -> None:
    """Twice over, with no sibling to take over: requests wait for the successor, and none fails."""
    workers = f"pgrep --parent {host.service(live).systemd_properties['MainPID']}"
    seen = set()
    for number in range(600):
        assert client.get("/health").status_code == 200
        if number % 20 == 0:
            # None while the one starts that succeeds the other.
            seen.add(host.run(workers).stdout)
    assert len(seen - {""}) >= 3


def test_slot_is_recycled_when_it_is_due(host: Host, status: Status) -> None:
    """By its age, and by the memory that its processes allocated; each time watched for 3 s, and once an hour."""

    def recycle() -> Any:
        until(lambda: status()["operation"] is None, 30)
        began = time.monotonic()
        found = json.loads(host.check_output("forgectl recycle inbox --if-due --json"))
        return found["changed"] and time.monotonic() - began

    def edit(file: str, pattern: str) -> None:
        host.check_output("cp --preserve %s /root/before && sed --in-place %s %s", file, pattern, file)

    description, state = "/etc/forge/apps/inbox.toml", "/var/lib/forge/inbox/state.json"
    assert "watch_seconds = 3" in host.file(description).content_string
    assert recycle() is False
    edit(description, "s/^recycle_memory_percent = 60/recycle_memory_percent = 5/")
    assert recycle() > 3
    host.check_output("mv /root/before %s", description)
    assert recycle() is False
    edit(state, 's/"since": "20../"since": "2000/')
    assert recycle() is False
    edit(state, 's/"at": "20../"at": "2000/')
    assert recycle() > 3
    assert recycle() is False
    assert [entry["action"] for entry in json.loads(host.check_output("forgectl history inbox --json"))["history"]] == [
        "release",
        "recycle",
        "recycle",
    ]


def test_database(host: Host, client: httpx.Client) -> None:
    """Another name, server settings and environment; an event arrives in it."""
    posted = client.post("/v1/events", json={"type": "a.b", "payload": {}}, headers={"Idempotency-Key": "alternative"})
    assert posted.status_code in (200, 201)

    def ask(query: str) -> str:
        with host.sudo("postgres"):
            return str(host.check_output("psql --no-align --tuples-only --dbname=ledger --command=%s", query))

    assert ask("SELECT count(*) FROM event") == "1"
    assert ask("SHOW max_connections") == "60"
    assert ask("SHOW shared_buffers") == "64MB"
    assert ask("SHOW log_min_duration_statement") == "250ms"
    assert ask("SELECT current_setting('forge.environment')") == "staging"


def test_secrets_come_from_the_other_mounts(host: Host) -> None:
    """The paths, AppRoles and mounts of the inventory are those that are asked."""
    assert '"ok"' in host.check_output("forgectl secrets check inbox --json")
    assert host.run("grep -c team/inbox /etc/forge/apps/inbox.toml").stdout.strip() == "2"


def test_host(host: Host) -> None:
    """Packages, operators, upgrades, trust and logs."""
    assert host.package("jq").is_installed
    assert 'Unattended-Upgrade "0"' in host.check_output("apt-config dump APT::Periodic::Unattended-Upgrade")
    assert {"sudo", "systemd-journal"} <= set(host.user("operator").groups)
    with host.sudo("operator"):
        assert host.check_output("sudo --non-interactive whoami") == "root"
    vault = json.loads((STATE / "vault" / "control.json").read_text())["address"]
    fetch = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    host.check_output("/usr/bin/python3 -c %s %s", fetch, f"{vault}/v1/sys/health")
    journal = host.check_output("systemd-analyze cat-config systemd/journald.conf")
    for line in ("SystemMaxUse=256M", "SystemKeepFree=512M", "MaxRetentionSec=7day", "RateLimitBurst=500"):
        assert line in journal
    rotation = host.check_output("logrotate --debug /etc/logrotate.d/forge 2>&1")
    assert "(3 rotations)" in rotation


def test_flood_of_one_unit_is_cut_and_counted(host: Host) -> None:
    """A unit that logs without end loses its own lines beyond the burst, which grows with the free disk."""
    # What was dropped is told with the unit's first message after the interval, unless another unit says its first
    # message between the two: journald then forgets the count. So it speaks ten times a second until well after.
    messages = 10 * (host.ansible.get_variables()["logging_rate_limit_interval"] + 2)
    script = f"seq 20000; for message in $(seq {messages}); do sleep 0.1; echo $message; done"
    host.check_output("systemd-run --quiet --wait --unit=forge-flood sh -c %s", script)
    suppressed = "journalctl --no-pager --output=cat --unit=systemd-journald --grep='Suppressed .* forge-flood'"
    assert until(lambda: host.run(suppressed).stdout, 10)
    kept = "journalctl --no-pager --output=cat --unit=forge-flood | grep --count '^[0-9]*$'"
    assert 500 <= int(host.check_output(kept)) < 10_000


def test_stuck_request_is_ended(host: Host, live: str, client: httpx.Client) -> None:
    """A request that the app never answers costs the client the entry's timeout and no more; then all is well again."""
    workers = f"pgrep --parent {host.service(live).systemd_properties['MainPID']}"
    host.check_output(f"kill -STOP $({workers})")
    try:
        stuck = client.get("/health")
    finally:
        host.check_output(f"kill -CONT $({workers})")
    assert stuck.status_code == 504
    assert 4 < stuck.elapsed.total_seconds() < 8
    assert client.get("/ready").status_code == 200
