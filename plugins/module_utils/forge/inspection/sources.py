"""What is handed to an inspection: a folder, a wheel or an sdist, unpacked for as long as it is looked at."""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..origins import ARCHIVES
from ..source_files import EXCLUDED_NAMES, SourceError, list_files

_MANIFESTS = ("pyproject.toml", "setup.cfg", "setup.py", "requirements.txt")
_FRAMEWORKS = (b"fastapi", b"starlette", b"litestar", b"quart", b"asgi")
_DEEPEST = 3


@contextmanager
def opened(path: Path) -> Iterator[tuple[Path, str]]:
    """Give the folder of a source, and what it came as: `folder`, `wheel` or `sdist`.

    Raises:
        SourceError: it is none of them, or cannot be read.
    """
    if path.is_dir():
        yield path.resolve(), "folder"
        return
    if not path.is_file() or not path.name.endswith(ARCHIVES):
        found = "something else" if path.exists() else "nothing"
        raise SourceError(
            f"expected a folder, a wheel or an sdist at {path}; found {found}; correct the path "
            "(a Git repository is cloned first, a package is fetched with `pip download --no-deps`)"
        )
    with tempfile.TemporaryDirectory(prefix="forge-inspect-") as temporary:
        folder = Path(temporary).resolve()
        try:
            _unpack(path, folder)
        except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise SourceError(
                f"expected an archive that can be unpacked; found {path}: {error}; fetch it anew"
            ) from error
        if path.name.endswith(".whl"):
            yield folder, "wheel"
            return
        inside = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name != "__MACOSX"]
        yield (inside[0] if len(inside) == 1 else folder), "sdist"


def _unpack(path: Path, folder: Path) -> None:
    """Write the regular files of an archive into `folder`; what else is in it is nothing to look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    _write(folder, name, archive.read(name))
        return
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                _write(folder, member.name, content.read())


def _write(folder: Path, name: str, content: bytes) -> None:
    target = folder / name
    # The standard library's filter does the same; Debian 12's Python does not have it.
    if not target.resolve().is_relative_to(folder):
        raise tarfile.TarError(f"{name} leads out of it")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def project_folder(source: Path) -> Path:
    """Return the folder of the project: `source`, or the one inside it that alone looks like one.

    Many repositories keep the app in a folder such as backend/ and its manifest there.
    """
    if any((source / name).is_file() for name in _MANIFESTS):
        return source
    found = []
    for name in _MANIFESTS:
        for file in sorted(source.rglob(name)):
            inside = file.relative_to(source).parts
            if len(inside) <= _DEEPEST and not EXCLUDED_NAMES & set(inside) and "tests" not in inside:
                text = file.read_bytes().lower()
                if file.parent not in found and any(word in text for word in _FRAMEWORKS):
                    found.append(file.parent)
    return found[0] if len(found) == 1 else source


def files(source: Path) -> list[str]:
    """Return what a release would hold.

    Raises:
        SourceError: nothing, or git does not answer.
    """
    return list_files(source)
