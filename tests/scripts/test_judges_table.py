"""The table of `make judges`: every judge on every distribution, or none of it."""

from __future__ import annotations

import json
from typing import Any

import page
import pytest
from demo import ROOT, DemoError
from forge_judges import TARGETS
from judges import __main__ as judges


def results(**changes: Any) -> str:
    """What the tests write when every judge is content."""
    lines = [
        {"judge": target.judge, "distribution": distribution, "problems": [], "waived": []}
        | {"figures": dict(target.at_least) | {name.replace("*", "x"): most for name, most in target.at_most.items()}}
        for target in TARGETS
        for distribution in judges.DISTRIBUTIONS
    ]
    return "\n".join(json.dumps(line | changes) for line in lines)


def test_every_judge_has_a_row() -> None:
    lines = judges.read(results())
    rows = [line for line in judges.tables(lines).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == [target.judge for target in TARGETS]
    assert "| gixy | no finding | met | met |" in rows
    assert "score: 95" in next(row for row in rows if row.startswith("| testssl.sh"))
    assert "missed" not in judges.tables(lines)


def test_what_was_missed_and_what_was_waived_is_told() -> None:
    waiver = {"judge": "gixy", "name": "a finding", "bound": 2.0, "reason": "it has its reasons"}
    table = judges.tables(judges.read(results(problems=["b: found 1 times"], waived=[waiver])))
    assert "1 waived; **missed**: b: found 1 times" in table
    assert table.endswith("| gixy | a finding | 2 | it has its reasons |")


def test_of_many_figures_under_one_bound_the_worst_is_told() -> None:
    line = json.loads(results().splitlines()[0])
    target = next(target for target in TARGETS if target.judge == "systemd-analyze security")
    figures = {"inbox@blue.service": 1.1, "inbox@green.service": 1.4, "nginx.service": 2.4, "a.service": 0.3}
    told = judges.verdict(target, line | {"figures": figures})
    assert told == "inbox@green.service: 1.4, of 2 the worst; nginx.service: 2.4; a.service: 0.3"


def test_the_last_look_counts() -> None:
    text = results()
    again = text.splitlines()[0].replace('"problems": []', '"problems": ["later"]')
    lines = judges.read(f"{text}\n{again}")
    assert lines[TARGETS[0].judge, "bookworm"]["problems"] == ["later"]


def test_a_judge_that_did_not_look_leaves_no_table() -> None:
    """Its message names it."""
    text = "\n".join(line for line in results().splitlines() if '"gixy"' not in line)
    with pytest.raises(DemoError, match="gixy on bookworm, gixy on trixie"):
        judges.read(text)


def test_programs_write_between_their_own_markers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """And nowhere else; without the markers nothing is written."""
    file = tmp_path / "page.md"
    monkeypatch.setattr(page, "PAGE", file)
    file.write_text("a\n<!-- written by make judges: begin -->\nold\n<!-- written by make judges: end -->\nb\n")
    page.write("judges", "new")
    assert file.read_text() == (
        "a\n<!-- written by make judges: begin -->\nnew\n<!-- written by make judges: end -->\nb\n"
    )
    with pytest.raises(DemoError, match="make bench"):
        page.write("bench", "new")


def test_the_scenario_is_the_one_that_has_the_judges() -> None:
    assert (ROOT / "molecule" / judges.scenario() / "tests" / "test_judges.py").exists()
