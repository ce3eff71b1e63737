"""What the public apps of scenario `apps` are, and how one talks to them."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from forge_apps import run_inside
from forge_wire import address, trust
from testinfra.host import Host
from websockets.sync.client import ClientConnection, connect

UPGRADES = {
    "fractal": ("fractal-server", "2.18.4", "2.18.5"),
    "hexgame": ("hexgame-server", "0.4.1", "0.4.3"),
    "timetagger": ("timetagger", "26.1.2", "26.1.3"),
    "httpbin": ("httpbinx", "1.13.0", "1.13.1"),
}
"""Package, the version of the inventory, and the next one. titiler gets another setting: its environment is large."""
PUBLIC = (*UPGRADES, "titiler")
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


def version(host: Host, app: str) -> str:
    """The version of the app that is live, as its installed package says."""
    return run_inside(host, app, "-c", VERSION, UPGRADES[app][0]).strip()


def said(client: httpx.Client, password: str) -> httpx.Response:
    """What timetagger answers to a password."""
    claim = {"method": "usernamepassword", "username": "tester", "password": password}
    body = base64.b64encode(json.dumps(claim).encode())
    return client.post("/timetagger/api/v2/bootstrap_authentication", content=body)


def work(key: str) -> dict[str, Any]:
    """An hour's work, as timetagger knows it."""
    return {"key": key, "mt": 1_700_000_000, "t1": 1_700_000_000, "t2": 1_700_003_600, "ds": f"#work {key}"}


@contextmanager
def player(host: Host) -> Iterator[ClientConnection]:
    """Somebody who looks for an opponent."""
    with connect(
        "wss://hexgame.example.com/ws/matchmake?board_size=7",
        sock=socket.create_connection((address(host), 443), timeout=20),
        ssl=trust(),
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
