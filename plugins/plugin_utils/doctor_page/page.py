"""The page as HTML, and as the table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import jinja2

from .answers import VERDICTS, Host, order
from .plots import Picture, picture

TEMPLATE = Path(__file__).with_name("page.html.jinja")
# With more, those of hosts that are well begin folded.
OPEN_HOSTS = 4


def html(hosts: Sequence[Host], at: datetime) -> str:
    """Render the page; all that hosts say is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    drawn = [_drawn(host) for host in hosts]
    pictures = {host.name: apps for host, apps in drawn}
    ordered = order([host for host, _ in drawn])
    return template.render(
        hosts=ordered,
        pictures=pictures,
        at=f"{at:%Y-%m-%d %H:%M %Z}",
        counts=_counts(ordered),
        worst=ordered[0].verdict if ordered else "unknown",
        open=len(ordered) <= OPEN_HOSTS,
    )


def _drawn(host: Host) -> tuple[Host, dict[str, Picture]]:
    """Draw the day of each app; one whose lists or times make no sense is no reason to go without the other hosts."""
    if host.day is None:
        return host, {}
    try:
        return host, {name: picture(host.day, app) for name, app in host.day.apps.items()}
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = f"its forgectl day answers in a way that this page does not read: {error}; run site.yml"
        return replace(host, day=None, why_no_day=why), {}


def table(hosts: Sequence[Host]) -> Iterator[str]:
    """A line a host and two a finding, the worst first; notes are on the page."""
    for line in _lines(hosts):
        # What a host says is not for a terminal to obey.
        yield "".join(each if each.isprintable() else "?" for each in line)


def _lines(hosts: Sequence[Host]) -> Iterator[str]:
    ordered = order(list(hosts))
    widest = max((len(host.name) for host in ordered), default=0)
    for host in ordered:
        counts = ", ".join(f"{count} {severity}" for severity, count in host.counts.items() if count)
        yield f"{host.name:<{widest}}  {host.verdict:<8}  {host.why or counts or 'nothing found'}"
        for finding in host.report.findings if host.report else ():
            if finding.severity != "note":
                yield f"{'':<{widest}}  {finding.code}  {finding.severity:<8}  {finding.subject}: {finding.title}"
                yield f"{'':<{widest}}        {finding.mend}  (docs/runbooks/{finding.runbook}.md)"


def summary(hosts: Sequence[Host]) -> str:
    """How many hosts there are of each verdict, in words."""
    return ", ".join(f"{count} {verdict}" for verdict, count in _counts(hosts)) or "no host"


def _counts(hosts: Sequence[Host]) -> list[tuple[str, int]]:
    found = Counter(host.verdict for host in hosts)
    return [(verdict, found[verdict]) for verdict in VERDICTS if found[verdict]]
