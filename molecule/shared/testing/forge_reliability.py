"""The faults that a host has to survive, and what is expected of each: the rows of docs/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass

RESULTS = "FORGE_FAULTS_RESULTS"
"""Environment variable: the file that gets a line for each fault; `make reliability` makes its table of them."""


@dataclass(frozen=True)
class Expected:
    """What has to be so of a fault."""

    codes: frozenset[str]
    """What doctor has to say while it lasts; empty where it is over before anybody can look."""
    page: str = ""
    """The runbook that mends it; empty where it heals alone."""
    healed: float = 60.0
    """Seconds that clients may have to wait from its begin, or from the runbook's first command: a generous bound."""


def expected(*codes: str, page: str = "", healed: float = 60.0) -> Expected:
    """Make an entry of FAULTS."""
    return Expected(frozenset(codes), page, healed)


FAULTS = {
    # Of apps.
    "a worker eats memory until its limit": expected("F204", page="memory-growing"),
    "memory grows": expected("F206", page="memory-growing"),
    "file descriptors exhausted": expected("F210", page="file-descriptors"),
    "event loop blocked": expected("F207", page="event-loop-blocked"),
    "workers killed on timeout": expected("F205", page="workers-killed-on-timeout"),
    "Gunicorn's master killed": expected(),
    "host rebooted": expected(healed=120.0),
    "half-finished deploy": expected("F302", page="half-finished-release"),
    "a command hangs": expected("F301", page="half-finished-release"),
    "wrong permissions on the release folder": expected("F209", page="release-permissions"),
    "variables do not arrive": expected("F211", page="variables-not-arriving"),
    "the service exits right after its start": expected("F201", page="service-exits-right-after-start"),
    "the address is in use already": expected("F203", page="address-already-in-use"),
    "live but not ready": expected("F202", page="live-but-not-ready"),
    "502s during a rollout": expected(page="errors-during-a-rollout"),
    "the schema is not the release's": expected("F304", page="schema-mismatch"),
    "a command of the app fails": expected("F208", page="command-failed"),
    "newer secrets are not in service": expected("F404", "F405", page="secrets-not-in-service"),
    # Of the host and of what the apps need.
    "disk full": expected("F601", page="disk-filling"),
    "inodes full": expected("F602", page="disk-filling"),
    "/tmp full": expected("F605", page="disk-filling"),
    "journal flooded": expected("F603", page="journal-flooded"),
    "PostgreSQL stopped": expected("F501", page="database-down"),
    "PostgreSQL restarted": expected(),
    "PostgreSQL killed": expected(),
    "PostgreSQL's configuration broken": expected("F501", page="database-down", healed=120.0),
    "PostgreSQL out of connections": expected("F502", page="too-many-database-connections"),
    "Vault sealed during a restart": expected("F401", page="vault-unreachable-or-sealed", healed=180.0),
    "secret ids rejected": expected("F402", page="secret-id-expired"),
    "names do not resolve": expected("F608", page="network"),
    "network gone": expected("F609", page="network"),
    "clock not synchronised": expected("F607", page="clock"),
    "Nginx killed": expected(),
    "Nginx stopped": expected("F801", page="nginx-down"),
    "Nginx's configuration broken": expected("F801", "F802", page="nginx-down"),
    "Nginx's configuration changed by hand": expected("F802", page="nginx-down", healed=120.0),
    "certificate expired": expected("F102", page="certificate-expiring"),
}
"""Every fault, by its name in docs/reliability.md."""
