"""Alembic's revisions of a release, read without running any of its code, and those that a database has.

Besides what Alembic itself reads, a revision file may say at its top level:

    backward_compatible: bool = True    the release before this one works on the new schema too
    repair: str = "DROP INDEX ..."      what to run when it failed half-way; required where it leaves the transaction
"""

import ast
import configparser
import os
import re
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from forgectl.errors import Refused

if TYPE_CHECKING:
    import psycopg

MAX_BYTES = 1024 * 1024
WANTED = {"revision", "down_revision", "branch_labels", "depends_on", "backward_compatible", "repair"}
OPTIONS = (
    "script_location",
    "version_locations",
    "path_separator",
    "version_path_separator",
    "recursive_version_locations",
)
SEPARATORS = {"space": " ", "newline": "\n", "os": os.pathsep, ":": ":", ";": ";"}


class Revision(msgspec.Struct, frozen=True):
    """One migration.

    Attributes:
        down: the revisions right below it; more than one for a merge.
        file: relative to the source of the release.
        transactional: whether a failure leaves the schema as it was.
        depends: revisions of other branches that have to come first.
    """

    id: str
    down: tuple[str, ...]
    file: str
    backward_compatible: bool
    transactional: bool
    repair: str
    depends: tuple[str, ...] = ()


def revisions(source: Path) -> dict[str, Revision]:
    """Read the revisions of a source folder with an alembic.ini, in the order of their files.

    Raises:
        Refused: Alembic would not find or accept them, or one is not transactional and names no repair.
    """
    source = source.resolve()
    found: dict[str, Revision] = {}
    aliases: dict[str, list[str]] = {}
    for path in dict.fromkeys(_files(source)):
        file = str(path.relative_to(source))
        said = _literals(path, file)
        for name in ("revision", "down_revision"):
            if name not in said:
                _refuse(f"{name} = ... at the top level of {file}", "none", "add it")
        revision = Revision(
            id=_text(said, "revision", file),
            down=_ids(said, "down_revision", file),
            file=file,
            backward_compatible=said.get("backward_compatible", False),
            transactional=not said["autocommit"],
            repair=_text(said, "repair", file) if "repair" in said else "",
            depends=_ids(said, "depends_on", file),
        )
        if not isinstance(revision.backward_compatible, bool):
            _refuse(f"backward_compatible of {file} to be True or False", "something else", "correct it")
        if not revision.id:
            _refuse(f"a revision in {file}", "an empty one", "correct it")
        if other := found.get(revision.id):
            _refuse(f"one file of revision {revision.id}", f"{other.file} and {file}", "give one a new revision")
        if not revision.transactional and not revision.repair:
            _refuse(
                f"repair = '...' in {file}, which uses autocommit_block and can fail half-way",
                "none",
                "say there what to run after a failure, such as DROP INDEX CONCURRENTLY IF EXISTS ...",
            )
        found[revision.id] = revision
        for label in _ids(said, "branch_labels", file):
            aliases.setdefault(label, []).append(revision.id)
    found = {
        id: msgspec.structs.replace(
            revision, depends=tuple(_resolve(found, aliases, name, revision) for name in revision.depends)
        )
        for id, revision in found.items()
    }
    for revision in found.values():
        for name in revision.down:
            if name not in found:
                _refuse(
                    f"the down_revision {name} of {revision.file}", "no file of it", "add the file or correct the name"
                )
    try:
        TopologicalSorter({id: _parents(revision) for id, revision in found.items()}).prepare()
    except CycleError as error:
        _refuse("revisions that come one after the other", "the cycle " + " > ".join(error.args[1]), "break it")
    return found


def heads(revisions: Mapping[str, Revision]) -> list[str]:
    """The revisions that no other follows, sorted."""
    return sorted(revisions.keys() - {name for revision in revisions.values() for name in revision.down})


def pending(revisions: Mapping[str, Revision], current: Iterable[str]) -> list[Revision]:
    """What an upgrade to the heads would run, in order, in a database that is at `current`.

    Raises:
        Refused: the database has a revision that this source does not know.
    """
    if unknown := sorted(set(current := list(current)) - revisions.keys()):
        _refuse(
            f"a database at a revision of this release ({', '.join(heads(revisions)) or 'none'})",
            f"{', '.join(unknown)}: the database is newer than this release",
            "use a release that has that revision, or downgrade the database with one that has",
        )
    return _above(revisions, current)


def missing_in(revisions_of_newer: Mapping[str, Revision], older_heads: Iterable[str]) -> list[Revision]:
    """The revisions that a newer release has on top of an older one's heads, in order: what a rollback crosses.

    Raises:
        Refused: the older release has a revision that the newer one does not know.
    """
    if unknown := sorted(set(older_heads := list(older_heads)) - revisions_of_newer.keys()):
        _refuse(
            "the older release's revisions in the newer one",
            f"{', '.join(unknown)} only in the older",
            "deploy a release that has both",
        )
    return _above(revisions_of_newer, older_heads)


def current(connection: "psycopg.Connection[Any]") -> list[str]:
    """The revisions that a database is at, sorted; none when it was never migrated.

    Raises:
        Refused: the database does not say.
    """
    import psycopg

    try:
        exists = connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL").fetchone()
        if not exists or not exists[0]:
            return []
        return sorted(row[0] for row in connection.execute("SELECT version_num FROM alembic_version").fetchall())
    except psycopg.Error as error:
        _refuse(
            "to read the table alembic_version",
            str(error).partition("\n")[0],
            "give the migration's role the right to read it",
        )


def _above(revisions: Mapping[str, Revision], base: list[str]) -> list[Revision]:
    have = set(_upto(revisions, base))
    tips = heads(revisions)
    return [revisions[id] for id in _upto(revisions, [id for id in revisions if id in tips]) if id not in have]


def _upto(revisions: Mapping[str, Revision], tips: list[str]) -> list[str]:
    """`tips` and all that is below them, each after what it needs; side branches in Alembic's order."""
    done: dict[str, None] = {}
    stack = list(tips)
    while stack:
        below = [name for name in _parents(revisions[stack[-1]]) if name not in done]
        if below:
            stack.append(below[-1])
        else:
            done[stack.pop()] = None
    return list(done)


def _parents(revision: Revision) -> tuple[str, ...]:
    return revision.down + revision.depends


def _files(source: Path) -> Iterator[Path]:
    """The revision files in Alembic's order: sorted in each folder, a folder before those in it."""
    here = {"here": str(source)}
    ini = configparser.ConfigParser(here)
    try:
        with (source / "alembic.ini").open(encoding="utf-8") as file:
            ini.read_file(file)
        section = {name: ini.get("alembic", name) for name in OPTIONS if ini.has_option("alembic", name)}
        toml: dict[str, Any] = {}
        if (source / "pyproject.toml").exists():
            toml = tomllib.loads((source / "pyproject.toml").read_text()).get("tool", {}).get("alembic", {})
        script = section.get("script_location") or toml.get("script_location", "") % here
        locations = [location % here for location in toml.get("version_locations", [])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, configparser.Error) as error:
        _refuse(f"a readable {source}/alembic.ini", str(error).replace("\n", " "), "correct it")
    if not script:
        _refuse(f"script_location in {source}/alembic.ini", "none", "add it, such as %(here)s/migrations")
    if listed := section.get("version_locations"):
        separator = section.get("path_separator") or section.get("version_path_separator")
        # Without a separator, Alembic's oldest way: spaces and commas.
        parts = listed.split(SEPARATORS.get(separator, separator)) if separator else re.split(r", *| +", listed)
        locations = [part.strip() for part in parts if part.strip()]
    if "recursive_version_locations" in section:
        recursive = section["recursive_version_locations"] == "true"
    else:
        recursive = toml.get("recursive_version_locations") is True
    for location in locations or [f"{script}/versions"]:
        folder = (source / location).resolve()
        if not folder.is_relative_to(source) or not folder.is_dir():
            _refuse(
                f"the folder {location} of alembic.ini in the release",
                "none there" if folder.is_relative_to(source) else "one outside of it",
                "make it, and name it as %(here)s/FOLDER (finding a package, as in NAME:FOLDER, would run its code)",
            )
        for root, folders, names in os.walk(folder):
            for name in sorted(names):
                path = Path(root, name).resolve()
                if name.endswith(".py") and not name.startswith((".#", "__init__")):
                    if not path.is_relative_to(source) or not path.is_file():
                        _refuse(f"{name} in {root} to be a file of the release", "something else", "remove it")
                    yield path
            folders[:] = sorted(name for name in folders if recursive and not name.endswith("__pycache__"))


def _literals(path: Path, file: str) -> dict[str, Any]:
    """The values that a file gives to the names we know, and whether it leaves the transaction."""
    try:
        if path.stat().st_size > MAX_BYTES:
            _refuse(f"at most {MAX_BYTES} bytes in {file}", f"{path.stat().st_size}", "shorten it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        _refuse(f"{file} to be Python", f"{type(error).__name__}: {getattr(error, 'msg', '')}", "correct it")
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    said: dict[str, Any] = {"autocommit": "autocommit_block" in attributes}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in WANTED and (value := getattr(node, "value", None)):
                try:
                    if isinstance(node, ast.AugAssign):
                        raise ValueError
                    said[target.id] = ast.literal_eval(value)
                except (ValueError, TypeError, RecursionError, MemoryError):
                    _refuse(f"a literal for {target.id} in {file}, line {node.lineno}", "code", "write out the value")
    return said


def _text(said: dict[str, Any], name: str, file: str) -> str:
    value = said[name]
    if not isinstance(value, str):
        _refuse(f"{name} of {file} to be a string", type(value).__name__, "correct it")
    return value


def _ids(said: dict[str, Any], name: str, file: str) -> tuple[str, ...]:
    value = said.get(name)
    ids = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(ids, tuple | list | set) or not all(isinstance(id, str) for id in ids):
        _refuse(f"{name} of {file} to be None, a string or several", type(value).__name__, "correct it")
    return tuple(sorted(ids) if isinstance(ids, set) else ids)


def _resolve(found: dict[str, Revision], aliases: dict[str, list[str]], name: str, revision: Revision) -> str:
    """depends_on may name a revision, a branch label or the beginning of a revision."""
    matches = [name] if name in found else aliases.get(name) or [id for id in found if id.startswith(name)]
    if len(matches) != 1:
        _refuse(
            f"one revision for depends_on {name} of {revision.file}",
            ", ".join(matches) or "none",
            "name a revision that this release has",
        )
    return matches[0]


def _refuse(expected: str, found: str, do: str) -> NoReturn:
    raise Refused(f"expected {expected}; found {found}; {do}")
