"""The lock of an app against its manifest and the host's Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from forge.lock import Target, check, parse
from forge.problems import Problem
from sources import HASH, LOCK, MANIFEST, write

ROOT = Path(__file__).resolve().parents[2]


def found(folder: Path, python: str = "3.13.5", **files: str | None) -> list[str]:
    """Return what is wrong."""
    source = write(folder / "shop", **files)
    return [problem.found for problem in judged(source, python)]


def judged(source: Path, python: str) -> list[Problem]:
    """Judge the lock in a folder."""
    text = (source / "requirements.txt").read_text()
    return check(text, "requirements.txt", "again", Target(python), "apps.shop", source / "pyproject.toml")


@pytest.mark.parametrize("python", ["3.11.2", "3.12.3", "3.13.5"])
def test_the_reference_app_passes(python: str) -> None:
    """On the Python of every supported distribution."""
    assert judged(ROOT / "app", python) == []


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        (LOCK + "httpx>=1 " + HASH + "\n", ["not pinned: httpx"]),
        (LOCK + "httpx==1.* " + HASH + "\n", ["not pinned: httpx"]),
        (LOCK.replace("==0.140.0", "===next"), ["not pinned: fastapi", "fastapi is missing"]),
        (LOCK + "httpx @ https://example.com/httpx.whl " + HASH + "\n", ["not pinned: httpx"]),
        (LOCK + "-e ../lib\n-r other.txt\n", ["not pinned: -e, -r"]),
        (LOCK + "httpx==1\n", ["without a hash: httpx"]),
        (LOCK.replace("fastapi", "starlette"), ["fastapi is missing"]),
        (LOCK.replace("0.140.0", "0.115.0rc1"), ["fastapi is 0.115.0rc1, declared >=0.115"]),
        (LOCK + f"uvloop==0.21 ; sys_platform != 'win32' {HASH}\n--require-hashes\n# comment\n", []),
        (LOCK.replace("fastapi==0.140.0", "FastAPI[all]==0.140.0"), []),
    ],
)
def test_locks(tmp_path: Path, lock: str, expected: list[str]) -> None:
    """Exactly pinned, hashed, complete."""
    assert found(tmp_path, lock=lock) == expected


def test_markers_are_those_of_the_host(tmp_path: Path) -> None:
    """A package that is locked for another Python only is missing on this one."""
    lock = LOCK.replace("fastapi==0.140.0", "fastapi==0.140.0 ; python_full_version < '3.12'")
    assert found(tmp_path, "3.11.2", lock=lock) == []
    assert found(tmp_path, "3.13.5", lock=lock) == ["fastapi is missing"]
    manifest = MANIFEST.replace('"fastapi>=0.115"', "\"tomli>=2; python_version < '3.11'\"")
    assert found(tmp_path, manifest=manifest) == []


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (None, []),
        (MANIFEST.replace(">=3.9", ">=3.14"), ["Python 3.13.5 on the host"]),
        (MANIFEST.replace(">=3.9", "three"), ["three"]),
        (MANIFEST.replace('"fastapi>=0.115"', '"fastapi or so"'), ["fastapi (not a valid requirement)"]),
    ],
)
def test_manifests(tmp_path: Path, manifest: str | None, expected: list[str]) -> None:
    """None is none; what it says about Python and dependencies has to hold."""
    assert found(tmp_path, manifest=manifest) == expected


def test_continuation_lines_and_names() -> None:
    """As `uv pip compile` writes them, on any system."""
    pins, strange = parse(f"Foo_Bar==1 \\\r\n    {HASH} \\\r\n    {HASH}\r\n    # via x\r\n")
    assert [(pin.name, pin.version, pin.hashed) for pin in pins] == [("foo-bar", "1", True)]
    assert strange == []
