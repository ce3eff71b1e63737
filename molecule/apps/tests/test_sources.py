"""Sources of every kind on one host: what serves is what the entry says, tomorrow and after a rollback as well."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from forge_load import running
from forge_scenario import PROJECT, ToHost, playbook
from forge_sources import commit, git, relock, wheel
from testinfra.host import Host

EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
SOURCES, CA = EPHEMERAL / "sources", EPHEMERAL / "tls" / "ca.pem"
LOCKS = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent / "locks"
CACHE = PROJECT / ".cache" / "sources"


def get(host: Host, app: str, path: str = "/") -> Any:
    """What an app answers to a client, through Nginx and TLS."""
    variables = host.ansible.get_variables()
    transport = ToHost(variables["ansible_host"], verify=ssl.create_default_context(cafile=CA))
    with httpx.Client(base_url=f"https://{app}.example.com", transport=transport, timeout=30) as client:
        return client.get(path).raise_for_status().json()


def record(host: Host, app: str) -> dict[str, Any]:
    """The record of the live release."""
    status = json.loads(host.check_output("forgectl status %s --json", app))
    document: dict[str, Any] = json.loads(
        host.file(f"/srv/{app}/releases/{status['live']['release']}/release.json").content_string
    )
    # An operator sees where it comes from as well.
    assert status["source"] == document["source"]
    return document


def deployed(*arguments: str, only: str) -> str:
    """Deploy one app as a person would; what was said, on one line."""
    run = playbook("--extra-vars", f"only={only}", *arguments, name="playbooks/deploy.yml")
    assert run.returncode == 0, run.stdout
    return " ".join(run.stdout.split())


def changed(host: Host, app: str, source: Path | str) -> tuple[str, ...]:
    """Arguments that give an app another source."""
    apps = host.ansible.get_variables()["apps"]
    raw = json.loads(json.dumps(apps))
    raw[app]["source"] = str(source)
    return ("--extra-vars", json.dumps({"apps": raw}))


def test_each_answers(host: Host) -> None:
    """Unchanged, with what its source holds; Gunicorn came from the platform."""
    assert get(host, "inbox", "/ready") == {"status": "ready"}
    assert get(host, "folder") == {"version": "not installed"}
    assert get(host, "wheel") == {"version": "1.0"}
    assert get(host, "native") == {"version": "1.0", "from_c": 42}
    assert get(host, "package", "/openapi.json")["info"]["title"] == "from the index"


def test_records_say_where_it_comes_from(host: Host) -> None:
    """A branch is pinned to its commit, a package to its version, a file to its hash."""
    found = {app: record(host, app)["source"] for app in ("inbox", "folder", "wheel", "native", "package")}
    head = git(SOURCES / "repository", "rev-parse", "HEAD")
    assert (found["inbox"]["ref"], found["inbox"]["commit"], found["inbox"]["pins"]) == ("main", head, "hashed")
    assert (found["folder"]["lock"], found["folder"]["pins"]) == ("uv.lock", "resolved")
    assert (found["wheel"]["kind"], found["wheel"]["version"], len(found["wheel"]["sha256"])) == ("wheel", "1.0", 64)
    assert (found["native"]["kind"], found["native"]["file"]) == ("sdist", "native-1.0.tar.gz")
    assert (found["package"]["name"], found["package"]["version"]) == ("fastapi", "0.140.0")
    assert f"commit={head}" in host.check_output("forgectl status inbox")


def test_what_is_installed_is_what_was_locked(host: Host) -> None:
    """By hash, what came along as well; and the lock is kept beside the inventory, where it can be committed."""
    assert {path.name for path in LOCKS.iterdir()} == {"folder.txt", "wheel.txt", "native.txt", "package.txt"}
    for app in ("folder", "wheel", "native", "package"):
        release = record(host, app)["id"]
        lock = host.file(f"/srv/{app}/releases/{release}/source/.forge/requirements.txt").content_string
        assert lock.startswith((LOCKS / f"{app}.txt").read_text())
        pinned = dict(re.findall(r"^([\w-]+)(?:\[[\w,-]+\])?==([^\s;]+)(?: \\)?$", lock, re.MULTILINE))
        there = json.loads(
            host.check_output(
                "/srv/%s/releases/%s/venv/bin/python -c %s",
                app,
                release,
                "import json; from importlib.metadata import distributions as installed; "
                "print(json.dumps({each.name: each.version for each in installed()}))",
            )
        )
        found = {name.lower().replace("_", "-"): version for name, version in there.items()}
        own = {"wheel": {"shop": "1.0"}, "native": {"native": "1.0"}}.get(app, {})
        assert {**pinned, **own}.items() <= found.items()
        assert {"gunicorn", "uvicorn", "uvicorn-worker"} <= set(found)


def test_native_code_was_built_on_the_host(host: Host) -> None:
    """For its own Python, by the user that builds and in a sandbox, with the Debian packages that the entry names."""
    assert all(host.package(name).is_installed for name in ("gcc", "libc6-dev", "python3-dev"))
    release = f"/srv/native/releases/{record(host, 'native')['id']}"
    built = host.check_output(f"find -L {release}/venv/lib -name '_native*.so'")
    tag = host.check_output("python3 -c 'import sysconfig; print(sysconfig.get_config_var(\"SOABI\"))'")
    assert built.endswith(f"_native.{tag}.so")
    # Neither source nor wheel is left behind where the app runs from.
    assert host.run(f"ls -A {release}/venv/.forge").rc != 0


def test_the_same_again_changes_nothing(host: Host) -> None:
    """Also on the machine of a colleague, who has the inventory and its locks but no cache."""
    before = {path.name: path.read_text() for path in LOCKS.iterdir()}
    live = host.check_output("find /srv/*/slots -printf '%p %l\\n'")
    away = CACHE.with_name("sources-away")
    CACHE.rename(away)
    try:
        said = deployed(only="inbox,folder,wheel,native,package")
    finally:
        shutil.rmtree(CACHE, ignore_errors=True)
        away.rename(CACHE)
    assert re.search(r"changed=0 +unreachable=0 +failed=0", said), said
    assert {path.name: path.read_text() for path in LOCKS.iterdir()} == before
    assert host.check_output("find /srv/*/slots -printf '%p %l\\n'") == live


def test_a_branch_that_moved_is_a_release_under_load(host: Host) -> None:
    """The plan names both commits; nobody loses a request, on the way there or back."""
    repository = SOURCES / "repository"
    old = record(host, "inbox")["source"]["commit"]
    (repository / "backend" / "NOTE").write_text(f"after {old}\n")
    new = commit(repository, "second")
    plan = deployed("--check", "--diff", only="inbox")
    assert f"source commit: {old} -> {new}" in plan
    assert re.search(r"(added|changed): NOTE", plan)
    assert record(host, "inbox")["source"]["commit"] == old
    address = host.ansible.get_variables()["ansible_host"]
    with running(address, "inbox.example.com", CA, rate=40.0) as load:
        deployed(only="inbox")
        assert record(host, "inbox")["source"]["commit"] == new
        run = playbook("--extra-vars", "only=inbox", name="playbooks/rollback.yml")
        assert run.returncode == 0, run.stdout
    assert load.result.failed == [], load.result.counts()
    assert record(host, "inbox")["source"]["commit"] == old


def test_another_wheel_is_another_environment(host: Host) -> None:
    """So each release keeps its own, and a rollback brings back what it had."""
    first = record(host, "wheel")
    # Its dependencies are the same, and so is the lock that is kept.
    kept = (LOCKS / "wheel.txt").read_text()
    deployed(*changed(host, "wheel", wheel(SOURCES, "2.0")), only="wheel")
    second = record(host, "wheel")
    assert get(host, "wheel") == {"version": "2.0"}
    assert second["venv"] != first["venv"]
    assert (LOCKS / "wheel.txt").read_text() == kept
    host.check_output("forgectl rollback wheel")
    assert get(host, "wheel") == {"version": "1.0"}
    assert record(host, "wheel")["venv"] == first["venv"]


@contextlib.contextmanager
def unchanged(host: Host) -> Iterator[None]:
    """Compare files of releases and of configuration, before and after."""
    fingerprint = "find /etc/forge /srv /var/cache/forge/uploads -printf '%p %m %s %T@\\n' | sort"
    before = host.check_output(fingerprint)
    yield
    assert host.check_output(fingerprint) == before


def test_sources_that_are_not_to_be_had_are_refused_together(host: Host, tmp_path: Path) -> None:
    """Each with its entry and what to do, before anything on the host moves."""
    repository = (SOURCES / "repository").as_uri()
    newer = tmp_path / "newer"
    shutil.copytree(SOURCES / "folder", newer)
    manifest = newer / "pyproject.toml"
    manifest.write_text(manifest.read_text().replace(">=3.11", ">=3.99").replace("<2", "<1"))
    apps = json.loads(json.dumps(host.ansible.get_variables()["apps"]))
    sources = {
        "inbox": f"git+{repository}@v9#subdirectory=backend",
        "folder": str(newer),
        "wheel": f"git+{tmp_path.as_uri()}/nowhere@main",
        "native": str(SOURCES / "shop-1.0-py3-none-any.whl"),
        "package": "fastapi==0.0.99999",
    }
    for app, source in sources.items():
        apps[app]["source"] = source
    apps["native"]["module"] = "shopp:app"
    with unchanged(host):
        run = playbook("--extra-vars", json.dumps({"apps": apps}), name="playbooks/deploy.yml")
    assert run.returncode == 2, run.stdout
    said = " ".join(run.stdout.split())
    assert re.search(r"ok=1 +changed=0 |ok=0 +changed=0 ", said), said
    assert "6 problems. Nothing was changed." in said, run.stdout
    for problem in (
        r"apps\.inbox\.source expected: a branch, a tag or a whole commit v9 in \S+ found: no such ref do: push it",
        r"apps\.folder\.source expected: Python >=3\.99, as requires-python in pyproject\.toml says found: Python 3",
        r"apps\.folder\.lock expected: uv\.lock to satisfy .* found: starlette is \S+, declared",
        r"apps\.wheel\.source expected: a repository at \S+ that this machine may read found: .* do: correct the addr",
        r"apps\.native\.module expected: a module shopp below \S+ found: .* do: use `shop:app`",
        r"apps\.package\.source expected: fastapi==0\.0\.99999 in the package index",
    ):
        assert re.search(problem, said), (problem, said)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["poetry", "pdm"])
def test_locks_of_other_tools(host: Host, tmp_path: Path, kind: str) -> None:
    """They are exported by their own tools, in the versions that the platform names."""
    folder = tmp_path / kind
    shutil.copytree(SOURCES / "folder", folder)
    relock(folder, kind)
    deployed(*changed(host, "folder", folder), only="folder")
    try:
        found = record(host, "folder")["source"]
        assert (found["lock"], found["pins"]) == (f"{kind}.lock", "resolved")
        assert get(host, "folder") == {"version": "not installed"}
    finally:
        deployed(only="folder")
