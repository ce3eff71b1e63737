"""The inspection of one source: everything that was found, what has to be done, and the entry to start from."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import app_source, lock, locks, secret_scan
from ..names import name_problems
from ..problems import Problem, Refusal
from . import callables, habits, project, routes, settings, sources, verdicts
from .callables import Callable
from .codebase import Codebase
from .entry import Mapping, render
from .habits import Habit
from .project import Project
from .routes import Routes
from .settings import Setting, SettingsClass

SHOWN = 4
_STDLIB = sys.stdlib_module_names
_NOT_ROOTS = frozenset(
    {"tests", "test", "docs", "doc", "examples", "example", "scripts", "migrations", "alembic", "node_modules"}
)
_IMPORT = re.compile(r"^\s*(?:from|import)\s+([A-Za-z_]\w*)", re.MULTILINE)
_DEEPEST_ROOT = 2
_LONGEST_NAME = 21

# Where data live, by the packages that speak to them.
POSTGRESQL = frozenset(
    {
        "asyncpg",
        "psycopg",
        "psycopg2",
        "psycopg2-binary",
        "psycopg-binary",
        "psycopg-pool",
        "psycopg-c",
        "aiopg",
        "pg8000",
    }
)
SQLITE = frozenset({"aiosqlite"})
_SERVICES = {
    "Cassandra": "cassandra-driver",
    "Elasticsearch": "elasticsearch",
    "Kafka": "aiokafka kafka-python confluent-kafka",
    "memcached": "pymemcache aiomcache",
    "MongoDB": "motor pymongo beanie odmantic mongoengine",
    "MySQL": "aiomysql asyncmy pymysql mysqlclient mysql-connector-python",
    "NATS": "nats-py",
    "Neo4j": "neo4j",
    "OpenSearch": "opensearch-py",
    "Oracle": "oracledb",
    "Qdrant": "qdrant-client",
    "RabbitMQ": "aio-pika pika",
    "Redis": "redis aioredis coredis arq rq",
}
ELSEWHERE = {package: service for service, packages in _SERVICES.items() for package in packages.split()}


@dataclass
class Migrations:
    """How the schema is migrated."""

    tool: str
    file: str
    folder: str
    command: list[str]


@dataclass
class Report:
    """What an inspection found.

    Attributes:
        path: What was inspected.
        kind: `folder`, `wheel` or `sdist`.
        source: The folder of the project inside `path`, `.` for all of it.
        problems: What has to be done first.
        warnings: What will run, but not well, or only perhaps.
        notes: What is good to know.
        fill_in: What the entry asks for that only a person knows, in the order of its numbers.
        keys: The secrets to store: key to the variable that gets it.
    """

    path: str
    kind: str
    source: str = "."
    name: str = ""
    python_path: str = "."
    project: Project = field(default_factory=Project)
    callable: Callable | None = None
    others: list[Callable] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    classes: list[SettingsClass] = field(default_factory=list)
    routes: Routes = field(default_factory=Routes)
    drivers: list[str] = field(default_factory=list)
    services: dict[str, str] = field(default_factory=dict)
    migrations: Migrations | None = None
    workers: dict[str, tuple[list[str], str]] = field(default_factory=dict)
    habits: list[Habit] = field(default_factory=list)
    native: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fill_in: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    entry: Mapping = field(default_factory=Mapping)

    @property
    def will_run(self) -> bool:
        """Tell whether nothing has to be done first but to fill in the entry."""
        return not self.problems

    @property
    def entry_text(self) -> str:
        """Return the entry as YAML; empty where there is nothing to start from."""
        return render(self.name, self.entry) if self.callable else ""

    def document(self) -> dict[str, Any]:
        """Return all of it in plain types."""
        locked = self.project.locked
        return {
            "path": self.path,
            "kind": self.kind,
            "source": self.source,
            "name": self.name,
            "version": self.project.version,
            "will_run": self.will_run,
            "python": {
                "wanted": self.project.python,
                "from": self.project.python_from,
                "distributions": self.project.fits(),
            },
            "module": self.callable.target if self.callable else "",
            "callable": asdict(self.callable) if self.callable else None,
            "others": [one.target for one in self.others],
            "python_path": self.python_path,
            "lock": {
                "file": locked.file,
                "pinned": locked.pinned,
                "hashed": locked.hashed,
                "packages": len(locked.versions),
                "added_by_the_platform": project.missing_servers(self.project.packages()),
                "without_wheels": locked.sdists,
            },
            # What stands in the source as a secret need not stand in reports as well.
            "settings": [asdict(one) | ({"default": None} if holds_secret(one) else {}) for one in self.settings],
            "settings_classes": [asdict(one) for one in self.classes],
            "routes": {
                "health": self.routes.health.path if self.routes.health else "",
                "ready": self.routes.ready.path if self.routes.ready else "",
                "metrics": self.routes.metrics.path if self.routes.metrics else "",
                "websockets": [route.path for route in self.routes.websockets],
                "streams": self.routes.streams,
                "static": {path: folder for path, (folder, _) in self.routes.static.items()},
                "count": len(self.routes.all),
            },
            "drivers": self.drivers,
            "services": sorted(set(self.services.values())),
            "migrations": asdict(self.migrations) if self.migrations else None,
            "commands": {name: command for name, (command, _) in self.workers.items()},
            "build_packages": build_packages(self),
            "habits": [asdict(one) for one in self.habits],
            "problems": [asdict(one) for one in self.problems],
            "warnings": [asdict(one) for one in self.warnings],
            "notes": self.notes,
            "fill_in": self.fill_in,
            "keys": self.keys,
            "entry": {"apps": {self.name: self.entry.plain()}} if self.callable else None,
            "entry_yaml": self.entry_text,
        }


def inspect(path: Path, name: str = "", module: str = "", python_path: str = "") -> Report:
    """Inspect a folder, a wheel or an sdist.

    Raises:
        SourceError: there is nothing to inspect at `path`.
    """
    with sources.opened(path) as (folder, kind):
        report = Report(str(path), kind)
        source = sources.project_folder(folder)
        report.source = source.relative_to(folder).as_posix()
        shipped = sources.files(source)
        report.project = project.read(source, shipped)
        report.name = name or app_name(report.project.name or (path.name if kind == "folder" else path.stem))
        root = source / python_path if python_path else source / _root(source, shipped)
        code = Codebase(source, root, shipped)
        report.python_path = root.relative_to(source).as_posix()
        _callable(report, code, source, shipped, module)
        _python(report)
        _locks(report, source, shipped)
        report.problems += name_problems(report.name)
        if report.callable:
            _app(report, code, shipped, report.callable)
        _unreadable(report, code)
    return report


def app_name(text: str) -> str:
    """Return a name for the entry: it becomes a user, a unit and a database."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    name = name if re.match(r"[a-z]", name) else f"app-{name}".strip("-")[:_LONGEST_NAME]
    # One of a user or a unit of the system is taken.
    guesses = (name, f"{name[: _LONGEST_NAME - 4]}-app", f"app-{name[: _LONGEST_NAME - 4]}")
    return next((guess for guess in guesses if not name_problems(guess)), name)


def _root(source: Path, shipped: list[str]) -> str:
    """Return the folder whose modules find each other: the one below which most imports lead to a file."""
    python = [name for name in shipped if name.endswith(".py")]
    folders = {"."}
    for name in python:
        parts = name.split("/")[:-1]
        for depth in range(1, min(len(parts), _DEEPEST_ROOT) + 1):
            inside = "/".join(parts[:depth])
            if not _NOT_ROOTS & set(parts[:depth]) and f"{inside}/__init__.py" not in shipped:
                folders.add(inside)
    if folders == {"."}:
        return "."
    imports = {
        name: list(_IMPORT.findall((source / name).read_text(encoding="utf-8", errors="replace")))
        for name in python
        if not _NOT_ROOTS & set(name.split("/"))
    }

    def score(folder: str) -> int:
        prefix = "" if folder == "." else f"{folder}/"
        tops = {
            name.removeprefix(prefix).partition("/")[0].removesuffix(".py")
            for name in python
            if name.startswith(prefix)
        }
        tops -= {*_NOT_ROOTS, *_STDLIB, "setup", "conftest"}
        return sum(found in tops for name, lines in imports.items() if name.startswith(prefix) for found in lines)

    def order(folder: str) -> tuple[int, bool, int, str]:
        # Where nothing is imported by an absolute name, a src folder is one still.
        return (-score(folder), folder.rpartition("/")[2] != "src", folder.count("/") + (folder != "."), folder)

    return min(folders, key=order)


def _callable(report: Report, code: Codebase, source: Path, shipped: list[str], module: str) -> None:
    where = report.path
    finder = callables.Finder(code)
    if module:
        target = app_source.parse_target(module)
        report.callable = (target and finder.find(module)) or Callable(
            module.partition(":")[0], module.partition(":")[2].partition("(")[0], "", module.endswith(")"), where
        )
    else:
        hints = [hint for hint in (report.project.entrypoint, *callables.served(source, shipped)) if hint]
        found = callables.ranked(finder.all(), hints, code)
        if found:
            report.callable, report.others = found[0], found[1:]
    if report.callable is None:
        report.problems.append(
            Problem(
                where,
                "an ASGI callable at the top level of a module: FastAPI(), Starlette(), a factory of one, or a "
                "function of scope, receive and send",
                f"none in {sum(name.endswith('.py') for name in shipped)} files of Python below {report.python_path}",
                "name it with --module package.module:name; an app for WSGI alone, as of Flask, does not run here",
            )
        )
        return
    report.problems += app_source.check(source, report.callable.target, report.python_path, f"apps.{report.name}")


def _python(report: Report) -> None:
    if report.project.fits():
        return
    known = ", ".join(f"{name} has {version.rpartition('.')[0]}" for name, version in project.PYTHONS.items())
    report.problems.append(
        Problem(
            report.project.python_from,
            f"a Python that a supported distribution has: {known}",
            f"requires-python {report.project.python}",
            "widen it if the app runs there; there is no other Python on the host",
        )
    )


def _locks(report: Report, source: Path, shipped: list[str]) -> None:
    about, locked = report.project, report.project.locked
    if not locked.file:
        found = "neither pyproject.toml with dependencies, nor a lock, nor requirements.txt"
        others = _lists(shipped) if report.kind == "folder" else []
        if others:
            locked.file, locked.named = others[0], True
            do = "nothing has to be done: the entry names it, and the platform resolves it once and keeps the result"
            report.warnings.append(Problem(report.path, "the dependencies of the app", f"{found}; but {others[0]}", do))
        else:
            do = "list them in pyproject.toml under project.dependencies"
            report.problems.append(Problem(report.path, "the dependencies of the app", found, do))
        return
    again = (
        "nothing has to be done: the platform resolves it once, on the control machine, and keeps the result beside "
        "the inventory; commit that"
    )
    if report.kind == "folder":
        try:
            if locked.file == locks.TEXT:
                locks.requirements(source, source / locked.file)
            elif locked.file == locks.MANIFEST:
                locks.refuse_elsewhere("\n".join(about.dependencies), locked.file)
                locks.refuse_sources(about.document, locked.file)
            locks.refuse_strange(locked.strangers, locked.file)
        except Refusal as refusal:
            report.problems.append(refusal.problem(f"apps.{report.name}"))
            return
    if locked.hashed and locked.file == locks.TEXT:
        pins, strange = lock.parse((source / locked.file).read_text(encoding="utf-8", errors="replace"))
        report.problems += lock.unpinned(pins, strange, locked.file, f"write it anew with {locks.command(locked.file)}")
    elif locked.strange:
        expected = "every line pinned with `==`, so that every host and every rollback gets the same"
        report.warnings.append(Problem(locked.file, expected, f"not pinned: {_some(locked.strange)}", again))
    elif not locked.pinned and report.kind == "folder":
        report.warnings.append(Problem(locked.file, "a lock", "only ranges of versions", again))
    elif locked.pinned and not locked.hashed:
        better = locks.command(locked.file, about.manifest or "requirements.in")
        do = f"nothing has to be done: the platform adds the hashes that the index has today; better is {better}"
        report.warnings.append(Problem(locked.file, "a hash for every package", "versions alone", do))
    if locked.versions and about.manifest == "pyproject.toml" and not locked.strange:
        fitting = about.fits() or list(project.PYTHONS)
        versions = _of_python(source, locked, project.PYTHONS[fitting[0]])
        target = lock.Target(project.PYTHONS[fitting[0]])
        do = f"write it anew with {locks.command(locked.file)}"
        known = [each for each in about.dependencies if versions.get(project.name_of(each)) != ""]
        report.problems += lock.dependency_problems(known, versions, target, locked.file, locked.file, do)


def _lists(shipped: list[str]) -> list[str]:
    """Return lists of dependencies under other names, that of the app itself first."""
    found = [name for name in shipped if re.search(r"(?:^|/)requirements[\w./-]*\.txt$", name)]
    kept = [name for name in found if not re.search(r"dev|test|doc|lint|ci", name.partition("requirements")[2])]
    return sorted(kept, key=lambda name: ("prod" not in name, "base" not in name, name.count("/"), name))


def _of_python(source: Path, locked: project.Locked, python: str) -> dict[str, str]:
    """Return what a lock installs for one Python; those with a table of packages are made for all."""
    if not locked.file.endswith(".txt"):
        return locked.versions
    pins, _ = lock.parse((source / locked.file).read_text(encoding="utf-8", errors="replace"))
    environment = lock.Target(python).environment()
    wanted = [pin for pin in pins if pin.requirement.marker is None or pin.requirement.marker.evaluate(environment)]
    return {pin.name: pin.version for pin in wanted}


def _app(report: Report, code: Codebase, shipped: list[str], app: Callable) -> None:
    modules = code.reachable(app.module)
    report.settings, report.classes = settings.read(code, modules)
    report.routes = routes.read(code, modules, report.settings)
    report.habits = habits.read(code, modules, app.module, app.name if app.factory else "")
    everything = [*modules, *(module for module in code.of_the_app() if module not in modules)]
    report.workers = habits.workers(everything)
    _data(report, shipped)
    # Preflight's own check has spoken of the module that the server imports.
    refused = {app.where.partition(":")[0]} if any(one.where.endswith(".module") for one in report.problems) else set()
    for habit in report.habits:
        if habit.kind == "port" and habit.where.partition(":")[0] in refused:
            continue
        verdict = verdicts.verdict(habit, report.name, report.settings, needs_postgresql(report))
        if verdict:
            (report.problems if verdict.stops else report.warnings).append(verdict.problem)
    report.native = project.native(report.project)
    for name, packages in report.native.items():
        report.warnings.append(
            Problem(
                report.project.locked.file,
                "wheels of every package, so that nothing has to be compiled on the host",
                f"{name}, which has none on the index",
                _instead(name) + f"the entry's build_packages: {', '.join(sorted({*project.COMPILER, *packages}))}",
            )
        )
    built = [name for name in report.project.locked.sdists if name not in report.native]
    if built:
        report.warnings.append(
            Problem(
                report.project.locked.file,
                "wheels of every package, so that nothing has to be compiled on the host",
                f"as sdists alone: {_some(built)}",
                "nothing where it is pure Python; else name the apt packages that it needs in build_packages",
            )
        )


def _instead(name: str) -> str:
    return f"depend on {name}-binary, or keep " if name == "psycopg2" else "keep "


def build_packages(report: Report) -> list[str]:
    """Return the apt packages for what has to be compiled."""
    wanted = {package for packages in report.native.values() for package in packages}
    return sorted({*project.COMPILER, *wanted}) if report.native else []


def _data(report: Report, shipped: list[str]) -> None:
    direct = {project.name_of(item) for item in report.project.dependencies} - {""}
    extras = " ".join(item.replace(" ", "") for item in report.project.dependencies if "[" in item)
    packages = direct or report.project.packages()
    known = POSTGRESQL | SQLITE | set(ELSEWHERE)
    report.drivers = sorted(packages & known)
    for package, extra in re.findall(r"([\w-]+)\[([\w,-]+)\]", extras):
        report.drivers += [
            f"{package}[{each}]" for each in extra.split(",") if each in POSTGRESQL | SQLITE | {"postgresql"}
        ]
    report.services = {name: ELSEWHERE[name] for name in report.drivers if name in ELSEWHERE}
    found = [name for name in shipped if name.split("/")[-1] == "alembic.ini" and "tests" not in name.split("/")]
    ini = sorted(found, key=lambda name: name.count("/"))
    if ini:
        folder = next((name.rpartition("/")[0] for name in shipped if name.endswith("/env.py")), "")
        command = (
            ["alembic", "upgrade", "head"] if ini[0] == "alembic.ini" else ["alembic", "-c", ini[0], "upgrade", "head"]
        )
        report.migrations = Migrations("alembic", ini[0], folder, command)
    elif "aerich" in packages:
        report.migrations = Migrations("aerich", "pyproject.toml", "migrations", ["aerich.cli", "upgrade"])
    # Where the app can do with PostgreSQL or SQLite, MySQL is one choice of several.
    served = {"MySQL"} if needs_postgresql(report) or SQLITE & set(report.drivers) else set()
    for name, service in report.services.items():
        if service not in served:
            served.add(service)
            report.notes.append(
                f"{name} speaks to {service}, which the platform does not run: a server is set by a setting"
            )
    if "rq" in packages:
        report.notes.append(
            "rq needs workers: make `rq worker --url ...` one of the entry's commands, if this app queues jobs"
        )


def needs_postgresql(report: Report) -> bool:
    """Tell whether the app has its data in PostgreSQL."""
    return any(re.split(r"[\[\]]", name)[0] in POSTGRESQL or name.endswith(("[postgresql]", "[asyncpg]", "[psycopg]"))
               for name in report.drivers)  # fmt: skip


def _unreadable(report: Report, code: Codebase) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for file, reason in sorted(code.broken.items())[:SHOWN]:
        newer = not project.admits(report.project.python, f"{here}.99")
        report.warnings.append(
            Problem(
                file,
                f"a file that Python {here} can read, which runs this",
                reason,
                f"nothing if it is newer syntax: the app asks for {report.project.python}; inspect it with such a "
                "Python to know more"
                if newer
                else f"mend the syntax, or raise requires-python if it is that of a Python newer than {here}",
            )
        )


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def holds_secret(setting: Setting) -> bool:
    """Tell whether a setting goes into `secrets`: one that looks like it, or whose default has a secret's shape."""
    return setting.secret or (isinstance(setting.default, str) and secret_scan.shape(setting.default) is not None)
