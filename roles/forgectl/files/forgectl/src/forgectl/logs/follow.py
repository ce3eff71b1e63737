"""What happens from now on, in Nginx's logs and the journal, as it comes."""

import os
import select
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

from forgectl.config import App
from forgectl.errors import ForgeError
from forgectl.layout import Layout
from forgectl.logs import access, journal, said
from forgectl.logs.access import Line
from forgectl.logs.lines import Lines
from forgectl.logs.overview import SERVER_ERROR

# Nobody is told when Nginx writes.
POLL_SECONDS = 0.25


class Wanted(NamedTuple):
    """What is shown: errors, requests that take so many seconds or more (0: none), or all of one request."""

    errors: bool = False
    slow_seconds: float = 0.0
    request_id: str = ""


class News(NamedTuple):
    """Something that has just happened. `app` is empty for the host's."""

    at: float
    app: str
    source: str
    text: str
    request_id: str = ""


def follow(apps: Sequence[tuple[Layout, App]], wanted: Wanted, show: Callable[[News], None]) -> None:
    """Show what is wanted as it comes, until somebody interrupts.

    Raises:
        ForgeError: journalctl ended by itself.
    """
    # Of one field, values are alternatives by themselves; a + makes them of terms.
    matches = [journal.DATABASE, "SYSLOG_IDENTIFIER=nginx", "+", "PRIORITY=3"]
    for layout, _ in apps:
        matches += ["+", *journal.slot_units(layout.name)]
    with ExitStack() as opened:
        tails = [(app, opened.enter_context(closing(access.Tail(layout.access_log)))) for layout, app in apps]
        process = opened.enter_context(
            subprocess.Popen(
                journal.command(matches, follow=True),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                # A Ctrl-C is for this process, which then ends that one.
                process_group=0,
            )
        )
        opened.callback(process.terminate)
        if process.stdout is None:
            return
        lines = Lines()
        while True:
            readable, _, _ = select.select([process.stdout], [], [], POLL_SECONDS)
            for app, tail in tails:
                for line in tail.new():
                    for news in _of_request(app, line, wanted):
                        show(news)
            if not readable:
                continue
            block = os.read(process.stdout.fileno(), journal.READ_BYTES)
            if not block:
                raise ForgeError("journalctl ended while it was to follow the journal; call this again")
            for raw in lines.of(block):
                if entry := journal.decode(raw):
                    for news in _of_entry([app for _, app in apps], entry, wanted):
                        show(news)


def _of_request(app: App, line: Line, wanted: Wanted) -> Iterator[News]:
    fails = wanted.errors and line.status >= SERVER_ERROR
    slow = wanted.slow_seconds and line.duration >= wanted.slow_seconds and not line.is_stream
    if fails or slow or (wanted.request_id and line.request_id == wanted.request_id):
        words = f"{line.status} {line.method} {line.path} in {line.duration:.3f} s"
        yield News(line.at, app.name, "nginx", words, line.request_id)


def _of_entry(apps: Sequence[App], entry: journal.Entry, wanted: Wanted) -> Iterator[News]:
    if wanted.request_id:
        if wanted.request_id in entry.message:
            line = said.by_app(entry.message)
            yield News(entry.at, _owner(apps, entry), "app", f"{line.level} {line.reason}", wanted.request_id)
        return
    if not wanted.errors:
        return
    if entry.identifier == "postgres":
        statement = said.by_database(entry.message)
        if statement is None or not statement.is_error:
            return
        owner = next((app.name for app in apps if app.database and app.database.name == statement.database), "")
        if owner or not statement.database:
            # An exception of the app's own may say nothing.
            text = next(iter(statement.text.splitlines()), "")
            yield News(entry.at, owner, "postgresql", f"{statement.level}: {text}")
    elif name := _owner(apps, entry):
        line = said.by_app(entry.message)
        if line.is_error:
            yield News(entry.at, name, "app", line.reason, line.request_id)
    elif entry.message.startswith("ALERT "):
        yield News(entry.at, "", "alert", entry.message)
    elif entry.identifier == "nginx" and entry.priority <= journal.WORST:
        yield News(entry.at, "", "nginx", entry.message)


def _owner(apps: Sequence[App], entry: journal.Entry) -> str:
    return next((app.name for app in apps if entry.unit.startswith(f"{app.name}@")), "")
