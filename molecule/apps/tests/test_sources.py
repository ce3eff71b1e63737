"""Sources of every kind on one host: what serves is what the entry says, tomorrow and after a rollback as well."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forge_apps import LOCKS, SOURCES, browser, deployed, entries, record, run_inside
from forge_scenario import PROJECT, playbook
from forge_sources import git, relock
from testinfra.host import Host

CACHE = PROJECT / ".cache" / "sources"


def normal(name: str) -> str:
    """A package's name as locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_each_answers(host: Host) -> None:
    """Unchanged, with what its source holds."""
    for app, path, due in (
        ("inbox", "/ready", {"status": "ready"}),
        ("rogue", "/", {"version": "1.0", "from_c": 42}),
    ):
        with browser(host, app) as client:
            assert client.get(path).raise_for_status().json() == due


def test_records_say_where_it_comes_from(host: Host) -> None:
    """A branch is pinned to its commit, a package to its version, a file to its hash."""
    found = {app: record(host, app)["source"] for app in ("inbox", "plain", "httpbin", "rogue", "hexgame")}
    head = git(SOURCES / "repository", "rev-parse", "HEAD")
    assert (found["inbox"]["ref"], found["inbox"]["commit"], found["inbox"]["pins"]) == ("main", head, "hashed")
    assert (found["plain"]["lock"], found["plain"]["pins"]) == ("uv.lock", "resolved")
    wheel = found["httpbin"]
    assert (wheel["kind"], wheel["version"], len(wheel["sha256"])) == ("wheel", "1.13.0", 64)
    assert (found["rogue"]["kind"], found["rogue"]["file"]) == ("sdist", "rogue-1.0.tar.gz")
    assert (found["hexgame"]["name"], found["hexgame"]["version"]) == ("hexgame-server", "0.4.1")
    assert f"commit={head}" in host.check_output("forgectl status inbox")


def test_what_is_installed_is_what_was_locked(host: Host) -> None:
    """By hash, what came along as well; and the lock is kept beside the inventory, where it can be committed."""
    # The inbox has a lock of its own.
    resolved = entries(host).keys() - {"inbox"}
    assert {path.stem for path in LOCKS.iterdir()} == resolved
    for app in sorted(resolved):
        release = record(host, app)["id"]
        lock = host.file(f"/srv/{app}/releases/{release}/source/.forge/requirements.txt").content_string
        assert lock.startswith((LOCKS / f"{app}.txt").read_text())
        pinned = dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)(?: \\)?$", lock, re.MULTILINE))
        there = json.loads(
            run_inside(
                host,
                app,
                "-c",
                "import json; from importlib.metadata import distributions as installed; "
                "print(json.dumps({each.name: each.version for each in installed()}))",
            )
        )
        found = {normal(name): version for name, version in there.items()}
        own = {"httpbin": {"httpbinx": "1.13.0"}, "rogue": {"rogue": "1.0"}}.get(app, {})
        assert {**{normal(name): version for name, version in pinned.items()}, **own}.items() <= found.items()
        assert {"gunicorn", "uvicorn", "uvicorn-worker"} <= set(found)


def test_locks_that_are_committed_are_used(host: Host) -> None:
    """As they are; of `plain` none is, since what it is resolved from is not the same every day."""
    committed = PROJECT / "molecule" / "apps" / "locks"
    assert {path.stem for path in committed.iterdir()} == entries(host).keys() - {"inbox", "plain"}
    stale = [path.name for path in committed.iterdir() if (LOCKS / path.name).read_text() != path.read_text()]
    assert stale == [], f"copy them from {LOCKS} to {committed}"


def test_native_code_was_built_on_the_host(host: Host) -> None:
    """For its own Python, by the user that builds and in a sandbox, with the Debian packages that the entry names."""
    assert all(host.package(name).is_installed for name in ("gcc", "libc6-dev", "python3-dev"))
    release = f"/srv/rogue/releases/{record(host, 'rogue')['id']}"
    built = host.check_output(f"find -L {release}/venv/lib -name '_rogue*.so'")
    tag = host.check_output("python3 -c 'import sysconfig; print(sysconfig.get_config_var(\"SOABI\"))'")
    assert built.endswith(f"_rogue.{tag}.so")
    # Neither source nor wheel is left behind where the app runs from.
    assert host.run(f"ls -A {release}/venv/.forge").rc != 0


def test_the_same_again_changes_nothing(host: Host) -> None:
    """Also on the machine of a colleague, who has the inventory and its locks but no cache."""
    before = {path.name: path.read_text() for path in LOCKS.iterdir()}
    live = host.check_output("find /srv/*/slots -printf '%p %l\\n'")
    away = CACHE.with_name("sources-away")
    CACHE.rename(away)
    try:
        said = deployed(only="inbox,hexgame,httpbin,plain,rogue")
    finally:
        shutil.rmtree(CACHE, ignore_errors=True)
        away.rename(CACHE)
    assert re.search(r"changed=0 +unreachable=0 +failed=0", said), said
    assert {path.name: path.read_text() for path in LOCKS.iterdir()} == before
    assert host.check_output("find /srv/*/slots -printf '%p %l\\n'") == live


@contextlib.contextmanager
def unchanged(host: Host) -> Iterator[None]:
    """Compare files of releases and of configuration, before and after."""
    fingerprint = "find /etc/forge /srv /var/cache/forge/uploads -printf '%p %m %s %T@\\n' | sort"
    before = host.check_output(fingerprint)
    yield
    assert host.check_output(fingerprint) == before


def test_what_is_not_to_be_had_is_refused_together(host: Host, tmp_path: Path) -> None:
    """Each with its entry and what to do, before anything on the host moves."""
    repository = (SOURCES / "repository").as_uri()
    newer = tmp_path / "newer"
    shutil.copytree(SOURCES / "plain", newer)
    manifest = newer / "pyproject.toml"
    manifest.write_text(manifest.read_text().replace(">=3.11", ">=3.99").replace("<1", "<0.100"))
    apps = entries(host)
    sources = {
        "inbox": f"git+{repository}@v9#subdirectory=backend",
        "plain": str(newer),
        "titiler": f"git+{tmp_path.as_uri()}/nowhere@main",
        "hexgame": "fastapi==0.0.99999",
    }
    for app, source in sources.items():
        apps[app]["source"] = source
    apps["httpbin"]["module"] = "httpbiny:app"
    # Another app that wants what one has that is in no entry any more.
    apps["shop"] = apps.pop("rogue") | {"aliases": []}
    apps["shop"]["database"]["name"] = "rogue"
    with unchanged(host):
        run = playbook("--extra-vars", json.dumps({"apps": apps}), name="playbooks/deploy.yml")
    assert run.returncode == 2, run.stdout
    said = " ".join(run.stdout.split())
    assert re.search(r"ok=1 +changed=0 |ok=0 +changed=0 ", said), said
    assert "8 problems. Nothing was changed." in said, run.stdout
    for problem in (
        r"apps\.inbox\.source expected: a branch, a tag or a whole commit v9 in \S+ found: no such ref do: push it",
        r"apps\.plain\.source expected: Python >=3\.99, as requires-python in pyproject\.toml says found: Python 3",
        r"apps\.plain\.lock expected: uv\.lock to satisfy .* found: fastapi is \S+, declared",
        r"apps\.titiler\.source expected: a repository at \S+ that this machine may read found: .* do: correct",
        r"apps\.httpbin\.module expected: a module httpbiny below \S+ found: ",
        r"apps\.hexgame\.source expected: fastapi==0\.0\.99999 in the package index",
        r"apps\.shop\.domain expected: .*playbooks/remove\.yml -e only=rogue",
        r"apps\.shop\.database\.name expected: .*playbooks/remove\.yml -e only=rogue",
    ):
        assert re.search(problem, said), (problem, said)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["poetry", "pdm"])
def test_locks_of_other_tools(host: Host, tmp_path: Path, kind: str) -> None:
    """They are exported by their own tools, in the versions that the platform names."""
    folder = tmp_path / kind
    shutil.copytree(SOURCES / "plain", folder)
    relock(folder, kind)
    apps = entries(host)
    apps["plain"]["source"] = str(folder)
    deployed(only="plain", apps=apps)
    try:
        found = record(host, "plain")["source"]
        assert (found["lock"], found["pins"]) == (f"{kind}.lock", "resolved")
        with browser(host, "plain") as client:
            assert client.get("/").json()["greeting"] == "hello"
    finally:
        deployed(only="plain")


@pytest.mark.exhaustive
def test_a_package_with_an_extra_and_a_callable_that_is_made(host: Host) -> None:
    """A requirement as pip writes it, and an expression as Gunicorn takes it."""
    apps = entries(host)
    apps["httpbin"] |= {"source": "fastapi[all]==0.140.0", "module": "fastapi:FastAPI(title='from the index')"}
    kept = (LOCKS / "httpbin.txt").read_text()
    deployed(only="httpbin", apps=apps)
    try:
        found = record(host, "httpbin")["source"]
        assert (found["name"], found["version"]) == ("fastapi", "0.140.0")
        with browser(host, "httpbin") as client:
            assert client.get("/openapi.json").json()["info"]["title"] == "from the index"
    finally:
        (LOCKS / "httpbin.txt").write_text(kept)
        deployed(only="httpbin")
