"""The sandboxes: how exposed each unit of the project's own is, and what an attacker can do in the app's place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from secrets import token_urlsafe

import hvac
import pytest
from forge_events import answer, forgectl, psql, settle
from forge_scenario import Status, main_pid, secrets_at, show, until
from forge_vault import PATH
from testinfra.host import Host

APP, NGINX, OTHER = 1.5, 2.5, 2.0
# What somebody tries who runs code in the app. Each line is a try that has to fail.
ATTACK = r"""
import ctypes, errno, json, os, socket, sys

libc = ctypes.CDLL(None, use_errno=True)
worked = []


def attempt(name, action):
    try:
        action()
    except (OSError, MemoryError) as error:
        return
    worked.append(name)


def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")


def mapped():
    libc.mmap.restype = ctypes.c_void_p
    page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
    if page in (None, ctypes.c_void_p(-1).value):
        raise MemoryError


def bare(family, kind, protocol=0):
    return lambda: socket.socket(family, kind, protocol).close()


def bits(path):
    open(path, "w").close()
    os.chmod(path, 0o4755)


release = sys.argv[1]
for path in json.loads(sys.argv[2]):
    attempt(f"read {path}", lambda: os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1))
for path in (f"{release}/settings.toml", f"{release}/source/new", "/srv/inbox/slots/blue", "/etc/cron.d/x", "/usr/x"):
    attempt(f"write {path}", lambda: open(path, "ab").close())
attempt("replace the live socket", lambda: os.rename("/run/inbox/live.sock", "/run/inbox/x"))
attempt("init_module", lambda: call(175, b"", 0, b""))
attempt("finit_module", lambda: call(313, 0, b"", 0))
attempt("kexec_load", lambda: call(246, 0, 0, 0, 0))
attempt("bpf", lambda: call(321, 0, b"\0" * 128, 128))
attempt("mount", lambda: call(165, b"tmpfs", b"/tmp", b"tmpfs", 0, b""))
attempt("unshare", lambda: call(272, 0x10000000))
attempt("ptrace", lambda: call(101, 16, 1, 0, 0))
attempt("reboot", lambda: call(169, 0, 0, 0, 0))
attempt("clock", lambda: call(227, 0, b"\0" * 16))
attempt("real time", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
attempt("root", lambda: os.setuid(0))
attempt("group", lambda: os.setgroups([0]))
attempt("setuid bit", lambda: bits("/var/lib/inbox/x"))
attempt("device", lambda: os.mknod("/var/lib/inbox/y", 0o20600, os.makedev(1, 1)))
attempt("memory to write and run", mapped)
attempt("raw socket", bare(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt("packet socket", bare(socket.AF_PACKET, socket.SOCK_RAW))
attempt("netlink socket", bare(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("vsock", bare(getattr(socket, "AF_VSOCK", 40), socket.SOCK_STREAM))
attempt("kill others", lambda: os.kill(int(sys.argv[3]), 0))
attempt("see others", lambda: open(f"/proc/{sys.argv[3]}/cmdline").close())
seen = {os.stat(f"/proc/{pid}").st_uid for pid in os.listdir("/proc") if pid.isdigit()}
status = dict(line.split(":\t") for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
# What it needs works: or else all of this would show nothing.
open("/var/lib/inbox/state", "w").close()
os.unlink("/var/lib/inbox/state")
socket.create_server(("127.0.0.1", 0)).close()
print(json.dumps({
    "worked": worked, "others": sorted(seen - {os.getuid()}),
    "capabilities": [status[name].strip() for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "uid": os.getuid(), "devices": sorted(os.listdir("/dev")), "tmp": os.listdir("/tmp"),
}))
"""
FORBIDDEN = """
/etc/shadow /etc/gshadow /etc/sudoers /etc/nginx/tls /etc/credstore.encrypted /etc/ssh/ssh_host_ed25519_key
/root /home /var/lib/postgresql/*/main /var/lib/forge/inbox /var/lib/other /var/lib/systemd/credential.secret
/var/log/journal/*/system.journal /var/log/nginx/inbox.json /run/credentials /run/other
/dev/mem /dev/kmsg /proc/kcore /proc/1/environ /sys/kernel/debug
"""


def services(host: Host) -> list[str]:
    """Every service that is the project's own: packages keep theirs elsewhere. Of a template, its instances."""
    found = ["nginx.service"]
    files = host.check_output("find /etc/systemd/system -maxdepth 1 -type f -name '*.service' -printf '%f\\n'").split()
    for file in files:
        name, template, _ = file.partition("@.")
        if not template:
            found.append(file)
            continue
        known = host.check_output("systemctl list-units --all --plain --no-legend %s", f"{name}@*.service").splitlines()
        names = [line.split()[0] for line in known]
        enabled = host.check_output("systemctl list-unit-files --plain --no-legend %s", f"{name}@*.service").split()
        names += [each for each in enabled if each.startswith(f"{name}@") and not each.startswith(f"{name}@.")]
        found += sorted(set(names)) or [f"{name}@inbox.service"]
    return found


def exposure(host: Host, unit: str) -> float:
    """What systemd-analyze says of a unit as it is loaded, with its drop-ins: 0 for none, 10 for all."""
    said = host.check_output("systemd-analyze security --no-pager %s", unit)
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert match, said
    return float(match[1])


def test_exposure_of_every_own_unit(host: Host, status: Status, say: Callable[[str], None]) -> None:
    """The app's slots, Nginx, and all others: whatever a role of the project has put onto this host."""
    found = {unit: exposure(host, unit) for unit in services(host)}
    say("\n    ".join(f"{unit:32} {value}" for unit, value in sorted(found.items())))
    live = f"inbox@{status()['live']['slot']}.service"
    limits = {unit: APP if unit.startswith("inbox@") else NGINX if unit == "nginx.service" else OTHER for unit in found}
    assert live in found
    assert {"forge-boot@inbox.service", "forge-watch@inbox.service", "forge-reboot.service"} <= set(found)
    assert {unit: value for unit, value in found.items() if value > limits[unit]} == {}


def test_what_runs_is_what_was_judged(host: Host, live: str) -> None:
    """The processes themselves: their capabilities, their filter of system calls, and that they gain nothing."""
    nginx = main_pid(host, "nginx.service")
    for pid, bounding in ((main_pid(host, live), "0" * 16), (nginx, "00000000000004e2")):
        lines = host.check_output("cat /proc/%s/status", str(pid)).splitlines()
        found = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert (found["CapBnd"], found["NoNewPrivs"], found["Seccomp"]) == (bounding, "1", "2")
    worker = host.check_output("pgrep --parent %s", str(nginx)).split()[0]
    assert "CapEff:\t0000000000000000" in host.check_output("cat /proc/%s/status", worker)
    hidden = host.run(f"nsenter --target {nginx} --mount ls /home /root")
    assert (hidden.stdout.split(), host.run(f"nsenter --target {nginx} --mount touch /etc/x").rc) != ([], 0)
    assert host.run(f"nsenter --target {nginx} --mount touch /etc/x").rc != 0


@pytest.fixture
def attacked(host: Host, status: Status) -> dict[str, object]:
    """What an attacker could do in a unit that differs from the live slot's in nothing but its program."""
    found = status()["live"]
    release = f"/srv/inbox/releases/{found['release']}"
    own = host.check_output("cat /etc/systemd/system/inbox@%s.service.d/release.conf", found["slot"])
    body = re.sub(
        r"^(\[Unit\]|Wants=|After=|Type=|Exec|NotifyAccess=|Restart|Timeout|LoadCred).*$", "", own, flags=re.MULTILINE
    )
    outside = str(main_pid(host, "nginx.service"))
    host.check_output("install --directory --owner=nobody --mode=0700 /var/lib/other /run/other")
    host.check_output("printf %%s %s > /opt/attack.py", ATTACK)
    paths = host.check_output(f"for path in {' '.join(FORBIDDEN.split())}; do echo $path; done").split()
    start = f"ExecStart=/usr/bin/python3 /opt/attack.py {release} '{json.dumps(paths)}' {outside}"
    unit = f"{body}\nType=oneshot\n{start}\nStandardOutput=truncate:/run/attack.json\n"
    host.check_output("printf %%s %s > /run/systemd/system/forge-attack.service", unit)
    try:
        host.check_output("systemctl daemon-reload && touch /tmp/outside")
        host.check_output("systemctl start forge-attack.service")
        return dict(json.loads(host.check_output("cat /run/attack.json")))
    finally:
        host.check_output(
            "rm -rf /run/systemd/system/forge-attack.service /opt/attack.py /var/lib/other /run/other /tmp/outside && "
            "systemctl daemon-reload"
        )


def test_attacker_in_the_app_gets_nowhere(host: Host, attacked: dict[str, object]) -> None:
    """Nothing of others to read, none of its own code to write, no way into the kernel or the network's wire."""
    assert attacked["worked"] == []
    assert attacked["others"] == []
    assert attacked["uid"] == host.user("inbox").uid
    assert attacked["capabilities"] == ["0" * 16] * 4
    assert attacked["tmp"] == []
    assert not {"sda", "vda", "mem", "kmsg", "fuse", "kvm", "loop0"} & set(attacked["devices"])  # type: ignore[call-overload]


def test_units_do_their_work_in_their_sandboxes(host: Host) -> None:
    """A unit that its sandbox breaks would have failed."""
    for unit in ("forge-recycle@inbox.service", "forge-rotate@inbox.service", "forge-reboot.service"):
        host.check_output("systemctl start %s", unit)
        assert show(host, unit, "Result") == "success"
    assert host.check_output("systemctl --failed --no-legend --plain") == ""


def test_recycling_sees_the_memory_of_the_app(host: Host, live: str) -> None:
    """Of processes of another user: the namespace that they are in belongs to root."""
    asked = "from forgectl import systemd; print('sees', systemd.memory('" + live + "'))"
    folder = "/run/systemd/system/forge-recycle@inbox.service.d"
    drop_in = f'[Service]\nExecStart=\nExecStart=/opt/forge/forgectl/bin/python -c "{asked}"\n'
    host.check_output(f"mkdir --parents {folder} && printf %%s %s > {folder}/ask.conf", drop_in)
    try:
        host.check_output("systemctl daemon-reload && systemctl start forge-recycle@inbox.service")
        said = host.check_output("journalctl --unit=forge-recycle@inbox.service --grep=^sees --output=cat --lines=1")
    finally:
        host.check_output(f"rm --recursive {folder} && systemctl daemon-reload")
    assert int(said.split()[1]) > 2**23


def test_rotation_and_watch_reach_what_they_need(host: Host, vault: hvac.Client, status: Status) -> None:
    """A new value from Vault is put into service, and a password that no slot uses any more is taken."""
    before = status()["live"]
    values = secrets_at(vault, PATH) | {"signing_key": token_urlsafe(36)}
    vault.secrets.kv.v2.create_or_update_secret(PATH, values)
    host.check_output("systemctl start forge-rotate@inbox.service")
    settle(status)
    assert status()["live"]["slot"] != before["slot"]
    answer(forgectl(host, "secrets", "rotate", "inbox", "--database-password", "--json"))
    settle(status)
    with_password = "SELECT count(*) FROM pg_authid WHERE rolname ~ '^inbox_app' AND rolpassword IS NOT NULL"
    assert until(lambda: psql(host, with_password) == "1", 30)
    assert show(host, "forge-watch@inbox.service", "Result") == "success"
