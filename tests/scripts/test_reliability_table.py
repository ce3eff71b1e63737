"""The tables of `make reliability`: every fault on every distribution, or none of it."""

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
    text = reliability.tables(reliability.read(results()))
    for name in reliability.DISTRIBUTIONS.values():
        rows = text.partition(f"### {name}\n")[2].partition("###")[0]
        assert [each.split(" | ")[0].removeprefix("| ") for each in rows.splitlines() if each[:2] == "| "][2:] == [
            *FAULTS
        ]


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
    """A row that is there stays as it is until its fault was seen again; what was never seen is named."""
    seen = {("trixie", "host rebooted"): line(), ("trixie", "disk full"): line(fault="disk full")}
    first = reliability.tables(seen)
    again = {("trixie", "host rebooted"): line(acknowledged=7), ("bookworm", "/tmp full"): line(fault="/tmp full")}
    text = reliability.tables(again, reliability.kept(first))
    trixie = text.partition("### Debian 13\n")[2]
    assert "| disk full | nothing | nothing: it was over |" in trixie
    assert [row.split(" | ")[-1] for row in trixie.splitlines() if "host rebooted" in row[:20]] == ["7, 0 |"]
    missing = text.partition("Not caused on Debian 13: ")[2]
    assert missing
    assert "disk full" not in missing
    assert "/tmp full" in text.partition("### Debian 12\n")[2].partition("Not caused")[0]
