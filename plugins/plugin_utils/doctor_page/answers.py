"""What a host answered to playbooks/doctor.yml, read strictly; whatever it is, it becomes a row."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

Severity = Literal["critical", "warning", "note"]
Verdict = Literal["critical", "unknown", "warning", "clean"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note")
VERDICTS: tuple[Verdict, ...] = ("critical", "unknown", "warning", "clean")
"""The worst first. Of a host that is unknown nobody can say that clients are served."""

FORGECTL = "/usr/local/sbin/forgectl"
ABSENT = 127
# Both answer in seconds; one that hangs must not hold up the page of all the others. What ends is one line, so that the
# lines between which it stands can be told from it.
COMMAND = (
    f"test -x {FORGECTL} || exit {ABSENT}; "
    "for what in doctor day; do "
    f"timeout --kill-after=5 90 {FORGECTL} $what --json; code=$?; echo; echo exit $what $code; done"
)
ENDED = re.compile(r"^exit (doctor|day) (\d+)$", re.MULTILINE)
# Of doctor: clean, warnings, critical.
JUDGED = (0, 10, 11)
NOISE = re.compile(r"^Task failed: |EOF on stream; last \d+ lines received:|Shared connection to \S+ closed\.")
USAGE, TIMED_OUT = 2, 124
SHOWN = 300


class Finding(msgspec.Struct, frozen=True):
    """A finding of doctor; docs/doctor.md describes the document."""

    code: str
    name: str
    severity: Severity
    subject: str
    title: str
    evidence: list[str]
    mend: str
    runbook: str


class Report(msgspec.Struct, frozen=True):
    """What `forgectl doctor --json` prints."""

    schema: Literal[1]
    host: str
    at: str
    seconds: float
    verdict: Literal["clean", "warning", "critical"]
    findings: list[Finding]


class Happened(msgspec.Struct, frozen=True):
    """An entry of the history of releases."""

    at: str
    action: str
    release: str
    outcome: str


class AppDay(msgspec.Struct, frozen=True):
    """The last day of an app, one value a step; docs/logs.md describes the document."""

    requests: list[int]
    answers: dict[str, list[int]]
    p50: list[float | None]
    p95: list[float | None]
    p99: list[float | None]
    memory: list[int | None]
    memory_limit: int
    happened: list[Happened]
    complete_from: str


class Day(msgspec.Struct, frozen=True):
    """What `forgectl day --json` prints. `begun` and `at` are RFC 3339, `step` is in seconds."""

    schema: Literal[1]
    at: str
    begun: str = msgspec.field(name="from")
    step: int
    apps: dict[str, AppDay]


@dataclass(frozen=True)
class Host:
    """A host of the page: its name in the inventory, what it said, and why it did not say more."""

    name: str
    report: Report | None = None
    day: Day | None = None
    why: str = ""
    """Why there is no report; empty when there is one."""
    why_no_day: str = ""

    @property
    def verdict(self) -> Verdict:
        """Doctor's, or that nobody knows."""
        return self.report.verdict if self.report else "unknown"

    @property
    def counts(self) -> dict[Severity, int]:
        """How many findings there are of each severity."""
        found = Counter(finding.severity for finding in self.report.findings) if self.report else Counter()
        return {severity: found[severity] for severity in SEVERITIES}


def read(name: str, answer: dict[str, Any]) -> Host:
    """Judge the result of the task that asked a host, whatever it is."""
    if answer.get("unreachable"):
        return _silent(name, f"does not answer: {_line(answer.get('msg'))}")
    if "code" not in answer:
        return _silent(name, f"could not be asked: {_line(answer.get('msg')) or 'no answer'}")
    # A connection with a terminal ends lines as those do, and prints errors in between.
    said, stderr = str(answer.get("stdout", "")).replace("\r\n", "\n"), _line(answer.get("stderr"))
    if answer["code"] == ABSENT and not ENDED.search(said):
        return _silent(name, "was never provisioned: it has no forgectl; run site.yml")
    found = _answers(said)
    report, why = _report(found.get("doctor"), stderr)
    day, why_no_day = _day(found.get("day"), stderr)
    return Host(name, report, day, why, why_no_day)


def order(hosts: list[Host]) -> list[Host]:
    """The worst first, and by name where they are alike."""
    return sorted(hosts, key=lambda host: (VERDICTS.index(host.verdict), host.name))


def _silent(name: str, why: str) -> Host:
    return Host(name, why=why, why_no_day=why)


class _Answer(NamedTuple):
    code: int
    said: str


def _answers(said: str) -> dict[str, _Answer]:
    """What came of each command."""
    found, start = {}, 0
    for ended in ENDED.finditer(said):
        found[ended[1]] = _Answer(int(ended[2]), said[start : ended.start()].strip())
        start = ended.end()
    return found


def _report(answer: _Answer | None, stderr: str) -> tuple[Report | None, str]:
    if answer and answer.code in JUDGED:
        try:
            return msgspec.json.decode(_last(answer.said), type=Report), ""
        except msgspec.DecodeError as error:
            return None, f"its forgectl doctor answers in a way that this page does not read: {error}; run site.yml"
    return None, _why("doctor", answer, stderr)


def _day(answer: _Answer | None, stderr: str) -> tuple[Day | None, str]:
    if answer and answer.code == 0:
        try:
            day = msgspec.json.decode(_last(answer.said), type=Day)
        except msgspec.DecodeError as error:
            return None, f"its forgectl day answers in a way that this page does not read: {error}; run site.yml"
        return day, "" if day.apps else "no app is described on it"
    return None, _why("day", answer, stderr)


def _why(command: str, answer: _Answer | None, stderr: str) -> str:
    words = stderr or (_line(answer.said) if answer else "")
    if answer is None:
        return f"did not come to the end of its answer: {words or 'it said nothing'}"
    if answer.code == USAGE:
        return f"has an older forgectl, without `forgectl {command}`; run site.yml"
    if answer.code == TIMED_OUT:
        return f"took too long: `sudo forgectl {command}` on it says what for"
    return f"`forgectl {command}` failed on it with exit code {answer.code}: {words or 'it said nothing'}"


def _last(said: str) -> str:
    """The object, among what a login and warnings print."""
    return next((line for line in reversed(said.split("\n")) if line.startswith("{")), said)


def _line(text: object) -> str:
    """What somebody said, as a line that is not too long, without what the way there added."""
    return " ".join(NOISE.sub("", str(text or "")).split())[:SHOWN]
