"""playbooks/patch.yml: real updates under load, a reboot where one is due, a stop at what does not come back clean."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forge_load
import httpx
import pytest
import yaml
from forge_events import Event, settle, table
from forge_firmware import Firmware
from forge_scenario import Status, main_pid, playbook, ready, show, until
from testinfra.host import Host

PATCH = "playbooks/patch.yml"
FOLDER = "/srv/updates"
# A library that Nginx and the app have loaded, as the distribution has it, but newer: another version, other files.
NEWER = f"""
set -eu
mkdir --parents {FOLDER} && cd {FOLDER}
library=$(readlink --canonicalize /usr/lib/x86_64-linux-gnu/libssl.so.3)
package=$(dpkg-query --search "$library" | cut --delimiter=: --fields=1)
test -e original || {{
    version=$(dpkg-query --show --showformat='${{Version}}' "$package" | sed 's/+newer.*//')
    apt-get download --quiet --quiet "$package=$version"
    mv "$package"_*.deb original
}}
dpkg-deb --raw-extract original unpacked
sed --in-place 's/^Version: .*/&+newer'"$1"'/' unpacked/DEBIAN/control
dpkg-deb --build --root-owner-group unpacked "$package.deb" > /dev/null
rm --recursive unpacked
dpkg-scanpackages --multiversion . > Packages 2> /dev/null
echo 'deb [trusted=yes] file:{FOLDER} ./' > /etc/apt/sources.list.d/updates.list
echo "$package"
"""
# In the place of forgectl: what doctor says is what a file says, one for each time it is asked, the last one for ever.
DOCTOR = """#!/bin/sh
if [ "$1" != doctor ]; then exec /opt/forge/forgectl/bin/forgectl "$@"; fi
cd /srv/doctor
n=$(cat asked 2> /dev/null || echo 0)
[ -e "$((n + 1)).json" ] && n=$((n + 1)) && echo "$n" > asked
cat "$n.json"
exit "$(cat "$n.rc")"
"""
FORGECTL = "/usr/local/sbin/forgectl"


def finding(code: str, severity: str, title: str, mend: str) -> dict[str, str]:
    """One of the app's, as far as anybody here reads it."""
    return {"code": code, "severity": severity, "subject": "inbox", "title": title, "mend": mend}


SICK = finding("F201", "critical", "inbox does not run", "sudo forgectl rollback inbox")
LATER = finding("F101", "warning", "expires in 6 days", "sudo forge-certificates renew")
NOTE = finding("F303", "note", "its page is on", "sudo forgectl maintenance inbox off")


class Doctor:
    """What doctor says, by turns: these findings, with the exit code that is due."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def says(self, *turns: list[dict[str, str]]) -> None:
        """Have it find this the first time, that the second, and the last of them from then on."""
        self._host.check_output("rm --recursive --force /srv/doctor && mkdir /srv/doctor")
        for number, findings in enumerate(turns, 1):
            severities = {each["severity"] for each in findings}
            code = 11 if "critical" in severities else 10 if "warning" in severities else 0
            self.answers(number, json.dumps({"schema": 1, "findings": findings}), code)

    def answers(self, number: int, text: str, code: int) -> None:
        """Have it print a text at one of these times."""
        self._host.check_output(
            f"printf %%s %s > /srv/doctor/{number}.json && echo {code} > /srv/doctor/{number}.rc", text
        )


@pytest.fixture(scope="module")
def doctor(host: Host) -> Iterator[Doctor]:
    """One that finds what a test wants."""
    was = host.check_output("readlink %s", FORGECTL)
    host.check_output(f"rm {FORGECTL} && printf %%s %s > {FORGECTL} && chmod 0755 {FORGECTL}", DOCTOR)
    yield Doctor(host)
    host.check_output("ln --symbolic --force %s %s && rm --recursive --force /srv/doctor", was, FORGECTL)


@pytest.fixture(scope="module", autouse=True)
def _caught_up(host: Host) -> Iterator[None]:
    """Nothing of the distribution is newer, so that what a test publishes is all there is."""
    host.check_output("apt-get update --quiet --quiet")
    host.check_output("DEBIAN_FRONTEND=noninteractive apt-get upgrade --yes --quiet --quiet --with-new-pkgs")
    yield
    host.check_output("rm --recursive --force /etc/apt/sources.list.d/updates.list %s", FOLDER)
    host.check_output("apt-get update --quiet --quiet")


def publish(host: Host) -> tuple[str, str]:
    """Publish a newer version of a library in a repository of the host's own; the package, and how its version ends."""
    number = str(int(time.time()))
    return str(host.check_output("sh -c %s sh %s", NEWER, number).splitlines()[-1]), f"+newer{number}"


def version(host: Host, package: str) -> str:
    """The version that is installed."""
    return str(host.check_output("dpkg-query --show --showformat='${Version}' %s", package))


def changed(run: Any) -> int:
    """How many tasks changed something."""
    return sum(map(int, re.findall(r"changed=(\d+)", run.stdout)))


def master(host: Host) -> int:
    """The process of Nginx that new connections belong to."""
    return int(host.check_output("cat /run/nginx.pid"))


def test_a_host_without_doctor_is_refused(host: Host, doctor: Doctor) -> None:
    doctor.says([])
    doctor.answers(1, "", 2)
    package, newer = publish(host)
    refused = playbook(name=PATCH)
    assert refused.returncode != 0
    assert "Do: run site.yml, which installs forgectl" in " ".join(refused.stdout.split())
    assert (changed(refused), version(host, package).endswith(newer)) == (0, False)


@pytest.mark.exhaustive
def test_a_host_in_trouble_is_left_alone(doctor: Doctor) -> None:
    """Unless somebody wants it; then what was there before is nothing new."""
    doctor.says([SICK, LATER])
    refused = playbook(name=PATCH)
    assert refused.returncode != 0
    said = " ".join(refused.stdout.split())
    assert "F201 inbox: inbox does not run;" in said
    assert "F101" not in said
    assert changed(refused) == 0
    assert playbook("--check", "-e", "with_findings=true", name=PATCH).returncode == 0


@pytest.mark.exhaustive
def test_a_check_says_what_would_come(host: Host, doctor: Doctor) -> None:
    """And changes nothing, not even the lists of packages."""
    doctor.says([LATER])
    host.check_output("apt-get update --quiet --quiet")
    package, _ = publish(host)
    host.check_output("apt-get update --quiet --quiet")
    before = host.check_output("stat --format=%Z /var/lib/apt/lists /var/lib/dpkg/status")
    dry = playbook("--check", "--diff", name=PATCH)
    assert dry.returncode == 0, dry.stdout
    assert changed(dry) == 1
    assert re.search(rf"- {package} ", dry.stdout), dry.stdout
    assert "A reboot is due already: no" in dry.stdout
    assert host.check_output("stat --format=%Z /var/lib/apt/lists /var/lib/dpkg/status") == before


def test_an_update_under_load(host: Host, doctor: Doctor, status: Status) -> None:
    """Nginx is replaced in place and the app by a cutover; no request fails; a second run finds nothing to do."""
    doctor.says([LATER])
    package, newer = publish(host)
    settle(status)
    nginx, live = master(host), status()["live"]
    variables = host.ansible.get_variables()
    trust = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem"
    site = (variables["ansible_host"], variables["apps"]["inbox"]["domain"], trust)
    with forge_load.running(*site, rate=40.0) as load:
        time.sleep(2)
        # PostgreSQL has loaded the library too, which only a reboot replaces.
        done = playbook("-e", "reboot=false", name=PATCH)
        settle(status)
        time.sleep(2)
    assert done.returncode == 0, done.stdout
    assert version(host, package).endswith(newer)
    assert re.search(rf"- {package}.*{re.escape(newer)}", done.stdout), done.stdout
    assert master(host) != nginx
    now = status()["live"]
    assert (now["release"], now["slot"] != live["slot"]) == (live["release"], True)
    event = Event("an update", load, stored=table(host, load.result.run))
    assert len(load.result.records) > 200
    event.assert_unnoticed(idle=True)
    again = playbook("-e", "reboot=false", name=PATCH)
    assert (again.returncode, changed(again)) == (0, 0), again.stdout
    assert "nothing is newer" in again.stdout


@pytest.mark.exhaustive
def test_a_reboot_where_one_is_due(host: Host, doctor: Doctor, client: httpx.Client, status: Status) -> None:
    """Outside its window, after a drain, once; and doctor's word counts when the host is back."""
    live = status()["live"]
    host.check_output("echo libc6 > /run/reboot-required.pkgs && touch /run/reboot-required")
    doctor.says([LATER])
    assert changed(playbook("--check", name=PATCH)) == 1
    left = playbook("-e", "reboot=false", name=PATCH)
    assert (left.returncode, changed(left)) == (0, 0), left.stdout
    with Firmware() as firmware:
        done = playbook(name=PATCH)
    assert done.returncode == 0, done.stdout
    assert (firmware.boots, changed(done)) == (1, 1)
    assert host.run("test -e /run/reboot-required").rc != 0
    until(lambda: ready(client), 60, every=0.5)
    assert (status()["live"]["release"], main_pid(host, "nginx.service") > 0) == (live["release"], True)
    # Its timer does that two minutes after a boot: a reason that is gone may come again.
    host.check_output("systemctl start forge-reboot.service")
    said = host.check_output("journalctl --boot=all --unit=forge-reboot --output=cat")
    assert re.search("rebooting: .*libc6 was updated", said)


@pytest.mark.exhaustive
def test_a_reboot_that_has_to_wait_fails_at_once(host: Host, doctor: Doctor, client: httpx.Client) -> None:
    """A release is under way: the run says so, nothing is drained, and nothing reboots later by itself."""
    doctor.says([])
    host.check_output("echo libc6 > /run/reboot-required.pkgs && touch /run/reboot-required")
    nginx = main_pid(host, "nginx.service")
    host.check_output("systemd-run --quiet --unit=forge-held flock /var/lib/forge/inbox/lock sleep 120")
    try:
        until(lambda: main_pid(host, "forge-held.service"), 10)
        failed = playbook(name=PATCH)
    finally:
        host.check_output("systemctl stop forge-held.service; rm /run/reboot-required*")
    assert failed.returncode != 0
    assert "it waits, since inbox: a command is under way" in " ".join(failed.stdout.split())
    assert host.run("test -e /run/forge-reboot-asked").rc != 0
    assert (main_pid(host, "nginx.service"), ready(client)) == (nginx, True)


def test_it_stops_at_the_first_host_that_does_not_come_back_clean(doctor: Doctor, tmp_path: Path) -> None:
    """The second host of the inventory is not touched; what was found is said, and what was there before is not."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    hosts = yaml.safe_load(Path(os.environ["MOLECULE_INVENTORY_FILE"]).read_text())
    (one,) = hosts["all"]["hosts"].values()
    for name in ("group_vars", "host_vars"):
        if (inventory / name).exists():
            (tmp_path / name).symlink_to(inventory / name)
    names = {"all": {"hosts": {"first": one, "second": one}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(names))
    doctor.says([LATER, NOTE], [LATER, SICK])
    failed = playbook(
        "--inventory", str(tmp_path), "--limit", "first,second", "-e", "reboot=false", "-e", "patience=10", name=PATCH
    )
    assert failed.returncode != 0
    said = " ".join(failed.stdout.split())
    assert "first did not come back clean, and the hosts after it are left alone." in said
    assert "Found: F201 inbox: inbox does not run." in said
    assert "[second]" not in failed.stdout
    assert not re.search(r"^second\s+: ok=[1-9]", failed.stdout, re.MULTILINE)
    # One that needs a moment to be well is waited for.
    doctor.says([LATER], [LATER, SICK], [LATER])
    done = playbook("--inventory", str(tmp_path), "--limit", "first,second", "-e", "reboot=false", name=PATCH)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^second\s+: ok=[1-9]", done.stdout, re.MULTILINE)


@pytest.mark.exhaustive
def test_a_file_that_was_not_replaced_is_replaced_by_the_next_run(host: Host, doctor: Doctor, status: Status) -> None:
    """As after an update whose cutover failed."""
    doctor.says([])
    package, _ = publish(host)
    host.check_output("apt-get update --quiet --quiet")
    live, nginx = status()["live"]["slot"], master(host)
    host.check_output(
        "NEEDRESTART_SUSPEND=1 DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet %s", package
    )
    assert (status()["live"]["slot"], master(host)) == (live, nginx)
    done = playbook("-e", "reboot=false", name=PATCH)
    assert (done.returncode, changed(done)) == (0, 1), done.stdout
    settle(status)
    assert (status()["live"]["slot"] != live, master(host) != nginx) == (True, True)
    assert show(host, "nginx.service", "ActiveState") == "active"
    assert changed(playbook("-e", "reboot=false", name=PATCH)) == 0
