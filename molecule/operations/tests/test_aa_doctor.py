"""forgectl doctor on a host that is well, and what it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from forge_diagnosis import CLEAN, WARNING, brief, codes, doctor, told
from forge_events import EventContext
from forge_load import percentile
from forge_scenario import playbook, weights_behind
from testinfra.host import Host

# A program that never ends, and one that fails.
FAKES = r"""
mkdir /root/fake
printf '#!/bin/sh\nsleep 60\n' > /root/fake/nft
printf '#!/bin/sh\nexit 1\n' > /root/fake/openssl
chmod +x /root/fake/*
"""


def test_a_host_that_is_well_is_clean(host: Host, say: Callable[[str], None]) -> None:
    """Nothing to mend, every check looked, and it says so to people and shells as well."""
    found = doctor(host)
    assert brief([each for each in found["findings"] if each["severity"] != "note"]) == []
    assert {each["name"]: each["outcome"] for each in found["checks"] if each["outcome"] != "ok"} == {}
    slowest = sorted(found["checks"], key=lambda each: -each["seconds"])[:4]
    shown = ", ".join(f"{each['name']} {each['seconds']:.2f}" for each in slowest)
    say(f"doctor took {found['seconds']:.2f} s: {shown}")
    run = host.run("forgectl doctor")
    assert run.rc == CLEAN
    assert re.search(r": clean \(.*\), \d+ checks in [\d.]+ s$", run.stdout, re.MULTILINE)
    assert host.run("forgectl doctor --app inbox").rc == CLEAN
    assert host.run("forgectl doctor --app nobody").rc == 2


def test_it_leaves_nothing_and_changes_nothing(host: Host) -> None:
    """No unit, no process, no token at Vault that lives on, no line of an error in the journal."""
    before = host.check_output("find /etc/forge /var/lib/forge /srv/inbox /run/inbox -newermt now -printf x | wc -c")
    since = host.check_output("date +%s")
    doctor(host)
    after = host.check_output("find /etc/forge /var/lib/forge /srv/inbox /run/inbox -newermt @%s -print", since)
    assert (before, after) == ("0", "")
    assert host.check_output("systemctl list-units --all --plain --no-legend 'forge-behind-*'") == ""
    assert host.run("journalctl --quiet --priority=err --since=@%s", since).stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        "forgectl doctor --json",
        "timeout --signal=INT 5 forgectl logs --follow",
        "forgectl day --json",
        "forgectl support-bundle --output -",
    ],
)
def test_who_looks_gets_the_cpu_after_whatever_serves(host: Host, command: str) -> None:
    """In a scope of its own with a fifth of the weight of a slot."""
    assert weights_behind(host, command) == ("20", "20")


def test_nobody_waits_for_it(host: Host, event: EventContext, say: Callable[[str], None]) -> None:
    """Called again and again under load: no request fails; how long they take is for whoever reads the figures."""
    with event("doctor, again and again") as happening:
        for _ in range(5):
            doctor(host)
    before = happening.result.between(happening.result.began, happening.began)
    was, is_now = (percentile(records, 99) for records in (before, happening.inside))
    say(f"p99 {was * 1000:.0f} ms before, {is_now * 1000:.0f} ms meanwhile")


def test_somebody_without_root(host: Host) -> None:
    """What anybody may see, and by name what was not looked at; no traceback."""
    run = host.run("runuser --user nobody -- /usr/local/sbin/forgectl doctor --json")
    found = json.loads(run.stdout)
    assert (run.rc, run.stderr) == (WARNING, "")
    assert codes(found) == {("F001", "host")}
    (unseen,) = told(found, "F001")["evidence"]
    skipped = {each["name"] for each in found["checks"] if each["outcome"] == "skipped"}
    assert skipped == set(unseen.removeprefix("not seen: ").split(", "))
    assert {"disks", "certificates", "network", "nginx", "units"}.isdisjoint(skipped)


def test_a_check_that_hangs(host: Host) -> None:
    """They are named, with the reason; everything else is looked at."""
    host.check_output("bash -euc %s", FAKES)
    try:
        found = doctor(host, before="env PATH=/root/fake:$PATH")
    finally:
        host.check_output("rm --recursive /root/fake")
    assert codes(found) == {("F002", "host")}
    outcomes = {each["name"]: each["outcome"] for each in found["checks"] if each["outcome"] != "ok"}
    assert outcomes == {"firewall": "failed", "certificates": "failed"}
    titles = " ".join(each["title"] for each in found["findings"])
    assert "nft list did not end within" in titles


def test_the_run_before_wrote_down_all_that_there_is(host: Host) -> None:
    """No file that bears Ansible's mark is left out, but for those that forgectl compares with releases."""
    known = set(json.loads(host.check_output("cat /var/lib/forge/manifest.json"))["files"])
    grep = "grep --recursive --files-with-matches 'Ansible managed' /etc /usr/local/sbin"
    marked = host.run(grep).stdout
    own = re.compile(r"^etc/(forge/apps/|systemd/system/(inbox@(blue|green)\.service\.d/release\.conf|inbox\.tidy\.))")
    left_out = {name.removeprefix("/") for name in marked.split()} - known
    assert {name for name in left_out if not own.match(name)} == set()
    assert len(known) > 40
    assert host.file("/var/lib/forge/manifest.json").mode == 0o600


@pytest.mark.exhaustive
def test_a_second_run_has_nothing_to_write_down(host: Host) -> None:
    """Neither a whole one nor one of a part; and a dry run writes nothing."""
    before = host.check_output("sha256sum /var/lib/forge/manifest.json")
    for arguments in ((), ("--tags", "logging"), ("--check",)):
        run = playbook(*arguments)
        assert run.returncode == 0, run.stdout + run.stderr
        assert re.search(r"changed=0 ", run.stdout), run.stdout
    assert host.check_output("sha256sum /var/lib/forge/manifest.json") == before
