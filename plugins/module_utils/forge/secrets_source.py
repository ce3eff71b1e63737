"""What the chosen source of secrets asks of the inventory, beyond the types of its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .problems import Problem
from .specs import Options, validate

VAULT, SEALED = "vault", "systemd_creds"
_VARIABLES = ("secrets_vault_address", "secrets_vault_ca_file")
# Options of an entry, from the outside in: what Vault needs, and what only Vault can do. Its identities may stay in the
# inventory of a host that goes without it: they are not used.
_NEEDED = (("secrets", "role_id"), ("database", "migration", "role_id"))
_ONLY_VAULT = (("database", "vault_role"),)


def chosen(options: Options, values: Mapping[str, Any]) -> str:
    """Return the source, by the inventory or by the default of the role `secrets`; a wrong one is reported there."""
    default = options.get("secrets_source", {}).get("default", VAULT)
    return str(values.get("secrets_source") or default)


def variable_problems(source: str, options: Options, raw: Mapping[str, Any], apps: Any) -> list[Problem]:
    """Return the role variables that the source needs and nothing sets; `apps` without secrets need none of them."""
    entries = apps.values() if isinstance(apps, Mapping) else ()
    if source != VAULT or (entries and not any(isinstance(e, Mapping) and e.get("secrets") for e in entries)):
        return []
    unset = [name for name in _VARIABLES if name in options and raw.get(name) in (None, "")]
    return _required({name: options[name] for name in unset}, "")


def entry_problems(source: str, options: Options, entry: Mapping[str, Any], where: str) -> list[Problem]:
    """Return what an entry of `apps` lacks for the source, and what it asks of one that it does not have."""
    problems = []
    for path in _NEEDED if source == VAULT else ():
        holder = _inside(entry, path[:-1])
        if isinstance(holder, Mapping) and not holder.get(path[-1]):
            spec: Any = options
            for name in path[:-1]:
                spec = spec[name]["options"]
            problems += _required({path[-1]: spec[path[-1]]}, ".".join((where, *path[:-1])))
    for path in _ONLY_VAULT if source == SEALED else ():
        if _inside(entry, path):
            problems.append(
                Problem(
                    ".".join((where, *path)),
                    f"an option that works without Vault, because secrets_source is {SEALED}",
                    "one that only Vault can serve",
                    f"remove it, or set secrets_source: {VAULT}",
                )
            )
    return problems


def _required(options: Options, where: str) -> list[Problem]:
    asked = {name: {**spec, "required": True, "default": None} for name, spec in options.items()}
    return [
        replace(problem, do=f"{problem.do}; or set secrets_source: {SEALED}, for a host without Vault")
        for problem in validate(asked, {}, where)[1]
    ]


def _inside(entry: Any, path: Iterable[str]) -> Any:
    for name in path:
        entry = entry.get(name) if isinstance(entry, Mapping) else None
    return entry
