"""cli.py as a process."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import SOURCE
from forgectl import errors


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
        ["recover"],
        ["prune"],
        ["history"],
        ["boot"],
        ["status"],
        ["logs"],
        ["secrets", "enrol"],
        ["secrets", "check"],
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


def test_wrong_usage_is_2() -> None:
    assert run("release", "inbox").returncode == 2
    assert run("nonsense").returncode == 2
    assert run("secrets", "enrol", "inbox", "--identity", "other", "--role-id", "x").returncode == 2


def test_a_crash_writes_no_memory_to_the_disk() -> None:
    code = (
        "import contextlib, resource, sys\nsys.argv = ['forgectl', '--help']\nfrom forgectl import cli\n"
        "with contextlib.suppress(SystemExit): cli.main()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "(0, 0)"


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


def test_failures_are_json_too() -> None:
    done = run("status", "nothing", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == errors.REFUSED
    assert done.stderr == f"forgectl: {found['error']}\n"


def test_help_imports_only_what_it_needs() -> None:
    code = (
        "import sys, contextlib\nsys.argv = ['forgectl', '--help']\nfrom forgectl import cli\n"
        "with contextlib.suppress(SystemExit): cli.main()\n"
        "print(*sorted({'msgspec', 'psycopg', 'http.client', 'forgectl.release'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == ""


def test_the_lock_is_pinned_by_hash_and_names_no_registry() -> None:
    lock = (SOURCE.parent / "requirements.txt").read_text()
    names = re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE)
    assert {"click", "msgspec", "psycopg", "psycopg-binary", "uv"} <= set(names)
    assert lock.count("--hash=sha256:") > len(names)
    assert "://" not in lock
