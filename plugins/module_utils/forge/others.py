"""The apps of a host that its inventory does not name any more: they go on, and count, until somebody removes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import sizing
from .connections import Demand
from .problems import Problem

REMOVE = "take {name} out of service first: playbooks/remove.yml -e only={name}"


@dataclass(frozen=True)
class Other:
    """Such an app, as the host describes it.

    Attributes:
        domains: Its domain, then its aliases.
        database: Name of its database on this host; empty without one.
        memory_max_mib: Limit of one slot, 0 when nobody knows.
        commands: How many it runs beside its server.
        slot_commands_mib: Limits of those that go on, together; each slot has its own.
        host_commands_mib: Limits of those on a schedule, together.
        removed: Whether it is out of service, and only what it left is there.
        served: Whether a release of it ever served; else it has neither site nor certificate.
    """

    name: str
    domains: tuple[str, ...]
    database: str
    workers: int
    pool_max: int
    memory_max_mib: int
    commands: int
    slot_commands_mib: int
    host_commands_mib: int
    removed: bool
    served: bool


def found(described: Iterable[Mapping[str, Any]], entries: Mapping[str, object]) -> list[Other]:
    """Return the apps that the host knows and the inventory does not."""
    return [
        Other(
            name=str(app["name"]),
            domains=tuple(app["domains"]),
            database=str(app["database"]),
            workers=int(app["workers"]),
            pool_max=int(app["pool_max"]),
            memory_max_mib=int(app["memory_max_mib"]),
            commands=int(app["commands"]),
            slot_commands_mib=int(app["slot_commands_mib"]),
            host_commands_mib=int(app["host_commands_mib"]),
            removed=bool(app["removed"]),
            served=bool(app["served"]),
        )
        for app in described
        if app["name"] not in entries
    ]


def domains(others: Sequence[Other]) -> dict[str, list[str]]:
    """Return the domains of those that have a site, or did and may be restored."""
    return {other.name: list(other.domains) for other in others if other.served}


def running(others: Sequence[Other]) -> list[Other]:
    """Return those that are in service."""
    return [other for other in others if not other.removed]


def plans(others: Sequence[Other], local: str) -> list[sizing.Plan]:
    """Return what those that run take of the host, as fixed plans; `local` names the database server of this host."""
    return [
        sizing.Plan(
            name=other.name,
            fixed=other.workers,
            fixed_by="what runs",
            # How its limit was computed, backwards, unless the inventory of that day set one.
            worker_mib=max(0, other.memory_max_mib - sizing.MASTER_MIB) // sizing.HEADROOM // max(1, other.workers),
            memory_max_mib=0,
            cpu_quota_percent=0,
            slot_commands_mib=other.slot_commands_mib,
            host_commands_mib=other.host_commands_mib,
            demand=Demand(local, 1, other.pool_max, 0, other.commands) if other.database else None,
            unlisted=True,
        )
        for other in running(others)
    ]


def problems(others: Sequence[Other], entries: Mapping[str, Mapping[str, Any]], local: str) -> list[Problem]:
    """Return what entries claim that one of the others has: a domain, or a database on this host."""
    result = []
    taken = {domain: other.name for other in running(others) for domain in other.domains}
    databases = {other.database: other.name for other in running(others) if other.database}
    for name, entry in entries.items():
        claims = [(f"apps.{name}.domain", entry.get("domain"))]
        claims += [(f"apps.{name}.aliases[{i}]", alias) for i, alias in enumerate(entry.get("aliases") or [])]
        result += [
            Problem(
                where,
                "a domain that no other app of the host has",
                f"{domain}, which {taken[domain]} serves, though no entry names it any more",
                REMOVE.format(name=taken[domain]),
            )
            for where, domain in claims
            if domain in taken
        ]
        database = entry.get("database")
        if isinstance(database, Mapping) and database.get("placement") == local:
            wanted = database.get("name") or name
            if wanted in databases:
                result.append(
                    Problem(
                        f"apps.{name}.database.name",
                        "a database that no other app of the host has",
                        f"{wanted}, which {databases[wanted]} uses, though no entry names it any more",
                        REMOVE.format(name=databases[wanted]) + f"; then {name} may have its database",
                    )
                )
    return result


def warnings(others: Sequence[Other]) -> list[str]:
    """Return what whoever runs a playbook should know of those that run."""
    return [
        f"{other.name} ({', '.join(other.domains)}) is in no entry of the inventory and goes on; its memory "
        f"and connections count. To take it out of service in good order: playbooks/remove.yml -e only={other.name}"
        for other in running(others)
    ]
