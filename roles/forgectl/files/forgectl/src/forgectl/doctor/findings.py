"""What doctor says: findings, how each check went, and what that comes to. The document is that of docs/doctor.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forgectl.doctor.catalogue import BY_CODE, Entry, Severity

SCHEMA = 1
HOST = "host"
ORDER: tuple[Severity, ...] = ("critical", "warning", "note")
# The exit codes; 1 and 2 are those of every command.
CLEAN, WARNING, CRITICAL = 0, 10, 11

Outcome = Literal["ok", "found", "skipped", "failed", "too slow"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: One of the catalogue.
        subject: The name of an app, or `host`.
        title: One line with the figures.
        evidence: What was read, and where.
        mend: The one command that mends it, or begins to.
        over: Whether it has passed by itself: then it is a note, whatever the catalogue says.
    """

    code: str
    subject: str
    title: str
    evidence: Sequence[str]
    mend: str
    over: bool = False

    @property
    def entry(self) -> Entry:
        """What the catalogue says of it."""
        return BY_CODE[self.code]

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return "note" if self.over else self.entry.severity

    def document(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "code": self.code,
            "name": self.entry.name,
            "severity": self.severity,
            "subject": self.subject,
            "title": self.title,
            "evidence": list(self.evidence),
            "mend": self.mend,
            "runbook": self.entry.runbook,
        }


@dataclass(frozen=True)
class Looked:
    """How a check went: `why` it could not look, in words, where it could not."""

    name: str
    seconds: float
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Report:
    """All of it; findings in the order in which somebody should read them."""

    host: str
    at: str
    seconds: float
    findings: Sequence[Finding]
    checks: Sequence[Looked]

    @property
    def verdict(self) -> Literal["clean", "warning", "critical"]:
        """What it comes to; notes count for nothing."""
        found = {finding.severity for finding in self.findings}
        return "critical" if "critical" in found else "warning" if "warning" in found else "clean"

    @property
    def exit_code(self) -> int:
        """The same for a shell."""
        return {"clean": CLEAN, "warning": WARNING, "critical": CRITICAL}[self.verdict]

    def document(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "schema": SCHEMA,
            "host": self.host,
            "at": self.at,
            "seconds": round(self.seconds, 3),
            "verdict": self.verdict,
            "findings": [finding.document() for finding in self.findings],
            "checks": [
                {"name": each.name, "seconds": round(each.seconds, 3), "outcome": each.outcome} for each in self.checks
            ],
        }


def urgency(finding: Finding) -> tuple[int, str, str]:
    """The worst first; what is about the same stands together."""
    return ORDER.index(finding.severity), finding.code, finding.subject
