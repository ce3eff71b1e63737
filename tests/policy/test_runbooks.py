"""docs/runbooks/: a page for every finding of doctor, of one shape, in an index, with commands that a test has run."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import forge_reliability
import forge_runbook
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "runbooks"
CATALOGUE = ROOT / "roles/forgectl/files/forgectl/src/forgectl/doctor/catalogue.py"
SHAPE = [
    "What you see",
    "What it means",
    "What clients notice",
    "Look",
    "Mend",
    "See that it is mended",
    "Prevent",
]
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
INDEX = (FOLDER / "README.md").read_text()


def read(page: str) -> str:
    """Return a page as it is."""
    return (FOLDER / f"{page}.md").read_text()


@cache
def catalogue() -> dict[str, list[str]]:
    """Return code, name, severity and page of every finding, from doctor's one table."""
    rows = [
        [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
        for node in ast.walk(ast.parse(CATALOGUE.read_text()))
        if isinstance(node, ast.Call)
    ]
    return {row[0]: row for row in rows if len(row) == 4 and re.fullmatch(r"F\d{3}", row[0])}


@cache
def modules() -> dict[str, set[str]]:
    """Return the texts that each test module of the scenarios has in it, by its path."""
    return {
        str(path.relative_to(ROOT)): {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for path in sorted((ROOT / "molecule").glob("*/tests/test_*.py"))
    }


def test_every_finding_has_its_page() -> None:
    """And no page is named that is not there."""
    assert len(catalogue()) > 40
    assert {code: page for code, _, _, page in catalogue().values() if page not in PAGES} == {}


def test_every_fault_names_what_there_is() -> None:
    """The codes that doctor has to say, and the page that mends it."""
    faults = forge_reliability.FAULTS.values()
    assert {code for fault in faults for code in fault.codes} - catalogue().keys() == set()
    assert {fault.page for fault in faults if fault.page} - set(PAGES) == set()


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_of_one_shape(page: str) -> None:
    """One title and the same sections in the same order, with something in each."""
    # A comment in a block is no heading; and a page that mends has commands for it.
    text = forge_runbook.FENCE.sub(lambda block: "a block" if block["info"].startswith("sh on=") else "", read(page))
    title, *rest = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    assert re.fullmatch(r"# .+\n\s*", title)
    assert rest[::2] == SHAPE
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    assert [title for title, content in sections.items() if not content.strip()] == []
    assert "a block" in sections["Mend"]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_found_by_what_somebody_sees(page: str) -> None:
    symptoms = INDEX.partition("## By symptom")[2].partition("## By code")[0]
    assert f"| [{page}.md]({page}.md) |" in symptoms


def test_every_page_is_found_by_code() -> None:
    """The index says of each finding what doctor does."""
    rows = re.findall(r"^\| (F\d{3}) \| (.*) \| (.*) \| \[(.*)\]\(\4\.md\) \|$", INDEX, re.MULTILINE)
    assert [list(row) for row in rows] == sorted(catalogue().values())


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_by_a_test(page: str) -> None:
    """One module of a scenario's tests names the page and each of its sections that has commands.

    Whether they are run to the last, and do what the page says, those modules find out (Runbooks.left).
    """
    sections = {step.section for step in forge_runbook.steps(read(page))}
    followed = [texts for texts in modules().values() if page in texts]
    assert followed, f"no test follows {page}"
    assert {section for section in sections if not any(section in texts for texts in followed)} == set()


def test_an_exit_code_that_is_passed_over_has_its_reason() -> None:
    """Beside the command, or in a comment of its block above it."""
    for page in PAGES:
        for step in forge_runbook.steps(read(page)):
            said = ""
            for line in step.commands.splitlines():
                said += line if line.startswith("# ") else ""
                assert "|| true" not in line or said or "|| true  # " in line, f"{page}: {line}"


def test_commands_are_those_of_a_careful_shell(tmp_path: Path) -> None:
    """As shellcheck has it, which sees what no run of a test meets, such as a name with a space in it."""
    for page in PAGES:
        for step in forge_runbook.steps(read(page)):
            (tmp_path / f"{page}.md:{step.line}").write_text(f"set -eu\n{step.commands}")
    # GLOBIGNORE is a list of patterns.
    options = ("--shell=bash", "--severity=warning", "--exclude=SC2125")
    command = ["shellcheck", *options, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize(("blocked", "ended"), [((), ()), ((3,), (3,)), ((1, 2, 3, 4), (1, 2, 3, 4))])
def test_no_worker_that_answers_is_ended(tmp_path: Path, blocked: tuple[int, ...], ended: tuple[int, ...]) -> None:
    """Though each request goes to any of them, so that one may have none of the first few."""
    block = next(step.commands for step in forge_runbook.steps(read("event-loop-blocked")) if step.section == "Mend")
    order = [each for each in [1] * 8 + [2] * 8 + [3, 4] if each not in blocked]
    programs = {
        "sudo": 'exec "$@"',
        "readlink": "echo blue.sock",
        "systemctl": "echo 100",
        "pgrep": "printf '%s\\n' 1 2 3 4",
        "sleep": ":",
        # Bash has a `kill` of its own, which sudo does not call.
        "kill": f'echo "$@" >> {tmp_path}/ended',
        "curl": f"""
            n=$(cat {tmp_path}/asked 2> /dev/null || echo 0); echo $((n + 1)) > {tmp_path}/asked
            set -- {" ".join(map(str, order))}
            [ $# -gt 0 ] || exit 28
            shift $((n % $#)); echo "$1"
        """,
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euc", block], env=environment, check=True, stdin=subprocess.DEVNULL, timeout=60)
    found = (tmp_path / "ended").read_text() if (tmp_path / "ended").exists() else ""
    assert found.splitlines() == [f"-ABRT {each}" for each in ended]


@pytest.mark.parametrize(
    ("victim", "goes"),
    [
        ("", False),
        ("/", False),
        ("/var", False),
        ("/var/lib/", False),
        ("/var/log/../lib", False),
        ("/home", False),
        ("/var/lib/postgresql/17/main/pg_wal", False),
        ("dump.sql", True),
        ("/home/somebody/dump of monday.sql", True),
    ],
)
def test_nobody_removes_the_system_by_a_slip(tmp_path: Path, victim: str, goes: bool) -> None:
    """The one command of all pages that removes whatever is typed; at that hour somebody types too little."""
    (block,) = [step.commands for step in forge_runbook.steps(read("disk-filling")) if step.types == "victim"]
    sudo = tmp_path / "sudo"
    sudo.write_text('#!/bin/sh\necho "called: $*"\n')
    sudo.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", block],
        input=f"{victim}\n",
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert ("called: rm " in done.stdout) == goes, done.stdout + done.stderr
    assert goes or "Left alone" in done.stdout
