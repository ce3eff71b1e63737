"""Source folders of apps, small but real."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

HASH = "--hash=sha256:" + 64 * "0"
MANIFEST = '[project]\nname = "shop"\nversion = "1"\nrequires-python = ">=3.9"\ndependencies = ["fastapi>=0.115"]\n'
PINS = ("fastapi==0.140.0", "gunicorn==27.0.0", "uvicorn-worker==0.4.0")
LOCK = "".join(f"{pin} \\\n    {HASH}\n" for pin in PINS)
APP = """
from fastapi import FastAPI

app = FastAPI()


def create_app(title: str = "shop") -> FastAPI:
    return app
"""


def write(folder: Path, **files: str | None) -> Path:
    """Write an app into `folder`: `app`, `lock` and `manifest` stand for their files, None leaves one out."""
    contents = {"app": APP, "lock": LOCK, "manifest": MANIFEST} | files
    names = {"app": "src/shop/main.py", "lock": "requirements.txt", "manifest": "pyproject.toml"}
    for key, content in contents.items():
        if content is not None:
            path = folder / names.get(key, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return folder


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str] | None = None, **metadata: str) -> Path:
    """Make a wheel; of the metadata `requires` are its dependencies, one a line, `python` its Requires-Python."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    headers = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    headers += [f"Requires-Dist: {line}" for line in metadata.get("requires", "").splitlines()]
    headers += [f"Requires-Python: {metadata['python']}"] if "python" in metadata else []
    tag = metadata.get("tag", "py3-none-any")
    contents = {
        **(files or {}),
        f"{info}/METADATA": "\n".join(headers) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{member},,\n" for member in [*contents, f"{info}/RECORD"])
    path = folder / f"{stem}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (contents | {f"{info}/RECORD": record}).items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return path


def index(folder: Path, *wheels: Path) -> str:
    """Make a package index of wheels, as a folder, and return its URL."""
    for path in wheels:
        project = folder / path.name.partition("-")[0].replace("_", "-")
        project.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, project)
        links = [
            f'<a href="{each.name}#sha256={hashlib.sha256(each.read_bytes()).hexdigest()}">{each.name}</a>'
            for each in sorted(project.glob("*.whl"))
        ]
        (project / "index.html").write_text("\n".join(links))
    return folder.as_uri()
