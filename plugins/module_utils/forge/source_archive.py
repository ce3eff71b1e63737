"""Pack the source folder of an app into an archive whose digest depends on nothing but its content.

An uncompressed tar archive with sorted names and fixed times, owners and modes. It is not compressed because the bytes
that zlib produces differ between its versions, and the digest names the release.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ansible.module_utils.forge.source_files import SourceError, list_files

KEPT_ARCHIVES = 20
# 1980-01-01, the earliest time that zip-based tools accept.
MODIFIED = 315532800


class Archive(NamedTuple):
    """What was packed; `size` in bytes."""

    digest: str
    files: int
    size: int


class Hashing:
    """A writable file that hashes what passes through, and keeps it only when it has a file behind it."""

    def __init__(self, behind: BinaryIO | None) -> None:
        self._behind = behind
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Take in some more of the file."""
        self._hash.update(data)
        self.size += len(data)
        if self._behind is not None:
            self._behind.write(data)
        return len(data)

    def tell(self) -> int:
        """Return how much passed through, as tarfile asks."""
        return self.size

    def hexdigest(self) -> str:
        """Return the digest of what passed through."""
        return self._hash.hexdigest()


def pack(
    source: Path, behind: BinaryIO | None = None, *, whole: bool = False, additions: Path | None = None
) -> Archive:
    """Write the archive of `source` to `behind`, or only compute its digest.

    All files of a `whole` source belong to it, whatever a .gitignore around it says. `additions` is a folder that is
    laid over it.

    Raises:
        SourceError: the folder has no file, a file that cannot be read, or a link that leads out of it.
    """
    origin = dict.fromkeys(list_files(source, whole=whole), source)
    if additions is not None:
        origin |= dict.fromkeys(list_files(additions, whole=True), additions)
    names = sorted(origin, key=os.fsencode)
    out = Hashing(behind)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for folder in sorted({str(parent) for name in names for parent in Path(name).parents} - {"."}, key=os.fsencode):
            member = _member(folder, 0o755)
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for name in names:
            _add(archive, origin[name], name)
    return Archive(out.hexdigest(), len(names), out.size)


def _member(name: str, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mtime = MODIFIED
    member.mode = mode
    return member


def _add(archive: tarfile.TarFile, source: Path, name: str) -> None:
    path = source / name
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(path)  # noqa: PTH115 - as it is spelt, which a Path does not keep
            inside = os.path.normpath(Path(name).parent / target)
            if inside == ".." or inside.startswith(("/", "../")):
                raise SourceError(
                    f"expected links inside {source} to stay inside it; found {name} -> {target}; "
                    "replace the link by the file"
                )
            member = _member(name, 0o777)
            member.type = tarfile.SYMTYPE
            member.linkname = target
            archive.addfile(member)
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
            member = _member(name, 0o755 if status.st_mode & stat.S_IXUSR else 0o644)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        else:
            raise SourceError(
                f"expected files and links in {source}; found {name}, which is neither; move it out of the source"
            )
    except OSError as error:
        raise SourceError(f"expected to read {path}; found: {error.strerror}; mend its permissions") from error


def location(cache: Path, archive: Archive) -> Path:
    """Return where `archive` lies in `cache`, now or later."""
    return cache / f"{archive.digest}.tar"


def build(source: Path, cache: Path, *, whole: bool = False, additions: Path | None = None) -> Archive:
    """Write the archive into `cache` under its digest, atomically, and drop all but the newest archives there."""
    cache.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cache, prefix=".packing-")
    try:
        with os.fdopen(handle, "wb") as file:
            archive = pack(source, file, whole=whole, additions=additions)
        Path(temporary).replace(location(cache, archive))
    except BaseException:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    archives = [entry for entry in cache.iterdir() if re.fullmatch(r"[0-9a-f]{64}\.tar", entry.name)]
    # Another host's run may prune at the same moment.
    with suppress(FileNotFoundError):
        for old in sorted(archives, key=lambda entry: entry.stat().st_mtime, reverse=True)[KEPT_ARCHIVES:]:
            old.unlink()
    return archive
