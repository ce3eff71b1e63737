"""slots.py over real unix sockets."""

import http.server
import itertools
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from conftest import describe, no_room
from forgectl import config, slots, systemd
from forgectl.layout import SLOTS, Layout


@contextmanager
def serve(path: Path, status: int) -> Iterator[list[dict[str, str]]]:
    """An HTTP server on a unix socket; yields the headers that it saw."""
    seen: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({"path": self.path, **dict(self.headers)})
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    with Server(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield seen
        server.shutdown()
        thread.join()


def test_a_probe_looks_like_the_proxy(layout: Layout) -> None:
    with serve(layout.socket("blue"), 200) as seen:
        assert slots.probe(layout.socket("blue"), "/ready", "inbox.example.com") == 200
    assert seen[0]["path"] == "/ready"
    assert (seen[0]["Host"], seen[0]["X-Forwarded-Proto"]) == ("inbox.example.com", "https")


def test_a_probe_tells_not_ready_from_silence(layout: Layout) -> None:
    with serve(layout.socket("blue"), 503):
        assert slots.probe(layout.socket("blue"), "/ready", "x") == 503
    assert slots.probe(layout.socket("green"), "/ready", "x") is None


def test_a_listener_without_a_server_is_given_up(layout: Layout) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(layout.socket("blue")))
        listener.listen()
        began = time.monotonic()
        assert slots.probe(layout.socket("blue"), "/ready", "x", timeout=0.2) is None
        assert time.monotonic() - began < slots.PROBE_TIMEOUT_SECONDS


def test_the_swap_never_leaves_a_gap(layout: Layout) -> None:
    with serve(layout.socket("blue"), 200), serve(layout.socket("green"), 201):
        slots.swap(layout, "blue")
        statuses: set[int | None] = set()
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                statuses.add(slots.probe(layout.live, "/", "x"))

        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 10
        for slot in itertools.cycle(SLOTS):
            slots.swap(layout, slot)
            if slot == "green" and (len(statuses) > 1 or time.monotonic() > deadline):
                break
        ended.set()
        asking.join()
    assert statuses == {200, 201}
    assert layout.live_slot() == "green"
    assert layout.live_files.readlink() == layout.slots / "green"
    assert str(layout.live.readlink()) == "green.sock"  # relative: the folder may be seen under another path


def test_a_leftover_of_a_killed_swap_does_no_harm(layout: Layout) -> None:
    (layout.sockets / ".live.sock.new").symlink_to("blue.sock")
    slots.swap(layout, "green")
    assert layout.live_slot() == "green"


def test_the_deadline_follows_the_measured_starts(layout: Layout) -> None:
    app = config.decode(describe().encode(), layout.description)
    assert slots.deadline(app, []) == 60
    assert slots.deadline(app, [2.0, 3.0]) == 60
    assert slots.deadline(app, [2.0, 30.0]) == 90
    quick = msgspec.structs.replace(app, timeouts=msgspec.structs.replace(app.timeouts, start=5))
    assert slots.deadline(quick, [1.0, 3.0]) == 9


def test_a_slot_that_is_right_is_left_alone(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a boot with a full disk succeeds, and has systemd read nothing anew."""
    monkeypatch.setattr(systemd, "is_behind", lambda *_units: False)
    (layout.releases / "R1").mkdir()
    (layout.releases / "R1/settings.toml").write_text(describe())
    for path in (layout.releases / "R1/slot.conf", layout.drop_in("blue")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[Service]\n")
    (layout.slots / "blue").symlink_to("../releases/R1")
    before = (layout.slots / "blue").lstat().st_ino
    with no_room():
        slots.prepare(layout, "blue", "R1", 0)
    assert (layout.slots / "blue").lstat().st_ino == before


def test_the_idle_slot() -> None:
    assert [slots.other(slot) for slot in (None, "blue", "green")] == ["blue", "green", "blue"]
