"""Each finding that can be caused in moments is caused, several at a time, so that none hides another; then undone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import hvac
import pytest
from forge_diagnosis import PATIENCE, brief, codes, doctor, is_clean, told, well
from forge_scenario import CONTAINER, Status, main_pid, podman, until
from forge_vault import put, sealed
from testinfra.host import Host

__all__ = ["well"]
# A fault of a file before this one may still be told.
pytestmark = pytest.mark.usefixtures("well")


class Cause(NamedTuple):
    """What brings a finding about, and what ends it; shell, in which $slot is the live one."""

    code: str
    subject: str
    title: str
    """What has to be in it."""
    cause: str
    undo: str


OF_THE_HOST = [
    Cause(
        "F006",
        "host",
        "not as site.yml left them",
        # A file, a link that enables a unit, one more file, a setting of the kernel.
        """
        cp --archive /etc/logrotate.d/forge /root/kept && echo '# by hand' >> /etc/logrotate.d/forge
        systemctl disable --quiet forge-recycle@inbox.timer
        echo '# by hand' > /etc/nginx/conf.d/by-hand.conf
        echo 0 > /proc/sys/net/ipv4/tcp_rfc1337
        """,
        """
        mv /root/kept /etc/logrotate.d/forge
        systemctl enable --quiet --now forge-recycle@inbox.timer
        rm /etc/nginx/conf.d/by-hand.conf
        echo 1 > /proc/sys/net/ipv4/tcp_rfc1337
        """,
    ),
    Cause(
        "F703",
        "host",
        "forge-reboot.service is exposed to",
        """
        mkdir /etc/systemd/system/forge-reboot.service.d
        printf '[Service]\\nProtectSystem=no\\nCapabilityBoundingSet=~\\nNoNewPrivileges=no\\nSystemCallFilter=\\n' \
            > /etc/systemd/system/forge-reboot.service.d/open.conf
        systemctl daemon-reload
        """,
        "rm -r /etc/systemd/system/forge-reboot.service.d && systemctl daemon-reload",
    ),
    Cause(
        "F103",
        "host",
        "the timer is off",
        "systemctl stop forge-certificates.timer",
        "systemctl start forge-certificates.timer",
    ),
    Cause(
        "F601",
        "host",
        "/mnt/small is ",
        "mkdir /mnt/small && mount -t tmpfs -o size=1M tmpfs /mnt/small && head -c 1000000 /dev/zero > /mnt/small/x",
        "umount /mnt/small && rmdir /mnt/small",
    ),
    Cause(
        "F602",
        "host",
        "/mnt/few has 0 of ",
        "mkdir /mnt/few && mount -t tmpfs -o nr_inodes=5 tmpfs /mnt/few && (cd /mnt/few && touch 1 2 3 4 5 6 || :)",
        "umount /mnt/few && rmdir /mnt/few",
    ),
    Cause(
        "F604",
        "host",
        "the timer is off",
        "systemctl stop logrotate.timer",
        "systemctl start logrotate.timer",
    ),
    Cause(
        "F608",
        "host",
        "no name server answers (192.0.2.1)",
        "cp /etc/resolv.conf /root/resolv.conf && echo nameserver 192.0.2.1 > /etc/resolv.conf",
        "cat /root/resolv.conf > /etc/resolv.conf && rm /root/resolv.conf",
    ),
    Cause(
        "F702",
        "host",
        "the timer is off",
        "systemctl stop apt-daily-upgrade.timer",
        "systemctl start apt-daily-upgrade.timer",
    ),
    Cause(
        "F704",
        "host",
        "forge-broken.service failed",
        "systemd-run --quiet --wait --unit=forge-broken.service false || :",
        "systemctl reset-failed forge-broken.service",
    ),
    Cause(
        "F802",
        "host",
        "no_such_directive",
        "echo 'no_such_directive on;' > /etc/nginx/conf.d/broken.conf",
        "rm /etc/nginx/conf.d/broken.conf",
    ),
]
OF_THE_APP = [
    Cause(
        "F203",
        "inbox",
        "has to be root's, of www-data, 0660",
        "chmod 0666 /run/inbox/$slot.sock",
        "chmod 0660 /run/inbox/$slot.sock",
    ),
    Cause(
        "F206",
        "inbox",
        "its workers have",
        """
        systemctl show --value --property=MemoryMax inbox@$slot.service > /root/limit
        systemctl set-property --runtime inbox@$slot.service MemoryMax=$(
            for process in $(pgrep --uid inbox); do cat /proc/$process/smaps_rollup; done |
                awk '/^Pss_Anon/ {sum += $2} END {print int(sum * 1.1) "K"}')
        """,
        "systemctl set-property --runtime inbox@$slot.service MemoryMax=$(cat /root/limit) && rm /root/limit",
    ),
    Cause(
        "F207",
        "inbox",
        "the event loop of 1 of its 2 workers stands still",
        "kill -STOP $(pgrep --parent $main | tail --lines=1)",
        "kill -CONT $(pgrep --parent $main)",
    ),
    Cause(
        "F208",
        "inbox",
        "command tidy: its last run failed (exit-code, exit status 1)",
        "touch /var/lib/inbox/untidy; systemctl start --wait inbox.tidy.service || :",
        "rm /var/lib/inbox/untidy; systemctl start inbox.tidy.service",
    ),
    Cause(
        "F209",
        "inbox",
        "1 files of its live release have the wrong owner or mode",
        "chmod 0640 /srv/inbox/slots/$slot/settings.toml",
        "chmod 0440 /srv/inbox/slots/$slot/settings.toml",
    ),
    Cause(
        "F210",
        "inbox",
        " open files",
        "prlimit --pid $(pgrep --parent $main | head --lines=1) --nofile=8:",
        "prlimit --pid $(pgrep --parent $main | head --lines=1) --nofile=16384:",
    ),
    Cause(
        "F304",
        "inbox",
        "its database is at 0001",
        """runuser --user postgres -- psql -qc "UPDATE alembic_version SET version_num = '0001'" inbox""",
        """runuser --user postgres -- psql -qc "UPDATE alembic_version SET version_num = '0002'" inbox""",
    ),
    Cause(
        "F403",
        "inbox",
        "the secret id of its migrate identity ends in",
        """
        cp --archive /var/lib/forge/inbox/identities.json /root/kept.json
        python3 -c '
import datetime, json, sys
path = "/var/lib/forge/inbox/identities.json"
known, now = json.load(open(path)), datetime.datetime.now(datetime.timezone.utc)
known["migrate"]["issued"] = (now - datetime.timedelta(days=29)).isoformat()
known["migrate"]["expires"] = (now + datetime.timedelta(days=1)).isoformat()
json.dump(known, open(path, "w"))'
        """,
        "mv /root/kept.json /var/lib/forge/inbox/identities.json",
    ),
    Cause(
        "F402",
        "inbox",
        "its rotate identity has no secret id on this host",
        "mv /etc/credstore.encrypted/forge.inbox.rotate.secret-id /root/",
        "mv /root/forge.inbox.rotate.secret-id /etc/credstore.encrypted/",
    ),
]
# By itself: of what whoever has the lock may be at, doctor says nothing.
LOCKED = [
    Cause(
        "F301",
        "inbox",
        "its lock has been held for 60 min: release by somebody",
        """
        flock --no-fork /var/lib/forge/inbox/lock sleep 600 > /dev/null 2>&1 &
        echo $! > /root/holder
        sleep 0.5
        printf '{"pid":1,"by":"somebody","reason":"release","since":%s}' $(($(date +%s) - 3600)) \
            > /var/lib/forge/inbox/lock
        """,
        "kill $(cat /root/holder); rm /root/holder; truncate --size=0 /var/lib/forge/inbox/lock",
    ),
]
STOPPED = [
    Cause(
        "F201",
        "inbox",
        "its live service is inactive",
        "systemctl stop inbox@$slot.socket inbox@$slot.service",
        "systemctl start inbox@$slot.socket inbox@$slot.service",
    ),
    Cause(
        "F203",
        "inbox",
        "socket is inactive",
        ":",
        ":",
    ),
    Cause(
        "F501",
        "inbox",
        "its database is unreachable",
        "systemctl stop 'postgresql@*.service'",
        "systemctl start postgresql.service",
    ),
    Cause("F801", "host", "Nginx is inactive", "systemctl stop nginx.service", "systemctl start nginx.service"),
]


@contextmanager
def caused(host: Host, status: Status, causes: Sequence[Cause]) -> Iterator[None]:
    """All of them, until the end; what could be undone is, whatever went wrong."""
    live = status()["live"]["slot"]
    main = host.check_output("systemctl show --value --property=MainPID %s", f"inbox@{live}.service")
    names = f"slot={live} main={main}\n"
    with ExitStack() as stack:
        for each in causes:
            stack.callback(host.run, "bash -c %s", names + each.undo)
            done = host.run("bash -euc %s", names + each.cause)
            assert done.rc == 0, (each.code, done.stdout, done.stderr)
        yield


def test_of_the_host(host: Host, status: Status) -> None:
    """Each says what it is, with the figures; a firewall that nobody loaded is one beside them all."""
    with caused(host, status, OF_THE_HOST):
        host.check_output("nft delete table inet forge")
        try:
            found = doctor(host)
        finally:
            host.check_output("systemctl restart forge-firewall.service")
        for each in OF_THE_HOST:
            titles = [one["title"] for one in found["findings"] if (one["code"], one["subject"]) == each[:2]]
            assert any(each.title in title for title in titles), (each.code, brief(found["findings"]))
        assert codes(found) == {each[:2] for each in OF_THE_HOST} | {("F803", "inbox")} & codes(found)
        drift = [one for one in found["findings"] if one["code"] == "F006"]
        assert "the firewall is not loaded" in {one["title"] for one in drift}
        evidence = " | ".join(line for one in drift for line in one["evidence"])
        for line in (
            "/etc/logrotate.d/forge has another content",
            "/etc/systemd/system/timers.target.wants/forge-recycle@inbox.timer is gone",
            "/etc/nginx/conf.d/by-hand.conf was added",
            "/etc/systemd/system/forge-reboot.service.d/open.conf was added",
            "kernel setting net.ipv4.tcp_rfc1337 is 0 and was 1",
        ):
            assert line in evidence
    until(lambda: is_clean(host), PATIENCE)


def test_of_the_app(host: Host, status: Status) -> None:
    """All at a time on one live slot, which goes on serving."""
    # A younger worker may still import the app, and is no worry of doctor's.
    service = f"inbox@{status()['live']['slot']}.service"
    old_enough = "test $(ps --ppid %s --format etimes= | sort --numeric-sort | head --lines=1) -gt 20"
    until(lambda: host.run(old_enough, str(main_pid(host, service))).rc == 0, PATIENCE, every=1)
    for causes in (OF_THE_APP, LOCKED):
        with caused(host, status, causes):
            found = doctor(host)
            for each in causes:
                assert each.title in told(found, each.code, each.subject)["title"]
            assert codes(found) - {("F202", "inbox")} == {each[:2] for each in causes}
        until(lambda: is_clean(host), PATIENCE)


def test_when_everything_stands_still(host: Host, status: Status, vault: hvac.Client) -> None:
    """The service, the database, Nginx, and Vault: each is said, and so is the one that clients meet first."""
    with caused(host, status, STOPPED), sealed(vault):
        found = doctor(host)
        for each in STOPPED:
            assert each.title in told(found, each.code, each.subject)["title"]
        assert "is sealed" in told(found, "F401")["title"]
        assert codes(found) - {("F803", "inbox")} == {each[:2] for each in STOPPED} | {("F401", "inbox")}
        assert (found["verdict"], found["findings"][0]["severity"]) == ("critical", "critical")
    until(lambda: is_clean(host), PATIENCE)


@pytest.mark.exhaustive
def test_maintenance(host: Host) -> None:
    """With its reason, for whoever comes upon it."""
    host.check_output("forgectl maintenance inbox on --reason 'moving the database'")
    try:
        found = told(doctor(host), "F303")
    finally:
        host.check_output("forgectl maintenance inbox off")
    assert (found["severity"], found["title"].endswith(": moving the database")) == ("critical", True)
    assert found["mend"] == "sudo forgectl maintenance inbox off"


@pytest.mark.exhaustive
def test_secrets(host: Host, vault: hvac.Client, status: Status) -> None:
    """Newer ones are a note, which changes no verdict; the timer puts them into service."""
    put(vault, unused="something")
    found = doctor(host)
    noted = told(found, "F404")
    assert (noted["severity"], found["verdict"]) == ("note", "clean")
    assert "something" not in str(found)
    host.check_output("forgectl secrets rotate inbox")
    until(lambda: status()["operation"] is None, 60)
    assert "F404" not in {each["code"] for each in doctor(host)["findings"]}


@pytest.mark.exhaustive
def test_a_reboot_that_is_pending(host: Host) -> None:
    """It says when it comes."""
    host.check_output("touch /run/reboot-required && echo libc6 > /run/reboot-required.pkgs")
    try:
        found = doctor(host)
    finally:
        host.check_output("rm /run/reboot-required /run/reboot-required.pkgs")
    assert told(found, "F701")["title"] == "a reboot is pending, and comes in the window 03:00-04:00: libc6"
    assert found["verdict"] == "clean"


@pytest.mark.exhaustive
@pytest.mark.parametrize("wait", [False, True])
def test_workers_that_were_killed(host: Host, live: str, wait: bool) -> None:
    """Just now it is a finding; when it is over, a note; in a fresh slot nothing."""
    kill = "kill -KILL $(pgrep --parent $(systemctl show --value --property=MainPID %s) | tail --lines=1)"
    host.check_output(kill, live)
    killed = until(lambda: [each for each in doctor(host)["findings"] if each["code"] == "F204"], 20)[0]
    assert (killed["severity"], killed["subject"]) == ("warning", "inbox")
    assert "one of its workers was killed for the memory that it took" in killed["title"]
    if wait:
        until(lambda: told(doctor(host), "F204")["severity"] == "note", 90, every=5)
    host.check_output("forgectl recycle inbox")
    assert "F204" not in {each["code"] for each in doctor(host)["findings"]}


# A certificate with so many days left, and such a name, in the place of the one that Nginx serves.
CERTIFICATE = """
import datetime, sys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP256R1())
name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, sys.argv[2])])
ends = datetime.datetime.utcnow() + datetime.timedelta(days=float(sys.argv[1]))
made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(ends - datetime.timedelta(days=90)).not_valid_after(ends)
        .sign(key, hashes.SHA256()))
with open("/etc/nginx/tls/live/inbox.pem", "wb") as file:
    file.write(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                 serialization.NoEncryption()) + made.public_bytes(serialization.Encoding.PEM))
"""


@pytest.mark.parametrize(
    ("days", "name", "code", "title"),
    [
        ("6.5", "inbox.example.com", "F101", "expires in 6 days"),
        pytest.param("-2.5", "inbox.example.com", "F102", "expired 2 days ago", marks=pytest.mark.exhaustive),
        pytest.param(
            "80", "placeholder until a certificate is issued", "F104", "placeholder", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_certificates(host: Host, days: str, name: str, code: str, title: str) -> None:
    """What clients get counts; and what they do not get yet is another finding."""
    host.check_output("cp --archive /etc/nginx/tls/live/inbox.pem /root/live.pem")
    try:
        host.check_output("python3 -W ignore -c %s %s %s", CERTIFICATE, days, name)
        assert "does not serve the newest certificate" in told(doctor(host), "F103", "inbox")["title"]
        host.check_output("systemctl reload nginx")
        found = until(lambda: [each for each in doctor(host)["findings"] if each["code"] == code], 30)[0]
        assert title in found["title"]
    finally:
        host.check_output("mv /root/live.pem /etc/nginx/tls/live/inbox.pem && systemctl reload nginx")
    until(lambda: is_clean(host), PATIENCE)


@pytest.mark.exhaustive
def test_no_network(host: Host) -> None:
    """It needs none to say so; what is missed of the network is said as well."""
    script = """
        route=$(ip route show default)
        ip route del default
        timeout 60 forgectl doctor --json > /root/without.json || :
        ip route add $route
    """
    podman("exec", CONTAINER, "bash", "-c", script)
    found = json.loads(host.check_output("cat /root/without.json && rm /root/without.json"))
    assert "no default route" in told(found, "F609")["title"]
    assert found["verdict"] == "critical"
    until(lambda: is_clean(host), PATIENCE)
