"""The entry of `apps` that an inspection leads to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import judge
from .entry import FILL_IN, Mapping
from .judge import Report
from .settings import Setting, may_hold_credentials

PREFIX = "FORGE_"
VAULT, SEALED = "vault", "systemd_creds"
_MOST_SUGGESTED = 12
_LONGEST_DEFAULT = 60
# Parts of a database URL, where the app puts it together itself.
_PARTS = {
    "host": ("HOST", "SERVER", "HOSTNAME"),
    "user": ("USER", "USERNAME"),
    "password": ("PASSWORD", "PASS"),
    "name": ("DB", "NAME", "DATABASE", "DBNAME"),
}
_FAMILY = re.compile(r"(?P<family>\w*?(?:POSTGRES(?:QL)?|PG|DB|DATABASE)\w*?)_?(?P<part>[A-Z]+)", re.IGNORECASE)
# Settings that name what an app writes.
_WRITTEN = re.compile(
    r"(?:DATA|UPLOAD|STORAGE|CACHE|LOG|MEDIA|TE?MP|OUTPUT|STATE|DOWNLOAD|DB|DATABASE|SQLITE)\w*_(?:DIR|FOLDER|DIRECTORY|PATH|FILE)$",
    re.IGNORECASE,
)
_SOCKET = "/var/run/postgresql"
_PASSWORD_KEY = "database_password"  # noqa: S105 - the name of a key
_USER_KEY = "database_user"


def draft(report: Report, source: str = "", secrets_source: str = VAULT) -> Report:
    """Write the entry into the report.

    `source` is how the entry spells where the app is; `secrets_source` that of the host decides what is asked for.
    """
    app = report.callable
    if app is None:
        return report
    maker = _Draft(report, secrets_source)
    maker.write(source or _spelt(report))
    return report


def _spelt(report: Report) -> str:
    path = Path(report.path).resolve()
    return str(path / report.source) if report.kind == "folder" else str(path)


class _Draft:
    def __init__(self, report: Report, secrets_source: str) -> None:
        self._report = report
        self._entry = Mapping()
        self._vault = secrets_source == VAULT
        self._folder = report.kind == "folder"
        report.fill_in, report.keys = [], {}
        self._database = judge.needs_postgresql(report)
        self._url = self._database_url()
        self._parts = self._database_parts() if self._database and self._url is None else {}

    def write(self, source: str) -> None:
        report, entry = self._report, self._entry
        app = report.callable
        assert app is not None  # noqa: S101 - for mypy; draft() has looked
        entry.add("domain", f"{report.name}.example.com", self._asked("the name under which clients reach it"))
        entry.add("source", source)
        entry.add("module", app.target, ", ".join(part for part in (app.kind, app.where) if part))
        # A package is installed; what it is made of is nowhere on the host.
        if report.python_path != "." and self._folder:
            entry.add("python_path", report.python_path)
        self._lock()
        if not self._knows_us():
            entry.add("settings_prefix", "", "the platform hands over nothing but what is named here")
        self._probes()
        self._static()
        self._settings()
        self._secrets()
        if self._database:
            self._data()
        self._commands()
        report.entry = entry

    def _asked(self, what: str) -> str:
        """Number what only a person knows."""
        self._report.fill_in.append(what)
        return f"{len(self._report.fill_in)}. fill in: {what}"

    def _lock(self) -> None:
        report = self._report
        if report.project.locked.named:
            self._entry.add("lock", report.project.locked.file)
        packages = judge.build_packages(report)
        if packages:
            self._entry.add("build_packages", packages, f"compiled on the host: {', '.join(report.native)}")

    def _knows_us(self) -> bool:
        """Tell whether the app was written for the platform."""
        return any(one.prefix == PREFIX for one in self._report.classes)

    def _probes(self) -> None:
        routes, entry = self._report.routes, self._entry
        health, ready = routes.health, routes.ready
        if health is not None and ready is None:
            # The one path says more where it decides whether a release takes traffic.
            health, ready = None, health
        if health is None:
            entry.add("health_path", "", "none was found" if ready is None else "there is one path for both")
        elif health.path != "/health":
            entry.add("health_path", health.path, health.where)
        if ready is None:
            entry.add("ready_path", "", "none was found: a worker counts as ready once it answers at all")
        elif ready.path != "/ready":
            entry.add("ready_path", ready.path, ready.where)
        if routes.metrics is None:
            entry.add("metrics_path", "", "none was found")
        elif routes.metrics.path.rstrip("/") != "/metrics":
            entry.add("metrics_path", routes.metrics.path, routes.metrics.where)

    def _static(self) -> None:
        for path, (folder, where) in self._report.routes.static.items():
            if self._folder and folder and re.fullmatch(r"/[\w./-]*", path) and re.fullmatch(r"[\w./-]+", folder):
                prefix = f"{path.rstrip('/')}/"
                self._entry.suggest("static", {prefix: folder}, f"{where}; only if names change with the content")

    def _database_url(self) -> Setting | None:
        named = [one for one in self._report.settings if one.is_database_url]
        spelt = [one for one in named if "sqlite" not in str(one.default)] or named
        # The required first, then the one that says database most plainly.
        return min(
            spelt, key=lambda one: (not one.required, "DATABASE" not in one.name.upper(), len(one.name)), default=None
        )

    def _database_parts(self) -> dict[str, Setting]:
        """Return host, user, password and name of the database, where the app asks for each by itself."""
        families: dict[str, dict[str, Setting]] = {}
        for one in self._report.settings:
            found = _FAMILY.fullmatch(one.name)
            if found:
                for part, spellings in _PARTS.items():
                    if found["part"].upper() in spellings:
                        families.setdefault(found["family"].upper(), {})[part] = one
        return max(families.values(), key=len, default={})

    def _handed(self) -> set[str]:
        """Return the variables that the platform sets by itself."""
        handed = {self._url.name} if self._database and self._url else set()
        if self._knows_us():
            handed |= {"FORGE_ENVIRONMENT", "FORGE_DATABASE_URL", "FORGE_DATABASE_POOL_MAX"}
        return handed

    def _settings(self) -> None:
        found, handed = Mapping(), self._handed()
        name = self._report.name
        parts = {one.name: part for part, one in self._parts.items()}
        known = {"host": _SOCKET, "name": name}
        suggested: list[Setting] = []
        for one in self._report.settings:
            if one.name in handed or self._is_secret(one) or one == self._parts.get("user"):
                continue
            if parts.get(one.name) in known:
                found.add(one.name, known[parts[one.name]], one.where)
            elif "sqlite" in str(one.default) and not self._database:
                found.add(one.name, self._sqlite(str(one.default)), f"{one.where}: by default inside the release")
            elif one.required:
                found.add(one.name, FILL_IN, self._asked(f"{one.name}, {one.kind}, {one.where}"))
            elif (state := self._state(one)) is not None:
                found.add(one.name, state, f"{one.where}: by default inside the release, which is read-only")
            else:
                suggested.append(one)
        for one in suggested[:_MOST_SUGGESTED]:
            found.suggest(one.name, self._default(one.default), one.where)
        if len(suggested) > _MOST_SUGGESTED:
            found.say(f"and {len(suggested) - _MOST_SUGGESTED} more with a default: forgectl inspect --json")
        if found.items:
            self._entry.add("settings", found)

    def _sqlite(self, default: str) -> str:
        scheme, _, file = default.partition(":///")
        return f"{scheme}:////var/lib/{self._report.name}/{Path(file.partition('?')[0] or 'app.db').name}"

    def _state(self, one: Setting) -> str | None:
        """Return where a folder or file that the app writes goes, if it is inside the release by default."""
        default = one.default
        relative = isinstance(default, str) and default and not default.startswith(("/", "~")) and "://" not in default
        if not relative or not _WRITTEN.search(one.name):
            return None
        return f"/var/lib/{self._report.name}/{default.removeprefix('./')}".rstrip("/.")

    def _default(self, value: Any) -> Any:
        if isinstance(value, (bool, int, float, str, list, tuple)) and len(str(value)) <= _LONGEST_DEFAULT:
            return value
        return ""

    def _is_secret(self, one: Setting) -> bool:
        handed_in_parts = one in self._parts.values()
        if judge.holds_secret(one):
            return True
        return one.required and may_hold_credentials(one) and not handed_in_parts

    def _secrets(self) -> None:
        report = self._report
        variables, handed, later = Mapping(), self._handed(), Mapping()
        password = self._parts.get("password")
        for one in self._report.settings:
            if one.name in handed or not self._is_secret(one):
                continue
            own = one == password or (
                self._database and re.fullmatch(r"\w*(?:DATABASE|DB|POSTGRES)\w*PASSWORD", one.name)
            )
            key = _PASSWORD_KEY if own else one.name.lower().removeprefix(PREFIX.lower())
            known_to_all = isinstance(one.default, str) and bool(one.default)
            if one.required or known_to_all or own:
                comment = one.where + (", whose default is in the source for all to see" if known_to_all else "")
                variables.add(one.name, key, comment)
                report.keys[key] = one.name
            else:
                later.suggest(one.name, key, one.where)
        if user := self._parts.get("user"):
            variables.add(user.name, _USER_KEY, f"{report.name}_app; rotation changes it")
            report.keys[_USER_KEY] = user.name
        if self._database and _PASSWORD_KEY not in report.keys:
            variables.add("PGPASSWORD", _PASSWORD_KEY, "which asyncpg and libpq read by themselves")
            report.keys[_PASSWORD_KEY] = "PGPASSWORD"  # pragma: allowlist secret
        secrets = Mapping()
        needed = bool(variables.plain())
        variables.items += later.items[:_MOST_SUGGESTED]
        if not needed:
            if later.items:
                secrets.add("variables", variables)
                self._entry.add("secrets", secrets)
            return
        if self._vault:
            secrets.add("role_id", FILL_IN, self._asked(f"role id of the AppRole forge-{self._report.name}-app"))
        secrets.add("variables", variables)
        self._entry.add("secrets", secrets)

    def _data(self) -> None:
        report, database = self._report, Mapping()
        if self._url is not None and self._url.name != f"{PREFIX}DATABASE_URL":
            database.add("url_variable", self._url.name, self._url.where)
            database.add("url_format", self._url_format(self._url), "the URL as the app wants it")
        elif self._url is None and not self._parts:
            database.say("url_variable: which variable the app takes its URL from, if it takes one")
        if report.migrations:
            migration = Mapping()
            if not self._folder:
                migration.add(
                    "command", [FILL_IN], self._asked("module of the package that migrates, and its arguments")
                )
            elif report.migrations.command != ["alembic", "upgrade", "head"]:
                migration.add("command", report.migrations.command, report.migrations.file)
            else:
                migration.say(f"alembic upgrade head, with {report.migrations.file}")
            if self._vault:
                asked = self._asked(f"role id of the AppRole forge-{report.name}-migrate")
                migration.add("role_id", FILL_IN, asked)
            if not self._knows_us():
                parts = {"user": _USER_KEY, "password": _PASSWORD_KEY}
                named = {one.name: parts[part] for part, one in self._parts.items() if part in parts}
                migration.add("variables", named or {"PGPASSWORD": _PASSWORD_KEY})
            database.add("migration", migration)
        if not database.plain():
            database.add("placement", "local", "on this host; external for a server elsewhere")
        self._entry.add("database", database)

    def _url_format(self, url: Setting) -> str:
        """Return how the app wants its URL: by the scheme of its default, else by the driver."""
        scheme = re.match(r"(postgres\w*(?:\+\w+)?)://", str(url.default))
        drivers = {re.split(r"[\[\]]", name)[0] for name in self._report.drivers}
        if scheme:
            found = scheme[1]
        elif not {"sqlalchemy", "sqlmodel", "databases"} & self._report.project.packages():
            found = "postgresql"
        else:
            found = next(
                (f"postgresql+{name}" for name in ("asyncpg", "psycopg", "psycopg2") if name in drivers), "postgresql"
            )
        # PostgresDsn wants a host; the others a host that is a folder as a parameter.
        place = "{host}/{name}" if url.kind.startswith("PostgresDsn") else "/{name}?host=/var/run/postgresql"
        return f"{found}://{{user}}:{{password}}@{place}"

    def _commands(self) -> None:
        commands = Mapping()
        for name, (command, where) in self._report.workers.items():
            one = Mapping()
            one.add("command", command, where)
            commands.add(name, one)
        if commands.items:
            self._entry.add("commands", commands)
