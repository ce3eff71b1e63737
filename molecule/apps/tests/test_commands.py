"""What runs beside an app's server: from the live release, as the app's user, in its sandbox, with its secrets."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hvac
import pytest
from forge_events import answer, append, forgectl, upload
from forge_scenario import CONTAINER, main_pid, podman, reachable, secrets_at, show, until
from testinfra.host import Host

NAME = "plain"
TRAIL = "/var/lib/plain/trail"


class Step(NamedTuple):
    """A line of the trail that the commands leave."""

    command: str
    process: int
    release: str
    what: str


def trail(host: Host, command: str) -> list[Step]:
    """What a command did, oldest first."""
    lines = (line.split() for line in host.check_output("cat %s", TRAIL).splitlines())
    return [Step(name, int(process), release, what) for name, process, release, what in lines if name == command]


def state(host: Host) -> dict[str, Any]:
    """What `forgectl status` says of the app."""
    return answer(forgectl(host, "status", NAME, "--json"))


def settled(host: Host) -> dict[str, Any]:
    """The same, once nothing is under way."""
    found: dict[str, Any] = until(lambda: (now := state(host)) and not now["operation"] and now, 60, every=0.5)
    return found


def beats(host: Host) -> dict[str, int]:
    """Process by unit, of the command that goes on, where it runs."""
    units = (f"{NAME}.beat@{slot}.service" for slot in ("blue", "green"))
    return {unit: pid for unit in units if (pid := main_pid(host, unit))}


def ticks_from(host: Host, release: str) -> bool:
    """Whether the last run of the one on a schedule that began is of a release."""
    return trail(host, "tick")[-1].release == release


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the app's source that differs from all before."""
    copy = Path(shutil.copytree(Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / NAME, tmp_path / NAME))
    append(copy / "main.py", f"VARIANT = {time.time()}\n")
    return copy


@contextmanager
def described(host: Host, old: str, new: str) -> Iterator[None]:
    """Have the app described in another way for a while."""
    path = f"/etc/forge/apps/{NAME}.toml"
    host.check_output("cp --preserve %s /root/described", path)
    try:
        host.check_output("sed --in-place %s %s", f"s|{old}|{new}|", path)
        yield
    finally:
        host.check_output("mv /root/described %s", path)


def test_it_runs_as_the_server_does(host: Host) -> None:
    """With the same user, sandbox, environment and log, and a limit of its own."""
    slot = settled(host)["live"]["slot"]
    unit, server = f"{NAME}.beat@{slot}.service", f"{NAME}@{slot}.service"
    process = main_pid(host, unit)
    assert host.check_output("stat --format=%%U /proc/%s", str(process)) == NAME
    for name in ("ProtectSystem", "NoNewPrivileges", "CapabilityBoundingSet", "SystemCallFilter", "ReadWritePaths"):
        assert show(host, unit, name) == show(host, server, name)
    assert show(host, unit, "MemoryMax") == str(64 * 1024 * 1024)
    ours, its = (
        dict(line.split("=", 1) for line in host.check_output("cat /proc/%s/environ", str(pid)).split("\0") if line)
        for pid in (process, main_pid(host, server))
    )
    names = ("GREETING", "HOME", "PATH", "PYTHONPATH")
    assert {name: ours[name] for name in names} == {name: its[name] for name in names}


def test_secrets_reach_it_and_nothing_else(host: Host, vault: hvac.Client) -> None:
    """They are in its environment, and neither in its unit nor in what systemd shows."""
    slot = answer(forgectl(host, "status", "inbox", "--json"))["live"]["slot"]
    unit = f"inbox.keyed@{slot}.service"
    key = secrets_at(vault, "forge/inbox/app")["signing_key"]
    assert f"a key of {len(key)}" in host.check_output("forgectl logs inbox --command keyed").splitlines()
    assert key in host.check_output("cat /proc/%s/environ", str(main_pid(host, unit)))
    assert key not in host.check_output("systemctl show %s", unit) + host.check_output("systemctl cat %s", unit)


def test_status_shows_them(host: Host) -> None:
    """To programs and to people."""
    found = state(host)["commands"]
    assert (found["beat"]["state"], found["beat"]["restarts"]) == ("running", 0)
    assert (found["tick"]["schedule"], found["tick"]["timer"]) == ("*:*:0/3", "active")
    said = host.check_output("forgectl status %s", NAME)
    assert "command   beat: running" in said
    assert "command   tick: " in said


def test_a_run_is_never_joined_by_another(host: Host) -> None:
    """Each takes longer than the time until the next is due."""
    before = len(trail(host, "tick"))
    until(lambda: len(trail(host, "tick")) > before + 6, 60, every=1)
    steps = [(step.process, step.what) for step in trail(host, "tick")][before:]
    first = next(index for index, (_, what) in enumerate(steps) if what == "began")
    for (process, began), (same, ended) in zip(steps[first::2], steps[first + 1 :: 2], strict=False):
        assert (began, ended, process) == ("began", "ended", same), steps


def test_they_go_with_the_release(host: Host, source: Path) -> None:
    """Started after the swap, the old one stopped in order with its slot; a rollback and a recycling do the same."""
    before = settled(host)["live"]
    new = answer(forgectl(host, "release", NAME, "--archive", upload(source), "--json", "--no-wait"))
    # Both are there while the new release is watched.
    assert set(beats(host)) == {f"{NAME}.beat@blue.service", f"{NAME}.beat@green.service"}
    live = settled(host)["live"]
    assert live["release"] == new["release"] != before["release"]
    assert set(beats(host)) == {f"{NAME}.beat@{live['slot']}.service"}
    assert [(step.release, step.what) for step in trail(host, "beat")[-2:]] == [
        (new["release"], "began"),
        (before["release"], "ended"),
    ]
    until(lambda: ticks_from(host, new["release"]), 20, every=0.5)

    answer(forgectl(host, "rollback", NAME, "--json"))
    live = settled(host)["live"]
    assert live["release"] == before["release"]
    assert set(beats(host)) == {f"{NAME}.beat@{live['slot']}.service"}
    until(lambda: ticks_from(host, before["release"]), 20, every=0.5)

    old = beats(host)
    answer(forgectl(host, "recycle", NAME, "--json"))
    settled(host)
    assert len(beats(host)) == 1
    assert not set(beats(host)) & set(old)
    assert trail(host, "beat")[-1].what == "ended"


def test_a_rollback_in_time_finds_its_commands(host: Host, source: Path) -> None:
    """While the old slot is warm, what belongs to it was never stopped; what is on a schedule goes back with it."""
    before, warm = settled(host)["live"], beats(host)
    with described(host, "watch_seconds = 3", "watch_seconds = 60"):
        answer(forgectl(host, "release", NAME, "--archive", upload(source), "--json", "--no-wait"))
        answer(forgectl(host, "rollback", NAME, "--json"))
    assert settled(host)["live"]["release"] == before["release"]
    assert beats(host) == warm
    until(lambda: ticks_from(host, before["release"]), 20, every=0.5)


def test_a_failed_run_is_an_alert(host: Host) -> None:
    """One line of priority err, as all alerts are; status has it, too, until a run goes well."""
    since = host.check_output("date +%s.%N")
    host.check_output("touch /var/lib/plain/fail")
    line = "journalctl --priority=err --grep='^ALERT plain' --output=cat --since=@%s"
    try:
        alert = until(lambda: host.run(line, since).stdout.strip(), 20, every=0.5).splitlines()[0]
    finally:
        host.check_output("rm /var/lib/plain/fail")
    assert alert.startswith("ALERT plain: the command tick failed (exit-code, exited 1); see what it said: ")
    command = alert.rpartition(": ")[2].removeprefix("sudo ")
    assert command == "forgectl logs plain --command tick"
    assert "could not tick" in host.check_output(command)
    until(lambda: state(host)["commands"]["tick"]["last_result"] == "success", 20, every=0.5)


def test_a_release_whose_command_dies_is_rolled_back(host: Host, source: Path) -> None:
    """The server was ready; what belongs beside it was not, while that of the old release is."""
    before = settled(host)["live"]["release"]
    jobs = source / "jobs.py"
    jobs.write_text("import sys\n\nif sys.argv[1:] == ['beat']:\n    sys.exit('no beat')\n" + jobs.read_text())
    said = answer(forgectl(host, "release", NAME, "--archive", upload(source), "--json"), 7)["error"]
    assert f"{NAME}.beat@" in said
    assert settled(host)["live"]["release"] == before
    assert len(beats(host)) == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '."jobs", "beat".',
            '["nowhere", "beat"]',
            "expected apps.plain.commands.beat to begin with a Python module, or a program of the environment; "
            "found 'nowhere'",
        ),
        ('."jobs", "beat".', '["nowhere.beat"]', "apps.plain.commands.beat"),
        (r"\*:\*:0/3", "every full moon", "expected apps.plain.commands.tick.schedule to be a time of systemd's"),
    ],
    ids=["program", "module", "schedule"],
)
def test_a_command_that_can_t_run_is_refused(host: Host, source: Path, old: str, new: str, said: str) -> None:
    """Before anything of the app moves."""
    before, process = settled(host)["live"], beats(host)
    with described(host, old, new):
        error = answer(forgectl(host, "release", NAME, "--archive", upload(source), "--json"), 3)["error"]
    assert said in error
    assert (state(host)["live"], beats(host)) == (before, process)


def test_a_command_that_is_gone_leaves_nothing(host: Host, source: Path) -> None:
    """Neither a unit nor a timer, once the release without it is live; a rollback brings it back."""
    before = settled(host)["live"]["release"]
    with described(host, "^.commands.tick.$", "[commands.tock]"):
        answer(forgectl(host, "release", NAME, "--archive", upload(source), "--json"))
    settled(host)
    units = host.check_output("ls /etc/systemd/system").split()
    assert {unit for unit in units if unit.startswith("plain.t")} == {"plain.tock.service", "plain.tock.timer"}
    assert show(host, "plain.tick.timer", "ActiveState") == "inactive"
    answer(forgectl(host, "rollback", NAME, "--json"))
    assert settled(host)["live"]["release"] == before
    until(lambda: ticks_from(host, before), 20, every=0.5)


def test_zz_a_boot_brings_them_back(host: Host) -> None:
    """With the release that was live, and those on a schedule with their timers."""
    before = settled(host)["live"]
    began = len(trail(host, "tick"))
    podman("restart", "--time", "30", CONTAINER)
    assert until(lambda: reachable(host), 90, every=1)
    until(lambda: beats(host), 60, every=1)
    assert state(host)["live"] == before
    assert set(beats(host)) == {f"{NAME}.beat@{before['slot']}.service"}
    until(lambda: len(trail(host, "tick")) > began, 30, every=1)
    assert (
        show(
            host,
            f"inbox.keyed@{answer(forgectl(host, 'status', 'inbox', '--json'))['live']['slot']}.service",
            "ActiveState",
        )
        == "active"
    )
