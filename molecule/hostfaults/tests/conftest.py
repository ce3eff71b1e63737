"""What the tests of this scenario share: fixtures of the helpers, by name, and the faults that only they cause."""

from forge_events import say, site
from forge_faults import fault
from forge_places import control, runbooks
from forge_reliability import FAULTS, expected

__all__ = ["control", "fault", "runbooks", "say", "site"]

FAULTS.update(
    {
        "PostgreSQL killed": expected(),
        "PostgreSQL's configuration broken": expected("F501", page="database-down", healed=120.0),
        "Nginx's configuration broken": expected("F801", "F802", page="nginx-down"),
        "Nginx's configuration changed by hand": expected("F802", page="nginx-down", healed=120.0),
        "Nginx stopped": expected("F801", page="nginx-down"),
        "secret ids rejected": expected("F402", page="secret-id-expired"),
        "network gone": expected("F609", page="network"),
        "clock not synchronised": expected("F607", page="clock"),
    }
)
