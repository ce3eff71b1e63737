"""What the tests of this scenario share; and the fixtures of forge_events, by name."""

from __future__ import annotations

import pytest
from forge_events import Provisioning, say, source, steady, unnoticed

__all__ = ["say", "source", "steady", "unnoticed"]


@pytest.fixture(scope="session")
def provisioning() -> Provisioning:
    """How the host was provisioned last; whoever needs it otherwise says so, and nobody has to put it back."""
    return Provisioning()


@pytest.fixture(scope="session")
def elsewhere() -> dict[str, str]:
    """Secrets that did not pass through the scenario's own server, by name; whoever makes one adds it."""
    return {}
