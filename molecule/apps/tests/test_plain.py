"""An app that was never written for the platform: no secrets, no database, no path for a probe, no variable of ours."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import httpx
import pytest
from forge_apps import archive, entries, live_unit, settled, state
from forge_events import answer, append, forgectl
from forge_scenario import cgroup_value, show, until
from forge_wire import address, exchange, tls, trust
from testinfra.host import Host
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

NAME, DOMAIN = "plain", "plain.example.com"
PROBE = """
import http.client, socket, sys
found = set()
for _ in range(100):
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(sys.argv[1])
    connection.request("TRACE", "/")
    answer = connection.getresponse()
    found.add((answer.status, answer.headers["X-Forge-Worker"]))
print(*sorted({status for status, _ in found}), len(found))
"""


def refused(host: Host, source: Path, code: int, *arguments: str) -> str:
    """Release what is no good; returns what was said about it."""
    before = state(host, NAME)["live"]
    said = answer(forgectl(host, "release", NAME, "--archive", archive(source), "--json", *arguments), code)["error"]
    assert state(host, NAME)["live"] == before
    return str(said)


def test_it_gets_what_its_entry_names_and_no_more(plain: httpx.Client) -> None:
    """No variable of the platform's own; those that every program has, and the metrics' folder, are there."""
    found = plain.get("/").json()
    assert found["greeting"] == "hello"
    common = {"PATH", "HOME", "LANG", "PYTHONPATH", "PYTHONUNBUFFERED", "PROMETHEUS_MULTIPROC_DIR"}
    assert {"GREETING"} | common <= set(found["variables"])
    others = set(found["variables"]) - common - {"GREETING", "LC_CTYPE", "NOTIFY_SOCKET", "SERVER_SOFTWARE"}
    assert {name for name in others if not name.startswith("LISTEN_")} == set()


def test_status_says_that_nobody_asks_the_app(host: Host, source: Path) -> None:
    """As does a release."""
    found = state(host, NAME)
    assert (found["ready"], found["readiness"], found["secrets"]) == (True, None, {})
    said = host.check_output("forgectl status %s", NAME)
    assert "yes: its workers take requests; the app has no readiness path" in said
    assert "secrets   none" in said
    append(source / "main.py", "AGAIN = 1\n")
    result = answer(forgectl(host, "release", NAME, "--archive", archive(source), "--json"))
    assert any("no readiness path" in line for line in result["report"])
    answer(forgectl(host, "rollback", NAME, "--json"))
    settled(host, NAME)


def test_every_worker_answers_for_itself(host: Host, plain: httpx.Client) -> None:
    """On the socket, to a method that reaches neither the app nor, through Nginx, any of that."""
    unit = live_unit(host, NAME)
    since = host.check_output("date +%s.%N")
    assert host.check_output("python3 -c %s /run/plain/live.sock", PROBE).split() == ["200", "2"]
    said = host.check_output("journalctl --output=cat --unit=%s --since=@%s", unit, since)
    assert "TRACE" not in said
    with tls(host, DOMAIN) as connection:
        request = f"TRACE / HTTP/1.1\r\nHost: {DOMAIN}\r\nConnection: close\r\n\r\n"
        assert exchange(connection, request.encode()).status == 405
    assert plain.get("/").status_code == 200


def test_without_secrets_there_is_no_identity(host: Host) -> None:
    """Neither sealed nor asked for, nor looked after by a timer; and a command says what is missing where."""
    assert host.run("ls /etc/credstore.encrypted/forge.plain.*").rc != 0
    assert "LoadCredential" not in host.check_output("systemctl cat %s", live_unit(host, NAME))
    assert not host.service("forge-rotate@plain.timer").is_running
    assert not host.service("forge-rotate@plain.timer").is_enabled
    assert host.service("forge-rotate@inbox.timer").is_running
    assert answer(forgectl(host, "secrets", "check", NAME, "--json"))["identities"] == {}
    assert answer(forgectl(host, "secrets", "rotate", NAME, "--json"))["changed"] is False
    assert "apps.plain.secrets" in answer(forgectl(host, "secrets", "set", NAME, "key", "--json"), 3)["error"]


def test_plain_text_is_in_the_journal(host: Host, plain: httpx.Client) -> None:
    """What is printed at import and by a request, as it is printed."""
    plain.get("/")
    said = host.check_output("forgectl logs %s --lines 500", NAME).splitlines()
    assert "printed while it is imported" in said
    assert "printed by a request" in said


def test_files_have_their_places(host: Host, plain: httpx.Client) -> None:
    """A home that stays, and a folder for temporary files that nobody else sees."""
    found = plain.get("/files").json()
    assert found["home"] == "/var/lib/plain/.cache/plain/file"
    assert host.check_output("cat %s", found["home"]) == "kept"
    assert found["temporary"].startswith("/tmp/")


def test_a_compiler_gets_its_memory(host: Host, plain: httpx.Client) -> None:
    """Where the entry asks for it, and nowhere else."""
    assert plain.get("/machine-code").json() == {"compiled": True}
    assert show(host, live_unit(host, NAME), "MemoryDenyWriteExecute") == "no"
    assert show(host, live_unit(host, "inbox"), "MemoryDenyWriteExecute") == "yes"


def test_limits_hold(host: Host, plain: httpx.Client) -> None:
    """Those of the unit as the kernel has them, and Nginx's for each client."""
    unit = live_unit(host, NAME)
    limit = int(cgroup_value(host, unit, "memory", "memory.limit_in_bytes", "memory.max"))
    assert limit == int(show(host, unit, "MemoryMax")) < 512 * 1024 * 1024
    tasks = cgroup_value(host, unit, "pids", "pids.max", "pids.max")
    assert tasks == show(host, unit, "TasksMax") == "256"
    statuses = [plain.get("/").status_code for _ in range(150)]
    assert statuses[0] == 200
    assert 429 in statuses
    time.sleep(3)  # what it is ahead wears off


def test_no_path_is_taken_from_the_app(plain: httpx.Client) -> None:
    """Where it has no metrics, the path is its own."""
    assert plain.get("/metrics").json() == {"detail": "Not Found"}


@pytest.mark.exhaustive
def test_streams_and_websockets_may_be_silent_for_different_times(host: Host, plain: httpx.Client) -> None:
    """Nginx ends a WebSocket after 3 s without a word, and a stream after 6 s."""
    event_stream = {"Accept": "text/event-stream"}
    assert plain.get("/silent/4", headers=event_stream).text == "data: first\n\ndata: last\n\n"
    with (
        pytest.raises(httpx.RemoteProtocolError),
        plain.stream("GET", "/silent/20", headers=event_stream) as stream,
    ):
        stream.read()
    raw = socket.create_connection((address(host), 443), timeout=30)
    with connect(f"wss://{DOMAIN}/echo", sock=raw, ssl=trust(), ping_interval=None) as connection:
        for word in ("first", "second"):
            connection.send(word)
            assert connection.recv(timeout=10) == word
            time.sleep(1)
        # uvicorn's own pings come every 20 s.
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=15)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.environ['PARTNER_TOKEN']", "PARTNER_TOKEN: set it in apps.plain.settings"),
        pytest.param(
            "open(__file__ + '.cache', 'w')",
            "of all folders only its home /var/lib/plain and /tmp are its own",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "import socket; taken = socket.create_server(('127.0.0.1', 8099))",
            "it binds a port of its own",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "import nowhere",
            "nowhere is neither in its lock nor below apps.plain.python_path",
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["needs a variable", "writes into its own folder", "binds a port", "lacks a package"],
)
def test_what_does_not_start_is_told_how_to(host: Host, source: Path, code: str, said: str) -> None:
    """And nothing but the attempt happened."""
    append(source / "main.py", f"{code}\n")
    error = refused(host, source, 4)
    assert said in error.partition("Its last log lines")[0], error


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("if os.fork():\n    os._exit(0)", "it ends its own worker, or forks into the background as a daemon does"),
        (
            "import uvicorn\nif os.open('/tmp/one', os.O_CREAT) and not os.path.exists('/tmp/two'):\n"
            "    open('/tmp/two', 'w')\n    uvicorn.Server(uvicorn.Config(app, port=8099)).run()",
            "it listens on port 8099 by itself",
        ),
    ],
    ids=["daemon", "server of its own"],
)
def test_what_never_gets_ready_is_told_why(host: Host, source: Path, code: str, said: str) -> None:
    """After the time that a start may take."""
    append(source / "main.py", f"{code}\n")
    error = refused(host, source, 4)
    assert said in error, error


def test_state_is_written_as_programs_read_it(host: Host) -> None:
    """The description has no trace of what the app does not have."""
    settings = host.check_output("cat /etc/forge/apps/plain.toml")
    assert 'source = "none"' in settings
    assert "FORGE_" not in settings
    assert json.loads(host.check_output("forgectl status --json"))["apps"].keys() == set(entries(host))


def test_answers_again(plain: httpx.Client) -> None:
    """What served before all of this serves."""
    assert until(lambda: plain.get("/").status_code == 200, 10)
