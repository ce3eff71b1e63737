"""The program that delivers alerts: none is lost, few are told twice, and a flood or a dead receiver stays bounded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forge_alerts
import pytest
from forge_alerts import (
    SHOWN,
    SHOWN_OF_ONE,
    UNITS,
    Batch,
    Bucket,
    Channel,
    Journal,
    Line,
    Message,
    Sealer,
    State,
    Stop,
    Undelivered,
    by_command,
    by_webhook,
    compose,
    identity,
    parse,
)

PATIENCE = 20.0
ROTATE = "forge-rotate@inbox.service"
# Put together here, so that no file of the repository holds anything of the shape of a secret.
HOOK = "/services/" + "T0" * 6

# journalctl, as far as it is asked here: entries of a file from a cursor on, then those that come. As its manual has
# it, without --all no field of more than 4096 bytes is printed.
JOURNALCTL = """
import json, os, re, sys, time
path, options = sys.argv[1], sys.argv[2:]
cursor = next((each.partition("=")[2] for each in options if each.startswith("--cursor=")), None)
follow = "--follow" in options
file = open(path)
lines = file.readlines()
if not follow:
    print(lines[-1] if lines else "", end="")
    sys.exit()
open(path + ".pid", "w").write(str(os.getpid()))
known = [json.loads(line)["__CURSOR"] for line in lines]
# Where it is gone, what came after it comes.
begin = known.index(cursor) if cursor in known else 0 if cursor else len(lines)
pattern = next((each.partition("=")[2] for each in options if each.startswith("--grep=")), "")
def show(line):
    entry = json.loads(line)
    if not re.search(pattern, str(entry["MESSAGE"])):
        return
    if len(str(entry["MESSAGE"])) > 4096 and "--all" not in options:
        entry["MESSAGE"] = None
    print(json.dumps(entry), flush=True)
for line in lines[begin:]:
    show(line)
while True:
    line = file.readline()
    show(line) if line else time.sleep(0.01)
"""


def entry(number: int, message: Any, unit: str = "forge-rotate@inbox.service", uid: str = "0") -> dict[str, Any]:
    """An entry of the journal, as JSON has it."""
    return {
        "__CURSOR": f"s=aa;i={number:x};b=bb;m={number:x};t={number:x};x={number:x}",
        "__REALTIME_TIMESTAMP": str(1_800_000_000_000_000 + number),
        "MESSAGE": message,
        "_SYSTEMD_UNIT": unit,
        "_UID": uid,
    }


@dataclass
class Fake:
    """A journal in a file, and a receiver that takes what it is told to."""

    folder: Path
    messages: list[Message] = field(default_factory=list)
    refusals: int = 0
    tried: int = 0
    number: int = 0

    @property
    def path(self) -> Path:
        return self.folder / "journal"

    @property
    def program(self) -> list[str]:
        return [sys.executable, "-c", JOURNALCTL, str(self.path)]

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return found

    def write(self, *messages: str, unit: str = "forge-rotate@inbox.service", uid: str = "0") -> None:
        """Have something said."""
        with self.path.open("a") as file:
            for message in messages:
                self.number += 1
                file.write(json.dumps(entry(self.number, message, unit, uid)) + "\n")

    def send(self, message: Message) -> None:
        """Take a message, or refuse it."""
        self.tried += 1
        if self.refusals:
            self.refusals -= 1
            raise Undelivered("it is away")
        self.messages.append(message)

    def kill(self) -> None:
        """End the journalctl that follows it."""
        process = self.path.with_name("journal.pid")
        until(lambda: process.exists() and process.read_text())
        os.kill(int(process.read_text()), signal.SIGKILL)

    def texts(self) -> list[str]:
        """All lines that arrived."""
        return [each["text"] for message in self.messages for each in message.document["alerts"]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for seconds."""
    monkeypatch.setattr(forge_alerts, "GATHER_SECONDS", 0.05)
    monkeypatch.setattr(forge_alerts, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(forge_alerts, "SETTLED_SECONDS", 0.2)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """A journal with history in it."""
    fake = Fake(tmp_path)
    fake.write("ALERT inbox: long ago", "something else")
    return fake


class Running:
    """A channel in a thread of its own, as the program has it."""

    def __init__(self, fake: Fake, *, repeat: float = 3600, per_hour: float = 1e6, **options: Any) -> None:
        self.stop = Stop()
        self.channel = Channel(
            "webhook",
            fake.send,
            self.stop,
            Bucket(per_hour),
            fake.folder / "state.json",
            "vm1",
            repeat,
            program=fake.program,
            **options,
        )
        self.thread = threading.Thread(target=self.channel.run)

    def __enter__(self) -> Channel:
        self.thread.start()
        until(self.channel.path.exists)
        return self.channel

    def __exit__(self, *_error: object) -> None:
        self.stop.set()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_comes_is_told_and_what_was_is_not(fake: Fake) -> None:
    with Running(fake):
        fake.write("not an alert", "ALERT inbox: Vault is sealed", "an ALERT host: in the middle")
        until(lambda: fake.messages)
        fake.write("ALERT host: a reboot is due")
        until(lambda: len(fake.messages) == 2)
    assert fake.texts() == ["Vault is sealed", "a reboot is due"]
    first = fake.messages[0]
    assert first.subject == "[vm1] ALERT inbox: Vault is sealed"
    assert (first.document["schema"], first.document["host"], first.document["id"]) == (1, "vm1", first.id)
    assert first.document["alerts"][0]["unit"] == "forge-rotate@inbox.service"


def test_nothing_is_lost_or_doubled_over_a_restart(fake: Fake) -> None:
    with Running(fake):
        fake.write("ALERT inbox: one")
        until(lambda: fake.state["delivered"])
    fake.write("ALERT inbox: two")
    with Running(fake):
        until(lambda: len(fake.messages) == 2)
    with Running(fake):
        fake.write("ALERT inbox: three")
        until(lambda: len(fake.messages) == 3)
    assert fake.texts() == ["one", "two", "three"]


def test_a_crash_before_the_receiver_took_it_tells_it_again(fake: Fake) -> None:
    fake.refusals = 10**6
    with Running(fake):
        fake.write("ALERT inbox: one")
        until(lambda: fake.tried > 1)
    fake.refusals = 0
    with Running(fake):
        until(lambda: fake.messages)
    assert fake.texts() == ["one"]
    assert fake.state["failing"] is None


def test_a_cursor_whose_entry_is_gone_skips_nothing(fake: Fake) -> None:
    with Running(fake):
        fake.write("ALERT inbox: one")
        until(lambda: fake.state["delivered"])
    fake.path.write_text("")
    fake.write("ALERT inbox: two")
    with Running(fake):
        until(lambda: len(fake.messages) == 2)
    assert fake.texts() == ["one", "two"]


def test_an_entry_that_journald_has_moved_is_the_same() -> None:
    """From /run to the disk, where it gets another number."""
    assert identity("s=1;i=2;b=3;m=4;t=5;x=6") == identity("s=9;i=8;b=3;m=4;t=5;x=6")
    assert identity("s=1;i=2;b=3;m=4;t=5;x=6") != identity("s=1;i=2;b=3;m=4;t=5;x=7")


def test_failure_is_seen_told_once_and_over(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refusals = 6
    with Running(fake):
        fake.write("ALERT inbox: one")
        until(lambda: fake.tried > 4)
        failing = fake.state["failing"]
        until(lambda: fake.messages)
        until(lambda: fake.state["failing"] is None)
    assert (failing["error"], failing["attempts"] > 0, failing["since"] > 0) == ("it is away", True, True)
    said = capsys.readouterr().err
    assert said.count("<3>ALERT host: alerts are not delivered by webhook since") == 1
    assert "delivered at attempt 7" in said
    assert fake.texts() == ["one"]


def test_what_comes_while_it_fails_follows(fake: Fake) -> None:
    fake.refusals = 5
    with Running(fake):
        fake.write("ALERT inbox: one")
        until(lambda: fake.tried)
        fake.write("ALERT inbox: two", "ALERT host: three")
        until(lambda: len(fake.texts()) == 3)
    assert fake.texts() == ["one", "two", "three"]


def test_a_line_again_and_again_is_told_with_its_number(fake: Fake) -> None:
    with Running(fake, repeat=1.0):
        fake.write("ALERT inbox: Vault is sealed")
        until(lambda: fake.messages)
        for _ in range(3):
            fake.write("ALERT inbox: Vault is sealed")
        fake.write("ALERT inbox: another matter")
        until(lambda: len(fake.messages) == 2)
        assert fake.texts() == ["Vault is sealed", "another matter"]
        until(lambda: len(fake.messages) == 3)
    (again,) = fake.messages[2].document["alerts"]
    assert (again["text"], again["times"]) == ("Vault is sealed", 3)
    assert "3 times since" in fake.messages[2].text
    assert fake.state["held"] == {}


def test_what_is_held_back_outlives_a_restart(fake: Fake) -> None:
    with Running(fake, repeat=3600):
        fake.write("ALERT inbox: sealed")
        until(lambda: fake.messages)
        fake.write("ALERT inbox: sealed", "ALERT inbox: sealed")
        until(lambda: [each["times"] for each in fake.state["held"].values()] == [2])
    with Running(fake, repeat=0.2):
        until(lambda: len(fake.messages) == 2)
    assert fake.messages[1].document["alerts"][0]["times"] == 2


def test_a_crash_counts_nothing_twice(fake: Fake) -> None:
    """What is held back with a message that fails is held once that is through, and not before."""
    with Running(fake):
        fake.write("ALERT inbox: sealed")
        until(lambda: fake.messages)
    fake.refusals = 10**6
    fake.write("ALERT inbox: sealed", "ALERT host: other")
    for _ in range(2):
        with Running(fake):
            before = fake.tried
            until(lambda before=before: fake.tried > before + 1)  # type: ignore[misc]
    assert fake.state["held"] == {}
    fake.refusals = 0
    with Running(fake):
        until(lambda: len(fake.messages) == 2)
    assert [each["times"] for each in fake.state["held"].values()] == [1]


def test_a_flood_is_summed_up_and_hides_nobody(fake: Fake) -> None:
    with Running(fake, per_hour=3600):
        fake.write(*(f"ALERT inbox: number {each}" for each in range(2000)), unit="inbox@blue.service")
        fake.write("ALERT host: the other", "ALERT inbox: last", unit="forge-reboot.service")
        until(lambda: "last" in fake.texts())
    assert len(fake.messages) <= 10
    assert "the other" in fake.texts()
    told = sum(each["times"] for message in fake.messages for each in message.document["alerts"])
    summed = sum(message.document["more"].get("inbox@blue.service", 0) for message in fake.messages)
    assert told + summed == 2002
    assert f"and {fake.messages[0].document['more']['inbox@blue.service']} more of inbox@blue.service" in (
        fake.messages[0].text
    )


def test_messages_are_so_many_an_hour() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    sent = []
    while now[0] < 600:
        if bucket.wait() == 0:
            bucket.take()
            sent.append(now[0])
        now[0] += 1
    assert sent[:5] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(sent) <= 5 + 600 / 60


def test_a_batch_is_bounded_whatever_comes() -> None:
    batch = Batch()
    for each in range(5000):
        batch.add(Line("inbox", f"text {each}", f"unit-{each % 100}", float(each), "c", str(each)))
    assert len(batch.items) == SHOWN
    assert max(sum(item.unit == unit for item in batch.items.values()) for unit in batch.more) <= SHOWN_OF_ONE
    assert len(batch.more) <= UNITS + 1
    assert batch.count == 5000
    assert len(compose("vm1", batch, 0.0).text) < 10_000


def test_state_stays_bounded(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge_alerts, "REMEMBERED", 4)
    with Running(fake):
        for each in range(10):
            fake.write(f"ALERT inbox: number {each}")
            until(lambda each=each: len(fake.messages) == each + 1)  # type: ignore[misc]
        until(lambda: fake.state["delivered"]["alerts"] and len(fake.state["sent"]) == 4)


def test_damaged_state_begins_anew(fake: Fake) -> None:
    (fake.folder / "state.json").write_text('{"cursor": 5')
    with Running(fake) as channel:
        until(lambda: State.load(channel.path).cursor)
        fake.write("ALERT inbox: one")
        until(lambda: fake.messages)
    assert fake.texts() == ["one"]


def test_journalctl_that_ends_is_begun_again(fake: Fake) -> None:
    with Running(fake) as channel:
        fake.write("ALERT inbox: one")
        until(lambda: fake.messages)
        fake.kill()
        fake.write("ALERT inbox: two")
        until(lambda: len(fake.messages) == 2)
    assert channel.state.cursor.startswith("s=aa")


def test_a_journal_that_can_not_be_read_is_seen(fake: Fake) -> None:
    """By doctor, as a receiver that fails is; and it is over when it is."""
    with Running(fake) as channel:
        channel.program = ["/bin/sh", "-c", "exit 3"]
        fake.kill()
        until(lambda: (fake.state["failing"] or {}).get("attempts", 0) >= 2)
        assert fake.state["failing"]["error"] == "journalctl ended with 3"
        channel.program = fake.program
        until(lambda: fake.state["failing"] is None)
        fake.write("ALERT inbox: one")
        until(lambda: fake.messages)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (entry(1, "ALERT inbox: one\ntwo\x1b[31m"), ("inbox", "one two [31m")),
        (entry(1, list("ALERT inbox: caf\xe9".encode("latin-1"))), ("inbox", "caf\ufffd")),
        (entry(1, "ALERT inbox: x", "inbox@blue.service", "997"), ("inbox", "x [said by inbox@blue.service]")),
        (entry(1, "ALERT inbox: " + "x" * 5000), ("inbox", "x" * 1000)),
        (entry(1, "an ALERT inbox: x"), None),
        (entry(1, "ALERT inbox"), None),
        (entry(1, None), ("host", f"an alert of more than 4 KiB by {ROTATE}: see the journal")),
        ({"MESSAGE": "ALERT inbox: x"}, None),
        ([], None),
    ],
)
def test_lines(found: Any, expected: tuple[str, str] | None) -> None:
    line = parse(json.dumps(found).encode())
    assert (line and (line.subject, line.text)) == expected


def test_a_test_is_known_when_it_has_arrived(fake: Fake) -> None:
    with Running(fake):
        fake.write("ALERT host: test 0a1b2c3d of the alerts: nothing is to be done")
        until(lambda: fake.state["test"] == "0a1b2c3d")


def test_an_entry_of_any_size_takes_no_memory() -> None:
    """An app may write what would fill the memory of whoever tells of it, again and again."""
    entry = {"MESSAGE": "ALERT inbox: it is down", "__CURSOR": "b=1;m=2", "__REALTIME_TIMESTAMP": "1000000"}
    program = f"""
import sys
sys.stdout.write('{{"MESSAGE":"ALERT x: ')
for _ in range(64):
    sys.stdout.write("x" * 1024 * 1024)
print('"}}')
print({json.dumps(json.dumps(entry))}, flush=True)
sys.stdin.read()
"""
    tracemalloc.start()
    try:
        with Journal("", Stop(), [sys.executable, "-c", program]) as journal:
            found = journal.read(PATIENCE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None
    assert found.text == "it is down"
    assert peak < 8 * 1024 * 1024


def test_what_is_left_of_a_line_that_is_too_long_is_none() -> None:
    """Wherever a block ends: what an app wrote does not become an entry that journald never had."""
    forged, real = json.dumps(entry(1, "ALERT host: forged")), json.dumps(entry(2, "ALERT host: real"))
    program = f"""
import sys, time
sys.stdout.write("x" * {forge_alerts.ENTRY_BYTES + 1})
sys.stdout.flush()
time.sleep(0.3)
sys.stdout.write({forged!r})
sys.stdout.flush()
time.sleep(0.3)
print()
print({real!r}, flush=True)
sys.stdin.read()
"""
    with Journal("", Stop(), [sys.executable, "-c", program]) as journal:
        found = journal.read(PATIENCE)
    assert found is not None
    assert found.text == "real"


def test_giant_entries_are_passed_and_told(fake: Fake) -> None:
    """Of an alert that is too long it is told whose it is; no other is lost, and a restart does not read it again."""
    with Running(fake):
        fake.write("ALERT inbox: one")
        until(lambda: fake.messages)
        fake.write("x" * 10**7, "ALERT inbox: " + "x" * 10**7, unit="inbox@blue.service", uid="997")
        fake.write("ALERT inbox: two")
        until(lambda: "two" in fake.texts())
    long = "an alert of more than 4 KiB by inbox@blue.service: see the journal [said by inbox@blue.service]"
    assert fake.texts() == ["one", long, "two"]
    with Running(fake):
        fake.write("ALERT inbox: three")
        until(lambda: "three" in fake.texts())
    assert fake.texts() == ["one", long, "two", "three"]


def test_waiting_ends_at_once(fake: Fake) -> None:
    stop = Stop()
    with Journal("", stop, fake.program) as journal:
        threading.Timer(0.1, stop.set).start()
        assert journal.read(PATIENCE * 10) is None


# -- receivers ---------------------------------------------------------------------------------------------------------


def message(text: str = "Vault is sealed") -> Message:
    """A message of one line."""
    batch = Batch()
    batch.add(Line("inbox", text, "unit", 1.8e9, "c", "identity"))
    return compose("vm1", batch, 1.8e9)


def test_ids_are_those_of_the_lines() -> None:
    assert message().id == message().id
    other = Batch()
    other.add(Line("inbox", "Vault is sealed", "unit", 1.8e9, "c", "another"))
    assert compose("vm1", other, 1.8e9).id != message().id


@dataclass
class Hook:
    """A server that takes what is posted."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def hook() -> Iterator[Hook]:
    """One on a port of its own."""
    found = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.got.append((self.path, dict(self.headers), body))
            status, headers = found.answers.pop(0) if found.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}{HOOK}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def test_webhook_gets_all_there_is(hook: Hook) -> None:
    by_webhook(hook.url, "json")(message())
    (path, headers, body) = hook.got[0]
    assert (path, headers["Content-Type"]) == (HOOK, "application/json")
    assert headers["Idempotency-Key"] == message().id
    assert json.loads(body) == message().document


def test_webhook_in_the_form_of_others(hook: Hook) -> None:
    by_webhook(hook.url, "slack")(message())
    by_webhook(hook.url, "text")(message("ünïcode"))
    assert json.loads(hook.got[0][2]) == {"text": message().text}
    assert hook.got[1][2].decode() == message("ünïcode").text


@pytest.mark.parametrize(
    ("status", "headers", "pause"),
    [
        (500, {}, 0),
        (404, {}, 0),
        (302, {"Location": "http://127.0.0.1:1/elsewhere"}, 0),
        (429, {"Retry-After": "7"}, 7),
        (503, {"Retry-After": "86400"}, 300),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0),
    ],
)
def test_webhook_that_does_not_take_it(hook: Hook, status: int, headers: dict[str, str], pause: float) -> None:
    """It says so without the URL, follows nobody elsewhere, and waits as long as it is asked to, within bounds."""
    hook.answers = [(status, headers)]
    with pytest.raises(Undelivered) as found:
        by_webhook(hook.url, "json")(message())
    assert (str(found.value), found.value.pause) == (f"127.0.0.1 answers {status}", pause)
    assert len(hook.got) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://nothing.invalid", "http://127.0.0.1:port"])
def test_webhook_that_is_not_there(url: str) -> None:
    with pytest.raises(Undelivered) as found:
        by_webhook(url + HOOK, "json")(message())
    assert HOOK not in str(found.value)
    assert str(found.value).startswith(("127.0.0.1: ", "nothing.invalid: "))


def test_command_gets_text_and_environment(tmp_path: Path) -> None:
    script = tmp_path / "page"
    script.write_text(
        f'#!/bin/sh\ncat > {tmp_path}/text\nprintf %s "$1|$FORGE_ALERT_SUBJECT" > {tmp_path}/line\n'
        f'printf %s "$FORGE_ALERT_JSON" > {tmp_path}/json\n'
    )
    script.chmod(0o755)
    by_command([str(script), "on-call"])(message("$(id) `id` 'x'"))
    assert (tmp_path / "text").read_text() == message("$(id) `id` 'x'").text
    assert (tmp_path / "line").read_text() == "on-call|[vm1] ALERT inbox: $(id) `id` 'x'"
    assert json.loads((tmp_path / "json").read_text()) == message("$(id) `id` 'x'").document


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/bin/sh", "-c", "echo first >&2; echo no pager >&2; exit 3"], "/bin/sh ended with 3 no pager"),
        (["/nowhere/page"], "/nowhere/page: No such file or directory"),
        (["/bin/sleep", "60"], "/bin/sleep took more than 0.3 s"),
        # Who leaves somebody behind that holds on to its output.
        (["/bin/sh", "-c", "sleep 60 & exit 4"], "/bin/sh took more than 0.3 s"),
    ],
)
def test_command_that_fails(command: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge_alerts, "COMMAND_SECONDS", 0.3)
    with pytest.raises(Undelivered, match=f"^{why}$"):
        by_command(command)(message())


def test_command_that_reads_nothing_of_a_long_text() -> None:
    by_command(["/bin/true"])(message("x" * 1000))


def test_command_that_says_too_much() -> None:
    """The end of it is kept, and no more."""
    tracemalloc.start()
    try:
        with pytest.raises(Undelivered, match=r"^/bin/sh ended with 3 no pager$"):
            by_command(["/bin/sh", "-c", "head -c 67108864 /dev/zero >&2; echo >&2; echo no pager >&2; exit 3"])(
                message()
            )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1024 * 1024


def test_command_that_never_stops_talking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge_alerts, "COMMAND_SECONDS", 0.3)
    with pytest.raises(Undelivered, match=r"^/bin/sh took more than 0.3 s$"):
        by_command(["/bin/sh", "-c", "exec yes >&2"])(message())


# -- sealing -----------------------------------------------------------------------------------------------------------


@dataclass
class Creds:
    """systemd-creds, as far as it is asked here; it seals by turning text around."""

    asked: list[list[str]] = field(default_factory=list)

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        self.asked.append(command)
        if command[1] == "has-tpm2":
            return subprocess.CompletedProcess(command, 1, b"", b"")
        if command[1] == "encrypt":
            return subprocess.CompletedProcess(command, 0, options["input"][::-1], b"")
        return subprocess.CompletedProcess(command, 0, Path(command[-2]).read_bytes()[::-1], b"")


def test_sealing_changes_what_has_changed(tmp_path: Path) -> None:
    creds = Creds()
    sealer = Sealer(tmp_path / "credstore", creds.run)
    values = {"webhook_url": "https://x/" + HOOK, "mail_password": ""}
    assert sealer.seal(values, dry_run=True) == ["webhook_url"]
    assert not sealer.folder.exists()
    assert sealer.seal(values, dry_run=False) == ["webhook_url"]
    assert sealer.seal(values, dry_run=False) == []
    (file,) = sealer.folder.iterdir()
    assert (file.name, file.stat().st_mode & 0o777) == ("forge-alerts.webhook_url", 0o600)
    assert HOOK not in " ".join(word for command in creds.asked for word in command)
    assert sealer.seal({"webhook_url": ""}, dry_run=False) == ["webhook_url"]
    assert list(sealer.folder.iterdir()) == []


def test_state_that_is_saved_is_loaded(tmp_path: Path) -> None:
    batch = Batch()
    batch.hold(Line("inbox", "text", "unit", 1.0, "c", "i"))
    state = State("cursor", {"key": 1.0}, dict(batch.held), {"at": 1.0}, None, "0a")
    state.save(tmp_path / "state.json")
    assert State.load(tmp_path / "state.json") == state
