"""Sources of every kind to release, made here: forge_sources.py FOLDER."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
UV = Path(sys.executable).parent / "uv"
SAMPLES = PROJECT / "molecule" / "apps"
WHEELS = ("httpbinx==1.13.0", "httpbinx==1.13.1")
SDIST = "rogue-1.0"

OF_POETRY = "# Made by hand, from what uv locked.\n\n"
OF_PDM = """
[metadata]
groups = ["default"]
strategy = ["inherit_metadata"]
lock_version = "4.5.0"
content_hash = "sha256:0"

[[metadata.targets]]
requires_python = ">=3.11"

"""


def git(folder: Path, *arguments: str) -> str:
    """Run git in a repository as somebody."""
    command = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.com", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def commit(folder: Path, message: str) -> str:
    """Commit all that is in a repository's folder; return the commit."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", f"--message={message}")
    return git(folder, "rev-parse", "HEAD")


def relock(folder: Path, kind: str) -> None:
    """Put a poetry.lock or a pdm.lock with the same packages in the place of a project's uv.lock."""
    packages = tomllib.loads((folder / "uv.lock").read_text())["package"]
    (folder / "uv.lock").unlink()
    text = OF_POETRY if kind == "poetry" else OF_PDM
    for package in packages:
        if "wheels" not in package:
            continue  # The project itself.
        files = ", ".join(
            f'{{file = "{each["url"].rpartition("/")[2]}", hash = "{each["hash"]}"}}' for each in package["wheels"]
        )
        text += f'[[package]]\nname = "{package["name"]}"\nversion = "{package["version"]}"\n'
        if kind == "pdm":
            text += f'groups = ["default"]\nfiles = [{files}]\n\n'
            continue
        text += f'description = ""\noptional = false\npython-versions = ">=3.8"\ngroups = ["main"]\nfiles = [{files}]\n'
        wanted = [each["name"] for each in package.get("dependencies", [])]
        text += "\n[package.dependencies]\n" + "".join(f'{name} = "*"\n' for name in wanted) + "\n"
    if kind == "poetry":
        ask = "from poetry.factory import Factory; print(Factory().create_poetry('.').locker._get_content_hash())"
        command = [str(UV), "tool", "run", "--quiet", "--from", "poetry==2.5.1", "python", "-c", ask]
        digest = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        text += f'[metadata]\nlock-version = "2.1"\npython-versions = ">=3.11"\ncontent-hash = "{digest}"\n'
    (folder / f"{kind}.lock").write_text(text)


def main() -> None:
    """Make all of them in a folder, the sdist last."""
    folder = Path(sys.argv[1])
    repository = folder / "repository"
    shutil.copytree(
        PROJECT / "app", repository / "backend", ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
    )
    git(repository, "init", "--quiet", "--initial-branch=main")
    commit(repository, "first")
    git(repository, "tag", "v1")
    for name in ("plain", "rogue"):
        shutil.copytree(SAMPLES / name, folder / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    subprocess.run([UV, "lock", "--quiet"], cwd=folder / "plain", check=True)
    # Each for itself: pip would look for one version of both.
    for wheel in WHEELS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}", wheel]
        subprocess.run(command, check=True)
    subprocess.run([UV, "build", "--quiet", "--sdist", f"--out-dir={folder}", folder / "rogue"], check=True)
    with tarfile.open(folder / f"{SDIST}.tar.gz") as archive:
        archive.getmember(f"{SDIST}/rogue.c")


if __name__ == "__main__":
    main()
