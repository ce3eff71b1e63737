"""What every scenario's tests share: a scenario without tests fails, and a failing test shows the journal."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import hvac
import pytest
import requests
from testinfra.host import Host

# Their assertions say what they found, as those of the tests do.
pytest.register_assert_rewrite(
    "forge_access",
    "forge_acme",
    "forge_apps",
    "forge_diagnosis",
    "forge_events",
    "forge_faults",
    "forge_public",
    "forge_runbook",
    "forge_search",
    "forge_traces",
    "forge_vault",
)

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
PODMAN = PROJECT / "molecule" / "shared" / "podman"
CONTAINER = f"forge-{os.environ['MOLECULE_SCENARIO_NAME']}-vm"
"""The scenario's host."""
JOURNAL_LINES = 40
# A hang fails the test that it is in, long before it costs everybody's patience.
PLAYBOOK_SECONDS, PODMAN_SECONDS = 600, 300
WATCHED = pytest.StashKey[list[str]]()

Status = Callable[[], dict[str, Any]]
"""What the fixture `status` gives."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a scenario that brings no test of its own.

    Raises:
        pytest.UsageError: no test was collected below the scenario's folder.
    """
    tests = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]) / "tests"
    # A scenario may borrow the tests of another by a symlink.
    if not any(tests.resolve() in item.path.resolve().parents for item in session.items):
        raise pytest.UsageError(
            f"Expected: tests of the scenario in {tests}. Found: none. Do: add a test_*.py with a test."
        )


@pytest.fixture
def unit(host: Host, request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Look a systemd unit up by its full name; if the test fails, the unit's journal is part of the report."""
    watched = request.node.stash.setdefault(WATCHED, [])

    def look_up(name: str) -> Any:
        watched.append(name)
        return host.service(name)

    return look_up


class ToHost(httpx.HTTPTransport):
    """Connects to one address, whatever name a URL has; the certificate is still checked against that name."""

    def __init__(self, address: str, **options: Any) -> None:
        self._address = address
        super().__init__(**options)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request to the address."""
        request.extensions["sni_hostname"] = request.url.host
        request.url = request.url.copy_with(host=self._address)
        return super().handle_request(request)


def https_client(host: Host, **options: Any) -> httpx.Client:
    """Make a client on the control machine that trusts the CA of the scenario and nothing else."""
    variables = host.ansible.get_variables()
    trust = ssl.create_default_context(cafile=Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem")
    return httpx.Client(
        base_url=f"https://{variables['apps']['inbox']['domain']}",
        transport=ToHost(variables["ansible_host"], verify=trust, **options),
        timeout=30,
    )


@pytest.fixture
def client(host: Host) -> Iterator[httpx.Client]:
    """A client of the app through Nginx and TLS."""
    with https_client(host) as opened:
        yield opened


@pytest.fixture
def status(host: Host) -> Status:
    """Ask forgectl for the state of the app."""

    def ask() -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(host.check_output("forgectl status inbox --json"))
        return answer

    return ask


@pytest.fixture
def live(status: Status, unit: Callable[[str], Any]) -> str:
    """The full name of the service in the live slot; if the test fails, its journal is part of the report."""
    return str(unit(f"inbox@{status()['live']['slot']}.service").name)


@pytest.fixture(scope="session")
def vault() -> hvac.Client:
    """The scenario's server with the secrets, as its administrator."""
    state = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "vault"
    session = requests.Session()
    # Its own CA only, and no proxy in between.
    session.trust_env = False
    session.verify = str(state / "ca.pem")
    address = json.loads((state / "control.json").read_text())["address"]
    return hvac.Client(url=address, token=json.loads((state / "init.json").read_text())["root_token"], session=session)


def secrets_at(vault: hvac.Client, path: str) -> dict[str, str]:
    """Read the newest version of a path."""
    return dict(vault.secrets.kv.v2.read_secret_version(path, raise_on_deleted_version=True)["data"]["data"])


def playbook(*arguments: str, name: str = "site.yml", before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a playbook on the scenario's hosts, the way a person would; `before` stands before the command."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    return subprocess.run(
        [*before, "ansible-playbook", "--inventory", str(inventory), name, *arguments],
        cwd=PROJECT,
        # Molecule forces colours where its own output has them.
        env=os.environ | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PLAYBOOK_SECONDS,
    )


def podman(*arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Act upon the scenario's containers from outside."""
    return subprocess.run([PODMAN, *arguments], check=True, capture_output=True, timeout=PODMAN_SECONDS, **options)


def ready(client: httpx.Client) -> bool:
    """Whether the app is ready, asked through Nginx and TLS."""
    try:
        return client.get("/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def reboot(client: httpx.Client, *, patience: int) -> None:
    """Reboot the host and wait until the app answers; it has `patience` (s) to stop in good order, at 0 none."""
    podman("restart", "--time", str(patience), CONTAINER)
    until(lambda: ready(client), 90, every=0.5)


def reachable(host: Host) -> bool:
    """Whether somebody may log in again after a reboot."""
    try:
        return bool(host.run("true").rc == 0)
    except RuntimeError:
        # What testinfra makes of an SSH connection that fails.
        return False


def show(host: Host, unit: str, name: str) -> str:
    """Read a property of a unit, as systemd has it in force."""
    return str(host.check_output("systemctl show --value --property=%s %s", name, unit))


def main_pid(host: Host, unit: str) -> int:
    """Read the main process of a unit; 0 while there is none."""
    return int(show(host, unit, "MainPID"))


def weights_behind(host: Host, command: str) -> tuple[str, str]:
    """CPUWeight and IOWeight of the scope that a command of forgectl moves to, in force while it is at work."""
    script = f"""
        {command} > /dev/null &
        for _ in $(seq 200); do
            unit=$(systemctl list-units --plain --no-legend 'forge-behind-*.scope' | cut --delimiter=' ' --fields=1)
            [ -z "$unit" ] || break
            sleep 0.02
        done
        systemctl show --value --property=CPUWeight "$unit"
        systemctl show --value --property=IOWeight "$unit"
        systemctl show --value --property=ControlGroup "$unit"
        wait
    """
    cpu, io, group = host.check_output("bash -euc %s", script).splitlines()
    assert group.startswith("/system.slice/forge-behind-"), group
    return cpu, io


def cgroup_value(host: Host, unit: str, controller: str, v1: str, v2: str) -> str:
    """Read a limit from the control group that a unit's main process is really in."""
    groups = host.check_output("cat /proc/%s/cgroup", str(main_pid(host, unit)))
    match = re.search(rf"^\d+:(?:[^:]*,)?{controller}(?:,[^:]*)?:(.*)$", groups, re.MULTILINE)
    file = f"{controller}{match[1]}/{v1}" if match else f"{re.search('^0::(.*)$', groups, re.MULTILINE)[1]}/{v2}"  # type: ignore[index]
    return str(host.check_output("cat %s", f"/sys/fs/cgroup/{file.lstrip('/')}"))


def until(holds: Callable[[], Any], seconds: float, every: float = 0.1) -> Any:
    """Wait until something holds, and return what it says.

    Raises:
        AssertionError: it did not hold within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"still {found!r} after {seconds} s"
        time.sleep(every)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the journals of the units that the test looked at, and of all that have failed."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    # A host that is away has no journal, and must not end the whole run.
    if report.failed and call.when != "teardown" and host is not None and reachable(host):
        failed = host.run("systemctl list-units --state=failed --no-legend --plain").stdout
        names = [*item.stash.get(WATCHED, []), *(line.split()[0] for line in failed.splitlines() if line.strip())]
        for name in dict.fromkeys(names):
            journal = host.run("journalctl --no-pager --lines=%s --unit=%s", str(JOURNAL_LINES), name).stdout
            report.sections.append((f"journal of {name}", journal))
    return report
