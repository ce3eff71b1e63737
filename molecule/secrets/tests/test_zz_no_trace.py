"""After all that the scenario did to the host, no secret is anywhere but in the environment of the app's processes.

The secrets are all that ever passed through Vault: its own log of every request and answer says which. Every search
also has to find a canary, which was left there on purpose. Last, because it looks for what the others left.
"""

from __future__ import annotations

import base64
import gzip
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import httpx
import hvac
import pytest
from forge_events import append, copy_app, run_playbook
from forge_scenario import CONTAINER, PODMAN, https_client, main_pid, podman, secrets_at
from forge_search import SHORTEST, Found, Search
from forge_traces import in_journal, in_memory, in_processes, in_units, output
from forge_vault import PATH, ROLE, changed, destroy_secret_ids, passed
from testinfra.host import Host

CANARY = "canary"
# Endpoints that end a request, and a whole worker, with secrets at hand.
CRASH = """

@app.get("/v1/crash")
async def crash() -> None:
    import os

    values = dict(os.environ)
    raise RuntimeError(f"crash on purpose with {len(values)} variables")


@app.get("/v1/abort")
async def abort() -> None:
    import os

    os.abort()
"""
BROKEN = '\nimport os\nvalues = dict(os.environ)\nraise RuntimeError("broken on purpose")\n'
METRICS = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect("/run/inbox/live.sock")
connection.sendall(b"GET /metrics HTTP/1.1\\r\\nHost: inbox.example.com\\r\\nConnection: close\\r\\n\\r\\n")
while data := connection.recv(65536):
    sys.stdout.buffer.write(data)
"""
# Dies with what it was told in its memory, in a folder and under a limit that let it leave a core.
DUMP = (
    "cd /var/tmp/crash && ulimit -c unlimited && exec python3 -c 'import os, sys; kept = sys.stdin.read(); os.abort()'"
)


def inside(*command: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run a command on the host with secrets on its standard input: arguments of a tool of Ansible's are logged."""
    return podman("exec", "--interactive", CONTAINER, *command, **options)


def leaked(found: set[Found]) -> set[Found]:
    """What was found but for the canary."""
    return {each for each in found if each.secret != CANARY}


def canaries(found: set[Found]) -> set[str]:
    """Where the canary was found."""
    return {each.place for each in found if each.secret == CANARY}


@pytest.fixture(scope="module")
def canary() -> str:
    """A secret that is left wherever a search looks."""
    return token_urlsafe(32)


@pytest.fixture(scope="module")
def crashing(host: Host, vault: hvac.Client, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An app that crashes when it is asked to, after a deploy and a rotation that failed."""

    def run(name: str, source: Path | None = None, *, works: bool = True) -> None:
        done = run_playbook(host, name, source)
        assert (done.returncode == 0) == works, done.stdout + done.stderr

    crashing = copy_app(tmp_path_factory.mktemp("crashing") / "app")
    append(crashing / "src/inbox/main.py", CRASH)
    broken = copy_app(tmp_path_factory.mktemp("broken") / "app")
    append(broken / "src/inbox/main.py", BROKEN)
    run("playbooks/deploy.yml", broken, works=False)
    run("playbooks/deploy.yml", crashing)
    with changed(vault, lambda values: values.update(signing_key=token_urlsafe(16))):
        run("playbooks/rotate_secrets.yml", works=False)


@pytest.fixture(scope="module")
def answers(host: Host, crashing: None, canary: str) -> dict[str, bytes]:  # noqa: ARG001
    """What clients are told when things go wrong, head and body, by the request."""
    told: dict[str, bytes] = {}
    statuses: list[int] = []

    def ask(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
        found = client.request(method, path, **options)
        statuses.append(found.status_code)
        told[f"{method} {path}: {found.status_code}"] = repr(found.headers).encode() + found.content
        return found

    with https_client(host) as client:
        posted = {"type": CANARY, "payload": {"said": canary}}
        event = ask(client, "POST", "/v1/events", json=posted, headers={"Idempotency-Key": canary}).json()
        ask(client, "GET", f"/v1/events/{event['id']}")
        ask(client, "GET", f"/{canary}")
        ask(client, "GET", "/metrics")
        ask(client, "GET", "/v1/events?cursor=forged")
        ask(client, "POST", "/v1/events", content=b"x" * (2 << 20))
        ask(client, "GET", "/v1/crash")
        ask(client, "GET", "/v1/abort")
    assert statuses == [201, 200, 404, 403, 400, 413, 500, 502]
    told["metrics"] = inside("python3", "-", input=METRICS.encode()).stdout
    assert b"# HELP" in told["metrics"]
    return told


@pytest.fixture(scope="module")
def search(answers: dict[str, bytes], elsewhere: dict[str, str], canary: str) -> Search:
    """For everything that passed through Vault until now, and the canary."""
    assert answers
    return Search(passed() | elsewhere | {CANARY: canary})


@pytest.fixture(scope="module", autouse=True)
def _planted(host: Host, canary: str) -> Iterator[None]:
    """Leave the canary in files, memory, the journal, a unit, a process and a core."""
    word = canary.encode()
    files = {
        "/var/tmp/canary": b"x" * 100_000 + word,
        "/opt/canary.b64": base64.b64encode(b"before " + word + b" after"),
        "/root/.bash_history": word.hex().encode(),
        "/var/log/canary.gz": gzip.compress(word),
        "/dev/shm/canary": word,
    }
    for path, content in files.items():
        inside("sh", "-c", f"cat > {path}", input=content)
    inside("logger", "--tag", CANARY, input=word)
    unit = ("--quiet", "--unit=forge-canary", f"--setenv=SAID={canary}", "sleep", "infinity")
    podman("exec", CONTAINER, "systemd-run", *unit)
    inside("mkdir", "/var/tmp/crash")
    subprocess.run(
        [PODMAN, "exec", "--interactive", CONTAINER, "sh", "-c", DUMP], input=word, capture_output=True, check=False
    )
    yield
    host.check_output("systemctl stop forge-canary")
    host.check_output("rm -r /var/tmp/crash " + " ".join(files))


def test_files(search: Search) -> None:
    """The whole file system: logs, cores, releases, histories, the database."""
    with output("export", CONTAINER) as stream:
        found = search.archive(stream)
    assert leaked(found) == set()
    places = canaries(found)
    assert {"var/tmp/canary", "opt/canary.b64", "root/.bash_history", "var/log/canary.gz"} <= places
    assert "var/log/nginx/inbox.json" in places
    # Where the machine hands cores to a program, that one is not on this host.
    if not Path("/proc/sys/kernel/core_pattern").read_text().startswith("|"):
        assert any(place.startswith("var/tmp/crash/") for place in places), places
    assert not any(re.search(r"/core(\.|$)", place) for place in places if "/crash/" not in place)


def test_no_core_is_left(host: Host, live: str) -> None:
    """Whatever a crash would like: the kernel is told not to, in every process that has a secret."""
    members = host.check_output("pgrep --parent %s", str(main_pid(host, live))).split()
    for pid in (main_pid(host, live), *members):
        limits = host.check_output("grep 'Max core file size' /proc/%s/limits", str(pid))
        assert limits.split()[4:6] == ["1", "1"], limits


def test_memory_file_systems(search: Search, live: str) -> None:
    """/run, /dev/shm, /tmp and the like: nothing but what systemd hands to the unit."""
    found = in_memory(search)
    assert canaries(found) == {"dev/shm/canary", "run/systemd/transient/forge-canary.service"}
    assert {each.place for each in leaked(found)} == {f"run/credentials/{live}/secret-id"}
    assert all(each.secret.startswith("secret_id") for each in leaked(found)), leaked(found)


def test_journal(search: Search) -> None:
    """All fields of all entries of all boots; a traceback is among them, and what pydantic says of a bad value."""
    found = in_journal(search)
    assert leaked(found) == set()
    assert canaries(found) == {"journal"}
    journal = inside("journalctl", "--output=cat").stdout.decode(errors="replace")
    assert "crash on purpose with" in journal
    assert re.search(r"invalid setting: FORGE_SIGNING_KEY", journal)


def test_units(search: Search) -> None:
    """Every property of every unit."""
    found = in_units(search)
    assert leaked(found) == set()
    assert canaries(found) == {"units"}


def test_processes(host: Host, search: Search, vault: hvac.Client, live: str) -> None:
    """Environment and arguments: of the app's processes the environment, with just what the app needs; no other."""
    found = in_processes(search)
    assert [each for each in leaked(found) if not re.fullmatch(rf"\d+/{live}/environ", each.place)] == []
    assert {place.split("/", 1)[1] for place in canaries(found)} == {"forge-canary.service/environ"}
    environ = f"{main_pid(host, live)}/{live}/environ"
    known = [value for value in secrets_at(vault, PATH).values() if len(value) >= SHORTEST]
    assert len({each.secret for each in leaked(found) if each.place == environ}) == len(known)


def test_what_others_see_of_processes(search: Search) -> None:
    """`ps`, as a user who is nobody; as root it does show environments."""
    for user, seen in (("nobody", False), ("root", True)):
        with output("exec", CONTAINER, "runuser", f"--user={user}", "--", "ps", "axeww") as stream:
            assert bool(canaries(found := search.stream(stream, "ps"))) == seen
            assert bool(leaked(found)) == seen


def test_answers(search: Search, answers: dict[str, bytes]) -> None:
    """Error pages of the app and of Nginx, an answer to a crash, the metrics."""
    found = {each for request, told in answers.items() for each in search.text(told, request)}
    assert leaked(found) == set()
    assert canaries(found)


def test_output_of_ansible(host: Host, vault: hvac.Client, search: Search) -> None:
    """All that the playbooks of this scenario printed, with -vvv --diff, from the first provisioning on.

    It is not `no_log` that makes it so: without that a run shows wrapping tokens, which the host has used up by then,
    and nothing else.
    """
    log = Path(os.environ["ANSIBLE_LOG_PATH"])
    text = log.read_text()
    for play in ("Turn each host into", "Release the apps", "Rotate the secrets"):
        assert text.count(f"PLAY [{play}") > 1, play
    assert re.search(r"failed=1\b", text)
    assert search.text(text, "ansible.log") == set()
    destroy_secret_ids(vault, ROLE)
    bare = run_playbook(host, "site.yml", options=("--tags", "secrets"), secrets_no_log=False)
    assert bare.returncode == 0, bare.stdout
    secrets = passed()
    shown = {each.secret for each in Search(secrets).text(log.read_text(), "unprotected")}
    assert shown
    for name in shown:
        assert name.startswith("wrapping token"), name
        interceptor = hvac.Client(url=vault.url, session=vault.session, token=secrets[name])
        with pytest.raises(hvac.exceptions.VaultError):
            interceptor.sys.unwrap()
