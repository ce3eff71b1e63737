"""What the tests of this scenario share: what doctor says, and fixtures of forge_events and forge_places by name."""

from __future__ import annotations

import pytest
from forge_events import event, ledger, say, site
from forge_places import control, runbooks

__all__ = ["control", "event", "ledger", "runbooks", "say", "site"]


@pytest.fixture
def rate() -> float:
    """A modest load, in requests a second: what is lost shows in it as well."""
    return 40.0
