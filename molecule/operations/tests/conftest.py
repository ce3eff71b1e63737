"""The fixtures of the shared modules, by name, and the load of what is no fault."""

from __future__ import annotations

import pytest
from forge_events import event, ledger, say, site, source
from forge_faults import fault
from forge_places import control, runbooks

__all__ = ["control", "event", "fault", "ledger", "runbooks", "say", "site", "source"]


@pytest.fixture
def rate() -> float:
    """A modest load, in requests a second: what is lost shows in it as well."""
    return 40.0
