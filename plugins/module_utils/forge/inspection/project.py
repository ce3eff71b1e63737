"""What a project says of itself: name, Python, dependencies, and how they are locked."""

from __future__ import annotations

import ast
import configparser
import email
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from .. import lock, locks
from ..problems import Refusal
from .codebase import text

# The Python of each supported distribution.
PYTHONS = {"Debian 12": "3.11.2", "Ubuntu 24.04": "3.12.3", "Debian 13": "3.13.5"}
# What has to be compiled on the host, as no wheel is published, and the packages that it needs for that.
NATIVE = {
    "dbus-python": ["libdbus-1-dev", "libglib2.0-dev", "pkg-config"],
    "gdal": ["libgdal-dev"],
    "ldap3-gssapi": ["libkrb5-dev"],
    "m2crypto": ["libssl-dev", "swig"],
    "mysqlclient": ["default-libmysqlclient-dev", "pkg-config"],
    "psycopg2": ["libpq-dev"],
    "psycopg-c": ["libpq-dev"],
    "pyaudio": ["portaudio19-dev"],
    "pycairo": ["libcairo2-dev", "pkg-config"],
    "pygobject": ["libgirepository1.0-dev", "libcairo2-dev", "pkg-config"],
    "pygraphviz": ["libgraphviz-dev", "pkg-config"],
    "pyodbc": ["unixodbc-dev"],
    "python-ldap": ["libldap2-dev", "libsasl2-dev"],
    "python-snappy": ["libsnappy-dev"],
    "uwsgi": [],
    "xmlsec": ["libxmlsec1-dev", "pkg-config"],
}
COMPILER = ["gcc", "python3-dev"]
_CARET = re.compile(r"\^\s*(\d+)(?:\.(\d+))?(?:\.(\d+))?")
_TILDE = re.compile(r"~(?!=)\s*(\d+)(?:\.(\d+))?")
_LARGEST = 20_000_000


@dataclass
class Locked:
    """The file that pins the dependencies, or what stands in for one.

    Attributes:
        file: Its name; empty where nothing lists the dependencies.
        hashed: Whether it has a hash for every package.
        versions: What it pins, with no version where there are several; empty where that is not known.
        sdists: Packages without any wheel in it.
        strange: Lines that pin nothing.
        pinned: Whether it pins at all.
        named: Whether the platform finds it only where the entry names it.
        strangers: Packages that it installs from folders or repositories.
    """

    file: str = ""
    hashed: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    sdists: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    pinned: bool = True
    named: bool = False
    strangers: list[str] = field(default_factory=list)


@dataclass
class Project:
    """What the files beside the code say."""

    name: str = ""
    version: str = ""
    python: str = ""
    python_from: str = ""
    manifest: str = ""
    dependencies: list[str] = field(default_factory=list)
    locked: Locked = field(default_factory=Locked)
    entrypoint: str = ""
    """The callable, where `tool.fastapi` names it."""
    document: dict[str, Any] = field(default_factory=dict)

    def packages(self) -> set[str]:
        """Return the names of everything that it depends on, as far as that is known."""
        return set(self.locked.versions) | {name_of(item) for item in self.dependencies} - {""}

    def fits(self) -> list[str]:
        """Return the supported distributions whose Python it admits."""
        return [name for name, version in PYTHONS.items() if admits(self.python, version)]


def name_of(requirement: str) -> str:
    """Return the canonical name of a requirement, empty when it is no valid one."""
    try:
        return canonicalize_name(Requirement(requirement).name)
    except InvalidRequirement:
        return ""


def admits(wanted: str, version: str) -> bool:
    """Tell whether a `requires-python` admits a version; one that nobody understands does."""
    try:
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except InvalidSpecifier:
        return True


def read(source: Path, shipped: list[str]) -> Project:
    """Read what `source` has: pyproject.toml, setup.cfg, setup.py, the metadata of a wheel, requirements, locks."""
    project = Project()
    names = set(shipped)
    if "pyproject.toml" in names:
        _pyproject(project, source / "pyproject.toml")
    if "setup.cfg" in names:
        _setup_cfg(project, source / "setup.cfg")
    if "setup.py" in names:
        _setup_py(project, source / "setup.py")
    for metadata in sorted(name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA|PKG-INFO", name)):
        _metadata(project, source / metadata, metadata)
    if not project.python and ".python-version" in names:
        found = re.match(r"\d+\.\d+", (source / ".python-version").read_text(encoding="utf-8", errors="replace"))
        if found:
            # Which one its authors develop on; it says nothing of newer ones.
            project.python, project.python_from = f">={found[0]}", ".python-version"
    project.locked = _locked(source, names, project)
    if not project.dependencies and project.locked.file.endswith(".txt"):
        project.dependencies = _requirements(source / project.locked.file)
    return project


def _pyproject(project: Project, file: Path) -> None:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return  # The one who asks for the manifest reports it.
    project.document = document
    tools = document.get("tool") or {}
    about, poetry = document.get("project") or {}, tools.get("poetry") or {}
    project.name = str(about.get("name") or poetry.get("name") or "")
    project.version = str(about.get("version") or poetry.get("version") or "")
    project.entrypoint = str((tools.get("fastapi") or {}).get("entrypoint") or "")
    if about or poetry:
        project.manifest = file.name
    if about.get("requires-python"):
        project.python, project.python_from = str(about["requires-python"]), file.name
    project.dependencies = [str(item) for item in about.get("dependencies") or []]
    wanted = poetry.get("dependencies") or {}
    for name, constraint in wanted.items() if isinstance(wanted, dict) else ():
        version = constraint.get("version", "") if isinstance(constraint, dict) else constraint
        if name.lower() == "python":
            if not project.python:
                project.python, project.python_from = poetry_range(str(version)), file.name
        elif not (isinstance(constraint, dict) and constraint.get("optional")):
            spelt = f"{name}{poetry_range(version)}" if isinstance(version, str) else name
            project.dependencies.append(spelt if name_of(spelt) else name)


def poetry_range(text: str) -> str:
    """Return a version constraint of Poetry's as a specifier of the PyPA."""

    def caret(found: re.Match[str]) -> str:
        major, minor, patch = found[1], found[2] or "0", found[3] or "0"
        end = f"{int(major) + 1}" if int(major) else f"0.{int(minor) + 1}"
        return f">={major}.{minor}.{patch},<{end}"

    def tilde(found: re.Match[str]) -> str:
        major, minor = found[1], found[2]
        return f">={major}.{minor or 0},<{f'{major}.{int(minor) + 1}' if minor else int(major) + 1}"

    parts = []
    for part in text.split(","):
        spelt = _TILDE.sub(tilde, _CARET.sub(caret, part.strip()))
        if re.fullmatch(r"[\d.]+(\.\*)?", spelt):
            spelt = f"=={spelt}" if spelt.count(".") > 1 or spelt.endswith("*") else f"=={spelt}.*"
        parts.append("" if spelt == "*" else spelt)
    return ",".join(part for part in parts if part)


def _setup_cfg(project: Project, file: Path) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return
    if not parser.has_section("metadata") and not parser.has_section("options"):
        return
    project.manifest = project.manifest or file.name
    project.name = project.name or parser.get("metadata", "name", fallback="")
    if not project.python:
        project.python = parser.get("options", "python_requires", fallback="")
        project.python_from = file.name if project.python else ""
    wanted = parser.get("options", "install_requires", fallback="")
    project.dependencies = project.dependencies or [line.strip() for line in wanted.splitlines() if line.strip()]


def _setup_py(project: Project, file: Path) -> None:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    project.manifest = project.manifest or file.name
    for node in ast.walk(tree):
        if not isinstance(node, ast.keyword):
            continue
        if node.arg == "python_requires" and not project.python and text(node.value):
            project.python, project.python_from = str(text(node.value)), file.name
        elif node.arg == "name" and not project.name:
            project.name = text(node.value) or ""
        elif (
            node.arg == "install_requires"
            and not project.dependencies
            and isinstance(node.value, (ast.List, ast.Tuple))
        ):
            project.dependencies = [found for item in node.value.elts if (found := text(item))]


def _metadata(project: Project, file: Path, name: str) -> None:
    message = email.message_from_string(file.read_text(encoding="utf-8", errors="replace"))
    project.manifest = project.manifest or name
    project.name = project.name or message.get("Name", "")
    project.version = project.version or message.get("Version", "")
    if not project.python and message.get("Requires-Python"):
        project.python, project.python_from = message["Requires-Python"], name
    if not project.dependencies:
        wanted = message.get_all("Requires-Dist") or []
        project.dependencies = [item for item in wanted if "extra ==" not in item]


def _requirements(file: Path, depth: int = 0) -> list[str]:
    found = []
    joined = re.sub(r"\\\r?\n", " ", file.read_text(encoding="utf-8", errors="replace"))
    for raw in joined.splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        nested = re.match(r"(?:-r|--requirement)[\s=]+(\S+)", line)
        if nested and (file.parent / nested[1]).is_file() and depth < 3:
            found += _requirements(file.parent / nested[1], depth + 1)
        elif line and not line.startswith("-"):
            found.append(re.sub(r"\s--\w.*$", "", line))
    return found


def _locked(source: Path, names: set[str], project: Project) -> Locked:
    """Return the lock that the option `lock` finds by itself; of a distribution its metadata."""
    try:
        file = locks.first(source, names)
    except Refusal:
        files = ("pyproject.toml", "setup.cfg", "setup.py")
        return Locked(file="" if project.manifest in files else project.manifest, pinned=False)
    if file == locks.TEXT:
        return _pins(source / file)
    return _package_lock(source / file) if file.endswith(".lock") else Locked(file=file, pinned=False)


def _pins(file: Path) -> Locked:
    text = file.read_text(encoding="utf-8", errors="replace")
    pins, strange = lock.parse(text)
    return Locked(
        file.name,
        locks.is_hashed(text),
        {pin.name: pin.version for pin in pins},
        [],
        strange,
        bool(pins) and not strange,
    )


def _package_lock(file: Path) -> Locked:
    """Read uv.lock, poetry.lock or pdm.lock: a table `package` in each."""
    locked = Locked(file.name, hashed=True)
    if file.stat().st_size > _LARGEST:
        return locked
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return locked
    locked.strangers = _strangers(file.name, document.get("package") or [])
    for package in document.get("package") or []:
        name = canonicalize_name(str(package.get("name", "")))
        origin = package.get("source") or {}
        if isinstance(origin, dict) and {"editable", "virtual", "directory"} & set(origin):
            continue  # The project itself, or a part of it.
        # One that forks by Python or platform has a version for each.
        locked.versions[name] = "" if name in locked.versions else str(package.get("version", ""))
        files = [str(item.get("file", "")) for item in package.get("files") or [] if isinstance(item, dict)]
        wheels = package.get("wheels") or [name for name in files if name.endswith(".whl")]
        if (package.get("sdist") or files) and not wheels:
            locked.sdists.append(name)
    return locked


def _strangers(lock_name: str, packages: list[dict[str, Any]]) -> list[str]:
    """Return what a lock takes from elsewhere than an index; what a group for development alone needs is left out."""
    known = {str(each.get("name")): each for each in packages}
    if lock_name == "uv.lock":
        installed: set[str] = set()
        pending = [name for each in packages if "." in (each.get("source") or {}).values() for name in _needs(each)]
        while pending:
            name = pending.pop()
            if name in known and name not in installed:
                installed.add(name)
                pending += _needs(known[name])
    else:
        installed = {name for name, each in known.items() if {"main", "default"} & {*(each.get("groups") or [])}}
    return sorted(name for name in installed if _is_stranger(known[name]))


def _needs(package: dict[str, Any]) -> list[str]:
    return [str(each.get("name")) for each in package.get("dependencies") or []]


def _is_stranger(package: dict[str, Any]) -> bool:
    # uv's and Poetry's locks say so in a table of the package, PDM's in the package itself.
    source = package.get("source") or {}
    return bool({"git", "url", "path", "directory", "editable", "file"} & {*source, source.get("type"), *package})


def native(project: Project) -> dict[str, list[str]]:
    """Return what probably has to be compiled, and the apt packages for it beside a compiler."""
    return {name: NATIVE[name] for name in sorted(project.packages()) if name in NATIVE}


def missing_servers(packages: Iterable[str]) -> list[str]:
    """Return what the platform adds to a lock."""
    return [name for name in lock.SERVER_PACKAGES if name not in set(packages)]
