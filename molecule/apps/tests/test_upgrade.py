"""Every app changes and goes back while all are in use: no client of any of them notices."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from forge_apps import CA, LOCKS, SETTLED, SOURCES, beats, browser, deployed, domain, entries, record, state, trail
from forge_load import Result, Running
from forge_pages import Page, browsing
from forge_public import PUBLIC, RASTER, UPGRADES, player, told, version
from forge_scenario import playbook, until
from forge_sources import commit, git
from forge_wire import address
from testinfra.host import Host
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

RATE = 5.0
"""Requests a second, of each app at the same time; a tile is cut for every other one of titiler's."""
CHANGED = (*PUBLIC, "plain", "inbox")
"""All but the rogue."""
REPOSITORY = SOURCES / "repository"


def ending(connection: ClientConnection) -> int:
    """Wait for the other side to close a connection; the code that it gives, 0 for none."""
    try:
        while True:
            connection.recv(timeout=SETTLED)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else 0


def pages(fractal: dict[str, str], timetagger: dict[str, str]) -> dict[str, list[Page]]:
    """What is asked of each app under load, and what it answers."""
    tile = f"/cog/tiles/WebMercatorQuad/1/1/0.png?url={RASTER}&rescale=0,64800"
    return {
        "inbox": [Page("/ready", b"ready"), Page("/v1/events?limit=1", b'"events":')],
        "fractal": [Page("/api/alive/", b'"alive":true'), Page("/auth/group/", b'"name":"group ', (*fractal.items(),))],
        "titiler": [Page(f"/cog/point/10.5,20.5?url={RASTER}", b"25030"), Page(tile, b"\x89PNG")],
        "hexgame": [Page("/health", b'"ok"'), Page("/slots", b'"slot_id":1')],
        "timetagger": [
            Page("/timetagger/status", b"ok"),
            Page("/timetagger/api/v2/records?timerange=1699999999-1700003601", b"#work ", (*timetagger.items(),)),
        ],
        "httpbin": [Page("/get?a=1", b'"a":"1"'), Page("/drip?numbytes=2000&duration=0.2&delay=0", b"*" * 2000)],
        "plain": [Page("/", b'"greeting":"hello"')],
        "rogue": [Page("/ready", b'"from_c": 42')],
    }


@pytest.fixture
def crowd(
    host: Host,
    raster: Callable[[Host], str],
    administrator: Callable[[Host], dict[str, str]],
    tracker: Callable[[Host], dict[str, str]],
) -> Callable[[], Any]:
    """Put every app of the host under load at once."""
    raster(host)
    asked = pages(administrator(host), tracker(host))

    @contextmanager
    def around() -> Iterator[dict[str, Result]]:
        results: dict[str, Result] = {}
        with ExitStack() as stack:
            loads: dict[str, Running] = {
                app: stack.enter_context(browsing(address(host), domain(host, app), CA, each, rate=RATE, clients=8))
                for app, each in asked.items()
            }
            time.sleep(2)
            yield results
            until(lambda: all(state(host, app)["operation"] is None for app in asked), SETTLED, every=3)
            time.sleep(2)
        results.update({app: load.result for app, load in loads.items()})

    return around


def assert_unnoticed(results: dict[str, Result]) -> None:
    """Every request of every app was answered as it should, and there were enough to tell."""
    assert {app: result.counts() for app, result in results.items() if result.failed} == {}
    for app, result in results.items():
        assert len(result.records) > 0.9 * RATE * (result.ended - result.began) - 5, f"the load on {app} stood still"


def upgraded(host: Host, plain: Path) -> dict[str, Any]:
    """The inventory's apps with their next versions, and a second worker for the one that has made its key."""
    apps = entries(host)
    for app, (package, old, new) in UPGRADES.items():
        apps[app]["source"] = apps[app]["source"].replace(old, new)
        assert package in apps[app]["source"]
    apps["timetagger"]["workers"] = 2
    apps["titiler"]["settings"]["GDAL_CACHEMAX"] = 32
    apps["plain"]["source"] = str(plain)
    return apps


def drip(host: Host, seconds: int) -> bytes:
    """A download that takes so long."""
    with browser(host, "httpbin") as client:
        return client.get("/drip", params={"numbytes": 40, "duration": seconds, "delay": 0}).content


@pytest.fixture
def moved() -> Iterator[tuple[str, str]]:
    """Have the branch of the inbox moved for a while, and the locks that are resolved meanwhile with it."""
    kept = {path: path.read_text() for path in LOCKS.iterdir()}
    old = git(REPOSITORY, "rev-parse", "HEAD")
    (REPOSITORY / "backend" / "NOTE").write_text(f"after {old}\n")
    yield old, commit(REPOSITORY, "second")
    git(REPOSITORY, "reset", "--quiet", "--hard", old)
    for path, text in kept.items():
        path.write_text(text)


def live(host: Host) -> dict[str, str]:
    """The live release of every app."""
    return {app: state(host, app)["live"]["release"] for app in entries(host)}


def assert_beats(host: Host, new: str, old: str) -> None:
    """What runs beside the server went with the release: begun with the new one, and then ended with the old one."""
    assert set(beats(host)) == {f"plain.beat@{state(host, 'plain')['live']['slot']}.service"}
    assert [step[1:] for step in trail(host, "beat")[-2:]] == [(new, "began"), (old, "ended")]
    until(lambda: trail(host, "tick")[-1][1] == new, 20, every=0.5)


def test_upgrade_and_rollback_under_load(
    host: Host,
    crowd: Callable[[], Any],
    tracker: Callable[[Host], dict[str, str]],
    source: Path,
    moved: tuple[str, str],
) -> None:
    """One run for all: no client of any app notices, there or back, and what was stored is there all the time."""
    before, wheel = live(host), record(host, "httpbin")
    lock = (LOCKS / "httpbin.txt").read_text()
    plan = deployed("--check", "--diff", only="inbox")
    assert f"source commit: {moved[0]} -> {moved[1]}" in plan
    assert re.search(r"(added|changed): NOTE", plan)
    assert live(host) == before

    with crowd() as going, player(host) as stranded, ThreadPoolExecutor() as threads:
        told(stranded, "joined")
        download = threads.submit(drip, host, 15)
        deployed("--extra-vars", "no_wait=true", only=",".join(CHANGED), apps=upgraded(host, source))
        # One that takes less than a request may is answered whole, on the old release.
        assert download.result() == b"*" * 40
        # A WebSocket may last longer than that. It is told to come back, and holds nobody up.
        assert ending(stranded) == 1012
    assert_unnoticed(going)
    after = live(host)
    assert {app for app in after if after[app] != before[app]} == set(CHANGED)
    assert {app: version(host, app) for app in UPGRADES} == {app: new for app, (_, _, new) in UPGRADES.items()}
    assert record(host, "inbox")["source"]["commit"] == moved[1]
    with browser(host, "fractal") as client:
        assert client.get("/api/alive/").json() == {"alive": True, "version": UPGRADES["fractal"][2]}
    # Both workers have the key that one made.
    with browser(host, "timetagger", headers=tracker(host)) as client:
        for _ in range(12):
            assert client.get("/timetagger/api/v2/settings", headers={"connection": "close"}).status_code == 200
    # A wheel is an environment of its own, though its dependencies and so the lock that is kept are the same.
    assert record(host, "httpbin")["venv"] != wheel["venv"]
    assert (LOCKS / "httpbin.txt").read_text() == lock
    assert_beats(host, after["plain"], before["plain"])

    with crowd() as back:
        for app in CHANGED[:-1]:
            host.check_output("forgectl rollback %s --no-wait --json", app)
        # As a person would from the control machine.
        run = playbook("--extra-vars", "only=inbox", name="playbooks/rollback.yml")
        assert run.returncode == 0, run.stdout
    assert_unnoticed(back)
    assert live(host) == before
    assert {app: version(host, app) for app in UPGRADES} == {app: old for app, (_, old, _) in UPGRADES.items()}
    assert record(host, "inbox")["source"]["commit"] == moved[0]
    assert record(host, "httpbin")["venv"] == wheel["venv"]
    assert_beats(host, before["plain"], after["plain"])


def test_shutdown_of_each_ran_to_its_end(host: Host) -> None:
    """What was replaced above left in order: no worker was killed, with streams open or not."""
    for app in PUBLIC:
        log = host.check_output("journalctl --no-pager --output=cat --unit=%s", f"{app}@*.service")
        # Or else there would be nothing to see.
        assert "Stopped" in log
        assert "SIGKILL" not in log
        assert "Failed with result" not in log
