"""Releases on disk: made complete or not at all, read-only, checked before they start, and removed when old."""

import compileall
import gzip
import hashlib
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import BinaryIO

import msgspec

from forgectl import schema, venv
from forgectl.config import App
from forgectl.errors import Refused
from forgectl.layout import SLOTS, Layout, fsync, fsync_tree, made_whole, walk
from forgectl.lock import person
from forgectl.state import now

# What a release is made of beside its source and settings.toml.
INPUTS = ("gunicorn.conf.py", "slot.conf", "forge_worker.py")
# What Nginx never serves, wherever it lies; its configuration says so as well.
CODE = re.compile(r"\.py[a-z]?$")
GZIP_MAGIC = b"\x1f\x8b"


class Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """release.json.

    `digest` covers source and settings, `source_digest` the uploaded archive alone, `tree` what lies in the folder.
    `schema_heads` are the Alembic revisions that its code is written for; None where another tool migrates. `source` is
    what the control machine says of where it comes from; empty for a folder with a lock of its own.
    """

    id: str
    digest: str
    source_digest: str
    venv: str
    at: str
    by: str
    schema_heads: list[str] | None = None
    tree: str = ""
    source: dict[str, str] = {}


def origin(source: Path) -> dict[str, str]:
    """What the control machine wrote down of where a source comes from."""
    path = source / venv.RESERVED / "source.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise Refused(f"expected names and texts in {path.name}; found: {error}; pack the source again") from error


def digest_of(layout: Layout, source_digest: str) -> str:
    """The digest of a release: its source, its settings, its Gunicorn configuration and its unit."""
    whole = hashlib.sha256()
    for part in (source_digest.encode(), layout.description.read_bytes(), *map(Path.read_bytes, _inputs(layout))):
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def records(layout: Layout) -> list[Record]:
    """The releases on disk, oldest first."""
    found = []
    for path in sorted(layout.releases.glob("[0-9]*/release.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Record))
        except msgspec.DecodeError as error:
            raise Refused(f"expected the record of a release in {path}; found: {error}; remove that folder") from error
    return found


def stage(
    layout: Layout,
    app: App,
    *,
    digest: str,
    source_digest: str,
    archive: Path | None,
    donor: Record | None,
    group: int,
) -> Record:
    """Make the folder of a release: complete, durable and read-only, or not there at all.

    Raises:
        Refused: the archive is unusable, or the disk is full.
    """
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{digest[:12]}"
    incomplete = incomplete_folder(layout, name)
    with made_whole(incomplete, 0o700):
        if archive is not None and archive.exists():
            unpack(archive, incomplete / "source")
        elif donor is not None:
            copy(layout.releases / donor.id / "source", incomplete / "source")
        else:
            raise Refused(f"expected an archive at {archive}; found none; upload it")
        lock = incomplete / "source" / app.lock
        if not lock.is_file():
            raise Refused(f"expected the lock {app.lock} in the source; found none; set `lock`, or write one")
        shutil.copyfile(layout.description, incomplete / "settings.toml")
        for path in _inputs(layout):
            shutil.copyfile(path, incomplete / path.name)
        environment = venv.name(lock.read_bytes())
        heads = schema.heads(schema.revisions(incomplete / "source")) if app.uses_alembic else None
        (incomplete / "venv").symlink_to(f"../../venvs/{environment}")
        # Nobody may write bytecode here later, so it is written now; its sources never change, so nobody checks them.
        for compile_path, part in ((compileall.compile_dir, "source"), (compileall.compile_file, "forge_worker.py")):
            compile_path(
                incomplete / part,
                stripdir=incomplete,
                prependdir=layout.releases / name,
                quiet=2,
                invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
            )
        tree = _tree(incomplete)
        found = origin(incomplete / "source")
        record = Record(name, digest, source_digest, environment, now(), person(), heads, tree, found)
        (incomplete / "release.json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        venv.seal(incomplete, group)
        for folder in app.static:
            publish(incomplete, incomplete / "source" / folder)
        fsync_tree(incomplete)
        incomplete.rename(layout.releases / name)
        fsync(layout.releases)
    return record


def publish(release: Path, folder: Path) -> None:
    """Let everybody, and so Nginx, read a sealed folder of a release, and nothing else in it.

    A file that is hidden, or code, stays as it is; so does what a link leads to.

    Raises:
        Refused: there is no such folder.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Refused(f"expected the static folder {folder.name} in the source; found none; build it, or mend `static`")
    for above in (folder, *folder.parents):
        above.chmod(0o551)
        if above == release:
            break
    for path in walk(folder):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_symlink() or hidden or CODE.search(path.name) or path.name == "__pycache__":
            continue
        path.chmod(0o555 if path.is_dir() else 0o444)


def check_intact(layout: Layout, record: Record) -> None:
    """Check that a release is what was staged; `tree` is empty in releases of the first version.

    Raises:
        Refused: a file was changed, added or removed since.
    """
    folder = layout.releases / record.id
    if record.tree and _tree(folder) != record.tree:
        raise Refused(
            f"expected {folder} as it was staged; found changed files; nothing may write there: find out what did, "
            f"move the folder away, and release its source again"
        )


def put_right(layout: Layout, app: App, record: Record, group: int, *, dry_run: bool) -> bool:
    """Give a release and its environment the owner and modes that they were staged with; tell whether they lack them.

    What is a program is told by its owner's bit: where that is gone as well, the release has to be staged anew.
    """
    wrong = [
        folder
        for folder in (layout.releases / record.id, layout.venvs / record.venv)
        # Root alone asks whether an environment is complete.
        if folder.exists()
        and any(not venv.is_sealed(path, group) for path in walk(folder) if path.name != venv.COMPLETE)
    ]
    if not dry_run:
        for folder in wrong:
            venv.seal(folder, group)
        for each in app.static if wrong else ():
            publish(layout.releases / record.id, layout.releases / record.id / "source" / each)
    return bool(wrong)


def _tree(folder: Path) -> str:
    """The digest of names, contents and links below a folder, without the record that holds it."""
    whole = hashlib.sha256()
    for path in sorted(walk(folder)):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            parts = (b"link", name.encode(), os.fsencode(path.readlink()))
        elif path.is_dir():
            parts = (b"folder", name.encode(), b"")
        elif name == "release.json":
            continue
        else:
            parts = (b"file", name.encode(), path.read_bytes())
        for part in parts:
            whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def copy(source: Path, target: Path) -> None:
    """Copy a tree without its bytecode. shutil.copytree hides why it could not."""
    for path in walk(source):
        copied = target / path.relative_to(source)
        if "__pycache__" in copied.parts:
            continue
        if path.is_symlink():
            copied.symlink_to(path.readlink())
        elif path.is_dir():
            copied.mkdir()
        else:
            shutil.copy(path, copied)


def unpack(archive: Path, target: Path) -> None:
    """Unpack folders, files and links that stay inside; anything else is refused, whatever made the archive.

    The standard library's extraction filter does the same; Debian 12's Python does not have it.
    """
    target.mkdir(mode=0o700)
    links: set[str] = set()
    try:
        with _stream(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = os.path.normpath(member.name)
                if name == ".":
                    continue
                parts = Path(name).parts
                through_link = any("/".join(parts[: count + 1]) in links for count in range(len(parts)))
                if name.startswith("/") or parts[0] == ".." or through_link:
                    raise Refused(
                        f"expected names inside the source; found {member.name!r} in {archive}; pack it again"
                    )
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if member.isdir():
                    path.mkdir(exist_ok=True)
                elif member.issym():
                    path.symlink_to(member.linkname)
                    links.add(name)
                elif member.isreg() and (content := tar.extractfile(member)):
                    with path.open("xb") as file:
                        shutil.copyfileobj(content, file)
                    path.chmod(0o755 if member.mode & 0o100 else 0o644)
                else:
                    raise Refused(
                        f"expected files, folders and links in {archive}; found {member.name!r}; leave it out"
                    )
            # The checksum stands after the last thing that tarfile reads.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f"expected a tar or tar.gz archive in {archive}; found: {error}; upload it again") from error
    # Only now: one link may lead through another.
    inside = os.path.realpath(target)
    for name in links:
        leads_to = (target / name).readlink()
        if leads_to.is_absolute() or not Path(os.path.realpath(target / name)).is_relative_to(inside):
            raise Refused(
                f"expected links inside the source; found {name!r} -> {str(leads_to)!r} in {archive}; leave it out"
            )


def _stream(archive: Path) -> gzip.GzipFile | BinaryIO:
    """Open an archive for reading: Ansible uploads it plain, a person may have compressed it."""
    with archive.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    return gzip.open(archive) if compressed else archive.open("rb")


def prunable(layout: Layout, app: App, needed: Collection[str]) -> tuple[list[Record], list[Path]]:
    """The oldest releases beyond keep_releases, and the environments that none of the others uses.

    `needed` are kept however old they are, and so is what a slot points at.
    """
    known = records(layout)
    kept = {record.id for record in known[-app.keep_releases :]} | set(needed)
    kept |= {release for slot in SLOTS if (release := layout.slot_release(slot))}
    used = {record.venv for record in known if record.id in kept}
    return (
        [record for record in known if record.id not in kept],
        sorted(path for path in layout.venvs.iterdir() if path.name not in used),
    )


def prune(layout: Layout, app: App, needed: Collection[str]) -> list[str]:
    """Remove what is prunable; returns the names of it."""
    releases, venvs = prunable(layout, app, needed)
    for record in releases:
        hidden = incomplete_folder(layout, record.id)
        (layout.releases / record.id).rename(hidden)
        shutil.rmtree(hidden)
    for path in venvs:
        venv.remove(path)
    return [record.id for record in releases] + [path.name for path in venvs]


def _inputs(layout: Layout) -> list[Path]:
    paths = [layout.inputs / name for name in INPUTS]
    for path in paths:
        if not path.is_file():
            raise Refused(f"expected {path}; found none; run site.yml, which renders it")
    return paths


def digest_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def incomplete_folder(layout: Layout, release: str) -> Path:
    """Where a release lies while it is made or removed."""
    return layout.releases / f".{release}.incomplete"
