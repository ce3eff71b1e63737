"""What the tests of this scenario share: what doctor says, and fixtures of forge_events and forge_places by name."""

from __future__ import annotations

from forge_events import event, ledger, say, site
from forge_places import control, runbooks

__all__ = ["control", "event", "ledger", "runbooks", "say", "site"]
