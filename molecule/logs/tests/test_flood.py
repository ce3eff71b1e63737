"""The bounds of all logs hold under a flood, and the app goes on serving."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from forge_scenario import https_client, until
from testinfra.host import Host

MIB = 1024 * 1024
JOURNAL_MIB, FILE_MIB = 32, 8
"""As the scenario's inventory has it, and as journald's files are."""
ROTATED = 5
# Lines that journald does not compress: shorter than it looks at, and of random bytes.
FLOOD = "echo {marker}; head --bytes={bytes} /dev/urandom | base64 --wrap=480"


@contextmanager
def asking(host: Host) -> Iterator[list[float]]:
    """A client that asks on, and whose every request has to be answered; the seconds that each took."""
    took: list[float] = []
    failed: list[object] = []
    over = threading.Event()

    def ask() -> None:
        with https_client(host) as client:
            while not over.is_set():
                began = time.monotonic()
                try:
                    status = client.get("/v1/events?limit=1").status_code
                except httpx.HTTPError as error:
                    failed.append(error)
                    continue
                took.append(time.monotonic() - began)
                if status != 200:
                    failed.append(status)
                time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield took
    finally:
        over.set()
        thread.join(60)
    assert failed == []
    assert took


def disk_usage(host: Host) -> float:
    """What the journal takes on the disk, in MiB."""
    return int(host.check_output("du --summarize --bytes /var/log/journal | cut --fields=1")) / MIB


def test_journal_stays_within_its_budget(host: Host) -> None:
    """Far more than the budget, past the rate limit of its unit: the oldest goes, and clients notice nothing."""
    marker = f"flood {uuid.uuid4().hex}"
    find = f"journalctl --no-pager --quiet --output=cat --grep='^{marker}'"
    with asking(host) as took:
        options = "--property=LogRateLimitIntervalSec=0 --property=RuntimeMaxSec=240"
        host.check_output(f"systemd-run --quiet --wait {options} sh -c %s", FLOOD.format(marker=marker, bytes="30M"))
        assert disk_usage(host) <= JOURNAL_MIB + FILE_MIB
    # It was more than all of it.
    assert host.run(find).stdout == ""
    assert max(took) < 20
    # The journal goes on, with the newest.
    with https_client(host) as client:
        request_id = client.get("/v1/events?limit=1").headers["x-request-id"]
    assert until(lambda: request_id in host.check_output("forgectl logs inbox --lines 50"), 30)


@pytest.mark.exhaustive
def test_a_unit_that_floods_is_cut_short(host: Host) -> None:
    """Within its rate limit, and the journal says how much was left out; the app loses no line by it."""
    with asking(host), https_client(host) as client:
        host.check_output(
            "systemd-run --quiet --wait --unit=flood-limited --property=RuntimeMaxSec=60 sh -c %s",
            "seq --format='line %.0f' 200000",
        )
        request_id = client.get("/v1/events?limit=1").headers["x-request-id"]
    suppressed = until(
        lambda: (
            re.findall(
                r"Suppressed (\d+) messages from flood-limited",
                host.run(
                    "journalctl --no-pager --output=cat --since=-5min --grep='Suppressed .* flood-limited'"
                ).stdout,
            )
            # journald says so with the unit's next message, or when the interval is over.
            or host.run("systemd-run --quiet --wait --unit=flood-limited echo after").stdout
        ),
        60,
        every=5,
    )
    kept = int(
        host.check_output("journalctl --no-pager --output=cat --unit=flood-limited --grep='^line ' | wc --lines")
    )
    assert 0 < kept < 150_000
    # The journal has lost some of the lines by now.
    assert sum(map(int, suppressed)) > 100_000
    assert until(lambda: request_id in host.check_output("forgectl logs inbox --lines 500"), 30)


@pytest.mark.exhaustive
def test_access_logs_stay_within_their_budget(host: Host) -> None:
    """More than all files may hold: what is kept is bounded, the newest line is in it, and nobody loses a request."""
    with asking(host), https_client(host) as client:
        newest = ""
        for _ in range(ROTATED + 3):
            # What a flood of clients would have Nginx write in five minutes.
            host.check_output(
                "tail --lines=1 /var/log/nginx/inbox.json > /run/line && "
                'yes "$(cat /run/line)" | head --bytes=3M | head --lines=-1 >> /var/log/nginx/inbox.json'
            )
            newest = client.get("/v1/events?limit=1").headers["x-request-id"]
            time.sleep(1.1)  # the name of a rotated file has seconds
            # Nobody starts it so often as systemd's own limit would refuse.
            host.check_output("systemctl reset-failed logrotate.service && systemctl start logrotate.service")
        files = host.check_output("ls /var/log/nginx/inbox.json-*").split()
        assert len(files) == ROTATED
        assert [name.endswith(".gz") for name in files] == [True] * (ROTATED - 1) + [False]
        host.check_output("grep --quiet %s %s", newest, files[-1])
        total = int(host.check_output("cat /var/log/nginx/inbox.json* | wc --bytes"))
    assert total < 3 * (3 + 1) * MIB


def test_sizes_are_looked_at_every_five_minutes(host: Host) -> None:
    """Whatever is due, in a day as well: `maxsize` is a bound."""
    properties = "TimersCalendar,AccuracyUSec,RandomizedDelayUSec"
    listed = host.check_output("systemctl show logrotate.timer --property=%s", properties)
    assert "OnCalendar=*-*-* *:00/5:00" in listed
    assert "AccuracyUSec=1min" in listed
    assert "RandomizedDelayUSec=0" in listed


def test_postgresql_logs_within_that_budget(host: Host) -> None:
    """To the journal, with the process and whose it was, and to no file, which nobody would bound."""
    query = "SELECT * FROM nowhere_at_all"
    assert host.run("runuser --user postgres -- psql --quiet inbox --command %s", query).rc == 1
    call = "journalctl --no-pager --quiet --since=-1min --identifier=postgres --grep=nowhere_at_all --output=cat"
    said = until(lambda: host.run(call).stdout, 30)
    assert re.match(r'postgres@inbox ERROR:  relation "nowhere_at_all" does not exist', said)
    assert f"STATEMENT:  {query}" in said
    assert host.run("grep --recursive --quiet nowhere_at_all /var/log/postgresql").rc == 1
