"""git and uv, as programs of the control machine, and the folder of what they make."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# A repository or an index that does not answer must not hang a run; a native build takes minutes.
PATIENCE_SECONDS = 600
# What nobody used for a day goes, but for the newest: a run may have more apps than that.
KEPT, KEPT_SECONDS = 20, 24 * 3600
_LONGEST_WORDS = 600
# What uv needs of the environment. Build scripts of other people's packages see all that it has, so not what opens
# Vault or a cloud; and whose run it is says nothing of what is resolved, so not UV_INDEX and its like.
_SEEN = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|NETRC|XDG_(CACHE|DATA)_HOME"
    r"|UV_CACHE_DIR|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy"
)
# What a hook of git sets for its own repository.
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX")


# What is checked out is the same for everybody, whatever their own configuration says.
_ALIKE = (
    "-c",
    "core.autocrlf=false",
    "-c",
    "core.eol=lf",
    "-c",
    "core.symlinks=true",
    "-c",
    "core.hooksPath=/dev/null",
)


class Failed(Exception):
    """A program that failed; the message is what it said last, on one line."""


@dataclass(frozen=True)
class Desk:
    """Where sources and locks are made ready on the control machine.

    Attributes:
        cache: Folder that may be removed at any time.
        locks: Folder beside the inventory with the locks that had to be resolved.
        index: URL of the package index; empty for PyPI.
    """

    cache: Path
    locks: Path
    index: str = ""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one host's run work here at a time: the others find what it has made."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with (self.cache / ".lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Of runs that were killed.
            for left in [*self.cache.glob(".resolving-*"), *self.cache.glob("*/.making-*")]:
                shutil.rmtree(left, ignore_errors=True)
            yield

    @contextmanager
    def filling(self, folder: Path) -> Iterator[Path]:
        """Give a folder to fill, which takes the name `folder` once it is whole; the oldest beside it go."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as name:
            made = Path(name) / folder.name
            made.mkdir()
            yield made
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        prune(folder.parent)

    def uv(self, *arguments: str | Path, folder: Path | None = None) -> str:
        """Run uv of this project's environment, without settings of the folder, the user or the environment.

        Raises:
            Failed: it did.
        """
        environment = {
            **{name: value for name, value in os.environ.items() if _SEEN.fullmatch(name)},
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_NO_CONFIG": "1",
            "UV_SYSTEM_CERTS": "1",
            # These only export: nothing is installed, and nobody asks for news.
            "POETRY_VIRTUALENVS_CREATE": "false",
            "PDM_CHECK_UPDATE": "false",
            # What is built of the same files is the same.
            "SOURCE_DATE_EPOCH": "315532800",
        }
        if self.index:
            environment["UV_DEFAULT_INDEX"] = self.index
        return _run([Path(sys.executable).parent / "uv", "--quiet", *arguments], environment, folder or self.cache)


def git(*arguments: str | Path, folder: Path, local: bool = False) -> str:
    """Run git, which asks nobody for a password: its own credential helpers and keys have to do.

    Only what is `local` itself may lead to files of this machine, by a submodule for example.

    Raises:
        Failed: it did.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}
    environment |= {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "file" if local else "https:ssh",
        "LC_ALL": "C.UTF-8",
        # A tool of its own for large files leaves pointers to them, which are refused.
        "GIT_LFS_SKIP_SMUDGE": "1",
    }
    if "GIT_SSH_COMMAND" not in environment and not _own_ssh(environment, folder):
        environment["GIT_SSH_COMMAND"] = "ssh -o BatchMode=yes"
    return _run(["git", *_ALIKE, *arguments], environment, folder)


def _own_ssh(environment: dict[str, str], folder: Path) -> bool:
    """Tell whether the user's configuration has an ssh, such as one with a key for this."""
    try:
        return bool(_run(["git", "config", "--get", "core.sshCommand"], environment, folder).strip())
    except Failed:
        return False


def _run(command: Sequence[str | Path], environment: dict[str, str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    except FileNotFoundError:
        raise Failed(f"no {Path(command[0]).name} on the control machine") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"no answer within {PATIENCE_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").partition("\nhint:")[0]
        raise Failed(" ".join(said.split())[:_LONGEST_WORDS] or f"exit code {done.returncode}")
    return done.stdout.decode(errors="replace")


def used(path: Path) -> bool:
    """Tell whether something is in the cache already, and keep it there."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def this_run() -> str:
    """Name the process that all hosts of a run have in common, so that no later run mistakes it for its own."""
    stat = Path(f"/proc/{os.getppid()}/stat")
    began = stat.read_text().rpartition(")")[2].split()[19] if stat.is_file() else ""
    return f"{os.getppid()} {began}"


def put(path: Path, text: str) -> None:
    """Write a file of the cache, whole or not at all; the oldest beside it go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)
    prune(path.parent)


def prune(folder: Path) -> None:
    """Remove what is old in a folder of the cache."""
    ages = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            ages.append((path.stat().st_mtime, path))
    for age, path in sorted(ages, reverse=True)[KEPT:]:
        if age > time.time() - KEPT_SECONDS:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
