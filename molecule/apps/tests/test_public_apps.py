"""Apps that nobody here wrote: each is judged by its own answers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable

from forge_apps import browser, entries, run_inside, state
from forge_public import EMAIL, PUBLIC, UPGRADES, VERSION, player, said, told, version, work
from forge_wire import address
from testinfra.host import Host
from websockets.sync.client import ClientConnection


def move(connection: ClientConnection, q: int, r: int) -> None:
    """Put a stone on the board."""
    connection.send(json.dumps({"type": "move", "payload": {"q": q, "r": r}}))


def test_each_is_as_it_was_published(host: Host) -> None:
    """The version of the entry, from the index; what serves it is its own Gunicorn, or the platform's."""
    assert {app: version(host, app) for app in UPGRADES} == {app: old for app, (_, old, _) in UPGRADES.items()}
    for app in PUBLIC:
        source, entry = state(host, app)["source"], entries(host)[app]["source"]
        if source["kind"] == "package":
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
        stored = client.put("/timetagger/api/v2/records", json=[work(key)]).raise_for_status().json()
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
    assert {app: state(host, app)["ready"] for app in PUBLIC} == dict.fromkeys(PUBLIC, True)
    assert "no readiness path" in host.check_output("forgectl status httpbin")
    assert "no readiness path" not in host.check_output("forgectl status titiler")
