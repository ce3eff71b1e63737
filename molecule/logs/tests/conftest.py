"""What the tests of this scenario share: fixtures of forge_events and forge_places, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from forge_events import say, source
from forge_places import control, runbooks
from testinfra.host import Host

__all__ = ["control", "runbooks", "say", "source"]

Asked = Callable[..., dict[str, Any]]
"""What the fixture `asked` gives."""


@pytest.fixture
def asked(host: Host) -> Asked:
    """Ask forgectl on the host, and read its JSON."""

    def ask(*arguments: str) -> dict[str, Any]:
        words = (*arguments, "--json")
        found: dict[str, Any] = json.loads(host.check_output("forgectl" + " %s" * len(words), *words))
        return found

    return ask
