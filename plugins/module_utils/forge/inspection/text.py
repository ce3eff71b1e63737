"""An inspection in words, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ..problems import Problem
from . import project
from .judge import Report

_MOST_WARNINGS = 12
_MOST_NAMES = 8


def render(report: Report) -> str:
    """Return the report for people; the entry comes last, so that it can be copied."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.name}: {_verdict(report)}"
    yield ""
    for title, found in _facts(report):
        yield f"  {title:<11} {found}"
    for note in report.notes:
        yield f"  {'note':<11} {note}"
    yield from _numbered(report.problems, "To be done first:")
    shown = report.warnings[:_MOST_WARNINGS]
    yield from _numbered(shown, "Good to know; it runs all the same:")
    if len(report.warnings) > len(shown):
        yield f"and {len(report.warnings) - len(shown)} more of that kind; --json has all of them"
    if report.callable:
        yield ""
        yield "An entry to start from (`make new-app PATH=...` writes it into an inventory):"
        yield ""
        yield report.entry_text.rstrip("\n")
        if report.keys:
            yield ""
            yield f"Secrets to store: {', '.join(report.keys)}"


def _verdict(report: Report) -> str:
    if report.problems:
        count = len(report.problems)
        return f"{count} {'thing has' if count == 1 else 'things have'} to be done first"
    filled, keys = len(report.fill_in), len(report.keys)
    said = f"it will run, once {filled} {'value is' if filled == 1 else 'values are'} filled in"
    return said + (f" and {keys} {'secret is' if keys == 1 else 'secrets are'} stored" if keys else "")


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    about, app = report.project, report.callable
    where = report.path if report.source == "." else f"{report.source} in {report.path}"
    yield (
        "source",
        f"{where}, {'an' if report.kind == 'sdist' else 'a'} {report.kind}"
        + (f", {about.name} {about.version}".rstrip() if about.name else ""),
    )
    fits = ", ".join(about.fits()) or "no supported distribution"
    yield "python", (f"{about.python} ({about.python_from}): " if about.python else "any, as nothing is said: ") + fits
    if app:
        more = f"; also {', '.join(one.target for one in report.others[:3])}" if report.others else ""
        yield "callable", f"{app.target}, {app.kind or 'unknown kind'}, {app.where}{more}"
    yield "lock", _lock(report)
    for one in report.classes:
        yield "settings", f"class {one.name} ({one.where})" + (f", prefix {one.prefix}" if one.prefix else "")
    required = [one.name for one in report.settings if one.required]
    if report.settings:
        said = f"{len(report.settings)} are read; without a default: {_some(required) or 'none'}"
        yield "settings", said
        secret = [one.name for one in report.settings if one.secret and one.required]
        others = sum(one.secret and not one.required for one in report.settings)
        if secret or others:
            yield (
                "secrets",
                f"without a default: {_some(secret) or 'none'}" + (f"; with one: {others}" if others else ""),
            )
    routes = report.routes
    if app:
        yield "health", f"{routes.health.path} ({routes.health.where})" if routes.health else "no path was found"
        yield "readiness", f"{routes.ready.path} ({routes.ready.where})" if routes.ready else "no path was found"
        if routes.metrics:
            yield "metrics", f"{routes.metrics.path} ({routes.metrics.where})"
        if routes.websockets or routes.streams:
            kinds = [f"WebSockets at {_some([route.path for route in routes.websockets])}"] if routes.websockets else []
            kinds += [f"streams from {_some(routes.streams)}"] if routes.streams else []
            yield "long-lived", "; ".join(kinds)
        for path, (folder, place) in routes.static.items():
            yield "static", f"{path} from {folder or 'a folder that is computed'} ({place})"
    if report.drivers:
        yield "data", _some(report.drivers)
    if report.migrations:
        folder = f", revisions in {report.migrations.folder}" if report.migrations.folder else ""
        yield "migrations", f"{report.migrations.tool}, {report.migrations.file}{folder}"
    for name, (command, place) in report.workers.items():
        yield "background", f"{name}: {' '.join(command)} ({place})"


def _lock(report: Report) -> str:
    locked = report.project.locked
    if not locked.file:
        return "none, and no list of dependencies"
    if not locked.pinned:
        said = f"none; ranges in {locked.file}, resolved once and kept"
    else:
        said = f"{locked.file}, {len(locked.versions)} packages, {'hashed' if locked.hashed else 'without hashes'}"
    added = project.missing_servers(report.project.packages())
    return said + (f"; the platform adds {' and '.join(added)}" if added else "")


def _numbered(problems: list[Problem], title: str) -> Iterator[str]:
    if problems:
        yield ""
        yield title
    for number, problem in enumerate(problems, start=1):
        yield ""
        yield f"{number}. {problem.where}"
        yield f"   expected: {problem.expected}"
        yield f"   found: {problem.found}"
        yield f"   do: {problem.do}"


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
