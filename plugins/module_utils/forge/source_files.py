"""Which files of a source folder belong to a release."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

EXCLUDED_NAMES = frozenset(
    {".git", "__pycache__", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".tox", ".nox", ".DS_Store"}
)

# What is made for a release lies there, beside the app's own files.
RESERVED = ".forge"


class SourceError(Exception):
    """A source folder that cannot be archived; the message says what was expected, what was found and what to do."""


def list_files(root: Path, *, whole: bool = False) -> list[str]:
    """Return the paths of the release's files relative to `root`, with forward slashes, sorted by their bytes.

    Inside a git work tree: what git tracks, and new files that it does not ignore. Elsewhere, or where all of it is
    meant to be the `whole`, every file. In all cases without caches, virtual environments and anything named `.env*`,
    which holds a developer's own settings.

    Raises:
        SourceError: git does not answer, or no file remains.
    """
    names = _git_files(root) if _inside_git(root) and not whole else _walk(root)
    kept = sorted((name for name in names if _belongs(name)), key=os.fsencode)
    if not kept:
        raise SourceError(
            f"expected files to release in {root}; found none (empty, or git ignores all of it); "
            "point `source` at the app's folder"
        )
    return kept


def _belongs(name: str) -> bool:
    parts = name.split("/")
    if any(part in EXCLUDED_NAMES or part.startswith(".env") for part in parts):
        return False
    return not name.endswith((".pyc", ".pyo"))


def _inside_git(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def _git_files(root: Path) -> list[str]:
    # A hook of git runs with variables that point at its own repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", "."]
    try:
        answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        raise SourceError(
            f"expected git, as {root} is in a git work tree and .gitignore decides what is released; found no git on "
            "the control machine; install git"
        ) from None
    if answer.returncode != 0:
        reason = (answer.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[0]
        raise SourceError(
            f"expected `git ls-files` to list {root}; found: {reason}; run it there by hand and mend what it says "
            "(a folder of another user needs `git config --global --add safe.directory`)"
        )
    names = []
    for raw in answer.stdout.split(b"\0"):
        name = os.fsdecode(raw)
        path = root / name
        if not name or not os.path.lexists(path):
            continue  # Deleted in the work tree, still in the index.
        if path.is_dir() and not path.is_symlink():
            names += [f"{name.rstrip('/')}/{inner}" for inner in list_files(path)]  # A submodule.
        else:
            names.append(name)
    return names


def _walk(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        base = Path(folder)
        links = [name for name in subfolders if (base / name).is_symlink()]
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_NAMES and name not in links]
        names += [(base / name).relative_to(root).as_posix() for name in files + links]
    return names
