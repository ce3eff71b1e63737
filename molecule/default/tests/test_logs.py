"""Logs: kept, bounded, machine-readable, and rotated without losing a line."""

from __future__ import annotations

import json
import re
import threading
import time
import uuid

import httpx
from forge_scenario import https_client, until
from testinfra.host import Host

ACCESS_LOG = "/var/log/nginx/inbox.json"
ROTATE = "logrotate --force /etc/logrotate.d/forge"


def lines(host: Host, marker: str) -> list[str]:
    """Read what is logged with a marker, in the present file and in all rotated ones."""
    found = host.run(f"for log in {ACCESS_LOG}*; do zcat --force $log; done | grep --text %s", marker).stdout_bytes
    # Nginx passes on bytes that are not UTF-8.
    return list(found.decode(errors="replace").splitlines())


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


def test_access_log_is_json_whatever_a_client_sends(host: Host, client: httpx.Client) -> None:
    """Quotes, backslashes, control and non-ASCII characters in what a client chooses stay inside their fields."""
    marker = uuid.uuid4().hex
    agent = marker.encode() + b'"\\\x01\xff\xc3\xa9{}'
    answer = client.get('/no-such-"page\\%22%0a', headers={b"User-Agent": agent})
    (line,) = until(lambda: lines(host, marker), 5)
    entry = json.loads(line)
    assert (entry["status"], entry["request_id"]) == (answer.status_code, answer.headers["x-request-id"])
    assert entry["user_agent"].startswith(f'{marker}"\\')


def test_app_logs_json_to_the_journal(host: Host, client: httpx.Client) -> None:
    """Every line of the slot is one object; Gunicorn's own as well."""
    client.get("/v1/events?limit=1")
    logged = host.check_output("journalctl --no-pager --output=cat --boot --identifier=inbox --lines=50").splitlines()
    entries = [json.loads(line) for line in logged if not line.startswith("forge-launch:")]
    assert {"timestamp", "level", "logger", "message"} <= set.intersection(*(set(entry) for entry in entries))


def test_logs_are_not_for_everyone(host: Host) -> None:
    """Addresses of clients are in them."""
    assert host.check_output("find /var/log/nginx -type f -perm /007 -not -name '*.gz'") == ""


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
    until(lambda: len(lines(host, marker)) >= len(expected), 5)
    found = [json.loads(line)["user_agent"].partition("=")[2] for line in lines(host, marker)]
    assert sorted(found) == expected
    # The older of the two is compressed, and logging goes on in the new file.
    assert host.run(f"ls {ACCESS_LOG}-*.gz").rc == 0
    assert host.file(ACCESS_LOG).size > 0
