"""The unit of the app: what it runs, what it may use and touch, and what brings it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from forge_scenario import Status, cgroup_value, main_pid, show, until
from testinfra.host import Host

# Joins the control groups of a unit, on cgroup v1 and v2 alike, before it does what the rest says.
JOIN = """
import os, pathlib, sys
for line in pathlib.Path(f"/proc/{sys.argv[1]}/cgroup").read_text().splitlines():
    _, names, path = line.split(":", 2)
    for name in (*names.split(","), "unified"):
        group = pathlib.Path("/sys/fs/cgroup", name.removeprefix("name="), path.lstrip("/"), "cgroup.procs")
        if path.endswith(".service") and group.exists():
            group.write_text(str(os.getpid()))
"""
ALLOCATE = JOIN + "hog = b'x' * (int(sys.argv[2]) * 2**20 + 2**20)"
FORK = (
    JOIN
    + """
import signal, time
children = []
try:
    while len(children) < 2000:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        children.append(child)
    print("never refused")
except BlockingIOError:
    print(len(children) + int(sys.argv[2]) + 1)
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
"""
)
# Tries what it is told to, and prints what worked.
TRY = """
import json, os, sys
done = []
for how, path in json.loads(sys.argv[1]):
    try:
        if how == "list":
            os.listdir(path)
        elif how == "read":
            open(path, "rb").read(1)
        elif os.path.isdir(path):
            name = os.path.join(path, "intruder")
            open(name, "x").close()
            os.unlink(name)
        else:
            open(path, "ab").close()
        done.append([how, path])
    except OSError:
        pass
print(json.dumps(done))
"""


def workers(host: Host, unit: str) -> list[int]:
    """List the children of the main process."""
    return [int(pid) for pid in host.run("pgrep --parent %s", str(main_pid(host, unit))).stdout.split()]


def process(host: Host, pid: int) -> dict[str, str]:
    """Read /proc/PID/status."""
    lines = host.check_output("cat /proc/%s/status", str(pid)).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def python(host: Host, code: str, *arguments: object) -> Any:
    """Run a program on the host as root."""
    return host.run("python3 -c %s" + " %s" * len(arguments), code, *map(str, arguments))


def answers(client: httpx.Client) -> bool:
    """Whether the app is ready, asked through Nginx and TLS."""
    return client.get("/ready").status_code == 200


def test_gunicorn_runs_uvicorn_workers_as_the_apps_user(host: Host, live: str, status: Status) -> None:
    """systemd supervises Gunicorn's master of the live release; nothing of the unit is root's."""
    pid = main_pid(host, live)
    command = host.check_output("cat /proc/%s/cmdline", str(pid)).split("\0")
    release = status()["live"]["release"]
    assert show(host, live, "Type") == "notify"
    assert show(host, live, "SubState") == "running"
    assert command[:3] == [f"/srv/inbox/releases/{release}/venv/bin/python", "-m", "gunicorn"]
    assert "--reload" not in command
    uid = host.user("inbox").uid
    assert uid != 0
    for member in (pid, *workers(host, live)):
        assert process(host, member)["Uid"].split() == [str(uid)] * 4
    mapped = host.check_output("cat /proc/%s/maps", str(workers(host, live)[0]))
    assert "/uvloop/loop." in mapped
    assert "/httptools/parser/parser." in mapped
    ancestors = "import runpy, sys; print(*runpy.run_path(sys.argv[1])['worker_class'].__mro__)"
    folder = f"/srv/inbox/releases/{release}"
    assert "uvicorn_worker" in host.check_output(
        "%s/venv/bin/python -c %s %s/gunicorn.conf.py", folder, ancestors, folder
    )


def test_as_many_workers_as_the_status_says_and_why(host: Host, live: str, status: Status) -> None:
    """The choice and its reasons are what `forgectl status` shows, to programs and to people."""
    chosen = status()["workers"]
    assert len(workers(host, live)) == chosen["count"]
    assert chosen["reasons"]
    assert f"{chosen['count']}: {'; '.join(chosen['reasons'])}" in host.check_output("forgectl status inbox")


def test_memory_limit_kills_what_exceeds_it_and_nothing_else(host: Host, live: str, client: httpx.Client) -> None:
    """The kernel kills the one process that takes too much; the app goes on as if nothing had been."""
    before = [main_pid(host, live), *workers(host, live)]
    limit = int(cgroup_value(host, live, "memory", "memory.limit_in_bytes", "memory.max"))
    assert limit == int(show(host, live, "MemoryMax"))
    assert python(host, ALLOCATE, before[0], limit // 2**20).rc == 128 + 9
    assert [main_pid(host, live), *workers(host, live)] == before
    assert answers(client)


def test_task_limit_refuses_forks(host: Host, live: str, client: httpx.Client) -> None:
    """The unit gets as many processes and threads as its limit says, and not one more."""
    limit = int(cgroup_value(host, live, "pids", "pids.max", "pids.max"))
    assert limit == int(show(host, live, "TasksMax"))
    assert python(host, FORK, main_pid(host, live), show(host, live, "TasksCurrent")).stdout.strip() == str(limit)
    assert answers(client)


def test_cpu_quota_is_in_force(host: Host, live: str) -> None:
    """All cores of the host by default, as the kernel sees it."""
    quota = cgroup_value(host, live, "cpu", "cpu.cfs_quota_us", "cpu.max").split()
    period = quota[1] if len(quota) == 2 else cgroup_value(host, live, "cpu", "cpu.cfs_period_us", "cpu.max")
    assert int(quota[0]) / int(period) == int(host.check_output("nproc"))


@pytest.mark.parametrize("which", ["master", "worker"])
def test_processes_have_no_privilege_to_lose(host: Host, live: str, which: str) -> None:
    """No capability in any set, none to gain, system calls filtered, files private by default."""
    pid = main_pid(host, live) if which == "master" else workers(host, live)[0]
    found = process(host, pid)
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (found["NoNewPrivs"], found["Seccomp"], found["Umask"]) == ("1", "2", "0077")


def test_sandbox_shows_and_yields_what_the_app_needs_only(host: Host, live: str, status: Status) -> None:
    """From inside the unit's namespaces, as its user: its own state and nothing else."""
    release = f"/srv/inbox/releases/{status()['live']['release']}"
    outside = main_pid(host, "nginx.service")
    cluster = host.check_output("ls --directory /var/lib/postgresql/*/main")
    forbidden = [
        *(("list", path) for path in ("/home", "/home/admin", "/root", "/etc/credstore.encrypted", "/etc/nginx/tls")),
        *(("list", path) for path in (cluster, "/var/lib/forge/inbox", f"/proc/{outside}")),
        *(("read", path) for path in ("/etc/shadow", "/var/lib/systemd/credential.secret", "/dev/mem", "/dev/sda")),
        *(
            ("write", path)
            for path in (release, f"{release}/source", f"{release}/settings.toml", f"{release}/venv/bin")
        ),
        *(("write", path) for path in ("/srv/inbox", "/srv/inbox/slots", "/run/inbox", "/run", "/etc", "/usr", "/opt")),
        *(("write", path) for path in ("/var/log", "/var/cache/forge", "/sys/fs/cgroup", "/proc/sys/kernel/hostname")),
    ]
    needed = [("write", "/var/lib/inbox"), ("write", "/tmp"), ("read", f"{release}/settings.toml")]
    user = host.user("inbox")
    inside = f"nsenter --target {main_pid(host, live)} --all --setuid {user.uid} --setgid {user.gid}"
    tried = host.check_output(f"{inside} python3 -c %s %s", TRY, json.dumps(forbidden + needed))
    assert json.loads(tried) == [list(item) for item in needed]
    # Inside, /tmp is another, and the processes of others do not exist.
    host.check_output("touch /tmp/outside")
    seen = host.check_output(f"{inside} sh -c 'ls /tmp; stat --format=%U /proc/[0-9]*'").split()
    host.check_output("rm /tmp/outside")
    assert "outside" not in seen
    assert {name for name in seen if not name.startswith("prometheus-")} == {"inbox"}


def test_releases_belong_to_nobody_who_runs_them(host: Host) -> None:
    """Without any sandbox too: the app's users and the build user own and may write nothing of a release."""
    for user in ("inbox", "inbox-migrate", "forge-build", "www-data"):
        writable = host.run("runuser --user %s -- find /srv/inbox -not -type l -writable", user).stdout
        assert writable == ""
    assert host.check_output("find /srv/inbox -not -user root") == ""


def test_other_users_see_nothing_of_the_app(host: Host) -> None:
    """What another app on this host would find."""
    tries = [("list", path) for path in ("/srv/inbox/releases", "/srv/inbox/slots", "/var/lib/inbox", "/run/inbox")]
    assert host.check_output("runuser --user nobody -- python3 -c %s %s", TRY, json.dumps(tries)) == "[]"
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/inbox/live.sock')"
    for user, expected in (("nobody", 1), ("inbox", 1), ("www-data", 0)):
        assert host.run("runuser --user %s -- python3 -c %s", user, connect).rc == expected, user


def test_killed_worker_is_replaced_while_requests_go_on(host: Host, live: str, client: httpx.Client) -> None:
    """One worker dies, its siblings answer, Gunicorn starts another."""
    master, before = main_pid(host, live), workers(host, live)
    host.check_output("kill -KILL %s", str(before[0]))
    assert {client.get("/health").status_code for _ in range(30)} == {200}
    after = until(lambda: (found := workers(host, live)) and len(found) == len(before) and found, 15)
    assert before[0] not in after
    assert main_pid(host, live) == master
    assert answers(client)


def test_worker_without_a_heartbeat_is_replaced(host: Host, live: str, client: httpx.Client) -> None:
    """A worker whose event loop stands still is killed after the heartbeat timeout; its clock is put forward here."""
    release = host.check_output("readlink --canonicalize /srv/inbox/slots/%s", live.partition("@")[2].partition(".")[0])
    timeout = int(host.check_output("sed --quiet 's/^timeout = //p' %s", f"{release}/gunicorn.conf.py"))
    before = workers(host, live)
    victim = before[0]
    # Gunicorn compares the time stamp of a file that only the worker has open with the monotonic clock.
    age = """
import os, sys, time
folder = f"/proc/{sys.argv[1]}/fd/"
beat = next(folder + fd for fd in os.listdir(folder) if "/wgunicorn-" in os.readlink(folder + fd))
then = time.monotonic() - float(sys.argv[2])
os.utime(beat, (then, then))
"""
    host.check_output("kill -STOP %s", str(victim))
    assert python(host, age, victim, timeout - 10).rc == 0
    time.sleep(2)
    assert victim in workers(host, live)
    assert python(host, age, victim, timeout + 1).rc == 0
    until(lambda: (found := workers(host, live)) and victim not in found and len(found) == len(before), 15)
    assert answers(client)


def test_killed_master_is_restarted_and_no_request_is_refused(host: Host, live: str, client: httpx.Client) -> None:
    """systemd holds the listener, so a request that comes meanwhile waits and is answered."""
    before, run = main_pid(host, live), show(host, live, "InvocationID")
    host.check_output("kill -KILL %s", str(before))
    # Until systemd has ended them, its workers take requests yet; the next ones need seconds.
    until(lambda: show(host, live, "InvocationID") not in ("", run), 30)
    assert client.get("/ready").status_code == 200
    assert main_pid(host, live) not in (0, before)


def test_restarted_for_ever(host: Host, live: str, client: httpx.Client) -> None:
    """There is no limit; after more crashes in a row than systemd's own allows (5 in 10 s) the app answers again."""
    assert show(host, live, "StartLimitIntervalUSec") == "0"
    crash = """
killed=0
for _ in 1 2 3 4 5 6; do
    until pid=$(systemctl show --value --property=MainPID "$1") && [ "$pid" != 0 ] && [ "$pid" != $killed ]; do
        sleep 0.05
    done
    kill -KILL "$pid"
    killed=$pid
done
"""
    restarts = int(show(host, live, "NRestarts"))
    host.check_output("timeout 120 sh -c %s sh %s", crash, live)
    until(lambda: int(show(host, live, "NRestarts")) - restarts >= 6, 30)
    assert client.get("/ready").status_code == 200


def test_failing_unit_shows_its_journal(host: Host, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A test that fails over a unit reports what that unit said."""
    (tmp_path / "tests").mkdir()
    failing = tmp_path / "tests" / "test_failing.py"
    failing.write_text("def test_it(unit):\n    assert unit('forge-sample.service').is_running\n")
    host.check_output(
        "systemd-run --quiet --wait --unit=forge-sample sh -c 'echo last words of $((40 + 2)); exit 1' || true"
    )
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-c", str(pytestconfig.inipath), "--sudo", "--hosts=all"),
                *("--connection=ansible", f"--ansible-inventory={os.environ['MOLECULE_INVENTORY_FILE']}", str(failing)),
            ],
            env={**os.environ, "MOLECULE_SCENARIO_DIRECTORY": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        host.check_output("systemctl reset-failed forge-sample.service")
    assert done.returncode == 1
    assert "journal of forge-sample.service" in done.stdout
    assert "last words of 42" in done.stdout
