"""Logs: kept, bounded, machine-readable, and rotated without losing a line."""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from typing import Any

import httpx
import pytest
from forge_scenario import https_client, until
from forge_wire import exchange, tls
from testinfra.host import Host

DOMAIN = "inbox.example.com"
ACCESS_LOG = "/var/log/nginx/inbox.json"
ROTATE = "logrotate --force /etc/logrotate.d/forge"


def entries(host: Host, marker: str) -> list[dict[str, Any]]:
    """Read what is logged with a marker, in the present file and in all rotated ones; every line has to be JSON."""
    found = host.run(f"for log in {ACCESS_LOG}*; do zcat --force $log; done | grep --text %s", marker).stdout_bytes
    return [json.loads(line.decode()) for line in found.split(b"\n") if line]


def test_journal_is_kept_and_bounded(host: Host) -> None:
    """On disk, within the default bounds, and read by what runs: journald says so itself."""
    in_force = host.check_output("systemd-analyze cat-config systemd/journald.conf")
    settings = dict(re.findall(r"^(\w+)=(.*)$", in_force, re.MULTILINE))
    assert settings["Storage"] == "persistent"
    assert (settings["SystemMaxUse"], settings["SystemKeepFree"]) == ("1024M", "1024M")
    assert (settings["MaxRetentionSec"], settings["RateLimitBurst"]) == ("30day", "20000")
    limits = host.check_output("journalctl --no-pager --output=cat --unit=systemd-journald --grep='System Journal'")
    assert re.search(r"\(/var/log/journal/\w+\) is .*, max (1\.0|1)G", limits.splitlines()[-1])
    machine = host.check_output("cat /etc/machine-id")
    assert host.file(f"/var/log/journal/{machine}/system.journal").exists


NOT_UTF8 = [
    b"\xff",
    b"\xc3",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xf8\x88\x80\x80\x80",
]
UTF8 = [
    b"plain",
    b'"\\"\\u0000\\n',
    b"\x01\x1b[31m\x7f",
    "\u0080é\u07ff\u0800€\ud7ff\ue000\uffff\U00010000\U0010ffff".encode(),
]


@pytest.mark.parametrize("sent", [*UTF8, *NOT_UTF8, b"a" * 7000, "é".encode() * 3500, b"a" * 7000 + b"\xff"])
def test_access_log_is_json_whatever_a_client_sends(host: Host, sent: bytes) -> None:
    """What a client chooses stays inside its field, as it was sent; what no JSON can hold is left out."""
    path = b"/p/%22%0a%ff?token=secret" if b"\x01" in sent else b"/p/" + sent + b"?token=secret"
    request = b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nUser-Agent: %s\r\n\r\n"
    with tls(host, DOMAIN) as connection:
        answer = exchange(connection, request % (path, DOMAIN.encode(), sent))
    request_id = answer.head.partition("x-request-id: ")[2].split()[0]
    (entry,) = until(lambda: entries(host, request_id), 5)
    try:
        logged = {"user_agent": sent.decode(), "path": path.partition(b"?")[0].decode()}
    except UnicodeDecodeError:
        logged = dict.fromkeys(("user_agent", "path"), "not UTF-8")
    assert entry | logged | {"status": answer.status} == entry


def test_app_logs_json_to_the_journal(host: Host, client: httpx.Client) -> None:
    """Every line of the slot is one object, Gunicorn's own as well; that of a request has its id."""
    request_id = client.get("/v1/events?limit=1").headers["x-request-id"]
    journal = "journalctl --no-pager --output=cat --boot --identifier=inbox --lines=200"

    def logged() -> list[dict[str, Any]]:
        return [json.loads(line) for line in host.check_output(journal).splitlines() if line.startswith("{")]

    (line,) = until(lambda: [entry for entry in logged() if entry.get("request_id") == request_id], 5)
    assert {"client", "method", "path", "status", "duration_ms"} <= set(line)
    assert all({"timestamp", "level", "logger", "message"} <= set(entry) for entry in logged())
    expected = ("{", "forge-launch:")
    assert [text for text in host.check_output(journal).splitlines() if not text.startswith(expected)] == []


def test_logs_are_not_for_everyone(host: Host) -> None:
    """Addresses of clients are in them, in rotated ones too."""
    logs = "find /var/log/nginx /var/log/journal -type f"
    assert host.check_output(logs).count("\n") > 2
    assert host.check_output(f"cd / && runuser --user nobody -- {logs} -readable") == ""
    assert host.run("runuser --user nobody -- journalctl --no-pager --quiet --unit=nginx").stdout == ""


def test_rotation_under_traffic_loses_no_line(host: Host) -> None:
    """Two forced rotations while clients ask on: every request is in exactly one line."""
    marker, number, clients = uuid.uuid4().hex, 1000, 4
    done = threading.Semaphore(0)

    def ask(which: int) -> None:
        with https_client(host) as client:
            for request in range(number):
                agent = f"{marker}={which}-{request}"
                assert client.get("/health", headers={"User-Agent": agent}).status_code == 200
                done.release()

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(clients)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        for _ in range(number // 2):
            assert done.acquire(timeout=30)
        time.sleep(1)  # the name of a rotated file has seconds
        host.check_output(ROTATE)
    for thread in threads:
        thread.join()
    expected = sorted(f"{which}-{request}" for which in range(clients) for request in range(number))
    until(lambda: len(entries(host, marker)) >= len(expected), 5)
    assert sorted(entry["user_agent"].partition("=")[2] for entry in entries(host, marker)) == expected
    # All but the newest of the rotated ones are compressed, and logging goes on in the new file.
    rotated = host.check_output(f"ls {ACCESS_LOG}-*").split()
    assert [name.endswith(".gz") for name in rotated] == [True] * (len(rotated) - 1) + [False]
    assert len(rotated) >= 2
    with https_client(host) as client:
        assert client.get("/health").status_code == 200
    assert until(lambda: host.file(ACCESS_LOG).size > 0, 5)
