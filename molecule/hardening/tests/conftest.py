"""What the tests of this scenario share: fixtures of forge_events, by name."""

from __future__ import annotations

import pytest
from forge_events import event, ledger, say, site

__all__ = ["event", "ledger", "say", "site"]


@pytest.fixture
def rate() -> float:
    """A modest load, in requests a second: what is lost shows in it as well."""
    return 40.0
