"""All checks of one host in their order, and the facts that every role works with afterwards."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import (
    access,
    alerts,
    bundle,
    certificates,
    edge,
    host,
    inventory_lint,
    lock,
    others,
    secrets_source,
    sizing,
    timeouts,
)
from .bundle import Bundle
from .connections import Demand, Server
from .names import name_problems
from .problems import Problem
from .programs import Desk
from .specs import Options, read_options, read_roles, validate
from .values import kind

LOCAL = "local"
# Where the `postgresql` role is not part of the project: PostgreSQL's own default.
POSTGRESQL_MAX_CONNECTIONS = 100
POSTGRESQL_PORT = 5432

LONGEST_ROTATION_MINUTES = 24 * 60
# Of a database, as its app wants it; the parts in braces are filled in at each start.
_URL_FORMAT = re.compile(r"[a-z][a-z0-9+.-]*://(?:[^\s{}]|\{(?:user|password|host|name)\})+")
_TIME = r"([01]\d|2[0-3]):([0-5]\d)"
SHORTEST_WINDOW_MINUTES = 30

# Least and most of an entry's numbers; the specification knows types only.
_RANGES: dict[str, tuple[int, int]] = {
    "workers": (0, 64),
    "worker_memory_mib": (16, 1024 * 1024),
    "memory_max_mib": (0, 1024 * 1024),
    "cpu_quota_percent": (0, 100_000),
    "tasks_max": (16, 1024 * 1024),
    "request_timeout": (1, 3600),
    "stream_timeout": (1, 7 * 24 * 3600),
    "websocket_timeout": (1, 7 * 24 * 3600),
    "max_body_kib": (1, 1024 * 1024),
    "keep_releases": (2, 100),
    "watch_seconds": (0, 600),
    "recycle_after_hours": (0, 24 * 365),
    "recycle_memory_percent": (0, 100),
    "max_requests": (0, 10_000_000),
}
# By Debian's policy, 5.6.1; as apt takes it, also for another architecture.
_DEBIAN_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?")

_COMMAND = re.compile(r"[a-z][a-z0-9-]{0,20}")
_COMMAND_RANGES: dict[str, tuple[int, int]] = {
    "memory_max_mib": (16, 1024 * 1024),
    "stop_seconds": (1, 3600),
}


@dataclass(frozen=True)
class Settings:
    """The options of the `preflight` role."""

    distributions: Mapping[str, list[object]]
    systemd_minimum: int
    disk_minimum_mib: int
    memory_minimum_mib: int
    memory_system_mib: int
    memory_postgresql_mib: int
    ports: list[int]
    connections_migration: int
    connections_exporter: int
    connections_reserved: int
    external_max_connections: int
    sources: bool


@dataclass(frozen=True)
class Inventory:
    """What the inventory says for the host.

    Attributes:
        root: The project's root, from which relative sources start.
        roles: Folder of the roles.
        play_roles: Names of the roles that the play runs.
        apps: The `apps` mapping, templated; None when it is not set.
        raw_apps: The same as it stands in the inventory.
        raw: Every variable with a role's prefix (or one close to it) as it stands in the inventory.
        values: Those of them that are options and could be templated, templated.
        hosts_of: For each app with an external database, the hosts of the inventory that run it.
        read: Reads a file of the control machine.
        connection: How Ansible reaches the host.
        desk: Where sources and locks are made ready.
    """

    root: Path
    roles: Path
    play_roles: list[str]
    apps: Any
    raw_apps: Any
    raw: Mapping[str, Any]
    values: Mapping[str, Any]
    hosts_of: Mapping[str, int]
    read: certificates.Read
    connection: access.Connection
    desk: Desk


@dataclass
class Outcome:
    """Either `problems`, or the two facts; `warnings` in any case."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    apps: list[dict[str, Any]] = field(default_factory=list)
    host: dict[str, Any] = field(default_factory=dict)


def examine(inventory: Inventory, probe: Mapping[str, Any] | None, settings: Settings) -> Outcome:
    """Check the inventory and, where the host could be read, the host and what depends on both."""
    outcome = Outcome()
    specs = read_roles(inventory.roles)
    outcome.problems += _variables(inventory, specs)
    entries = _entries(inventory, outcome)
    if "nginx" in inventory.play_roles:
        outcome.problems += certificates.problems(
            specs.get("nginx", {}), inventory.raw, inventory.values, entries, inventory.roles, inventory.read
        )
    target = lock.Target(probe["python_version"], probe["architecture"]) if probe else None
    bundles = {
        name: _bundle(name, entry, inventory, target) if settings.sources else Bundle()
        for name, entry in entries.items()
    }
    for each in bundles.values():
        outcome.problems += each.problems
        outcome.warnings += each.warnings
    if probe is None:
        return outcome
    outcome.problems += host.check(
        probe,
        settings.distributions,
        settings.systemd_minimum,
        settings.disk_minimum_mib,
        settings.memory_minimum_mib,
        settings.ports,
    )
    # An entry that is no mapping is still one.
    named = dict.fromkeys(inventory.apps) if isinstance(inventory.apps, Mapping) else {}
    unlisted = others.found(probe["apps"], {str(name): None for name in named})
    outcome.problems += others.problems(unlisted, entries, LOCAL)
    outcome.warnings += others.warnings(unlisted)
    http3 = inventory.values.get("nginx_http3")
    outcome.problems += edge.http3_problems(http3, host.distribution(probe), str(probe["distribution_version"]))
    if access.ROLE in inventory.play_roles:
        outcome.problems += access.host_problems(specs[access.ROLE], inventory.values, probe, inventory.connection)
    if outcome.problems:
        # Budgets over entries that are not valid would only repeat what is wrong with these, except where all are.
        complete = {name: entry for name, entry in entries.items() if _is_sized(entry)}
        if len(complete) != len(entries):
            return outcome
    _size(entries, bundles, unlisted, inventory, specs, probe, settings, outcome)
    return outcome


def _variables(inventory: Inventory, specs: Mapping[str, Options]) -> list[Problem]:
    return [
        *inventory_lint.unknown_variable_problems(list(inventory.raw), specs),
        *inventory_lint.role_secret_problems(inventory.raw),
        *inventory_lint.role_value_problems(specs, inventory.values),
        *inventory_lint.required_problems(specs, inventory.play_roles, inventory.raw),
        *_reboot_window(inventory.values),
        *_secrets(inventory.values),
        *access.value_problems(inventory.values),
        *(_alerts(inventory, specs) if alerts.ROLE in inventory.play_roles else []),
        *(_source_of_secrets(inventory, specs) if "secrets" in inventory.play_roles else []),
    ]


def _reboot_window(values: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the span of the day in which the host may reboot."""
    window = values.get("base_reboot_window")
    if not isinstance(window, str) or not window:
        return []
    expected = f"a span of the day, such as 03:00-04:00, of {SHORTEST_WINDOW_MINUTES} minutes or more; empty for never"
    found = re.fullmatch(f"{_TIME}-{_TIME}", window)
    if found is None:
        return [Problem("base_reboot_window", expected, window, "write hours and minutes of both ends, in quotes")]
    first, second, third, fourth = map(int, found.groups())
    # From one time to the same one is a whole day.
    minutes = (60 * third + fourth - 60 * first - second - 1) % (24 * 60) + 1
    if minutes < SHORTEST_WINDOW_MINUTES:
        return [Problem("base_reboot_window", expected, f"{window}, {minutes} minutes", "make it longer")]
    return []


def _secrets(values: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the addresses of secret ids, and with the times of rotation and of a start."""
    problems = []
    cidrs, retry = values.get("secrets_bound_cidrs"), values.get("secrets_retry_seconds")
    minutes = values.get("secrets_rotation_minutes")
    for index, cidr in enumerate(cidrs if isinstance(cidrs, list) else []):
        if mistake := _cidr_mistake(str(cidr)):
            where = f"secrets_bound_cidrs[{index}]"
            problems.append(Problem(where, "addresses in CIDR notation, such as 192.0.2.10/32", str(cidr), mistake))
    if isinstance(minutes, int) and not 0 <= minutes <= LONGEST_ROTATION_MINUTES:
        expected = f"a number from 0 to {LONGEST_ROTATION_MINUTES}, 0 for never"
        problems.append(Problem("secrets_rotation_minutes", expected, str(minutes), "correct it"))
    if isinstance(retry, int) and not 0 <= retry < timeouts.START:
        problems.append(
            Problem(
                "secrets_retry_seconds",
                f"a number from 0 to {timeouts.START - 1}, because systemd ends a start after {timeouts.START} s",
                str(retry),
                "correct it",
            )
        )
    return problems


def _cidr_mistake(text: str) -> str | None:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return "use addresses as Vault sees them, no names"
    # Vault takes neither an address without its length nor one with bits behind it for what it looks like.
    return None if str(network) == text.lower() else f"write {network}"


def _alerts(inventory: Inventory, specs: Mapping[str, Options]) -> list[Problem]:
    return alerts.problems(specs[alerts.ROLE], inventory.raw, inventory.values)


def _source_of_secrets(inventory: Inventory, specs: Mapping[str, Options]) -> list[Problem]:
    options = specs.get("secrets", {})
    source = secrets_source.chosen(options, inventory.values)
    return secrets_source.variable_problems(source, options, inventory.raw, inventory.apps)


def _entries(inventory: Inventory, outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Return the entries that are mappings, normalised as far as they are valid."""
    apps = inventory.apps
    if not isinstance(apps, Mapping) or not apps:
        found = "it is not set" if apps is None else "an empty mapping" if apps == {} else kind(apps)
        outcome.problems.append(
            Problem("apps", "a mapping with one entry an app, keyed by its name", found, "see inventory/example")
        )
        return {}
    options = read_options(inventory.roles, "app", "entry")
    command_options = read_options(inventory.roles, "app", "command")
    source = secrets_source.chosen(read_options(inventory.roles, "secrets"), inventory.values)
    entries: dict[str, dict[str, Any]] = {}
    for key, value in apps.items():
        name, where = str(key), f"apps.{key}"
        outcome.problems += name_problems(name)
        if not isinstance(value, Mapping):
            outcome.problems.append(
                Problem(where, "a mapping with at least domain, source and module", kind(value), "fill it in")
            )
            continue
        entry, problems = validate(options, value, where)
        outcome.problems += problems
        entry["commands"], problems = _commands(entry.get("commands"), command_options, f"{where}.commands")
        outcome.problems += problems
        outcome.problems += inventory_lint.shape_problems(value, where)
        outcome.problems += inventory_lint.unfilled_problems(value, where)
        raw_entry = inventory.raw_apps.get(key) if isinstance(inventory.raw_apps, Mapping) else None
        raw_settings = raw_entry.get("settings") if isinstance(raw_entry, Mapping) else None
        outcome.problems += inventory_lint.setting_problems(name, entry, raw_settings)
        outcome.problems += _entry(name, entry)
        outcome.problems += secrets_source.entry_problems(source, options, entry, where)
        entries[name] = {"name": name, **entry}
    outcome.problems += inventory_lint.domain_problems(entries)
    outcome.problems += inventory_lint.database_problems(entries, LOCAL)
    return entries


def _entry(name: str, entry: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with an entry beyond the types of its options."""
    where, problems = f"apps.{name}", []
    for option, (least, most) in _RANGES.items():
        number = entry.get(option)
        if isinstance(number, int) and not least <= number <= most:
            problems.append(
                Problem(f"{where}.{option}", f"a number from {least} to {most}", str(number), f"correct {option}")
            )
    paths = {option: entry.get(option) for option in ("health_path", "ready_path", "metrics_path")}
    for option, path in paths.items():
        if isinstance(path, str) and path and not path.startswith("/"):
            problems.append(Problem(f"{where}.{option}", "a path that starts with /", path, f"write /{path}"))
    if paths["metrics_path"] == "/":
        expected = "a path of its own, since nobody outside gets what is there; or an empty string for none"
        problems.append(Problem(f"{where}.metrics_path", expected, "/, which is all of the app", "correct it"))
    if paths["health_path"] and paths["health_path"] == paths["ready_path"]:
        problems.append(
            Problem(
                f"{where}.ready_path",
                "a path other than health_path: liveness must not depend on the database, readiness must",
                str(paths["ready_path"]),
                "give the app two endpoints; or, where it has but this one, set health_path to an empty string",
            )
        )
    prefix = entry.get("settings_prefix")
    if isinstance(prefix, str) and not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", prefix):
        problems.append(
            Problem(
                f"{where}.settings_prefix",
                "what the name of a variable may begin with, or an empty string",
                prefix,
                "use letters, digits and _",
            )
        )
    for package in entry.get("build_packages") or []:
        if not _DEBIAN_PACKAGE.fullmatch(str(package)):
            expected = "names of Debian packages, such as libpq-dev"
            problems.append(Problem(f"{where}.build_packages", expected, str(package), "correct it"))
    wanted = (entry.get("settings") or {}).get("WEB_CONCURRENCY")
    if wanted is not None and not (str(wanted).isdigit() and 0 < int(wanted) <= _RANGES["workers"][1]):
        problems.append(
            Problem(
                f"{where}.settings.WEB_CONCURRENCY",
                f"a number from 1 to {_RANGES['workers'][1]}",
                kind(wanted),
                "correct it, or remove it and use workers",
            )
        )
    secrets = entry.get("secrets")
    if isinstance(secrets, Mapping):
        problems += inventory_lint.mapping_problems(secrets.get("variables"), f"{where}.secrets.variables")
    database = entry.get("database")
    if isinstance(database, Mapping):
        problems += _database(database, f"{where}.database")
        if secrets is None:
            problems.append(
                Problem(
                    f"{where}.secrets",
                    "a mapping with variables, since the app has a database, whose password is a secret",
                    "it is not set",
                    "map a variable to the key of the password, or remove the database",
                )
            )
    return problems + edge.entry_problems(entry, where)


def _commands(
    commands: Mapping[str, Any] | None, options: Options, where: str
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Return an entry's commands with their defaults, and what is wrong with them."""
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for name, value in (commands or {}).items():
        here = f"{where}.{name}"
        if not _COMMAND.fullmatch(str(name)):
            expected = "a name of lower-case letters, digits and hyphens, a letter first, at most 21 characters"
            problems.append(Problem(here, expected, str(name), "rename the command"))
        if not isinstance(value, Mapping):
            problems.append(Problem(here, "a mapping with at least command", kind(value), "fill it in"))
            continue
        found[str(name)], mistakes = validate(options, value, here)
        problems += mistakes
        program = found[str(name)]["command"]
        if isinstance(program, list) and not (program and program[0] and "/" not in program[0]):
            problems.append(
                Problem(
                    f"{here}.command",
                    "a list that begins with a program of the app's environment or a Python module",
                    str(program[0]) if program else "an empty list",
                    "name it without a folder",
                )
            )
        for option, (least, most) in _COMMAND_RANGES.items():
            number = found[str(name)][option]
            if isinstance(number, int) and not least <= number <= most:
                problems.append(
                    Problem(f"{here}.{option}", f"a number from {least} to {most}", str(number), f"correct {option}")
                )
    return found, problems


def _database(database: Mapping[str, Any], where: str) -> list[Problem]:
    problems = []
    migration = database.get("migration")
    wanted = database.get("url_format")
    if isinstance(wanted, str) and wanted and not (_URL_FORMAT.fullmatch(wanted) and "{name}" in wanted):
        problems.append(
            Problem(
                f"{where}.url_format",
                "a URL with {name}, and no other braces than {user}, {password}, {host} and {name}",
                "another text",
                "write it as in postgresql+psycopg://{user}:{password}@{host}/{name}",
            )
        )
    if isinstance(database.get("pool_max"), int) and database["pool_max"] < 1:
        problems.append(Problem(f"{where}.pool_max", "at least 1", str(database["pool_max"]), "correct pool_max"))
    if isinstance(migration, Mapping):
        problems += inventory_lint.mapping_problems(migration.get("variables"), f"{where}.migration.variables")
    if database.get("placement") == LOCAL and database.get("vault_role"):
        problems.append(
            Problem(
                f"{where}.vault_role",
                "no role of Vault's for a database on this host, which listens where Vault can't reach it",
                str(database["vault_role"]),
                "remove it, or set placement: external",
            )
        )
    urls = {"url": True, "migration_url": migration is not None}
    for option, needed in urls.items():
        url = database.get(option)
        if database.get("placement") == LOCAL and url:
            problems.append(
                Problem(
                    f"{where}.{option}",
                    "no URL for a database on this host; it follows from the name",
                    "a URL",
                    "remove it, or set placement: external",
                )
            )
        elif database.get("placement") == "external" and needed and not _host_of(url):
            problems.append(
                Problem(
                    f"{where}.{option}",
                    "the URL of the external database, such as postgresql+asyncpg://user@db.example.com/name",
                    "no URL with a host" if url else "it is not set",
                    "set it, without the password",
                )
            )
    return problems


def _host_of(url: Any) -> str | None:
    """Return host and port of a database URL."""
    try:
        parts = urlsplit(str(url or ""))
        port = parts.port or POSTGRESQL_PORT
    except ValueError:
        return None
    return f"{parts.hostname}:{port}" if parts.hostname else None


def _bundle(name: str, entry: Mapping[str, Any], inventory: Inventory, target: lock.Target | None) -> Bundle:
    # What is missing has been reported with the entry.
    if not all(entry.get(option) for option in ("source", "module", "python_path")) or entry.get("lock") is None:
        return Bundle()
    return bundle.prepare(name, entry, inventory.root, inventory.desk, target)


def _is_sized(entry: Mapping[str, Any]) -> bool:
    numbers = ("workers", "worker_memory_mib", "memory_max_mib", "cpu_quota_percent", "request_timeout")
    if not all(isinstance(entry.get(option), int) and entry[option] >= _RANGES[option][0] for option in numbers):
        return False
    if not all(isinstance(each["memory_max_mib"], int) for each in (entry.get("commands") or {}).values()):
        return False
    wanted = (entry.get("settings") or {}).get("WEB_CONCURRENCY", 1)
    database = entry.get("database")
    return str(wanted).isdigit() and (database is None or isinstance(database.get("pool_max"), int))


def _size(
    entries: Mapping[str, dict[str, Any]],
    bundles: Mapping[str, Bundle],
    unlisted: list[others.Other],
    inventory: Inventory,
    specs: Mapping[str, Options],
    probe: Mapping[str, Any],
    settings: Settings,
    outcome: Outcome,
) -> None:
    databases = {
        name: str(entry["database"].get("name") or name)
        for name, entry in entries.items()
        if (entry.get("database") or {}).get("placement") == LOCAL
    } | {other.name: other.database for other in unlisted if other.database}
    size = sizing.Host(
        cpus=probe["cpus"],
        cpus_from=probe["cpus_from"],
        memory_mib=probe["memory_mib"],
        memory_from=probe["memory_from"],
        kept_mib=settings.memory_system_mib + (settings.memory_postgresql_mib if databases else 0),
    )
    plans = {name: _plan(entry, inventory, settings) for name, entry in sorted(entries.items())}
    everything = [*plans.values(), *others.plans(unlisted, LOCAL)]
    names = sorted({plan.demand.server for plan in everything if plan.demand})
    servers = [_server(name, inventory, specs, settings) for name in names]
    outcome.problems += sizing.choose(everything, size, servers)
    for name, plan in plans.items():
        outcome.apps.append(_complete(entries[name], bundles[name], plan, size, inventory.desk))
    outcome.host = {
        "cpus": probe["cpus"],
        "cpus_from": probe["cpus_from"],
        "memory_mib": probe["memory_mib"],
        "memory_from": probe["memory_from"],
        "memory_apps_mib": sizing.memory_needed(everything),
        "distribution": host.distribution(probe),
        "distribution_version": probe["distribution_version"],
        "architecture": probe["architecture"],
        "systemd_version": probe["systemd_version"],
        "container": probe["container"],
        "python_version": probe["python_version"],
        "disk_free_mib": probe["disk_free_mib"],
        "postgresql": probe["postgresql"],
        "package_lists": probe["package_lists"],
        "released": probe["released"],
        "forgectl": probe["forgectl"],
        "manifest": probe["manifest"],
        "time": probe["time"],
        "ssh": probe["ssh"],
        "connections": sizing.connection_budgets(everything, servers),
        # By app, of all that the host knows: what was removed may be restored.
        "databases": [databases[name] for name in sorted(databases)],
        "domains": dict(
            sorted(
                [(name, [entry.get("domain"), *(entry.get("aliases") or [])]) for name, entry in entries.items()]
                + [*others.domains(unlisted).items()]
            )
        ),
    }


def _plan(entry: Mapping[str, Any], inventory: Inventory, settings: Settings) -> sizing.Plan:
    name = entry["name"]
    override = entry["settings"].get("WEB_CONCURRENCY") if entry.get("settings") else None
    fixed_by = f"apps.{name}.workers" if override is None else f"WEB_CONCURRENCY in apps.{name}.settings"
    database, demand = entry.get("database"), None
    commands = (entry.get("commands") or {}).values()
    if isinstance(database, Mapping):
        external = database["placement"] != LOCAL
        demand = Demand(
            server=(_host_of(database["url"]) or "external") if external else LOCAL,
            hosts=max(1, inventory.hosts_of.get(name, 1)) if external else 1,
            pool_max=database["pool_max"],
            migration=settings.connections_migration if database.get("migration") else 0,
            commands=len(commands),
        )
    return sizing.Plan(
        name=name,
        fixed=int(override) if override is not None else entry["workers"],
        fixed_by=fixed_by,
        worker_mib=entry["worker_memory_mib"],
        memory_max_mib=entry["memory_max_mib"],
        cpu_quota_percent=entry["cpu_quota_percent"],
        slot_commands_mib=sum(each["memory_max_mib"] for each in commands if not each["schedule"]),
        host_commands_mib=sum(each["memory_max_mib"] for each in commands if each["schedule"]),
        demand=demand,
    )


def _server(name: str, inventory: Inventory, specs: Mapping[str, Options], settings: Settings) -> Server:
    if name == LOCAL:
        declared = specs.get("postgresql", {}).get("postgresql_max_connections", {}).get("default")
        limit = inventory.values.get("postgresql_max_connections") or declared or POSTGRESQL_MAX_CONNECTIONS
        limited_by = "postgresql_max_connections"
    else:
        limit, limited_by = settings.external_max_connections, "preflight_external_max_connections"
    # A limit that is no number has been reported with its role variable.
    number = int(limit) if str(limit).isdigit() else POSTGRESQL_MAX_CONNECTIONS
    return Server(name, number, limited_by, settings.connections_exporter, settings.connections_reserved)


def _complete(entry: dict[str, Any], parts: Bundle, plan: sizing.Plan, size: sizing.Host, desk: Desk) -> dict[str, Any]:
    """Return the entry with the names that follow from its own, its settings as text, and the computed keys."""
    name = entry["name"]
    done = dict(entry)
    done |= {
        "lock": parts.lock,
        "source_path": str(parts.source or ""),
        "source_whole": parts.whole,
        "source_additions": str(parts.additions or ""),
        "source_lock": {"resolved": str(parts.resolved), "keep": f"{desk.locks}/{name}.txt"} if parts.resolved else {},
    }
    done["settings"] = {key: inventory_lint.setting_text(value) for key, value in (entry.get("settings") or {}).items()}
    prefix = entry.get("settings_prefix") or ""

    def named(variable: str) -> str:
        return prefix + variable if prefix else ""

    done["environment_variable"] = named("ENVIRONMENT")
    if entry.get("secrets"):
        done["secrets"] = dict(entry["secrets"])
        done["secrets"]["path"] = done["secrets"].get("path") or f"forge/{name}/app"
        done["secrets"]["approle"] = done["secrets"].get("approle") or f"forge-{name}-app"
        if rotation := done["secrets"].get("rotation"):
            done["secrets"]["rotation"] = {**rotation, "approle": rotation.get("approle") or f"forge-{name}-rotate"}
    if entry.get("database"):
        database = dict(entry["database"])
        database["name"] = database.get("name") or name
        database["url_variable"] = database.get("url_variable") or named("DATABASE_URL")
        database["pool_variable"] = database.get("pool_variable") or named("DATABASE_POOL_MAX")
        if database.get("migration"):
            migration = dict(database["migration"])
            migration["path"] = migration.get("path") or f"forge/{name}/migrate"
            migration["approle"] = migration.get("approle") or f"forge-{name}-migrate"
            if not migration.get("variables") and prefix:
                migration["variables"] = {named("DATABASE_PASSWORD"): migration["password_key"]}
            database["migration"] = migration
        done["database"] = database
    done["workers"] = {"count": plan.count, "reasons": plan.reasons}
    done["timeouts"] = dict(timeouts.chain(entry["request_timeout"]))
    done["limits"] = {
        "memory_max_mib": sizing.memory_limit(plan, size),
        "cpu_quota_percent": sizing.cpu_limit(plan, size),
        "tasks_max": entry["tasks_max"],
    }
    return done
