"""Where the source of an app comes from, and how it gets onto the control machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from .lock import Target
from .problems import Refusal
from .programs import Desk, Failed, git, put, this_run, used

KINDS = "a folder; git+https://HOST/REPOSITORY@REF; a file *.whl, *.tar.gz or *.zip; or a package as NAME==VERSION"
_SCHEMES = ("https", "ssh", "file")
_COMMIT = re.compile(r"[0-9a-f]{40}")
ARCHIVES = (".whl", ".tar.gz", ".zip")
# By the specification of git LFS, in bytes.
_LARGEST_POINTER = 1024
_PKG_INFO = re.compile(r"(\./)?[^/]+/PKG-INFO")
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?\s*(?:\[[\w\s,.-]*\])?\s*(?:[=~!<>]=|[<>]).*")


@dataclass(frozen=True)
class Folder:
    """A folder of the control machine."""

    path: Path


@dataclass(frozen=True)
class Repository:
    """A git repository at a branch, a tag or a commit; `inside` is the app's folder there."""

    url: str
    ref: str
    inside: str = "."

    def git(self, *arguments: str | Path, folder: Path) -> str:
        """Run git for this repository."""
        return git(*arguments, folder=folder, local=self.url.startswith("file:"))


@dataclass(frozen=True)
class File:
    """A wheel or an sdist of the control machine."""

    path: Path


@dataclass(frozen=True)
class Package:
    """One version of a package of the index; `requirement` is how a lock names it."""

    name: str
    version: str
    requirement: str


Origin = Folder | Repository | File | Package


@dataclass(frozen=True)
class Distribution:
    """What is installed rather than unpacked.

    Attributes:
        requirement: Its line among the requirements, for a package of the index.
        dependencies: Those of a file, with their markers.
        python: Its Requires-Python.
        file: The file that goes along, for a file.
        tree: What it installs, for a look into it; None when it cannot be had.
    """

    requirement: str = ""
    dependencies: tuple[str, ...] = ()
    python: str = ""
    file: Path | None = None
    tree: Path | None = None


@dataclass(frozen=True)
class Fetched:
    """A source on the control machine: `folder` with the app's files, or a `distribution`.

    Attributes:
        record: What the record of a release says of it.
        root: The repository's, where the folder is in one: every file in it belongs to it, whatever a .gitignore says.
    """

    record: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    root: Path | None = None
    distribution: Distribution | None = None


def parse(text: str, root: Path) -> Origin:
    """Return what `source` of an entry means; relative paths start at `root`.

    Raises:
        Refusal: nothing that is known.
    """
    text = text.strip()
    path = (root / text).resolve()
    if text.startswith("git+"):
        return _repository(text)
    if "://" in text:
        raise Refusal("source", KINDS, f"an address: {urlsplit(text).scheme}://", "write git+ before a repository's")
    if path.is_dir():
        return Folder(path)
    if text.endswith(ARCHIVES):
        if not path.is_file():
            raise Refusal("source", "a file on the control machine", f"no file at {path}", "correct `source`")
        return File(path)
    return _package(text) if _PACKAGE.fullmatch(text) else Folder(path)


def _repository(text: str) -> Repository:
    expected = "git+https://HOST/REPOSITORY@REF, with #subdirectory=FOLDER where the app is in one"
    parts = urlsplit(text.removeprefix("git+"))
    if parts.scheme not in _SCHEMES:
        raise Refusal("source", f"git+ and one of {', '.join(_SCHEMES)}", f"git+{parts.scheme}", "use git+https")
    if parts.password or (parts.username and parts.scheme != "ssh"):
        raise Refusal(
            "source",
            "a URL without credentials, which would be in every release's record",
            "a user or a token before the @",
            "take it out, revoke it, and let a credential helper of git on the control machine have another",
        )
    path, separator, ref = parts.path.rpartition("@")
    if not separator or not ref or ref.startswith("-") or not path.strip("/"):
        raise Refusal("source", expected, "no ref", "write @ and a tag, a branch, or all 40 digits of a commit")
    options = dict(parse_qsl(parts.fragment))
    inside = os.path.normpath(options.pop("subdirectory", "."))
    if parts.query or options or (parts.fragment and "=" not in parts.fragment):
        raise Refusal("source", expected, "more than that behind the ref", "leave it out")
    if inside.startswith(("/", "..")):
        raise Refusal("source", "a subdirectory inside the repository", inside, "correct it")
    url = f"{parts.scheme}://{parts.netloc}{path}"
    return Repository(url, unquote(ref), inside)


def _package(text: str) -> Package:
    expected = "a package with one version, as NAME==VERSION or NAME[EXTRA]==VERSION"
    do = "pin it: what is released shall be the same tomorrow"
    try:
        wanted = Requirement(text)
        (specifier,) = wanted.specifier
        version = str(Version(specifier.version))
    except (InvalidRequirement, InvalidVersion, ValueError):
        raise Refusal("source", expected, text, do) from None
    if specifier.operator != "==" or wanted.marker or wanted.url:
        raise Refusal("source", expected, text, do)
    extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
    name = canonicalize_name(wanted.name)
    return Package(name, version, f"{name}{extras}=={version}")


def fetch(origin: Origin, target: Target, desk: Desk) -> Fetched:
    """Bring a source onto the control machine.

    Raises:
        Refusal: it is not to be had.
    """
    match origin:
        case Folder(path):
            return Fetched({"kind": "folder"}, path)
        case Repository():
            return _clone(origin, desk)
        case File(path) if path.suffix == ".whl":
            return _wheel(path, target, desk)
        case File(path):
            return _sdist(path, desk)
        case Package():
            return _from_index(origin, target, desk)


def _clone(repository: Repository, desk: Desk) -> Fetched:
    url, ref = repository.url, repository.ref
    name, commit = _commit(repository, desk)
    folder = desk.cache / "git" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{commit}"
    if not used(folder):
        with desk.filling(folder) as made:
            _check_out(repository, name, commit, made)
    inside = folder / repository.inside
    if not inside.is_dir():
        raise Refusal(
            "source", f"a folder {repository.inside} in {url} at {ref}", "none", "correct #subdirectory= or the ref"
        )
    record = {"kind": "git", "url": url, "ref": ref, "commit": commit}
    if repository.inside != ".":
        record["subdirectory"] = repository.inside
    return Fetched(record, inside, folder)


def _commit(repository: Repository, desk: Desk) -> tuple[str, str]:
    """Return the full name of a ref and its commit: asked for once a run, so that each of its hosts gets the same."""
    url, ref = repository.url, repository.ref
    if _COMMIT.fullmatch(ref):
        return ref, ref
    noted = desk.cache / "refs" / f"{hashlib.sha256(f'{url} {ref}'.encode()).hexdigest()[:24]}.json"
    run = this_run()
    if noted.is_file() and (note := json.loads(noted.read_text()))["run"] == run:
        return str(note["name"]), str(note["commit"])
    # In pip's order.
    names = [f"refs/heads/{ref}", f"refs/tags/{ref}", ref] if not ref.startswith("refs/") else [ref]
    try:
        answer = repository.git("ls-remote", "--", url, *names, *(f"{name}^{{}}" for name in names), folder=desk.cache)
    except Failed as error:
        raise Refusal(
            "source",
            f"a repository at {url} that this machine may read",
            str(error),
            f"correct the address, or give git access to it: `git ls-remote {url}`",
        ) from None
    found = {name: commit for commit, _, name in (line.partition("\t") for line in answer.splitlines())}
    name = next((each for each in names if each in found), None)
    if name is None:
        raise Refusal(
            "source",
            f"a branch, a tag or a whole commit {ref} in {url}",
            "no such ref",
            f"push it, or name one of `git ls-remote {url}`; of a commit all 40 digits",
        )
    # Of an annotated tag, the commit and not the tag.
    commit = found.get(f"{name}^{{}}", found[name])
    put(noted, json.dumps({"run": run, "name": name, "commit": commit}))
    return name, commit


def _check_out(repository: Repository, name: str, commit: str, folder: Path) -> None:
    try:
        repository.git("init", "--quiet", folder, folder=folder)
        try:
            repository.git("fetch", "--quiet", "--depth=1", "--no-tags", "--", repository.url, name, folder=folder)
        except Failed:
            # A server need not hand out a commit by its number.
            repository.git("fetch", "--quiet", "--", repository.url, "+refs/*:refs/fetched/*", folder=folder)
        repository.git("checkout", "--quiet", "--detach", commit, folder=folder)
        if (folder / ".gitmodules").exists():
            repository.git("submodule", "--quiet", "update", "--init", "--recursive", "--depth=1", folder=folder)
    except Failed as error:
        raise Refusal(
            "source",
            f"the commit {commit} of {repository.url} with its submodules",
            str(error),
            "push it, or name another ref; try again if the branch has just moved",
        ) from None
    _refuse_pointers(repository, folder)
    for path in [*folder.rglob(".git")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_pointers(repository: Repository, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_POINTER:
            continue
        if path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/"):
            raise Refusal(
                "source",
                f"the files of {repository.url} in git itself",
                f"{path.relative_to(folder)} is a pointer of git LFS",
                "keep what the app needs in git, or release a clone of it as a folder or a wheel",
            )


def _wheel(path: Path, target: Target, desk: Desk) -> Fetched:
    digest = _digest(path)
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
    except InvalidWheelFilename:
        raise Refusal("source", "a wheel under its own name", path.name, "do not rename what built it") from None
    if not any(_fits(tag, target) for tag in tags):
        raise Refusal(
            "source",
            f"a wheel for Python {target.python} on Linux {target.machine}, or for any",
            path.name,
            "build it for the host, or give its sdist, which the host then builds",
        )
    tree = _unpacked(path, digest, desk)
    record = {"kind": "wheel", "file": path.name, "sha256": digest, "name": str(name), "version": str(version)}
    return Fetched(record, distribution=_described(path, tree))


def _fits(tag: Tag, target: Target) -> bool:
    """Tell whether a wheel with such a tag installs on the host; which glibc it needs is left to the host."""
    linux = "linux" in tag.platform and "musl" not in tag.platform and tag.platform.endswith(f"_{target.machine}")
    if not (linux or tag.platform == "any"):
        return False
    major, minor = (int(part) for part in target.python.split(".")[:2])
    platforms = [tag.platform]
    return tag in {
        *cpython_tags((major, minor), platforms=platforms),
        *compatible_tags((major, minor), f"cp{major}{minor}", platforms),
    }


def _sdist(path: Path, desk: Desk) -> Fetched:
    """Build an sdist for a look into it: what goes along is itself, the same whoever builds it with what."""
    digest = _digest(path)
    record = {"kind": "sdist", "file": path.name, "sha256": digest}
    try:
        wheel = _built(path, desk.cache / "built" / digest, desk)
    except Failed as error:
        # The host may have the Python, or the libraries, that are missing here.
        headers = _static_metadata(path)
        if headers is None:
            raise Refusal(
                "source",
                f"an sdist that builds on the control machine, or says in PKG-INFO what it needs: {path.name}",
                str(error),
                "mend its build: `uv build --wheel` shows all of it",
            ) from None
        record |= {"name": canonicalize_name(headers["Name"]), "version": headers["Version"]}
        return Fetched(record, distribution=_distribution(headers, path, None))
    name, version, _, _ = parse_wheel_filename(wheel.name)
    record |= {"name": str(name), "version": str(version)}
    return Fetched(record, distribution=_described(path, _unpacked(wheel, _digest(wheel), desk)))


def _built(path: Path, folder: Path, desk: Desk) -> Path:
    if not used(folder):
        with desk.filling(folder) as made:
            desk.uv("build", "--wheel", "--out-dir", made, path)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise Failed("no wheel came of it")
    return wheel


def _static_metadata(path: Path) -> Message | None:
    """Return the metadata of an sdist, where by its own words every build of it has the same dependencies."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found = [archive.read(name) for name in archive.namelist() if _PKG_INFO.fullmatch(name)]
        else:
            with tarfile.open(path) as tar:
                members = [tar.extractfile(member) for member in tar if _PKG_INFO.fullmatch(member.name)]
                found = [member.read() for member in members if member]
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, OSError, EOFError, RuntimeError):
        return None
    headers = HeaderParser().parsestr(found[0].decode(errors="replace") if found else "")
    version = [int(part) for part in re.findall(r"\d+", headers.get("Metadata-Version") or "0")]
    dynamic = {field.lower() for field in headers.get_all("Dynamic") or []}
    said = headers.get("Name") and headers.get("Version") and version >= [2, 2]
    return headers if said and not dynamic & {"requires-dist", "requires-python"} else None


def _unpacked(wheel: Path, digest: str, desk: Desk) -> Path:
    folder = desk.cache / "trees" / digest
    if not used(folder):
        try:
            with desk.filling(folder) as made, zipfile.ZipFile(wheel) as archive:
                archive.extractall(made)  # noqa: S202 - a zip, which stays in its folder
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
            raise Refusal("source", f"a wheel in {wheel}", str(error), "build it again") from None
    return folder


def _described(file: Path, tree: Path) -> Distribution:
    """Read the metadata of a wheel's content."""
    metadata = next(tree.glob("*.dist-info/METADATA"), None)
    if metadata is None:
        raise Refusal("source", f"metadata in {file.name}", "none", "build it again")
    headers = HeaderParser().parsestr(metadata.read_text(encoding="utf-8", errors="replace"))
    return _distribution(headers, file, tree)


def _distribution(headers: Message, file: Path, tree: Path | None) -> Distribution:
    return Distribution(
        dependencies=tuple(headers.get_all("Requires-Dist") or []),
        python=headers.get("Requires-Python") or "",
        file=file,
        tree=tree,
    )


def _from_index(package: Package, target: Target, desk: Desk) -> Fetched:
    """Look into the package as it would be on the host; its lock brings it there."""
    minor = ".".join(target.python.split(".")[:2])
    folder = desk.cache / "packages" / f"{package.name}-{package.version}-{minor}-{target.machine}"
    bare = f"{package.name}=={package.version}"
    record = {"kind": "package", "name": package.name, "version": package.version}
    if not used(folder):
        platform = f"{target.machine}-unknown-linux-gnu"
        try:
            with desk.filling(folder) as made:
                desk.uv(
                    *("pip", "install", "--no-deps", "--only-binary=:all:", "--target", made, "--python"),
                    *(sys.executable, "--python-version", target.python, "--python-platform", platform, bare),
                )
        except Failed:
            # No wheel, no such version, or no answer: its lock will tell, and the next run looks again.
            return Fetched(record, distribution=Distribution(package.requirement))
    metadata = next(folder.glob("*.dist-info/METADATA"), None)
    headers = HeaderParser().parsestr(metadata.read_text("utf-8", "replace") if metadata else "")
    python = headers.get("Requires-Python") or ""
    return Fetched(record, distribution=Distribution(package.requirement, python=python, tree=folder))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
