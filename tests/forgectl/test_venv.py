"""venv.py: what a build gets, and what of it stays."""

import os
import pwd
from pathlib import Path
from typing import Any

import pytest
from forgectl import systemd, venv
from forgectl.errors import ForgeError, Refused
from forgectl.layout import Layout

ME = pwd.getpwuid(os.getuid())


@pytest.fixture
def lock(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of a release, with a wheel that came along; whoever runs the tests builds."""
    monkeypatch.setattr(venv, "BUILD_USER", ME.pw_name)
    made = layout.releases / "r/source/.forge"
    (made / "packages").mkdir(parents=True)
    (made / "packages/shop-1.0-py3-none-any.whl").write_text("wheel")
    (made / "requirements.txt").write_text("./.forge/packages/shop-1.0-py3-none-any.whl --hash=sha256:0\n")
    # As in a sealed release.
    for path in made.rglob("*"):
        path.chmod(0o550 if path.is_dir() else 0o440)
    return made / "requirements.txt"


def test_what_came_along_is_there_for_the_build_and_not_after_it(
    layout: Layout, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build user may read it, where the lock says, from the folder that the build runs in."""
    seen: dict[str, tuple[int, str]] = {}

    def build(command: list[str], *, writable: list[Path], hidden: list[Path], **_: Any) -> None:
        folder = writable[0]
        assert hidden == [layout.root / "srv", layout.root / "var/cache/forge"]
        assert command[-1].startswith(f'cd "{folder}" && ')
        wheel = folder / ".forge/packages/shop-1.0-py3-none-any.whl"
        seen["wheel"] = (wheel.stat().st_mode & 0o777, wheel.read_text())
        seen["folder"] = (wheel.parent.stat().st_mode & 0o777, "")
        (folder / "bin").mkdir()

    monkeypatch.setattr(systemd, "run_sandboxed", build)
    name = venv.build(layout, lock, ME.pw_gid)
    assert seen == {"wheel": (0o644, "wheel"), "folder": (0o755, "")}
    assert sorted(path.name for path in (layout.venvs / name).iterdir()) == [".complete", "bin", "lock.txt"]
    # Again: it is there.
    monkeypatch.setattr(systemd, "run_sandboxed", lambda *_, **__: pytest.fail("built twice"))
    assert venv.build(layout, lock, ME.pw_gid) == name


def test_a_lock_with_another_wheel_is_another_environment(lock: Path) -> None:
    """Its name follows from the hash in the lock."""
    text = lock.read_bytes()
    assert venv.name(text) == venv.name(text) != venv.name(text.replace(b"sha256:0", b"sha256:1"))


def test_a_build_that_fails_says_what_may_be_missing(
    layout: Layout, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing."""

    def fail(*_: Any, **__: Any) -> None:
        raise ForgeError("sh failed:\nerror: command 'gcc' failed: No such file or directory")

    monkeypatch.setattr(systemd, "run_sandboxed", fail)
    with pytest.raises(
        Refused, match=r"(?s)command 'gcc' failed.*name the Debian packages .* in build_packages and run site\.yml"
    ):
        venv.build(layout, lock, ME.pw_gid)
    assert list(layout.venvs.iterdir()) == []
