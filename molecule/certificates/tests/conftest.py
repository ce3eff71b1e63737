"""Fixtures of the helpers, by name, and the fault that only this scenario can cause."""

from forge_events import say, site
from forge_faults import fault
from forge_places import control, runbooks
from forge_reliability import FAULTS, expected

__all__ = ["control", "fault", "runbooks", "say", "site"]

FAULTS["renewal fails until the certificate has expired"] = expected("F102", "F103", page="certificate-expiring")
