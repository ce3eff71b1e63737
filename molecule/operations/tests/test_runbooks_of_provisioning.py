"""docs/runbooks/not-provisioned.md and drift.md: every command of them, on a host that is so; and bad input."""

from __future__ import annotations

import json

import pytest
from forge_diagnosis import CRITICAL, WARNING, brief, codes, doctor, told, well
from forge_runbook import Runbooks
from forge_scenario import Status, until
from testinfra.host import Host

NOT_PROVISIONED, DRIFT = "not-provisioned", "drift"
__all__ = ["well"]
# A fault of a file before this one may still be told.
pytestmark = pytest.mark.usefixtures("well")
SEEN, LOOK, MENDED = "What you see", "Look", "See that it is mended"


def elsewhere(host: Host, *steps: str) -> tuple[int, dict[str, object]]:
    """What doctor says where these steps were made, in a mount namespace of its own, so that nobody else sees them."""
    script = " && ".join(["mount --make-rprivate /", *steps, "timeout 60 forgectl doctor --json"])
    run = host.run("unshare --mount bash -c %s", script)
    assert run.stdout.startswith("{"), (run.rc, run.stdout, run.stderr)
    found: dict[str, object] = json.loads(run.stdout)
    return run.rc, found


def test_a_host_that_was_never_provisioned(host: Host) -> None:
    """It says so, and what it can see of the host: here, that its disk is full as well."""
    rc, found = elsewhere(
        host,
        "mount -t tmpfs none /etc/forge",
        "mount -t tmpfs none /var/lib/forge",
        "mount -t tmpfs -o size=1M none /mnt",
        "head -c 1000000 /dev/zero > /mnt/x",
    )
    assert (rc, codes(found)) == (CRITICAL, {("F003", "host"), ("F601", "host")})
    # Without even the folder.
    rc, found = elsewhere(
        host,
        "mkdir /run/none /run/none/up /run/none/work",
        "mount -t overlay -o lowerdir=/etc,upperdir=/run/none/up,workdir=/run/none/work none /etc",
        "rm -r /etc/forge",
        "mount -t tmpfs none /var/lib/forge",
    )
    host.check_output("rm -rf /run/none")
    assert (rc, codes(found)) == (CRITICAL, {("F003", "host")})


def test_a_host_whose_first_run_failed_half_way(host: Host) -> None:
    """Its app is described, and that is all."""
    rc, found = elsewhere(host, "mount -t tmpfs none /var/lib/forge", "mount -t tmpfs none /run/inbox")
    assert (rc, codes(found)) == (WARNING, {("F004", "host"), ("F004", "inbox")})
    assert "no release of it ever served" in told(found, "F004", "inbox")["title"]


@pytest.mark.exhaustive
def test_not_provisioned(host: Host, status: Status, runbooks: Runbooks) -> None:
    """The last run did not come to its end, and somebody broke a description: clients notice nothing."""
    live = status()["live"]
    host.check_output("mv /var/lib/forge/manifest.json /root/ && echo 'name = ' >> /etc/forge/apps/inbox.toml")
    found = doctor(host)
    assert {("F004", "host"), ("F005", "inbox")} <= codes(found)
    assert "inbox.toml" in told(found, "F005")["title"]
    # It goes on with what the live release says.
    assert {each["name"] for each in found["checks"] if each["outcome"] in ("failed", "too slow")} == set()
    assert "F005" in runbooks.follow(NOT_PROVISIONED, SEEN)
    for section in (LOOK, "Somebody without root", "A check could not look"):
        runbooks.follow(NOT_PROVISIONED, section)
    runbooks.follow(NOT_PROVISIONED, "Configuration broken")
    assert "F005" not in {each["code"] for each in doctor(host)["findings"]}
    runbooks.follow(NOT_PROVISIONED, "site.yml did not come to its end")
    runbooks.follow(NOT_PROVISIONED, MENDED)
    assert (status()["live"]["release"], codes(doctor(host))) == (live["release"], set())
    host.check_output("rm --force /root/manifest.json")
    assert runbooks.left(NOT_PROVISIONED) == []


@pytest.mark.exhaustive
def test_drift(host: Host, status: Status, runbooks: Runbooks) -> None:
    """Each kind of it, found and put right by what the page says."""
    slot = status()["live"]["slot"]
    added = "/etc/nginx/conf.d/somebody.conf"
    host.check_output(
        f"""
        echo '# by hand' >> /etc/nginx/nginx.conf
        rm /etc/tmpfiles.d/forge.conf
        echo '# by hand' > {added}
        echo 0 > /proc/sys/net/ipv4/tcp_rfc1337
        nft delete table inet forge
        echo 'MemoryMax=1G' >> /etc/systemd/system/inbox@{slot}.service.d/release.conf
        echo '# by hand' >> /etc/forge/apps/inbox.d/gunicorn.conf.py
        """
    )
    found = doctor(host)
    assert codes(found) - {("F803", "inbox")} == {("F006", "host"), ("F006", "inbox")}, brief(found["findings"])
    assert "F006" in runbooks.follow(DRIFT, SEEN)
    looked = runbooks.follow(DRIFT, LOOK)
    for line in (
        "/etc/nginx/nginx.conf has another content",
        "/etc/tmpfiles.d/forge.conf is gone",
        f"{added} was added",
        "kernel setting net.ipv4.tcp_rfc1337 is 0 and was 1",
        "no table inet forge",
        "-# by hand",
    ):
        assert line in looked
    runbooks.follow(DRIFT, "A setting of the kernel")
    runbooks.follow(DRIFT, "The firewall")
    runbooks.follow(DRIFT, "The unit of a slot")
    until(lambda: status()["operation"] is None, 60)
    runbooks.follow(DRIFT, "Settings that wait")
    until(lambda: status()["operation"] is None, 60)
    runbooks.follow(DRIFT, "What site.yml wrote")
    left = doctor(host)
    assert told(left, "F006")["title"] == f"1 not as site.yml left it: {added}", brief(left["findings"])
    follow_added(host, runbooks, added)
    runbooks.follow(DRIFT, MENDED)
    assert runbooks.left(DRIFT) == []


def follow_added(host: Host, runbooks: Runbooks, added: str) -> None:
    """Move it away; and of one that is to stay, say so: both are steps of one section."""
    host.check_output("echo '# to stay' > /etc/nginx/conf.d/to-stay.conf")
    try:
        runbooks.follow(DRIFT, "What somebody added", {"file": added})
        assert not host.file(added).exists
        assert codes(doctor(host)) == set()
    finally:
        host.check_output("rm --force /etc/nginx/conf.d/to-stay.conf /root/somebody.conf")
        host.check_output("forgectl provisioned --accept")
