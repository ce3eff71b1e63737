"""What runs beside an app's server: from the live release, as the app's user, in its sandbox, with its secrets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import hvac
import pytest
from forge_apps import archive, beats, live_unit, settled, state, trail
from forge_events import answer, forgectl
from forge_scenario import main_pid, secrets_at, show, until
from testinfra.host import Host

NAME = "plain"


def ticks_from(host: Host, release: str) -> bool:
    """Whether the last run of the one on a schedule that began is of a release."""
    return trail(host, "tick")[-1][1] == release


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
    slot = settled(host, NAME)["live"]["slot"]
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
    unit = live_unit(host, "inbox").replace("@", ".keyed@")
    key = secrets_at(vault, "forge/inbox/app")["signing_key"]
    assert f"a key of {len(key)}" in host.check_output("forgectl logs inbox --command keyed").splitlines()
    assert key in host.check_output("cat /proc/%s/environ", str(main_pid(host, unit)))
    assert key not in host.check_output("systemctl show %s", unit) + host.check_output("systemctl cat %s", unit)


def test_status_shows_them(host: Host) -> None:
    """To programs and to people."""
    found = state(host, NAME)["commands"]
    assert (found["beat"]["state"], found["beat"]["restarts"]) == ("running", 0)
    assert (found["tick"]["schedule"], found["tick"]["timer"]) == ("*:*:0/3", "active")
    said = host.check_output("forgectl status %s", NAME)
    assert "command   beat: running" in said
    assert "command   tick: " in said


def test_a_run_is_never_joined_by_another(host: Host) -> None:
    """Each takes longer than the time until the next is due; all that have been so far tell."""
    until(lambda: len(trail(host, "tick")) > 6, 60, every=1)
    steps = [(process, what) for process, _, what in trail(host, "tick")]
    # One that fails never ends by itself.
    ended = [(before, after[0]) for before, after in pairwise(steps) if after[1] == "ended"]
    assert ended == [((process, "began"), process) for _, process in ended]
    assert ended


@pytest.mark.exhaustive
def test_they_go_with_the_release(host: Host, source: Path) -> None:
    """Started after the swap, the old one stopped in order with its slot; a rollback and a recycling do the same."""
    before = settled(host, NAME)["live"]
    new = answer(forgectl(host, "release", NAME, "--archive", archive(source), "--json", "--no-wait"))
    # Both are there while the new release is watched.
    assert set(beats(host)) == {f"{NAME}.beat@blue.service", f"{NAME}.beat@green.service"}
    live = settled(host, NAME)["live"]
    assert live["release"] == new["release"] != before["release"]
    assert set(beats(host)) == {f"{NAME}.beat@{live['slot']}.service"}
    assert [step[1:] for step in trail(host, "beat")[-2:]] == [
        (new["release"], "began"),
        (before["release"], "ended"),
    ]
    until(lambda: ticks_from(host, new["release"]), 20, every=0.5)

    answer(forgectl(host, "rollback", NAME, "--json"))
    live = settled(host, NAME)["live"]
    assert live["release"] == before["release"]
    assert set(beats(host)) == {f"{NAME}.beat@{live['slot']}.service"}
    until(lambda: ticks_from(host, before["release"]), 20, every=0.5)

    old = beats(host)
    answer(forgectl(host, "recycle", NAME, "--json"))
    settled(host, NAME)
    assert len(beats(host)) == 1
    assert not set(beats(host)) & set(old)
    assert trail(host, "beat")[-1][2] == "ended"


@pytest.mark.exhaustive
def test_a_rollback_in_time_finds_its_commands(host: Host, source: Path) -> None:
    """While the old slot is warm, what belongs to it was never stopped; what is on a schedule goes back with it."""
    before, warm = settled(host, NAME)["live"], beats(host)
    with described(host, "watch_seconds = 3", "watch_seconds = 60"):
        answer(forgectl(host, "release", NAME, "--archive", archive(source), "--json", "--no-wait"))
        answer(forgectl(host, "rollback", NAME, "--json"))
    assert settled(host, NAME)["live"]["release"] == before["release"]
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
    until(lambda: state(host, NAME)["commands"]["tick"]["last_result"] == "success", 20, every=0.5)


def test_a_release_whose_command_dies_is_rolled_back(host: Host, source: Path) -> None:
    """The server was ready; what belongs beside it was not, while that of the old release is."""
    before = settled(host, NAME)["live"]["release"]
    jobs = source / "jobs.py"
    jobs.write_text("import sys\n\nif sys.argv[1:] == ['beat']:\n    sys.exit('no beat')\n" + jobs.read_text())
    said = answer(forgectl(host, "release", NAME, "--archive", archive(source), "--json"), 7)["error"]
    assert f"{NAME}.beat@" in said
    assert settled(host, NAME)["live"]["release"] == before
    assert len(beats(host)) == 1


@pytest.mark.exhaustive
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
    before, process = settled(host, NAME)["live"], beats(host)
    with described(host, old, new):
        error = answer(forgectl(host, "release", NAME, "--archive", archive(source), "--json"), 3)["error"]
    assert said in error
    assert (state(host, NAME)["live"], beats(host)) == (before, process)


@pytest.mark.exhaustive
def test_a_command_that_is_gone_leaves_nothing(host: Host, source: Path) -> None:
    """It is never due again; its unit goes with the first hand-over after its last run; a rollback brings it back."""
    before = settled(host, NAME)["live"]["release"]
    with described(host, "^.commands.tick.$", "[commands.tock]"):
        answer(forgectl(host, "release", NAME, "--archive", archive(source), "--json"))
    settled(host, NAME)
    assert show(host, "plain.tick.timer", "LoadState") == "not-found"
    until(lambda: show(host, "plain.tick.service", "ActiveState") == "inactive", 20, every=0.5)
    answer(forgectl(host, "recycle", NAME, "--json"))
    settled(host, NAME)
    units = host.check_output("ls /etc/systemd/system").split()
    assert {unit for unit in units if unit.startswith("plain.t")} == {"plain.tock.service", "plain.tock.timer"}
    answer(forgectl(host, "rollback", NAME, "--json"))
    assert settled(host, NAME)["live"]["release"] == before
    until(lambda: ticks_from(host, before), 20, every=0.5)
