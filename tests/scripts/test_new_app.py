"""`make new-app`: an entry in an inventory, and nothing else of it touched."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import new_app
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = '[project]\nname = "shop"\nversion = "1"\ndependencies = ["fastapi"]\n'
APP = "from fastapi import FastAPI\n\napp = FastAPI()\n"

FOLLOWED = """---
# Before.
apps:
    # Four spaces.
    blog:
        domain: blog.example.com  # at the end of a line
        note: |
            a block
            # of text

# After.
secrets_vault_address: https://vault.example.com:8200
token: !vault |
    $ANSIBLE_VAULT;1.1;AES256
    3031
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with an app."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(MANIFEST)
    (folder / "main.py").write_text(APP)
    return folder


def inventory(folder: Path, files: dict[str, str]) -> Path:
    """Write an inventory."""
    root = folder / "inventory"
    for name, content in {"hosts.yml": "all: {hosts: {web1: {}}}\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


class Loader(yaml.SafeLoader):
    """Reads `!vault` as text."""


Loader.add_constructor("!vault", lambda _, node: str(node.value))


def loaded(file: Path) -> Any:
    """Read a file of variables."""
    return yaml.load(file.read_text(), Loader)  # noqa: S506 - made of a safe one


@pytest.mark.parametrize(
    ("files", "file"),
    [
        ({"group_vars/all.yml": FOLLOWED}, "group_vars/all.yml"),
        ({"group_vars/all.yml": (ROOT / "inventory/example/group_vars/all.yml").read_text()}, "group_vars/all.yml"),
        ({"group_vars/web/apps.yml": "apps:\n  blog: {domain: blog.example.com}"}, "group_vars/web/apps.yml"),
        ({"group_vars/all.yml": "apps: {}  # none yet\nother: 1\n"}, "group_vars/all.yml"),
        ({"group_vars/all.yml": "apps:\nother: 1\n"}, "group_vars/all.yml"),
        ({"group_vars/all.yml": "apps:\n  # only a remark\n"}, "group_vars/all.yml"),
        ({"group_vars/all.yml": "other: 1"}, "group_vars/all.yml"),
        ({"group_vars/all/main.yml": "other: 1\n"}, "group_vars/all/apps.yml"),
        ({}, "group_vars/all.yml"),
    ],
)
def test_the_entry_is_added_and_every_other_line_stays(
    shop: Path, tmp_path: Path, files: dict[str, str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = inventory(tmp_path, files)
    before = loaded(root / file) if (root / file).exists() else {}
    assert new_app.main([str(shop), "--inventory", str(root)]) == 0
    assert f"{root / file} has apps.shop now.\n  1. fill in: " in capsys.readouterr().out
    after = loaded(root / file)
    entry = after["apps"].pop("shop")
    assert (entry["source"], entry["module"]) == (str(shop), "main:app")
    assert {**after, "apps": after["apps"] or None} == {**before, "apps": before.get("apps") or None}
    lines = (root / file).read_text().splitlines()
    assert [line for line in files.get(file, "").splitlines() if line not in lines and "apps:" not in line] == []
    # What was there stands as it stood, in its order.
    assert [line for line in lines if line in files.get(file, "").splitlines()] == [
        line for line in files.get(file, "").splitlines() if "apps:" not in line or line in lines
    ]


def test_the_entry_stands_among_the_others(shop: Path, tmp_path: Path) -> None:
    """After the last one, before what comes then; with its margin, and the file's ends of lines and mode."""
    root = inventory(tmp_path, {})
    file = root / "group_vars/all.yml"
    file.parent.mkdir()
    file.write_bytes(FOLLOWED.replace("\n", "\r\n").encode())
    file.chmod(0o600)
    assert new_app.main([str(shop), "--inventory", str(root)]) == 0
    text = file.read_bytes().decode()
    assert text.count("\n") == text.count("\r\n")
    assert file.stat().st_mode & 0o777 == 0o600
    lines = text.splitlines()
    at = lines.index("    shop:")
    assert lines[at - 1] == "            # of text"
    assert lines[at + 1].startswith("      domain: shop.example.com")
    assert lines.index("# After.") > at


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({"group_vars/all.yml": "apps:\n  shop: {domain: a.example.com}\n"}, [], "found apps.shop; choose another"),
        ({"group_vars/all.yml": 'apps: "{{ all_apps }}"\n'}, [], "found a template"),
        ({"group_vars/all.yml": "apps: {blog: {domain: a.example.com}}\n"}, [], "found one in braces"),
        ({"group_vars/all.yml": "apps: {}\n", "host_vars/web1.yml": "apps: {}\n"}, [], "expected one file with `apps`"),
        ({"hosts.yml": "all:\n  vars:\n    apps:\n      blog: {}\n"}, [], "expected `apps` in group_vars or host_vars"),
        ({"group_vars/all.yml": "apps: [\n"}, [], "expected YAML in "),
        ({}, ["--name", "postgres"], "postgres is reserved; choose another"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_changes(
    shop: Path,
    tmp_path: Path,
    files: dict[str, str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = inventory(tmp_path, files)
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    assert new_app.main([str(shop), "--inventory", str(root), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before


def test_the_example_stays_an_example(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has no inventory yet is told how to make one."""
    monkeypatch.setattr(new_app, "INVENTORY", tmp_path / "inventory/production", raising=False)
    monkeypatch.setattr(new_app, "write", lambda *_: None)
    assert new_app.main([str(shop)]) == 1
    assert "make one: cp -r inventory/example" in capsys.readouterr().err


def test_an_app_that_will_not_run_is_not_written(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what has to be done first."""
    (shop / "main.py").write_text(f"import os\n{APP}os.fork()\n")
    root = inventory(tmp_path, {})
    assert new_app.main([str(shop), "--inventory", str(root)]) == 1
    said = capsys.readouterr().out
    assert "1. main.py:5" in said
    assert "Nothing was written" in said
    assert not (root / "group_vars").exists()


def test_role_ids_are_asked_for_where_vault_is(shop: Path, tmp_path: Path) -> None:
    """By what the inventory itself says of its secrets."""
    (shop / "main.py").write_text(f"import os\n{APP}KEY = os.environ['KEY']\n")
    for number, text in enumerate(("secrets_source: systemd_creds\n", "other: 1\n")):
        root = inventory(tmp_path / str(number), {"group_vars/all.yml": text})
        assert new_app.main([str(shop), "--inventory", str(root)]) == 0
        entry = loaded(root / "group_vars/all.yml")["apps"]["shop"]
        assert entry["secrets"]["variables"] == {"KEY": "key"}
        assert ("role_id" in entry["secrets"]) == bool(number)


def test_a_source_in_the_project_is_spelt_from_its_root(tmp_path: Path) -> None:
    root = inventory(tmp_path, {})
    assert new_app.main([str(ROOT / "app"), "--inventory", str(root)]) == 0
    assert loaded(root / "group_vars/all.yml")["apps"]["inbox"]["source"] == "app"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call make, which takes the environment for made: another test may be making it."""
    command = ["make", "--no-print-directory", "--assume-old=venv", *arguments]
    # A make around the tests hands over jobs that are not there for this one.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_targets_take_the_app_as_path(shop: Path, tmp_path: Path) -> None:
    """PATH on the command line is the app, and the commands are found all the same."""
    root = inventory(tmp_path, {})
    done = make("inspect", f"PATH={shop}")
    assert done.returncode == 0, done.stderr
    assert "it will run" in done.stdout
    done = make("new-app", f"PATH={shop}", "NAME=other", f"INVENTORY={root}")
    assert done.returncode == 0, done.stderr
    assert list(loaded(root / "group_vars/all.yml")["apps"]) == ["other"]
    done = make("new-app")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "Name the app: make new-app PATH=../shop")
