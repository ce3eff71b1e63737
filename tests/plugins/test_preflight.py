"""The preflight as a play runs it: one host for each input, this machine behind all of them, in check mode."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pairs import pairs
from sources import LOCK, MANIFEST, PINS, index, wheel, write

ROOT = Path(__file__).resolve().parents[2]
# Put together here, so that no file of the repository holds anything of the shape of a secret.
TOKEN = "hvs." + 24 * "Ab1"
URL = "postgresql://shop:" + "hunter2hunter2" + "@db.example.com/shop"
PASSWORD = "correct horse battery staple"  # pragma: allowlist secret
# A secret that stands in the place of the name of a key.
MISPLACED = 8 * "x9Y2"

PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: preflight
      # All of them are this machine: one process of Ansible's on it is enough.
      delegate_to: localhost
    # Listed so that what it requires is asked for; `never` keeps it from running.
    - role: secrets
      tags: [never]
    - role: nginx
      tags: [never]
    - role: alerts
      tags: [never]
"""

Change = dict[str, Any]


def merged(base: Any, change: Any) -> Any:
    """Return `base` with `change` laid over it; None removes."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    keys = [*base, *(key for key in change if key not in base)]
    laid = {key: merged(base.get(key), change[key]) if key in change else base[key] for key in keys}
    return {key: value for key, value in laid.items() if value is not None}


def app(**options: Any) -> Change:
    """Change options of the one app."""
    return {"apps": {"shop": options}}


ENTRY: Change = {
    "domain": "shop.example.com",
    "source": "{{ sources }}/good",
    "module": "shop.main:app",
    "python_path": "src",
    "secrets": {"role_id": "r", "variables": {"FORGE_SIGNING_KEY": "signing_key"}},
}
PAIR = "nginx_tls_certificates.shop"
CERTIFICATE, KEY = "{{ tls }}/good.pem", "{{ tls }}/good.key"


def acme(**variables: str) -> Change:
    """Take certificates from an ACME server, with such variables of it."""
    return {"nginx_tls_source": "acme", **{f"nginx_acme_{name}": value for name, value in variables.items()}}


def files(certificate: str, key: str, more: Change | None = None) -> Change:
    """Bring a certificate and a key along, each by its name in the fixture `facts`."""
    pair = {"certificate": f"{{{{ tls }}}}/{certificate}.pem", "key": f"{{{{ tls }}}}/{key}.key"}
    return {"nginx_tls_source": "files", "nginx_tls_certificates": {"shop": pair, **(more or {})}}


# Input: what is changed, and where, what was expected, what was found, what to do.
REFUSED: dict[str, tuple[Change, tuple[str, str, str, str]]] = {
    "no domain": (
        app(domain=None),
        ("apps.shop.domain", "a string", "it is not set", "set it: Name under which clients reach the app"),
    ),
    "empty domain": (app(domain="~"), ("apps.shop.domain", "a host name", "~", "use letters, digits and hyphens")),
    "address for a domain": (
        app(domain="192.0.2.1"),
        ("apps.shop.domain", "a host name", "192.0.2.1", "use a name, not an address"),
    ),
    "URL for a domain": (
        app(domain="https://shop.example.com"),
        ("apps.shop.domain", "a host name", "https://shop", "leave out the scheme"),
    ),
    "no apps": ({"apps": None}, ("apps", "a mapping with one entry an app", "it is not set", "see inventory/example")),
    "name of a system user": (
        {"apps": {"shop": None, "postgres": ENTRY}},
        (
            "apps.postgres",
            "a name that no user, unit or folder of the system has",
            "postgres is reserved",
            "postgres-app",
        ),
    ),
    "not filled in": (
        app(settings={"REGION": "FILL_IN"}),
        ("apps.shop.settings.REGION", "a value of your own", "FILL_IN", "fill it in"),
    ),
    "unknown option": (
        app(request_timout=5),
        (
            "apps.shop.request_timout",
            "one of the options aliases,",
            "request_timout",
            "did you mean `request_timeout`?",
        ),
    ),
    "unknown variable": (
        {"nginx_hsts_second": 1},
        ("nginx_hsts_second", "an option that a role declares", "no role knows", "did you mean `nginx_hsts_seconds`?"),
    ),
    "misspelt role": (
        {"ngnix_ipv6": False},
        ("ngnix_ipv6", "an option that a role declares", "no role knows", "did you mean `nginx_ipv6`?"),
    ),
    "wrong type": (
        app(keep_releases="many"),
        ("apps.shop.keep_releases", "an integer", "a string: many", "give it an integer"),
    ),
    "wrong type of a role's variable": (
        {"nginx_ipv6": "perhaps"},
        ("nginx_ipv6", "a boolean", "a string: perhaps", "give it a boolean"),
    ),
    "wrong choice": (
        {"nginx_tls_source": "acme2"},
        ("nginx_tls_source", "a string, one of own_ca, files, acme", "a string: acme2", "give it a string, one of"),
    ),
    "out of range": (
        app(request_timeout=0),
        ("apps.shop.request_timeout", "a number from 1 to 3600", "0", "correct request_timeout"),
    ),
    "required variable of a role": (
        {"secrets_vault_address": None},
        (
            "secrets_vault_address",
            "a string",
            "it is not set",
            "set it: URL of the Vault or OpenBao server, as C(https://vault.example.com:8200); or set "
            "secrets_source: systemd_creds, for a host without Vault",
        ),
    ),
    "port out of range": (
        {"hardening_allowed": [{"port": 8443}, {"port": 65536}]},
        ("hardening_allowed[1].port", "a port from 1 to 65535", "65536", "correct it"),
    ),
    "network that is none": (
        {"hardening_allowed": [{"port": 9100, "from": ["192.0.2.0/24", "bastion.example.com"]}]},
        (
            "hardening_allowed[0].from[1]",
            "a network in CIDR notation",
            "bastion.example.com",
            "use addresses, no names",
        ),
    ),
    "network with bits behind its length": (
        {"hardening_ssh_from": ["198.51.100.7/24"]},
        ("hardening_ssh_from[0]", "a network in CIDR notation", "198.51.100.7/24", "write 198.51.100.0/24"),
    ),
    "option of an open port": (
        {"hardening_allowed": [{"port": 53, "protocol": "sctp"}]},
        ("hardening_allowed[0].protocol", "a string, one of tcp, udp", "a string: sctp", "give it a string, one of"),
    ),
    "trial that is too short": (
        {"hardening_trial_seconds": 3},
        ("hardening_trial_seconds", "a number from 10 to 600", "3", "correct it"),
    ),
    "no role id": (
        app(secrets={"role_id": None}),
        ("apps.shop.secrets.role_id", "a string", "it is not set", "set it: Role id of that AppRole; or set secrets_"),
    ),
    "no role id of the migration": (
        app(database={"migration": {}}),
        ("apps.shop.database.migration.role_id", "a string", "it is not set", "set it: Role id of that AppRole; or"),
    ),
    "lease of a local database": (
        app(database={"vault_role": "shop"}),
        (
            "apps.shop.database.vault_role",
            "no role of Vault's for a database on this host",
            "shop",
            "remove it, or set placement: external",
        ),
    ),
    "lease without Vault": (
        {
            "secrets_source": "systemd_creds",
            **app(
                database={
                    "placement": "external",
                    "url": "postgresql://shop@db.lease.example.com/shop",
                    "vault_role": "shop",
                }
            ),
        },
        (
            "apps.shop.database.vault_role",
            "an option that works without Vault, because secrets_source is systemd_creds",
            "one that only Vault can serve",
            "remove it, or set secrets_source: vault",
        ),
    ),
    "unknown source of secrets": (
        {"secrets_source": "vualt"},
        ("secrets_source", "a string, one of vault, systemd_creds", "a string: vualt", "give it a string, one of"),
    ),
    "secret ids bound to a name": (
        {"secrets_bound_cidrs": ["192.0.2.10/32", "vm.example.com"]},
        ("secrets_bound_cidrs[1]", "addresses in CIDR notation", "vm.example.com", "use addresses as Vault sees them"),
    ),
    "secret ids bound to an address without its length": (
        {"secrets_bound_cidrs": ["192.0.2.10"]},
        ("secrets_bound_cidrs[0]", "such as 192.0.2.10/32", "192.0.2.10", "write 192.0.2.10/32"),
    ),
    "secret ids bound to less than it says": (
        {"secrets_bound_cidrs": ["192.0.2.10/24"]},
        ("secrets_bound_cidrs[0]", "addresses in CIDR notation", "192.0.2.10/24", "write 192.0.2.0/24"),
    ),
    "a start that waits longer than it may take": (
        {"secrets_retry_seconds": 60},
        ("secrets_retry_seconds", "a number from 0 to 59, because systemd ends a start after 60 s", "60", "correct it"),
    ),
    "a look for new secrets that never comes": (
        {"secrets_rotation_minutes": -5},
        ("secrets_rotation_minutes", "a number from 0 to 1440, 0 for never", "-5", "correct it"),
    ),
    "a reboot window that is none": (
        {"base_reboot_window": "3-4"},
        (
            "base_reboot_window",
            "a span of the day, such as 03:00-04:00, of 30 minutes or more; empty for never",
            "3-4",
            "write hours and minutes of both ends, in quotes",
        ),
    ),
    "a webhook in plain text": (
        {"alerts_webhook_url": "https://hooks.example.com/T1/B2"},
        ("alerts_webhook_url", "no secret in plain text", "a plain URL", "take it from the environment"),
    ),
    "a webhook that was forgotten": (
        {"alerts_webhook_url": "{{ lookup('ansible.builtin.env', 'NOT_SET_ANYWHERE') }}"},
        ("alerts_webhook_url", "a value", "a template that comes out empty", "set what its template reads"),
    ),
    "a webhook without TLS": (
        {"alerts_webhook_url": "{{ 'http://hooks.example.com/' }}"},
        ("alerts_webhook_url", "an https URL", "something else", "correct it where it comes from"),
    ),
    "mail without a server": (
        {"alerts_mail_to": ["ops@example.com"], "alerts_mail_from": "forge@example.com"},
        ("alerts_mail_server", "the name of a mail server", "it is not set", "set it"),
    ),
    "mail to nowhere": (
        {
            "alerts_mail_to": ["ops@example.com, x"],
            "alerts_mail_from": "forge@example.com",
            "alerts_mail_server": "mail.example.com",
        },
        ("alerts_mail_to[0]", "an address such as", "ops@example.com, x", "correct it"),
    ),
    "a mail password through the open": (
        {
            "alerts_mail_to": ["ops@example.com"],
            "alerts_mail_from": "forge@example.com",
            "alerts_mail_server": "mail.example.com",
            "alerts_mail_security": "none",
            "alerts_mail_user": "forge",
            "alerts_mail_password": "{{ 'a password' }}",
        },
        ("alerts_mail_security", "starttls or tls", "none", "protect it"),
    ),
    "a command by its name alone": (
        {"alerts_command": ["page"]},
        ("alerts_command", "the whole path of a program", "page", "write /usr/local/bin/"),
    ),
    "no message an hour": (
        {"alerts_messages_per_hour": 0},
        ("alerts_messages_per_hour", "a number from 1 to 3600", "0", "correct it"),
    ),
    "a reboot window that is over at once": (
        {"base_reboot_window": "23:57-00:04"},
        (
            "base_reboot_window",
            "a span of the day, such as 03:00-04:00, of 30 minutes or more; empty for never",
            "23:57-00:04, 7 minutes",
            "make it longer",
        ),
    ),
    "rotation without a role id": (
        app(secrets={"rotation": {"approle": "team-rotate"}}),
        ("apps.shop.secrets.rotation.role_id", "a string", "it is not set", "set it: Role id of that AppRole"),
    ),
    "undefined template": (
        app(domain="{{ nowhere }}"),
        ("apps.shop.domain", "a value whose template can be filled in", "'nowhere' is undefined", "define what it"),
    ),
    "liveness is readiness": (
        app(ready_path="/health"),
        (
            "apps.shop.ready_path",
            "a path other than health_path",
            "/health",
            "give the app two endpoints; or, where it has but this one, set health_path to an empty string",
        ),
    ),
    "metrics at the root": (
        app(metrics_path="/"),
        ("apps.shop.metrics_path", "a path of its own", "/, which is all of the app", "correct it"),
    ),
    "database without a secret": (
        app(secrets=None, database={}),
        ("apps.shop.secrets", "since the app has a database", "it is not set", "map a variable to the key"),
    ),
    "prefix that begins no name": (
        app(settings_prefix="MY-APP-"),
        ("apps.shop.settings_prefix", "what the name of a variable may begin with", "MY-APP-", "use letters"),
    ),
    "setting that the prefix names": (
        app(settings_prefix="SHOP_", settings={"SHOP_DATABASE_URL": "x"}, database={}),
        ("apps.shop.settings.SHOP_DATABASE_URL", "to come from apps.shop.database.url", "a second value", "remove it"),
    ),
    "form of a URL with a field that there is not": (
        app(database={"url_format": "postgresql://{username}@{host}/{name}"}),
        ("apps.shop.database.url_format", "no other braces than", "another text", "{user}:{password}@{host}/{name}"),
    ),
    "name of a command": (
        app(commands={"send_mails": {"command": ["shop.mails"]}}),
        ("apps.shop.commands.send_mails", "a name of lower-case letters", "send_mails", "rename the command"),
    ),
    "command without a program": (
        app(commands={"mails": {"schedule": "hourly"}}),
        ("apps.shop.commands.mails.command", "a list of str", "it is not set", "set it: A program of the app's"),
    ),
    "command in one line": (
        app(commands={"mails": ["shop.mails"]}),
        ("apps.shop.commands.mails", "a mapping with at least command", "a list", "fill it in"),
    ),
    "program with a folder": (
        app(commands={"mails": {"command": ["/usr/bin/env", "python"]}}),
        ("apps.shop.commands.mails.command", "a program of the app's environment", "/usr/bin/env", "name it without"),
    ),
    "option of a command": (
        app(commands={"mails": {"command": ["shop.mails"], "cron": "hourly"}}),
        ("apps.shop.commands.mails.cron", "one of the options command,", "cron", "remove it"),
    ),
    "command that never stops": (
        app(commands={"mails": {"command": ["shop.mails"], "stop_seconds": 0}}),
        ("apps.shop.commands.mails.stop_seconds", "a number from 1 to 3600", "0", "correct stop_seconds"),
    ),
    "memory of commands that does not fit": (
        app(workers=1, commands={"mails": {"command": ["shop.mails"], "memory_max_mib": 1024 * 1024}}),
        ("memory of all apps together", "kept for the system", "shop 1 x 150 + 1048576 for its commands", "lower apps"),
    ),
    "secret under its name": (
        app(settings={"API_TOKEN": PASSWORD}),
        ("apps.shop.settings.API_TOKEN", "no secret in plain text", "under the name of a secret", "put the value into"),
    ),
    "secret by its shape": (
        app(settings={"CACHE": URL}),
        ("apps.shop.settings.CACHE", "no secret in plain text", "a URL with a password", "put it into Vault"),
    ),
    "secret for a key": (
        app(secrets={"variables": {"FORGE_SIGNING_KEY": MISPLACED}}),
        (
            "FORGE_SIGNING_KEY",
            "the name of a key at the secrets path",
            "looks like the secret itself",
            "and change the",
        ),
    ),
    "token in the inventory": (
        {"secrets_vault_token": TOKEN},
        ("secrets_vault_token", "no secret in plain text", "a Vault token", "revoke or change it"),
    ),
    "no source": (
        app(source="/nowhere/shop"),
        (
            "apps.shop.source",
            "the folder of the app on the control machine",
            "no folder at /nowhere/shop",
            "correct `so",
        ),
    ),
    "no such module": (
        app(module="shop.web:app"),
        ("apps.shop.module", "a module shop.web below", "ASGI apps there: shop.main:app", "use `shop.main:app`"),
    ),
    "no such callable": (
        app(module="shop.main:application"),
        ("apps.shop.module", "a top-level callable `application`", "found shop.main:app", "use `shop.main:app`"),
    ),
    "factory without a call": (
        app(module="shop.main:create_app"),
        ("apps.shop.module", "an ASGI callable", "probably a factory", "write `shop.main:create_app()`"),
    ),
    "static folder that was not built": (
        app(static={"/assets/": "dist"}),
        ("apps.shop.static./assets/", "a folder in", "dist, which is none", "build it first, or correct it"),
    ),
    "limit of a client that lets nobody in": (
        app(client_limits={"streams": 0}),
        ("apps.shop.client_limits.streams", "a number from 1 to 65535", "0", "correct streams"),
    ),
    "no lock": (
        app(lock="locks/production.txt"),
        ("apps.shop.lock", "a lock at", "no such file", "uv pip compile --universal --generate-hashes"),
    ),
    "lock without some hashes": (
        app(source="{{ sources }}/some hashes"),
        ("apps.shop.lock", "a hash for every package", "without a hash: httpx", "--generate-hashes"),
    ),
    "lock that does not match": (
        app(source="{{ sources }}/older lock"),
        (
            "apps.shop.lock",
            "to satisfy the dependencies in pyproject.toml",
            "fastapi is 0.1.0, declared >=0.115",
            "anew",
        ),
    ),
    "no version of a package": (
        app(source="shop"),
        ("apps.shop.source", "the folder of the app on the control machine", "no folder at", "correct `source`"),
    ),
    "credentials for a repository": (
        app(source="git+https://t0ken@git.example.com/shop@v1"),
        ("apps.shop.source", "a URL without credentials", "a user or a token", "let a credential helper of git"),
    ),
    "no name of a Debian package": (
        app(build_packages=["libpq-dev", "-o=x"]),
        ("apps.shop.build_packages", "names of Debian packages", "-o=x", "correct it"),
    ),
    "other Python": (
        app(source="{{ sources }}/other python"),
        ("apps.shop.source", "Python <3.9", f"Python {platform.python_version()[:3]}", "widen requires-python"),
    ),
    "unsupported distribution": (
        {"preflight_distributions": {"Debian": ["99"]}},
        ("distribution of the host", "one of Debian 99", "{{ distribution }}", "install the host with a supported"),
    ),
    "systemd too old": (
        {"preflight_systemd_minimum": 9999},
        ("systemd of the host", "systemd 9999 or newer, running as PID 1", "systemd", "boots a supported distribution"),
    ),
    "disk too small": (
        {"preflight_disk_minimum_mib": 10**9},
        ("free disk for /, /srv, /var", "at least 1000000000 MiB", "MiB at /srv", "free some space"),
    ),
    "memory too small": (
        {"preflight_memory_minimum_mib": 10**9},
        ("memory of the host", "at least 1000000000 MiB", "MiB (", "take a larger host"),
    ),
    "port in use": (
        {"preflight_ports": ["{{ taken }}"]},
        ("port {{ taken }} of the host", "free, or held by nginx", "held by {{ holder }}", "stop it"),
    ),
    "connections that do not fit": (
        app(workers=4, database={"pool_max": 20, "migration": {"role_id": "m"}}),
        (
            "connections of PostgreSQL (local)",
            "at most postgresql_max_connections = 100",
            "177: shop: 1 hosts x 4 workers x 2 slots x (20 pool_max + 1 listener) = 168, + 2 for migrations; "
            "+ 2 exporter + 5 reserved",
            "raise postgresql_max_connections to 177 or more, or lower apps.shop.database.pool_max or apps.shop.wor",
        ),
    ),
    "connections of an external server": (
        app(workers=4, database={"placement": "external", "url": "postgresql://shop@db.example.com/shop"})
        | {"preflight_external_max_connections": 60, "preflight_connections_exporter": 0},
        # Two hosts of the inventory carry this app with an external database.
        (
            "connections of PostgreSQL (db.example.com:5432)",
            "at most preflight_external_max_connections = 60",
            "101: shop: 2 hosts x 4 workers x 2 slots x (5 pool_max + 1 listener) = 96, + 0 for migrations",
            "raise preflight_external_max_connections to 101",
        ),
    ),
    "no address of an ACME server": (
        acme(directory="http://acme.example.com/directory"),
        ("nginx_acme_directory", "the https URL", "http://acme.example.com/directory", "correct it, or leave it out"),
    ),
    "no mail address for the ACME server": (
        acme(email="ops at example.com"),
        ("nginx_acme_email", "an address such as", "ops at example.com", "correct it, or leave it out"),
    ),
    "no CA of the ACME server": (
        acme(ca_file="{{ sources }}/good/pyproject.toml"),
        ("nginx_acme_ca_file", "a certificate in PEM", "a file without one", "correct the path"),
    ),
    "lost CA of the ACME server": (
        acme(ca_file="{{ sources }}/ca.pem"),
        ("nginx_acme_ca_file", "a certificate in PEM", "{{ sources }}/ca.pem: there is no", "correct the path"),
    ),
    "name that no ACME server reaches": (
        merged(acme(), app(domain="localhost")),
        ("apps.shop.domain", "a name that an ACME server can reach", "localhost", "give it a name"),
    ),
    "certificates looked at too seldom": (
        {"nginx_certificate_check_hours": 25},
        ("nginx_certificate_check_hours", "a number from 1 to 24", "25", "correct it"),
    ),
    "no certificate of the app": (
        {"nginx_tls_source": "files"},
        (f"{PAIR}", "a mapping with certificate and key, because", "nothing (null)", "name the two files of this app"),
    ),
    "certificate without its key": (
        {"nginx_tls_source": "files", "nginx_tls_certificates": {"shop": {"certificate": "/shop.pem"}}},
        (f"{PAIR}", "a mapping with certificate and key, because", "a mapping with certificate", "name the two files"),
    ),
    "certificate of no app": (
        files("good", "good", more={"shopp": {"certificate": "/a", "key": "/b"}}),
        (f"{PAIR}p", "the name of an app", "shopp", "did you mean `shop`?"),
    ),
    "relative path of a certificate": (
        {"nginx_tls_source": "files", "nginx_tls_certificates": {"shop": {"certificate": "a", "key": KEY}}},
        (f"{PAIR}.certificate", "an absolute path", "a", "begin it with the folder of"),
    ),
    "lost certificate": (
        files("lost", "good"),
        (f"{PAIR}.certificate", "a file that can be read", "{{ tls }}/lost.pem: there is no such", "correct the path"),
    ),
    "key of another certificate": (
        files("good", "other"),
        (f"{PAIR}.key", "the key of the first certificate (CN=good)", "the key of another", "give it the key"),
    ),
    "key with a passphrase": (
        files("good", "locked"),
        (f"{PAIR}.key", "a private key in PEM without a passphrase", "one with a passphrase", "give it the key"),
    ),
    "no key in the file": (
        {
            "nginx_tls_source": "files",
            "nginx_tls_certificates": {"shop": {"certificate": CERTIFICATE, "key": CERTIFICATE}},
        },
        (f"{PAIR}.key", "a private key in PEM without a passphrase", "something else", "give it the key"),
    ),
    "no certificate in the file": (
        {"nginx_tls_source": "files", "nginx_tls_certificates": {"shop": {"certificate": KEY, "key": KEY}}},
        (f"{PAIR}.certificate", "certificates in PEM, the server's first", "no certificate", "give it the whole chain"),
    ),
    "expired certificate": (
        files("expired", "good"),
        (f"{PAIR}.certificate", "one that is valid now", "it expired on 20", "renew it"),
    ),
    "certificate of the future": (
        files("future", "good"),
        (f"{PAIR}.certificate", "one that is valid now", "it begins on 20", "wait"),
    ),
    "certificate of another domain": (
        merged(files("good", "good"), app(aliases=["www.shop.example.com", "shop.example.org"])),
        (
            f"{PAIR}.certificate",
            "one for the domain and every alias",
            "shop.example.com, *.shop.example.com, without shop.example.org",
            "have it issued for all",
        ),
    ),
    "chain in the wrong order": (
        files("backwards", "good"),
        (f"{PAIR}.key", "the key of the first certificate (CN=ca)", "its certificate is number 2", "put the server's"),
    ),
    "chain of others": (
        files("strangers", "good"),
        (f"{PAIR}.certificate", "each certificate to be followed", "CN=good is followed by CN=other", "put them in"),
    ),
    "no intermediate": (
        files("alone", "good"),
        (
            f"{PAIR}.certificate",
            "the chain up to the root",
            "the server's certificate alone, signed by CN=ca",
            "append",
        ),
    ),
    "memory that does not fit": (
        app(workers=4, worker_memory_mib=1024 * 1024),
        ("memory of all apps together", "kept for the system", "shop 4 x 1048576 + 4194304", "lower apps.shop.workers"),
    ),
    "limit below the workers": (
        app(workers=4, memory_max_mib=300),
        ("apps.shop.memory_max_mib", "at least 664 MiB: 4 workers x 150 MiB + 64", "300 MiB", "raise memory_max_mib"),
    ),
}
SEVERAL: Change = {
    "apps": {"shop": {"domain": None, "settings": {"API_TOKEN": PASSWORD}, "source": "{{ sources }}/some hashes"}},
    "nginx_hsts_second": 1,
    "preflight_memory_minimum_mib": 10**9,
}
ACCEPTED: dict[str, Change] = {
    "plain": {},
    "lock without hashes": app(source="{{ sources }}/no hashes")
    | {"base_package_index_url": "{{ ['file://', sources, '/index'] | join }}"},
    "two apps": {
        "apps": {
            "shop": {"secrets": {"rotation": {"role_id": "t"}}, "database": {"migration": {"role_id": "m"}}},
            "blog": {
                "domain": "blog.example.com",
                "source": "{{ sources }}/good",
                "module": "shop.main:create_app()",
                "python_path": "src",
                "settings": {
                    "WEB_CONCURRENCY": "3",
                    "FLAG": True,
                    "NAMES": ["a", "b"],
                    "TEXT": "{{ 'from' }} a template",
                },
                "secrets": {"role_id": "r", "variables": {"KEY_OF_BLOG": "key"}, "path": "elsewhere/blog"},
                "request_timeout": 100,
            },
        }
    },
    "database of another environment": app(
        database={"placement": "external", "url": "postgresql://shop@db.staging.example.com/shop"}
    ),
    "external": app(database={"placement": "external", "url": "postgresql://shop@db.example.com/shop"}),
    "sealed on the host": {
        "secrets_source": "systemd_creds",
        "secrets_vault_address": None,
        "secrets_vault_ca_file": None,
        **app(secrets={"role_id": None}, database={"migration": {}}),
    },
    "without anything": {
        "secrets_vault_address": None,
        "secrets_vault_ca_file": None,
        **app(secrets=None, settings_prefix="", health_path="", ready_path="", metrics_path=""),
    },
    "commands": app(
        commands={
            "mails": {"command": ["shop.mails"], "memory_max_mib": 32},
            "report": {"command": ["report", "--all"], "schedule": "*-*-* 03:00:00"},
        }
    ),
    "nothing is released": {"preflight_sources": False, **app(source="git+https://nowhere.example.com/shop.git@main")},
    "one path for both": app(health_path="", ready_path="/health"),
    "bound secret ids": {"secrets_bound_cidrs": ["192.0.2.10/32", "2001:DB8::/64"], "secrets_retry_seconds": 59},
    "ACME server": acme(email="ops@example.com", ca_file=CERTIFICATE),
    "own certificate": merged(files("good", "good"), app(aliases=["www.shop.example.com"])),
    "own certificate with its chain": files("chain", "good"),
    "own certificate under ansible-vault": files("good", "vaulted"),
    "own certificate that is named later": {
        "nginx_tls_source": "files",
        "nginx_tls_certificates": {"shop": {"certificate": "{{ lookup('ansible.builtin.env', 'X') }}", "key": KEY}},
    },
    "template of a secret": {"secrets_vault_token": "{{ lookup('ansible.builtin.env', 'NO_SUCH_VARIABLE') }}"},
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the inputs refer to: sources, and a port that this process holds."""
    sources = tmp_path_factory.mktemp("sources")
    write(sources / "good")
    write(sources / "some hashes", lock=LOCK + "httpx==1\n")
    write(sources / "older lock", lock=LOCK.replace("0.140.0", "0.1.0"))
    index(
        sources / "index",
        *(wheel(sources / "wheels", name, version) for name, version in (pin.split("==") for pin in PINS)),
    )
    write(sources / "no hashes", lock="\n".join(PINS))
    write(sources / "other python", manifest=MANIFEST.replace(">=3.9", "<3.9"))
    tls = pairs(tmp_path_factory.mktemp("tls"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "sources": str(sources),
            "tls": str(tls),
            "taken": str(server.getsockname()[1]),
            "holder": Path("/proc/self/comm").read_text().strip(),
            "distribution": platform.freedesktop_os_release()["PRETTY_NAME"],
        }


def play(folder: Path, facts: dict[str, str], *options: str) -> str:
    """Run the play over every input in check mode; return what it printed."""
    release = platform.freedesktop_os_release()
    base = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "sources": facts["sources"],
        "tls": facts["tls"],
        "taken": facts["taken"],
        # This machine passes as a host, whatever it is.
        "preflight_distributions": {release["ID"].capitalize(): [release.get("VERSION_ID", "")]},
        "preflight_systemd_minimum": 0,
        "preflight_disk_minimum_mib": 1,
        "preflight_ports": [],
        "secrets_vault_address": "https://vault.example.com:8200",
        "secrets_vault_ca_file": "/etc/forge/ca.pem",
        "apps": {"shop": ENTRY},
    }
    changes = {name: change for name, (change, _) in REFUSED.items()} | {"several": SEVERAL} | ACCEPTED
    hosts = {name.replace(" ", "_"): merged(base, change) for name, change in changes.items()}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts}}))
    (folder / "play.yml").write_text(PLAY)
    environment = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")}
    environment["ANSIBLE_VAULT_PASSWORD_FILE"] = f"{facts['tls']}/vault-password"
    if "-vvvv" not in options:
        environment["ANSIBLE_STDOUT_CALLBACK"] = "ansible.posix.json"
    command = ["ansible-playbook", "--check", "--inventory", f"{folder}/hosts.yml", f"{folder}/play.yml", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout


@pytest.fixture(scope="module")
def results(facts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the preflight said of each input."""
    printed = play(tmp_path_factory.mktemp("play"), facts)
    document = json.loads(printed[printed.index("{") :])
    return {
        name.replace("_", " "): result
        for task in document["plays"][0]["tasks"]
        if task["task"]["name"] == "preflight : Check the inventory, the sources and the host"
        for name, result in task["hosts"].items()
    }


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_one_problem(
    name: str, results: dict[str, dict[str, Any]], facts: dict[str, str]
) -> None:
    """It says where, what was expected, what was found and what to do, and nothing else is wrong."""
    result, message = results[name], results[name]["msg"]
    assert result["failed"]
    assert not result["changed"]
    host = name.replace(" ", "_")
    assert message.startswith(f"Preflight refused {host}: 1 problem. Nothing was changed.\n\n1. ")
    lines = message.splitlines()[2:]
    for line, label, part in zip(
        lines, ("1. ", "   expected: ", "   found: ", "   do: "), REFUSED[name][1], strict=True
    ):
        assert line.startswith(label)
        assert re.sub(r"{{ (\w+) }}", lambda match: facts[match[1]], part) in line


def test_everything_wrong_is_in_one_message(results: dict[str, dict[str, Any]]) -> None:
    """Of the inventory, of a source and of the host, numbered."""
    message = results["several"]["msg"]
    assert "5 problems" in message.splitlines()[0]
    assert re.findall(r"^(\d)\. (.*)$", message, re.MULTILINE) == [
        ("1", "nginx_hsts_second"),
        ("2", "apps.shop.domain"),
        ("3", "apps.shop.settings.API_TOKEN"),
        ("4", "apps.shop.lock"),
        ("5", "memory of the host"),
    ]


def test_no_secret_is_shown_at_any_verbosity(facts: dict[str, str], tmp_path: Path) -> None:
    """Neither in a message nor in what Ansible prints about tasks, hosts and modules."""
    bearers = ["secret_under_its_name", "secret_by_its_shape", "secret_for_a_key", "token_in_the_inventory", "several"]
    printed = play(tmp_path, facts, "-vvvv", "--limit", ",".join(bearers))
    assert printed.count("Preflight refused") >= len(bearers)
    assert [secret for secret in (TOKEN, URL, "hunter2", PASSWORD, MISPLACED) if secret in printed] == []


@pytest.mark.parametrize("name", ACCEPTED)
def test_good_input_passes(name: str, results: dict[str, dict[str, Any]]) -> None:
    """It changes nothing, and both facts are there."""
    assert not results[name].get("failed"), results[name].get("msg")
    assert not results[name]["changed"]
    assert results[name]["apps"]


def test_a_lock_without_hashes_is_warned_of(results: dict[str, dict[str, Any]], facts: dict[str, str]) -> None:
    """And replaced by one with them, which only a release keeps beside the inventory."""
    result = results["lock without hashes"]
    (warning,) = result["warnings"]
    assert warning.startswith("apps.shop: requirements.txt has no hashes, so it does not say what was tested; ")
    (shop,) = result["apps"]
    assert (shop["lock"], shop["source_path"]) == (".forge/requirements.txt", f"{facts['sources']}/no hashes")
    assert (Path(shop["source_additions"]) / shop["lock"]).read_text().count("--hash=sha256:") == len(PINS)
    kept = Path(shop["source_lock"]["keep"])
    assert kept.parts[-2:] == ("locks", "shop.txt")
    assert not kept.exists()
    assert "warnings" not in results["plain"]


def test_what_roles_get_of_an_app(results: dict[str, dict[str, Any]], facts: dict[str, str]) -> None:
    """Sorted entries with defaults, names that follow from the app's, settings as text, and the computed keys."""
    blog, shop = results["two apps"]["apps"]
    assert [blog["name"], shop["name"]] == ["blog", "shop"]
    assert shop["source_path"] == f"{facts['sources']}/good"
    assert (shop["environment"], shop["keep_releases"], shop["aliases"]) == ("production", 5, [])
    assert shop["secrets"]["path"] == "forge/shop/app"
    assert shop["secrets"]["approle"] == "forge-shop-app"
    assert shop["secrets"]["rotation"] == {"approle": "forge-shop-rotate", "role_id": "t"}
    assert blog["secrets"]["rotation"] is None
    assert shop["database"]["name"] == "shop"
    assert shop["database"]["migration"]["path"] == "forge/shop/migrate"
    assert shop["database"]["migration"]["approle"] == "forge-shop-migrate"
    assert blog["secrets"]["path"] == "elsewhere/blog"
    assert blog["settings"] == {
        "WEB_CONCURRENCY": "3",
        "FLAG": "true",
        "NAMES": '["a", "b"]',
        "TEXT": "from a template",
    }
    assert blog["workers"] == {"count": 3, "reasons": ["3 set by WEB_CONCURRENCY in apps.blog.settings"]}
    assert blog["timeouts"]["stop"] == 110
    assert set(blog["limits"]) == {"memory_max_mib", "cpu_quota_percent", "tasks_max"}


def test_what_roles_get_of_the_host(results: dict[str, dict[str, Any]]) -> None:
    """The facts of this machine, and the arithmetic of its database."""
    host = results["two apps"]["host"]
    assert host["cpus"] <= (os.cpu_count() or 1)
    assert host["python_version"].startswith("3.")
    assert host["released"] == sorted(path.parent.name for path in Path("/var/lib/forge").glob("*/state.json"))
    assert host["package_lists"] == any(Path("/var/lib/apt/lists").glob("*Packages*"))
    connections = host["connections"]["local"]
    assert connections["required"] + connections["spare"] == connections["max_connections"] == 100
    assert connections["arithmetic"].startswith("shop: 1 hosts x ")
