"""Checks of the inventory itself: names, domains, unknown variables, types, and secrets in plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from . import secret_scan
from .inspection.entry import FILL_IN
from .problems import Problem
from .specs import Options, validate, validate_value
from .values import kind, leaves, nearest

_NAME = re.compile(r"[a-z][a-z0-9-]{0,20}")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_DOMAIN = 253

# An app's name becomes a user, a group, a database, a template unit, and a folder below /srv, /run, /var/lib and
# /var/cache/forge, which a purge deletes. These are users, units and folders of the supported distributions, of what
# is often installed on them, and of this product.
RESERVED_NAMES = frozenset(
    """
    root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc gnats nobody sshd messagebus
    polkitd postgres postgresql nginx ssh ssl-cert sudo adm tty disk kmem dialout fax voice cdrom floppy tape audio dip
    operator src shadow utmp video sasl plugdev staff users nogroup input sgx kvm render crontab netdev landscape
    pollinate syslog uuidd tcpdump tss lxd admin ubuntu debian vault openbao haproxy prometheus forge forgectl
    user getty serial-getty container-getty console-getty autovt modprobe logrotate cron dbus
    blue green live
    apt certbot containerd credentials docker dpkg fail2ban letsencrypt lock log misc mount nftables pam private python
    shm snapd ucf udev uploads
    """.split()
)
SYSTEM_DATABASES = frozenset({"postgres", "template0", "template1"})
# Set for every app by the platform itself.
PLATFORM_VARIABLES = frozenset(
    "PROMETHEUS_MULTIPROC_DIR CREDENTIALS_DIRECTORY NOTIFY_SOCKET LISTEN_FDS LISTEN_PID LISTEN_FDNAMES WATCHDOG_USEC "
    "VAULT_TOKEN VAULT_ADDR PATH HOME USER".split()
)


def name_problems(name: str) -> list[Problem]:
    """Return what is wrong with the name of an app."""
    where = f"apps.{name}"
    if not _NAME.fullmatch(name):
        return [
            Problem(
                where,
                "a name of lower-case letters, digits and hyphens, a letter first, at most 21 characters",
                name,
                "rename the entry",
            )
        ]
    taken = (
        name in RESERVED_NAMES or name.startswith(("systemd-", "forge-", "_")) or name.endswith(("-migrate", "-lease"))
    )
    if taken:
        return [
            Problem(
                where,
                "a name that no user, unit or folder of the system has (the app gets one of each)",
                f"{name} is reserved",
                f"rename the entry, for example {name[:17]}-app",
            )
        ]
    return []


def domain_problems(entries: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Return the domains and aliases of all apps that are no host names, or that two of them claim."""
    problems: list[Problem] = []
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        claims = [(f"apps.{name}.domain", entry.get("domain"))]
        claims += [(f"apps.{name}.aliases[{i}]", alias) for i, alias in enumerate(entry.get("aliases") or [])]
        for where, domain in claims:
            if not domain:
                continue  # The specification has reported it.
            if mistake := _domain_mistake(domain):
                problems.append(Problem(where, "a host name such as app.example.com", domain, mistake))
            elif domain in owners:
                problems.append(
                    Problem(
                        where,
                        "a domain that no other entry claims",
                        f"{domain}, which {owners[domain]} has already",
                        "give each app a domain of its own",
                    )
                )
            else:
                owners[domain] = where
    return problems


def database_problems(entries: Mapping[str, Mapping[str, Any]], local: str) -> list[Problem]:
    """Return the databases of this host, `local` as a placement, that two apps claim or that are PostgreSQL's own."""
    problems: list[Problem] = []
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        database = entry.get("database")
        if not isinstance(database, Mapping) or database.get("placement") != local:
            continue
        where, wanted = f"apps.{name}.database.name", str(database.get("name") or name)
        if wanted in SYSTEM_DATABASES:
            problems.append(Problem(where, "a database of the app's own", f"{wanted} is PostgreSQL's", "rename it"))
        elif wanted in owners:
            problems.append(
                Problem(
                    where,
                    "a database that no other entry claims, since its roles and their passwords belong to one app",
                    f"{wanted}, which {owners[wanted]} has already",
                    "give each app a database of its own, or set placement: external for those that share one",
                )
            )
        else:
            owners[wanted] = where
    return problems


def _domain_mistake(domain: str) -> str | None:
    if "://" in domain or "/" in domain or ":" in domain:
        return "leave out the scheme, the port and the path"
    if domain != domain.lower():
        return f"write it in lower case: {domain.lower()}"
    if domain.endswith("."):
        return "leave out the final dot"
    if not domain.isascii():
        return f"write it as {_punycode(domain)}"
    labels = domain.split(".")
    if len(domain) > _LONGEST_DOMAIN or not all(_LABEL.fullmatch(label) for label in labels):
        return "use letters, digits and hyphens between dots"
    if len(labels) < 2 and domain != "localhost":
        return "write the full name with its domain"
    if labels[-1].isdigit():
        return "use a name, not an address: certificates and the refusal of unknown hosts go by name"
    return None


def _punycode(domain: str) -> str:
    try:
        return domain.encode("idna").decode()
    except UnicodeError:
        return "punycode (xn--...)"


def setting_problems(name: str, entry: Mapping[str, Any], raw_settings: Any) -> list[Problem]:
    """Return what is wrong with the plain settings of an app.

    `raw_settings` are the same before templating and decryption: a value that was encrypted there would be in plain
    text on the host.
    """
    where = f"apps.{name}.settings"
    problems: list[Problem] = []
    settings: Mapping[str, Any] = entry.get("settings") or {}
    secrets = entry.get("secrets") or {}
    mapped: Mapping[str, Any] = (secrets.get("variables") if isinstance(secrets, Mapping) else None) or {}
    for variable, value in settings.items():
        here = f"{where}.{variable}"
        if not _VARIABLE.fullmatch(variable):
            problems.append(Problem(here, "the name of an environment variable", variable, "use letters, digits and _"))
        elif variable in PLATFORM_VARIABLES:
            problems.append(Problem(here, "a variable of the app", f"{variable}, which the platform sets", "remove it"))
        elif variable in mapped:
            problems.append(
                Problem(
                    here,
                    "a variable to be either a plain setting or a secret",
                    f"{variable} is also in apps.{name}.secrets.variables",
                    "remove it from settings, and change the secret if its value ever stood here",
                )
            )
        elif secret_scan.is_secret_name(variable) and secret_scan.holds_value(value):
            problems.append(_secret_problem(here, "a value under the name of a secret", name, variable))
        elif isinstance(raw_settings, Mapping) and is_encrypted(raw_settings.get(variable)):
            problems.append(
                _secret_problem(here, "a value that ansible-vault decrypts, plain on the host", name, variable)
            )
        elif value is None:
            problems.append(Problem(here, "a value", "nothing (null)", "set it or remove the line"))
        elif isinstance(value, str) and "\0" in value:
            problems.append(Problem(here, "text", "text with a NUL character", "remove the character"))
    problems += _computed_problems(name, entry, settings)
    return problems


def _computed_problems(name: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Problem]:
    """Return settings that say again, differently, what an option of the entry says."""
    options: dict[str, str] = {}
    database = entry.get("database")
    if isinstance(database, Mapping):
        prefix = entry.get("settings_prefix")
        for key, option, default in (
            ("url_variable", "url", "DATABASE_URL"),
            ("pool_variable", "pool_max", "DATABASE_POOL_MAX"),
        ):
            if variable := database.get(key) or (prefix and f"{prefix}{default}"):
                options[str(variable)] = f"apps.{name}.database.{option}"
    return [
        Problem(
            f"apps.{name}.settings.{variable}",
            f"{variable} to come from {option} alone",
            "a second value in settings",
            f"remove it here and use {option}",
        )
        for variable, option in options.items()
        if variable in settings
    ]


def _secret_problem(where: str, found: str, name: str, variable: str) -> Problem:
    return Problem(
        where,
        "no secret in plain text",
        found,
        f"put the value into Vault, map `{variable}: <key>` under apps.{name}.secrets.variables, and treat it as "
        "leaked if it was ever committed",
    )


def setting_text(value: Any) -> str:
    """Return the text that the environment variable gets: YAML's booleans in lower case, lists and mappings as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def mapping_problems(variables: Any, where: str) -> list[Problem]:
    """Return what is wrong with a mapping of environment variables to keys of a secret."""
    problems = []
    for variable, key in (variables or {}).items() if isinstance(variables, Mapping) else ():
        here = f"{where}.{variable}"
        if not _VARIABLE.fullmatch(str(variable)):
            problems.append(Problem(here, "the name of an environment variable", variable, "use letters, digits and _"))
        if not isinstance(key, str) or not key:
            problems.append(Problem(here, "the name of the key that holds the secret", kind(key), "name the key"))
        elif secret_scan.looks_like_value(key):
            problems.append(
                Problem(
                    here,
                    "the name of a key at the secrets path, such as signing_key",
                    "something that looks like the secret itself",
                    "put the value into Vault under a key, write the key's name here, and change the value",
                )
            )
    return problems


def shape_problems(value: Any, where: str) -> list[Problem]:
    """Return every scalar in `value` that has the shape of a secret."""
    return [
        Problem(
            path,
            "no secret in plain text",
            found,
            "put it into Vault, leave it out here, and revoke or change it: it has been in a file",
        )
        for path, found, _ in secret_scan.shapes(value, where)
    ]


def unfilled_problems(value: Any, where: str) -> list[Problem]:
    """Return every place in `value` that still says what `make new-app` puts where only a person knows the value."""
    return [
        Problem(path, "a value of your own", FILL_IN, "fill it in, or remove the line if the app can do without")
        for path, leaf in leaves(value, where)
        if leaf == FILL_IN
    ]


def unknown_variable_problems(names: list[str], specs: Mapping[str, Options]) -> list[Problem]:
    """Return the variables that carry a role's prefix and are an option of no role, probably for a slip of the pen."""
    known = {option for options in specs.values() for option in options}
    problems = []
    for name in sorted(set(names) - known):
        prefix, _, rest = name.partition("_")
        if prefix in specs:
            near = nearest(name, (option for option in known if option.startswith(f"{prefix}_"))) or nearest(
                name, known
            )
        else:
            meant = nearest(prefix, specs)
            near = f"{meant}_{rest}" if meant and f"{meant}_{rest}" in known else None
            if near is None:
                continue
        problems.append(
            Problem(
                name,
                "an option that a role declares in its meta/argument_specs.yml",
                f"a variable that no role knows: {name}",
                f"did you mean `{near}`?" if near else "remove it, or give it another prefix if it is your own",
            )
        )
    return problems


def role_value_problems(specs: Mapping[str, Options], values: Mapping[str, Any]) -> list[Problem]:
    """Return the role variables among `values` whose type or choice is wrong."""
    return [
        problem
        for options in specs.values()
        for name, spec in options.items()
        if name in values and name != "apps"
        for problem in validate_value(name, spec, values[name])
    ]


def required_problems(specs: Mapping[str, Options], roles: list[str], visible: Mapping[str, Any]) -> list[Problem]:
    """Return the required options of the play's `roles` that nothing sets."""
    required = {
        name: spec
        for role in roles
        for name, spec in specs.get(role, {}).items()
        if spec.get("required") and name not in visible and name != "apps"
    }
    return validate(required, {}, "")[1]


def role_secret_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """Return the role variables whose value, as it stands in the inventory, is a secret in plain text.

    A template is not: it names where the secret comes from. Nor is a value encrypted with ansible-vault.
    """
    problems = []
    for name, value in raw.items():
        if is_encrypted(value):
            continue
        found = shape_problems(value, name)
        if found:
            problems += found
        elif (
            secret_scan.is_secret_variable(name)
            and isinstance(value, str)
            and secret_scan.holds_value(value)
            and not value.startswith("/")
        ):
            problems.append(
                Problem(
                    name,
                    "no secret in plain text",
                    "a value under the name of a secret",
                    "take it from the environment or a file with a lookup, or encrypt it with ansible-vault",
                )
            )
    return problems


def secret_values(apps: Any, raw: Mapping[str, Any]) -> set[str]:
    """Return every value that may be a secret, so that no message contains one."""
    found = {text for _, _, text in secret_scan.shapes(apps, "")}
    entries = apps.values() if isinstance(apps, Mapping) else []
    for entry in entries:
        if not isinstance(entry, Mapping):
            continue
        settings, secrets = entry.get("settings"), entry.get("secrets")
        if isinstance(settings, Mapping):
            found |= {
                str(v) for k, v in settings.items() if secret_scan.is_secret_name(str(k)) and secret_scan.holds_value(v)
            }
        variables = secrets.get("variables") if isinstance(secrets, Mapping) else None
        if isinstance(variables, Mapping):
            found |= {key for key in variables.values() if isinstance(key, str) and secret_scan.looks_like_value(key)}
    for name, value in raw.items():
        if not isinstance(value, str) or secret_scan.is_template(value):
            continue
        if secret_scan.is_secret_variable(name) or secret_scan.shape(value):
            found.add(value)
    return found


def is_encrypted(value: Any) -> bool:
    """Tell whether `value` is still encrypted with ansible-vault."""
    return type(value).__name__ in ("EncryptedString", "AnsibleVaultEncryptedUnicode")
