"""Apps that nobody here wrote: each is judged by its own answers, and changes under load without losing any."""

from __future__ import annotations

import base64
import copy
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import hvac
import pytest
from forge_load import Result, Running
from forge_pages import Page, browsing
from forge_scenario import ToHost, playbook, secrets_at, until
from testinfra.host import Host
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

CA = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem"
UPGRADES = {
    "fractal": ("fractal-server", "2.18.4", "2.18.5"),
    "hexgame": ("hexgame-server", "0.4.1", "0.4.3"),
    "timetagger": ("timetagger", "26.1.2", "26.1.3"),
    "httpbin": ("httpbinx", "1.13.0", "1.13.1"),
}
"""Package, the version of the inventory, and the next one. titiler gets another setting: its environment is large."""
PUBLIC = (*UPGRADES, "titiler")
RATE = 5.0
"""Requests a second, of each app at the same time; a tile is cut for every other one of titiler's."""
SETTLED = 120.0
"""Seconds within which every cutover has its verdict."""

EMAIL, PASSWORD = "admin@example.org", "correct horse"  # pragma: allowlist secret
RASTER = "/var/lib/titiler/degrees.tif"
# A raster of the whole world, whose value counts the degrees from its north-western corner.
MAKE_RASTER = """
import sys, numpy, rasterio
from rasterio.transform import from_bounds
values = numpy.arange(180 * 360, dtype="uint16").reshape(180, 360)
form = {"driver": "COG", "height": 180, "width": 360, "count": 1, "dtype": "uint16", "crs": "EPSG:4326"}
with rasterio.open(sys.argv[1], "w", transform=from_bounds(-180, -90, 180, 90, 360, 180), **form) as file:
    file.write(values, 1)
"""
VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


def address(host: Host) -> str:
    """Where the host is."""
    return str(host.ansible.get_variables()["ansible_host"])


@contextmanager
def browser(host: Host, app: str, **options: Any) -> Iterator[httpx.Client]:
    """A client of an app, through Nginx and TLS."""
    transport = ToHost(address(host), verify=ssl.create_default_context(cafile=CA))
    with httpx.Client(base_url=f"https://{app}.example.com", transport=transport, timeout=30, **options) as client:
        yield client


def status(host: Host, app: str) -> dict[str, Any]:
    """What forgectl knows of an app."""
    found: dict[str, Any] = json.loads(host.check_output("forgectl status %s --json", app))
    return found


def run_inside(host: Host, app: str, *arguments: str, **environment: str) -> str:
    """Run the Python of an app's live release as the app's user."""
    python = f"/srv/{app}/slots/{status(host, app)['live']['slot']}/venv/bin/python"
    command = ["env", "--chdir=/", *(f"{name}={value}" for name, value in environment.items()), python, *arguments]
    return str(host.check_output(f"runuser --user {app} --{' %s' * len(command)}", *command))


def version(host: Host, app: str) -> str:
    """The version of the app that is live, as its installed package says."""
    return run_inside(host, app, "-c", VERSION, UPGRADES[app][0]).strip()


@pytest.fixture(scope="session")
def raster() -> Callable[[Host], str]:
    """Make what titiler shall serve, in its state folder, with the GDAL that it came with."""
    made: list[str] = []

    def make(host: Host) -> str:
        if not made:
            run_inside(host, "titiler", "-c", MAKE_RASTER, RASTER)
            made.append(RASTER)
        return RASTER

    return make


@pytest.fixture(scope="session")
def administrator(vault: hvac.Client) -> Callable[[Host], dict[str, str]]:
    """Log in at fractal as its first user, whom its own command makes, as its documentation asks for."""
    headers: dict[str, str] = {}

    def log_in(host: Host) -> dict[str, str]:
        if not headers:
            kept = secrets_at(vault, "forge/fractal/app")
            run_inside(
                host,
                "fractal",
                *("-m", "fractal_server", "init-db-data"),
                *("--admin-email", EMAIL, "--admin-pwd", PASSWORD, "--admin-project-dir", "/var/lib/fractal"),
                LANG="C.UTF-8",
                JWT_SECRET_KEY=kept["signing_key"],
                POSTGRES_HOST="/var/run/postgresql",
                POSTGRES_DB="fractal",
                POSTGRES_USER=kept["database_user"],
                POSTGRES_PASSWORD=kept["database_password"],
            )
            with browser(host, "fractal") as client:
                answer = client.post("/auth/token/login/", data={"username": EMAIL, "password": PASSWORD})
                headers["authorization"] = f"Bearer {answer.raise_for_status().json()['access_token']}"
        return headers

    return log_in


@pytest.fixture(scope="session")
def tracker() -> Callable[[Host], dict[str, str]]:
    """Log in at timetagger."""
    headers: dict[str, str] = {}

    def log_in(host: Host) -> dict[str, str]:
        if not headers:
            with browser(host, "timetagger") as client:
                headers["authtoken"] = said(client, PASSWORD).raise_for_status().json()["token"]
        return headers

    return log_in


def said(client: httpx.Client, password: str) -> httpx.Response:
    """What timetagger answers to a password."""
    claim = {"method": "usernamepassword", "username": "tester", "password": password}
    body = base64.b64encode(json.dumps(claim).encode())
    return client.post("/timetagger/api/v2/bootstrap_authentication", content=body)


def record(key: str) -> dict[str, Any]:
    """An hour's work, as timetagger knows it."""
    return {"key": key, "mt": 1_700_000_000, "t1": 1_700_000_000, "t2": 1_700_003_600, "ds": f"#work {key}"}


@contextmanager
def player(host: Host) -> Iterator[ClientConnection]:
    """Somebody who looks for an opponent."""
    with connect(
        "wss://hexgame.example.com/ws/matchmake?board_size=7",
        sock=socket.create_connection((address(host), 443), timeout=20),
        ssl=ssl.create_default_context(cafile=CA),
        server_hostname="hexgame.example.com",
        open_timeout=20,
        close_timeout=2,
    ) as connection:
        yield connection


def told(connection: ClientConnection, kind: str) -> dict[str, Any]:
    """The next message of a kind."""
    while True:
        message = json.loads(connection.recv(timeout=20))
        assert message["type"] != "error", message
        if message["type"] == kind:
            return dict(message["payload"])


def ending(connection: ClientConnection) -> int:
    """Wait for the other side to close a connection; the code that it gives, 0 for none."""
    try:
        while True:
            connection.recv(timeout=SETTLED)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else 0


def move(connection: ClientConnection, q: int, r: int) -> None:
    """Put a stone on the board."""
    connection.send(json.dumps({"type": "move", "payload": {"q": q, "r": r}}))


def test_each_is_as_it_was_published(host: Host) -> None:
    """The version of the entry, from the index; what serves it is its own Gunicorn, or the platform's."""
    assert {app: version(host, app) for app in UPGRADES} == {app: old for app, (_, old, _) in UPGRADES.items()}
    for app in PUBLIC:
        source = status(host, app)["source"]
        entry = host.ansible.get_variables()["apps"][app]["source"]
        assert f"{source['name']}=={source['version']}" in (entry, entry.replace(".application", "-application"))
    gunicorn = {app: run_inside(host, app, "-c", VERSION, "gunicorn").strip() for app in ("fractal", "timetagger")}
    assert gunicorn["fractal"].split(".")[0] == "23"
    assert gunicorn["timetagger"].split(".")[0] != "23"


def test_database_app_keeps_what_it_is_told(host: Host, administrator: Callable[[Host], dict[str, str]]) -> None:
    """fractal: a group that is made through one worker is there for both, and in the table that its migrations made."""
    headers = administrator(host)
    with browser(host, "fractal", headers=headers) as client:
        made = client.post("/auth/group/", json={"name": f"group {time.time()}"})
        assert made.status_code == 201, made.text
        for _ in range(8):
            assert made.json()["name"] in {group["name"] for group in client.get("/auth/group/").json()}
        assert client.get("/auth/current-user/").json()["email"] == EMAIL
        assert client.get("/auth/group/", headers={"authorization": "Bearer none"}).status_code == 401
    query = f"SELECT name FROM usergroup WHERE id = {made.json()['id']}"
    ask = "runuser --user postgres -- psql --no-psqlrc -tA fractal --command %s"
    assert host.check_output(ask, query) == made.json()["name"]
    owners = host.check_output(ask, "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    # The app itself can't change its schema.
    assert "fractal_app" not in owners.split()


def test_native_app_cuts_tiles(host: Host, raster: Callable[[Host], str]) -> None:
    """titiler: the value at a place, a summary over all of them, and a PNG of 256 pixels."""
    source = raster(host)
    with browser(host, "titiler", params={"url": source}) as client:
        point = client.get("/cog/point/10.5,20.5").raise_for_status().json()
        # 69 rows below the north pole, 190 columns east of the date line.
        assert point["values"] == [69 * 360 + 190]
        assert client.get("/cog/statistics").raise_for_status().json()["b1"]["mean"] == 32399.5
        tile = client.get("/cog/tiles/WebMercatorQuad/1/1/0.png", params={"rescale": "0,64800"})
        assert tile.headers["content-type"] == "image/png"
        assert tile.content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", tile.content[16:24]) == (256, 256)
        nothing = client.get("/cog/info", params={"url": "/var/lib/titiler/none.tif"})
        assert nothing.status_code >= 400
        # What the sandbox keeps from it is not there, whatever a client asks it to open.
        assert client.get("/cog/info", params={"url": "/var/lib/fractal"}).status_code >= 400


def test_websocket_app_plays_a_game(host: Host) -> None:
    """hexgame: two players meet, see each other's stones, and one of them gives up."""
    with player(host) as red, player(host) as blue:
        first, second = told(red, "joined"), told(blue, "joined")
        assert (first["slot_id"], first["color"], second["color"]) == (second["slot_id"], "red", "blue")
        assert told(red, "game_start")["board_size"] == told(blue, "game_start")["board_size"] == 7
        for mover, (q, r) in ((red, (3, 3)), (blue, (2, 4)), (red, (3, 4))):
            move(mover, q, r)
            for watcher in (red, blue):
                seen = told(watcher, "move")
                assert (seen["q"], seen["r"]) == (q, r)
        with browser(host, "hexgame") as client:
            slots = client.get("/slots").raise_for_status().json()
            assert [slot["move_count"] for slot in slots if slot["slot_id"] == first["slot_id"]] == [3]
            page = client.get("/play")
            assert page.status_code == 200
            assert "content-security-policy" not in page.headers
        blue.send(json.dumps({"type": "resign", "payload": {}}))
        assert told(red, "game_over")["winner"] == told(blue, "game_over")["winner"] == first["player"]


def test_plain_asgi_app_keeps_what_it_is_told(host: Host, tracker: Callable[[Host], dict[str, str]]) -> None:
    """timetagger: an hour of work is there again, and its file in the state folder; a wrong password gets nothing."""
    key = f"key{time.time_ns()}"
    with browser(host, "timetagger", headers=tracker(host)) as client:
        assert said(client, "wrong").status_code == 403
        stored = client.put("/timetagger/api/v2/records", json=[record(key)]).raise_for_status().json()
        assert stored["accepted"] == [key]
        kept = client.get("/timetagger/api/v2/records", params={"timerange": "1699999999-1700003601"}).json()["records"]
        assert [each["ds"] for each in kept if each["key"] == key] == [f"#work {key}"]
        page = client.get("/timetagger/app/")
        assert (page.status_code, page.headers["content-type"].split(";")[0]) == (200, "text/html")
    assert host.check_output("ls /var/lib/timetagger/_timetagger/users").startswith("tester~")


def test_streaming_app_sees_its_clients(host: Host) -> None:
    """httpbin: whole streams, and the client's own address and URL, whatever the client claims."""
    with browser(host, "httpbin") as client:
        mirror = client.get("/get", params={"a": "1"}, headers={"X-Forwarded-For": "192.0.2.1"}).json()
        assert mirror["url"] == "https://httpbin.example.com/get?a=1"
        gateway = address(host).rpartition(".")[0] + ".1"
        assert mirror["origin"] == gateway
        assert client.get("/drip", params={"numbytes": 20, "duration": 2, "delay": 0}).content == b"*" * 20
        first, again = (client.get("/stream-bytes/50000?seed=3").content for _ in range(2))
        assert (len(first), first) == (50_000, again)
        assert client.get("/status/418").status_code == 418


def test_readiness_is_told_for_what_it_is(host: Host) -> None:
    """Of the app without a path of its own, status says so; all are ready."""
    assert {app: status(host, app)["ready"] for app in PUBLIC} == dict.fromkeys(PUBLIC, True)
    assert "no readiness path" in host.check_output("forgectl status httpbin")
    assert "no readiness path" not in host.check_output("forgectl status titiler")


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
        "httpbin": [Page("/get?a=1", b'"a":"1"'), Page("/stream-bytes/2000?seed=3", b"")],
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
                app: stack.enter_context(browsing(address(host), f"{app}.example.com", CA, each, rate=RATE, clients=8))
                for app, each in asked.items()
            }
            time.sleep(2)
            yield results
            until(lambda: all(status(host, app)["operation"] is None for app in asked), SETTLED, every=3)
            time.sleep(2)
        results.update({app: load.result for app, load in loads.items()})

    return around


def assert_unnoticed(results: dict[str, Result]) -> None:
    """Every request of every app was answered as it should, and there were enough to tell."""
    assert {app: result.counts() for app, result in results.items() if result.failed} == {}
    for app, result in results.items():
        assert len(result.records) > 0.9 * RATE * (result.ended - result.began) - 5, f"the load on {app} stood still"


def upgraded(host: Host) -> dict[str, Any]:
    """The inventory's apps with their next versions, and a second worker for the one that has made its key."""
    apps: dict[str, Any] = copy.deepcopy(host.ansible.get_variables()["apps"])
    for app, (package, _, new) in UPGRADES.items():
        apps[app]["source"] = f"{package}=={new}"
    apps["timetagger"]["workers"] = 2
    apps["titiler"]["settings"]["GDAL_CACHEMAX"] = 32
    return apps


def drip(host: Host, seconds: int) -> bytes:
    """A download that takes so long."""
    with browser(host, "httpbin") as client:
        return client.get("/drip", params={"numbytes": 40, "duration": seconds, "delay": 0}).content


def test_upgrade_and_rollback_under_load(
    host: Host, crowd: Callable[[], Any], tracker: Callable[[Host], dict[str, str]]
) -> None:
    """One run for all: no client of any app notices, there or back, and what was stored is there all the time."""
    before = {app: status(host, app)["live"]["release"] for app in (*PUBLIC, "inbox")}
    with crowd() as going, player(host) as stranded, ThreadPoolExecutor() as threads:
        told(stranded, "joined")
        download = threads.submit(drip, host, 15)
        run = playbook(
            "--extra-vars",
            json.dumps({"apps": upgraded(host), "only": ",".join(PUBLIC), "no_wait": True}),
            name="playbooks/deploy.yml",
            before=["nice"],
        )
        assert run.returncode == 0, run.stdout
        # One that takes less than a request may is answered whole, on the old release.
        assert download.result() == b"*" * 40
        # A WebSocket may last longer than that. It is told to come back, and holds nobody up.
        assert ending(stranded) == 1012
    assert_unnoticed(going)
    after = {app: status(host, app)["live"]["release"] for app in (*PUBLIC, "inbox")}
    assert {app for app in after if after[app] != before[app]} == set(PUBLIC)
    assert {app: version(host, app) for app in UPGRADES} == {app: new for app, (_, _, new) in UPGRADES.items()}
    with browser(host, "fractal") as client:
        assert client.get("/api/alive/").json() == {"alive": True, "version": UPGRADES["fractal"][2]}
    # Both workers have the key that one made.
    with browser(host, "timetagger", headers=tracker(host)) as client:
        for _ in range(12):
            assert client.get("/timetagger/api/v2/settings", headers={"connection": "close"}).status_code == 200

    with crowd() as back:
        for app in PUBLIC:
            host.check_output("forgectl rollback %s --no-wait --json", app)
    assert_unnoticed(back)
    assert {app: status(host, app)["live"]["release"] for app in (*PUBLIC, "inbox")} == before
    assert {app: version(host, app) for app in UPGRADES} == {app: old for app, (_, old, _) in UPGRADES.items()}


def test_shutdown_of_each_ran_to_its_end(host: Host) -> None:
    """What was replaced above left in order: no worker was killed, with streams open or not."""
    for app in PUBLIC:
        log = host.check_output("journalctl --no-pager --output=cat --unit=%s", f"{app}@*.service")
        assert "SIGKILL" not in log
        assert "Failed with result" not in log
