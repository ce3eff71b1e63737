"""What independent judges say of a host, read from their own output.

Each function takes the whole output of one tool and returns a verdict, or raises NoVerdict: a judge that did not run,
said nothing, or says it in another form than it used to must never pass for one that found nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree as ET


class NoVerdict(Exception):
    """The output is not that of a judge which has looked at the host."""


@dataclass(frozen=True)
class Verdict:
    """What a judge found."""

    figures: Mapping[str, float] = field(default_factory=dict)
    """What it measured, by name."""
    findings: Mapping[str, int] = field(default_factory=dict)
    """What it complains of, by the judge's own name for it, and how often it does."""


def sslyze(output: str, configuration: str) -> Verdict:
    """Compliance with one of Mozilla's configurations, as sslyze prints it; findings are its criteria."""
    if f'against Mozilla\'s "{configuration}" configuration' not in output:
        raise NoVerdict(f"sslyze compared nothing with {configuration}: {tail(output)}")
    verdicts = re.findall(r"^    \S+: (OK - Compliant|FAILED - Not compliant)\.$", output, re.MULTILINE)
    if len(verdicts) != 1:
        raise NoVerdict(f"expected one verdict of sslyze; found {verdicts}: {tail(output)}")
    criteria = re.findall(r"^        \* (\w+): ", output, re.MULTILINE)
    if bool(criteria) != (verdicts[0] != "OK - Compliant"):
        raise NoVerdict(f"sslyze says {verdicts[0]} and complains of {criteria}")
    return Verdict(findings=Counter(criteria))


def testssl(output: str) -> Verdict:
    """Grade and score of testssl.sh's flat JSON; a grade that is not A+ is a finding, and so is each cap of it."""
    entries = {entry["id"]: entry["finding"] for entry in _array(output, "testssl.sh", "id", "finding")}
    try:
        grade, score = entries["overall_grade"], float(entries["final_score"])
    except (KeyError, ValueError) as error:
        raise NoVerdict(f"expected a grade and a score of testssl.sh; found neither: {error!r}") from error
    caps = [finding for name, finding in entries.items() if name.startswith("grade_cap_reason")]
    return Verdict({"score": score}, Counter([f"grade {grade}", *caps] if grade != "A+" else caps))


def ssh_audit(policy: str, audit: str) -> Verdict:
    """Verdict of ssh-audit on a policy, and its failures and warnings about algorithms, both as JSON."""
    judged, looked = _object(policy, "ssh-audit", "policy", "passed", "errors"), _object(audit, "ssh-audit", "kex")
    if not judged["policy"] or not looked["kex"] or judged["passed"] == bool(judged["errors"]):
        raise NoVerdict(f"ssh-audit saw no server, or does not know what it saw: {tail(policy)}")
    found = Counter(f"policy: {error['mismatched_field']}" for error in judged["errors"])
    found["policy: a warning"] += len(judged.get("warnings", []))
    for kind in ("kex", "key", "enc", "mac"):
        for algorithm in looked[kind]:
            notes = algorithm["notes"]
            found.update(f"{level} {algorithm['algorithm']}" for level in ("fail", "warn") if notes.get(level))
    return Verdict(findings=found)


def gixy(output: str) -> Verdict:
    """Issues of gixy's JSON by plugin and severity."""
    issues = _array(output, "gixy", "plugin", "severity")
    return Verdict(findings=Counter(f"{issue['plugin']} ({issue['severity'].lower()})" for issue in issues))


def lynis(report: str) -> Verdict:
    """Hardening index, warnings and suggestions of lynis-report.dat; both are named by the test that found them."""
    found: dict[str, list[str]] = {}
    for line in report.splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    # The last thing it writes.
    if "finish" not in found or len(found.get("hardening_index", [])) != 1:
        raise NoVerdict(f"lynis did not come to its end: {tail(report)}")
    findings = [f"warning {text.split('|')[0]}" for text in found.get("warning[]", [])]
    findings += [text.split("|")[0] for text in found.get("suggestion[]", [])]
    return Verdict({"hardening index": float(found["hardening_index"][0])}, Counter(findings))


def held(samples: str, address: str, connections: int, share: float = 1.0) -> float:
    """Seconds within which the host has closed such a share of a slow client's connections.

    `samples` are moments (Unix time), each with the established connections of then, one a line. It is the host that is
    asked: a slow client may not see for long that it was closed.
    """
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    moment = 0.0
    for line in samples.split():
        if re.fullmatch(r"\d+\.\d+", line):
            moment = float(line)
        elif line.startswith(f"{address}:"):
            first.setdefault(line, moment)
            last[line] = moment
    if len(first) < connections:
        raise NoVerdict(f"expected {connections} slow connections of {address}; found {len(first)}")
    lives = sorted(last[each] - first[each] for each in first)
    return round(lives[math.ceil(len(lives) * share) - 1], 1)


def nmap(output: str, tcp: Iterable[int], udp: Iterable[int] = ()) -> Verdict:
    """Ports that answer although they should not, and the other way round, in nmap's XML.

    `tcp` have to be open, `udp` may be. A port that answers with a reset or an unreachable is no secret either: those
    are one finding together.
    """
    try:
        run = ET.fromstring(output)  # noqa: S314 - of our own program, about our own host
    except ET.ParseError as error:
        raise NoVerdict(f"expected nmap's XML; found {tail(output)}") from error
    hosts, finished = run.findall("host"), run.find("runstats/finished")
    if len(hosts) != 1 or finished is None or finished.get("exit") != "success":
        raise NoVerdict(f"nmap did not look at one host: {tail(output)}")
    states = {
        f"{port.get('portid')}/{port.get('protocol')}": state.get("state")
        for port in hosts[0].findall("ports/port")
        if (state := port.find("state")) is not None
    }
    closed = sum(state == "closed" for state in states.values())
    closed += sum(int(each.get("count", 0)) for each in hosts[0].findall("ports/extraports[@state='closed']"))
    wanted = {f"{port}/tcp" for port in tcp}
    allowed = wanted | {f"{port}/udp" for port in udp}
    findings = Counter(f"{port} open" for port, state in states.items() if state == "open" and port not in allowed)
    findings.update(f"{port} not open" for port in wanted if states.get(port) != "open")
    scanned = sum(int(info.get("numservices", 0)) for info in run.findall("scaninfo"))
    return Verdict({"ports": float(scanned)}, findings | Counter({"closed ports": closed}))


def exposure(output: str) -> Verdict:
    """Exposure of each unit, as `systemd-analyze security UNIT...` ends."""
    found = re.findall(r"Overall exposure level for (\S+): (\d+\.\d) ", output)
    if not found:
        raise NoVerdict(f"expected exposures of units; found {tail(output)}")
    return Verdict({unit: float(level) for unit, level in found})


def observatory(output: str) -> Verdict:
    """Score of Mozilla's HTTP Observatory; a grade that is not A+ is a finding, and so is each test that failed."""
    found = _object(output, "the HTTP Observatory", "scan", "tests")
    scan = found["scan"]
    if scan.get("error") or not isinstance(scan.get("score"), int) or not found["tests"]:
        raise NoVerdict(f"the HTTP Observatory saw no site: {tail(output)}")
    failed = [f"{name}: {test['result']}" for name, test in found["tests"].items() if not test["pass"]]
    return Verdict(
        {"score": float(scan["score"])}, Counter([f"grade {scan['grade']}"] * (scan["grade"] != "A+") + failed)
    )


def schemathesis(report: str) -> Verdict:
    """Failures of schemathesis's JSON report by operation, its warnings, and how many cases it tried."""
    found = _object(report, "schemathesis", "complete", "operations", "test_cases", "failures", "errors", "warnings")
    operations, cases = found["operations"], found["test_cases"]
    if not found["complete"] or not operations["tested"] or operations["tested"] != operations["selected"]:
        raise NoVerdict(f"schemathesis did not come to its end: {operations}")
    failures = [f"{each['title']}: {operation}" for each in found["failures"] for operation in each["operations"]]
    warnings = [f"{name.replace('_', ' ')}: {where}" for name, places in found["warnings"].items() for where in places]
    if cases["with_failures"] and not failures:
        raise NoVerdict(f"schemathesis counts failures and names none: {cases}")
    errors = ["error"] * len(found["errors"])
    return Verdict({"cases": float(cases["generated"])}, Counter([*failures, *warnings, *errors]))


def h2load(log: str, requests: int) -> tuple[int, float]:
    """How many of the requests of h2load's log got 200, and the 99th percentile of their time (ms)."""
    rows = [line.split("\t") for line in log.splitlines()]
    try:
        answers = [(int(status), int(microseconds)) for _, status, microseconds, *_ in rows]
    except ValueError as error:
        raise NoVerdict(f"expected h2load's log; found {tail(log)}") from error
    if not answers or len(answers) > requests:
        raise NoVerdict(f"expected up to {requests} requests of h2load; found {len(answers)}")
    times = sorted(microseconds for _, microseconds in answers)
    return sum(status == 200 for status, _ in answers), times[min(len(times) - 1, int(len(times) * 0.99))] / 1000


def tail(output: str) -> str:
    """The end of an output, for a message."""
    return repr(output[-300:])


def _object(output: str, who: str, *keys: str) -> dict[str, Any]:
    found = _json(output, who)
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise NoVerdict(f"expected {', '.join(keys)} of {who}; found {tail(output)}")
    return found


def _array(output: str, who: str, *keys: str) -> list[dict[str, Any]]:
    found = _json(output, who)
    if not isinstance(found, list) or not all(isinstance(each, dict) and set(keys) <= set(each) for each in found):
        raise NoVerdict(f"expected an array of {who} with {', '.join(keys)}; found {tail(output)}")
    return found


def _json(output: str, who: str) -> Any:
    try:
        return json.loads(output)
    except ValueError as error:
        raise NoVerdict(f"expected JSON of {who}; found {tail(output)}") from error
