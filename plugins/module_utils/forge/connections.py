"""The connection budget of a PostgreSQL server.

hosts x workers x slots x (pool_max + 1 listener) + migrations + exporter + reserved <= max_connections
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SLOTS = 2
LISTENER = 1


@dataclass(frozen=True)
class Server:
    """A database server, and what on it is not for workers.

    Attributes:
        name: `local`, or host and port of an external server.
        max_connections: What it admits, of everyone together.
        limited_by: The variable that says so.
        exporter: Connections of the metrics exporter.
        reserved: Connections for superusers and operators.
    """

    name: str
    max_connections: int
    limited_by: str
    exporter: int
    reserved: int


@dataclass(frozen=True)
class Demand:
    """What an app needs of a server: `pool_max` of one worker, on `hosts` hosts, and `migration` connections.

    Each of its `commands` may have as many as a worker.
    """

    server: str
    hosts: int
    pool_max: int
    migration: int
    commands: int = 0

    @property
    def per_worker(self) -> int:
        """Connections of one worker: its pool, and the one that listens for notifications."""
        return self.pool_max + LISTENER

    def workers_need(self, workers: int) -> int:
        """Connections of all workers and commands in both slots on all hosts."""
        return self.hosts * (workers + self.commands) * SLOTS * self.per_worker


@dataclass(frozen=True)
class Budget:
    """The sum, and what it is made of."""

    server: Server
    required: int
    arithmetic: str

    @property
    def spare(self) -> int:
        """Connections left over; negative when the plan does not fit."""
        return self.server.max_connections - self.required

    def as_dict(self) -> dict[str, object]:
        """Return it for a fact."""
        return {
            "max_connections": self.server.max_connections,
            "required": self.required,
            "spare": self.spare,
            "arithmetic": self.arithmetic,
        }


def budget(server: Server, demands: Sequence[tuple[str, int, Demand]]) -> Budget:
    """Return the budget of `server` for `demands`: app, workers, demand."""
    required = sum(demand.workers_need(workers) + demand.migration for _, workers, demand in demands)
    return Budget(server, required + server.exporter + server.reserved, arithmetic(server, demands))


def arithmetic(server: Server, demands: Sequence[tuple[str, int, Demand]]) -> str:
    """Return the sum in words that an operator can follow."""
    parts = [
        f"{app}: {demand.hosts} hosts x {_counted(workers, demand.commands)} x {SLOTS} slots x "
        f"({demand.pool_max} pool_max + {LISTENER} listener) = {demand.workers_need(workers)}, "
        f"+ {demand.migration} for migrations"
        for app, workers, demand in demands
    ]
    return "; ".join([*parts, f"+ {server.exporter} exporter + {server.reserved} reserved"])


def _counted(workers: int, commands: int) -> str:
    return f"({workers} workers + {commands} commands)" if commands else f"{workers} workers"
