"""Files of a release, from Nginx alone, for as long as a page may ask for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from forge_scenario import Status, playbook, until
from forge_wire import exchange, tls
from testinfra.host import Host

DOMAIN = "inbox.example.com"
ASSETS = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "app" / "web" / "assets"
SCRIPT, STYLE = "/assets/app.1a2b3c4d.js", "/assets/theme.5e6f7a8b.css"
FOREVER = "public, max-age=31536000, immutable"

Log = Callable[[str], list[dict[str, Any]]]


def test_files_are_served_without_the_app(client: httpx.Client, app_log: Log, access_log: Log) -> None:
    """And kept by whoever gets them."""
    answer = client.get(SCRIPT)
    assert (answer.status_code, answer.text) == (200, (ASSETS / Path(SCRIPT).name).read_text())
    assert answer.headers["content-type"] == "application/javascript"
    assert answer.headers.get_list("cache-control") == [FOREVER]
    assert client.get(SCRIPT, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    (logged,) = access_log(answer.headers["x-request-id"])
    assert logged["upstream_status"] == ""
    assert app_log(answer.headers["x-request-id"]) == []


def test_files_are_compressed(client: httpx.Client) -> None:
    """As the client likes, whatever its cookies: nothing in them is about it."""
    whole = (ASSETS / Path(STYLE).name).read_text()
    for coding in ("gzip", "br"):
        answer = client.get(STYLE, headers={"Accept-Encoding": coding, "Cookie": "a=b"})
        assert answer.headers["content-encoding"] == coding
        assert "accept-encoding" in answer.headers["vary"].lower()
        assert int(answer.headers.get("content-length", 0)) < len(whole)
    plain = client.get(STYLE, headers={"Accept-Encoding": "identity"})
    assert (plain.text, "content-encoding" in plain.headers) == (whole, False)


def test_what_is_compressed_already_is_served_so(host: Host) -> None:
    """As it lies there."""
    for coding, content in {"gzip": b"as gzip left it", "": b"plain"}.items():
        request = f"GET /assets/ready.9c0d1e2f.css HTTP/1.1\r\nHost: {DOMAIN}\r\nConnection: close\r\n"
        with tls(host, DOMAIN) as connection:
            answer = exchange(connection, f"{request}Accept-Encoding: {coding}\r\n\r\n".encode())
        assert (answer.status, answer.body) == (200, content)
        assert f"content-encoding: {coding}" in answer.head or not coding


def test_files_survive_the_app(host: Host, client: httpx.Client) -> None:
    """Nothing of Python runs for them."""
    host.check_output("systemctl stop 'inbox@*.socket' 'inbox@*.service'")
    try:
        assert client.get(SCRIPT).status_code == 200
        assert client.get("/health").status_code == 502
    finally:
        host.check_output("forgectl boot inbox")
    assert until(lambda: client.get("/ready").status_code == 200, 60, every=0.5)


def test_files_are_read_and_no_more(client: httpx.Client) -> None:
    """Other methods are not for them; what is not there is a problem document that nobody keeps."""
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert client.request(method, SCRIPT).status_code == 405
    missing = client.get("/assets/none.js")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
    assert "cache-control" not in missing.headers
    assert client.head(SCRIPT).status_code == 200


def test_pages_find_their_files_across_releases(client: httpx.Client, status: Status) -> None:
    """After a release the page before it still gets what it asks for; a name that both have is the new one's."""
    before = status()["live"]["release"]
    same, old, new = ASSETS / "same.txt", ASSETS / Path(SCRIPT).name, ASSETS / "app.9c8b7a6d.js"
    first, gone = client.get("/assets/same.txt").text, old.read_text()
    try:
        old.unlink()
        new.write_text("console.log('second');\n")
        same.write_text("second\n")
        done = playbook(name="playbooks/deploy.yml")
        assert done.returncode == 0, done.stdout
        assert status()["live"]["release"] != before
        kept = client.get(SCRIPT)
        assert (kept.status_code, kept.text, kept.headers["cache-control"]) == (200, gone, FOREVER)
        assert client.get("/assets/app.9c8b7a6d.js").text == new.read_text()
        assert (first, client.get("/assets/same.txt").text) == ("first\n", "second\n")
    finally:
        same.write_text("first\n")
        new.unlink(missing_ok=True)
        old.write_text(gone)
    # Back, by which the names that both have are those of before.
    back = playbook(name="playbooks/rollback.yml")
    assert back.returncode == 0, back.stdout
    assert client.get("/assets/same.txt").text == "first\n"
    assert client.get("/assets/app.9c8b7a6d.js").status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        *("/assets/.hidden", "/assets/%2ehidden", "/assets/link.txt", "/assets/", "/assets", "/assets//"),
        *("/assets/.", "/assets/../pyproject.toml", "/assets/%2e%2e/pyproject.toml", "/assets/..%2fpyproject.toml"),
        *("/assets/../../src/inbox/main.py", "/assets/..%2f..%2fsrc%2finbox%2fmain.py"),
        *("/assets/..%5c..%5csettings.toml", "/assets/%2fetc%2fpasswd", "/assets//etc/passwd"),
        *("/assets/....//....//etc/passwd", "/assets/app.1a2b3c4d.js/", "/assets/app.1a2b3c4d.js%00.txt"),
        *("/assets/app.1a2b3c4d.js/..%2f..", "/assets/tool.py", "/assets/out/passwd", "/assets../pyproject.toml"),
        *("/assets;/../pyproject.toml", "/web/assets/same.txt", "/assets/deep/secret.txt"),
    ],
)
@pytest.mark.usefixtures("_planted")
def test_nothing_else_is_served(host: Host, target: str) -> None:
    """No hidden file, no link, no code, no folder, and nothing outside, however it is spelt."""
    with tls(host, DOMAIN) as connection:
        request = f"GET {target} HTTP/1.1\r\nHost: {DOMAIN}\r\nConnection: close\r\n\r\n"
        answer = exchange(connection, request.encode())
    assert answer.status in (400, 403, 404), answer
    assert answer.head.count("content-type: application/problem+json") == 1


@pytest.fixture(scope="module")
def _planted(host: Host) -> Iterator[None]:
    """What no release would have: code, a link to another folder, and a folder that is not for everybody."""
    folder = host.check_output("readlink --canonicalize /run/inbox/live/source/web/assets")
    host.check_output(f"echo x > {folder}/tool.py; chmod 444 {folder}/tool.py; ln -s /etc {folder}/out")
    host.check_output(f"mkdir -m 700 {folder}/deep; echo x > {folder}/deep/secret.txt")
    yield
    host.check_output(f"rm -r {folder}/tool.py {folder}/out {folder}/deep")


def test_nginx_can_read_nothing_else(host: Host) -> None:
    """If its configuration were wrong: neither code nor settings, nor what there is."""
    release = host.check_output("readlink --canonicalize /run/inbox/live")
    read = "runuser --user www-data -- cat %s"
    assert host.run(read, f"{release}/source/web/assets/same.txt").rc == 0
    for name in ("settings.toml", "source/src/inbox/main.py", "source/pyproject.toml", "source/web/assets/.hidden"):
        assert host.run("test -e %s", f"{release}/{name}").rc == 0
        assert host.run(read, f"{release}/{name}").rc == 1, name
    for folder in (release, f"{release}/source", "/srv/inbox/releases"):
        assert host.run("runuser --user www-data -- ls %s", folder).rc == 2, folder
