"""The independent judges of a host: what each is asked for, and by name, reason and bound what of that is waived.

This is the one table of targets. A target that is missed and not waived fails; so does a waiver that nothing needs any
more, or whose figure got worse than its bound.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from forge_verdicts import Verdict

RESULTS = "FORGE_JUDGES_RESULTS"
"""Environment variable: the file that gets a line for each verdict; `make judges` makes its table of them."""


@dataclass(frozen=True)
class Target:
    """What is asked of a judge: no finding, and figures within bounds."""

    judge: str
    asked: str
    """In words, for the table."""
    at_least: Mapping[str, float] = field(default_factory=dict)
    """Bounds by the name of a figure, or by a pattern of names; the first that fits counts."""
    at_most: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Waiver:
    """A shortfall that is accepted."""

    judge: str
    name: str
    """Of the finding or of the figure."""
    reason: str
    bound: float = 1
    """How often the finding may come, or the worst that the figure may be."""
    only_on: str = ""
    """A distribution; empty for all."""


TARGETS = [
    Target("sslyze", "compliant with Mozilla's intermediate profile"),
    Target("testssl.sh", "A+, score at least 95", at_least={"score": 95}),
    Target("ssh-audit", "the distribution's policy passes; no failure, no warning"),
    Target(
        "lynis",
        "hardening index at least 85 without the tests waived below, no warning",
        at_least={"hardening index": 85},
    ),
    Target("gixy", "no finding"),
    Target("HTTP Observatory", "A+, score at least 100", at_least={"score": 100}),
    Target(
        "systemd-analyze security",
        "exposure of the app at most 1.5, of Nginx at most 2.5, of every other own unit at most 2.0",
        at_most={"inbox@*.service": 1.5, "nginx.service": 2.5, "*": 2.0},
    ),
    Target(
        "nmap", "of all TCP ports 22, 80 and 443 answer, of the common UDP ports at most 443", at_least={"ports": 1}
    ),
    Target(
        "slowhttptest",
        "clients slow with headers or bodies, and the median slow reader, are closed within 10 s",
        at_most={"headers, s": 10, "body, s": 10, "read, s": 10},
    ),
    Target(
        "h2load beside slowhttptest",
        "2,000 slow connections raise an honest client's p99 by at most half; it gets 2,000 answers of 200",
        at_least={"answers": 2000, "slow connections": 1500},
        at_most={"p99 : p99 without": 1.5},
    ),
    Target("schemathesis", "no failure, no warning, in at least 50 cases", at_least={"cases": 50}),
]

WAIVERS = [
    *(
        Waiver(
            "ssh-audit",
            f"warn {algorithm}",
            "Its own policy for Debian 12 asks for it, and it warns that a quantum computer would break it.",
            only_on="bookworm",
        )
        for algorithm in (
            "curve25519-sha256",
            "curve25519-sha256@libssh.org",
            "diffie-hellman-group-exchange-sha256",
            "diffie-hellman-group16-sha512",
            "diffie-hellman-group18-sha512",
        )
    ),
    Waiver(
        "gixy",
        "missing_resolver (medium)",
        "What the variable completes is the name of an upstream that Nginx itself defines; no name is ever looked up.",
    ),
    Waiver(
        "gixy",
        "return_bypasses_allow_deny (medium)",
        "The return is a refusal: it adds to allow and deny those whom a load balancer names.",
    ),
    Waiver(
        "gixy",
        "try_files_is_evil_too (medium)",
        "A missing file is looked up in each slot; a cache of what there is would outlast the release that it is of.",
    ),
    Waiver(
        "lynis",
        "warning DBS-1828",
        "Debian's own modes; none of these files of PostgreSQL holds a secret, passwords are SCRAM verifiers.",
        bound=3,
        only_on="trixie",
    ),
    Waiver(
        "lynis", "FILE-6310", "Partitions are made by whoever makes the host; a full disk is one of the tests.", bound=2
    ),
    Waiver("lynis", "NAME-4028", "The host's own name is its provider's."),
    Waiver("lynis", "AUTH-9230", "Nobody logs in with a password: keys alone, and sudo asks for none."),
    Waiver("lynis", "AUTH-9262", "Nobody logs in with a password: keys alone, and sudo asks for none."),
    Waiver("lynis", "AUTH-9286", "Nobody logs in with a password: keys alone, and sudo asks for none.", bound=2),
    Waiver("lynis", "AUTH-9284", "Users of services are locked on purpose."),
    Waiver("lynis", "USB-1000", "A virtual machine has no such port."),
    Waiver("lynis", "STRG-1846", "A virtual machine has no such port."),
    Waiver("lynis", "USB-3000", "A virtual machine has no such port."),
    Waiver(
        "lynis",
        "FILE-6344",
        "Units see no process but their own by ProtectProc=; people who log in may use sudo anyway.",
    ),
    Waiver("lynis", "DEB-0280", "Services have a /tmp of their own by their units."),
    Waiver("lynis", "DEB-0810", "It asks a person, and upgrades are unattended."),
    Waiver("lynis", "DEB-0811", "It tells a person, and upgrades are unattended."),
    Waiver("lynis", "PKGS-7394", "What is out of date is installed by itself, and needs no list."),
    Waiver("lynis", "PKGS-7370", "A host that may be compromised is replaced, not searched."),
    Waiver("lynis", "FINT-4350", "A host that may be compromised is replaced, not searched."),
    Waiver(
        "lynis",
        "HRDN-7230",
        "Nobody uploads programs to run; releases are read-only, and their users may not write code.",
    ),
    Waiver(
        "lynis",
        "MALW-3280",
        "Nobody uploads programs to run; releases are read-only, and their users may not write code.",
    ),
    Waiver("lynis", "LOGG-2154", "Where logs go beyond the host is for its inventory to say."),
    Waiver("lynis", "BANN-7126", "A legal text is its owner's to write."),
    Waiver("lynis", "BANN-7130", "A legal text is its owner's to write."),
    Waiver("lynis", "ACCT-9622", "Every unit's use of the machine is accounted by systemd."),
    Waiver("lynis", "ACCT-9626", "Every unit's use of the machine is accounted by systemd."),
    Waiver(
        "lynis",
        "ACCT-9628",
        "The kernel of the tests has no audit; sudo and forgectl say in the journal who did what.",
    ),
    Waiver(
        "lynis", "BOOT-5264", "It counts Debian's units; the project's own are judged by systemd-analyze, one by one."
    ),
    Waiver("lynis", "BOOT-5180", "It asks for runlevels, which systemd has none of.", only_on="trixie"),
    Waiver(
        "lynis", "TIME-3104", "systemd-timesyncd leaves the clock of a container to its machine, and runs elsewhere."
    ),
    Waiver("lynis", "DEB-0880", "What is set for fail2ban stands in jail.d, which leaves jail.local to people."),
    Waiver("lynis", "FILE-7524", "Debian's own modes; none of these files holds a secret."),
    Waiver(
        "lynis", "HOME-9304", "Debian's own modes for its own users; PostgreSQL's data lie in a folder for it alone."
    ),
    Waiver(
        "lynis",
        "HTTP-6710",
        "It does not see TLS where a port is also answered without; sslyze and testssl.sh judge it.",
    ),
    Waiver("lynis", "HTTP-6712", "Each app has an access log of its own; it looks for one of all."),
    Waiver("lynis", "HTTP-6714", "Errors go to the journal; it looks for a file."),
    Waiver("lynis", "KRNL-5788", "The hosts of the tests are containers, which bring no kernel."),
    Waiver(
        "schemathesis",
        "Schema-valid request rejected: GET /v1/events",
        "A cursor is signed: whether it was issued here is nothing that a schema can say.",
    ),
    Waiver(
        "schemathesis",
        "Allow header mismatch: OPTIONS /v1/events",
        "FastAPI's router refuses a method by the first route of a path, and names the methods of that one alone.",
    ),
    Waiver(
        "schemathesis",
        "Schema-valid request rejected: POST /v1/events",
        "422 for a key that was used with another body is what the draft of Idempotency-Key asks for.",
    ),
]


def shortfalls(
    target: Target, verdict: Verdict, waivers: Sequence[Waiver], distribution: str
) -> tuple[list[str], list[Waiver]]:
    """Say in words what keeps a verdict from its target, and which waivers it needed."""
    waived = {each.name: each for each in waivers if each.judge == target.judge and each.only_on in ("", distribution)}
    problems: list[str] = []
    used: list[Waiver] = []
    for name, times in sorted(verdict.findings.items()):
        if not times:
            continue
        if waiver := waived.get(name):
            used.append(waiver)
        if waiver is None:
            problems.append(f"{name}: found {times} times")
        elif times > waiver.bound:
            problems.append(f"{name}: found {times} times, and waived for {waiver.bound:g}")
    for bounds, sign in ((target.at_least, 1), (target.at_most, -1)):
        met = set()
        for name, figure in sorted(verdict.figures.items()):
            pattern = next((each for each in bounds if fnmatchcase(name, each)), None)
            if pattern is None:
                continue
            met.add(pattern)
            if sign * figure >= sign * bounds[pattern]:
                continue
            if waiver := waived.get(name):
                used.append(waiver)
            if waiver is None:
                word = "at least" if sign > 0 else "at most"
                problems.append(f"{name}: expected {word} {bounds[pattern]:g}; found {figure:g}")
            elif sign * figure < sign * waiver.bound:
                problems.append(f"{name}: waived to {waiver.bound:g}; found {figure:g}")
        problems += [f"{pattern}: was not measured" for pattern in bounds if pattern not in met]
    problems += [
        f"{each.name}: waived, and nothing needs that any more" for each in waived.values() if each not in used
    ]
    return problems, used


def target_of(judge: str) -> Target:
    """What is asked of a judge."""
    (found,) = (target for target in TARGETS if target.judge == judge)
    return found


def assert_satisfied(judge: str, verdict: Verdict, distribution: str) -> None:
    """Judge the judge's verdict, and keep it where `make judges` asks for it.

    Raises:
        AssertionError: it misses its target.
    """
    problems, used = shortfalls(target_of(judge), verdict, WAIVERS, distribution)
    if file := os.environ.get(RESULTS):
        line = {"judge": judge, "distribution": distribution, "problems": problems} | {
            "figures": dict(verdict.figures),
            "waived": [asdict(each) for each in used],
        }
        with Path(file).open("a") as results:
            results.write(json.dumps(line) + "\n")
    assert not problems, f"{judge}: {target_of(judge).asked}\n" + "\n".join(problems)
