"""The lock that a release installs: the app's own where it pins everything by hash, else one that is made here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from . import secret_scan
from .lock import SERVER_PACKAGES, Pin, Target, elsewhere, parse
from .origins import Distribution
from .problems import Refusal
from .programs import Desk, Failed, put, this_run, used
from .source_files import list_files

TEXT, MANIFEST = "requirements.txt", "pyproject.toml"
_SETUP = ("setup.cfg", "setup.py")
# Locks of other tools, each of which is exported by its own, in versions that work together.
_UV, _POETRY, _PDM = "uv.lock", "poetry.lock", "pdm.lock"
_EXPORTERS = Path(__file__).with_name("exporters.txt")
_POETRY_TOOLS = ("--from", "poetry", "--with", "poetry-plugin-export", "poetry")
_PDM_TOOLS = ("--from", "pdm", "pdm")
# The oldest Python of a supported distribution, and those that a lock has to fit.
_OLDEST = "3.11"
_PYTHONS = ("3.11.0", "3.12.0", "3.13.0", "3.14.0")
# What else decides about dependencies in a pyproject.toml; the rest may change without resolving anew.
_DECIDING = ("dependencies", "requires-python", "dynamic", "optional-dependencies", "name")
# Part of what a resolved lock was made from: another number resolves all of them anew.
_FORMAT = 1
_LONGEST_PATH = 250
_INPUTS = "# Inputs: "
# Files that are laid beside a copy of the app's.
_PLATFORM, _CONSTRAINTS, _LOCKED, _APP = "forge-platform.in", "forge-pins.txt", "forge-locked.txt", "app.in"


@dataclass(frozen=True)
class Lock:
    """What a release installs.

    Attributes:
        file: The app's file that it comes from; empty for what has none.
        text: Its content.
        own: It is that file as it is.
        resolved: The file of the cache with what had to be resolved, to be kept beside the inventory; None for nothing.
        warning: What the operator should know of it.
    """

    file: str
    text: str
    own: bool = False
    resolved: Path | None = None
    warning: str = ""


@dataclass(frozen=True)
class Work:
    """What is resolved for one app.

    Attributes:
        app: Its name.
        desk: Where that is done.
        python: The Python that its lock begins at.
        wanted: Its own requires-python.
        folder: The app's.
        root: The folder that its files may be in: a repository's, or the same.
        files: Those that resolving needs, below `root`.
    """

    app: str
    desk: Desk
    python: str
    wanted: str = ""
    folder: Path = Path()
    root: Path = Path()
    files: tuple[Path, ...] = ()

    @property
    def kept(self) -> Path:
        """The file beside the inventory."""
        return self.desk.locks / f"{self.app}.txt"


def of_folder(app: str, folder: Path, root: Path | None, wanted: str, desk: Desk) -> Lock:
    """Return the lock of an app in a folder; `wanted` is the file that its entry names, empty for the first found.

    All files below `root` belong to it, where there is one, whatever a .gitignore around them says.

    Raises:
        Refusal: there is none, or it cannot be made.
    """
    names = list_files(folder, whole=root is not None)
    files = tuple(folder / name for name in names)
    file = os.path.normpath(wanted) if wanted else first(folder, names)
    path = folder / file
    if not path.is_file() or file not in names or not path.resolve().is_relative_to(folder.resolve()):
        found = "git ignores it" if path.is_file() and not file.startswith("..") else "no such file"
        raise Refusal("lock", f"a lock at {path}", found, f"write it with {command(file)}, or correct `lock`")
    python = _python(folder)
    work = Work(app, desk, _lowest(python), python, folder, root or folder, files)
    if path.name in (_UV, _POETRY, _PDM):
        return _with_servers(work, file, _exported(path, desk))
    if path.suffix == ".toml" or path.name in _SETUP:
        warning = f"{file} alone does not say which versions the app was tested with"
        return _resolved(work, file, [file], _inputs_of_manifest(path), warning)
    inputs = requirements(root or folder, path)
    text = _text(path)
    if is_hashed(text):
        lock = _with_servers(work, file, text)
        return lock if lock.resolved else Lock(file, text, own=True)
    work = replace(work, files=(*files, *((root or folder) / name for name in inputs)))
    return _resolved(work, file, [file], inputs, f"{file} has no hashes, so it does not say what was tested")


def of_distribution(app: str, found: Distribution, target: Target, desk: Desk) -> Lock:
    """Return the lock of what is installed as a whole: resolved once, and kept."""
    if not _admits(found.python, target.python):
        raise Refusal(
            "source",
            f"Python {found.python}, as its metadata says",
            f"Python {target.python} on the host",
            "choose a version that runs on it, or a distribution with that Python",
        )
    work = Work(app, desk, _lowest(found.python))
    wanted = [found.requirement] if found.requirement else [*found.dependencies]
    return _resolved(work, "", [_APP], {_APP: "".join(f"{line}\n" for line in wanted)}, "")


def is_hashed(text: str) -> bool:
    """Tell whether a requirements file is meant to pin by hash; one that does so in part is a mistake."""
    return any(pin.hashed for pin in parse(text)[0])


def command(file: str, manifest: str = MANIFEST) -> str:
    """Return the command that writes a lock anew."""
    tool = {_UV: "uv lock", _POETRY: "poetry lock", _PDM: "pdm lock"}.get(Path(file).name)
    return f"`{tool}`" if tool else f"`uv pip compile --universal --generate-hashes {manifest} -o {file}`"


def first(folder: Path, names: Collection[str]) -> str:
    """Return the lock of a folder, out of those of its files that are released.

    Raises:
        Refusal: nothing there lists its dependencies.
    """
    text = _text(folder / TEXT) if TEXT in names else ""
    if is_hashed(text):
        return TEXT
    for name in (_UV, _POETRY, _PDM):
        if name in names:
            return name
    if re.search(r"^\s*[^\s#]", text, re.MULTILINE):
        return TEXT
    # Both may be there for the options of other tools alone; the second is nothing without what builds it.
    said = {name: _text(folder / name) for name in (MANIFEST, _SETUP[0]) if name in names}
    if re.search(r"^\s*\[(project|tool\.poetry)\b", said.get(MANIFEST, ""), re.MULTILINE):
        return MANIFEST
    if re.search(r"^\s*\[(metadata|options)\]", said.get(_SETUP[0], ""), re.MULTILINE) and len(said) == 2:
        return _SETUP[0]
    if _SETUP[1] in names:
        return _SETUP[1]
    raise Refusal(
        "lock",
        f"one of {TEXT}, {_UV}, {_POETRY}, {_PDM} and {MANIFEST} in {folder}",
        "none of them",
        f"list the app's dependencies in {MANIFEST}, and write a lock with {command(TEXT)}",
    )


def requirements(root: Path, path: Path) -> dict[str, str]:
    """Return the text of a requirements file, and of those that it includes where it has no hashes, by name in `root`.

    Raises:
        Refusal: they hold credentials; or what can't be locked.
    """
    hashed = is_hashed(_text(path))
    found = {name: _text(file) for name, file in _included(root, path, deep=not hashed).items()}
    for name, text in found.items():
        if shape := secret_scan.shape(text):
            raise Refusal("lock", "a lock without credentials", f"{shape} in {name}", "take it out and revoke it")
        if not hashed:
            refuse_elsewhere(text, name)
    return found


def refuse_elsewhere(text: str, name: str) -> None:
    """Refuse requirements that no index has.

    Raises:
        Refusal: there are some.
    """
    refuse_strange(elsewhere(text), name)


def refuse_sources(document: Mapping[str, Any], name: str) -> None:
    """Refuse a project whose dependencies uv takes from folders, repositories or a workspace instead of an index.

    Raises:
        Refusal: some of them are.
    """
    sources = (((document.get("tool") or {}).get("uv") or {}).get("sources")) or {}
    wanted = {_named(each) for each in (document.get("project") or {}).get("dependencies") or []}
    strange = []
    for package, said in sources.items():
        places = [each for each in (said if isinstance(said, list) else [said]) if isinstance(each, Mapping)]
        kinds = sorted({"workspace", "path", "git", "url"} & {kind for each in places for kind in each})
        if kinds and canonicalize_name(package) in wanted:
            strange.append(f"{package} ({kinds[0]})")
    refuse_strange(strange, name)


def _named(requirement: Any) -> str:
    try:
        return canonicalize_name(Requirement(str(requirement)).name)
    except InvalidRequirement:
        return ""


def refuse_strange(strange: list[str], name: str) -> None:
    """Refuse packages that no index has.

    Raises:
        Refusal: there are some.
    """
    if strange:
        raise Refusal(
            "lock",
            f"packages of an index in {name}, which have versions and hashes",
            ", ".join(strange),
            "take it out if it is the app itself, which runs from its folder; else publish it on your index",
        )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _exported(path: Path, desk: Desk) -> str:
    """Return a lock of another tool as requirements with hashes."""
    folder, manifest = path.parent, path.with_name(MANIFEST)
    if not manifest.is_file():
        raise Refusal("lock", f"{MANIFEST} beside {path.name}", "none", "a lock without it cannot be read; add it")
    inputs = {file.name: file.read_text(errors="replace") for file in (path, manifest)}
    made = desk.cache / "exports" / f"{_digest({**inputs, '': _exporter(path.name)})}.txt"
    if used(made):
        return made.read_text()
    try:
        if path.name == _UV:
            text = desk.uv(
                *(
                    "export",
                    "--frozen",
                    "--no-default-groups",
                    "--no-emit-project",
                    "--no-header",
                    "--format=requirements.txt",
                ),
                folder=folder,
            )
        else:
            with _copy(desk, folder, (path, manifest)) as copy:
                text = _by_its_tool(path.name, desk, copy)
    except Failed as error:
        raise Refusal(
            "lock", f"a {path.name} that fits its {MANIFEST}", str(error), f"write it anew with {command(path.name)}"
        ) from None
    put(made, text)
    return text


def _exporter(name: str) -> str:
    """Return which versions export a lock: another may write it differently."""
    return version("uv") if name == _UV else _EXPORTERS.read_text()


def _by_its_tool(name: str, desk: Desk, folder: Path) -> str:
    if name == _POETRY:
        arguments = [*_POETRY_TOOLS, "export", "--format=requirements.txt", "--no-interaction", "--output=exported.txt"]
    else:
        arguments = [*_PDM_TOOLS, "export", "--prod", "--format=requirements", "--no-extras", "--output=exported.txt"]
    desk.uv("tool", "run", "--constraints", _EXPORTERS, *arguments, folder=folder)
    return (folder / "exported.txt").read_text()


def _with_servers(work: Work, file: str, base: str) -> Lock:
    """Return a complete lock, with what the platform needs added where it lacks that; all of its own pins hold."""
    pins, _ = parse(base)
    pythons = [each for each in _PYTHONS if _admits(work.wanted, each.replace(".0", ".99"))]
    missing = [name for name in SERVER_PACKAGES if not _covered(name, pins, pythons)]
    if not missing:
        return Lock(file, base)
    constraints = "".join(f"{pin.requirement}\n" for pin in pins)
    inputs = {_PLATFORM: "".join(f"{name}\n" for name in missing), "base.txt": base}

    def compiled(folder: Path) -> str:
        (folder / _CONSTRAINTS).write_text(constraints)
        (folder / _PLATFORM).write_text(inputs[_PLATFORM])
        added = _compile(work, folder, [_PLATFORM, f"--constraint={_CONSTRAINTS}"])
        more = "".join(block for name, block in _blocks(added) if not _covered(name, pins, pythons))
        return f"{base.rstrip()}\n# What the platform serves it with.\n{more}"

    expected = f"{', '.join(missing)} beside the app's own versions"
    return _kept(work, file, inputs, "", compiled, expected)


def _resolved(work: Work, file: str, names: list[str], inputs: Mapping[str, str], warning: str) -> Lock:
    """Return a lock that is resolved from requirements, together with what the platform needs."""
    servers = {_PLATFORM: "".join(f"{name}\n" for name in SERVER_PACKAGES)}

    def compiled(folder: Path) -> str:
        (folder / _PLATFORM).write_text(servers[_PLATFORM])
        if _APP in inputs:
            (folder / _APP).write_text(inputs[_APP])
        return _compile(work, folder, [*names, _PLATFORM])

    wanted = file or inputs[_APP].replace("\n", ", ").rstrip(", ")
    expected = f"{wanted} in the package index, and all that it needs, for Python {work.python} and newer"
    return _kept(work, file, {**inputs, **servers}, warning, compiled, expected)


def _kept(work: Work, file: str, inputs: Mapping[str, str], warning: str, compiled: Any, expected: str) -> Lock:
    """Return what was resolved from the same inputs before, beside the inventory or in the cache; else resolve."""
    digest = _digest({**inputs, "": f"{_FORMAT} {work.python}"})
    _refuse_another(work, digest)
    # From a check to the run that keeps it.
    cached = work.desk.cache / "locks" / f"{work.app}-{digest}.txt"
    kept = work.kept.read_text() if work.kept.is_file() else ""
    if f"{_INPUTS}{digest}\n" in kept:
        return Lock(file, kept, resolved=work.kept, warning=warning)
    if not used(cached):
        with _copy(work.desk, work.root, work.files) as scratch:
            try:
                text = compiled(scratch / work.folder.relative_to(work.root))
            except Failed as error:
                do = "mend the requirement that it names, or give the app a lock"
                if not file:
                    do = "name a version that is there and runs on the host's Python, or choose another distribution"
                raise Refusal("lock" if file else "source", expected, str(error), do) from None
        header = (
            f"# What apps.{work.app} installs, resolved{f' from {file}' if file else ''}: commit this file, so that "
            "every host and\n# every colleague gets the same. It is made anew when its inputs change, or when it is "
            f"removed.\n{_INPUTS}{digest}\n"
        )
        put(cached, header + text)
    return Lock(file, cached.read_text(), resolved=cached, warning=warning)


def _refuse_another(work: Work, digest: str) -> None:
    """Refuse requirements other than those of another host of this run: they would take turns in the one file."""
    where = hashlib.sha256(str(work.kept).encode()).hexdigest()[:24]
    noted = work.desk.cache / "runs" / f"{where}.json"
    note = json.loads(noted.read_text()) if noted.is_file() else {}
    if note.get("run") == this_run() and note["digest"] != digest:
        raise Refusal(
            "lock",
            f"the same requirements of {work.app} on all hosts of a run, as they share {work.kept}",
            "others than those of a host before this one",
            "give them one `source` and `lock`, or keep these hosts in an inventory folder of their own",
        )
    put(noted, json.dumps({"run": this_run(), "digest": digest}))


def _compile(work: Work, folder: Path, arguments: list[str]) -> str:
    out = folder / _LOCKED
    if work.kept.is_file():
        # uv keeps the versions that it finds in its output.
        shutil.copyfile(work.kept, out)
    work.desk.uv(
        *("pip", "compile", *arguments, f"--output-file={out.name}", "--universal", "--generate-hashes"),
        *(f"--python-version={work.python}", "--no-header", "--no-emit-index-url", "--no-emit-find-links"),
        folder=folder,
    )
    return out.read_text()


@contextmanager
def _copy(desk: Desk, root: Path, files: Iterable[Path]) -> Iterator[Path]:
    """Give a copy of `root` with some of its files, since what reads a project may write into it."""
    with tempfile.TemporaryDirectory(dir=desk.cache, prefix=".resolving-") as name:
        folder = Path(name)
        for file in dict.fromkeys(files):
            copy = folder / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy, follow_symlinks=False)
        yield folder


def _included(root: Path, path: Path, *, deep: bool) -> dict[str, Path]:
    """Return a requirements file and, if `deep`, those that it includes, by their names below `root`.

    Raises:
        Refusal: one of them is not in there, so that it is not released with the app.
    """
    pending = [(path, path.name)]
    found: dict[str, Path] = {}
    while pending:
        file, named = pending.pop()
        real = file.resolve()
        if "://" in named or not real.is_relative_to(root.resolve()):
            do = "move it in there, or write a lock that has its lines and hashes"
            raise Refusal("lock", f"requirements inside {root}", f"{named} in {path.name}", do)
        inside = real.relative_to(root.resolve())
        if not real.is_file() or inside.as_posix() in found:
            continue  # uv says what is missing.
        found[inside.as_posix()] = root / inside
        pattern = r"^\s*(?:-r|-c|--requirement|--constraint)[ \t=]*(\S+)"
        pending += deep * [
            (file.parent / each, each) for each in re.findall(pattern, real.read_text(errors="replace"), re.MULTILINE)
        ]
    return found


def _inputs_of_manifest(path: Path) -> dict[str, str]:
    """Return what of a project decides about its dependencies, so that a change of a linter's options resolves none."""
    document = _toml(path) if path.suffix == ".toml" else {}
    project = document.get("project")
    tools = document.get("tool") or {}
    if not isinstance(project, Mapping) or "dependencies" in (project.get("dynamic") or []):
        # A build backend says what they are, out of these as a rule, and of files that its options name.
        folder = path.parent
        said = [path, *folder.glob("setup.*"), *folder.glob("*requirements*.txt")]
        said += [folder / name for name in _texts(tools) if len(name) < _LONGEST_PATH and "\0" not in name]
        return {
            os.path.relpath(each, folder): each.read_text(errors="replace") for each in sorted(said) if each.is_file()
        }
    refuse_elsewhere("\n".join(map(str, project.get("dependencies") or [])), path.name)
    refuse_sources(document, path.name)
    deciding: dict[str, Any] = {name: project[name] for name in _DECIDING if name in project}
    deciding["tool.uv"] = tools.get("uv")
    return {"deciding": json.dumps(deciding, sort_keys=True, default=str)}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of TOML."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(each)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal("source", f"a readable {path.name}", f"{path}: {error}", "mend the file") from None


def _python(folder: Path) -> str:
    manifest = folder / MANIFEST
    project = _toml(manifest).get("project") if manifest.is_file() else None
    return str(project.get("requires-python") or "") if isinstance(project, Mapping) else ""


def _admits(wanted: str, python: str) -> bool:
    """Tell whether a Requires-Python admits a version; one that no standard knows, of an old package, is left to uv."""
    try:
        return SpecifierSet(wanted).contains(Version(python), prereleases=True)
    except InvalidSpecifier:
        return True


def _lowest(wanted: str) -> str:
    """Return the Python that a lock begins at: that of the oldest distribution, or a newer one that the app wants."""
    try:
        bounds = [each.version for each in SpecifierSet(wanted) if each.operator in (">=", "~=", "==")]
    except InvalidSpecifier:
        return _OLDEST  # Judged with the manifest.
    return max([_OLDEST, *(bound.removesuffix(".*") for bound in bounds)], key=Version)


def _covered(name: str, pins: Iterable[Pin], pythons: Iterable[str]) -> bool:
    """Tell whether pins have a package on every one of some Pythons."""
    markers = [pin.requirement.marker for pin in pins if pin.name == name]
    return all(
        any(marker is None or marker.evaluate(Target(python).environment()) for marker in markers) for python in pythons
    )


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and lines of each package of a lock."""
    for block in re.findall(r"^[A-Za-z0-9].*\n(?:[ \t]+.*\n)*", text, re.MULTILINE):
        (pin,) = parse(block)[0]
        yield pin.name, block


def _digest(inputs: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
