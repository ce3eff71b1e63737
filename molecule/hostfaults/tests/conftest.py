"""The fixtures of the helpers, by name."""

from forge_events import say, site
from forge_faults import fault
from forge_places import control, runbooks

__all__ = ["control", "fault", "runbooks", "say", "site"]
