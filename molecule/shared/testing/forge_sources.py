"""Sources of every kind to release, made here: forge_sources.py FOLDER."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
UV = Path(sys.executable).parent / "uv"
SHOP = """
from importlib.metadata import PackageNotFoundError, version

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route


async def answer(request):
    try:
        return JSONResponse({"version": version("shop")})
    except PackageNotFoundError:
        return JSONResponse({"version": "not installed"})


app = Starlette(routes=[Route(path, answer) for path in ("/", "/health", "/ready")])
"""
MANIFEST = """
[project]
name = "{name}"
version = "{version}"
requires-python = ">=3.11"
dependencies = ["starlette>=0.40,<2"]

[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
{tool}
"""
NATIVE_TOOL = 'py-modules = ["native"]\next-modules = [{name = "_native", sources = ["native.c"]}]'
NATIVE = SHOP.replace(
    '{"version": version("shop")}', '{"version": version("native"), "from_c": _native.answer()}'
).replace("from starlette.app", "import _native\nfrom starlette.app", 1)
C = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *answer(PyObject *self, PyObject *arguments) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "", -1, methods};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
"""

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


def project(folder: Path, version: str, name: str = "shop") -> Path:
    """Write a project of one module."""
    native = name == "native"
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text(NATIVE if native else SHOP)
    tool = NATIVE_TOOL if native else f'py-modules = ["{name}"]'
    (folder / "pyproject.toml").write_text(MANIFEST.format(name=name, version=version, tool=tool))
    if native:
        (folder / "native.c").write_text(C)
    return folder


def wheel(folder: Path, version: str) -> Path:
    """Build a wheel of the project."""
    with tempfile.TemporaryDirectory() as name:
        made = project(Path(name) / "project", version)
        subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", folder, made], check=True)
    return folder / f"shop-{version}-py3-none-any.whl"


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
    subprocess.run([UV, "lock", "--quiet"], cwd=project(folder / "folder", "1.0"), check=True)
    wheel(folder, "1.0")
    project(folder / "native-1.0", "1.0", "native")
    subprocess.run([UV, "build", "--quiet", "--sdist", "--out-dir", folder, folder / "native-1.0"], check=True)
    with tarfile.open(folder / "native-1.0.tar.gz") as archive:
        archive.getmember("native-1.0/native.c")


if __name__ == "__main__":
    main()
