"""Load around every event of the scenario, and the verdict over what its clients saw."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forge_load
import pytest
from forge_load import IDLE_CLOSED, Running, lost_and_doubled, percentile
from forge_scenario import CONTAINER, PROJECT, Status, playbook, podman, until
from testinfra.host import Host

MARGIN = 5.0
"""Seconds of load before an event and after its end."""
MAX_RATE = float(os.environ.get("FORGE_LOAD_MAX_RATE", "200"))
"""Requests a second; fewer for a machine that others use as well."""
STEADY_RATE = 50.0
"""Requests a second of a load that runs beside all tests of a module."""
DRAINED = 60.0
"""Seconds within which a cutover has its verdict and the slot that lost has stopped."""
NGINX_AWAY = "systemctl kill --signal=TERM nginx && systemctl stop nginx && sleep 2 && systemctl start nginx"
"""Cuts off every client for a moment; stopped in good order, it would answer for half a minute yet."""


# Runs a command, and kills it with SIGKILL some time after it said something; prints how it ended, and what it said.
KILL_AT = """
import subprocess, sys, time
text, delay, command = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
said = []
for line in process.stderr:
    said.append(line)
    if text in line:
        time.sleep(delay)
        process.kill()
        break
print(process.wait(), "".join(said))
"""


@dataclass
class Event:
    """One event and what clients saw of it."""

    name: str
    load: Running
    began: float = 0.0
    ended: float = 0.0
    stored: list[tuple[int, int]] = field(default_factory=list)

    @property
    def result(self) -> forge_load.Result:
        return self.load.result

    @property
    def inside(self) -> list[forge_load.Record]:
        """Requests that were due between the event's begin and its end."""
        return self.result.between(self.began, self.ended)

    @property
    def failed(self) -> list[forge_load.Record]:
        """Those of them that were not answered as they should, as far as they have ended."""
        return [record for record in self.inside if record.outcome != forge_load.OK]

    @property
    def paced(self) -> int:
        """How many of them the load sends by the clock."""
        return sum(record.kind in ("get", "page", "post") for record in self.inside)

    def line(self) -> str:
        """The figures."""
        result = self.result
        p50, p99 = (percentile(self.inside, percent) * 1000 for percent in (50, 99))
        return (
            f"{self.name:44} {self.ended - self.began:6.1f} s, {len(self.inside):6} requests inside, "
            f"{len(result.failed)} of {len(result.records)} failed, p50 {p50:.1f} p99 {p99:.1f} ms, "
            f"{IDLE_CLOSED} {result.retried(IDLE_CLOSED)}, idle_closes {result.idle_closes}, "
            f"told {sum(each.told for each in result.followers.values())}"
            + (f", {result.counts()}" if result.failed else "")
        )

    def assert_nothing_lost(self) -> None:
        """Every acknowledged event is in the table exactly once, and reached each follower exactly once."""
        assert lost_and_doubled(self.result, iter(self.stored)) == (set(), set())
        for follower in self.result.followers.values():
            assert (follower.missed(self.result.acknowledged), follower.doubled()) == (set(), set()), follower.protocol

    def assert_unnoticed(self, *, idle: bool = False) -> None:
        """No request failed; with `idle`, keep-alive connections may have been closed between two requests."""
        assert self.result.counts() == {}, self.result.failed[:20]
        self.assert_nothing_lost()
        if not idle:
            assert (self.result.retried(IDLE_CLOSED), self.result.idle_closes) == (0, 0)


@dataclass
class Ledger:
    """What the events of this session add up to."""

    strict: list[Event] = field(default_factory=list)
    """Events that no client may notice."""
    rate: float = 0.0
    """Requests a second, once they are known."""


EventContext = Callable[..., AbstractContextManager[Event]]
Unnoticed = Callable[[str], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    """What has happened so far."""
    return Ledger()


@pytest.fixture
def say(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a line now, whatever is captured."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n    {line}", flush=True)

    return write


@pytest.fixture
def site(host: Host) -> tuple[str, str, Path]:
    """Address, name and CA of the app."""
    variables = host.ansible.get_variables()
    trust = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem"
    return variables["ansible_host"], variables["apps"]["inbox"]["domain"], trust


@pytest.fixture
def rate(site: tuple[str, str, Path], ledger: Ledger, say: Callable[[str], None]) -> float:
    """Half of the measured capacity, measured once, beside a core that is as busy as Ansible will keep it."""
    if not ledger.rate:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            try:
                measured = forge_load.capacity(*site)
            finally:
                busy.kill()
        ledger.rate = min(MAX_RATE, measured / 2)
        say(f"capacity {measured:.0f} requests/s, load {ledger.rate:.0f} requests/s")
    return ledger.rate


@pytest.fixture
def event(
    host: Host,
    site: tuple[str, str, Path],
    rate: float,
    ledger: Ledger,
    say: Callable[[str], None],
    status: Status,
) -> EventContext:
    """Put the app under load around an event, and judge what clients saw.

    `strict`: nobody may notice. `idle`: but for idle connections, since Nginx reloads. Otherwise the test judges.
    """

    @contextmanager
    def around(name: str, *, strict: bool = True, idle: bool = False) -> Iterator[Event]:
        settle(status)
        before = nginx_workers(host)
        with forge_load.running(*site, rate=rate) as load:
            happening = Event(name, load)
            time.sleep(MARGIN)
            happening.began = time.time()
            yield happening
            settle(status)
            happening.ended = time.time()
            time.sleep(MARGIN)
        happening.stored = table(host, happening.result.run)
        say(happening.line())
        assert happening.paced > 0.95 * rate * (happening.ended - happening.began) - 5, "the load stood still"
        if strict:
            happening.assert_unnoticed(idle=idle)
            ledger.strict.append(happening)
        if strict and not idle:
            assert nginx_workers(host) == before

    return around


@dataclass
class Steady:
    """A load that goes on, and the events in it that nobody may notice."""

    load: Running
    events: list[Event] = field(default_factory=list)

    def cut(self) -> int:
        """How often a stream ended in another way than it should."""
        return sum(follower.cut for follower in self.load.result.followers.values())


@pytest.fixture(scope="module")
def steady(host: Host) -> Iterator[Steady]:
    """A modest load beside all tests of a module, from the first that asks for it; in the end nothing was lost."""
    variables = host.ansible.get_variables()
    trust = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem"
    site = (variables["ansible_host"], variables["apps"]["inbox"]["domain"], trust)
    with forge_load.running(*site, rate=STEADY_RATE) as load:
        yield (found := Steady(load))
    # A request is on record once it has ended: some may have hung until now.
    for happening in found.events:
        assert happening.failed == [], happening.name
    whole = Event("", load, stored=table(host, load.result.run))
    whole.assert_nothing_lost()


@pytest.fixture
def unnoticed(host: Host, steady: Steady, say: Callable[[str], None], status: Status) -> Unnoticed:
    """Do something while the load goes on, up to the end of the last drain: no request may fail."""

    @contextmanager
    def around(name: str) -> Iterator[None]:
        settle(status)
        before = nginx_workers(host)
        happening, cut = Event(name, steady.load, began=time.time()), steady.cut()
        yield
        settle(status)
        happening.ended = time.time()
        # What was due until then is answered.
        time.sleep(1)
        seconds, failed = happening.ended - happening.began, happening.failed
        say(f"{name:44} {seconds:6.1f} s, {len(failed)} of {len(happening.inside)} failed")
        assert failed == [], [each._asdict() for each in failed[:5]]
        assert steady.cut() == cut
        assert happening.paced > 0.95 * STEADY_RATE * seconds - 5, "the load stood still"
        assert nginx_workers(host) == before
        steady.events.append(happening)

    return around


def settle(status: Status) -> None:
    """Wait until no cutover is under way: the verdict is there, and the slot that lost has stopped."""
    until(lambda: status()["operation"] is None, DRAINED, every=0.5)


def nginx_workers(host: Host) -> list[str]:
    """The processes of Nginx that serve; a reload replaces them."""
    return sorted(host.run("pgrep --parent $(cat /run/nginx.pid)").stdout.split())


def psql(host: Host, query: str) -> str:
    """Run a query in the app's database."""
    return str(host.check_output("runuser --user postgres -- psql --quiet --no-psqlrc -tA inbox --command %s", query))


def leased_users(host: Host) -> set[str]:
    """The users that Vault has made and not yet removed."""
    return set(psql(host, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-approle-inbox-%'").split())


def table(host: Host, run: str) -> list[tuple[int, int]]:
    """Id and number of every stored event of a run."""
    rows = psql(host, forge_load.STORED.format(run=run)).split()
    return [(int(identity), int(number)) for identity, number in (row.split("|") for row in rows)]


def run_playbook(
    host: Host, name: str, source: Path | None = None, *, options: Sequence[str] = (), **variables: Any
) -> subprocess.CompletedProcess[str]:
    """Run a playbook with other variables; `source` replaces the app's.

    Keys of `variables` that begin with `app_` go into the app's entry; `options` are ansible-playbook's own.
    """
    apps = copy.deepcopy(host.ansible.get_variables()["apps"])
    if source:
        apps["inbox"]["source"] = str(source)
    for key in [key for key in variables if key.startswith("app_")]:
        apps["inbox"][key.removeprefix("app_")] = variables.pop(key)
    # A control machine of its own would take no processor from the host.
    return playbook("--extra-vars", json.dumps(variables | {"apps": apps}), *options, name=name, before=["nice"])


class Provisioning:
    """The host's provisioning, with the variables of the last run of site.yml; at first they are the inventory's."""

    def __init__(self) -> None:
        self._applied: dict[str, Any] | None = {}

    def run(self, host: Host, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run site.yml with these variables, as run_playbook takes them."""
        self._applied = None
        done = run_playbook(host, "site.yml", **variables)
        if done.returncode == 0:
            self._applied = variables
        return done

    def ensure(self, host: Host, **variables: Any) -> None:
        """Have the host as these variables say."""
        if self._applied != variables:
            done = self.run(host, **variables)
            assert done.returncode == 0, done.stdout

    def forget(self) -> None:
        """Something else has changed the host."""
        self._applied = None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the app's source that differs in nothing but a constant: a new release."""
    return copy_app(tmp_path / "app")


def copy_app(folder: Path) -> Path:
    """Copy the app's source, and give it a constant of its own."""
    shutil.copytree(PROJECT / "app", folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "tests"))
    append(folder / "src/inbox/__init__.py", f'\nVARIANT = "{uuid.uuid4().hex}"\n')
    return folder


def append(path: Path, text: str) -> None:
    """Add code to the end of a file."""
    path.write_text(path.read_text() + text)


def touched(source: Path) -> Path:
    """Change the source once more."""
    append(source / "src/inbox/__init__.py", f"AGAIN = {time.time()}\n")
    return source


def upload(source: Path) -> str:
    """Pack a source and put it on the host; returns where it lies there."""
    name = f"/var/tmp/{uuid.uuid4().hex}.tar"
    archive = source.parent / "source.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(source, arcname=".")
    podman("exec", "--interactive", CONTAINER, "sh", "-c", f"cat > {name}", input=archive.read_bytes())
    return name


def forgectl(host: Host, *arguments: str) -> Any:
    """Run forgectl on the host; returns what testinfra does."""
    return host.run("forgectl" + " %s" * len(arguments), *arguments)


def answer(run: Any, code: int = 0) -> dict[str, Any]:
    """The JSON of a forgectl command that ended with a code."""
    assert run.rc == code, (run.rc, run.stdout, run.stderr)
    found: dict[str, Any] = json.loads(run.stdout) if run.stdout.strip() else {}
    return found


def kill_forgectl(host: Host, said: str, *command: str, delay: float = 0.0) -> None:
    """Run forgectl, and kill it with SIGKILL so many seconds after it said something."""
    line = "python3 -c %s %s %s forgectl" + " %s" * len(command)
    killed = host.check_output(line, KILL_AT, said, str(delay), *command)
    assert killed.startswith("-9 "), (said, delay, killed)


def history(host: Host) -> list[dict[str, Any]]:
    """Every cutover, oldest first."""
    found: list[dict[str, Any]] = answer(forgectl(host, "history", "inbox", "--json"))["history"]
    return found


def release(host: Host, source: Path, *arguments: str) -> Any:
    """Release a source on the host itself, without Ansible."""
    return forgectl(host, "release", "inbox", "--archive", upload(source), "--json", *arguments)


def assert_one_live(host: Host, status: Status, release: str) -> None:
    """One slot runs, that release is in it, and traffic goes there; nothing is left of what was interrupted."""
    settle(status)
    found = status()
    live = found["live"]
    assert live["release"] == release, found
    assert host.check_output("readlink /run/inbox/live.sock") == f"{live['slot']}.sock"
    units = host.check_output("systemctl list-units --no-legend --plain --state=active,activating 'inbox@*.service'")
    assert re.findall(r"^inbox@(\w+)\.service", units, re.MULTILINE) == [live["slot"]]
    assert host.check_output("readlink /srv/inbox/slots/%s", live["slot"]).endswith(release)
    assert host.run("find /srv/inbox/releases -maxdepth 1 -name '.*incomplete'").stdout == ""
