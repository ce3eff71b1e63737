"""What a release would change, or did, and what clients asked meanwhile; for people."""

import filecmp
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from forgectl import staging
from forgectl.layout import Layout, walk
from forgectl.logs import access
from forgectl.staging import INPUTS, Record
from forgectl.venv import RESERVED

SHOWN = 8
# Of settings, the names are shown and not the values: what is secret to somebody is hard to know.
WITHOUT_VALUES = ("settings.", "migration.settings.", "secrets.", "migration.variables.")


class Candidate(msgspec.Struct, frozen=True):
    """What a release is made of: its source, its settings.toml, and the folder of its other files."""

    source: Path
    settings: Path
    inputs: Path

    @staticmethod
    def of(layout: Layout, record: Record) -> "Candidate":
        """The parts of a release on disk."""
        folder = layout.releases / record.id
        return Candidate(folder / "source", folder / "settings.toml", folder)


def differences(old: Candidate, new: Candidate) -> list[str]:
    """What changes from one release to another: files, dependencies, settings, configuration of server and unit."""
    lines = _changes("source", staging.origin(old.source), staging.origin(new.source))
    lines += _files(old.source, new.source)
    before, after = _settings(old.settings), _settings(new.settings)
    lock = after.get("lock", "requirements.txt")
    lines += _changes("dependency", _pins(old.source / before.get("lock", lock)), _pins(new.source / lock))
    lines += _changes("setting", before, after)
    lines += [f"changed: {name}" for name in INPUTS if _read(old.inputs / name) != _read(new.inputs / name)]
    return lines or ["no difference"]


def served(log: Path, since: datetime) -> dict[str, int]:
    """How many requests each release answered since a time, by Nginx's log; "-" is Nginx itself."""
    return dict(Counter(line.release or "-" for line in access.lines(log, since.replace(microsecond=0).timestamp())))


def requests_line(requests: Mapping[str, int]) -> str:
    """The same as a line; empty when there were none."""
    names = {"-": "Nginx itself"}
    parts = [f"{number} by {names.get(release, release)}" for release, number in sorted(requests.items())]
    return f"requests answered meanwhile: {', '.join(parts)}" if parts else ""


def _files(old: Path, new: Path) -> list[str]:
    before, after = _names(old), _names(new)
    both = sorted(before & after)
    _, changed, unreadable = filecmp.cmpfiles(old, new, both, shallow=False)
    lines = []
    for word, names in (
        ("added", sorted(after - before)),
        ("removed", sorted(before - after)),
        ("changed", sorted(changed + unreadable)),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{word}: {', '.join(names[:SHOWN])}{more}")
    return lines


def _names(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in walk(folder)
        if path.is_file() and not {"__pycache__", RESERVED} & set(path.relative_to(folder).parts)
    }


def _pins(lock: Path) -> dict[str, str]:
    """Package: version, of a lock."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", _read(lock).decode(errors="replace"), re.MULTILINE))


def _settings(path: Path) -> dict[str, Any]:
    return dict(_flat(tomllib.loads(_read(path).decode())))


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _changes(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if what == "setting" and name.startswith(WITHOUT_VALUES):
            lines.append(f"{what} {name} " + ("added" if old is None else "removed" if new is None else "changed"))
        else:
            lines.append(f"{what} {name}: {'-' if old is None else old} -> {'-' if new is None else new}")
    return lines


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
