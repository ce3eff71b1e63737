"""`forgectl inspect` as a command: on the control machine, and as it is packed for a host."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import ansible.module_utils
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ansible.module_utils.__path__.append(str(ROOT / "plugins/module_utils"))

from ansible.module_utils.forge.source_archive import pack  # noqa: E402

MANIFEST = '[project]\nname = "shop"\nversion = "1"\ndependencies = ["fastapi"]\n'
APP = "from fastapi import FastAPI\n\napp = FastAPI()\n"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with an app."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(MANIFEST)
    (folder / "main.py").write_text(APP)
    return folder


def forgectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it on the control machine."""
    command = [str(ROOT / "scripts/forgectl"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_exit_code_says_whether_it_will_run(shop: Path) -> None:
    good = forgectl("inspect", str(shop))
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("shop: it will run, once 1 value is filled in\n")
    assert "An entry to start from" in good.stdout
    (shop / "main.py").write_text(f"import os\n{APP}os.fork()\n")
    bad = forgectl("inspect", str(shop))
    assert bad.returncode == 1
    assert bad.stdout.startswith("shop: 1 thing has to be done first\n")
    assert "\n1. main.py:5\n   expected: an app that stays in the process" in bad.stdout
    for arguments in (["inspect"], ["inspect", str(shop / "nowhere")], ["inspect", str(shop / "main.py")]):
        assert forgectl(*arguments).returncode == 2


def test_for_programs(shop: Path) -> None:
    """All of it as JSON, or the entry alone as YAML, and both say the same."""
    found = json.loads(forgectl("inspect", "--json", str(shop)).stdout)
    assert (found["will_run"], found["module"], found["problems"]) == (True, "main:app", [])
    assert found["python"]["distributions"] == ["Debian 12", "Ubuntu 24.04", "Debian 13"]
    printed = forgectl("inspect", "--entry", str(shop)).stdout
    assert yaml.safe_load(printed) == found["entry"]
    assert printed == found["entry_yaml"]


def test_a_host_needs_neither_ansible_nor_yaml(shop: Path, tmp_path: Path) -> None:
    """What the role packs is complete, with nothing but what forgectl's own lock has."""
    with (tmp_path / "forgectl.tar").open("wb") as file:
        pack(ROOT / "roles/forgectl/files/forgectl", file, additions=ROOT / "plugins/module_utils")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(tmp_path / "forgectl.tar") as tar:
        for member in tar:
            if content := tar.extractfile(member):
                (unpacked / member.name).parent.mkdir(parents=True, exist_ok=True)
                (unpacked / member.name).write_bytes(content.read())
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('ansible', 'yaml', 'jinja2'))\n"
        f"sys.argv = ['forgectl', 'inspect', {str(shop)!r}]\n"
        "from forgectl.cli import main\nmain()"
    )
    environment = {"PYTHONPATH": f"{unpacked}/src:{unpacked}", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "main:app, FastAPI" in done.stdout


def test_the_environment_has_forgectl(tmp_path: Path) -> None:
    """`make venv` puts it there, also where all else is there already."""
    for name in ("venv", "forgectl"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    python = tmp_path / ".venv/bin/python"
    said = subprocess.run(
        [python, "-c", "import sys; print(sys.version, sys.base_prefix)"], capture_output=True, check=True
    )
    digest = hashlib.sha256((tmp_path / "requirements.txt").read_bytes()).hexdigest()
    (tmp_path / ".venv/.requirements").write_bytes(f"{digest}-".encode() + said.stdout)
    subprocess.run([tmp_path / "scripts/venv"], env=os.environ | {"PYTHON": str(python)}, check=True)
    assert (tmp_path / ".venv/bin/forgectl").resolve() == tmp_path / "scripts/forgectl"
