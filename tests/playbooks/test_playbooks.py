"""What playbooks say and do where a host, its variables or the inventory are not as they expect."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLEAN = json.dumps({"schema": 1, "verdict": "clean", "findings": []})
WORD = "Traceback (most recent call last): broken"


def play(
    folder: Path, playbook: Path | str, *options: str, hosts: str = "all: {hosts: {web1: }}"
) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the project for hosts that are this machine."""
    inventory = folder / "hosts.yml"
    inventory.write_text(hosts)
    here = ["-e", "ansible_connection=local", "-e", f"ansible_python_interpreter={sys.executable}"]
    return subprocess.run(
        [
            "ansible-playbook",
            "--inventory",
            str(inventory),
            str(playbook),
            *here,
            "-e",
            "ansible_become=false",
            *options,
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1", "PWD": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed, as one line."""
    return " ".join((done.stdout + done.stderr).split())


def patched(folder: Path, *answers: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run patch.yml with stand-ins for what it calls; `answers` are scripts, of doctor's first call and its others."""
    programs = folder / "programs"
    for name in ("sbin", "library"):
        (programs / name).mkdir(parents=True)
    first, others = (answers * 2)[:2]
    scripts = {
        "forgectl": f"if [ -e {folder}/asked ]; then\n{others}\nelse\ntouch {folder}/asked\n{first}\nfi",
        "forge-reboot": """echo '{"due": [], "outdated": []}'""",
    }
    for name, script in scripts.items():
        if name not in changes.get("without", ""):
            (programs / "sbin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / "sbin" / name).chmod(0o755)
    (programs / "library" / "stand_in.py").write_text(
        "from ansible.module_utils.basic import AnsibleModule\n"
        "free = ('upgrade', 'force_apt_get', 'update_cache', 'lock_timeout')\n"
        "module = AnsibleModule({name: {} for name in free})\n"
        f"open({str(folder / 'upgraded')!r}, 'w').close()\n"
        "module.exit_json(changed=True, stdout='Setting up hello (2.10-3)')\n"
    )
    for name in ("playbooks", "roles/base"):
        shutil.copytree(ROOT / name, programs / name)
    tasks = programs / "roles/base/tasks/patch.yml"
    text = tasks.read_text().replace("/usr/local/sbin", f"{programs}/sbin")
    tasks.write_text(text.replace("ansible.builtin.apt:", "stand_in:").replace("delay: 5", "delay: 0"))
    shutil.copy(ROOT / "ansible.cfg", programs)
    shutil.copytree(programs / "library", programs / "playbooks/library")
    os.environ["ANSIBLE_ROLES_PATH"] = str(programs / "roles")
    try:
        return play(
            folder, programs / "playbooks/patch.yml", "-e", "patience=10", hosts="all: {hosts: {web1: , web2: }}"
        )
    finally:
        del os.environ["ANSIBLE_ROLES_PATH"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (f"echo '{WORD}' >&2; exit 1", f"Found: exit code 1 and {WORD}."),
        ("echo all is well", "Found: exit code 0 and all is well."),
        (":", "Found: exit code 0 and no word."),
        ('echo \'{"findings": [{"code": \'; exit 10', 'Found: exit code 10 and {"findings": [{"code":.'),
        ("exit 2", "Found: exit code 2 and no"),
    ],
)
def test_no_update_without_an_answer_of_doctor(tmp_path: Path, answer: str, found: str) -> None:
    """It stops at the first such host, before anything changes, and says what was found and what to do."""
    done = patched(tmp_path, answer)
    assert done.returncode
    assert "Expected: what `forgectl doctor --json` says of web1." in said(done)
    assert found in said(done).replace('\\"', '"')
    assert "Do: run site.yml" in said(done)
    assert not (tmp_path / "upgraded").exists()
    assert "web2" not in done.stdout.partition("PLAY RECAP")[0]


def test_no_update_without_forgectl(tmp_path: Path) -> None:
    done = patched(tmp_path, ":", without="forgectl")
    assert done.returncode
    assert "Expected: what `forgectl doctor --json` says of web1." in said(done)
    assert not (tmp_path / "upgraded").exists()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (f"echo '{WORD}' >&2; exit 1", f"Found: exit code 1 and {WORD}."),
        ("echo all is well", "Found: exit code 0 and all is well."),
        (":", "Found: exit code 0 and no word."),
    ],
)
def test_a_host_whose_doctor_says_nothing_after_the_update_is_the_last(tmp_path: Path, answer: str, found: str) -> None:
    done = patched(tmp_path, f"echo '{CLEAN}'", answer)
    assert done.returncode
    assert (tmp_path / "upgraded").exists()
    assert "web1 did not come back clean" in said(done)
    assert found in said(done)
    assert "Do: `sudo forgectl doctor`" in said(done)
    assert "web2" not in done.stdout.partition("PLAY RECAP")[0]


def test_hosts_that_stay_clean_are_all_updated(tmp_path: Path) -> None:
    done = patched(tmp_path, f"echo '{CLEAN}'")
    assert not done.returncode, done.stdout + done.stderr
    assert done.stdout.count("hello (2.10-3)") == 2


def test_what_was_wrong_before_hides_nothing_of_its_kind(tmp_path: Path) -> None:
    """One timer was off before the update, and its figures change; another one is off after it."""

    def said_of(*timers: str, minutes: int) -> str:
        finding = {"code": "F704", "severity": "warning", "subject": "host", "runbook": "unit-failed"}
        found = [
            {**finding, "title": f"{name} is off for {minutes} min", "mend": f"sudo systemctl start {name}"}
            for name in timers
        ]
        return f"echo '{json.dumps({'schema': 1, 'verdict': 'warning', 'findings': found})}'; exit 10"

    (tmp_path / "known").mkdir()
    done = patched(tmp_path / "known", said_of("a.timer", minutes=1), said_of("a.timer", minutes=2))
    assert not done.returncode, done.stdout + done.stderr
    (tmp_path / "new").mkdir()
    done = patched(tmp_path / "new", said_of("a.timer", minutes=1), said_of("a.timer", "b.timer", minutes=2))
    assert done.returncode
    assert "Found: F704 host: b.timer is off for 2 min." in said(done)


PLAYBOOKS = sorted(path.name for path in (ROOT / "playbooks").glob("*.yml"))


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_run_without_a_host_is_an_error(tmp_path: Path, playbook: str) -> None:
    """Rather than a success that did nothing."""
    done = play(tmp_path, f"playbooks/{playbook}", hosts="all: {hosts: {}}")
    assert done.returncode, said(done)
    assert "Expected: a host in the inventory. Found: none. Do: " in said(done)


@pytest.mark.parametrize("limit", ["web1,wbe2", "wbe2"])
def test_hosts_that_are_not_there_are_an_error(tmp_path: Path, limit: str) -> None:
    """Also beside others that are: whoever names them wants them."""
    done = play(tmp_path, "playbooks/maintenance.yml", "--list-hosts", "--limit", limit)
    assert done.returncode, said(done)


def test_an_inventory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Or one that is none."""
    done = play(tmp_path, "playbooks/maintenance.yml", "--list-hosts", hosts="all: [")
    assert done.returncode, said(done)
    assert "Expected: a host in the inventory. Found: none. Do: " in said(done)


def test_what_lies_beside_the_hosts_is_no_inventory(tmp_path: Path) -> None:
    """What the project and its README put there: nobody is warned of it, and no run fails for it."""
    (tmp_path / "vault-ca.pem").write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    for folder, name in (("tls", "ca.csr"), ("tls", "ca.key"), ("locks", "inbox.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("-----BEGIN THIS-----\nMIIB = x\n-----END THIS-----\n")
    done = play(tmp_path, "playbooks/maintenance.yml", "--list-hosts", "--inventory", str(tmp_path))
    assert not done.returncode, said(done)
    assert "parse" not in said(done)


def test_a_playbook_is_checked_without_hosts(tmp_path: Path) -> None:
    """As tools do that know no inventory."""
    done = play(tmp_path, "site.yml", "--syntax-check", hosts="all: {hosts: {}}")
    assert not done.returncode, said(done)


BAD = (
    "all: {hosts: {web1: {ansible_become: true, ansible_become_password: '{{ nowhere }}'}, "
    "web2: {ansible_connection: ssh, ansible_host: 192.0.2.1}}}"
)


@pytest.mark.parametrize("host", ["web1", "web2"])
def test_doctor_never_says_of_a_host_that_it_does_not_know_that_it_is_well(tmp_path: Path, host: str) -> None:
    """Whatever findings are worth: that nobody could ask it is none."""
    inventory = BAD.replace("ansible_host", "ansible_timeout: 1, ansible_host")
    here = ("-e", f"page={tmp_path}/page.html", "-e", "fail_on=never", "--limit", host)
    (tmp_path / "hosts.yml").write_text(inventory)
    done = subprocess.run(
        ["ansible-playbook", "--inventory", f"{tmp_path}/hosts.yml", "playbooks/doctor.yml", *here],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode, said(done)
    assert re.search(rf"^{host} +unknown +", done.stdout, re.MULTILINE), said(done)
    assert "failed=1" in done.stdout
    assert '<span class="badge unknown">unknown</span>' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("value", ["Never", "none", "", "clean"])
def test_doctor_refuses_what_it_does_not_know_before_it_asks(tmp_path: Path, value: str) -> None:
    done = play(tmp_path, "playbooks/doctor.yml", "-e", f"fail_on={value}", "-e", f"page={tmp_path}/page.html")
    assert done.returncode
    assert "Expected: fail_on=warning, critical or never. Found: fail_on=" + value in said(done)
    assert "Ask each host" not in done.stdout


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ((), True),
        (("--skip-tags", "elsewhere"), True),
        (("--tags", "base"), False),
        (("--skip-tags", "base"), False),
        (("--start-at-task", "Begin"), False),
        (("--start-at-task", "B*", "--tags", "all"), False),
    ],
)
def test_only_a_run_of_all_is_written_down_as_one(tmp_path: Path, options: tuple[str, ...], whole: bool) -> None:
    """One that left tasks out, however, does not vouch for what they would have put right."""
    shutil.copytree(ROOT / "roles/forgectl/tasks", tmp_path / "roles/forgectl/tasks")
    forgectl = tmp_path / "forgectl"
    forgectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\necho \'{{"changed": false}}\'\n')
    forgectl.chmod(0o755)
    tasks = tmp_path / "roles/forgectl/tasks/provisioned.yml"
    tasks.write_text(tasks.read_text().replace("/usr/local/sbin/forgectl", str(forgectl)))
    (tmp_path / "roles/base/tasks").mkdir(parents=True)
    (tmp_path / "roles/base/tasks/main.yml").write_text("- name: Begin\n  ansible.builtin.meta: noop\n")
    (tmp_path / "play.yml").write_text(
        "- hosts: all\n  gather_facts: false\n  vars: {forge_host: {time: 1.5, manifest: true}}\n"
        "  roles: [{role: base, tags: [base]}]\n"
        "  post_tasks:\n    - ansible.builtin.import_role: {name: forgectl, tasks_from: provisioned}\n"
        "      tags: [always]\n"
    )
    done = play(tmp_path, tmp_path / "play.yml", *options)
    assert not done.returncode, said(done)
    called = (tmp_path / "called").read_text().split()
    assert called == ["provisioned", "--json", "--since", "1.5", *(["--whole"] if whole else [])]
