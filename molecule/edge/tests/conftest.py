"""What the tests of this scenario share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forge_events import copy_app
from forge_scenario import until
from testinfra.host import Host


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A new release, with the static files that the scenario's inventory names."""
    folder = copy_app(tmp_path / "app")
    shutil.copytree(Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "app" / "web", folder / "web", symlinks=True)
    return folder


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
