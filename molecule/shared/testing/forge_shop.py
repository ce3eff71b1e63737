"""The app that docs/bring-your-app.md talks of, and the control machine that it is brought from."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = "bring-your-app"
# It knows nothing of the platform.
SHOP = {
    "pyproject.toml": '[project]\nname = "shop"\nversion = "1"\ndependencies = ["fastapi"]\n',
    "shop/__init__.py": "",
    "shop/main.py": """import os

from fastapi import FastAPI

KEY = os.environ["SIGNING_KEY"]
app = FastAPI()


@app.get("/healthz")
def healthz() -> dict[str, str]:
    return {"status": "ok"}
""",
}
CONTROL = (".venv", "Makefile", "ansible.cfg", "playbooks", "plugins", "roles", "site.yml")


def control(folder: Path) -> Path:
    """Lay out the app, and beside it the project without an inventory; returns the project."""
    for name, content in SHOP.items():
        file = folder / "shop" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    project = folder / "project"
    (project / "scripts").mkdir(parents=True)
    for name in (*CONTROL, "scripts/forgectl", "scripts/new_app.py"):
        (project / name).symlink_to(ROOT / name)
    # The environment is there, or this would not run.
    for name in ("venv", "packages"):
        (project / "scripts" / name).write_text("#!/bin/sh\n")
        (project / "scripts" / name).chmod(0o755)
    return project
