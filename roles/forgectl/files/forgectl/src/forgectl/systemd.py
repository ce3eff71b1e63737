"""What forgectl asks of systemd, through its own commands."""

import base64
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from forgectl.errors import ForgeError

WAIT_SECONDS = 0.2
# CPUWeight= and IOWeight= of what must not be in the way of a slot that serves, which has 100.
BEHIND = 20
NICE = 10
# Of a long log line, as one with a traceback is, the characters at its start and its end say most.
LINE_START, LINE_END = 200, 500
# What a credential begins with that the host's key alone opens (CRED_AES256_GCM_BY_HOST of systemd's creds-util.h).
BY_HOST = bytes.fromhex("5a1c6a86df9d4096b1d5a65e0862f19a")
# Of the memory that nobody uses, what a build may take.
BUILD_SHARE = 0.75
UNIT_PROPERTIES = ("ActiveState", "SubState", "Result", "NRestarts", "Job", "ExecMainStatus", "MainPID")


def run(*command: str, data: bytes | None = None) -> bytes:
    """Run a command and return its output.

    Raises:
        ForgeError: it failed; the message holds its own last words.
    """
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise ForgeError(f"expected the command {command[0]} on this host; found none; install it") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise ForgeError(f"{' '.join(command)} failed: {words}")
    return done.stdout


def daemon_reload() -> None:
    run("systemctl", "daemon-reload")


def is_behind(*units: str) -> bool:
    """Whether systemd has one of these units as it was before its files changed: a reload failed, or never came."""
    return b"yes" in run("systemctl", "show", "--value", "--property", "NeedDaemonReload", *units).split()


def start(*units: str, block: bool = True) -> None:
    """Start units; without `block` only ask for it."""
    run("systemctl", "start", *(() if block else ("--no-block",)), *units)


def restart(unit: str) -> None:
    """Ask for a fresh start of a unit; one that runs is stopped first."""
    run("systemctl", "restart", "--no-block", unit)


def enable(*units: str, now: bool) -> None:
    """Have units start with the host, and `now` as well."""
    run("systemctl", "enable", "--quiet", *(["--now"] if now else []), *units)


def disable(*units: str) -> None:
    """Stop units, now and with the next boot."""
    run("systemctl", "disable", "--quiet", "--now", *units)


def reload(unit: str) -> None:
    """Have a unit that runs read its configuration anew; wait until it has."""
    if show(unit)["ActiveState"] == "active":
        run("systemctl", "reload", unit)


def is_wanted(unit: str) -> bool:
    """Whether a unit runs or is about to."""
    found = show(unit)
    return found["ActiveState"] in ("active", "activating") or found["Job"] != "0"


def is_up(unit: str) -> bool:
    """Whether something of a unit runs, if only its end."""
    return show(unit)["ActiveState"] in ("activating", "active", "reloading", "deactivating")


def started(unit: str) -> datetime:
    """When the process of a unit that runs was started."""
    name = "ExecMainStartTimestampMonotonic"
    ago = time.clock_gettime(time.CLOCK_MONOTONIC) - int(properties(unit, name)[name] or 0) / 1e6
    return datetime.now(UTC) - timedelta(seconds=ago)


def set_weight(unit: str, weight: int) -> None:
    """Give a unit a share of the CPU, 1 to 10000 where 100 is usual, until the next boot."""
    run("systemctl", "set-property", "--runtime", unit, f"CPUWeight={weight}")


def step_back() -> None:
    """Have this process, and what it calls, get the CPU and the disk after whatever serves.

    A nice value counts among the processes of one control group alone, and those of whoever is logged in weigh as much
    as all services together: so it moves into a scope with a small weight, where it may.
    """
    if os.geteuid() != 0:
        os.nice(NICE)
        return
    if "INVOCATION_ID" in os.environ:
        # The unit that it is of has a weight of its own, and must not lose its process.
        return
    manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
    process, weight = str(os.getpid()), str(BEHIND)
    properties = ("PIDs", "au", "1", process, "CPUWeight", "t", weight, "IOWeight", "t", weight)
    arguments = ("ssa(sv)a(sa(sv))", f"forge-behind-{process}.scope", "fail", "3", *properties, "0")
    # Without systemd, on whatever it may be called, it works all the same.
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["busctl", "--quiet", "call", *manager, "StartTransientUnit", *arguments],
            capture_output=True,
            timeout=1,
            check=False,
        )


def memory(unit: str) -> int:
    """The bytes of memory that a unit's processes allocated, whatever kind of cgroups the host has.

    What several of them share after a fork is counted once, in parts: the workers of a slot share what its master has.
    """
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        # Any of them may end meanwhile.
        with suppress(OSError):
            if f"/{unit}" in (process / "cgroup").read_text():
                match = re.search(r"^Pss_Anon:\s+(\d+) kB$", (process / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(match[1]) * 1024 if match else 0
    return total


def memory_available(root: Path = Path("/")) -> int:
    """The bytes of memory that this host can give without taking them from anyone (proc_meminfo(5))."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
    if match is None:
        raise ForgeError("expected MemAvailable in /proc/meminfo; found none; report this")
    return int(match[1]) * 1024


def memory_limit(unit: str) -> int:
    """MemoryMax= of a unit in bytes; 0 when it has none."""
    value = run("systemctl", "show", "--value", "--property", "MemoryMax", unit).decode().strip()
    return int(value) if value.isdigit() else 0


def stop(*units: str) -> None:
    """Stop units, wait until they have, and forget that they failed."""
    run("systemctl", "stop", *units)
    subprocess.run(["systemctl", "reset-failed", *units], capture_output=True, check=False)


def show(unit: str) -> dict[str, str]:
    """The properties of a unit that forgectl decides by."""
    output = run("systemctl", "show", "--property", ",".join(UNIT_PROPERTIES), unit).decode()
    found = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    # Where no job is queued, systemctl prints 0 in one version and nothing in another.
    return found | {"Job": found["Job"] or "0"}


def properties(unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit, as systemd prints them."""
    output = run("systemctl", "show", "--property", ",".join(names), unit).decode()
    found = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    return {name: found.get(name, "") for name in names}


def wait_ended(unit: str) -> None:
    """Wait until a unit that runs, or is asked to, has ended; then forget how."""
    while (found := show(unit))["Job"] != "0" or found["ActiveState"] in ("active", "activating", "deactivating"):
        time.sleep(WAIT_SECONDS)
    stop(unit)


def active_units(pattern: str) -> list[str]:
    """Units of that name that run or are about to."""
    output = run(
        "systemctl", "list-units", "--plain", "--no-legend", "--state=active,activating,deactivating", pattern
    ).decode()
    return [line.split()[0] for line in output.splitlines() if line.strip()]


def journal(unit: str, since: float, lines: int = 30) -> str:
    """What a unit's own processes said since a Unix time: its last lines, each without the middle of a long one."""
    subprocess.run(["journalctl", "--sync"], capture_output=True, check=False)
    # Not by --lines, which before systemd 254 counts from --since.
    output = run("journalctl", f"_SYSTEMD_UNIT={unit}", f"--since=@{since:.6f}", "--output=cat", "--no-pager")
    return "\n".join(
        line if len(line) <= LINE_START + LINE_END else f"{line[:LINE_START]} ... {line[-LINE_END:]}"
        for line in output.decode(errors="replace").strip().splitlines()[-lines:]
    )


def decrypt(path: Path, name: str) -> str:
    """The content of a sealed credential whose embedded name is `name`."""
    return run("systemd-creds", "decrypt", f"--name={name}", str(path), "-").decode()


def encrypt(value: str, name: str, keys: Sequence[str] | None = None) -> bytes:
    """Seal a value; it goes through a pipe, never to the disk or a command line.

    It is sealed with the first of `keys` that works, by default the best that this host has.

    Raises:
        ForgeError: none does.
    """
    *better, last = keys or sealing_keys()
    for key in better:
        with suppress(ForgeError):
            return _seal(value, name, key)
    return _seal(value, name, last)


def _seal(value: str, name: str, key: str) -> bytes:
    # Bound to the chip, and to no state of the machine (PCRs): an update of the firmware or of Secure Boot's lists must
    # not keep the app from starting after a reboot.
    options = (f"--with-key={key}", "--tpm2-pcrs=", f"--name={name}", "-", "-")
    sealed = run("systemd-creds", "encrypt", *options, data=value.encode())
    # A TPM may be there and yet not work: without its libraries, locked, or unable to open what it has sealed.
    run("systemd-creds", "decrypt", f"--name={name}", "-", "-", data=sealed)
    return sealed


def sealing_keys() -> list[str]:
    """The keys that `systemd-creds encrypt` may use here, best first: the host's own, with TPM 2 where there is one.

    has-tpm2 wants firmware, driver and kernel to have it, and from systemd 255 on the libraries too; where one of them
    is missing it exits with other than 0. Never `auto`, which leaves out the host's key while /var is in memory.
    """
    found = subprocess.run(["systemd-creds", "has-tpm2", "--quiet"], capture_output=True, check=False).returncode == 0
    return ["host+tpm2", "host"] if found else ["host"]


def sealed_with(path: Path) -> str:
    """The keys that a sealed credential needs to be opened."""
    return "host key" if base64.b64decode(path.read_bytes())[: len(BY_HOST)] == BY_HOST else "host key and TPM 2"


def run_sandboxed(
    command: Sequence[str],
    *,
    unit: str,
    user: str,
    writable: Sequence[Path],
    hidden: Sequence[Path],
    environment: Mapping[str, str],
    environment_file: Path,
) -> None:
    """Run a command as `user` in the transient unit `unit` that may write only to `writable`.

    Of what is below `hidden`, it sees nothing else.

    What serves goes before it: in CPU time, and in memory, of which it may have most of what nobody uses. It ends with
    the caller; one that outlived a killed caller is stopped first.

    Raises:
        ForgeError: it failed; the message holds its own last lines.
    """
    properties = {
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "PrivateDevices": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "RestrictSUIDSGID": "yes",
        "TemporaryFileSystem": " ".join(f"{folder}:ro" for folder in hidden),
        "BindPaths": " ".join(map(str, writable)),
        "UMask": "0022",
        # A nice value counts among the processes of a unit alone.
        "CPUWeight": "10",
        "IOWeight": "10",
        "MemoryMax": str(int(memory_available() * BUILD_SHARE)),
        "OOMScoreAdjust": "1000",
        "TasksMax": "1024",
        "RuntimeMaxSec": "15min",
    }
    if environment_file.exists():
        properties["EnvironmentFile"] = str(environment_file)
    arguments = [
        "systemd-run",
        "--quiet",
        f"--unit={unit}",
        "--wait",
        "--pipe",
        "--collect",
        f"--uid={user}",
        f"--gid={user}",
        *(f"--property={key}={value}" for key, value in properties.items()),
        *(f"--setenv={key}={value}" for key, value in environment.items()),
        "--",
        *command,
    ]
    halt = ["systemctl", "stop", unit]
    subprocess.run(halt, capture_output=True, check=False)
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except BaseException:
        subprocess.run(halt, capture_output=True, check=False)
        raise
    if done.returncode:
        words = done.stdout.decode(errors="replace").strip().splitlines()[-20:]
        raise ForgeError("\n".join([f"{os.path.basename(command[0])} failed:", *words]))  # noqa: PTH119
