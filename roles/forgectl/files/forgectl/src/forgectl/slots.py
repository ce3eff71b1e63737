"""The two slots of an app: their units, their readiness, and which one live.sock leads to."""

import http.client
import socket
import time
from pathlib import Path

from forgectl import commands, config, hints, sealed, systemd
from forgectl.config import App
from forgectl.errors import CandidateFailed, Refused
from forgectl.layout import SLOTS, Layout, fsync, replace_symlink, write_atomically

POLL_SECONDS = 0.05
# A call of systemctl takes more of the CPU than a question to the slot, and what starts needs all of it.
UNIT_SECONDS = 0.25
NEXT_WORKER_SECONDS = 0.01
PROBE_TIMEOUT_SECONDS = 2.0
# systemd's CPUWeight=: what serves goes before what starts.
STARTING_WEIGHT, SERVING_WEIGHT = 20, 100


# What Nginx passes on for nobody, so that only forgectl asks: gunicorn.conf.py answers it for an app without a path.
SERVER_METHOD = "TRACE"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def probe(path: Path, url: str, host: str, timeout: float = PROBE_TIMEOUT_SECONDS) -> int | None:
    """Ask a slot over its own socket, as Nginx would: the status, or None when nothing answers in `timeout` seconds.

    Without a `url` a worker's server is asked, and not the app.
    """
    return _ask(path, url, host, timeout)[0]


def _ask(path: Path, url: str, host: str, timeout: float) -> tuple[int | None, str | None]:
    """The status, and which worker gave it; a release from before workers said so does not."""
    connection = _UnixConnection(path, timeout)
    try:
        method = "GET" if url else SERVER_METHOD
        connection.request(
            method, url or "/", headers={"Host": host, "X-Forwarded-Proto": "https", "Connection": "close"}
        )
        answer = connection.getresponse()
        return answer.status, answer.headers["X-Forge-Worker"]
    except (OSError, http.client.HTTPException):
        return None, None
    finally:
        connection.close()


def other(slot: str | None) -> str:
    """The slot that a release goes to when `slot` serves."""
    return SLOTS[1] if slot == SLOTS[0] else SLOTS[0]


def prepare(layout: Layout, slot: str, release: str, secrets: int) -> None:
    """Point a slot at a release and a version of the secrets, and give its unit that release's limits and sandbox.

    With the version that was checked, a slot that systemd restarts does not meet a newer one that nobody has tried.
    """
    body = (layout.releases / release / "slot.conf").read_bytes()
    # What is right already is left alone: a boot with a full disk then writes nothing.
    if layout.slot_release(slot) != release:
        replace_symlink(layout.slots / slot, f"../releases/{release}")
        fsync(layout.slots)
    if config.load(layout.settings(release)).secrets.source == "systemd_creds":
        sealed.pin(layout, slot, secrets)
    else:
        sealed.unpin(layout, slot)
    pin, version = layout.pin(slot), str(secrets)
    if not secrets:
        pin.unlink(missing_ok=True)
    elif not pin.exists() or pin.read_text() != version:
        write_atomically(pin, version.encode(), 0o644)
    drop_in = layout.drop_in(slot)
    changed = commands.write(layout, slot, release)
    if not drop_in.exists() or drop_in.read_bytes() != body:
        drop_in.parent.mkdir(mode=0o755, exist_ok=True)
        write_atomically(drop_in, body, 0o644)
        changed = True
    if changed or systemd.is_behind(layout.service(slot), *layout.command_units(slot)):
        systemd.daemon_reload()


def settings(layout: Layout, slot: str) -> App:
    """The settings of the release in a slot, which may differ from the newest description of the app.

    Raises:
        Refused: no release was ever put there, or its settings are gone.
    """
    release = layout.slot_release(slot)
    if release is None:
        raise Refused(f"expected a release in {layout.slots / slot}; found none; release one")
    return config.load(layout.settings(release))


def start(layout: Layout, slot: str) -> None:
    """Open a slot's listener and ask for its service."""
    systemd.start(layout.socket_unit(slot))
    systemd.start(layout.service(slot), block=False)


def stop(layout: Layout, slot: str) -> None:
    """Stop a slot: its service and its commands end gracefully, then its listener closes.

    The socket unit is named first: the service requires it and comes after it, so one transaction stops the service and
    then the socket. Stopping only the service first would let a late connection start it again; closing the listener
    while the service still answers would reset whatever waits in its queue.
    """
    # A slot that never ran a release has no [Service] body, so systemd does not even load its service.
    service = [layout.service(slot)] if layout.drop_in(slot).exists() else []
    systemd.stop(layout.socket_unit(slot), *service, *layout.command_units(slot))
    if layout.lease_template.exists():
        # Only now: nothing uses the database user any more, and a fresh slot shall get a fresh one.
        systemd.stop(layout.lease_unit(slot))


def deadline(app: App, starts: list[float]) -> float:
    """Seconds that a new slot may take to get ready: thrice the slowest of the last starts, at least timeouts.start.

    One that crashes is noticed at once, so this only bounds one that hangs: a tight limit would refuse good releases on
    a busy host and gain nothing.
    """
    return max(app.timeouts.start, 3 * max(starts, default=0.0))


def wait_ready(layout: Layout, slot: str, limit: float) -> float:
    """Wait until every worker of a started slot answers its readiness path with 200; returns the seconds that took.

    Of an app without such a path each worker has to take requests, which it does once the app has started.

    One alone would get the traffic of all while the others still import the app.

    Raises:
        CandidateFailed: its service failed or was restarted, or `limit` seconds passed.
    """
    app = settings(layout, slot)
    began, wall = time.monotonic(), time.time() - 0.05
    status: int | None = None
    ready: set[str] = set()
    found = ""
    unit: dict[str, str] = {}
    look = began
    while not found:
        if time.monotonic() >= look:
            unit = systemd.show(layout.service(slot))
            look = time.monotonic() + UNIT_SECONDS
        # With a job queued it has not begun yet.
        ended = unit["ActiveState"] in ("failed", "inactive") and unit["Job"] == "0"
        # A unit that restarts for ever is never "failed" for long: one restart is the failure of a candidate.
        if ended or unit["SubState"] == "auto-restart" or unit["NRestarts"] != "0":
            found = f"it ended ({unit['Result']}, exit status {unit['ExecMainStatus']})"
            continue
        left = limit - (time.monotonic() - began)
        if left <= 0:
            found = f"{app.readiness} " + (f"answers {status}" if status else "does not answer")
            if ready:
                found += f", and {len(ready)} of {app.workers.count} workers were ready"
            continue
        status, worker = _ask(layout.socket(slot), app.ready_path, app.domain, min(left, PROBE_TIMEOUT_SECONDS))
        if status == 200 and not (worker and hints.is_orphan(worker)):
            ready.add(worker or "")
            if worker is None or len(ready) >= app.workers.count:
                return time.monotonic() - began
            # Whichever worker is quicker takes a connection: the next one may get another.
            time.sleep(NEXT_WORKER_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
    lines = systemd.journal(layout.service(slot), wall)
    meant = hints.of_log(app, lines) or hints.of_processes(app, layout.service(slot), unit["MainPID"])
    if meant := meant or hints.of_end(app, unit):
        found += f"; {meant}"
    raise CandidateFailed(
        f"expected {app.readiness} of {layout.service(slot)} to answer 200 within {limit:.0f} s; found: {found}", lines
    )


def swap(layout: Layout, slot: str) -> None:
    """Send all new connections to a slot: one atomic rename, and Nginx is none the wiser.

    Its static files come first: a page of the new release must not find those of the old one under their names.
    """
    serve_files(layout, slot)
    replace_symlink(layout.live, f"{slot}.sock")


def serves_files(layout: Layout, slot: str) -> bool:
    """Tell whether Nginx looks for static files in a slot first."""
    return layout.live_files.is_symlink() and layout.live_files.readlink() == layout.slots / slot


def serve_files(layout: Layout, slot: str) -> None:
    """Have Nginx look for static files in a slot first."""
    replace_symlink(layout.live_files, str(layout.slots / slot))


def trouble(layout: Layout, slot: str) -> str:
    """What keeps a slot from serving, in words; empty when nothing does."""
    app = settings(layout, slot)
    unit = systemd.show(layout.service(slot))
    if unit["ActiveState"] != "active":
        return f"{layout.service(slot)} ended ({unit['Result']}, exit status {unit['ExecMainStatus']})"
    status = probe(layout.socket(slot), app.ready_path, app.domain)
    if status == 200:
        return ""
    return f"{app.readiness} " + (f"answers {status}" if status else "does not answer")


def restarts(layout: Layout, slot: str) -> int:
    """How often systemd restarted the service of a slot since it was started."""
    return int(systemd.show(layout.service(slot))["NRestarts"])


def is_up(layout: Layout, slot: str) -> bool:
    """Whether the service of a slot is up."""
    return systemd.show(layout.service(slot))["ActiveState"] == "active"


def maintenance(layout: Layout, on: bool) -> None:
    """Let Nginx answer every request with the maintenance page, or no more.

    Two modes share the page, so who ends one of them asks `State.page` about the other.
    """
    if on:
        layout.maintenance.touch(mode=0o644)
    else:
        layout.maintenance.unlink(missing_ok=True)


def drain(layout: Layout, slot: str) -> None:
    """Stop a slot that gets no new connections any more, after what it has is done.

    Connections that were made before the swap may still wait to be accepted. The queue of a listener is first in, first
    out: once a connection of our own is answered, all before it were accepted, and a graceful stop finishes those. And
    Nginx keeps connections that it made before: it leaves them within `pool_exit`.
    """
    if is_up(layout, slot):
        app = settings(layout, slot)
        time.sleep(app.timeouts.pool_exit)
        probe(layout.socket(slot), app.health_path, app.domain, app.timeouts.request)
    stop(layout, slot)


def ensure_socket_folder(layout: Layout) -> None:
    """Make sure that /run/NAME is there, which provisioning declares to systemd-tmpfiles."""
    if not layout.sockets.is_dir():
        systemd.run("systemd-tmpfiles", "--create", f"--prefix={layout.sockets}")
    if not layout.sockets.is_dir():
        raise Refused(f"expected the folder {layout.sockets}; found none; run site.yml, which declares it")
