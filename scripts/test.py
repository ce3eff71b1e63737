#!/usr/bin/env python3
"""Run the checks and the scenarios one after the other, and sum up: `N passed, N failed`. Standard library only."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".cache" / "test"
DISTRIBUTIONS = ("bookworm", "trixie")
NEWEST = "trixie"
# The last line of a pytest run, such as "== 2 failed, 31 passed in 4.05s ==".
SUMMARY = re.compile(r"^[\s│]*=*\s*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", re.MULTILINE)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Part:
    """One command with a log of its own."""

    name: str
    command: tuple[str, ...]
    distribution: str = NEWEST

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return LOGS / f"{self.name.replace(' ', '-')}.log"


def parts(*, everywhere: bool) -> list[Part]:
    """List the checks, then the scenarios: `default` on every distribution, the others on the newest one or on all."""
    result = [Part("check", ("make", "--no-print-directory", "check"))]
    scenarios = {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")}
    for scenario in sorted(scenarios, key=lambda name: (name != "default", name)):
        for distribution in DISTRIBUTIONS if everywhere or scenario == "default" else (NEWEST,):
            command = ("molecule", "test", "--scenario-name", scenario)
            result.append(Part(f"{scenario} {distribution}", command, distribution))
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


def run(part: Part) -> tuple[int, int]:
    """Run one part; tell how many tests passed and failed, the part itself counting as one."""
    print(f"{part.name} ...", flush=True)
    began = time.monotonic()
    environment = os.environ | {"DISTRO": part.distribution, "NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1"}
    with part.log.open("w") as log:
        status = subprocess.run(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
    output = COLOUR.sub("", part.log.read_text())
    passed, failed = counted(output)
    if status == 0:
        passed += 1
    else:
        failed += 1
        print("\n".join(f"    {line}" for line in output.rstrip().splitlines()[-80:]))
    minutes = (time.monotonic() - began) / 60
    verdict = "passed" if status == 0 else f"FAILED; all of its output: {part.log}"
    print(f"{part.name}: {minutes:.1f} min, {verdict}", flush=True)
    return passed, failed


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--everywhere", action="store_true", help="every scenario on every distribution")
    arguments = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    outcomes = [run(part) for part in parts(everywhere=arguments.everywhere)]
    passed = sum(outcome[0] for outcome in outcomes)
    failed = sum(outcome[1] for outcome in outcomes)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
