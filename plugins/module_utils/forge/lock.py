"""The hash-pinned lock of an app against its declared dependencies and the host's Python."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import VERSION_PATTERN, Version

from .problems import Problem

# What the platform starts an app with.
SERVER_PACKAGES = ("gunicorn", "uvicorn-worker")
_HASH = re.compile(r"\s--hash[=\s]\s*\w+:[0-9a-fA-F]+")
_OPTION = re.compile(r"\s--[\w-]+.*$")
_HARMLESS_OPTIONS = (
    "--require-hashes",
    "--only-binary",
    "--no-binary",
    "--prefer-binary",
    "--index-url",
    "-i ",
    "--extra-index-url",
)
_VERSION = re.compile(VERSION_PATTERN, re.VERBOSE | re.IGNORECASE)
_SHOWN = 6


@dataclass(frozen=True)
class Pin:
    """One line of a lock."""

    name: str
    version: str
    requirement: Requirement
    hashed: bool


@dataclass(frozen=True)
class Target:
    """The Python that the release runs on: its full version, and the machine as `uname -m` names it."""

    python: str
    machine: str = "x86_64"

    def environment(self) -> dict[str, str]:
        """Return the values of environment markers, by the dependency specifiers specification of the PyPA."""
        return {
            "implementation_name": "cpython",
            "implementation_version": self.python,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": self.python,
            "python_version": ".".join(self.python.split(".")[:2]),
            "sys_platform": "linux",
            "extra": "",
        }


def parse(text: str) -> tuple[list[Pin], list[str]]:
    """Return the pins of a lock, and the lines that do not pin exactly one version of one package."""
    pins, strange = [], []
    joined = re.sub(r"\\\r?\n", " ", text)
    for raw in joined.splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        if not line or line.startswith(_HARMLESS_OPTIONS):
            continue
        if line.startswith("-"):
            strange.append(line.split()[0])
            continue
        try:
            requirement = Requirement(_OPTION.sub("", line))
        except InvalidRequirement:
            strange.append(line.split()[0])
            continue
        exact = [item.version for item in requirement.specifier if item.operator in ("==", "===")]
        # What follows === need not be a version.
        if len(exact) != 1 or not _VERSION.fullmatch(exact[0]):
            strange.append(requirement.name)
            continue
        name = canonicalize_name(requirement.name)
        pins.append(Pin(name, exact[0], requirement, bool(_HASH.search(line))))
    return pins, strange


def elsewhere(text: str) -> list[str]:
    """Return what a requirements file takes from a folder, a repository or a URL, where no index has it."""
    found = []
    for raw in re.sub(r"\\\r?\n", " ", text).splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        if re.match(r"(-e|--editable)\b", line):
            found.append(line)
        elif line and not line.startswith("-"):
            try:
                requirement = Requirement(_OPTION.sub("", line))
            except InvalidRequirement:
                found.append(line.split()[0])
            else:
                found += [requirement.name] if requirement.url else []
    return found


def check(text: str, name: str, do: str, target: Target, where: str, manifest: Path | None = None) -> list[Problem]:
    """Return what is wrong with a lock for `target`, and with the `manifest` beside it.

    `name` is how the operator knows the lock, `do` how it is written anew, `where` the app's entry.
    """
    pins, strange = parse(text)
    problems = unpinned(pins, strange, f"{where}.lock", do)
    locked: dict[str, str] = {}
    for pin in pins:
        marker = pin.requirement.marker
        if marker is None or marker.evaluate(target.environment()):
            locked[pin.name] = pin.version
    if manifest is not None and manifest.is_file():
        problems += _against_manifest(manifest, locked, target, where, name, do)
    return problems


def unpinned(pins: list[Pin], strange: list[str], where: str, do: str) -> list[Problem]:
    """Return what keeps a lock from having one version and a hash for everything."""
    problems = []
    if strange:
        problems.append(Problem(where, "every line pinned with `==`", f"not pinned: {_some(strange)}", do))
    bare = [pin.name for pin in pins if not pin.hashed]
    if bare:
        problems.append(Problem(where, "a hash for every package", f"without a hash: {_some(bare)}", do))
    return problems


def _against_manifest(
    manifest: Path, locked: Mapping[str, str], target: Target, where: str, lock: str, do: str
) -> list[Problem]:
    try:
        document = tomllib.loads(manifest.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return [Problem(f"{where}.source", "a readable pyproject.toml", f"{manifest}: {error}", "mend the file")]
    project: dict[str, Any] = document.get("project") or {}
    return [
        *_python(project.get("requires-python"), target, f"{where}.source"),
        *dependency_problems(project.get("dependencies") or [], locked, target, f"{where}.lock", lock, do),
    ]


def _python(wanted: str | None, target: Target, where: str) -> list[Problem]:
    if not wanted:
        return []
    try:
        admitted = SpecifierSet(wanted).contains(Version(target.python), prereleases=True)
    except InvalidSpecifier:
        return [Problem(where, "a valid requires-python in pyproject.toml", wanted, "write it like `>=3.11`")]
    if admitted:
        return []
    return [
        Problem(
            where,
            f"Python {wanted}, as requires-python in pyproject.toml says",
            f"Python {target.python} on the host",
            "widen requires-python if the app runs on it, or choose a distribution with that Python",
        )
    ]


def dependency_problems(
    dependencies: list[str], locked: Mapping[str, str], target: Target, where: str, lock: str, do: str
) -> list[Problem]:
    """Return what a lock's versions by name lack of declared dependencies; `do` mends it."""
    wrong = []
    for text in dependencies:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            wrong.append(f"{text.split()[0]} (not a valid requirement)")
            continue
        if wanted.marker is not None and not wanted.marker.evaluate(target.environment()):
            continue
        version = locked.get(canonicalize_name(wanted.name))
        if version is None:
            wrong.append(f"{wanted.name} is missing")
        elif not wanted.specifier.contains(Version(version), prereleases=True):
            wrong.append(f"{wanted.name} is {version}, declared {wanted.specifier}")
    if not wrong:
        return []
    return [
        Problem(
            where,
            f"{lock} to satisfy the dependencies in pyproject.toml on Python {target.python}",
            _some(wrong),
            do,
        )
    ]


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
