"""What may befall a host in the middle of things.

Each ends in a clear message and a serving host, and the next command works.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from forge_events import (
    Event,
    EventContext,
    answer,
    append,
    assert_one_live,
    forgectl,
    history,
    kill_forgectl,
    release,
    settle,
    touched,
    upload,
)
from forge_scenario import CONTAINER, PODMAN, Status, main_pid, reboot, show, until
from testinfra.host import Host

RECOVERY = {"Gunicorn's master killed": 30.0, "PostgreSQL restarted": 30.0, "host rebooted": 60.0}
"""Seconds from the event to the last request that failed because of it."""


def outage(happening: Event) -> float:
    """Seconds from the event until requests succeeded again for good: none that was due later failed."""
    return max((record.due for record in happening.result.failed), default=happening.began) - happening.began


@pytest.mark.parametrize(
    "steps",
    [
        {"start": [0.7], "swap": [0.0]},
        pytest.param(
            {"stage": [0.1], "environment": [0.0], "migrate": [0.0], "start": [0.0], "swap": [2.0]},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=", ".join,
)
def test_forgectl_killed(
    event: EventContext, host: Host, status: Status, source: Path, steps: dict[str, list[float]]
) -> None:
    """SIGKILL as a phase begins, or within it, then the same command again: it succeeds, and one release is live.

    Unit tests have every step between two changes of the disk; these are the ones that need the real thing most.
    """
    with event(f"forgectl killed: {', '.join(steps)}"):
        for phase, delays in steps.items():
            for delay in delays:
                before = status()["live"]["release"]
                archive = upload(touched(source))
                command = ("release", "inbox", "--archive", archive, "--json")
                kill_forgectl(host, f"{phase} ...", *command, delay=delay)
                again = answer(forgectl(host, *command, "--no-wait"))
                assert status()["live"]["release"] == again["release"] != before, (phase, delay)
                if phase != "swap":
                    # The next one need not wait for the watch.
                    assert answer(forgectl(host, "rollback", "inbox", "--json"))["release"] == before, (phase, delay)
                assert_one_live(host, status, again["release"] if phase == "swap" else before)


@pytest.mark.exhaustive
def test_rollback_killed(event: EventContext, host: Host, status: Status, source: Path) -> None:
    """The same of a rollback, to a slot that is started for it and to one that is still warm."""
    before = status()["live"]["release"]
    again = ("rollback", "inbox", "--to", before, "--json")
    steps = {"start": [0.0, 0.7], "swap": [0.0]}
    with event("rollback killed"):
        for phase, delays in steps.items():
            for delay in delays:
                answer(release(host, touched(source)))
                settle(status)
                kill_forgectl(host, f"{phase} ...", "rollback", "inbox", "--to", before, delay=delay)
                assert answer(forgectl(host, *again))["release"] == before, (phase, delay)
                assert_one_live(host, status, before)
        # It takes a rename and says nothing before it: some of these come too early, some in time, some too late.
        for delay in (0.15, 0.3):
            answer(release(host, touched(source), "--no-wait"))
            host.run("timeout --signal=KILL %s forgectl rollback inbox", str(delay))
            assert answer(forgectl(host, *again))["release"] == before, delay
            assert_one_live(host, status, before)


@pytest.mark.parametrize("phase", ["watching", pytest.param("draining", marks=pytest.mark.exhaustive)])
def test_watch_killed(event: EventContext, host: Host, status: Status, source: Path, phase: str) -> None:
    """The unit that watches and drains is killed: systemd starts it again, and it ends what was begun."""
    with event(f"SIGKILL of the watch while {phase}"):
        new = answer(release(host, source, "--no-wait"))["release"]
        until(lambda: (status()["operation"] or {}).get("phase") == phase, 30, every=0.2)
        host.check_output("kill -KILL %s", str(main_pid(host, "forge-watch@inbox.service")))
    assert_one_live(host, status, new)
    assert [entry["outcome"] for entry in history(host) if entry["release"] == new] == ["live"]


def test_two_deploys_at_once(event: EventContext, host: Host, status: Status, source: Path) -> None:
    """The second is refused at once and says who is at it; the first goes on, and so does the next command."""
    append(source / "src/inbox/main.py", "\nimport time\ntime.sleep(6)\n")
    archive = upload(source)
    known = json.loads(host.check_output("cat /srv/inbox/releases/%s/release.json", status()["live"]["release"]))
    command = [str(PODMAN), "exec", CONTAINER, "forgectl", "release", "inbox", "--archive", archive, "--json"]
    with event("two deploys at once"), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
        until(lambda: (status()["operation"] or {}).get("phase") == "starting", 30, every=0.1)
        two = forgectl(host, "release", "inbox", "--source-digest", known["source_digest"])
        output, _ = one.communicate(timeout=120)
    assert two.rc == 5
    assert re.search(r"locked \(release by \w+, process \d+, since \d+ s\)", two.stderr), two.stderr
    assert one.returncode == 0
    assert_one_live(host, status, json.loads(output)["release"])
    assert answer(forgectl(host, "recover", "inbox", "--json"))["operation"] is None


def test_release_that_does_not_exist(host: Host, status: Status) -> None:
    """Refused with the names that there are; nothing changes."""
    before = status()["live"]
    for command, message in (
        (("rollback", "inbox", "--to", "20200101-000000-000000000000"), f"found .*{before['release']}"),
        (
            ("release", "inbox", "--archive", "/var/tmp/none.tar"),
            "expected an archive at /var/tmp/none.tar; found none",
        ),
        (("release", "inbox", "--source-digest", "0" * 64), "name its archive"),
    ):
        run = forgectl(host, *command)
        assert (run.rc, bool(re.search(message, run.stderr))) == (3, True), run.stderr
    assert status()["live"] == before


@pytest.mark.parametrize("limit", ["size", pytest.param("nr_inodes", marks=pytest.mark.exhaustive)])
def test_full_disk_while_staging(event: EventContext, host: Host, status: Status, source: Path, limit: str) -> None:
    """Refused with the reason, nothing half-made stays, and with room again the same command works."""
    (source / "ballast").mkdir()
    if limit == "size":
        (source / "ballast/one").write_bytes(b"x" * 8_000_000)
    else:
        for number in range(500):
            (source / f"ballast/{number}").touch()
    before = status()["live"]["release"]
    archive = upload(source)
    with event(f"full disk while staging: {limit}"):
        with small_disk(host, "/srv/inbox/releases", limit):
            full = forgectl(host, "release", "inbox", "--archive", archive)
            assert host.run("find /srv/inbox/releases -maxdepth 1 -name '.*incomplete'").stdout == ""
        assert full.rc == 3, full.stderr
        assert "No space left on device" in full.stderr
        assert_one_live(host, status, before)
        found = answer(forgectl(host, "release", "inbox", "--archive", archive, "--no-wait", "--json"))
    assert_one_live(host, status, found["release"])


@contextmanager
def small_disk(host: Host, folder: str, limit: str) -> Iterator[None]:
    """Put a disk with little room over a folder, with the same content."""
    size = int(host.check_output("du --summarize --block-size=1 --apparent-size %s | cut --fields=1", folder))
    files = int(host.check_output("find %s | wc --lines", folder))
    option = f"size={size * 2 + 2_000_000}" if limit == "size" else f"nr_inodes={files + 100}"
    host.check_output("mkdir --parents /mnt/small && mount -t tmpfs -o %s tmpfs /mnt/small", option)
    try:
        host.check_output(
            "cp --archive --no-target-directory %s /mnt/small && mount --bind /mnt/small %s", folder, folder
        )
        try:
            yield
        finally:
            host.check_output("umount --lazy %s", folder)
    finally:
        host.check_output("umount --lazy /mnt/small")


def test_tampered_release(event: EventContext, host: Host, status: Status, source: Path) -> None:
    """A release that is not what was staged is not started again; put right, it is."""
    old = status()["live"]["release"]
    with event("rollback to a tampered release"):
        new = answer(release(host, source))["release"]
        settle(status)
        file = f"/srv/inbox/releases/{old}/source/src/inbox/main.py"
        host.check_output("cp --preserve=all %s /var/tmp/main.py && echo '# tampered' >> %s", file, file)
        refused = forgectl(host, "rollback", "inbox")
        host.check_output("mv /var/tmp/main.py %s", file)
        assert refused.rc == 3
        assert f"expected /srv/inbox/releases/{old} as it was staged; found changed files" in refused.stderr
        assert_one_live(host, status, new)
        assert answer(forgectl(host, "rollback", "inbox", "--json"))["release"] == old
    assert_one_live(host, status, old)


@pytest.mark.exhaustive
def test_slot_that_cannot_bind(event: EventContext, host: Host, status: Status, source: Path) -> None:
    """Something is in the way of the idle slot's socket: the release fails and says so; without it, it works."""
    before = status()["live"]
    idle = "blue" if before["slot"] == "green" else "green"
    archive = upload(source)
    with event("a slot that cannot bind"):
        host.check_output("mkdir --parents /run/inbox/%s.sock/in-the-way", idle)
        failed = forgectl(host, "release", "inbox", "--archive", archive)
        host.check_output("rm --recursive /run/inbox/%s.sock", idle)
        assert failed.rc == 4, failed.stderr
        assert f"inbox@{idle}.socket" in failed.stderr
        assert_one_live(host, status, before["release"])
        found = answer(forgectl(host, "release", "inbox", "--archive", archive, "--no-wait", "--json"))
    assert_one_live(host, status, found["release"])


def test_worker_killed(event: EventContext, host: Host, status: Status) -> None:
    """Only what that worker had in flight fails."""
    service = f"inbox@{status()['live']['slot']}.service"
    with event("worker killed", strict=False) as happening:
        command = "pid=$(pgrep --parent %s | head --lines=1); date +%%s.%%N; kill -KILL $pid && date +%%s.%%N"
        before, after = map(float, host.check_output(command, str(main_pid(host, service))).split())
    happening.assert_nothing_lost()
    for record in happening.result.failed:
        assert record.due <= after, (before, after, record)
        assert before <= record.due + record.latency, (before, after, record)
        assert record.status == 502 or record.outcome == "truncated" or record.kind in ("sse", "websocket"), record


@pytest.mark.parametrize(
    ("name", "command", "unit"),
    [
        ("Gunicorn's master killed", "systemctl kill --kill-who=main --signal=KILL", "inbox@{slot}.service"),
        ("PostgreSQL restarted", "systemctl restart", "postgresql@*.service"),
    ],
)
def test_back_by_itself(event: EventContext, host: Host, status: Status, name: str, command: str, unit: str) -> None:
    """Within a stated bound, on the same release, without a lost event."""
    before = status()["live"]
    with event(name, strict=False) as happening:
        unit = unit.format(slot=before["slot"])
        was = main_pid(host, unit)
        assert was
        host.check_output(f"{command} %s", unit)
        # As long as the bound: what has not come back by then fails requests that are due after it.
        time.sleep(RECOVERY[name])
        assert main_pid(host, unit) not in (0, was)
    happening.assert_nothing_lost()
    assert outage(happening) < RECOVERY[name]
    assert status()["live"] == before


def test_reboot(event: EventContext, status: Status, client: httpx.Client) -> None:
    """The same release in the same slot, with everything that was acknowledged."""
    before = status()["live"]
    with event("host rebooted", strict=False) as happening:
        reboot(client, patience=30)
        time.sleep(2)
    happening.assert_nothing_lost()
    assert outage(happening) < RECOVERY["host rebooted"]
    assert status()["live"] == before


@pytest.mark.parametrize("phase", ["starting", pytest.param("watching", marks=pytest.mark.exhaustive)])
def test_reboot_in_mid_deploy(
    event: EventContext, host: Host, status: Status, client: httpx.Client, source: Path, phase: str
) -> None:
    """One of the two releases is live afterwards, which one is written down, and the next command works."""
    before = status()["live"]["release"]
    if phase == "starting":
        append(source / "src/inbox/main.py", "\nimport time\ntime.sleep(6)\n")
    archive = upload(source)
    with event(f"host rebooted while {phase}", strict=False) as happening:
        host.check_output("systemd-run --quiet --collect forgectl release inbox --archive %s", archive)
        found = until(lambda: (o := status()["operation"]) and o["phase"] == phase and o, 60, every=0.1)
        time.sleep(0.5)
        reboot(client, patience=30)
    happening.assert_nothing_lost()
    assert outage(happening) < RECOVERY["host rebooted"] + 30
    live = before if phase == "starting" else found["release"]
    assert_one_live(host, status, live)
    assert history(host)[-1]["outcome"] == ("failed" if phase == "starting" else "live")
    again = answer(forgectl(host, "release", "inbox", "--archive", archive, "--json"))
    assert_one_live(host, status, again["release"])


def test_timeouts_form_a_chain(host: Host, status: Status) -> None:
    """No inner wait outlives its outer one; all read from what runs: Nginx, Gunicorn, systemd."""
    live = status()["live"]
    folder = f"/srv/inbox/releases/{live['release']}"
    # Without bytecode: nothing but the staging may write there.
    python = f"cd {folder} && venv/bin/python -B"
    printed = host.check_output(f"{python} -m gunicorn --print-config --config gunicorn.conf.py json:dumps")
    gunicorn = {name: int(value) for name, value in re.findall(r"^(\w+)\s+= (\d+)$", printed, re.MULTILINE)}
    text = host.check_output("nginx -T 2>/dev/null")
    site = text[text.index("upstream forge_inbox ") :]
    nginx = {name: int(value) for name, value in reversed(re.findall(r"^\s+(\w+) (\d+)s;", site, re.MULTILINE))}
    stop = seconds(show(host, f"inbox@{live['slot']}.service", "TimeoutStopUSec"))
    kwargs = "import runpy; print(runpy.run_path('gunicorn.conf.py')['worker_class'].CONFIG_KWARGS[%s])"
    cut = int(host.check_output(f"{python} -c %s", kwargs % "'timeout_graceful_shutdown'"))
    read = nginx["proxy_read_timeout"]
    # A connection, then the request; the app's own shutdown, Gunicorn's patience with it, systemd's with Gunicorn.
    assert nginx["proxy_connect_timeout"] < read < cut < gunicorn["graceful_timeout"] < stop
    assert nginx["proxy_send_timeout"] <= read < gunicorn["timeout"]
    # It is Nginx that closes an idle connection between the two.
    assert nginx["keepalive_timeout"] < gunicorn["keepalive"]
    # A slot that lost is stopped once Nginx has left what it had pooled: at most so old, then idle for so long.
    pool_exit = float(
        re.findall(r"^pool_exit = (\S+)", host.check_output("cat %s/settings.toml", folder), re.MULTILINE)[0]
    )
    assert nginx["keepalive_time"] + nginx["keepalive_timeout"] < pool_exit


def seconds(span: str) -> float:
    """Read a span of time as systemd writes it."""
    units = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
    return sum(float(value) * units[unit] for value, unit in re.findall(r"([\d.]+)(ms|s|min|h)", span))
