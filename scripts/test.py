#!/usr/bin/env python3
"""Run the checks and the scenarios, and sum up: `N passed, N failed`. Standard library only.

Two lanes run side by side, and then, with the machine to itself, what puts its host under as much load as it takes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".cache" / "test"
DISTRIBUTIONS = ("bookworm", "trixie")
NEWEST = "trixie"
ALONE = ("secrets", "release")
"""Scenarios that need the machine to themselves: no request may fail while they move the traffic again and again."""
ALONE_IN_FULL = (*ALONE, "apps")
"""Those that do with their exhaustive tests, which compare latencies."""
LANES = 2
# The last line of a pytest run, such as "== 2 failed, 31 passed in 4.05s ==".
SUMMARY = re.compile(r"^[\s│]*=*\s*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", re.MULTILINE)
# A line of pytest's short summary, such as "FAILED tests/test_it.py::test_it - assert 0".
FAILURE = re.compile(r"^[\s│]*((?:FAILED|ERROR) \S+::.*)", re.MULTILINE)
# Where an Ansible output begins something else, and what it, or Molecule, says of what failed there.
HEADING = re.compile(r"^(?=TASK \[|RUNNING HANDLER \[|PLAY \[|PLAY RECAP|INFO |WARNING |CRITICAL )", re.MULTILINE)
FAILED_TASK = re.compile(r"^(?:fatal|failed): \[|^CRITICAL ", re.MULTILINE)
LONGEST = 80
"""Lines of one failed task that are repeated."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
BRIEF = '-m "not exhaustive"'
"""Options of pytest: what takes minutes and shows more of the same is for --everywhere, and for `molecule test`."""


@dataclass(frozen=True)
class Part:
    """One command with a log of its own."""

    name: str
    command: tuple[str, ...]
    distribution: str = NEWEST
    options: str = ""
    """Of pytest."""

    @property
    def scenario(self) -> str:
        """Its scenario, or what it is called if it has none."""
        return self.name.split()[0]

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return LOGS / f"{self.name.replace(' ', '-')}.log"


class Outcome(NamedTuple):
    """How many tests of a part passed and failed, the part itself counting as one."""

    passed: int
    failed: int
    failures: tuple[str, ...] = ()
    """What pytest said of those that failed, or, if it was none of them, the tasks that did and the part."""


def parts(*, everywhere: bool) -> list[Part]:
    """List the checks, then the scenarios.

    `default` runs on every distribution. The others do so with all their tests, or on the newest one without the
    exhaustive tests.
    """
    result = [Part("check", ("make", "--no-print-directory", "check"))]
    scenarios = {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")}
    for scenario in sorted(scenarios, key=lambda name: (name != "default", name)):
        for distribution in DISTRIBUTIONS if everywhere or scenario == "default" else (NEWEST,):
            command = ("molecule", "test", "--scenario-name", scenario)
            result.append(Part(f"{scenario} {distribution}", command, distribution, "" if everywhere else BRIEF))
    return result


def counted(output: str) -> tuple[int, int]:
    """Add up the tests that passed and failed in all pytest runs of an output."""
    passed = failed = 0
    for summary in SUMMARY.findall(output):
        for number, outcome in re.findall(r"(\d+) ([a-z]+)", summary):
            if outcome == "passed":
                passed += int(number)
            elif outcome in {"failed", "error", "errors"}:
                failed += int(number)
    return passed, failed


def failed_tasks(output: str) -> list[str]:
    """Return what Ansible and Molecule said of each task that failed, the first lines of it, in their order."""
    found = [section for section in HEADING.split(output) if FAILED_TASK.search(section)]
    return ["\n".join(section.rstrip().splitlines()[:LONGEST]) for section in found]


def run(part: Part) -> Outcome:
    """Run one part, and print how it ended."""
    print(f"{part.name} ...", flush=True)
    began = time.monotonic()
    environment = os.environ | {"DISTRO": part.distribution, "NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1"}
    # pytest cuts the reason of a failure in its summary to the width of the terminal.
    environment["COLUMNS"] = "240"
    if part.options:
        environment["PYTEST_ADDOPTS"] = part.options
    with part.log.open("w") as log:
        status = subprocess.run(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
    output = COLOUR.sub("", part.log.read_text())
    passed, failed = counted(output)
    failures: tuple[str, ...] = ()
    if status == 0:
        passed += 1
    else:
        failed += 1
        found = FAILURE.findall(output)
        found = found or [*failed_tasks(output), f"exit status {status}, see {part.log}"]
        failures = tuple(f"{part.name}: {text}" for text in found)
        # What failed stands last, where an output that is cut short still has it.
        lines = [*output.rstrip().splitlines()[-40:], "", *"\n".join(found).splitlines()]
        print("\n".join(f"    {line}" for line in lines))
    minutes = (time.monotonic() - began) / 60
    verdict = "passed" if status == 0 else f"FAILED; all of its output: {part.log}"
    print(f"{part.name}: {minutes:.1f} min, {verdict}", flush=True)
    return Outcome(passed, failed, failures)


def run_all(every: Sequence[Part], alone: Sequence[str] = ALONE) -> list[Outcome]:
    """Run all parts; after an interruption no other one begins."""
    waiting = [part for part in every if part.scenario not in alone]
    busy: list[str] = []
    turn = threading.Condition()

    def next_part() -> Part | None:
        """The first whose scenario does not run: hosts have the same names on every distribution."""
        return next((part for part in waiting if part.scenario not in busy), None)

    def take() -> Part | None:
        """Return the next part as soon as there is one; None when all have begun."""
        with turn:
            turn.wait_for(lambda: not waiting or next_part())
            if part := next_part():
                waiting.remove(part)
                busy.append(part.scenario)
            return part

    def run_lane(_: int) -> list[Outcome]:
        outcomes = []
        while part := take():
            try:
                outcomes.append(run(part))
            finally:
                with turn:
                    busy.remove(part.scenario)
                    turn.notify_all()
        return outcomes

    with ThreadPoolExecutor() as pool:
        try:
            outcomes = [outcome for lane in pool.map(run_lane, range(LANES)) for outcome in lane]
        except BaseException:
            with turn:
                waiting.clear()
                turn.notify_all()
            raise
    return outcomes + [run(part) for part in every if part.scenario in alone]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everywhere", action="store_true", help="every test of every scenario on every distribution")
    arguments = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(parts(everywhere=arguments.everywhere), ALONE_IN_FULL if arguments.everywhere else ALONE)
    passed = sum(outcome.passed for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    # Again, where whoever sees the end of an output alone looks for them.
    for outcome in outcomes:
        print("\n".join(outcome.failures), end="\n" * bool(outcome.failures))
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
