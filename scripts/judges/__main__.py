"""Have independent judges look at a provisioned host of each distribution, and keep what they found.

Writes their table in docs/benchmarks.md, and every figure in .cache/judges/results.jsonl. What each is asked for, and
what of that is waived, is in molecule/shared/testing/forge_judges.py. Fails when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import page
from demo import ROOT, DemoError, become_able, environment, guarded
from forge_judges import RESULTS, TARGETS, Target

STATE = ROOT / ".cache" / "judges"
LOCKS = (ROOT / "scripts" / "judges" / "requirements.txt", ROOT / "scripts" / "judges" / "package-lock.json")
DISTRIBUTIONS = {"bookworm": "Debian 12", "trixie": "Debian 13"}
TESTS = "test_judges"

Line = dict[str, Any]
Lines = dict[tuple[str, str], Line]
"""What the tests wrote, by judge and distribution."""


def scenario() -> str:
    """Return the scenario that has the judges among its tests."""
    (found,) = (ROOT / "molecule").glob(f"*/tests/{TESTS}.py")
    return found.parents[1].name


def look(distribution: str, results: Path) -> None:
    """Provision a host and have all judges look at it; each adds a line to the results."""
    log = STATE / f"{distribution}.log"
    print(f"{DISTRIBUTIONS[distribution]} ... (all of it: {log})", flush=True)
    settings = {"DISTRO": distribution, RESULTS: str(results), "PYTEST_ADDOPTS": f"-k {TESTS}"}
    with log.open("w") as output:
        subprocess.run(
            ["molecule", "test", "--scenario-name", scenario()],
            cwd=ROOT,
            env=environment() | settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )


def read(text: str) -> Lines:
    """Take the last line of each judge: one that looks twice looks harder the second time.

    Raises:
        DemoError: a judge of the table did not look.
    """
    found = {(line["judge"], line["distribution"]): line for line in map(json.loads, text.splitlines())}
    wanted = [(target.judge, distribution) for target in TARGETS for distribution in DISTRIBUTIONS]
    if missing := [
        f"{judge} on {distribution}" for judge, distribution in wanted if (judge, distribution) not in found
    ]:
        raise DemoError(
            f"Expected: a verdict of every judge. Found: none of {', '.join(missing)}. Do: read {STATE}/*.log."
        )
    return found


def tables(lines: Lines) -> str:
    """Return the section in Markdown."""
    rows = [
        [target.judge, target.asked, *(verdict(target, lines[target.judge, each]) for each in DISTRIBUTIONS)]
        for target in TARGETS
    ]
    head = f"judge | target | {' | '.join(DISTRIBUTIONS.values())}"
    text = f"{datetime.now(UTC):%Y-%m-%d}.\n\n{page.table(head, rows, numbers=False)}"
    used = {(each["judge"], each["name"]): each for line in lines.values() for each in line["waived"]}
    if used:
        waived = [[each["judge"], each["name"], f"{each['bound']:g}", each["reason"]] for each in used.values()]
        text += f"\n\nWaived:\n\n{page.table('judge | what | bound | why', waived, numbers=False)}"
    return text


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def verdict(target: Target, line: Line) -> str:
    """Say in a few words what a judge found: of figures under one bound the worst, the others, then what was missed."""
    words = []
    for bounds, worst in ((target.at_least, min), (target.at_most, max)):
        left = dict(line["figures"])
        for pattern in bounds:
            here = {name: left.pop(name) for name in list(left) if fnmatchcase(name, pattern)}
            if here:
                name = worst(here, key=here.__getitem__)
                words.append(f"{name}: {here[name]:g}" + (f", of {len(here)} the worst" if len(here) > 1 else ""))
    bounded = (*target.at_least, *target.at_most)
    others = {name: figure for name, figure in line["figures"].items() if not _matches(name, bounded)}
    words += [f"{name}: {figure:g}" for name, figure in others.items()]
    if line["waived"]:
        words.append(f"{len(line['waived'])} waived")
    if line["problems"]:
        words.append("**missed**: " + ", ".join(line["problems"]))
    return "; ".join(words) or "met"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="make judges", description=__doc__)
    parser.parse_args()
    missed: list[Line] = []

    def work() -> None:
        become_able()
        STATE.mkdir(parents=True, exist_ok=True)
        results = STATE / "results.jsonl"
        results.unlink(missing_ok=True)
        for distribution in DISTRIBUTIONS:
            look(distribution, results)
        lines = read(results.read_text() if results.exists() else "")
        page.write("judges", tables(lines))
        missed.extend(line for line in lines.values() if line["problems"])
        for line in missed:
            print(f"{line['judge']} on {line['distribution']}: {'; '.join(line['problems'])}")
        print(f"done: {page.PAGE}, {results}")

    return guarded(work, "Stopped.") or bool(missed)


if __name__ == "__main__":
    sys.exit(main())
