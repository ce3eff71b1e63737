"""A support bundle of a live host: what helps is in it, and none of the secrets that this host has or was given."""

from __future__ import annotations

import base64
import io
import json
import secrets
import tarfile
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote

import httpx
import hvac
import pytest
from forge_receivers import mail_password, webhook_url
from forge_scenario import CONTAINER, Status, https_client, podman, ready, secrets_at
from testinfra.host import Host

BUNDLE = "/root/bundle.tar.gz"
# Shapes of secrets that nobody here has, put together so that no file of the repository holds one.
TOKEN, JWT = "hvs." + secrets.token_hex(20), "eyJ" + 3 * f"{secrets.token_hex(12)}."
PEM = "-----BEGIN PRIVATE " + f"KEY-----\\n{secrets.token_hex(40)}\\n-----END PRIVATE " + "KEY-----"
BYSTANDER = f"bystander-{secrets.token_hex(6)}"


def environment(host: Host, status: Status) -> dict[str, str]:
    """The environment of a process of the app, which holds what was read in Vault."""
    unit = f"inbox@{status()['live']['slot']}.service"
    pid = host.check_output("systemctl show --value --property=MainPID %s", unit)
    pairs = base64.b64decode(host.check_output("base64 /proc/%s/environ", pid)).decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.fixture(scope="module")
def known(host: Host, vault: hvac.Client) -> dict[str, str]:
    """Secrets of this host by what they are: those in Vault that the app has, and those that are sealed."""
    values = {f"vault {name}": value for name, value in secrets_at(vault, "forge/inbox/app").items()}
    for identity in ("app", "migrate", "rotate"):
        file = f"/etc/credstore.encrypted/forge.inbox.{identity}.secret-id"
        values[f"secret id of {identity}"] = host.check_output(f"systemd-creds decrypt --name= {file} -")
    values |= {"webhook": webhook_url(host), "mail": mail_password(host)}
    return {name: value for name, value in values.items() if len(value) >= 16}


@pytest.fixture(scope="module")
def planted(host: Host, known: dict[str, str]) -> Iterator[dict[str, str]]:
    """All of them, wherever somebody may have put one: logs, URLs, configuration, units, the database's log."""
    client = https_client(host)
    for value in known.values():
        text = f"{BYSTANDER} somebody logged {value} and {quote(value, safe='')} and {json.dumps(value)}"
        host.check_output("printf '%%s\\n' %s | systemd-cat --identifier=forge-test --priority=err", text)
        host.check_output("systemd-run --quiet --collect --wait --unit=inbox.planted echo %s", text)
        # Nginx logs no query; a path, and what a client says of itself.
        ours = {"User-Agent": f"{BYSTANDER} {value.encode('unicode_escape').decode()}"}
        client.get(f"/{BYSTANDER}/{quote(value, safe='')}", headers=ours)
        encoded = base64.b64encode(value.encode()).decode()
        host.check_output(
            "mkdir --parents /etc/systemd/system/nginx.service.d && printf '[Service]\\n# %%s\\n# %%s\\n' %s %s "
            ">> /etc/systemd/system/nginx.service.d/planted.conf",
            value.replace("\n", " "),
            encoded,
        )
        host.check_output("printf 'X=%%s\\n' %s >> /etc/forge/planted.env", value)
        host.run("runuser --user=postgres -- psql --command %s", f"SELECT '{value}' FROM {BYSTANDER.replace('-', '_')}")
    url = "postgresql://shop" + f":{BYSTANDER}pw" + "@db.example.com/shop"
    shapes = f"{BYSTANDER} found {TOKEN} and {JWT} and {PEM} and {url} and /x?page=2&access_token={BYSTANDER}at"
    host.check_output("printf '%%s\\n' %s | systemd-cat --identifier=forge-test --priority=err", shapes)
    client.close()
    host.check_output("journalctl --sync")
    yield known
    placed = "/etc/forge/planted.env /etc/systemd/system/nginx.service.d/planted.conf"
    host.check_output(f"rm --force {placed} {BUNDLE} && systemctl daemon-reload")


@pytest.fixture(scope="module")
def bundle(host: Host, planted: dict[str, str]) -> dict[str, str]:
    """The files of a bundle, by name."""
    assert planted
    began = time.monotonic()
    said = json.loads(host.check_output("forgectl support-bundle --output %s --json", BUNDLE))
    print(f"{said['bytes'] // 1024} KiB in {time.monotonic() - began:.1f} s", said["manifest"]["scrubbed"])
    data = podman("exec", CONTAINER, "cat", BUNDLE).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {member.name.partition("/")[2]: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read().decode() for name, file in files.items() if file}


def test_no_secret_that_the_host_knows_is_in_it(bundle: dict[str, str], planted: dict[str, str]) -> None:
    """As it is, in a URL, in JSON, in base64; neither in a file nor in its name nor in the manifest."""
    assert len(planted) >= 6
    forms: list[Callable[[str], str]] = [
        str,
        lambda value: quote(value, safe=""),
        lambda value: json.dumps(value)[1:-1],
        lambda value: base64.b64encode(value.encode()).decode().rstrip("="),
        lambda value: value[: len(value) // 2],
        lambda value: value[-(len(value) // 2) :],
    ]
    found = [
        (what, name, number)
        for what, value in planted.items()
        for number, form in enumerate(forms)
        for name, text in {**bundle, "names": "\n".join(bundle)}.items()
        # The first half of the webhook's URL is no secret.
        if form(value) in text and not (what == "webhook" and number == 4)
    ]
    assert found == []


def test_no_secret_of_a_known_shape_is_in_it(bundle: dict[str, str]) -> None:
    everything = "\n".join(bundle.values())
    for secret in (TOKEN, JWT, PEM.split("\\n")[1], f"{BYSTANDER}pw", f"{BYSTANDER}at"):
        assert secret not in everything


def test_the_running_environment_is_not_in_it(bundle: dict[str, str], host: Host, status: Status) -> None:
    """What the app's process has under the names of secrets."""
    found = environment(host, status)
    values = [found[name] for name in ("FORGE_SIGNING_KEY", "FORGE_DATABASE_PASSWORD")]
    assert [name for name, text in bundle.items() for value in values if value in text] == []


def test_what_was_scrubbed_can_still_be_read(bundle: dict[str, str]) -> None:
    """The lines are there, with what was taken out named; and so is the line of the access log."""
    assert f"{BYSTANDER} somebody logged <scrubbed: " in bundle["journal/errors.txt"]
    assert f"{BYSTANDER} somebody logged <scrubbed: " in bundle["journal/app-inbox.txt"]
    access = bundle["files/var/log/nginx/inbox.json"]
    assert f"/{BYSTANDER}/<scrubbed: " in access
    assert f'"user_agent":"{BYSTANDER} <scrubbed: ' in access
    assert "X=<scrubbed: " in bundle["files/etc/forge/planted.env"]
    assert BYSTANDER.replace("-", "_") in "\n".join(text for name, text in bundle.items() if "postgresql" in name)


def test_what_helps_is_in_it(bundle: dict[str, str], host: Host, status: Status) -> None:
    """State, history, units, configuration, packages, Nginx, PostgreSQL."""
    manifest = json.loads(bundle["manifest.json"])
    live = status()["live"]
    assert json.loads(bundle["forgectl/status.json"])["apps"]["inbox"]["live"]["release"] == live["release"]
    assert live["release"] in bundle["forgectl/history-inbox.json"]
    assert "ExecStart=" in bundle[f"files/etc/systemd/system/inbox@{live['slot']}.service.d/release.conf"]
    assert 'domain = "inbox.example.com"' in bundle["files/etc/forge/apps/inbox.toml"]
    assert "server_name inbox.example.com" in bundle["nginx/configuration.txt"]
    assert f"nginx\t{host.package('nginx').version}" in bundle["system/packages.txt"]
    assert "inbox_app" in bundle["postgresql/connections.txt"]
    assert "max_connections" in bundle["postgresql/settings.txt"]
    assert "forge-reboot.timer" in bundle["system/timers.txt"]
    assert live["release"] in "".join(name for name in bundle if name.endswith("release.json"))
    # Each part is accounted for.
    there = {part["name"] for part in manifest["parts"] if "left_out" not in part}
    assert there == set(bundle) - {"manifest.json"}
    assert manifest["scrubbed"]["not_opened"] == []
    assert sum(len(text) for text in bundle.values()) < 32 << 20


def test_the_file_is_its_owners(host: Host, bundle: dict[str, str]) -> None:
    assert bundle
    assert host.check_output("stat --format=%%a:%%U %s", BUNDLE) == "600:root"
    refused = host.run("forgectl support-bundle --output %s", BUNDLE)
    assert (refused.rc, "found one" in refused.stderr) == (3, True)
    assert host.run("runuser --user=nobody -- forgectl support-bundle").rc == 3


@pytest.mark.parametrize("seconds", [0.3, 1.5, 4.0])
def test_interrupted_it_leaves_nothing(host: Host, seconds: float, client: httpx.Client) -> None:
    """Ctrl-C at several moments, in a folder of its own."""
    host.check_output("rm --recursive --force /root/empty && mkdir /root/empty")
    done = host.run(f"cd /root/empty && timeout --signal=INT {seconds} forgectl support-bundle --since=-7d")
    files = host.check_output("ls --almost-all /root/empty")
    # A machine that is quick is done by then.
    assert (files == "") or (done.rc == 0 and files.endswith(".tar.gz"))
    assert ready(client)
    host.check_output("rm --recursive --force /root/empty")


def test_it_needs_no_disk_of_the_host(host: Host) -> None:
    """Straight to wherever somebody is."""
    names = host.check_output("forgectl support-bundle --since=-5min --output - | tar --list --gzip")
    assert names.splitlines()[0].endswith("/manifest.json")
