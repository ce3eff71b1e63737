"""Cause every fault on a host of each distribution; keep what clients saw, what doctor said and how it healed.

Writes the table of docs/reliability.md, and every figure in .cache/reliability/results.jsonl. What is expected of each
fault is in molecule/shared/testing/forge_reliability.py, and the tests hold it to that: a fault that was not seen, or
not as expected, leaves no table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import page
from demo import ROOT, DemoError, become_able, environment, guarded
from forge_reliability import FAULTS, RESULTS

STATE = ROOT / ".cache" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
DISTRIBUTIONS = {"bookworm": "Debian 12", "trixie": "Debian 13"}
SCENARIO = "operations"
LATE_SECONDS, LATE_TIMES = 2.0, 5.0
"""A p99 above this, and so many times above what it was before, is something that clients notice."""

Line = dict[str, Any]
Lines = dict[tuple[str, str], Line]
"""What the tests wrote, by distribution and fault."""
Rows = dict[tuple[str, str], list[str]]
"""Rows of the table, by the same."""
HEAD = "fault | on | measured | clients saw | doctor said | healed | acknowledged events, lost"
COLUMNS = HEAD.count("|") + 1


def cause(distribution: str, results: Path) -> None:
    """Provision a host and cause all faults; each adds a line to the results."""
    log = STATE / f"{distribution}.log"
    print(f"{DISTRIBUTIONS[distribution]} ... (all of it: {log})", flush=True)
    with log.open("w") as output:
        subprocess.run(
            ["molecule", "test", "--scenario-name", SCENARIO],
            cwd=ROOT,
            env=environment() | {"DISTRO": distribution, RESULTS: str(results)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )


def read(text: str, *, whole: bool = True) -> Lines:
    """Take the last line of each fault.

    Raises:
        DemoError: there is none of a fault, and there have to be all.
    """
    found = {(line["distribution"], line["fault"]): line for line in map(json.loads, text.splitlines())}
    wanted = [(distribution, fault) for distribution in DISTRIBUTIONS for fault in FAULTS]
    missing = [f"{fault} on {distribution}" for distribution, fault in wanted if (distribution, fault) not in found]
    if missing and whole:
        raise DemoError(
            f"Expected: every fault on every distribution. Found: none of {', '.join(missing)}. Do: read {STATE}/*.log."
        )
    return found


def kept(text: str) -> Rows:
    """Take the rows of a table that was written before."""
    found = {}
    distributions = {name: distribution for distribution, name in DISTRIBUTIONS.items()}
    for each in text.splitlines():
        cells = each.removeprefix("| ").removesuffix(" |").split(" | ")
        if len(cells) == COLUMNS and cells[0] in FAULTS and cells[1] in distributions:
            found[distributions[cells[1]], cells[0]] = cells
    return found


def table(lines: Lines, earlier: Rows | None = None) -> str:
    """Return the section in Markdown, with the rows of earlier runs where these have none.

    Each says where and when it was measured, and above them stands how many there are and which are not.
    """
    rows = (earlier or {}) | {key: row(line) for key, line in lines.items()}
    shown = [rows[where, fault] for fault in FAULTS for where in DISTRIBUTIONS if (where, fault) in rows]
    parts = []
    for where, name in DISTRIBUTIONS.items():
        missing = [fault for fault in FAULTS if (where, fault) not in rows]
        said = f"{name}: {len(FAULTS) - len(missing)} of {len(FAULTS)} faults were caused"
        parts.append(f"{said}; not {', '.join(missing)}." if missing else f"{said}.")
    return "\n\n".join([*parts, page.table(HEAD, shown, numbers=False)])


def row(line: Line) -> list[str]:
    """Say in words what one fault did."""
    # Lines of earlier days do not say when they were written.
    where, at = DISTRIBUTIONS[line["distribution"]], line.get("at") or f"by {datetime.now(UTC):%Y-%m-%d}"
    events = f"{line['acknowledged']}, {line['lost']}"
    return [line["fault"], where, at, clients(line), doctor(line), healed(line), events]


def clients(line: Line) -> str:
    """What they noticed: requests that failed, or that took long."""
    said = []
    if line["failed"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(line["kinds"].items()))
        said.append(f"{line['failed']} of {line['requests']} failed within {line['outage']:g} s ({kinds})")
    if line["p99"] > max(LATE_SECONDS, LATE_TIMES * line["p99_before"]):
        said.append(f"p99 {line['p99']:.1f} s")
    return "; ".join(said) or "nothing"


def doctor(line: Line) -> str:
    """Its codes, the first that it said first."""
    codes = sorted(line["doctor"].items(), key=lambda each: (each[1], each[0]))
    return ", ".join(f"{code} after {seconds:g} s" for code, seconds in codes) or "nothing: it was over"


def healed(line: Line) -> str:
    """By what, and in how long."""
    by = f"[{line['page']}](runbooks/{line['page']}.md)" if line["page"] else "alone"
    return f"{by}: clients in {line['healed']:g} s, doctor clean in {line['clean']:g} s"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="make reliability", description=__doc__)
    parser.add_argument(
        "--results", type=Path, help="write what is there beside the rows of earlier runs, and run nothing"
    )
    arguments = parser.parse_args()

    def work() -> None:
        results = arguments.results or STATE / "results.jsonl"
        if not arguments.results:
            become_able()
            STATE.mkdir(parents=True, exist_ok=True)
            results.unlink(missing_ok=True)
            for distribution in DISTRIBUTIONS:
                cause(distribution, results)
        lines = read(results.read_text() if results.exists() else "", whole=not arguments.results)
        # All of them are of this run, or each of its last one.
        page.write("reliability", table(lines, kept(PAGE.read_text()) if arguments.results else None), PAGE)
        print(f"done: {PAGE}, {results}")

    return int(guarded(work, "Stopped."))


if __name__ == "__main__":
    sys.exit(main())
