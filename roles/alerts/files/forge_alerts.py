#!/usr/bin/python3
"""Deliver the alert lines of the journal: to a command, to a webhook, by mail.

usage: forge-alerts                     follow the journal until it is stopped; what forge-alerts.service runs
       forge-alerts seal [--dry-run]    seal what only the receivers may know, a JSON object on standard input

The journal is the queue, and it is on the disk already: each channel follows it by itself, and moves its cursor on once
what it read has been delivered. So nothing is lost over a restart, a reboot or a receiver that is away, what writes
alerts never waits, and one channel does not hold up another. A delivery that ends in a crash is made again.
Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import select
import signal
import smtplib
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from email.message import EmailMessage
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

CONFIG = Path("/etc/forge/alerts.toml")
STATE = Path("/var/lib/forge-alerts")
CREDENTIALS = Path("/etc/credstore.encrypted")
# What is sealed, by the name that the unit has it under.
SEALED = ("webhook_url", "mail_password")
FIELDS = "MESSAGE,_SYSTEMD_UNIT,SYSLOG_IDENTIFIER,_UID"
ALERT = re.compile(r"ALERT (\S{1,64}): (.*)", re.DOTALL)
TEST = re.compile(r"test ([0-9a-f]{8}) of the alerts\b")

# What comes together is told together.
GATHER_SECONDS = 2.0
# A message has so many different lines in full, and so many of one unit: one that floods hides no other.
SHOWN, SHOWN_OF_ONE, UNITS = 20, 5, 20
TEXT_LENGTH = 1000
# So many messages may follow upon each other; then they come evenly spaced.
BURST = 5
# Lines that were told lately; the oldest of more than that may be told again.
REMEMBERED = 500
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0
# A receiver that is away for moments is nothing to tell the others.
TOLD_AFTER = 4
WEBHOOK_SECONDS, MAIL_SECONDS, COMMAND_SECONDS = 15.0, 30.0, 60.0
# The longest line of journalctl that is looked at: without --all it prints of no field more than 4 KiB.
ENTRY_BYTES = 256 * 1024
# What is read ahead of what a command says on its standard error, of which the end is kept.
SAID_BYTES = 4096
# A journal that can be read for so long can be read.
SETTLED_SECONDS = 5.0
# How long a channel without anything to do sleeps at most.
IDLE_SECONDS = 3600.0
ERROR_LENGTH = 300


class Undelivered(Exception):
    """A receiver did not take a message; `pause` is how many seconds it wants to be left alone for, if it said so."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


class Ended(Exception):
    """journalctl has ended."""


class Stop:
    """Tells all channels, wherever they wait, that it is over."""

    def __init__(self) -> None:
        self.fd, self._end = os.pipe()

    def set(self) -> None:
        """Say so, for good."""
        os.write(self._end, b".")

    def wait(self, seconds: float, *others: int) -> bool:
        """Wait until it is over, something can be read from another descriptor, or time is up; is it over?"""
        return self.fd in select.select([self.fd, *others], [], [], max(0.0, seconds))[0]


@dataclass(frozen=True)
class Line:
    """An alert line of the journal. `identity` is the same for the same line, wherever journald has moved it."""

    subject: str
    text: str
    unit: str
    at: float
    cursor: str
    identity: str

    @property
    def key(self) -> str:
        """What says the same has the same."""
        return hashlib.sha256(f"{self.subject}\0{self.text}".encode()).hexdigest()[:16]


@dataclass
class Item:
    """A line as it is told: how often it was said, and when first and last."""

    subject: str
    text: str
    unit: str
    first: float
    last: float
    times: int = 1

    @classmethod
    def of(cls, line: Line) -> Item:
        """A line that was said once."""
        return cls(line.subject, line.text, line.unit, line.at, line.at)

    def again(self, at: float, times: int = 1) -> None:
        """It was said again."""
        self.last = at
        self.times += times


@dataclass
class State:
    """What a channel remembers.

    `sent` is when the lines of late were told, by their key, and `held` what has been said again since, to be told when
    its time comes. `delivered` and `failing` are for people and for doctor; `test` is the newest test that was told.
    """

    cursor: str = ""
    sent: dict[str, float] = field(default_factory=dict)
    held: dict[str, Item] = field(default_factory=dict)
    delivered: dict[str, Any] | None = None
    failing: dict[str, Any] | None = None
    test: str = ""

    @classmethod
    def load(cls, path: Path) -> State:
        """Read it; nothing where there is none, or none that can be read."""
        try:
            found = json.loads(path.read_text())
            held = {key: Item(**item) for key, item in found.pop("held").items()}
            return cls(**found, held=held)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            say(f"{path} is damaged and begun anew: {error!r}")
            return cls()

    def save(self, path: Path) -> None:
        """Write it, so that a crash leaves the old one or the new."""
        new = path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


@dataclass
class Batch:
    """What is told in one message, within bounds whatever comes."""

    items: dict[str, Item] = field(default_factory=dict)
    more: dict[str, int] = field(default_factory=dict)
    """How many further lines of each unit."""
    held: dict[str, Item] = field(default_factory=dict)
    """What was told lately, and waits."""
    released: list[str] = field(default_factory=list)
    """The keys of what has waited long enough, and is among the items."""
    cursor: str = ""
    identities: Any = field(default_factory=hashlib.sha256)
    test: str = ""

    def add(self, line: Line) -> None:
        """Take a line."""
        self.identities.update(line.identity.encode())
        if found := TEST.search(line.text):
            self.test = found[1]
        if item := self.items.get(line.key):
            item.again(line.at)
        else:
            self.put(line.key, Item.of(line))

    def hold(self, line: Line) -> None:
        """Take a line that was told lately."""
        if item := self.held.get(line.key):
            item.again(line.at)
        else:
            self.held[line.key] = Item.of(line)

    def put(self, key: str, item: Item) -> None:
        """Take what is to be told, in full while there is room."""
        of_one = sum(each.unit == item.unit for each in self.items.values())
        if len(self.items) < SHOWN and of_one < SHOWN_OF_ONE:
            self.items[key] = item
            return
        unit = item.unit if item.unit in self.more or len(self.more) < UNITS else "other units"
        self.more[unit] = self.more.get(unit, 0) + item.times

    @property
    def count(self) -> int:
        """How many lines it stands for."""
        return sum(item.times for item in self.items.values()) + sum(self.more.values())


@dataclass(frozen=True)
class Message:
    """A batch as receivers get it: for people, and for programs."""

    id: str
    subject: str
    text: str
    document: dict[str, Any]


Send = Callable[[Message], None]


def say(text: str, priority: int = 5) -> None:
    """Tell the journal: sd-daemon(3)."""
    print(f"<{priority}>{text}", file=sys.stderr, flush=True)


def utc(at: float) -> str:
    """A moment, as people read it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def plain(text: str) -> str:
    """One line without anything that a terminal or a mail's head would take for an order."""
    found = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(found.split())[:TEXT_LENGTH]


def parse(raw: bytes) -> Line | None:
    """Read an entry of `journalctl --output=json`; None where it is no alert."""
    try:
        entry = json.loads(raw)
        message = entry["MESSAGE"]
        if message is None:
            # It is an alert, or journalctl would not have printed it, and too long to be read: whose it is has to do.
            message = f"ALERT host: an alert of more than 4 KiB by {entry.get('_SYSTEMD_UNIT', '-')}: see the journal"
        # What is no UTF-8 comes as numbers.
        said = bytes(message).decode(errors="replace") if isinstance(message, list) else str(message)
        found = ALERT.match(said)
        if found is None:
            return None
        cursor, at = str(entry["__CURSOR"]), int(entry["__REALTIME_TIMESTAMP"]) / 1e6
    except (ValueError, TypeError, LookupError):
        return None
    unit = plain(str(entry.get("_SYSTEMD_UNIT") or entry.get("SYSLOG_IDENTIFIER") or "-"))
    text = plain(found[2])
    if entry.get("_UID", "0") != "0":
        # Whoever may write to the journal can write such a line; who did is journald's own knowledge.
        text += f" [said by {unit}]"
    return Line(plain(found[1]), text, unit, at, cursor, identity(cursor))


def identity(cursor: str) -> str:
    """What of a cursor stays the same when journald moves an entry from /run to the disk: boot, times and content."""
    parts = dict(part.partition("=")[::2] for part in cursor.split(";"))
    return ";".join(f"{name}={parts.get(name, '')}" for name in "bmtx")


class Journal:
    """The alert lines behind a cursor, and those that come."""

    def __init__(self, cursor: str, stop: Stop, program: Sequence[str] = ("journalctl",)) -> None:
        self._stop, self._last = stop, identity(cursor)
        # Beginning with the entry itself: if that is gone meanwhile, `--after-cursor` may skip another one.
        options = [
            "--follow",
            "--no-tail",
            "--quiet",
            "--priority=err",
            "--output=json",
            # Not --all: with an entry of any size, which each app may write, memory would end, and at the next start
            # end again. Then long fields come without their content; what begins a message is looked at all the same.
            "--grep=^ALERT ",
            f"--output-fields={FIELDS}",
            f"--cursor={cursor}" if cursor else "--lines=0",
        ]
        self._process = subprocess.Popen([*program, *options], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self._process.stdout is not None  # noqa: S101  # for the type
        self._fd = self._process.stdout.fileno()
        self._rest, self._skipped = b"", False
        self._raw: deque[bytes] = deque()
        self._next: Line | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def waits(self, seconds: float) -> bool:
        """Whether an alert is there, or comes in time; it is not taken.

        Raises:
            Ended: journalctl has ended.
        """
        if self._next is None:
            self._next = self.read(seconds)
        return self._next is not None

    def read(self, seconds: float) -> Line | None:
        """Give the next alert; None when none came in time, or it is over.

        Raises:
            Ended: journalctl has ended.
        """
        if self._next:
            taken, self._next = self._next, None
            return taken
        deadline = time.monotonic() + seconds
        while True:
            while self._raw:
                line = parse(self._raw.popleft())
                if line and line.identity != self._last:
                    return line
            left = deadline - time.monotonic()
            if self._stop.wait(left, self._fd):
                return None
            if not select.select([self._fd], [], [], 0)[0]:
                if left <= 0:
                    return None
                continue
            chunk = os.read(self._fd, 1 << 16)
            if not chunk:
                raise Ended(f"journalctl ended with {self._process.wait()}")
            self._split(chunk)

    def _split(self, chunk: bytes) -> None:
        """Take what was read: whole lines, and of one that is too long nothing, to its very end."""
        *whole, rest = (self._rest + chunk).split(b"\n")
        if whole and self._skipped:
            del whole[0]
            self._skipped = False
        self._raw.extend(whole)
        self._skipped = self._skipped or len(rest) > ENTRY_BYTES
        self._rest = b"" if self._skipped else rest


def newest(program: Sequence[str] = ("journalctl",)) -> str:
    """The cursor of the journal's last entry; empty where it has none."""
    found = subprocess.run(
        [*program, "--lines=1", "--quiet", "--output=json", "--output-fields=PRIORITY"],
        capture_output=True,
        text=True,
        check=False,
    )
    return str(json.loads(found.stdout)["__CURSOR"]) if found.stdout.strip() else ""


class Bucket:
    """When the next message may go: some at once, then so many an hour."""

    def __init__(self, per_hour: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap, self._clock = 3600 / per_hour, clock
        self._full = clock() - BURST * self._gap

    def wait(self) -> float:
        """Seconds until one may go."""
        return max(0.0, self._full + self._gap - self._clock())

    def take(self) -> None:
        """One goes."""
        self._full = max(self._full, self._clock() - BURST * self._gap) + self._gap


@dataclass
class Channel:
    """One way to somebody, with a place of its own in the journal."""

    name: str
    send: Send
    stop: Stop
    bucket: Bucket
    path: Path
    host: str
    repeat_seconds: float
    state: State = field(default_factory=State)
    now: Callable[[], float] = time.time
    program: Sequence[str] = ("journalctl",)

    def run(self) -> None:
        """Deliver until it is over."""
        self.state = State.load(self.path)
        if not self.state.cursor:
            # What was said before there was anybody to tell is history.
            self.state.cursor = newest(self.program)
        self.state.save(self.path)
        pause = FIRST_PAUSE
        while not self.stop.wait(0):
            began = self.now()
            try:
                with Journal(self.state.cursor, self.stop, self.program) as journal:
                    self.follow(journal)
            except Ended as error:
                before = self.state.failing or {"since": began, "attempts": 0}
                self.state.failing = {**before, "attempts": before["attempts"] + 1, "error": str(error)}
                self.state.save(self.path)
                say(f"{self.name}: {error}; again in {pause:g} s")
                self.stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def follow(self, journal: Journal) -> None:
        """Tell what comes."""
        if self.state.failing and not journal.waits(SETTLED_SECONDS) and not self.stop.wait(0):
            # It can be read, and nothing is left to be told.
            self.state.failing = None
            self.state.save(self.path)
        while not self.stop.wait(0):
            batch = self.gather(journal)
            if batch is None or not self.deliver(batch):
                return

    def gather(self, journal: Journal) -> Batch | None:
        """Wait for what is to be told, and for what comes with it; None when it is over."""
        batch = Batch()
        line = journal.read(self._patience())
        if line is None and self.stop.wait(0):
            return None
        # As long as no message may go, what comes is added to it.
        end = time.monotonic() + max(GATHER_SECONDS, self.bucket.wait())
        while line:
            self._take(batch, line)
            line = journal.read(end - time.monotonic()) if time.monotonic() < end else None
        if self.stop.wait(0):
            # The cursor has not moved: the next start reads the same again.
            return None
        self._release(batch)
        return batch

    def deliver(self, batch: Batch) -> bool:
        """Have a batch told, however often it takes; False when it is over before."""
        if batch.items:
            message = compose(self.host, batch, self.now())
            if not self._send(message):
                return False
            self.bucket.take()
            self.state.delivered = {"at": self.now(), "id": message.id, "alerts": batch.count}
            self.state.failing = None
            self.state.sent |= dict.fromkeys(batch.items, self.now())
            self.state.test = batch.test or self.state.test
        self._commit(batch)
        return True

    def _take(self, batch: Batch, line: Line) -> None:
        batch.cursor = line.cursor
        if line.key not in batch.items and self._due(line.key) > self.now():
            batch.hold(line)
        else:
            batch.add(line)

    def _release(self, batch: Batch) -> None:
        """Add what was held back for long enough."""
        for key, item in self.state.held.items():
            if self._due(key) <= self.now():
                batch.released.append(key)
                batch.identities.update(f"{key} {item.first}".encode())
                batch.put(key, replace(item))

    def _commit(self, batch: Batch) -> None:
        """Remember that all of a batch is done; until then the journal has it."""
        state = self.state
        for key in batch.released:
            del state.held[key]
        for key, item in batch.held.items():
            if key in state.held:
                state.held[key].again(item.last, item.times)
            else:
                state.held[key] = item
        state.cursor = batch.cursor or state.cursor
        recent = {key: at for key, at in state.sent.items() if key in state.held or self._due(key) > self.now()}
        ranked = sorted(recent, key=lambda key: (key in state.held, recent[key]), reverse=True)
        state.sent = {key: recent[key] for key in ranked[:REMEMBERED]}
        state.save(self.path)

    def _due(self, key: str) -> float:
        return self.state.sent.get(key, 0.0) + self.repeat_seconds

    def _patience(self) -> float:
        return max(0.0, min([IDLE_SECONDS, *(self._due(key) - self.now() for key in self.state.held)]))

    def _send(self, message: Message) -> bool:
        attempts, since, pause = 0, self.now(), FIRST_PAUSE
        while True:
            try:
                self.send(message)
            except Undelivered as error:
                attempts += 1
                why = plain(str(error))[:ERROR_LENGTH]
                self.state.failing = {"since": since, "attempts": attempts, "error": why}
                self.state.save(self.path)
                if attempts == 1:
                    say(f"{self.name}: {why}; it is tried again")
                if attempts == TOLD_AFTER:
                    # By the other channels, and by this one once it works again.
                    say(f"ALERT host: alerts are not delivered by {self.name} since {utc(since)}: {why}", priority=3)
                if self.stop.wait(max(error.pause, pause) * random.uniform(0.8, 1.2)):  # noqa: S311  # no secret
                    return False
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if attempts:
                    say(f"{self.name}: delivered at attempt {attempts + 1}")
                return True


def compose(host: str, batch: Batch, now: float) -> Message:
    """Write a batch for people and for programs; the same lines have the same id."""
    items = sorted(batch.items.values(), key=lambda item: item.first)
    only = items[0] if len(items) == 1 and not batch.more else None
    subjects = ", ".join(dict.fromkeys(item.subject for item in items))
    headline = f"ALERT {only.subject}: {only.text}" if only else f"{batch.count} alerts: {subjects}"
    lines = [f"{utc(item.last)}  {item.subject}: {item.text}{_often(item)}" for item in items]
    lines += [f"and {count} more of {unit}" for unit, count in batch.more.items()]
    text = "\n".join(
        [
            f"Alerts of {host}:",
            "",
            *lines,
            "",
            "All of them, on the host: sudo journalctl --priority=err --grep='^ALERT'",
            "What each means, and what to do: docs/runbooks/README.md",
        ]
    )
    identifier = batch.identities.hexdigest()[:24]
    document = {
        "schema": 1,
        "id": identifier,
        "host": host,
        "at": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "headline": f"[{host}] {headline}",
        "text": text,
        "alerts": [asdict(item) for item in items],
        "more": batch.more,
    }
    return Message(identifier, f"[{host}] {headline}"[:200], text, document)


def _often(item: Item) -> str:
    return f" ({item.times} times since {utc(item.first)})" if item.times > 1 else ""


def by_command(argv: Sequence[str]) -> Send:
    """Hand messages to a command: the text on its standard input, the rest in its environment."""

    def send(message: Message) -> None:
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "FORGE_ALERT_ID": message.id,
            "FORGE_ALERT_HOST": message.document["host"],
            "FORGE_ALERT_SUBJECT": message.subject,
            "FORGE_ALERT_JSON": json.dumps(message.document),
        }
        try:
            # In memory, so that nobody waits for it to be read.
            with os.fdopen(os.memfd_create("alert"), "wb+") as text:
                text.write(message.text.encode())
                text.seek(0)
                process = subprocess.Popen(
                    list(argv),
                    stdin=text,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise Undelivered(f"{argv[0]}: {error.strerror}") from None
        with process:
            try:
                said = last_words(process, time.monotonic() + COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                raise Undelivered(f"{argv[0]} took more than {COMMAND_SECONDS:g} s") from None
            finally:
                # And whatever it has left behind.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            words = said.decode(errors="replace").strip().splitlines()[-1:]
            raise Undelivered(" ".join([f"{argv[0]} ended with {process.returncode}", *words]))

    return send


def last_words(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Wait until a process has ended, and nobody holds on to its standard error: the end of what was said there.

    Raises:
        subprocess.TimeoutExpired: it is not over in time, whatever was said meanwhile.
    """
    assert process.stderr is not None  # noqa: S101  # for the type
    fd, kept = process.stderr.fileno(), b""
    while (left := deadline - time.monotonic()) > 0 and select.select([fd], [], [], left)[0]:
        chunk = os.read(fd, SAID_BYTES)
        if not chunk:
            process.wait(max(0.0, deadline - time.monotonic()))
            return kept
        kept = (kept + chunk)[-SAID_BYTES:]
    raise subprocess.TimeoutExpired(process.args, COMMAND_SECONDS)


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection would take the message elsewhere."""

    def redirect_request(self, *_arguments: Any) -> None:
        return None


def by_webhook(url: str, form: str) -> Send:
    """Post messages to a URL, of which only the host is ever named."""
    where = urlsplit(url).hostname or "?"

    def send(message: Message) -> None:
        kind, body = "application/json", json.dumps(message.document)
        if form == "slack":
            body = json.dumps({"text": message.text})
        elif form == "text":
            kind, body = "text/plain; charset=utf-8", message.text
        headers = {"Content-Type": kind, "User-Agent": "forge-alerts", "Idempotency-Key": message.id}
        try:
            # Preflight has seen that it is no other scheme than http and https.
            request = urllib.request.Request(url, body.encode(), headers, method="POST")  # noqa: S310
            # Anew, since it trusts what the host trusted when it was made.
            with urllib.request.build_opener(_Stay).open(request, timeout=WEBHOOK_SECONDS):
                pass
        except HTTPError as error:
            wanted = error.headers.get("Retry-After", "")
            error.close()
            pause = min(float(wanted), LONGEST_PAUSE) if wanted.isdigit() else 0.0
            raise Undelivered(f"{where} answers {error.code}", pause) from None
        except URLError as error:
            raise Undelivered(f"{where}: {error.reason}") from None
        except (OSError, HTTPException, ValueError) as error:
            # Their own words may quote the URL.
            raise Undelivered(f"{where}: {type(error).__name__}") from None

    return send


def by_mail(settings: Mapping[str, Any], password: str) -> Send:
    """Send messages through a mail server."""
    server, port, security = settings["server"], settings["port"], settings["security"]
    name = os.uname().nodename

    @contextmanager
    def connected() -> Iterator[smtplib.SMTP]:
        trust = ssl.create_default_context()
        if security == "tls":
            with smtplib.SMTP_SSL(server, port, name, timeout=MAIL_SECONDS, context=trust) as smtp:
                yield smtp
            return
        with smtplib.SMTP(server, port, name, timeout=MAIL_SECONDS) as smtp:
            if security == "starttls":
                smtp.starttls(context=trust)
            yield smtp

    def send(message: Message) -> None:
        mail = EmailMessage()
        mail["Subject"] = message.subject
        mail["From"] = settings["from"]
        mail["To"] = ", ".join(settings["to"])
        mail["Date"] = datetime.now(UTC)
        mail["Message-ID"] = f"<{message.id}@{settings['from'].rpartition('@')[2]}>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content(message.text)
        try:
            with connected() as smtp:
                if settings["user"]:
                    smtp.login(settings["user"], password)
                refused = smtp.send_message(mail)
        except smtplib.SMTPAuthenticationError as error:
            # What the server says may quote what it was told.
            raise Undelivered(f"{server} refuses the user or its password ({error.smtp_code})") from None
        except (OSError, smtplib.SMTPException) as error:
            raise Undelivered(f"{server}: {error}") from None
        if refused:
            say(f"mail: {server} does not take it for {', '.join(refused)}", priority=4)

    return send


def channels(config: Mapping[str, Any], secrets: Mapping[str, str]) -> dict[str, Send]:
    """The channels of a configuration, by name."""
    found: dict[str, Send] = {}
    if command := config.get("command"):
        found["command"] = by_command(command["argv"])
    if webhook := config.get("webhook"):
        found["webhook"] = by_webhook(secrets["webhook_url"], webhook["format"])
    if mail := config.get("mail"):
        found["mail"] = by_mail(mail, secrets.get("mail_password", ""))
    return found


def follow(config: Mapping[str, Any], folder: Path) -> int:
    """Run every channel until SIGTERM."""
    secrets = {name: (folder / name).read_text() for name in SEALED if (folder / name).exists()}
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    host = os.uname().nodename
    threads, broken = [], threading.Event()
    for name, send in channels(config, secrets).items():
        channel = Channel(
            name,
            send,
            stop,
            Bucket(config["messages_per_hour"]),
            STATE / f"{name}.json",
            host,
            config["repeat_minutes"] * 60,
        )
        threads.append(threading.Thread(target=_guarded, args=(channel, stop, broken), name=name))
    # Of a channel that is no more, nothing is in trouble.
    for path in STATE.glob("*.json"):
        if path.stem not in [thread.name for thread in threads]:
            path.unlink()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return int(broken.is_set())


def _guarded(channel: Channel, stop: Stop, broken: threading.Event) -> None:
    """A channel that breaks ends the unit, which systemd starts anew: nobody would notice that one of them is gone."""
    try:
        channel.run()
    except Exception as error:  # noqa: BLE001  # whatever it is: told, and begun anew
        broken.set()
        stop.set()
        say(f"{channel.name}: {error!r}", priority=3)


@dataclass(frozen=True)
class Sealer:
    """systemd-creds, and where it puts things."""

    folder: Path = CREDENTIALS
    run: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run

    def seal(self, values: Mapping[str, str], *, dry_run: bool) -> list[str]:
        """Seal values, and remove what is empty; the names of what changes."""
        changed = [name for name in SEALED if self._opened(name) != values.get(name, "")]
        if dry_run or not changed:
            return changed
        self.folder.mkdir(mode=0o700, exist_ok=True)
        # Never `auto`, which leaves the host's own key out while /var is in memory.
        tpm = self.run(["systemd-creds", "has-tpm2", "--quiet"], capture_output=True, check=False)
        keys = [*(["host+tpm2"] if tpm.returncode == 0 else []), "host"]
        for name in changed:
            path = self._path(name)
            if not values.get(name):
                path.unlink()
                continue
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(self._sealed(name, values[name], keys))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        return changed

    def _path(self, name: str) -> Path:
        return self.folder / f"forge-alerts.{name}"

    def _opened(self, name: str) -> str:
        if not self._path(name).exists():
            return ""
        call = ["systemd-creds", "decrypt", f"--name={name}", str(self._path(name)), "-"]
        opened = self.run(call, capture_output=True, check=False)
        # What can't be opened any more is to be sealed anew.
        return opened.stdout.decode(errors="replace") if opened.returncode == 0 else "\0"

    def _sealed(self, name: str, value: str, keys: Sequence[str]) -> bytes:
        words = ""
        for key in keys:
            call = ["systemd-creds", "encrypt", f"--with-key={key}", "--tpm2-pcrs=", f"--name={name}", "-", "-"]
            done = self.run(call, input=value.encode(), capture_output=True, check=False)
            if done.returncode == 0:
                return done.stdout
            words = " ".join(done.stderr.decode(errors="replace").split())
        raise SystemExit(f"forge-alerts: systemd-creds does not seal {name}: {words}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="forge-alerts", description="Deliver the alert lines of the journal.")
    commands = parser.add_subparsers(dest="action")
    seal = commands.add_parser("seal", help="seal what only the receivers may know")
    seal.add_argument("--dry-run", action="store_true", help="only say what would change")
    arguments = parser.parse_args()
    if arguments.action == "seal":
        changed = Sealer().seal(json.loads(sys.stdin.read()), dry_run=arguments.dry_run)
        print("\n".join(changed))
        return 0
    return follow(tomllib.loads(CONFIG.read_text()), Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")))


if __name__ == "__main__":
    sys.exit(main())
