"""What `forgectl logs` and `forgectl day` print."""

import re
import time
from collections.abc import Iterable, Sequence

import click
import msgspec

from forgectl.config import App
from forgectl.errors import Refused
from forgectl.layout import Layout
from forgectl.logs import days, overview, said, trace, window
from forgectl.logs import follow as following

Apps = Sequence[tuple[Layout, App]]

HOUR_SECONDS = 3600.0
SLOW_SECONDS = 1.0
SHOWN = 10


def request(apps: Apps, request_id: str, since: float | None, as_json: bool) -> None:
    """Show a request on its way.

    Raises:
        Refused: no log knows it.
    """
    check_id(request_id)
    found = trace.of(apps, request_id, time.time(), since)
    if found is None:
        searched = f"since {window.stamp(since)}" if since else "as far back as they are kept"
        raise Refused(
            f"expected request {request_id} in the logs of {_names(apps)}; found none {searched}; compare it with the "
            "X-Request-ID of the answer"
        )
    _echo([_encoded(found)] if as_json else trace.text(found))


def last_hour(apps: Apps, since: float | None, lines: int | None, slowest: bool, errors: bool, as_json: bool) -> None:
    """Show the slowest requests and the errors; without a choice both."""
    began, both = time.time() - HOUR_SECONDS if since is None else since, slowest == errors
    count = lines or SHOWN
    found = {app.name: overview.of(layout, app, began, count) for layout, app in apps}
    alerts = overview.alerts([app.name for _, app in apps], began, count)
    if as_json:
        _echo([_encoded({"schema": 1, "since": window.stamp(began), "apps": found, "alerts": alerts})])
        return
    _echo([f"since {window.stamp(began)}"])
    for name, summary in found.items():
        _echo(overview.text(name, summary, slowest=slowest or both, errors=errors or both))
    ids = (group.request_id for summary in found.values() for group in summary.errors if group.request_id)
    if (errors or both) and (example := next(ids, "")):
        _echo([f"one of them on its way: sudo forgectl logs --request {example}"])
    if errors or both:
        _echo(f"{alert.count:4} x  last {window.clock(alert.last_at)}  {alert.what}" for alert in alerts)


def follow(apps: Apps, request_id: str | None, slowest: bool, errors: bool, as_json: bool) -> None:
    """Show errors and slow requests, or one request, as they come."""
    if request_id:
        check_id(request_id)
    both = slowest == errors
    wanted = following.Wanted(
        errors=not request_id and (errors or both),
        slow_seconds=SLOW_SECONDS if not request_id and (slowest or both) else 0.0,
        request_id=request_id or "",
    )

    def show(news: following.News) -> None:
        if as_json:
            _echo([_encoded({"time": window.stamp(news.at), **news._asdict()})])
        else:
            whose = f"{news.app or 'host'} {news.source}"
            _echo([f"{window.clock(news.at)}  {whose:<18}  {news.text}  {news.request_id}".rstrip()])

    following.follow(apps, wanted, show)


def day(apps: Apps, as_json: bool) -> None:
    """Show the last day."""
    now = time.time()
    if as_json:
        _echo([_encoded(days.document([layout for layout, _ in apps], now))])
        return
    for layout, app in apps:
        _echo(days.text(app.name, days.of(layout, now), days.begin(now)))


def check_id(request_id: str) -> None:
    """Refuse what is no request id.

    Raises:
        click.UsageError: it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{8,64}", request_id):
        raise click.UsageError("--request: expected the X-Request-ID of an answer, as 32 hexadecimal digits")


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(said.plain(line))


def _names(apps: Apps) -> str:
    return ", ".join(app.name for _, app in apps) or "no app"


def _encoded(value: object) -> str:
    return msgspec.json.encode(value).decode()
