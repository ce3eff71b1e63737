"""`source_archive`: the same bytes for the same content, and nothing that does not belong into a release."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

import ansible.module_utils
import pytest
from sources import write

ROOT = Path(__file__).resolve().parents[2]
ansible.module_utils.__path__.append(str(ROOT / "plugins/module_utils"))

from ansible.module_utils.forge.source_archive import KEPT_ARCHIVES, MODIFIED, build, location, pack  # noqa: E402
from ansible.module_utils.forge.source_files import SourceError, list_files  # noqa: E402


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments], cwd=folder, check=True)


def test_the_action_as_a_task_runs_it(tmp_path: Path) -> None:
    """It never reports a change, and check mode names the same digest without writing."""
    source, cache = write(tmp_path / "shop"), tmp_path / "cache"
    arguments = json.dumps({"source": str(source), "cache_dir": str(cache)})
    answers = []
    for options in (["--check"], []):
        answer = subprocess.run(
            ["ansible", "localhost", "-m", "source_archive", "-a", arguments, *options],
            cwd=ROOT,
            env=os.environ | {"ANSIBLE_STRATEGY": "linear", "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        result = json.loads(answer[answer.index("{") :])
        answers.append({key: result[key] for key in ("changed", "digest", "path", "files", "bytes")})
        assert cache.exists() == (not options)
    checked, done = answers
    assert checked == done
    assert not done["changed"]
    assert done["files"] == 3
    assert Path(done["path"]).stat().st_size == done["bytes"]
    assert subprocess.check_output(["sha256sum", done["path"]], text=True).split()[0] == done["digest"]


def test_the_action_lays_additions_over_a_source_and_keeps_its_lock(tmp_path: Path) -> None:
    """What was resolved is moved to where it is kept, by a run and not by a check."""
    source, additions = write(tmp_path / "shop"), write(tmp_path / "more", app=None, lock="x\n", manifest=None)
    resolved, kept = tmp_path / "resolved.txt", tmp_path / "inventory/locks/shop.txt"
    resolved.write_text("pins\n")
    task: dict[str, object] = {"source": str(source), "cache_dir": str(tmp_path / "cache"), "additions": str(additions)}
    task["lock"] = {"resolved": str(resolved), "keep": str(kept)}
    play = [{"hosts": "localhost", "gather_facts": False, "tasks": [{"source_archive": task, "check_mode": False}]}]
    (tmp_path / "play.yml").write_text(json.dumps(play))
    for options, is_kept in ((["--check"], False), ([], True), ([], True)):
        command = ["ansible-playbook", f"{tmp_path}/play.yml", *options]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_STRATEGY": "linear"}, check=True)
        assert (kept.is_file(), resolved.is_file()) == (is_kept, not is_kept)
    assert kept.read_text() == "pins\n"
    assert kept.stat().st_mode & 0o777 == 0o644
    (path,) = (tmp_path / "cache").iterdir()
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == len(set(archive.getnames()))
        lock = archive.extractfile("requirements.txt")
        assert lock
        assert lock.read() == b"x\n"


def test_the_digest_depends_on_content_alone(tmp_path: Path) -> None:
    """Not on times, owners, the order of creation, the umask, or where it lies."""
    one = write(tmp_path / "one")
    two = tmp_path / "elsewhere" / "two"
    previous = os.umask(0o077)
    try:
        for name in reversed(list_files(one)):
            (two / name).parent.mkdir(parents=True, exist_ok=True)
            (two / name).write_bytes((one / name).read_bytes())
            os.utime(two / name, (1, 1))
    finally:
        os.umask(previous)
    if os.geteuid() == 0:
        os.chown(two / "pyproject.toml", 1234, 1234)
    assert pack(one) == pack(two)


@pytest.mark.parametrize("change", ["content", "name", "executable", "link"])
def test_the_digest_depends_on_all_content(tmp_path: Path, change: str) -> None:
    """Content, names, the executable bit and links."""
    source = write(tmp_path / "shop")
    before = pack(source).digest
    file = source / "requirements.txt"
    if change == "content":
        file.write_text(file.read_text() + "\n")
    elif change == "name":
        file.rename(source / "requirements.lock")
    elif change == "executable":
        file.chmod(0o755)
    else:
        (source / "link").symlink_to("requirements.txt")
    assert pack(source).digest != before


def test_members(tmp_path: Path) -> None:
    """Sorted, with parents before children, owned by root, at one time, unreadable to nobody."""
    source = write(tmp_path / "shop", **{"src/shop/ünïcode name.txt": "x", "bin/run": "#!/bin/sh\n"})
    (source / "bin/run").chmod(0o700)
    with tarfile.open(location(tmp_path, build(source, tmp_path))) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.isdir()] == ["bin", "src", "src/shop"]
    files = {member.name: member for member in members if member.isfile()}
    assert list(files) == sorted(files, key=os.fsencode) == list_files(source)
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in members} == {(0, 0, "", MODIFIED)}
    assert (files["bin/run"].mode, files["pyproject.toml"].mode) == (0o755, 0o644)


@pytest.mark.parametrize("inside_git", [True, False])
def test_what_does_not_belong_into_a_release(tmp_path: Path, inside_git: bool) -> None:
    """Caches, environments and `.env*` anywhere; inside git also what it ignores, and what is deleted."""
    source = write(tmp_path / "shop", **{".gitignore": "ignored/\n*.log\n"})
    before = set(list_files(source))
    kept = {"new file.py", "deep/er/data.json"}
    dropped = {".env", ".env.production", "sub/.env", ".venv/bin/python", "src/__pycache__/a.pyc", "b.pyc"}
    if inside_git:
        git(source, "init", "--quiet")
        (source / "gone.py").touch()
        git(source, "add", "--all")
        (source / "gone.py").unlink()
        dropped |= {"ignored/a", "debug.log"}
    for name in kept | dropped:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    assert set(list_files(source)) == before | kept


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "src/../../outside"])
def test_links_that_lead_out_are_refused(tmp_path: Path, target: str) -> None:
    """A release is complete in itself."""
    source = write(tmp_path / "shop")
    (source / "link").symlink_to(target)
    with pytest.raises(SourceError, match=rf"expected links inside .*; found link -> {target}; replace the link"):
        pack(source)


def test_links_inside_are_kept_as_they_are(tmp_path: Path) -> None:
    """Relative ones, even with dots in their names, and to a folder."""
    source = write(tmp_path / "shop")
    targets = {"src/up": "../pyproject.toml", "dots": "./src//shop", "odd": "..odd", "loop": "loop"}
    for name, target in targets.items():
        (source / name).symlink_to(target)
    with tarfile.open(location(tmp_path, build(source, tmp_path))) as archive:
        assert {member.name: member.linkname for member in archive if member.issym()} == targets


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    """Nothing to release is a mistake in the inventory."""
    (tmp_path / ".env").touch()
    with pytest.raises(SourceError, match="found none"):
        pack(tmp_path)


def test_old_archives_go(tmp_path: Path) -> None:
    """The newest stay, and files of others."""
    cache = tmp_path / "cache"
    (cache / "notes").mkdir(parents=True)
    for number in range(KEPT_ARCHIVES + 3):
        old = cache / f"{number:064x}.tar"
        old.touch()
        os.utime(old, (number, number))
    archive = build(write(tmp_path / "shop"), cache)
    names = {path.name for path in cache.iterdir()}
    assert location(cache, archive).name in names
    assert names - {f"{number:064x}.tar" for number in range(KEPT_ARCHIVES + 3)} == {"notes", f"{archive.digest}.tar"}
    assert len(names) == KEPT_ARCHIVES + 1
    assert f"{3:064x}.tar" not in names
    assert f"{4:064x}.tar" in names
