"""logs/: what a host has really logged, put together; captured/ has it, and a stand-in for journalctl reads it."""

import json
import os
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import describe
from forgectl import config
from forgectl.config import App
from forgectl.errors import ForgeError
from forgectl.layout import Layout
from forgectl.logs import follow as following
from forgectl.logs import journal, overview, trace
from forgectl.logs.lines import Lines

CAPTURED = Path(__file__).parent / "captured"
DATABASE = """
[database]
placement = "local"
name = "inbox"
url = "postgresql+asyncpg://inbox_app@/inbox"
app_role = "inbox_app"
"""


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The journal that the stand-in reads."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "journalctl"
    program.write_text(f"#!{sys.executable}\n" + (Path(__file__).parent / "fake_journalctl.py").read_text())
    program.chmod(0o755)
    captured = tmp_path / "journal.jsonl"
    captured.write_bytes((CAPTURED / "journal.jsonl").read_bytes())
    monkeypatch.setenv("CAPTURED", str(captured))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return captured


@pytest.fixture
def app(layout: Layout, journalctl: Path) -> App:
    """The app whose logs were captured."""
    assert journalctl.exists()
    layout.access_log.parent.mkdir(parents=True)
    layout.access_log.write_bytes((CAPTURED / "nginx.json").read_bytes())
    return config.decode((describe() + DATABASE).encode(), Path("inbox.toml"))


def lines() -> list[dict[str, Any]]:
    """What Nginx logged."""
    return [json.loads(line) for line in (CAPTURED / "nginx.json").read_text().splitlines()]


def request(status: int, method: str = "GET") -> dict[str, Any]:
    """The first request that ended so."""
    return next(line for line in lines() if (line["status"], line["method"]) == (status, method))


def traced(layout: Layout, app: App, request_id: str) -> trace.Trace:
    """Follow a request."""
    found = trace.of([(layout, app)], request_id, time.time(), None)
    assert found is not None
    assert [event.at for event in found.events] == sorted(event.at for event in found.events)
    return found


def by_source(found: trace.Trace) -> dict[str, list[trace.Event]]:
    """Its events."""
    return {
        source: [event for event in found.events if event.source == source]
        for source in {event.source for event in found.events}
    }


def test_a_request_that_stored_something(layout: Layout, app: App) -> None:
    """Its own statements of its own connection, and no line of the requests beside it."""
    found = traced(layout, app, request(201, "POST")["request_id"])
    sources = by_source(found)
    assert set(sources) == {"nginx", "app", "postgresql"}
    assert all(event.surely for event in found.events)
    assert all("INSERT" in event.text or "SELECT" not in event.text for event in sources["postgresql"])
    assert any("INSERT INTO event" in event.text + event.detail for event in sources["postgresql"])
    (said,) = sources["app"]
    assert "status=201" in said.text
    assert found.missing == []
    text = list(trace.text(found))
    assert text[0].startswith("inbox  POST /v1/events  201 in 0.0")
    assert not any(line.startswith("?") for line in text)


def test_a_request_that_the_app_failed(layout: Layout, app: App) -> None:
    """The traceback is there."""
    found = traced(layout, app, request(500)["request_id"])
    (error,) = [event for event in found.events if event.level == "ERROR"]
    assert error.detail.rstrip().splitlines()[-1] == "LookupError: a slip of the pen"
    assert any("LookupError: a slip of the pen" in line for line in trace.text(found))


def test_a_request_that_nginx_answered(layout: Layout, app: App) -> None:
    """Its own error, of the same connection."""
    found = traced(layout, app, request(502)["request_id"])
    (error,) = [event for event in found.events if event.level == "ERROR"]
    assert error.surely
    assert "connect() to unix:/run/inbox/live.sock failed" in error.text
    assert "by Nginx" not in next(trace.text(found))


def test_what_made_nginx_give_up(layout: Layout, app: App, journalctl: Path) -> None:
    """The app and its database go on, so the statement is logged when it ends, long after Nginx's answer."""
    wanted = request(502)
    at, pid = wanted["at"], 4711
    given_up = {**wanted, "status": 504, "request_time": 25.0, "upstream_status": "504"}
    layout.access_log.write_text(json.dumps(given_up, separators=(",", ":")) + "\n")

    def entry(seconds: float, message: str, **fields: str) -> str:
        return json.dumps({"MESSAGE": message, "__REALTIME_TIMESTAMP": str(int((at + seconds) * 1e6)), **fields}) + "\n"

    said = json.dumps(
        {"level": "INFO", "message": "request", "request_id": wanted["request_id"], "database_pids": [pid]}
    )
    slow = "inbox_app@inbox LOG:  duration: 30000.100 ms  execute <unnamed>: SELECT pg_sleep(30)"
    with journalctl.open("a") as journal_file:
        journal_file.write(entry(5.1, said, _SYSTEMD_UNIT="inbox@blue.service", _PID="17"))
        journal_file.write(entry(5.2, slow, SYSLOG_IDENTIFIER="postgres", _PID=str(pid)))
    (statement,) = by_source(traced(layout, app, wanted["request_id"]))["postgresql"]
    assert "duration: 30000.100 ms" in statement.text


def test_an_older_line_without_a_connection(layout: Layout, app: App) -> None:
    """As from before it was logged: the error may be another's."""
    old = {name: value for name, value in request(502).items() if name not in ("at", "connection", "stream")}
    layout.access_log.write_text(json.dumps(old, separators=(",", ":")) + "\n")
    (error,) = [event for event in traced(layout, app, old["request_id"]).events if event.level == "ERROR"]
    assert not error.surely


def test_an_app_that_names_neither_request_nor_process(layout: Layout, app: App, journalctl: Path) -> None:
    """What it and its database said meanwhile may be another request's, and is marked."""
    wanted = request(201, "POST")
    entries = [json.loads(line) for line in journalctl.read_text().splitlines()]
    for entry in entries:
        if str(entry["MESSAGE"]).startswith("{"):
            said = json.loads(entry["MESSAGE"])
            entry["MESSAGE"] = f"INFO {said['message']} {said.get('path', '')} {said.get('status', '')}"
    journalctl.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = traced(layout, app, wanted["request_id"])
    sources = by_source(found)
    assert [event.surely for event in sources["nginx"]] == [True, True]
    assert sources["app"]
    assert not any(event.surely for event in [*sources["app"], *sources["postgresql"]])
    assert len(found.missing) == 2
    assert "logs no line with this id" in found.missing[0]
    assert any(line.startswith("? ") for line in trace.text(found))


def test_a_request_that_nginx_has_forgotten(layout: Layout, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal may reach further back."""
    wanted = request(201, "POST")
    layout.access_log.unlink()
    monkeypatch.setattr(trace, "WITHOUT_NGINX_SECONDS", time.time())
    found = traced(layout, app, wanted["request_id"])
    assert (found.request, [event.source for event in found.events]) == (None, ["app"])
    assert "do not know it" in found.missing[0]
    assert trace.of([(layout, app)], "0" * 32, time.time(), None) is None


def test_a_database_that_is_elsewhere(layout: Layout, app: App) -> None:
    """Its log is as well."""
    assert app.database is not None
    away = msgspec.structs.replace(app, database=msgspec.structs.replace(app.database, placement="external"))
    found = traced(layout, away, request(201, "POST")["request_id"])
    assert "postgresql" not in by_source(found)
    assert found.missing == ["the app's database is elsewhere, and so is its log"]


def test_errors_are_counted_by_kind(layout: Layout, app: App) -> None:
    """Of all three, the most frequent first, with a request to follow."""
    began = min(line["at"] for line in lines()) - 1
    found = overview.of(layout, app, began, 10)
    assert found.requests == len(lines())
    assert found.statuses["500"] == sum(line["status"] == 500 for line in lines())
    kinds = {group.what: group for group in found.errors}
    assert kinds["500 GET /v1/events"].request_id in {line["request_id"] for line in lines() if line["status"] == 500}
    assert kinds["502 by Nginx GET /v1/events"].source == "nginx"
    assert kinds["unhandled error: LookupError: a slip of the pen"].count == found.statuses["500"]
    assert any(group.source == "postgresql" and group.what.startswith("ERROR: relation") for group in found.errors)
    assert [group.count for group in found.errors] == sorted((group.count for group in found.errors), reverse=True)
    assert len(overview.of(layout, app, began, 2).errors) == 2
    text = "\n".join(overview.text("inbox", found, slowest=True, errors=True))
    assert "LookupError" in text
    assert not list(overview.of(layout, app, time.time(), 5).errors)


def test_made_up_paths_make_no_end_of_groups(layout: Layout, app: App) -> None:
    """Whoever looks for holes."""
    wanted = request(502)
    number = 3 * overview.MOST_GROUPS
    paths = (f"/{'abcdefghij'[each % 10]}{chr(97 + each // 10 % 26)}{chr(97 + each // 260)}" for each in range(number))
    layout.access_log.write_text("".join(json.dumps(wanted | {"path": path}) + "\n" for path in paths))
    found = overview.of(layout, app, wanted["at"] - 1, number)
    nginx = [group for group in found.errors if group.source == "nginx"]
    assert len(nginx) == overview.MOST_GROUPS + 1
    assert sum(group.count for group in nginx) == number


def test_alerts_are_those_of_the_apps_and_of_the_host(app: App, journalctl: Path) -> None:
    """Each once, with how often."""
    entry = json.loads(journalctl.read_text().splitlines()[0]) | {"PRIORITY": "3"}
    for name in ("inbox", "inbox", "host", "other"):
        with journalctl.open("a") as file:
            file.write(json.dumps(entry | {"MESSAGE": f"ALERT {name}: something"}) + "\n")
    found = overview.alerts([app.name], 0, 10)
    assert [(group.what, group.count) for group in found] == [
        ("ALERT inbox: something", 2),
        ("ALERT host: something", 1),
    ]


@pytest.mark.parametrize("text", ["ALERT ", "ALERT  \t", "ALERT :", "ALERT"])
def test_an_alert_of_nobody_hides_no_other(app: App, journalctl: Path, text: str) -> None:
    """Whoever may write to the journal can begin a line like one."""
    said = {"__REALTIME_TIMESTAMP": "1000000", "PRIORITY": "3"}
    journalctl.write_text("".join(json.dumps({**said, "MESSAGE": each}) + "\n" for each in (text, "ALERT host: full")))
    assert [group.what for group in overview.alerts([app.name], 0, 10)] == ["ALERT host: full"]


def test_an_error_of_postgresql_without_words(app: App) -> None:
    entry = journal.Entry(1.0, "inbox_app@inbox ERROR:  ", "postgres", 7, "", 3)
    (news,) = following._of_entry([app], entry, following.Wanted(errors=True))
    assert news.text == "ERROR: "


def test_what_journalctl_says_in_bytes(journalctl: Path) -> None:
    """It prints numbers for what is no text, and a list for a field that is there twice."""
    entry = {"__REALTIME_TIMESTAMP": "1768478520000000", "PRIORITY": "3", "_PID": "7"}
    assert journalctl.exists()
    found = journal.decode(json.dumps(entry | {"MESSAGE": [104, 105, 255], "_SYSTEMD_UNIT": ["a", "b"]}).encode())
    assert found == journal.Entry(1768478520.0, "hi\ufffd", "", 7, "a", 3)
    assert journal.decode(b"no json") is None


def test_a_journal_that_cannot_be_read(journalctl: Path) -> None:
    """Its own words."""
    journalctl.unlink()
    with pytest.raises(ForgeError, match=r"(?s)journalctl failed: .*FileNotFoundError"):
        list(journal.entries([]))


@pytest.fixture
def giant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal with an entry of 64 MiB, which any app may write, and one after it."""
    entry = json.dumps(
        {"__REALTIME_TIMESTAMP": "1768478520000000", "PRIORITY": "3", "MESSAGE": "ALERT inbox: after it"}
    )
    program = f"""
import sys
sys.stdout.write('{{"MESSAGE":"')
for _ in range(64):
    sys.stdout.write("x" * 1024 * 1024)
print('"}}')
print({entry!r}, flush=True)
"""
    monkeypatch.setattr(journal, "command", lambda *_, **__: [sys.executable, "-c", program])


@pytest.mark.usefixtures("giant")
@pytest.mark.parametrize("how", ["read", "followed"])
def test_an_entry_of_any_size_takes_no_memory(how: str) -> None:
    tracemalloc.start()
    try:
        if how == "read":
            texts = [entry.message for entry in journal.entries([])]
        else:
            news: list[following.News] = []
            with pytest.raises(ForgeError, match="journalctl ended"):
                following.follow([], following.Wanted(errors=True), news.append)
            texts = [each.text for each in news]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == ["ALERT inbox: after it"]
    assert peak < 8 * 1024 * 1024


def test_lines_wherever_blocks_end() -> None:
    """And of one that is too long nothing becomes another."""
    lines = Lines(4)
    found = [lines.of(block) for block in (b"ab", b"cd\ne\n\nf", b"g\n12345", b"6\n", b"12345", b"67", b"8\nh\n")]
    assert found == [[], [b"abcd", b"e", b""], [b"fg"], [], [], [], [b"h"]]


def test_nobody_reads_on(journalctl: Path) -> None:
    """Whoever has enough of it leaves nothing running."""
    assert journalctl.exists()
    found = journal.entries([])
    assert next(found).at > 0
    found.close()  # type: ignore[attr-defined]
