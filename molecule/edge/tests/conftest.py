"""What the tests of this scenario share."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from forge_events import copy_app
from forge_scenario import until
from testinfra.host import Host

# Seconds in which Nginx may still use a connection to the slot that had the traffic before.
POOL_EXIT = 5
# Listens where a slot does, and answers each request with the same bytes.
ANSWER = """
import os, shutil, socket, sys
path = "/run/inbox/standin.sock"
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    shutil.chown(path, group="www-data")
    os.chmod(path, 0o660)
    listener.listen()
    os.symlink("standin.sock", "/run/inbox/.standin")
    os.rename("/run/inbox/.standin", "/run/inbox/live.sock")
    while True:
        with listener.accept()[0] as connection:
            head = b""
            while b"\\r\\n\\r\\n" not in head:
                head += connection.recv(65536)
            connection.sendall(sys.argv[1].encode())
"""

StandIn = Callable[[str], AbstractContextManager[None]]
"""What the fixture `stand_in` gives."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A new release, with the static files that the scenario's inventory names."""
    folder = copy_app(tmp_path / "app")
    shutil.copytree(Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "app" / "web", folder / "web", symlinks=True)
    return folder


@pytest.fixture
def stand_in(host: Host) -> StandIn:
    """Put something in the app's place that gives one answer, and afterwards do what a boot does."""

    @contextlib.contextmanager
    def answering(answer: str) -> Iterator[None]:
        host.check_output("systemd-run --quiet --unit=forge-standin python3 -c %s %s", ANSWER, answer)
        try:
            until(lambda: host.check_output("readlink /run/inbox/live.sock") == "standin.sock", 10)
            time.sleep(POOL_EXIT)
            yield
        finally:
            host.check_output("systemctl stop forge-standin; forgectl boot inbox; rm --force /run/inbox/standin.sock")

    return answering


@pytest.fixture
def app_log(host: Host) -> Callable[[str], list[dict[str, Any]]]:
    """Read what the app said of requests with some text in it, from the journal."""

    def read(text: str) -> list[dict[str, Any]]:
        host.check_output("journalctl --sync")
        found = host.run("journalctl --no-pager --output=cat --identifier=inbox --grep=%s", text).stdout
        return [json.loads(line) for line in found.splitlines()]

    return read


@pytest.fixture
def access_log(host: Host) -> Callable[[str], list[dict[str, Any]]]:
    """Read Nginx's lines with some text in them, which come when an answer has ended."""

    def read(text: str) -> list[dict[str, Any]]:
        found = until(lambda: host.run("grep --no-filename %s /var/log/nginx/inbox.json", text).stdout, 10)
        return [json.loads(line) for line in found.splitlines()]

    return read
