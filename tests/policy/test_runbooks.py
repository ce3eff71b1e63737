"""docs/runbooks/: a page for every finding of doctor, of one shape, in an index, with commands that a test has run."""

from __future__ import annotations

import ast
import re
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
def findings() -> dict[str, str]:
    """Return the page of every code, from doctor's one table: its rows are calls or tuples that have both as texts."""
    rows = [
        [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        for node in ast.walk(ast.parse(CATALOGUE.read_text()))
        if isinstance(node, ast.Call | ast.Tuple)
    ]
    found = {}
    for texts in rows:
        codes = [text for text in texts if re.fullmatch(r"F\d{3}", text)]
        pages = [text for text in texts if re.fullmatch(r"[a-z]+(-[a-z]+)*", text)]
        if len(codes) == 1 and pages:
            # The page is the last of a row: code, name, severity, page.
            found[codes[0]] = pages[-1]
    return found


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
    assert len(findings()) > 40
    assert {code: page for code, page in findings().items() if page not in PAGES} == {}


def test_every_fault_names_what_there_is() -> None:
    """The codes that doctor has to say, and the page that mends it."""
    faults = forge_reliability.FAULTS.values()
    assert {code for fault in faults for code in fault.codes} - findings().keys() == set()
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
def test_the_index_has_every_page(page: str) -> None:
    """By what somebody sees, and by every code that leads there."""
    symptoms, _, codes = INDEX.partition("## By code")
    assert f"({page}.md" in symptoms.partition("## By symptom")[2]
    rows = dict(re.findall(r"^\| (F\d{3}) \|.*\| \[.*\]\((.*)\.md\) \|$", codes, re.MULTILINE))
    assert {code for code, its in rows.items() if its == page} == {c for c, its in findings().items() if its == page}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_by_a_test(page: str) -> None:
    """One module of a scenario's tests names the page and each of its sections that has commands.

    Whether they are run to the last, and do what the page says, those modules find out (Runbooks.left).
    """
    sections = {step.section for step in forge_runbook.steps(read(page))}
    texts = [texts for texts in modules().values() if page in texts]
    assert texts, f"no test follows {page}"
    assert sections - set.union(*texts) == set()
