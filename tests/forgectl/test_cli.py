"""cli.py as a process."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import SOURCE
from forgectl import cli, config, errors, systemd
from forgectl.errors import Refused
from forgectl.layout import Layout


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forgectl", *arguments],
        env={"PYTHONPATH": str(SOURCE), "PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["release"],
        ["rollback"],
        ["recycle"],
        ["stage"],
        ["watch"],
        ["lease"],
        ["recover"],
        ["prune"],
        ["history"],
        ["boot"],
        ["maintenance"],
        ["remove"],
        ["restore"],
        ["purge"],
        ["status"],
        ["doctor"],
        ["provisioned"],
        ["day"],
        ["logs"],
        ["inspect"],
        ["secrets", "enrol"],
        ["secrets", "check"],
        ["secrets", "rotate"],
        ["secrets", "set"],
        ["secrets", "unset"],
        ["database", "verifiers"],
    ],
)
def test_every_command_explains_itself(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert not re.search(r"--[a-z-]+( [A-Z]+)?$", done.stdout, re.MULTILINE), "an option without a help text"


def test_help_lists_the_exit_codes() -> None:
    text = run("--help").stdout
    for name in (
        "DONE",
        "UNEXPECTED",
        "USAGE",
        "REFUSED",
        "CANDIDATE_FAILED",
        "LOCKED",
        "SECRETS",
        "ROLLED_BACK",
        "INTERRUPTED",
    ):
        assert re.search(rf"^ +{getattr(errors, name)}  ", text, re.MULTILINE), name


@pytest.mark.parametrize("command", ["remove", "purge"])
def test_what_is_not_on_this_host_needs_no_removal(command: str) -> None:
    """Which a play over several hosts meets."""
    done = run(command, "nothing", "--json")
    assert (done.returncode, json.loads(done.stdout)["changed"]) == (0, False)
    assert "nothing of it is on this host" in run(command, "nothing").stdout
    assert run("restore", "nothing").returncode == errors.REFUSED


def test_wrong_usage_is_2() -> None:
    assert run("release", "inbox").returncode == 2
    assert run("nonsense").returncode == 2
    assert run("maintenance", "inbox", "perhaps").returncode == 2
    assert run("secrets", "enrol", "inbox", "--identity", "other", "--role-id", "x").returncode == 2


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        # Secrets pass through: a crash must not write them to the disk, nor to a program for cores.
        ("__import__('resource').getrlimit(__import__('resource').RLIMIT_CORE)", "(1, 1)"),
        # Help is quick.
        ("{'msgspec', 'psycopg', 'hvac', 'http.client', 'forgectl.release'} & set(sys.modules)", "set()"),
    ],
)
def test_help_leaves_behind(expression: str, expected: str) -> None:
    code = (
        "import sys\nsys.argv = ['forgectl', '--help']\nfrom forgectl import cli\n"
        f"try: cli.main()\nexcept SystemExit: print({expression}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == expected


def test_a_terminal_that_is_gone_changes_no_exit_code() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "forgectl", "status", "nothing"],
        env={"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.DEVNULL,
        stderr=write,
        check=False,
    )
    os.close(write)
    assert done.returncode == errors.REFUSED


@pytest.mark.parametrize("command", [("status", "nothing"), ("maintenance", "nothing", "on")])
def test_failures_are_json_too(command: tuple[str, ...]) -> None:
    done = run(*command, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == errors.REFUSED
    assert done.stderr == f"forgectl: {found['error']}\n"


def test_the_lock_is_pinned_by_hash_and_names_no_registry() -> None:
    lock = (SOURCE.parent / "requirements.txt").read_text()
    names = re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE)
    assert {"click", "msgspec", "psycopg", "psycopg-binary", "uv"} <= set(names)
    assert lock.count("--hash=sha256:") > len(names)
    assert "://" not in lock


def test_status_shows_the_others_of_a_broken_app(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named with the reason, and whoever calls is told."""

    def described(name: str) -> tuple[Layout, config.App]:
        if name == "shop":
            raise Refused("expected a description of shop; found none that can be read; run site.yml")
        return layout, config.load(layout.description)

    monkeypatch.setattr(cli, "_app", described)
    monkeypatch.setattr("forgectl.layout.names", lambda: ["inbox", "shop"])
    monkeypatch.setattr(systemd, "show", lambda _: {"ActiveState": "inactive"})
    done = CliRunner().invoke(cli.forgectl, ["status", "--json"])
    assert done.exit_code == errors.REFUSED
    found = json.loads(done.stdout)
    assert (list(found["apps"]), list(found["broken"])) == (["inbox"], ["shop"])
    text = CliRunner().invoke(cli.forgectl, ["status"]).stdout
    assert "live      nothing was released yet" in text
    assert "shop  BROKEN: expected a description of shop; found" in text
