"""logs/: Nginx's log with its rotated files, what lines say, and what comes of both."""

import gzip
import io
import json
import math
import os
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from forgectl.errors import ForgeError
from forgectl.layout import Layout
from forgectl.logs import access, days, memory, said, window
from forgectl.logs.latency import Latencies
from forgectl.state import Entry, State, save

NOW = datetime(2026, 1, 15, 12, 2, tzinfo=UTC).timestamp()
HOUR, DAY = 3600.0, 86400.0


def line(at: float, number: int = 0, **fields: object) -> bytes:
    """A line as Nginx writes it."""
    stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    entry = {"timestamp": stamp, "request_id": f"{number:032x}", "method": "GET", "path": "/v1/events", "status": 200}
    entry |= {
        "duration": 0.02,
        "upstream_status": "200",
        "release": "a",
        "at": round(at, 3),
        "connection": 1,
        "stream": 0,
    }
    return json.dumps(entry | fields, separators=(",", ":")).encode() + b"\n"


@pytest.fixture
def log(layout: Layout) -> Path:
    """The path of the app's log."""
    layout.access_log.parent.mkdir(parents=True)
    return layout.access_log


def rotated(log: Path, closed: float, lines: list[bytes], packed: bool = True) -> Path:
    """A file that logrotate left."""
    path = log.with_name(f"{log.name}-{datetime.fromtimestamp(closed, UTC):%Y%m%d}-{closed:.0f}{'.gz' * packed}")
    path.write_bytes(gzip.compress(b"".join(lines)) if packed else b"".join(lines))
    return path


@pytest.fixture
def fortnight(log: Path) -> Path:
    """An entry a minute for three days: two files of old, one uncompressed, and the present one."""
    entries = [(NOW - minute * 60, minute) for minute in range(3 * 24 * 60, 0, -1)]
    for first, last, packed in ((3, 2, True), (2, 1, True), (1, 0.5, False)):
        begins, ends = NOW - first * DAY, NOW - last * DAY
        rotated(log, ends, [line(at, number) for at, number in entries if begins <= at < ends], packed)
    log.write_bytes(b"".join(line(at, number) for at, number in entries if at >= NOW - DAY / 2))
    return log


def test_a_span_goes_over_all_files(fortnight: Path) -> None:
    """Whatever it begins in; and each request is there once."""
    for since in (60, HOUR, 13 * HOUR, 30 * HOUR, 80 * HOUR):
        found = [entry.at for entry in access.lines(fortnight, NOW - since)]
        assert sorted(found) == [NOW - minute * 60 for minute in range(int(min(since, 3 * DAY) // 60), 0, -1)]


def test_files_that_ended_before_are_not_opened(fortnight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name says when it was closed."""
    opened: list[str] = []
    read = access.read

    def noted(part: access.Part, since: float, budget: int | None) -> Iterator[bytes]:
        opened.append(part.path.name)
        return read(part, since, budget)

    monkeypatch.setattr(access, "read", noted)
    list(access.lines(fortnight, NOW - 13 * HOUR))
    assert [name.count(".gz") for name in opened] == [0, 0]


def test_a_time_is_found_without_reading_what_is_before(log: Path) -> None:
    """In a file of many blocks, of which some have a stretch that nobody can read."""
    padding = "x" * 400
    log.write_bytes(
        b"".join(line(NOW - second, second, user_agent=padding) for second in range(20_000, 0, -1))
        + b"\0" * 3 * access.BLOCK_BYTES
        + b"\n"
        + b"".join(line(NOW, number, user_agent=padding) for number in range(20_000))
    )
    with log.open("rb") as file:
        for second in (19_999, 10_000, 100):
            offset = access.find(file, NOW - second)
            first = access.decode(file.readline())
            assert first is not None
            assert first.at <= NOW - second
            assert offset > (20_000 - second) * 500 - 2 * access.BLOCK_BYTES
    assert sum(entry.at > NOW - 100 for entry in access.lines(log, NOW - 100)) == 20_099


def test_memory_is_bounded_whatever_is_read(log: Path) -> None:
    """A line without an end is no reason to keep it."""
    rotated(log, NOW - 1, [line(NOW - 10, number, user_agent="x" * 500) for number in range(30_000)])
    log.write_bytes(line(NOW, 1) + b"y" * 20 * access.BLOCK_BYTES)
    tracemalloc.start()
    assert sum(1 for _ in access.lines(log, NOW - HOUR)) == 30_001
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * access.BLOCK_BYTES


def test_what_cannot_be_read_is_counted(log: Path) -> None:
    """What a full disk cut off, and older lines without the newer fields."""
    old = b'{"timestamp":"2026-01-15T12:01:00+00:00","request_id":"a","status":204,"duration":0.1}\n'
    log.write_bytes(line(NOW - 30)[:50] + b"\n" + old + b"[]\nno json\n" + line(NOW - 10))
    unreadable = []
    found = list(access.lines(log, NOW - HOUR, lambda: unreadable.append(1)))
    assert [entry.status for entry in found] == [204, 200]
    assert (found[0].at, found[0].connection, len(unreadable)) == (NOW - 60, 0, 3)


def test_a_damaged_archive_ends_where_it_is_damaged(log: Path) -> None:
    """And what stands in the other files is read all the same."""
    entries = [line(NOW - 100, number, user_agent=os.urandom(300).hex()) for number in range(9000)]
    path = rotated(log, NOW - 50, entries)
    path.write_bytes(path.read_bytes()[:-2_000_000])
    log.write_bytes(line(NOW))
    assert 1 < sum(1 for _ in access.lines(log, NOW - HOUR)) < 9001
    assert access.search(log, f"{1:032x}")[0][0].at == NOW - 100


def test_a_request_id_is_found_wherever_it_is(fortnight: Path) -> None:
    """And in no other field, where a client may put it."""
    for number in (1, 800, 2000, 4000):
        (found,), _ = access.search(fortnight, f"{number:032x}")
        assert found.at == NOW - number * 60
    assert access.search(fortnight, f"{4000:032x}", since=NOW - DAY) == ([], NOW - 2 * DAY)
    claimed = "f" * 32
    with fortnight.open("ab") as file:
        file.write(line(NOW, 1, user_agent=f'"request_id":"{claimed}"', path=f"/{claimed}"))
    assert access.search(fortnight, claimed)[0] == []


def test_a_file_that_is_compressed_meanwhile_is_still_read(fortnight: Path) -> None:
    """It was listed under its old name."""
    listed = access.parts(fortnight)
    plain = listed[-2].path
    plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert sum(1 for _ in access.read(listed[-2])) == 12 * 60


def test_following_goes_on_over_a_rotation(log: Path) -> None:
    """Nginx writes into the renamed file until it has reopened."""
    log.write_bytes(line(NOW, 1))
    tail = access.Tail(log)
    assert list(tail.new()) == []
    old = log.open("ab", buffering=0)
    old.write(line(NOW, 2)[:70])
    assert list(tail.new()) == []
    old.write(line(NOW, 2)[70:])
    log.rename(log.with_name("inbox.json-20260115-1768478520"))
    log.touch()
    seen = [entry.request_id for entry in tail.new()]
    old.write(line(NOW, 3))
    log.write_bytes(line(NOW, 4))
    seen += [entry.request_id for entry in tail.new()]
    assert sorted(int(each, 16) for each in seen) == [2, 3, 4]
    old.close()
    tail.close()


def test_following_waits_for_a_log(log: Path) -> None:
    """Of an app that nobody has asked anything yet."""
    tail = access.Tail(log)
    assert list(tail.new()) == []
    log.write_bytes(line(NOW, 7))
    assert [int(entry.request_id, 16) for entry in tail.new()] == [7]
    tail.close()


@pytest.mark.parametrize("spread", [0.02, 1.5])
def test_quantiles_are_near_the_exact_ones(spread: float) -> None:
    """Off by a fortieth at most."""
    values = [-spread * math.log(1 - number / 20_000) for number in range(20_000)]
    latencies = Latencies()
    for value in values:
        latencies.add(value)
    for share, found in zip((0.5, 0.95, 0.99), latencies.quantiles(0.5, 0.95, 0.99), strict=True):
        assert found == pytest.approx(values[int(len(values) * share)], rel=0.026, abs=0.001)
    assert Latencies().quantiles(0.5) == [None]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("1h30m", 5400), ("2d", 2 * DAY), ("1w", 7 * DAY), ("2026-01-15T12:00:00Z", 120)],
)
def test_since(text: str, seconds: float) -> None:
    """So long ago, or a point in time."""
    assert window.since(text, datetime.fromtimestamp(NOW, UTC)) == NOW - seconds


def test_since_before_all_time() -> None:
    """The journal knows no time before its own."""
    assert window.since("2500w", datetime.fromtimestamp(NOW, UTC)) == NOW - 2500 * 7 * DAY
    assert window.since("99999w", datetime.fromtimestamp(NOW, UTC)) == 0


def test_since_a_time_of_day() -> None:
    """Today's, in the zone of this host."""
    now = datetime(2026, 1, 15, 12, 2).astimezone()
    assert window.since("9:05", now) == datetime(2026, 1, 15, 9, 5).astimezone().timestamp()
    assert window.since("2026-01-14", now) == datetime(2026, 1, 14).astimezone().timestamp()


@pytest.mark.parametrize("text", ["soon", "", "15", "13:00", "2027-01-01", "-1h", "25:00", "9999999999w"])
def test_since_is_refused(text: str) -> None:
    """What is no time, or has not come."""
    with pytest.raises(ValueError, match="expected"):
        window.since(text, datetime(2026, 1, 15, 12, 2).astimezone())


@pytest.mark.parametrize(
    ("message", "level", "is_error", "reason"),
    [
        ('{"level":"INFO","message":"request","request_id":"a"}', "INFO", False, "request"),
        (
            '{"level":"ERROR","message":"unhandled","traceback":"Trace\\n  x\\nValueError: y\\n"}',
            "ERROR",
            True,
            "unhandled: ValueError: y",
        ),
        ('{"severity":"critical","event":"gone"}', "CRITICAL", True, "gone"),
        ('{"level":"error","message":"boot","exception":"KeyError: 1"}', "ERROR", True, "boot: KeyError: 1"),
        ("2026-01-15 ERROR [shop] no stock", "ERROR", True, "2026-01-15 ERROR [shop] no stock"),
        ("INFO: 1.2.3.4 - GET /errors/ERROR 200", "INFO", False, "INFO: 1.2.3.4 - GET /errors/ERROR 200"),
        ("sqlalchemy.exc.TimeoutError: QueuePool limit", "ERROR", True, "sqlalchemy.exc.TimeoutError: QueuePool limit"),
        ("Traceback (most recent call last):", "", False, "Traceback (most recent call last):"),
        ("{not json", "", False, "{not json"),
        ('{"level":7,"message":["a"]}', "", False, '{"level":7,"message":["a"]}'),
    ],
)
def test_lines_of_apps(message: str, level: str, is_error: bool, reason: str) -> None:
    """Of whatever form."""
    line = said.by_app(message)
    assert (line.level, line.is_error, line.reason) == (level, is_error, reason)


def test_lines_of_postgresql() -> None:
    """With and without a session, of many lines too."""
    slow = said.by_database("inbox_app@inbox LOG:  duration: 612.300 ms  execute <unnamed>: SELECT\n\tpg_sleep(0.6)")
    assert slow is not None
    assert (slow.database, slow.level, slow.is_error, slow.seconds) == ("inbox", "LOG", False, 0.6123)
    own = said.by_database("FATAL:  the database system is starting up")
    assert own is not None
    assert (own.role, own.database, own.is_error) == ("", "", True)
    assert said.by_database("some text") is None


def test_what_is_alike() -> None:
    """Ids and numbers do not make it another error; paths without end make few groups."""
    assert said.alike("no event 4711 of 3f2a9c77aa in 0x7f") == said.alike("no event 1 of 99aa88bb77 in 0x1")
    assert said.route("/v1/events/4711/parts/x") == "/v1/events/*/parts/x"
    assert said.route("/" + "a" * 3000) == "/*"
    assert said.plain("a\x1b[2J\u202eb\nc") == r"a\x1b[2J\u202eb\nc"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal without a word."""
    monkeypatch.setattr(memory, "since", lambda *_: [])


def test_the_day(fortnight: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps of five minutes, with memory and releases where they belong."""
    monkeypatch.setattr(memory, "since", lambda *_: [(NOW - 2 * HOUR, 150, 900), (NOW - 2 * HOUR + 1, 130, 900)])
    with fortnight.open("ab") as file:
        file.write(line(NOW - 30, status=503, duration=2.0))
        file.write(line(NOW - 20, status=101, duration=400.0) + line(NOW - 20, stream=1, duration=400.0))
        file.write(b"what a full disk leaves\n")
    state = State()
    for hours, outcome in ((30, "live"), (3, "rolled back")):
        stamp = datetime.fromtimestamp(NOW - hours * HOUR, UTC).isoformat()
        state.record(Entry("20260115-a", stamp, "me", outcome, {}))  # type: ignore[arg-type]
    save(layout, state)
    found = days.of(layout, NOW)
    # The present step has two minutes of it.
    assert found.requests[:-1] == [5] * 287
    assert found.requests[-1] == 2 + 3
    assert [found.answers[name][-1] for name in days.CLASSES] == [4, 0, 0, 1]
    assert found.p50[0] == pytest.approx(0.02, rel=0.03)
    assert found.p99[-1] == pytest.approx(2.0, rel=0.03)
    assert (found.memory.index(150), found.memory_limit) == (287 - 24, 900)
    assert [each.outcome for each in found.happened] == ["rolled back"]
    assert found.unreadable == 1
    assert datetime.fromisoformat(found.complete_from).timestamp() == days.begin(NOW)
    text = "\n".join(days.text("inbox", found, days.begin(NOW)))
    assert "5xx" in text
    assert "rolled back" in text


@pytest.mark.usefixtures("fortnight", "quiet")
@pytest.mark.parametrize("budget", [30_000, 300_000])
def test_the_day_reads_no_more_than_it_may(layout: Layout, budget: int) -> None:
    """The newest, and it says from when on the figures are whole."""
    found = days.of(layout, NOW, budget)
    complete = datetime.fromisoformat(found.complete_from).timestamp()
    assert days.begin(NOW) < complete < NOW
    read = sum(found.requests)
    assert 0 < read * len(line(NOW)) <= budget
    first = int(complete - days.begin(NOW)) // 300 + 1
    assert found.requests[first:-1] == [5] * (287 - first)
    assert any("not counted" in each for each in days.text("inbox", found, days.begin(NOW)))


@pytest.mark.usefixtures("quiet")
def test_the_day_of_an_app_without_requests(layout: Layout) -> None:
    """Has nothing, and that is no error."""
    found = days.of(layout, NOW)
    assert (sum(found.requests), found.p99, found.happened) == (0, [None] * 288, [])
    assert list(days.text("inbox", found, days.begin(NOW)))


@pytest.mark.usefixtures("quiet")
def test_what_rotation_has_deleted_is_not_taken_for_quiet(log: Path, layout: Layout) -> None:
    """The oldest file begins within the day."""
    rotated(log, NOW - HOUR, [line(NOW - 3 * HOUR), line(NOW - 2 * HOUR)])
    log.write_bytes(line(NOW - 60))
    found = days.of(layout, NOW)
    assert datetime.fromisoformat(found.complete_from).timestamp() == NOW - 3 * HOUR


def test_the_day_of_a_host_that_is_broken(log: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a journal, and with a damaged state, the requests are counted all the same."""

    def fails(*_: object) -> list[tuple[float, int, int]]:
        raise ForgeError("journalctl failed")

    monkeypatch.setattr(memory, "since", fails)
    (layout.state_dir / "state.json").write_text("{")
    log.write_bytes(line(NOW - 60))
    found = days.of(layout, NOW)
    assert (sum(found.requests), found.memory_limit, found.happened) == (1, 0, [])


@pytest.mark.usefixtures("quiet")
def test_before_its_first_release_an_app_has_logged_nothing(log: Path, layout: Layout) -> None:
    """So nothing of its day is missing."""
    rotated(log, NOW - HOUR, [line(NOW - 3 * HOUR), line(NOW - 2 * HOUR)])
    log.write_bytes(line(NOW - 60))
    state = State()
    state.record(Entry("a", datetime.fromtimestamp(NOW - 3 * HOUR - 90, UTC).isoformat(), "me", "live", {}))
    save(layout, state)
    assert datetime.fromisoformat(days.of(layout, NOW).complete_from).timestamp() == days.begin(NOW)


def test_memory_is_read_as_it_is_written() -> None:
    """One module has both."""
    found = memory.READ.fullmatch(memory.line("green", 123, 456))
    assert found is not None
    assert (found["used"], found["limit"]) == ("123", "456")


def test_lines_are_split_wherever_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is lost or torn."""
    monkeypatch.setattr(access, "BLOCK_BYTES", 7)
    whole = [b"a" * number for number in range(1, 30)]
    assert list(access.split(io.BytesIO(b"\n".join(whole)))) == whole


@pytest.mark.usefixtures("quiet")
def test_a_day_of_a_million_requests_is_quick(log: Path, layout: Layout) -> None:
    """A generous bound: at some 300,000 lines a second, a hang and not a slow machine is what it finds."""
    log.write_bytes(b"".join(line(NOW - 200_000 + number, number) for number in range(200_000)))
    began = time.monotonic()
    assert sum(days.of(layout, NOW).requests) > 80_000
    assert time.monotonic() - began < 30
