"""Source folders of apps, small but real."""

from __future__ import annotations

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
