"""What doctor found, for people at a terminal."""

from collections import Counter
from collections.abc import Sequence

from forgectl.doctor.findings import ORDER, Finding, Report
from forgectl.logs.said import plain

COLOURS = {"critical": "red", "warning": "yellow", "note": "cyan"}
HEADINGS = ("code", "severity", "subject", "what")


def text(report: Report, *, colour: bool) -> str:
    """The findings as a table, then each with its evidence, what mends it, and where its page is.

    Evidence quotes what apps, clients and servers said: none of it does anything to the terminal.
    """
    import click

    def paint(word: str, severity: str) -> str:
        return click.style(word, fg=COLOURS[severity], bold=severity == "critical") if colour else word

    lines = [_headline(report)]
    if report.findings:
        widths = _widths(report.findings)
        lines += ["", "  ".join(word.ljust(width) for word, width in zip(HEADINGS, widths, strict=False)).rstrip()]
        for finding in report.findings:
            cells = (finding.code, finding.severity, finding.subject)
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            padded[1] = paint(padded[1], finding.severity)
            lines.append("  ".join([*padded, plain(finding.title)]))
        for finding in report.findings:
            lines += ["", paint(f"{finding.code} {finding.subject}: {plain(finding.title)}", finding.severity)]
            lines += [f"  saw      {plain(line)}" for line in finding.evidence]
            lines += [f"  mend     {plain(finding.mend)}", f"  runbook  docs/runbooks/{finding.entry.runbook}.md"]
    return "\n".join(lines)


def _headline(report: Report) -> str:
    counted = Counter(finding.severity for finding in report.findings)
    said = ", ".join(f"{counted[each]} {each}" for each in ORDER if counted[each]) or "nothing found"
    looked = sum(each.outcome != "skipped" for each in report.checks)
    return f"{report.host}: {report.verdict} ({said}), {looked} checks in {report.seconds:.1f} s"


def _widths(findings: Sequence[Finding]) -> list[int]:
    rows = [HEADINGS[:3], *((each.code, each.severity, each.subject) for each in findings)]
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
