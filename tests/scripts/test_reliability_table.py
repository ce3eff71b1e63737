"""The table of `make reliability`: every fault on every distribution, or none of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import reliability
from demo import DemoError
from forge_reliability import FAULTS


def line(**changes: Any) -> dict[str, Any]:
    """What the tests write of a fault that nobody noticed."""
    return {
        "fault": "host rebooted",
        "distribution": "trixie",
        "at": "2026-01-15",
        "requests": 900,
        "failed": 0,
        "kinds": {},
        "outage": 0.0,
        "p99": 0.02,
        "p99_before": 0.02,
        "doctor": {},
        "page": "",
        "healed": 0.0,
        "clean": 2.5,
        "acknowledged": 450,
        "lost": 0,
    } | changes


def results() -> str:
    """What they write of all."""
    each = [line(fault=fault, distribution=name) for name in reliability.DISTRIBUTIONS for fault in FAULTS]
    return "\n".join(map(json.dumps, each))


def test_every_fault_has_a_row_for_each_distribution() -> None:
    text = reliability.table(reliability.read(results()))
    rows = [each.removeprefix("| ").split(" | ")[:3] for each in text.splitlines() if each[:2] == "| "][2:]
    names = reliability.DISTRIBUTIONS.values()
    assert rows == [[fault, name, "2026-01-15"] for fault in FAULTS for name in names]
    for name in names:
        assert f"{name}: {len(FAULTS)} of {len(FAULTS)} faults were caused." in text


def test_a_fault_that_was_not_seen_leaves_no_table() -> None:
    """Its message names it."""
    text = "\n".join(each for each in results().splitlines() if "host rebooted" not in each)
    with pytest.raises(DemoError, match="host rebooted on bookworm, host rebooted on trixie"):
        reliability.read(text)


def test_the_last_time_counts() -> None:
    again = json.dumps(line(acknowledged=7))
    assert reliability.read(f"{results()}\n{again}")["trixie", "host rebooted"]["acknowledged"] == 7


def test_what_clients_saw_is_told_in_words() -> None:
    assert reliability.row(line()) == [
        "host rebooted",
        "Debian 13",
        "2026-01-15",
        "nothing",
        "nothing: it was over",
        "alone: clients in 0 s, doctor clean in 2.5 s",
        "450, 0",
    ]
    seen = line(failed=12, kinds={"502": 11, "reset": 1}, outage=3.4, p99=7.26, page="clock", healed=1.5)
    said = line(doctor={"F204": 2.5, "F202": 4.0, "F201": 2.5})
    assert reliability.clients(seen) == "12 of 900 failed within 3.4 s (502 11, reset 1); p99 7.3 s"
    assert reliability.doctor(said) == "F201 after 2.5 s, F204 after 2.5 s, F202 after 4 s"
    assert reliability.healed(seen).startswith("[clock](runbooks/clock.md): clients in 1.5 s")


def test_rows_of_a_part_stand_beside_those_of_earlier_runs() -> None:
    """A row that is there keeps its day until its fault was seen again; what was never seen is named."""
    seen = {("trixie", "host rebooted"): line(), ("trixie", "disk full"): line(fault="disk full")}
    first = reliability.table(seen)
    later = {"at": "2026-02-01"}
    again = {
        ("trixie", "host rebooted"): line(acknowledged=7, **later),
        ("bookworm", "/tmp full"): line(fault="/tmp full", distribution="bookworm", **later),
    }
    text = reliability.table(again, reliability.kept(first))
    rows = [each for each in text.splitlines() if each[:2] == "| "][2:]
    assert len(rows) == 3
    assert "| disk full | Debian 13 | 2026-01-15 | nothing | nothing: it was over |" in text
    assert "| /tmp full | Debian 12 | 2026-02-01 | nothing |" in text
    assert [row.split(" | ")[2::4] for row in rows if "host rebooted" in row] == [["2026-02-01", "7, 0 |"]]
    assert f"Debian 12: 1 of {len(FAULTS)} faults were caused; not a worker eats" in text
    missing = text.partition(f"Debian 13: 2 of {len(FAULTS)} faults were caused; not ")[2].splitlines()[0]
    assert "/tmp full" in missing
    assert "disk full" not in missing


def test_a_line_without_a_day_is_of_no_later_than_today() -> None:
    undated = line()
    del undated["at"]
    assert reliability.row(undated)[2].startswith("by 20")


def test_the_page_is_as_the_table_is_written() -> None:
    """Whatever is in it comes back, so that no row is lost when a part is measured anew."""
    text = reliability.PAGE.read_text()
    assert reliability.table({}, reliability.kept(text)) in text
