"""What a release is packed from, for every kind of source, against an index of packages that are made here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from itertools import count
from pathlib import Path
from typing import Any

import ansible.module_utils
import pytest
from sources import APP, HASH, LOCK, MANIFEST, index, wheel, write

ROOT = Path(__file__).resolve().parents[2]
ansible.module_utils.__path__.append(str(ROOT / "plugins/module_utils"))

from ansible.module_utils.forge import locks, origins  # noqa: E402
from ansible.module_utils.forge.bundle import Bundle, prepare  # noqa: E402
from ansible.module_utils.forge.inspection.judge import inspect  # noqa: E402
from ansible.module_utils.forge.lock import Target, parse  # noqa: E402
from ansible.module_utils.forge.problems import Refusal  # noqa: E402
from ansible.module_utils.forge.programs import Desk, Failed  # noqa: E402
from ansible.module_utils.forge.source_archive import pack  # noqa: E402
from ansible.module_utils.forge.source_files import SourceError  # noqa: E402

ENTRY = {"module": "shop.main:app", "python_path": ".", "lock": "", "static": {}}
SETUPTOOLS = """
import pathlib

def prepare_metadata_for_build_wheel(directory, settings=None):
    info = pathlib.Path(directory, "shop-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: shop\\nVersion: 1.0\\nRequires-Dist: fastapi\\n")
    return info.name

class __legacy__:
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""
FILES = {"shop/__init__.py": "", "shop/main.py": APP}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of an index that has a few packages."""
    folder = tmp_path_factory.mktemp("wheels")
    made = [
        wheel(folder, "gunicorn", "27.0.0", requires="packaging"),
        wheel(folder, "packaging", "24.0"),
        wheel(folder, "packaging", "25.0"),
        wheel(folder, "uvicorn", "0.30.0"),
        wheel(folder, "uvicorn", "0.40.0"),
        wheel(folder, "uvicorn-worker", "0.4.0", requires="gunicorn\nuvicorn>=0.15"),
        wheel(folder, "fastapi", "0.115.0"),
        wheel(folder, "fastapi", "0.140.0"),
        wheel(folder, "shop", "1.0", FILES, requires="fastapi\nshop-extra ; extra == 'more'"),
        wheel(folder, "shop", "2.0", FILES, requires="fastapi", python=">=3.14"),
        wheel(folder, "shop-extra", "1.0"),
        wheel(folder, "setuptools", "90.0", {"setuptools/__init__.py": "", "setuptools/build_meta.py": SETUPTOOLS}),
    ]
    return index(folder / "simple", *made)


@pytest.fixture
def desk(tmp_path: Path, packages: str, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    # Each look at an app is that of another run.
    runs = count()
    monkeypatch.setattr(locks, "this_run", lambda: str(next(runs)))
    return Desk(tmp_path / "cache", tmp_path / "inventory/locks", packages)


def made(desk: Desk, source: object, python: str = "3.13.5", **changes: Any) -> Bundle:
    """Make an app's source ready."""
    return prepare("shop", {**ENTRY, "source": str(source), **changes}, desk.cache.parent, desk, Target(python))


def locked(bundle: Bundle) -> dict[str, str]:
    """Name and version of all that a bundle installs from an index."""
    assert bundle.problems == []
    assert bundle.source
    folder = bundle.additions or bundle.source
    return {pin.name: pin.version for pin in parse((folder / bundle.lock).read_text())[0]}


def origin(bundle: Bundle) -> dict[str, str]:
    """What the record of a release would say."""
    folder = bundle.additions or bundle.source
    assert folder
    document: dict[str, str] = json.loads((folder / ".forge/source.json").read_text())
    return document


def refused(bundle: Bundle) -> str:
    """The one problem, on a line."""
    (problem,) = bundle.problems
    return f"{problem.where}: {problem.expected} | {problem.found} | {problem.do}"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
    return subprocess.check_output(command, cwd=folder, text=True).strip()


def keep(bundle: Bundle, desk: Desk) -> str:
    """Keep what was resolved beside the inventory, as a release does, and return it."""
    assert bundle.resolved
    desk.locks.mkdir(parents=True, exist_ok=True)
    if bundle.resolved != desk.locks / "shop.txt":
        shutil.move(bundle.resolved, desk.locks / "shop.txt")
    return str((desk.locks / "shop.txt").read_text())


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose app is in a folder of it, with a tag, a branch, and a commit after both."""
    folder = tmp_path / "repository"
    write(folder / "backend", **{".gitignore": "build/\n"})
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=1")
    git(folder, "tag", "--annotate", "--message=1", "v1")
    git(folder, "branch", "stable")
    (folder / "backend/new.txt").write_text("x")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=2")
    return folder


def test_a_folder_with_a_complete_lock_is_packed_as_it_is(tmp_path: Path, desk: Desk) -> None:
    """The digest of its release stays what it was before there were other sources."""
    source = write(tmp_path / "shop")
    bundle = made(desk, source, python_path="src")
    assert bundle == Bundle(source, lock="requirements.txt")
    assert pack(source) == pack(source, whole=False, additions=None)


@pytest.mark.parametrize(
    ("files", "wanted", "versions", "warning"),
    [
        ({"lock": "fastapi==0.115.0\n"}, "", {"fastapi": "0.115.0"}, "requirements.txt has no hashes"),
        ({"lock": "-r base.txt\n", "base.txt": "fastapi<0.140\n"}, "", {"fastapi": "0.115.0"}, "has no hashes"),
        ({"lock": None}, "", {"fastapi": "0.140.0"}, "pyproject.toml alone"),
        ({"lock": LOCK}, "pyproject.toml", {"fastapi": "0.140.0"}, "pyproject.toml alone"),
        ({"lock": f"fastapi==0.115.0 {HASH}\nuvicorn==0.30.0 {HASH}\n"}, "", {"uvicorn": "0.30.0"}, ""),
        ({"lock": f"fastapi==0.115.0 {HASH}\npackaging==24.0 {HASH}\n"}, "", {"packaging": "24.0"}, ""),
    ],
)
def test_what_a_lock_lacks_is_added(
    tmp_path: Path, desk: Desk, files: dict[str, str | None], wanted: str, versions: dict[str, str], warning: str
) -> None:
    """Everything is pinned by hash, the app's own versions hold, and a guess is called one."""
    bundle = made(desk, write(tmp_path / "shop", **files), python_path="src", lock=wanted)
    found = locked(bundle)
    assert found | versions == found
    assert {"gunicorn", "uvicorn", "uvicorn-worker", "packaging"} <= set(found)
    assert bundle.lock == ".forge/requirements.txt"
    assert origin(bundle)["pins"] == "resolved"
    assert warning in " ".join(bundle.warnings)
    assert len(bundle.warnings) == bool(warning)


def test_hashes_of_the_apps_own_lock_are_kept(tmp_path: Path, desk: Desk) -> None:
    """They say what was tested; those of an index may be others."""
    text = f"# of the app\nfastapi==0.115.0 \\\n    {HASH}\n"
    bundle = made(desk, write(tmp_path / "shop", lock=text), python_path="src")
    assert bundle.additions
    assert text in (bundle.additions / bundle.lock).read_text()


def test_servers_that_do_not_go_with_the_apps_versions_are_refused(tmp_path: Path, desk: Desk) -> None:
    """Rather than change one of these."""
    lock = f"fastapi==0.115.0 {HASH}\nuvicorn==0.10.0 {HASH}\n"
    said = refused(made(desk, write(tmp_path / "shop", lock=lock), python_path="src"))
    assert said.startswith("apps.shop.lock: gunicorn, uvicorn-worker beside the app's own versions | ")
    assert "uvicorn" in said.split(" | ")[1]


def test_what_was_resolved_is_used_until_its_inputs_change(tmp_path: Path, desk: Desk) -> None:
    """On another machine as well, where the index has moved on; and what can stay stays when they do."""
    source = write(tmp_path / "shop", lock="fastapi\npackaging<25\n", manifest=None)
    kept = keep(made(desk, source, python_path="src"), desk)
    assert "packaging==24.0" in kept
    shutil.rmtree(desk.cache)
    away = Desk(desk.cache, desk.locks, "file:///nowhere")
    again = made(away, source, python_path="src")
    assert again.resolved == desk.locks / "shop.txt"
    assert keep(again, desk) == kept
    (source / "requirements.txt").write_text("fastapi\npackaging\nshop-extra\n")
    assert "expected" not in (said := refused(made(away, source, python_path="src")))
    assert said.startswith("apps.shop.lock: ")
    changed = locked(made(desk, source, python_path="src"))
    assert (changed["shop-extra"], changed["packaging"]) == ("1.0", "24.0")


def test_hosts_of_a_run_share_one_lock(tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them with other requirements would take turns in the one file, and none get the same again."""
    source = write(tmp_path / "shop", lock="fastapi\n", manifest=None)
    other = write(tmp_path / "other", lock="shop-extra\n", manifest=None)
    monkeypatch.setattr(locks, "this_run", lambda: "one")
    for _ in range(2):
        assert "fastapi" in locked(made(desk, source, python_path="src"))
    said = refused(made(desk, other, python_path="src"))
    assert said.startswith("apps.shop.lock: the same requirements of shop on all hosts of a run")
    elsewhere = Desk(desk.cache, tmp_path / "staging/locks", desk.index)
    assert "shop-extra" in locked(made(elsewhere, other, python_path="src"))


def test_who_removes_a_kept_lock_gets_the_newest_versions(tmp_path: Path, desk: Desk) -> None:
    """And until it is kept, a check and the run after it see the same."""
    source = write(tmp_path / "shop", lock="fastapi\npackaging\n", manifest=None)
    desk.locks.mkdir(parents=True)
    older = LOCK + f"packaging==24.0 {HASH}\n"
    (desk.locks / "shop.txt").write_text(older)
    first = made(desk, source, python_path="src")
    assert made(desk, source, python_path="src").resolved == first.resolved != desk.locks / "shop.txt"
    assert locked(first)["packaging"] == "24.0"
    keep(first, desk)
    (desk.locks / "shop.txt").unlink()
    assert locked(made(desk, source, python_path="src"))["packaging"] == "25.0"


def test_a_linters_options_decide_about_no_dependency(tmp_path: Path, desk: Desk) -> None:
    """So a change of them resolves nothing."""
    source = write(tmp_path / "shop", lock=None)
    before = made(desk, source, python_path="src").resolved
    (source / "pyproject.toml").write_text(MANIFEST + "\n[tool.ruff]\nline-length = 100\n")
    assert made(desk, source, python_path="src").resolved == before
    (source / "pyproject.toml").write_text(MANIFEST.replace('"fastapi>=0.115"', '"fastapi>=0.115", "shop-extra"'))
    assert made(desk, source, python_path="src").resolved != before


def test_requirements_above_the_apps_folder(desk: Desk, repository: Path) -> None:
    """They are the repository's own, each where it is there, and those of one app are not another's."""
    (repository / "backend/requirements.txt").write_text("-r ../base.txt\n")
    for version in ("0.115.0", "0.140.0"):
        (repository / "base.txt").write_text(f"fastapi=={version}\n")
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", f"--message={version}")
        source = f"git+{repository.as_uri()}@{git(repository, 'rev-parse', 'main')}#subdirectory=backend"
        assert locked(made(desk, source, python_path="src"))["fastapi"] == version


@pytest.mark.parametrize("line", ["-r ../base.txt", "-c{base}", "--requirement=https://example.com/base.txt"])
def test_requirements_outside_of_the_source_are_refused(tmp_path: Path, desk: Desk, line: str) -> None:
    """They are not released with it."""
    (tmp_path / "base.txt").write_text("fastapi\n")
    line = line.format(base=tmp_path / "base.txt")
    said = refused(made(desk, write(tmp_path / "shop", lock=f"{line}\n"), python_path="src"))
    assert said.startswith(f"apps.shop.lock: requirements inside {tmp_path}/shop | ")
    assert "in requirements.txt | move it in there" in said


FORKED = MANIFEST.replace(
    '"fastapi>=0.115"', """"fastapi<0.140; python_version < '3.12'", "fastapi>=0.140; python_version >= '3.12'\""""
)


@pytest.mark.parametrize(
    ("files", "runs"),
    [
        ({}, True),
        ({"lock": "fastapi==0.115.0\n"}, True),
        ({"lock": "fastapi\n-r base.txt\n", "base.txt": "packaging\n"}, True),
        ({"lock": "# nothing\n"}, True),
        ({"lock": None}, True),
        ({"lock": None, "manifest": None, "setup.py": "from setuptools import setup\nsetup()\n"}, True),
        (
            {"lock": None, "manifest": "[tool.ruff]\n", "setup.cfg": "[options]\ninstall_requires =\n    fastapi\n"},
            True,
        ),
        ({"lock": None, "manifest": FORKED, "uv.lock": ""}, True),
        ({"lock": LOCK + "packaging==24.0\n"}, False),
        ({"lock": LOCK + "-e .\n"}, False),
        ({"lock": LOCK.replace("==0.140.0", ">=0.140.0")}, False),
        ({"lock": "fastapi\n-e .\n"}, False),
        ({"lock": "fastapi\n.\n"}, False),
        ({"lock": "fastapi @ git+https://git.example.com/fastapi\n"}, False),
        ({"lock": "fastapi\n-r base.txt\n", "base.txt": "./lib\n"}, False),
        ({"lock": "-r ../base.txt\n"}, False),
        ({"lock": None, "manifest": MANIFEST.replace("fastapi>=", "fastapi @ https://example.com/")}, False),
        ({"lock": None, "manifest": "[tool.ruff]\nline-length = 100\n"}, False),
        ({"lock": None, "manifest": None, "setup.cfg": "[flake8]\n"}, False),
        ({"lock": None, "manifest": None, "setup.cfg": "[options]\ninstall_requires = fastapi\n"}, False),
    ],
)
def test_an_inspection_judges_a_lock_as_a_run_does(
    tmp_path: Path, desk: Desk, packages: str, files: dict[str, str | None], runs: bool
) -> None:
    """What is said to run does, and what is refused is not printed as an entry."""
    source = write(tmp_path / "shop", **files)
    if "uv.lock" in files:
        uv_lock(source, packages)
    (tmp_path / "base.txt").write_text("fastapi\n")
    report = inspect(source)
    bundle = made(desk, source, python_path="src")
    assert (report.will_run, bundle.problems == []) == (runs, runs), (report.problems, bundle.problems)


def test_an_inspection_takes_the_archives_that_a_run_takes(tmp_path: Path, desk: Desk) -> None:
    """And no other."""
    with tarfile.open(tmp_path / "shop.tgz", "w:gz") as archive:
        archive.add(write(tmp_path / "shop"), "shop")
    assert made(desk, "shop.tgz").problems
    with pytest.raises(SourceError):
        inspect(tmp_path / "shop.tgz")


def uv_lock(source: Path, packages: str) -> None:
    """Write the lock of a project."""
    (source / "uv.lock").unlink(missing_ok=True)
    command = [str(Path(sys.executable).parent / "uv"), "lock", "--quiet", "--default-index", packages]
    subprocess.run(command, cwd=source, check=True, env=os.environ | {"UV_NO_CONFIG": "1"})


def test_dependencies_in_another_file_are_inputs(tmp_path: Path, desk: Desk) -> None:
    """As options of a build backend name it; when it changes, the kept lock does not fit any more."""
    manifest = (
        '[project]\nname = "shop"\nversion = "1"\ndynamic = ["dependencies"]\n'
        '[tool.setuptools.dynamic]\ndependencies = {file = ["deps/base.in"]}\n'
    )
    source = write(tmp_path / "shop", lock=None, manifest=manifest, **{"deps/base.in": "fastapi\n"})
    keep(made(desk, source, python_path="src"), desk)
    assert made(desk, source, python_path="src").resolved == desk.locks / "shop.txt"
    (source / "deps/base.in").write_text("fastapi\nshop-extra\n")
    assert made(desk, source, python_path="src").resolved != desk.locks / "shop.txt"


def test_a_lock_for_some_pythons_is_complete_on_these(tmp_path: Path, desk: Desk) -> None:
    """Where the app admits no newer one, nothing is added to it."""
    lock = LOCK.replace(" \\", " ; python_full_version < '3.13' \\")
    newest = MANIFEST.replace(">=3.9", ">=3.11,<3.13")
    source = write(tmp_path / "shop", lock=lock, manifest=newest)
    assert made(desk, source, "3.12.3", python_path="src") == Bundle(source, lock="requirements.txt")
    assert made(desk, write(tmp_path / "any", lock=lock), "3.12.3", python_path="src").resolved


def test_another_exporter_exports_anew(
    tmp_path: Path, desk: Desk, packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may write a lock differently."""
    source = write(tmp_path / "shop", lock=None)
    uv_lock(source, packages)
    for newer in ("1", "2"):
        monkeypatch.setattr(locks, "version", lambda _, newer=newer: newer, raising=False)
        locked(made(desk, source, python_path="src"))
    assert len([*(desk.cache / "exports").iterdir()]) == 2


def test_uv_lock(tmp_path: Path, desk: Desk, packages: str) -> None:
    """It is exported, and one that contradicts pyproject.toml is refused."""
    source = write(tmp_path / "shop", lock=None)
    uv_lock(source, packages)
    before = sorted(source.iterdir())
    bundle = made(desk, source, python_path="src")
    assert locked(bundle)["fastapi"] == "0.140.0"
    assert (origin(bundle)["lock"], bundle.warnings) == ("uv.lock", [])
    assert sorted(source.iterdir()) == before
    (source / "pyproject.toml").write_text(MANIFEST.replace('"fastapi>=0.115"', '"fastapi>=1"'))
    said = refused(made(desk, source, python_path="src"))
    assert "uv.lock to satisfy the dependencies" in said
    assert "fastapi is 0.140.0, declared >=1 | write it anew with `uv lock`" in said


def test_a_folder_without_any_lock_is_refused(tmp_path: Path, desk: Desk) -> None:
    """With the names of those that would do."""
    said = refused(made(desk, write(tmp_path / "shop", lock=None, manifest=None), python_path="src"))
    assert "one of requirements.txt, uv.lock, poetry.lock, pdm.lock and pyproject.toml" in said


def test_credentials_in_a_lock_are_refused(tmp_path: Path, desk: Desk) -> None:
    """They would be on every host."""
    lock = LOCK + "--index-url https://user:" + "pw@example.com/simple\n"
    assert "a URL with a password in requirements.txt" in refused(
        made(desk, write(tmp_path / "shop", lock=lock), python_path="src")
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (
            "git+ssh://git@git.example.com/team/shop.git@v1#subdirectory=backend/",
            origins.Repository("ssh://git@git.example.com/team/shop.git", "v1", "backend"),
        ),
        (
            "git+https://git.example.com:8443/shop.git@feature/x",
            origins.Repository("https://git.example.com:8443/shop.git", "feature/x"),
        ),
        ("Shop_Web [b, A] == 1.0.0", origins.Package("shop-web", "1.0.0", "shop-web[A,b]==1.0.0")),
        ("apps/shop", origins.Folder(Path("/project/apps/shop"))),
        ("/srv/shop", origins.Folder(Path("/srv/shop"))),
        ("../shop==1/app", origins.Folder(Path("/shop==1/app"))),
    ],
)
def test_what_an_entry_means(text: str, meant: origins.Origin) -> None:
    """Before anything is fetched; what is none of the others is a folder, which need not be there."""
    assert origins.parse(text, Path("/project")) == meant


@pytest.mark.parametrize("ref", ["main", "v1", "stable", "refs/tags/v1", "a commit"])
def test_git(desk: Desk, repository: Path, ref: str) -> None:
    """A branch, a tag or a commit: what is released is a commit, and the record names it."""
    commit = git(repository, "rev-parse", "main~1" if ref == "a commit" else f"{ref}^{{commit}}")
    ref = commit if ref == "a commit" else ref
    bundle = made(desk, f"git+{repository.as_uri()}@{ref}#subdirectory=backend", python_path="src")
    assert bundle.problems == []
    assert bundle.source
    files = {path.relative_to(bundle.source).as_posix() for path in bundle.source.rglob("*") if path.is_file()}
    assert files == {".gitignore", "pyproject.toml", "requirements.txt", "src/shop/main.py"} | (
        {"new.txt"} if ref == "main" else set()
    )
    found = origin(bundle)
    assert (found["kind"], found["ref"], found["commit"]) == ("git", ref, commit)
    assert bundle.lock == "requirements.txt"


def test_a_users_configuration_of_git_changes_no_file(
    tmp_path: Path, desk: Desk, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of a release is the same for every colleague; an ssh of the user's own is used."""
    (repository / "backend/link").symlink_to("pyproject.toml")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message=3")
    hook = tmp_path / "hooks/post-checkout"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\ntouch backend/hooked\n")
    hook.chmod(0o755)
    (tmp_path / "gitconfig").write_text(
        f"[core]\nautocrlf = true\nsymlinks = false\nhooksPath = {hook.parent}\nsshCommand = {tmp_path}/ssh\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    bundle = made(desk, f"git+{repository.as_uri()}@main#subdirectory=backend", python_path="src")
    assert bundle.source
    assert b"\r" not in (bundle.source / "pyproject.toml").read_bytes()
    assert (bundle.source / "link").is_symlink()
    assert not (bundle.source / "hooked").exists()
    (tmp_path / "ssh").write_text("#!/bin/sh\necho own >&2\nexit 1\n")
    (tmp_path / "ssh").chmod(0o755)
    assert "own" in refused(made(desk, "git+ssh://git@git.example.com/shop.git@v1"))


def test_pointers_to_large_files_are_refused(desk: Desk, repository: Path) -> None:
    """They are not what the app means to serve."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (repository / "backend/logo.png").write_text(pointer)
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message=3")
    said = refused(made(desk, f"git+{repository.as_uri()}@main#subdirectory=backend"))
    assert "backend/logo.png is a pointer of git LFS" in said


def test_git_packs_all_that_is_tracked(desk: Desk, repository: Path) -> None:
    """What the cache lies in, and a .gitignore of the app, have no say."""
    (repository / "backend/build").mkdir()
    (repository / "backend/build/page.html").write_text("x")
    git(repository, "add", "--force", "--all")
    git(repository, "commit", "--quiet", "--message=3")
    # As the project's own .cache does.
    git(desk.cache.parent, "init", "--quiet")
    (desk.cache.parent / ".gitignore").write_text("/cache/\n")
    bundle = made(desk, f"git+{repository.as_uri()}@main#subdirectory=backend", python_path="src")
    assert bundle.source
    with (desk.cache / "archive.tar").open("wb") as file:
        pack(bundle.source, file, whole=bundle.whole, additions=bundle.additions)
    with tarfile.open(desk.cache / "archive.tar") as archive:
        names = [member.name for member in archive if member.isfile()]
    assert "build/page.html" in names
    assert ".forge/source.json" in names
    assert names == sorted(names)


def test_every_host_of_a_run_gets_the_same_commit(
    desk: Desk, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that moves meanwhile moves the next run."""
    source = f"git+{repository.as_uri()}@main#subdirectory=backend"
    first = origin(made(desk, source, python_path="src"))["commit"]
    (repository / "backend/new.txt").write_text("y")
    git(repository, "commit", "--quiet", "--all", "--message=3")
    assert origin(made(desk, source, python_path="src"))["commit"] == first
    monkeypatch.setattr(origins, "this_run", lambda: "another")
    assert origin(made(desk, source, python_path="src"))["commit"] == git(repository, "rev-parse", "main")


@pytest.mark.parametrize(
    ("source", "expected", "found", "do"),
    [
        ("git+file://{repository}@v2", "a branch, a tag or a whole commit v2", "no such ref", "push it, or name one"),
        ("git+file://{repository}@{absent}", "the commit 0123456789", "", "push it, or name another ref"),
        ("git+file://{repository}/none@v1", "a repository at file://", "", "give git access to it: `git ls-remote"),
        ("git+file://{repository}@v1#subdirectory=api", "a folder api in", "none", "correct #subdirectory="),
        ("git+file://{repository}@v1#subdirectory=../x", "inside the repository", "../x", "correct it"),
        ("git+file://{repository}@v1#egg=shop", "git+https://HOST", "more than that", "leave it out"),
        ("git+file://{repository}", "git+https://HOST/REPOSITORY@REF", "no ref", "write @ and a tag"),
        ("git+http://git.example.com/shop@v1", "git+ and one of https, ssh, file", "git+http", "use git+https"),
        (
            "git+https://t0ken@git.example.com/shop@v1",
            "without credentials",
            "a user or a token",
            "a credential helper",
        ),
        ("https://example.com/shop-1.0.whl", "a folder; git+https://", "an address: https://", "write git+"),
        ("shop==1.*", "a package with one version", "shop==1.*", "pin it"),
        ("shop>=1", "a package with one version", "shop>=1", "pin it"),
        ("shop==9.9", "shop==9.9 in the package index", "no version of shop==9.9", "name a version that is there"),
        ("shop==2.0", "Python >=3.14, as its metadata says", "Python 3.13.5 on the host", "choose a version"),
        ("absent==1", "absent==1 in the package index", "not found in the package", "name a version that is there"),
        ("none.whl", "a file on the control machine", "no file at", "correct `source`"),
        ("apps/none", "the folder of the app on the control machine", "no folder at", "correct `source`"),
    ],
)
def test_sources_that_cannot_be_had(
    desk: Desk, repository: Path, source: str, expected: str, found: str, do: str
) -> None:
    """Each with what to do; a token is not repeated."""
    said = refused(made(desk, source.format(repository=repository, absent="0123456789" * 4)))
    assert said.startswith("apps.shop.source: ")
    for part, wanted in zip(said.removeprefix("apps.shop.source: ").split(" | "), (expected, found, do), strict=True):
        assert wanted in part
    assert "t0ken" not in said


def test_a_package_of_the_index(desk: Desk) -> None:
    """Its lock has the package itself, all that it needs, and what serves it."""
    bundle = made(desk, "shop==1.0")
    assert locked(bundle).keys() == {"shop", "fastapi", "gunicorn", "packaging", "uvicorn", "uvicorn-worker"}
    assert origin(bundle) == {"kind": "package", "name": "shop", "pins": "resolved", "version": "1.0"}
    assert bundle.source
    assert (bundle.whole, bundle.additions, bundle.lock) == (True, None, ".forge/requirements.txt")
    assert "shop-extra" in locked(made(desk, "Shop[more] == 1.0"))


def test_a_wheel(tmp_path: Path, desk: Desk) -> None:
    """It goes along, and the lock has its hash, so that another wheel makes another environment."""
    file = wheel(tmp_path, "shop", "3.0", FILES, requires="fastapi<0.140\nshop-extra ; extra == 'more'")
    bundle = made(desk, file.name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert bundle.source
    assert (bundle.source / ".forge/packages" / file.name).read_bytes() == file.read_bytes()
    lock = (bundle.source / bundle.lock).read_text()
    assert lock.endswith(f"./.forge/packages/{file.name} \\\n    --hash=sha256:{digest}\n")
    assert "fastapi==0.115.0" in lock
    assert "shop-extra" not in lock
    assert origin(bundle)["sha256"] == digest


def test_an_sdist_goes_along_itself(tmp_path: Path, desk: Desk) -> None:
    """What it is built into, for a look into it, depends on the machine; and need not work there."""
    backend = wheel(tmp_path, "plain-backend", "1.0", {"plain_backend.py": BACKEND})
    desk = Desk(desk.cache, desk.locks, index(tmp_path / "simple", backend, *tmp_path.parent.rglob("simple/*/*.whl")))
    folder = tmp_path / "shop-4.0"
    (folder / "shop").mkdir(parents=True)
    (folder / "shop/main.py").write_text(APP)
    (folder / "shop/__init__.py").touch()
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 4.0\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["plain-backend"]\nbuild-backend = "plain_backend"\n'
        '[project]\nname = "shop"\nversion = "4.0"\n'
    )
    with tarfile.open(tmp_path / "shop-4.0.tar.gz", "w:gz") as archive:
        archive.add(folder, "shop-4.0")
    bundle = made(desk, "shop-4.0.tar.gz")
    assert origin(bundle)["kind"] == "sdist"
    assert bundle.problems == []
    assert bundle.source
    assert [path.name for path in (bundle.source / ".forge/packages").iterdir()] == ["shop-4.0.tar.gz"]
    assert "use `shop.main:app`" in refused(made(desk, "shop-4.0.tar.gz", module="shop.main:other"))
    before = {path.name: path.read_bytes() for path in bundle.source.rglob("*") if path.is_file()}
    shutil.rmtree(desk.cache)
    index(tmp_path / "simple", wheel(tmp_path, "plain-backend", "1.1", {"plain_backend.py": BACKEND + "# newer\n"}))
    again = made(desk, "shop-4.0.tar.gz", module="shop.main:app")
    assert again.source
    assert {path.name: path.read_bytes() for path in again.source.rglob("*") if path.is_file()} == before
    (folder / "broken.cfg").touch()
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 4.0\n")
    with tarfile.open(tmp_path / "shop-4.0.tar.gz", "w:gz") as archive:
        archive.add(folder, "shop-4.0")
    assert "an sdist that builds on the control machine" in refused(made(desk, "shop-4.0.tar.gz"))
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.2\nName: Shop\nVersion: 4.0\nRequires-Dist: fastapi\n")
    with tarfile.open(tmp_path / "shop-4.0.tar.gz", "w:gz") as archive:
        archive.add(folder, "shop-4.0")
    unbuilt = made(desk, "shop-4.0.tar.gz")
    assert "fastapi" in locked(unbuilt)
    assert origin(unbuilt) | {"sha256": ""} == origin(bundle) | {"sha256": ""}


def test_builds_see_nothing_of_the_operators_environment(
    tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what opens something, nor what would make another lock of the same files."""
    monkeypatch.setenv("VAULT_TOKEN", "open")
    monkeypatch.setenv("UV_INDEX", "file:///nowhere")
    monkeypatch.setenv("https_proxy", "http://proxy.example.com")
    (tmp_path / "backend.py").write_text(SEEN)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    desk.cache.mkdir()
    with pytest.raises(Failed):
        desk.uv("build", "--wheel", tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {"PATH", "HOME", "https_proxy", "UV_CACHE_DIR", "SOURCE_DATE_EPOCH"} <= set(seen)
    assert not {"VAULT_TOKEN", "UV_INDEX"} & set(seen)


SEEN = """
import json, os, pathlib

def build_wheel(directory, settings=None, metadata=None):
    pathlib.Path("seen.json").write_text(json.dumps(dict(os.environ)))
    raise SystemExit(1)
"""

BACKEND = """
import pathlib, zipfile

def build_wheel(directory, settings=None, metadata=None):
    tag = "py3-none-any"
    if pathlib.Path("broken.cfg").exists():
        raise SystemExit("no compiler")
    name = f"shop-4.0-{tag}.whl"
    info = "shop-4.0.dist-info"
    with zipfile.ZipFile(pathlib.Path(directory, name), "w") as archive:
        for path in pathlib.Path("shop").glob("*.py"):
            archive.writestr(zipfile.ZipInfo(str(path)), path.read_text())
        archive.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\\nName: shop\\nVersion: 4.0\\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/WHEEL"), f"Wheel-Version: 1.0\\nTag: {tag}\\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return name
"""


@pytest.mark.parametrize(
    ("tag", "python", "fits"),
    [
        ("cp313-cp313-manylinux_2_28_x86_64", "3.13.5", True),
        ("cp313-cp313-manylinux_2_28_x86_64", "3.11.2", False),
        ("cp311-abi3-manylinux_2_17_x86_64", "3.13.5", True),
        ("cp313-cp313-manylinux_2_28_aarch64", "3.13.5", False),
        ("cp313-cp313-macosx_11_0_x86_64", "3.13.5", False),
        ("cp313-cp313-musllinux_1_2_x86_64", "3.13.5", False),
        ("py2.py3-none-any", "3.11.2", True),
    ],
)
def test_wheels_have_to_fit_the_host(tmp_path: Path, desk: Desk, tag: str, python: str, fits: bool) -> None:
    """Its Python and its machine."""
    file = wheel(tmp_path, "shop", "5.0", FILES, tag=tag)
    bundle = made(desk, file.name, python)
    assert (bundle.problems == []) == fits
    if not fits:
        assert f"a wheel for Python {python} on Linux x86_64, or for any | {file.name} | build it" in refused(bundle)


def test_wheels_that_are_none(tmp_path: Path, desk: Desk) -> None:
    """A name that no tool gives, a file that is no archive, a Python that the host does not have."""
    (tmp_path / "shop.whl").write_text("x")
    assert "a wheel under its own name" in refused(made(desk, "shop.whl"))
    (tmp_path / "shop-6.0-py3-none-any.whl").write_text("x")
    assert "a wheel in" in refused(made(desk, "shop-6.0-py3-none-any.whl"))
    newer = wheel(tmp_path, "shop", "7.0", FILES, python=">=3.14")
    said = refused(made(desk, newer.name))
    assert "Python >=3.14, as its metadata says | Python 3.13.5 on the host" in said


def test_metadata_of_long_ago(tmp_path: Path, desk: Desk) -> None:
    """Bytes that are no UTF-8, a Requires-Python that no standard knows: pip and uv take them."""
    file = wheel(tmp_path, "shop", "8.0", FILES, python=">=3.6.*")
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["shop-8.0.dist-info/METADATA"] += b"Author: Jos\xe9\n"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert "fastapi" not in locked(made(desk, file))


def test_a_repository_with_nothing_to_release(desk: Desk, repository: Path) -> None:
    """What is no file of a release is left out of one, and then nothing remains."""
    (repository / "empty").mkdir()
    (repository / "empty/.env").write_text("x")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message=3")
    assert "files to release in" in refused(made(desk, f"git+{repository.as_uri()}@main#subdirectory=empty"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"module": "shop.web:app"}, "apps.shop.module: a module shop.web"),
        ({"module": "shop.main:application"}, "use `shop.main:app`"),
        ({"module": "shpo.main:app"}, "ASGI apps there: shop.main:app"),
        ({"module": "app"}, "apps.shop.module: `package.module:name`"),
        ({"lock": "uv.lock"}, "apps.shop.lock: no lock for a package"),
        ({"python_path": "src"}, "apps.shop.python_path: no python_path for a package"),
        ({"static": {"/assets/": "dist"}}, "apps.shop.static: no static for a package"),
    ],
)
def test_options_are_held_against_a_package(desk: Desk, change: dict[str, Any], expected: str) -> None:
    """The module is looked for in what it installs; folders and locks of a source it has none."""
    assert expected in refused(made(desk, "shop==1.0", **change))


def test_a_look_that_failed_is_repeated(tmp_path: Path, desk: Desk) -> None:
    """An index that did not answer once must not pass for a package that has nothing in it."""
    gone = Desk(desk.cache, desk.locks, (tmp_path / "nowhere").as_uri())
    assert "shop==1.0 in the package index" in refused(made(gone, "shop==1.0", module="shop.main:other"))
    assert "`other` in shop/main.py" in refused(made(desk, "shop==1.0", module="shop.main:other"))


def test_a_module_of_a_dependency_is_believed(desk: Desk) -> None:
    """What a package does not have itself, one that it needs may have."""
    assert made(desk, "shop==1.0", module="framework.asgi:app").problems == []


def test_a_folder_of_the_platforms_own_is_refused(tmp_path: Path, desk: Desk) -> None:
    """It would be mixed with what is made for a release."""
    source = write(tmp_path / "shop", **{".forge/source.json": "{}"})
    assert "no folder .forge in the source" in refused(made(desk, source, python_path="src"))


def test_a_cache_that_cannot_be_written_is_said(desk: Desk) -> None:
    """With the file that it is about."""
    desk.cache.write_text("no folder")
    said = refused(made(desk, "shop==1.0"))
    assert re.search(r"to read the source and write \S+/cache \| \S+/cache: File exists \| make room, or mend", said)


def test_a_run_that_is_killed_leaves_nothing_to_be_released(
    tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a lock would install half an app; and what it was working on goes with the next one."""
    write_text = Path.write_text

    def torn(path: Path, text: str, **_: Any) -> int:
        write_text(path, text[: len(text) // 4])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    source = write(tmp_path / "shop", lock="fastapi\n")
    with monkeypatch.context() as patched:

        def compiled(*_: object) -> str:
            patched.setattr(Path, "write_text", torn)
            return LOCK

        patched.setattr(locks, "_compile", compiled)
        assert "No space left" in refused(made(desk, source, python_path="src"))
    for left in (desk.cache / ".resolving-x", desk.cache / "git/.making-x"):
        left.mkdir(parents=True)
    assert "fastapi" in locked(made(desk, source, python_path="src"))
    assert not [*desk.cache.rglob(".*-x")]


def test_a_cache_that_is_swept_keeps_the_newest(tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old bundles go, and what goes is made again."""
    monkeypatch.setattr("ansible.module_utils.forge.programs.KEPT", 1)
    one, two = (wheel(tmp_path / version, "shop", version, FILES) for version in ("1.1", "1.2"))
    bundle = made(desk, one)
    assert bundle.source
    os.utime(bundle.source, (1, 1))
    made(desk, two)
    assert not bundle.source.exists()
    assert made(desk, one) == bundle


@pytest.mark.parametrize(
    ("wanted", "lowest"),
    [
        ("", "3.11"),
        (">=3.9", "3.11"),
        (">=3.12,<4", "3.12"),
        ("~=3.13.1", "3.13.1"),
        ("==3.13.*", "3.13"),
        ("x", "3.11"),
    ],
)
def test_a_lock_begins_at_the_oldest_python_that_it_may_meet(wanted: str, lowest: str) -> None:
    """So that one lock fits every host."""
    assert locks._lowest(wanted) == lowest


def test_a_refusal_says_all_of_it_by_itself() -> None:
    """Also where nobody makes a problem of it."""
    assert str(Refusal("source", "this", "that", "mend it")) == "expected this; found that; mend it"
