"""What a release of an app is packed from, made ready on the control machine and judged there.

A folder whose own lock has everything is packed as it is. Whatever else is needed lies below `.forge/` in the archive:
`requirements.txt`, the lock that the host installs; `packages/`, what of it is in no index; `source.json`, where all of
it comes from, for the release's record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import app_source, edge, lock, locks
from .lock import Target
from .locks import Lock
from .origins import Distribution, Fetched, Folder, fetch, parse
from .problems import Problem, Refusal
from .programs import Desk, used
from .source_files import RESERVED

LOCK = f"{RESERVED}/requirements.txt"
PACKAGES = f"{RESERVED}/packages"
ORIGIN = f"{RESERVED}/source.json"


@dataclass
class Bundle:
    """The parts of a release's archive, and what is wrong with them.

    Attributes:
        source: The folder that is packed.
        whole: Every file in it belongs to the release, whatever a .gitignore around it says.
        additions: A folder that is laid over it; None where nothing is.
        lock: The lock's path in the release.
        resolved: The file that is to be kept beside the inventory; None for none.
    """

    source: Path | None = None
    whole: bool = False
    additions: Path | None = None
    lock: str = locks.TEXT
    resolved: Path | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def has_no_source(self, where: str) -> bool:
        """Tell whether nothing more can be said."""
        return any(problem.where == f"{where}.source" for problem in self.problems)


def prepare(name: str, entry: Mapping[str, Any], root: Path, desk: Desk, target: Target | None) -> Bundle:
    """Return what the entry of an app is released from; for a host that cannot be read, its folder alone is judged."""
    where, bundle = f"apps.{name}", Bundle()
    try:
        origin = parse(str(entry["source"]), root)
        if isinstance(origin, Folder):
            bundle.source = origin.path
            bundle.problems += _of_folder(entry, Fetched(folder=origin.path), where)
            if bundle.has_no_source(where):
                return bundle
        if target is not None:
            with desk.alone():
                _make(name, entry, fetch(origin, target, desk), desk, target, bundle)
    except Refusal as refusal:
        bundle.problems.append(refusal.problem(where))
    except OSError as error:
        found = f"{error.filename or desk.cache}: {error.strerror}"
        do = "make room, or mend its permissions for this user"
        bundle.problems.append(Problem(f"{where}.source", f"to read the source and write {desk.cache}", found, do))
    return bundle


def _make(name: str, entry: Mapping[str, Any], found: Fetched, desk: Desk, target: Target, bundle: Bundle) -> None:
    where = f"apps.{name}"
    if found.distribution is not None:
        bundle.problems += _of_distribution(entry, found.distribution, where)
        made = locks.of_distribution(name, found.distribution, target, desk)
        manifest = None
    else:
        assert found.folder is not None  # noqa: S101 - it is one or the other
        bundle.source, bundle.whole = found.folder, found.root is not None
        if bundle.whole:
            bundle.problems += _of_folder(entry, found, where)
            if bundle.has_no_source(where):
                return
        made = locks.of_folder(name, found.folder, found.root, entry["lock"], desk)
        beside = (found.folder / made.file).with_name(locks.MANIFEST)
        manifest = beside if beside.is_file() else found.folder / locks.MANIFEST
    again = f"write it anew with {locks.command(made.file)}" if made.file else ""
    if made.resolved is not None:
        kept = f"remove {desk.locks / name}.txt if somebody edited it"
        again = f"{again}, or {kept}" if again else kept
    bundle.problems += lock.check(made.text, made.file or "the lock", again, target, where, manifest)
    if made.warning:
        bundle.warnings.append(f"{where}: {made.warning}; {_where_kept(name, desk)}")
    bundle.lock, bundle.resolved = made.file if made.own else LOCK, made.resolved
    if not made.own or found.record["kind"] != "folder":
        bundle.additions = _write(found, made, desk)
        if bundle.source is None:
            bundle.source, bundle.additions, bundle.whole = bundle.additions, None, True


def _where_kept(name: str, desk: Desk) -> str:
    return f"what was chosen is kept in {desk.locks / name}.txt, to be committed"


def _of_folder(entry: Mapping[str, Any], found: Fetched, where: str) -> list[Problem]:
    folder = found.folder or Path()
    problems = app_source.check(folder, entry["module"], entry["python_path"], where, whole=found.root is not None)
    if folder.is_dir():
        problems += edge.source_problems(entry, folder, where)
    return problems


def _of_distribution(entry: Mapping[str, Any], found: Distribution, where: str) -> list[Problem]:
    """Judge options that speak of files in the source, and the module as far as it is in the package itself."""
    problems = []
    for option, nothing in (("lock", ""), ("python_path", "."), ("static", {})):
        if entry.get(option) and entry[option] != nothing:
            problems.append(
                Problem(
                    f"{where}.{option}",
                    f"no {option} for a package: it is installed, and has no folder in the release",
                    str(entry[option]),
                    "remove it",
                )
            )
    if found.tree is not None:
        problems += app_source.check_installed(found.tree, entry["module"], where)
    return problems


def _write(found: Fetched, made: Lock, desk: Desk) -> Path:
    """Write what is laid over the source, under a name that follows from its content."""
    pins = "hashed" if made.resolved is None else "resolved"
    origin = {**found.record, **({"lock": made.file} if made.file else {}), "pins": pins}
    contents = {ORIGIN: json.dumps(origin, indent=2, sort_keys=True) + "\n"}
    file = found.distribution.file if found.distribution else None
    if not made.own:
        contents[LOCK] = made.text
    if file is not None:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        contents[LOCK] += f"./{PACKAGES}/{file.name} \\\n    --hash=sha256:{digest}\n"
    folder = desk.cache / "bundles" / hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:32]
    if not used(folder):
        with desk.filling(folder) as making:
            for name, content in contents.items():
                (making / name).parent.mkdir(parents=True, exist_ok=True)
                (making / name).write_text(content)
            if file is not None:
                (making / PACKAGES).mkdir()
                shutil.copyfile(file, making / PACKAGES / file.name)
    return folder
