"""The templates that carry logic, rendered by Ansible for an app at its defaults and one with every option changed.

What is rendered is read as its consumer reads it, never compared with the text of the template.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge_alerts
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "roles/forgectl/files/forgectl/src"))

from forge.specs import read_options  # noqa: E402
from forge_certificates import Config  # noqa: E402
from forgectl.config import App, Command, decode  # noqa: E402
from sources import write  # noqa: E402

# Whatever breaks quoting in TOML, in units and in Python.
HARD = "\\ \"double\" 'single' $HOME `id` %n %% # ; ünïcode 鍵\nnext line\ttab"
PLAIN: dict[str, Any] = {
    "domain": "plain.example.com",
    "source": "{{ sources }}",
    "module": "shop.main:app",
    "python_path": "src",
    "secrets": {"role_id": "r", "variables": {"FORGE_SIGNING_KEY": "signing_key"}},
}
# Without secrets, a database, paths for probes, metrics, and names of the platform's.
BARE: dict[str, Any] = {
    **{name: value for name, value in PLAIN.items() if name != "secrets"},
    "domain": "bare.example.com",
    "settings": {"OWN": "yes"},
    "settings_prefix": "",
    "health_path": "",
    "ready_path": "",
    "metrics_path": "",
}
SEALED: dict[str, Any] = {
    **PLAIN,
    "domain": "sealed.example.com",
    "secrets": {"variables": {"FORGE_SIGNING_KEY": "signing_key"}, "rotation": {"role_id": "o"}},
    "database": {"migration": {}},
}
CHANGED: dict[str, Any] = {
    "domain": "changed.example.com",
    "aliases": ["www.changed.example.com", "old.example.com"],
    "source": "{{ sources }}",
    "module": "shop.main:create_app('x')",
    "python_path": "./src",
    "lock": "locks/production.txt",
    "build_packages": ["libpq-dev"],
    "environment": "staging",
    "settings": {"HARD": HARD, "NUMBER": 5, "FLAG": False},
    "settings_prefix": "SHOP_",
    "commands": {
        "mails": {"command": ["shop.mails", "--to", HARD], "memory_max_mib": 99, "stop_seconds": 5},
        "report": {"command": ["report"], "schedule": "*-*-* 03:00:00"},
    },
    "workers": 3,
    "worker_memory_mib": 90,
    "memory_max_mib": 777,
    "cpu_quota_percent": 60,
    "tasks_max": 99,
    "request_timeout": 130,
    "executable_memory": True,
    "stream_timeout": 500,
    "websocket_timeout": 600,
    "max_body_kib": 5,
    "body_limits": {"/v1/uploads": 20480, "/v1/small/": 1},
    "client_limits": {"requests_per_second": 7, "burst": 8, "concurrent_requests": 9, "streams": 4},
    "content_security_policy": "default-src 'self'; report-to \"x\" y",
    "static": {"/assets/": "dist/assets"},
    "health_path": "/live",
    "ready_path": "/able",
    "metrics_path": "/numbers",
    "keep_releases": 3,
    "watch_seconds": 4,
    "recycle_after_hours": 5,
    "recycle_memory_percent": 60,
    "max_requests": 1000,
    "secrets": {
        "path": "team/changed",
        "approle": "team-changed",
        "role_id": "r",
        "variables": {"KEY_ONE": "one", "KEY_TWO": "two"},
        "rotation": {"approle": "team-changed-rotate", "role_id": "t"},
    },
    "database": {
        "placement": "external",
        "name": "shop_db",
        "url": "postgresql+asyncpg://shop@db.example.com/shop_db",
        "migration_url": "postgresql+asyncpg://mover@db.example.com/shop_db",
        "url_variable": "DATABASE_URL",
        "url_format": "postgresql://{user}:{password}@{host}/{name}",
        "password_key": "app_password",
        "vault_role": "shop",
        "pool_max": 2,
        "pool_variable": "POOL",
        "migration": {
            "command": ["shop.migrate", "--to", "head it's"],
            "path": "team/changed/migrate",
            "approle": "team-changed-migrate",
            "role_id": "m",
            "password_key": "mover_password",
            "variables": {"DATABASE_PASSWORD": "mover_password"},
        },
    },
}
FILES = {
    "alerts": ["alerts.toml", "forge-alerts.service"],
    "forgectl": ["app.toml"],
    "app": [
        "slot.conf",
        "gunicorn.conf.py",
        "migrate@.service",
        "lease@.service",
        "app@.socket",
        "forge-rotate@.timer",
    ],
    "nginx": ["nginx.conf", "default.conf", "site.conf", "certificates.toml"],
}
PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - preflight
  tasks:
    - name: Take the host for another
      ansible.builtin.set_fact:
        forge_host: "{{ forge_host | combine(pretended) }}"
    - name: Render
      ansible.builtin.template:
        src: "{{ root }}/roles/{{ item }}.j2"
        dest: "{{ rendered }}/{{ inventory_hostname }}/{{ item | basename }}"
        mode: "0600"
      loop: "{{ templates }}"
      vars:
        app: "{{ forge_apps[0] }}"
"""

Entry = dict[str, Any]
Render = Callable[[str], Path]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run preflight and the template module on this machine, once."""
    folder = tmp_path_factory.mktemp("templates")
    source = write(folder / "shop")
    (source / "locks").mkdir()
    (source / "locks/production.txt").write_text((source / "requirements.txt").read_text())
    (source / "dist/assets").mkdir(parents=True)
    release = platform.freedesktop_os_release()
    variables: dict[str, Any] = {}
    for role in ("secrets", "nginx", "base", "nginx", "app", "forgectl", "alerts"):
        for kind in ("defaults", "vars"):
            file = ROOT / "roles" / role / kind / "main.yml"
            variables |= yaml.safe_load(file.read_text()) if file.exists() else {}
    variables |= {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "root": str(ROOT),
        "sources": str(source),
        "rendered": str(folder),
        "templates": [f"{role}/templates/{name}" for role, names in FILES.items() for name in names],
        "preflight_distributions": {release["ID"].capitalize(): [release.get("VERSION_ID", "")]},
        "preflight_systemd_minimum": 0,
        "preflight_disk_minimum_mib": 1,
        "preflight_ports": [],
        "secrets_vault_address": "https://vault.example.com:8200",
        "secrets_vault_ca_file": "/etc/forge/ca.pem",
    }
    hosts = {
        "plain": {"apps": {"plain": PLAIN}, "pretended": {"distribution": "Debian", "distribution_version": "13"}},
        "changed": {
            "apps": {"changed": CHANGED},
            "pretended": {"distribution": "Debian", "distribution_version": "12"},
            "nginx_ipv6": False,
            "nginx_hsts_seconds": 0,
            "nginx_tls_profile": "modern",
            "secrets_kv_mount": "kv",
            "secrets_approle_mount": "machines",
            "secrets_database_mount": "databases",
            "secrets_bound_cidrs": ["192.0.2.10/32"],
            "secrets_retry_seconds": 7,
            "secrets_rotation_minutes": 60,
            "alerts_command": ["/usr/local/bin/page", HARD.replace("\n", " ")],
            "alerts_webhook_url": "{{ 'https://hooks.example.com/' ~ 'secret' }}",
            "alerts_webhook_format": "slack",
            "alerts_mail_to": ["ops@example.com", "ünïcode@example.org"],
            "alerts_mail_from": "forge@example.com",
            "alerts_mail_server": "mail.example.com",
        },
    }
    # Preflight would refuse it of a machine that is no Debian 13, and leaves what depends on its own facts alone.
    hosts["quic"] = {**hosts["plain"], "nginx_http3": "{{ forge_host.distribution_version == '13' }}"}
    hosts["bare"] = {**hosts["plain"], "apps": {"bare": BARE}}
    hosts["sealed"] = {**hosts["plain"], "apps": {"sealed": SEALED}, "secrets_source": "systemd_creds"}
    hosts["issued"] = {
        **hosts["plain"],
        "apps": {"issued": {**PLAIN, "domain": "issued.example.com", "aliases": ["www.issued.example.com"]}},
        "nginx_tls_source": "acme",
        "nginx_acme_email": "ops@example.com",
    }
    for name in hosts:
        (folder / name).mkdir()
        shutil.copy(ROOT / "roles/app/files/forge_worker.py", folder / name)
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": variables}}))
    (folder / "play.yml").write_text(PLAY)
    done = subprocess.run(
        ["ansible-playbook", "--inventory", f"{folder}/hosts.yml", f"{folder}/play.yml"],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder


def gunicorn(rendered: Path, app: str, **environment: str) -> Entry:
    """Read the settings as Gunicorn does, in the virtual environment of the reference application."""
    read = (
        "import json, runpy, sys; settings = runpy.run_path(sys.argv[1]); worker = settings['worker_class'];"
        "print(json.dumps({**{name: value for name, value in settings.items() if isinstance(value, (int, str))},"
        "'worker': worker.CONFIG_KWARGS, 'bases': [base.__name__ for base in worker.__mro__]}))"
    )
    done = subprocess.run(
        [ROOT / ".cache/app-venv/bin/python", "-c", read, rendered / app / "gunicorn.conf.py"],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: Entry = json.loads(done.stdout)
    return found


def described(rendered: Path, app: str) -> App:
    """Read the description as forgectl does."""
    path = rendered / app / "app.toml"
    return decode(path.read_bytes(), path)


def unit(rendered: Path, app: str, name: str) -> dict[str, list[str]]:
    """Read a unit or a drop-in: every key with its values in their order."""
    found: dict[str, list[str]] = {}
    for line in (rendered / app / name).read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def blocks(rendered: Path, app: str, name: str = "site.conf") -> list[Any]:
    """Read a site as Nginx does: a list of directives, each its words and the block that follows, if any."""
    text = re.sub(r"^\s*#.*$", "", (rendered / app / name).read_text(), flags=re.MULTILINE)
    tokens = iter(re.findall(r"\"(?:\\.|[^\"])*\"|'[^']*'|[{};]|[^\s{};]+", text))

    def read() -> list[Any]:
        directives: list[Any] = []
        words: list[str] = []
        for token in tokens:
            if token == "}":
                break
            if token in ("{", ";"):
                directives.append((words, read() if token == "{" else None))
                words = []
            else:
                words.append(token.strip("\"'"))
        return directives

    return read()


def values(block: list[Any], name: str) -> list[list[str]]:
    """Return the arguments of each directive `name` in a block."""
    return [words[1:] for words, _ in block if words[0] == name]


def servers(rendered: Path, app: str) -> tuple[list[Any], list[Any]]:
    """Return the redirecting server and the one with TLS."""
    plain, tls = [body for words, body in blocks(rendered, app) if words == ["server"]]
    return plain, tls


def test_every_option_is_changed() -> None:
    """An option that the specification gains has to be given here, with another value than its default."""

    def unchanged(options: Entry, entry: Entry, where: str = "") -> list[str]:
        found = []
        for name, spec in options.items():
            if name not in entry or entry[name] == spec.get("default"):
                found.append(where + name)
            elif spec.get("options"):
                found += unchanged(spec["options"], entry[name], f"{where}{name}.")
        return found

    assert unchanged(read_options(ROOT / "roles", "app", "entry"), CHANGED) == []


def test_description_of_a_plain_app(rendered: Path) -> None:
    """forgectl takes it, and it has what follows from the name."""
    app = described(rendered, "plain")
    assert (app.name, app.user, app.domain, app.module) == ("plain", "plain", "plain.example.com", "shop.main:app")
    assert app.settings == {"FORGE_ENVIRONMENT": "production"}
    assert (app.secrets.path, app.secrets.kv_mount, app.secrets.approle_mount) == (
        "forge/plain/app",
        "secret",
        "approle",
    )
    assert (app.secrets.bound_cidrs, app.secrets.retry_seconds, app.secrets.rotation) == ([], 30, None)
    assert (app.database, app.migration) == (None, None)
    assert app.workers.reasons


def test_description_of_a_changed_app(rendered: Path) -> None:
    """Every option arrives, whatever characters it holds."""
    app = described(rendered, "changed")
    assert (app.module, app.python_path, app.lock) == ("shop.main:create_app('x')", "./src", "locks/production.txt")
    assert (app.ready_path, app.health_path, app.keep_releases, app.workers.count) == ("/able", "/live", 3, 3)
    assert app.settings == {
        "SHOP_ENVIRONMENT": "staging",
        "DATABASE_URL": "postgresql+asyncpg://shop@db.example.com/shop_db",
        "POOL": "2",
        "HARD": HARD,
        "NUMBER": "5",
        "FLAG": "false",
    }
    assert (app.secrets.path, app.secrets.kv_mount, app.secrets.approle_mount) == ("team/changed", "kv", "machines")
    assert app.static == ["dist/assets"]
    assert app.secrets.variables == {"KEY_ONE": "one", "KEY_TWO": "two"}
    assert (app.secrets.bound_cidrs, app.secrets.retry_seconds) == (["192.0.2.10/32"], 7)
    assert app.secrets.rotation is not None
    assert app.secrets.rotation.approles == {
        "app": "team-changed",
        "migrate": "team-changed-migrate",
        "rotate": "team-changed-rotate",
    }
    assert app.database is not None
    assert (app.database.placement, app.database.name, app.database.app_key) == ("external", "shop_db", "app_password")
    assert app.database.migrate_key == "mover_password"
    assert (app.database.url_variable, app.settings[app.database.url_variable]) == ("DATABASE_URL", app.database.url)
    assert app.migration is not None
    assert app.migration.command == ["shop.migrate", "--to", "head it's"]
    assert (app.migration.user, app.migration.path) == ("changed-migrate", "team/changed/migrate")
    assert app.migration.settings["DATABASE_URL"] == "postgresql+asyncpg://mover@db.example.com/shop_db"
    assert app.migration.variables == {"DATABASE_PASSWORD": "mover_password"}
    assert app.database.url_format == "postgresql://{user}:{password}@{host}/{name}"
    assert app.database.pool_max == 2
    assert app.commands == {
        "mails": Command(["shop.mails", "--to", HARD], 99, 5),
        "report": Command(["report"], 256, 30, "*-*-* 03:00:00"),
    }


def test_an_app_that_knows_nothing_of_the_platform(rendered: Path) -> None:
    """It gets its own settings alone; nothing is fetched for it, and its server answers in its place."""
    app = described(rendered, "bare")
    assert app.settings == {"OWN": "yes"}
    assert (app.secrets.source, app.secrets.variables, app.variables, app.commands) == ("none", {}, {}, {})
    assert (app.ready_path, app.health_path) == ("", "")
    assert "LoadCredentialEncrypted" not in unit(rendered, "bare", "slot.conf")
    assert "load_wsgi" in (rendered / "bare/gunicorn.conf.py").read_text()
    assert "load_wsgi" not in (rendered / "plain/gunicorn.conf.py").read_text()
    _, tls = servers(rendered, "bare")
    assert [words for words, body in tls if words[0] == "location" and values(body, "deny")] == []


def test_the_prefix_names_what_the_entry_does_not(rendered: Path) -> None:
    """By default it is the platform's own."""
    app = described(rendered, "sealed")
    assert set(app.settings) == {"FORGE_ENVIRONMENT", "FORGE_DATABASE_URL", "FORGE_DATABASE_POOL_MAX"}
    assert app.database
    assert app.database.url_variable == "FORGE_DATABASE_URL"
    assert app.database.pool_max is None
    assert app.migration
    assert app.migration.variables == {"FORGE_DATABASE_PASSWORD": "database_password"}
    assert set(app.migration.settings) == {"FORGE_DATABASE_URL"}


def test_streams_and_websockets_have_times_of_their_own(rendered: Path) -> None:
    """Where they differ, in places of their own; by default they share one."""
    _, changed = servers(rendered, "changed")
    for number in ("", "_1", "_2"):
        for name, seconds in (("stream", "500s"), ("websocket", "600s")):
            body = location(changed, f"@forge_{name}{number}")
            assert values(body, "proxy_read_timeout") == values(body, "proxy_send_timeout") == [[seconds]]
            assert values(body, "limit_conn") == [["forge_changed_streams", "4"]]
    _, plain = servers(rendered, "plain")
    assert values(location(plain, "@forge_stream"), "proxy_read_timeout") == [["3600s"]]
    assert not [words for words, _ in plain if "websocket" in words[-1]]


@pytest.mark.parametrize(("name", "minutes"), [("plain", 5), ("changed", 60)])
def test_hosts_look_for_new_secrets_by_turns(rendered: Path, name: str, minutes: int) -> None:
    """As often as they are told to, and not in step."""
    timer = unit(rendered, name, "forge-rotate@.timer")
    assert timer["OnUnitActiveSec"] == timer["OnBootSec"] == [f"{minutes}min"]
    assert 0 < int(timer["RandomizedDelaySec"][0].removesuffix("s")) <= minutes * 60 / 5


@pytest.mark.parametrize(("name", "request_timeout"), [("plain", 25), ("changed", 130)])
def test_the_timeout_chain_is_one(rendered: Path, name: str, request_timeout: int) -> None:
    """Nginx, Gunicorn, systemd and forgectl have the same numbers, each inner one below its outer."""
    _, tls = servers(rendered, name)
    settings = gunicorn(rendered, name)
    slot = unit(rendered, name, "slot.conf")
    app = described(rendered, name)
    read, send, connect = (
        int(values(tls, f"proxy_{kind}_timeout")[0][0].removesuffix("s")) for kind in ("read", "send", "connect")
    )
    stop, start = int(slot["TimeoutStopSec"][0]), int(slot["TimeoutStartSec"][0])
    assert request_timeout == read == send == app.timeouts.request
    assert values(tls, "proxy_next_upstream_timeout") == [[f"{request_timeout}s"]]
    assert settings["worker"]["timeout_graceful_shutdown"] == app.timeouts.app_graceful
    assert connect < read < app.timeouts.app_graceful < settings["graceful_timeout"] < stop
    assert read < settings["timeout"] == app.timeouts.heartbeat
    (pool,) = [body for words, body in blocks(rendered, name) if words[0] == "upstream" and values(body, "keepalive")]
    idle, age = (int(values(pool, f"keepalive_{kind}")[0][0].removesuffix("s")) for kind in ("timeout", "time"))
    assert idle == age == app.timeouts.proxy_idle
    assert idle + age < app.timeouts.pool_exit
    assert app.timeouts.proxy_idle < settings["keepalive"] == app.timeouts.app_keepalive
    assert (stop, start) == (app.timeouts.stop, app.timeouts.start)


def test_limits_reach_the_unit(rendered: Path) -> None:
    """Those of the inventory, on the app and on its migration."""
    slot, migration = (unit(rendered, "changed", name) for name in ("slot.conf", "migrate@.service"))
    assert (slot["MemoryMax"], slot["CPUQuota"], slot["TasksMax"]) == (["777M"], ["60%"], ["99"])
    assert (migration["MemoryMax"], migration["TasksMax"]) == (["777M"], ["99"])
    plain = unit(rendered, "plain", "slot.conf")
    assert int(plain["MemoryMax"][0].removesuffix("M")) >= 150 * described(rendered, "plain").workers.count


@pytest.mark.parametrize("name", ["plain", "changed"])
def test_app_and_migration_share_no_identity(rendered: Path, name: str) -> None:
    """Each has a user and sealed credentials of its own, and no value of a secret is in either."""
    slot, migration = (unit(rendered, name, file) for file in ("slot.conf", "migrate@.service"))
    assert (slot["User"], migration["User"]) == ([name], [f"{name}-migrate"])
    credentials = [value.split(":") for value in slot["LoadCredentialEncrypted"]]
    assert [credential for credential, _ in credentials] == ["role-id", "secret-id"]
    others = {value.split(":")[1] for value in migration["LoadCredentialEncrypted"]}
    assert not others & {path for _, path in credentials}
    assert "Environment" not in slot
    assert "EnvironmentFile" not in slot


def test_a_leased_user_has_a_unit_of_its_own(rendered: Path) -> None:
    """Beside each slot, with the app's identity; root's, but as confined as the app."""
    app = described(rendered, "changed")
    assert app.database
    assert (app.database.vault_role, app.secrets.database_mount, app.leases) == ("shop", "databases", True)
    slot, lease = (unit(rendered, "changed", file) for file in ("slot.conf", "lease@.service"))
    assert slot["Wants"] == slot["After"] == ["changed-lease@%i.service"]
    assert lease["LoadCredentialEncrypted"] == slot["LoadCredentialEncrypted"]
    assert "User" not in lease
    for key in ("ProtectSystem", "NoNewPrivileges", "CapabilityBoundingSet", "SystemCallFilter", "UMask", "LimitCORE"):
        assert lease[key] == slot[key]
    assert lease["PrivateUsers"][-1] == "no"
    plain = unit(rendered, "plain", "slot.conf")
    assert "Wants" not in plain
    assert not described(rendered, "plain").leases


def test_without_vault_systemd_opens_the_values(rendered: Path) -> None:
    """Those of its own slot, which keeps its version, and the newest for a migration."""
    app = described(rendered, "sealed")
    assert (app.secrets.source, app.secrets.address, app.secrets.path) == ("systemd_creds", "", "")
    assert app.secrets.variables == {"FORGE_SIGNING_KEY": "signing_key"}
    assert app.secrets.rotation is None
    assert app.migration
    assert app.migration.path == ""
    folder = "/etc/credstore.encrypted/forge.sealed"
    slot = unit(rendered, "sealed", "slot.conf")["LoadCredentialEncrypted"]
    assert slot == [f"values:{folder}.app.values.%i"]
    migration = unit(rendered, "sealed", "migrate@.service")["LoadCredentialEncrypted"]
    assert migration == [f"values:{folder}.migrate.values"]


@pytest.mark.parametrize("name", ["plain", "changed"])
def test_sandbox_is_in_both_units(rendered: Path, name: str) -> None:
    """The same, and the app may write to its own state alone."""
    slot, migration = (unit(rendered, name, file) for file in ("slot.conf", "migrate@.service"))
    for key in ("ProtectSystem", "NoNewPrivileges", "CapabilityBoundingSet", "SystemCallFilter", "UMask"):
        assert slot[key] == migration[key]
    assert slot["ProtectSystem"] == ["strict"]
    assert slot["ReadWritePaths"] == [f"/var/lib/{name}"]
    assert slot["MemoryDenyWriteExecute"] == (["yes"] if name == "plain" else ["yes", "no"])
    assert migration["MemoryDenyWriteExecute"] == slot["MemoryDenyWriteExecute"]
    assert slot["MemorySwapMax"] == ["0"]
    assert "ReadWritePaths" not in migration


def test_gunicorn_takes_the_count_or_its_override(rendered: Path) -> None:
    """WEB_CONCURRENCY wins over what was computed."""
    assert gunicorn(rendered, "changed")["workers"] == 3
    assert gunicorn(rendered, "changed", WEB_CONCURRENCY="7")["workers"] == 7


def test_gunicorn_neither_preloads_nor_reloads_nor_listens(rendered: Path) -> None:
    """Pools are made in each worker; the listener is systemd's; nothing watches files."""
    settings = gunicorn(rendered, "plain")
    assert not {"preload_app", "reload", "bind"} & set(settings)
    assert settings["control_socket_disable"] is True


def test_worker_is_the_platforms(rendered: Path) -> None:
    """It names its release, and counts requests only where the inventory asks for it."""
    plain, changed = (gunicorn(rendered, name) for name in ("plain", "changed"))
    assert plain["bases"][1:3] == ["ForgeWorker", "UvicornWorker"]
    assert plain["worker"]["headers"] == [["X-Forge-Release", "plain"]]
    assert not {"max_requests", "max_requests_jitter"} & set(plain)
    assert (changed["max_requests"], changed["max_requests_jitter"]) == (1000, 200)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("plain", ["plain.example.com"]),
        ("changed", ["changed.example.com", "www.changed.example.com", "old.example.com"]),
    ],
)
def test_site_answers_for_its_names(rendered: Path, name: str, names: list[str]) -> None:
    """Both servers, and the first only sends on to TLS."""
    plain, tls = servers(rendered, name)
    assert values(plain, "server_name") == values(tls, "server_name") == [names]
    assert values(plain, "return") == [["308", "https://$host$request_uri"]]
    assert not [words for words, _ in plain if words[0] in ("location", "proxy_pass", "root")]
    assert all("ssl" in listen for listen in values(tls, "listen"))
    assert not any("ssl" in listen for listen in values(plain, "listen"))


def test_site_speaks_http2_the_way_its_nginx_knows(rendered: Path) -> None:
    """Nginx 1.25 has a directive for it, older ones a parameter of `listen`."""
    newer, older = (servers(rendered, name)[1] for name in ("plain", "changed"))
    assert values(newer, "http2") == [["on"]]
    assert not any("http2" in listen for listen in values(newer, "listen"))
    assert values(older, "http2") == []
    assert all("http2" in listen for listen in values(older, "listen"))


def test_site_follows_the_roles_variables(rendered: Path) -> None:
    """IPv6 and HSTS can be turned off; limits are the app's."""
    _, plain = servers(rendered, "plain")
    _, changed = servers(rendered, "changed")
    assert [listen[0] for listen in values(plain, "listen")] == ["443", "[::]:443"]
    assert [listen[0] for listen in values(changed, "listen")] == ["443"]
    # A header that is off is empty, so that a site that still names it is no mistake.
    for name, sent in {"plain": "max-age=63072000", "changed": ""}.items():
        (http,) = [body for words, body in blocks(rendered, name, "nginx.conf") if words == ["http"]]
        (policy,) = [body for words, body in http if words[-1] == "$forge_strict_transport_security"]
        assert policy[0][0] == ["", sent]
    assert (values(plain, "client_max_body_size"), values(changed, "client_max_body_size")) == ([["1024k"]], [["5k"]])


@pytest.mark.parametrize("name", ["plain", "changed"])
def test_site_hands_on_only_what_nginx_knows_itself(rendered: Path, name: str) -> None:
    """No header of the client's about itself gets through, in any location."""
    _, tls = servers(rendered, name)
    headers = dict(values(tls, "proxy_set_header"))
    assert headers["X-Forwarded-For"] == "$remote_addr"
    assert headers["X-Request-ID"] == "$request_id"
    assert (headers["X-Forwarded-Host"], headers["Forwarded"]) == ("", "")
    locations = {words[-1]: body for words, body in tls if words[0] == "location"}
    # One such directive in a location would turn off all that it inherits.
    assert not [
        words for body in locations.values() for words, _ in body if words[0] in ("proxy_set_header", "add_header")
    ]
    path = "/metrics" if name == "plain" else "/numbers"
    for metrics in (locations[path], locations[f"{path}/"]):
        assert values(metrics, "allow") == [["127.0.0.1"], ["::1"]]
        assert values(metrics, "deny") == [["all"]]


@pytest.mark.parametrize("name", ["plain", "changed"])
def test_nginx_reaches_the_live_socket_and_no_other(rendered: Path, name: str) -> None:
    """All locations go to one of two upstreams, both the symlink that a cutover swaps."""
    upstreams = {words[1]: body for words, body in blocks(rendered, name) if words[0] == "upstream"}
    assert {upstream: values(body, "server") for upstream, body in upstreams.items()} == {
        f"forge_{name}{suffix}": [[f"unix:/run/{name}/live.sock", "max_fails=0"]] for suffix in ("", "_pool")
    }
    _, tls = servers(rendered, name)
    locations = [body for words, body in tls if words[0] == "location"]
    targets = [target for body in locations for (target,) in values(body, "proxy_pass")]
    assert set(targets) == {f"http://forge_{name}", f"http://forge_{name}$forge_pool"}
    (listener,) = unit(rendered, name, "app@.socket")["ListenStream"]
    assert Path(listener).parent == Path(f"/run/{name}")


def location(tls: list[Any], *words: str) -> list[Any]:
    """Return the block of a location."""
    (found,) = [body for name, body in tls if name == ["location", *words]]
    return list(found)


def test_limits_are_the_apps(rendered: Path) -> None:
    """Each app has zones of its own, and streams are not among the other requests."""
    zones = values(blocks(rendered, "changed"), "limit_req_zone") + values(
        blocks(rendered, "changed"), "limit_conn_zone"
    )
    assert {zone[0] for zone in zones} == {"$forge_client"}
    assert zones[0][1:] == ["zone=forge_changed_requests:10m", "rate=7r/s"]
    _, tls = servers(rendered, "changed")
    assert values(tls, "limit_req") == [["zone=forge_changed_requests", "burst=8", "nodelay"]]
    assert values(tls, "limit_conn") == [["forge_changed_concurrent", "9"]]
    for name in ("@forge_stream", "@forge_stream_1", "@forge_stream_2"):
        assert values(location(tls, name), "limit_conn") == [["forge_changed_streams", "4"]]


def test_a_body_is_measured_wherever_it_is_read(rendered: Path) -> None:
    """Each way out of a location with a limit of its own leads to one with the same, and errors keep their form."""
    _, tls = servers(rendered, "changed")
    for path, limit in (("/v1/small", "1k"), ("/v1/uploads", "20480k")):
        for words in (("=", path), (f"{path}/",)):
            body = location(tls, *words)
            assert values(body, "client_max_body_size") == [[limit]]
            pages = values(body, "error_page")
            ways = ("418", "419", "420", "417")
            assert [page for page in values(tls, "error_page") if page[0] not in ways] == pages[4:]
            for status, name in zip(ways, pages[:4], strict=True):
                assert name[0] == status
                assert values(location(tls, name[2]), "client_max_body_size") == [[limit]]
    assert not [words for words, _ in servers(rendered, "plain")[1] if words[-1].endswith(("_1", "/v1/small"))]


def test_static_files_come_from_the_live_release_first(rendered: Path) -> None:
    """Then from the slots, none of them through a symlink of its own."""
    _, tls = servers(rendered, "changed")
    names = [("^~", "/assets/"), ("@forge_static_1_blue",), ("@forge_static_1_green",)]
    bodies = [location(tls, *words) for words in names]
    folders = ["/run/changed/live", "/srv/changed/slots/blue", "/srv/changed/slots/green"]
    assert [values(body, "root") for body in bodies] == [[[f"{folder}/source/dist/assets"]] for folder in folders]
    assert [values(body, "try_files")[0][1] for body in bodies] == [names[1][0], names[2][0], "=404"]
    assert all(values(body, "disable_symlinks") == [["on", "from=$document_root"]] for body in bodies)


def test_policy_reaches_nginx_as_it_was_written(rendered: Path) -> None:
    """Quotes and all."""
    (policy,) = [body for words, body in blocks(rendered, "changed") if words[0] == "map"]
    assert policy[0][0] == ["", "default-src 'self'; report-to \\\"x\\\" y"]


def test_tls_is_mozillas_profile(rendered: Path) -> None:
    """TLS 1.2 and 1.3, or 1.3 alone; hybrid key exchange where OpenSSL has it; no tickets, no stapling."""
    (plain,) = [body for words, body in blocks(rendered, "plain", "nginx.conf") if words == ["http"]]
    (changed,) = [body for words, body in blocks(rendered, "changed", "nginx.conf") if words == ["http"]]
    assert values(plain, "ssl_protocols") == [["TLSv1.2", "TLSv1.3"]]
    assert values(changed, "ssl_protocols") == [["TLSv1.3"]]
    assert len(values(plain, "ssl_ciphers")[0][0].split(":")) == 6
    assert values(changed, "ssl_ciphers") == []
    assert values(plain, "ssl_ecdh_curve") == [["?X25519MLKEM768:X25519:prime256v1:secp384r1"]]
    assert values(changed, "ssl_ecdh_curve") == [["X25519:prime256v1:secp384r1"]]
    for http in (plain, changed):
        assert values(http, "ssl_session_tickets") == [["off"]]
        assert values(http, "ssl_stapling") == []


def test_http3_is_asked_for(rendered: Path) -> None:
    """Where it is: sockets for all sites, and a header that tells clients of it."""
    default, site = ((rendered / "quic" / name).read_text() for name in ("default.conf", "site.conf"))
    assert default.count(" quic reuseport default_server;") == 2
    assert site.count(" quic;") == 2
    assert "add_header Alt-Svc $forge_alt_svc always;" in site
    (http,) = [body for words, body in blocks(rendered, "quic", "nginx.conf") if words == ["http"]]
    (advertised,) = [body for words, body in http if words[-1] == "$forge_alt_svc"]
    assert advertised[0][0][1] == r"h3=\":443\"; ma=3600"
    assert not any("quic" in (rendered / "plain" / name).read_text() for name in ("default.conf", "site.conf"))


def test_acme_server_reaches_its_answers(rendered: Path) -> None:
    """Through both ports; all else goes where it went."""
    plain, tls = servers(rendered, "issued")
    challenge = ["location", "^~", "/.well-known/acme-challenge/"]
    for server in (plain, tls):
        (body,) = [body for words, body in server if words == challenge]
        assert values(body, "root") == [["/var/lib/forge-acme"]]
    (other,) = [body for words, body in plain if words[0] == "location" and words != challenge]
    assert values(other, "return") == [["308", "https://$host$request_uri"]]
    assert not [words for words, _ in servers(rendered, "plain")[1] if words == challenge]


def test_certificates_are_described(rendered: Path) -> None:
    """As the program on the host reads it."""
    issued, changed = (Config.read(rendered / name / "certificates.toml") for name in ("issued", "changed"))
    assert issued.source == "acme"
    assert issued.apps == {"issued": ["issued.example.com", "www.issued.example.com"]}
    assert issued.directory == "https://acme-v02.api.letsencrypt.org/directory"
    assert (issued.email, issued.ca_file, issued.key_type) == ("ops@example.com", "", "ecdsa")
    assert (changed.source, changed.alert_days, changed.directory) == ("own_ca", 21, "")
    assert changed.apps == {"changed": ["changed.example.com", "www.changed.example.com", "old.example.com"]}


def test_alerts_go_where_the_inventory_says(rendered: Path) -> None:
    """Read as the program reads it; what is secret is in no file, and handed over by systemd."""
    described = {name: tomllib.loads((rendered / name / "alerts.toml").read_text()) for name in ("plain", "changed")}
    assert described["plain"] == {"repeat_minutes": 60, "messages_per_hour": 30}
    assert forge_alerts.channels(described["plain"], {}) == {}
    assert described["changed"]["command"]["argv"] == ["/usr/local/bin/page", HARD.replace("\n", " ")]
    assert described["changed"]["mail"]["to"] == ["ops@example.com", "ünïcode@example.org"]
    assert set(forge_alerts.channels(described["changed"], {"webhook_url": "https://x"})) == {
        "command",
        "webhook",
        "mail",
    }
    assert "LoadCredentialEncrypted" not in unit(rendered, "plain", "forge-alerts.service")
    credentials = unit(rendered, "changed", "forge-alerts.service")["LoadCredentialEncrypted"]
    assert credentials == ["webhook_url:/etc/credstore.encrypted/forge-alerts.webhook_url"]
    assert "hooks.example.com" not in "".join(path.read_text() for path in (rendered / "changed").glob("*alerts*"))
