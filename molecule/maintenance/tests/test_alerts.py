"""Alert lines reach a command, a webhook and a mailbox: each of them, once, and whatever happens in between."""

from __future__ import annotations

import json
import re
import subprocess
import time
import uuid

import httpx
import pytest
from forge_receivers import Receivers, alert, mail_password, state, webhook_url
from forge_scenario import CONTAINER, PODMAN, main_pid, playbook, ready, show, until
from testinfra.host import Host

UNIT = "forge-alerts.service"
CHANNELS = ("command", "webhook", "mail")
# A line, its message, and what else waits for that.
SECONDS = 60
PLACES = "/etc /opt/forge /usr/local /var/log /var/lib /run/systemd /run/credentials /home /root /tmp".split()


def mark(what: str) -> str:
    """A text that was never told before."""
    return f"{what} {uuid.uuid4().hex[:12]}"


def test_a_test_line_arrives_everywhere(host: Host, receivers: Receivers) -> None:
    """Through TLS and a login, to everybody who is named; and the operator is told."""
    said = json.loads(host.check_output("forgectl alerts test --json"))
    assert {name: channel["arrived"] for name, channel in said["channels"].items()} == dict.fromkeys(CHANNELS, True)
    text = f"test {said['test']} of the alerts"
    posted = receivers.posts()[-1]
    document = json.loads(posted["body"])
    assert posted["path"] == webhook_url(host).removeprefix("https://localhost:18443")
    assert (posted["headers"]["Content-Type"], document["host"]) == ("application/json", host.check_output("hostname"))
    assert text in document["alerts"][-1]["text"]
    mail = receivers.mails()[-1]
    assert (mail["to"], mail["from"]) == (["ops@example.com", "on-call@example.org"], "forge@example.com")
    assert (mail["tls"], mail["user"]) == (True, "forge")
    assert text in mail["text"]
    assert f"ALERT host: {text}" in mail["subject"]
    page = receivers.posts("/page/on-call")[-1]
    assert text in page["body"]
    assert page["headers"]["X-User"] != "0"


@pytest.mark.exhaustive
def test_what_the_platform_says_arrives(host: Host, receivers: Receivers) -> None:
    """An alert of a program that knows nothing of delivery, word by word."""
    host.check_output("echo 'nonsense on;' > /etc/nginx/forge/zz.conf")
    try:
        host.run("/etc/needrestart/restart.d/nginx.service")
    finally:
        host.check_output("rm /etc/nginx/forge/zz.conf")
    line = host.check_output("journalctl --identifier=forge-nginx-upgrade --priority=err --lines=1 --output=cat")
    text = line.removeprefix("ALERT host: ").strip()
    assert text.startswith("Nginx still runs with what was replaced")
    until(lambda: text in receivers.texts(), SECONDS, every=1)
    until(lambda: any(text in mail["text"] for mail in receivers.mails()), SECONDS, every=1)


def test_nothing_is_lost_or_doubled_over_restarts(host: Host, receivers: Receivers) -> None:
    """Stopped, and killed at once while lines come."""
    before, after = mark("while it was stopped"), mark("after a kill")
    host.check_output("systemctl stop %s", UNIT)
    alert(host, before)
    host.check_output("systemctl start %s", UNIT)
    until(lambda: before in receivers.texts(), SECONDS, every=1)
    host.check_output("systemctl kill --signal=KILL %s", UNIT)
    alert(host, after)
    until(lambda: after in receivers.texts(), SECONDS, every=1)
    host.check_output("systemctl restart %s", UNIT)
    last = mark("the last")
    alert(host, last)
    until(lambda: last in receivers.texts(), SECONDS, every=1)
    told = receivers.texts()
    assert [told.count(each) for each in (before, after, last)] == [1, 1, 1]


def test_a_receiver_that_fails_is_seen_and_catches_up(host: Host, receivers: Receivers) -> None:
    """What writes alerts never waits, the other channels deliver, and nothing is lost."""
    lines = [mark(f"number {each}") for each in range(3)]
    receivers.answer(500)
    try:
        began = time.monotonic()
        for line in lines:
            alert(host, line)
        assert time.monotonic() - began < 30
        failing = until(lambda: state(host, "webhook")["failing"], SECONDS, every=1)
        assert failing["error"] == "localhost answers 500"
        until(lambda: state(host, "webhook")["failing"]["attempts"] >= 2, SECONDS, every=1)
        said = host.check_output("forgectl alerts status")
        assert re.search(r"^webhook: FAILS since .*: localhost answers 500$", said, re.MULTILINE)
        until(lambda: any(lines[-1] in mail["text"] for mail in receivers.mails()), SECONDS, every=1)
    finally:
        receivers.answer(204)
    # What failed often is tried again after five minutes.
    until(lambda: set(lines) <= set(receivers.texts()), 6 * SECONDS, every=1)
    until(lambda: state(host, "webhook")["failing"] is None, SECONDS, every=1)
    assert [receivers.texts().count(line) for line in lines] == [1, 1, 1]


@pytest.mark.exhaustive
def test_a_flood_is_summed_up_and_hides_nobody(host: Host, receivers: Receivers, client: httpx.Client) -> None:
    """An app that writes alerts by the thousand: few messages, all counted, and the host's own line is among them."""
    flood, own = mark("flood"), mark("the host's own")
    before = len(receivers.documents())
    host.check_output(
        "systemd-run --quiet --collect --wait --unit=forge-test-flood --uid=inbox /bin/sh -c %s",
        f"for n in $(seq 3000); do echo '<3>ALERT host: {flood} number '$n; done",
    )
    alert(host, own, "host")
    until(lambda: own in receivers.texts(), 3 * SECONDS, every=1)
    until(
        lambda: counted(receivers, before, flood) == 3000,
        3 * SECONDS,
        every=1,
    )
    # One a second, for as long as the machine takes to write the flood.
    messages = len(receivers.documents()) - before
    assert messages < 100
    # Who said so is journald's word, not the writer's.
    shown = [each for each in receivers.texts() if flood in each]
    assert 0 < len(shown) <= 5 * messages
    assert all(each.endswith("[said by forge-test-flood.service]") for each in shown)
    assert ready(client)


def counted(receivers: Receivers, before: int, flood: str) -> int:
    """How many lines of a flood were told, or summed up."""
    documents = receivers.documents()[before:]
    told = sum(each["times"] for document in documents for each in document["alerts"] if flood in each["text"])
    return int(told + sum(document["more"].get("forge-test-flood.service", 0) for document in documents))


def test_no_secret_is_where_others_can_read_it(host: Host) -> None:
    """Neither the webhook's URL nor the password: no file, no unit, no argument, no environment, no log."""
    secrets = [webhook_url(host).rpartition("/")[2], mail_password(host)]
    pid = main_pid(host, UNIT)
    for secret in secrets:
        assert len(secret) > 20
        # Through a pipe: sudo logs what it is called with.
        search = ("grep", "--recursive", "--files-with-matches", "--binary-files=text", "--fixed-strings", "--file=-")
        call = (str(PODMAN), "exec", "--interactive", CONTAINER, *search, *PLACES)
        found = subprocess.run(call, input=secret, capture_output=True, text=True, check=False, timeout=120)
        # What systemd hands to the unit is there for its user alone.
        assert set(found.stdout.split()) <= {
            f"/run/credentials/{UNIT}/{name}" for name in ("webhook_url", "mail_password")
        }
        assert secret not in host.check_output(
            "systemctl show %s; cat /proc/%s/cmdline /proc/%s/environ", UNIT, str(pid), str(pid)
        )
    for user in ("inbox", "nobody", "admin"):
        assert host.run("runuser --user=%s -- cat /run/credentials/%s/webhook_url", user, UNIT).rc != 0
        assert host.run("runuser --user=%s -- ls /var/lib/private/forge-alerts/", user).rc != 0
    assert host.check_output("stat --format=%a:%U /etc/credstore.encrypted/forge-alerts.webhook_url") == "600:root"


def test_it_is_nobody_and_has_little(host: Host) -> None:
    """A user of its own without a power, exposed little, and small."""
    status = dict(
        line.split(":\t", 1)
        for line in host.check_output("cat /proc/%s/status", str(main_pid(host, UNIT))).splitlines()
    )
    assert int(status["Uid"].split()[0]) > 60000
    assert [status[name].strip() for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")] == ["0" * 16] * 4
    found = re.search(
        r"Overall exposure level for \S+: ([\d.]+)", host.check_output("systemd-analyze security --no-pager %s", UNIT)
    )
    assert found
    assert float(found[1]) <= 2.0
    assert int(show(host, UNIT, "MemoryCurrent")) < 96 << 20


@pytest.mark.exhaustive
def test_nowhere_to_deliver_to(host: Host, receivers: Receivers) -> None:
    """Taken out of the inventory, the unit is off and what was sealed is gone; put back, it goes on where it was."""
    off = {"alerts_command": [], "alerts_webhook_url": "", "alerts_mail_to": []}
    tags = ("--tags", "alerts")
    done = playbook(*tags, "--extra-vars", json.dumps(off))
    assert done.returncode == 0, done.stdout
    try:
        assert show(host, UNIT, "ActiveState") == "inactive"
        assert not host.service(UNIT).is_enabled
        assert host.run("ls /etc/credstore.encrypted/forge-alerts.*").rc != 0
        refused = host.run("forgectl alerts test")
        assert (refused.rc, "expected somewhere to deliver alerts to" in refused.stderr) == (3, True)
        again = playbook(*tags, "--extra-vars", json.dumps(off))
        assert "changed=0" in again.stdout, again.stdout
    finally:
        missed = mark("while it was off")
        alert(host, missed)
        dry = playbook(*tags, "--check", "--diff")
        back = playbook(*tags)
    assert back.returncode == 0, back.stdout
    # The dry run named what the run then did, and no secret.
    assert re.search(r"changed=[1-9]", dry.stdout), dry.stdout
    assert webhook_url(host).rpartition("/")[2] not in dry.stdout + back.stdout
    assert "changed=0" in playbook(*tags).stdout
    until(lambda: missed in receivers.texts(), SECONDS, every=1)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"alerts_webhook_url": "{{ lookup('ansible.builtin.env', 'NOT_SET_ANYWHERE') }}"}, "comes out empty"),
        ({"alerts_command": ["page-somebody"]}, "the whole path of a program"),
        ({"alerts_comand": ["/bin/true"]}, "did you mean `alerts_command`"),
    ],
)
def test_bad_input_changes_nothing(host: Host, variables: dict[str, object], said: str) -> None:
    before = host.check_output("sha256sum /etc/forge/alerts.toml")
    refused = playbook("--extra-vars", json.dumps(variables))
    assert refused.returncode != 0
    assert said in refused.stdout
    assert host.check_output("sha256sum /etc/forge/alerts.toml") == before
