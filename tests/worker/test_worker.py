"""The platform's Gunicorn worker behind the role's Nginx, both real, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pytest
from forge import timeouts

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".cache/app-venv/bin/python"
CLIENTS = 12
PROXY_IDLE = 1
"""Seconds; a shorter one than the chain's, so that a test can wait for it."""
pytestmark = pytest.mark.anyio

Answer = tuple[int, dict[str, str], bytes]


def render(template: str, **variables: Any) -> str:
    """Render a template as Ansible does."""
    environment = jinja2.Environment(  # noqa: S701 - configuration, not HTML
        loader=jinja2.FileSystemLoader(ROOT / "roles"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"comment": lambda text: f"# {text}", "to_json": json.dumps, "regex_escape": re.escape}
    return environment.get_template(template).render(ansible_managed="", **variables)


def entry(**changes: Any) -> dict[str, Any]:
    """What the templates read of an app, with a short timeout chain."""
    chain = {**timeouts.chain(10), **changes.pop("timeouts", {})}
    workers = {"count": changes.pop("workers", 2), "reasons": ["a test"]}
    app = {"name": "shop", "domain": "shop.test", "aliases": [], "max_body_kib": 64, "metrics_path": "/metrics"}
    # No limit that a test could meet.
    limits = dict.fromkeys(("requests_per_second", "burst", "concurrent_requests", "streams"), 50_000)
    app |= {"client_limits": limits, "content_security_policy": "", "body_limits": {}, "static": {}}
    app |= {"ready_path": "/ready", "health_path": "/health", "stream_timeout": 60, "websocket_timeout": 60}
    return {**app, "max_requests": 0, "timeouts": chain, "workers": workers, **changes}


def wait_until(condition: Any, what: str, seconds: float = 30) -> None:
    """Wait for a condition, and say what was missed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


@dataclass
class Slot:
    """One Gunicorn on a listener that outlives it, as systemd's does."""

    folder: Path
    app: dict[str, Any]
    boot_s: float = 0
    module: str = "service:app"
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        shutil.copy(ROOT / "roles/app/files/forge_worker.py", self.folder)
        conf = render("app/templates/gunicorn.conf.py.j2", app=self.app)
        lock = self.folder.parents[1] / "recycle.lock"
        lock.touch(0o444)
        conf += f"\nForgeWorker.LOCK = pathlib.Path({str(lock)!r})\n"
        (self.folder / "gunicorn.conf.py").write_text(conf)
        self.events_file = self.folder / "events"
        self.events_file.touch()
        self.socket = self.folder / "slot.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.socket))
        self.listener.listen(2048)

    def start(self) -> None:
        """Start Gunicorn and wait until all its workers serve."""
        before = len(self.events("serves"))
        self.launch()
        count = self.app["workers"]["count"]
        wait_until(lambda: len(self.events("serves")) >= before + count, f"{count} workers; {self.folder}/log")

    def launch(self) -> None:
        """Start Gunicorn."""
        passed = f'LISTEN_PID=$$ exec "$@" 3<&{self.listener.fileno()}'
        command = [str(PYTHON), "-m", "gunicorn", "-c", f"{self.folder}/gunicorn.conf.py", self.module]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{self.folder}:{Path(__file__).parent}",
            "PROMETHEUS_MULTIPROC_DIR": str(self.folder),
            "EVENTS": str(self.events_file),
            "BOOT_S": str(self.boot_s),
            "LISTEN_FDS": "1",
        }
        with (self.folder / "log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    ["bash", "-c", passed, "bash", *command],
                    pass_fds=[self.listener.fileno()],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def stop(self) -> float:
        """Ask Gunicorn to end, and return the seconds that it took."""
        began = time.monotonic()
        self.processes[-1].terminate()
        assert self.processes[-1].wait(20) == 0
        return time.monotonic() - began

    def events(self, kind: str = "") -> list[tuple[float, int, str]]:
        """What the workers told: time, process, event."""
        lines = [line.split() for line in self.events_file.read_text().splitlines()]
        return [(float(at), int(pid), event) for at, pid, event in lines if kind in ("", event)]

    def close(self) -> None:
        """Take everything away."""
        for process in self.processes:
            # The workers of a master that is killed would go on for ever.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.listener.close()


@dataclass
class Edge:
    """Nginx with the role's configuration, on a port of this machine."""

    folder: Path
    port: int
    nginx: list[str]

    @property
    def live(self) -> Path:
        """The symlink that Nginx follows."""
        return self.folder / "run/shop/live.sock"

    def point(self, target: Path) -> None:
        """Swap live.sock as a cutover does."""
        new = self.live.with_suffix(".new")
        new.symlink_to(target)
        new.replace(self.live)

    def processes(self) -> set[str]:
        """Nginx's workers."""
        master = (self.folder / "nginx.pid").read_text().strip()
        return set(Path(f"/proc/{master}/task/{master}/children").read_text().split())

    def log(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in (self.folder / "shop.json").read_text().splitlines()]


@pytest.fixture
def anyio_backend() -> str:
    """The loop that tests run on."""
    return "asyncio"


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    """Start Nginx; the templates are changed in addresses and folders alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "run/shop").mkdir(parents=True)
    (tmp_path / "forge").mkdir()
    (tmp_path / "denied.conf").touch()
    common = {
        "app": entry(timeouts={"proxy_idle": PROXY_IDLE}),
        "nginx_ipv6": False,
        "nginx_hsts_seconds": 0,
        "nginx_worker_connections": 512,
        "nginx_real_ip_from": [],
        "nginx_http3": False,
        "nginx_tls_source": "own_ca",
        "nginx_tls_profile": "modern",
        "__nginx_tls_profile": {"protocols": "TLSv1.3", "ciphers": []},
        "__nginx_tls_groups": ["X25519"],
        "__nginx_compressed": ["application/json"],
        "__nginx_headers": {},
        "__nginx_methods": ["[A-Z]+"],
        "__nginx_http2_directive": False,
        "__nginx_retry_after": 7,
        "__nginx_leaving": tmp_path / "leaving",
        "__nginx_utf8": ".*",
    }
    for template, path in {"nginx.conf": "nginx.conf", "site.conf": "forge/shop.conf"}.items():
        text = render(f"nginx/templates/{template}.j2", **common)
        for pattern, replacement in {
            r"^user .*": "user root;",  # of the folder that pytest made; no effect for anyone but root
            # With them the module for Brotli, which the developer's machine may not have.
            r"^ *brotli.*": "",
            r"^pid .*|^include modules.*|^ *ssl_certificate.*|^ *include conf\.d.*": "",
            r"listen 443 ssl http2;": f"listen 127.0.0.1:{port} backlog=1024;",
            r"listen 80;": f"listen unix:{tmp_path}/plain.sock;",
            r"/var/log/nginx/": f"{tmp_path}/",
            r"/run/(?=shop)": f"{tmp_path}/run/",
            r"worker_processes auto": "worker_processes 1",  # and so one pool
            r"error_log syslog\S*": f"error_log {tmp_path}/error.log",
            r"include mime.types;": "include /etc/nginx/mime.types;",
        }.items():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        if template == "nginx.conf":
            text = f"pid {tmp_path}/nginx.pid;\ndaemon off;\n" + text
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
                text = text.replace("http {", f"http {{\n    {kind}_temp_path {tmp_path}/{kind};", 1)
        (tmp_path / path).write_text(text)
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert nginx, "expected nginx; found none; run scripts/packages check"
    command = [nginx, "-p", str(tmp_path), "-c", "nginx.conf", "-e", f"{tmp_path}/error.log"]
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: (tmp_path / "nginx.pid").exists() and not process.poll(), "Nginx")
        yield Edge(tmp_path, port, command)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[Any]:
    """Make and start slots, and stop them at the end."""
    made: list[Slot] = []

    def make(name: str, boot_s: float = 0, **changes: Any) -> Slot:
        slot = Slot(tmp_path / "releases" / name, entry(**changes), boot_s)
        made.append(slot)
        slot.start()
        return slot

    yield make
    for slot in made:
        slot.close()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str = "/", body: bytes = b""
) -> Answer:
    """Send one request and read its whole answer; anything short of that is an error."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: shop.test\r\n{length}\r\n".encode() + body)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
    content = b""
    if "content-length" in headers:
        content = await reader.readexactly(int(headers["content-length"]))
    elif headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            content += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    return int(head[0].split()[1]), headers, content


async def once(port: int, method: str, path: str = "/", body: bytes = b"") -> Answer:
    """Ask on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await asyncio.wait_for(ask(reader, writer, method, path, body), 12)
    finally:
        writer.close()


@dataclass
class Load:
    """Keep-alive clients, half of whose requests are GETs and half POSTs: what they got."""

    port: int
    methods: tuple[str, ...] = ("GET", "POST")
    got: Counter[str] = field(default_factory=Counter)
    answered_by: Counter[int] = field(default_factory=Counter)
    stopped: bool = False

    async def _client(self, number: int) -> None:
        connection = None
        while not self.stopped:
            method = self.methods[(number + self.got.total()) % len(self.methods)]
            body = b"x" * 2000 if method == "POST" else b""
            try:
                connection = connection or await asyncio.open_connection("127.0.0.1", self.port)
                status, headers, content = await asyncio.wait_for(ask(*connection, method, body=body), 12)
                answer = json.loads(content) if status == 200 else {}
                whole = (answer.get("method"), answer.get("bytes")) == (method, len(body))
                self.got["ok" if whole else f"{method} {status}"] += 1
                if whole:
                    self.answered_by[answer["pid"]] += 1
            except (OSError, EOFError, TimeoutError) as error:
                self.got[f"{method} {type(error).__name__}"] += 1
                headers = {"connection": "close"}
            if headers.get("connection") == "close" and connection:
                connection[1].close()
                connection = None
            await asyncio.sleep(0.01)
        if connection:
            connection[1].close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Run for as long as the block takes."""
        tasks = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        try:
            yield self
        finally:
            self.stopped = True
            await asyncio.gather(*tasks)


def absent_at_once(slots: list[Slot]) -> int:
    """Most workers that were not serving at the same moment, after the first start of all."""
    count = sum(slot.app["workers"]["count"] for slot in slots)
    events = sorted(event for slot in slots for event in slot.events() if event[2] != "ended")
    absent, most, serving = 0, 0, 0
    for _, _, event in events:
        if event == "serves" and serving < count:
            serving += 1
            continue
        absent += 1 if event == "leaves" else -1
        most = max(most, absent)
    return most


async def test_recycling_loses_nothing_and_takes_turns(edge: Edge, slots: Any) -> None:
    """Two apps' workers reach their limits together under load; none leaves while another is away, all host-wide."""
    first, second = (slots(name, boot_s=0.2, max_requests=40) for name in ("one", "two"))
    edge.point(first.socket)
    async with Load(edge.port).running() as load:
        end = time.monotonic() + 30
        while any(len(slot.events("leaves")) < 2 for slot in (first, second)):
            assert time.monotonic() < end, "expected two recycled workers of each"
            for slot in (first, second):
                edge.point(slot.socket)
                await asyncio.sleep(0.3)
    assert load.got == {"ok": load.got["ok"]}
    assert absent_at_once([first, second]) == 1


async def test_no_worker_leaves_while_a_killed_sibling_is_away(edge: Edge, slots: Any) -> None:
    """Its limit is reached long before the successor of the other serves."""
    slot = slots("one", boot_s=0.8, max_requests=20)
    edge.point(slot.socket)
    killed = slot.events("serves")[0][1]
    os.kill(killed, signal.SIGKILL)
    async with Load(edge.port).running():
        await asyncio.to_thread(wait_until, lambda: slot.events("leaves"), "a worker that leaves")
    assert slot.events("leaves")[0][0] > slot.events("serves")[2][0]


async def test_drain_cuts_an_endless_stream_and_ends_in_order(edge: Edge, slots: Any) -> None:
    """At the limit, not at once and not when Gunicorn loses patience."""
    slot = slots("one", timeouts={"app_graceful": 1, "gunicorn_graceful": 30})
    edge.point(slot.socket)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(b"GET /stream HTTP/1.1\r\nHost: shop.test\r\nAccept: text/event-stream\r\n\r\n")
    await reader.readuntil(b"more")
    took = asyncio.create_task(asyncio.to_thread(slot.stop))
    with contextlib.suppress(ConnectionResetError):
        assert not (await reader.read()).endswith(b"\r\n0\r\n\r\n")
    assert 1 < await took < 20
    assert len(slot.events("ended")) == 2
    writer.close()


async def test_cutover_and_stop_lose_nothing(edge: Edge, slots: Any) -> None:
    """Though the old slot is told to stop at once. The log tells the releases apart; clients see none of that."""
    old, new = slots("20260101-000000-old"), slots("20260102-000000-new")
    edge.point(old.socket)
    async with Load(edge.port).running() as load:
        await asyncio.sleep(0.7)
        edge.point(new.socket)
        await asyncio.to_thread(old.stop)
        await asyncio.sleep(0.7)
    assert load.got == {"ok": load.got["ok"]}
    log = edge.log()
    assert {line["release"] for line in log} == {old.folder.name, new.folder.name}
    assert {(line["path"], line["user_agent"]) for line in log} == {("/", "")}
    _, headers, _ = await once(edge.port, "GET")
    assert not [name for name in headers if name.startswith("x-forge")]


async def test_slot_outlives_a_worker_of_an_app_without_metrics(slots: Any) -> None:
    """An app need not have prometheus_client: a worker that dies is replaced, and the stop is in order."""
    slot = slots("one")
    (slot.folder / "prometheus_client.py").write_text("raise ImportError")
    os.kill(slot.events("serves")[0][1], signal.SIGKILL)
    wait_until(lambda: len(slot.events("serves")) == 3, "a third worker")
    slot.stop()
    assert len(slot.events("ended")) == 2


async def test_log_is_json_when_one_worker_after_the_other_fails_to_boot(tmp_path: Path) -> None:
    """The second fails while Gunicorn already stops because of the first, and raises out of its main loop."""
    slot = Slot(tmp_path / "releases/one", entry(), module="broken:app")
    slot.launch()
    try:
        assert slot.processes[0].wait(30) != 0
    finally:
        slot.close()
    lines = [json.loads(line) for line in (slot.folder / "log").read_text().splitlines()]
    assert sum("exited with code 3" in line["message"] for line in lines) == 2


async def test_workers_can_be_told_apart(slots: Any) -> None:
    """On the slot's own socket each names itself, so that a gate can wait for all of them."""
    slot = slots("release")
    workers = {str(pid) for _, pid, _ in slot.events("serves")}
    seen: set[str] = set()
    async with asyncio.timeout(10):
        while seen != workers:
            reader, writer = await asyncio.open_unix_connection(slot.socket)
            _, headers, _ = await ask(reader, writer, "GET")
            writer.close()
            seen.add(headers["x-forge-worker"])


async def test_the_garbage_collector_leaves_alone_what_a_worker_started_with(slots: Any) -> None:
    """A whole collection would go through it in the middle of the first requests."""
    slot = slots("only", workers=1)
    reader, writer = await asyncio.open_unix_connection(slot.socket)
    _, _, body = await ask(reader, writer, "GET", "/collected")
    writer.close()
    assert json.loads(body)["collected"] is False


async def test_a_worker_that_stands_still_says_where(slots: Any) -> None:
    """As it is killed the way Gunicorn does it, by the line of its own code; another one takes its place."""
    slot = slots("only", workers=1)
    _, writer = await asyncio.open_unix_connection(str(slot.socket))
    writer.write(b"GET /block HTTP/1.1\r\nHost: shop.test\r\n\r\n")
    await writer.drain()
    await asyncio.sleep(1)
    ((_, worker, _),) = slot.events("serves")
    os.kill(worker, signal.SIGABRT)
    wait_until(lambda: len(slot.events("serves")) == 2, "its successor")
    writer.close()
    assert re.search(r'^  File ".*/service\.py", line \d+ in app$', (slot.folder / "log").read_text(), re.MULTILINE)


async def test_what_was_accepted_is_answered(slots: Any) -> None:
    """A request that arrives after the signal on a connection from before it, which ends with the answer."""
    slot = slots("one")
    reader, writer = await asyncio.open_unix_connection(slot.socket)
    await asyncio.sleep(0.1)
    stopped = asyncio.create_task(asyncio.to_thread(slot.stop))
    await asyncio.sleep(0.2)
    status, headers, _ = await ask(reader, writer, "POST", body=b"order")
    assert (status, headers["connection"]) == (200, "close")
    writer.close()
    await stopped


async def test_restart_on_the_same_listener_loses_nothing(edge: Edge, slots: Any) -> None:
    """What nobody accepted waits for the next Gunicorn."""
    slot = slots("one")
    edge.point(slot.socket)
    async with Load(edge.port).running() as load:
        await asyncio.sleep(0.5)
        await asyncio.to_thread(slot.stop)
        await asyncio.to_thread(slot.start)
        await asyncio.sleep(0.5)
    assert load.got == {"ok": load.got["ok"]}
    assert len(load.answered_by) == 4


@dataclass
class Recorder:
    """An upstream that says on which connection each request came, and closes under some of them."""

    closes_second: bool = False
    closes_all: bool = False
    methods: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer until the other side closes."""
        self.writers.append(writer)
        number = len(self.writers)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                self.methods[number].append(head.split()[0])
                if self.closes_all or (self.closes_second and len(self.methods[number]) == 2):
                    break
                if length := re.search(r"content-length: (\d+)", head, re.IGNORECASE):
                    await reader.readexactly(int(length[1]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    @contextlib.asynccontextmanager
    async def running(self, edge: Edge) -> AsyncIterator[Recorder]:
        """Listen where Nginx looks."""
        server = await asyncio.start_unix_server(self.serve, edge.folder / "recorder.sock")
        edge.point(edge.folder / "recorder.sock")
        async with server:
            try:
                yield self
            finally:
                for writer in self.writers:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()


async def test_only_what_may_be_sent_again_is_pooled(edge: Edge) -> None:
    """With connections in the pool, and an app that keeps every connection open."""
    may, may_not = ["GET", "HEAD", "OPTIONS"], ["POST", "PUT", "PATCH", "DELETE", "CUSTOM"]
    async with Recorder().running(edge) as recorder:
        for method in [*may, *may_not] * 4:
            assert (await once(edge.port, method))[0] == 200
    connections = list(recorder.methods.values())
    assert Counter(map(tuple, connections)) >= Counter({(method,): 4 for method in may_not})
    pooled = [methods for methods in connections if not set(methods) & set(may_not)]
    assert {method for methods in pooled for method in methods[1:]} == set(may)
    assert len(pooled) == 1


async def test_streams_are_not_pooled(edge: Edge) -> None:
    """A stream's connection is its own from its first byte to its last."""
    async with Recorder().running(edge) as recorder:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        for _ in range(3):
            writer.write(b"GET /stream HTTP/1.1\r\nHost: shop.test\r\nAccept: text/event-stream\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        writer.close()
    assert list(recorder.methods.values()) == [["GET"]] * 3


async def test_a_closed_pooled_connection_costs_no_request(edge: Edge) -> None:
    """The app closes each at its second request: a GET goes elsewhere, a POST was never there."""
    async with Recorder(closes_second=True).running(edge) as recorder:
        assert [(await once(edge.port, method))[0] for method in ["GET", "POST"] * 6] == [200] * 12
    assert ["GET", "GET"] in recorder.methods.values()


async def test_a_post_is_sent_once(edge: Edge) -> None:
    """Whatever becomes of it."""
    async with Recorder(closes_all=True).running(edge) as recorder:
        assert (await once(edge.port, "POST", body=b"order"))[0] == 502
    assert list(recorder.methods.values()) == [["POST"]]


async def test_pool_leaves_a_slot_in_time(edge: Edge) -> None:
    """Steady traffic keeps no connection to the old one in the pool for longer than the chain allows for."""
    async with Recorder().running(edge) as old:
        await once(edge.port, "GET")
        async with Recorder().running(edge) as new:
            swapped = time.monotonic()
            last = swapped
            while time.monotonic() < swapped + 2 * PROXY_IDLE + 2:
                before = sum(map(len, old.methods.values()))
                await once(edge.port, "GET")
                if sum(map(len, old.methods.values())) > before:
                    last = time.monotonic()
                await asyncio.sleep(0.1)
    assert 0 < last - swapped < 2 * PROXY_IDLE + 1
    assert new.methods


async def test_maintenance_answers_for_the_app(edge: Edge) -> None:
    """With a time to come back and the form of the app's errors, on every path, while the file is there."""
    flag = edge.live.parent / "maintenance"
    async with Recorder().running(edge) as recorder:
        flag.touch()
        for method, path in [("GET", "/"), ("POST", "/v1/events"), ("GET", "/health"), ("GET", "/ready")]:
            status, headers, content = await once(edge.port, method, path)
            assert (status, headers["retry-after"]) == (503, "7")
            assert headers["content-type"] == "application/problem+json"
            assert json.loads(content)["status"] == 503
        assert not recorder.methods
        flag.unlink()
        status, headers, _ = await once(edge.port, "GET")
        assert (status, "retry-after" in headers) == (200, False)


async def test_reload_closes_no_connection_that_is_in_use(edge: Edge, slots: Any) -> None:
    """Every client is told in an answer that its connection ends, and afterwards no answer says so."""
    slot = slots("one")
    edge.point(slot.socket)
    flag = edge.folder / "leaving"
    script = ROOT / "roles/nginx/files/forge-nginx-reload"
    reload = [str(script), str(flag), "1", str(edge.port), *edge.nginx, "-s", "reload"]
    before = edge.processes()
    async with Load(edge.port).running() as load:
        await asyncio.sleep(0.5)
        await asyncio.to_thread(subprocess.run, reload, check=True)
        await asyncio.sleep(0.3)
    assert load.got == {"ok": load.got["ok"]}
    assert not before & edge.processes()
    assert not flag.exists()
    _, headers, _ = await once(edge.port, "GET")
    assert headers["connection"] == "keep-alive"


def asked(slot: Slot, method: str) -> list[tuple[int, str, bytes]]:
    """Ask a slot many times: status, worker, body."""
    found = []
    for _ in range(60):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(slot.socket))
        connection.request(method, "/")
        answer = connection.getresponse()
        found.append((answer.status, answer.headers["X-Forge-Worker"], answer.read()))
        connection.close()
    return found


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_the_server_answers_for_an_app_without_a_path(tmp_path: Path, parser: str) -> None:
    """Each worker by itself, once the app has started; the app itself sees no such request, and every other."""
    slot = Slot(tmp_path / "slots/blue", entry(ready_path="", health_path=""), boot_s=1)
    with (slot.folder / "gunicorn.conf.py").open("a") as conf:
        conf.write(f'\nWorker.CONFIG_KWARGS["http"] = "{parser}"\n')
    try:
        began = time.monotonic()
        slot.launch()
        answers = asked(slot, "TRACE")
        assert time.monotonic() - began > 1
        assert {(status, body) for status, _, body in answers} == {(200, b"")}
        assert {worker for _, worker, _ in answers} <= {str(pid) for _, pid, _ in slot.events("serves")}
        assert {json.loads(body)["method"] for _, _, body in asked(slot, "GET")} == {"GET"}
    finally:
        slot.close()


def test_an_app_with_its_paths_gets_every_request(tmp_path: Path) -> None:
    """Nothing stands between it and the server."""
    slot = Slot(tmp_path / "slots/blue", entry())
    try:
        slot.start()
        assert {json.loads(body)["method"] for _, _, body in asked(slot, "TRACE")} == {"TRACE"}
    finally:
        slot.close()
