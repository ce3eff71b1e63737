"""What the last words of a release that did not start most often mean, and which option of its entry mends it."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from forgectl.config import App

# TCP_LISTEN in include/net/tcp_states.h
LISTENING = "0A"

LEAVES = "it ends its own worker, or forks into the background as a daemon does"
COMMAND = "what runs beside it a command under apps.{}.commands"

# What a log says: what that means. {app} is the entry, {state} the app's own folder; groups of the pattern by number.
SAID = (
    (
        r"(?:PermissionError: \[Errno 13\]|OSError: \[Errno 30\])[^'\n]*'(/[^'\n]*)'",
        "it writes to {0}, and of all folders only its home {state} and /tmp are its own: name one of these in "
        "{app}.settings, if it has a setting for it",
    ),
    (
        r"\[Errno 98\]|[Aa]ddress already in use",
        "it binds a port of its own, which can be had once and not by each worker: leave that to {app}.module, which "
        "names what is served, or make it a command under {app}.commands",
    ),
    (
        r"ModuleNotFoundError: No module named '([^'\n]+)'",
        "{0} is neither in its lock nor below {app}.python_path: correct the lock, {app}.module or {app}.python_path",
    ),
    (
        r"Failed to find attribute '([^'\n]+)' in '([^'\n]+)'|AppImportError",
        "{app}.module names something that is not there: correct it",
    ),
    (
        r"KeyError: '([A-Z][A-Z0-9_]+)'",
        "it needs the environment variable {0}: set it in {app}.settings or, if it is secret, map it in "
        "{app}.secrets.variables",
    ),
    (
        r"validation errors? for (\w*(?:[Ss]ettings|[Cc]onfig)\w*)",
        "a variable that its {0} reads is missing or wrong: set it in {app}.settings or, if it is secret, map it in "
        "{app}.secrets.variables",
    ),
    (
        r"write\+execute memory|executable memory|Unable to allocate section memory",
        "it makes machine code while it runs: set {app}.executable_memory",
    ),
    (
        r"BlockingIOError: \[Errno 11\]|can't start new thread",
        "it needs more processes or threads than it may have: raise {app}.tasks_max",
    ),
)


def of_log(app: App, lines: str) -> str:
    """What the last log lines mean, in words; empty when nobody knows."""
    where = {"app": f"apps.{app.name}", "state": f"/var/lib/{app.name}"}
    for pattern, meaning in SAID:
        if found := list(re.finditer(pattern, lines)):
            return meaning.format(*(group or "" for group in found[-1].groups()), **where)
    return ""


def of_end(app: App, found: Mapping[str, str]) -> str:
    """What it means that a server is at its end, by the properties of its unit; empty where other things tell more."""
    if found["ActiveState"] == "active":
        return ""
    if found["Result"] == "oom-kill":
        return (
            f"it takes more memory than it may: raise apps.{app.name}.memory_max_mib, or lower apps.{app.name}.workers"
        )
    if (found["Result"], found["ExecMainStatus"]) == ("success", "0"):
        return (
            f"{LEAVES}: have apps.{app.name}.module make the app and nothing else, and make {COMMAND.format(app.name)}"
        )
    return ""


def of_processes(app: App, unit: str, main: str, root: Path = Path("/")) -> str:
    """What the processes of a unit do that a server's must not, in words: listen by themselves, or run away."""
    processes = list(_processes(unit, root))
    listening = _listening(processes, root)
    if listening:
        return (
            f"it listens on port {', '.join(map(str, listening))} by itself and is not served by the platform: keep "
            f"what starts a server, as uvicorn.run(), out of the import of apps.{app.name}.module, behind "
            "`if __name__ == '__main__':`"
        )
    if [process for process in processes if is_orphan(process.name, root) and process.name != main]:
        return f"{LEAVES}: have apps.{app.name}.module stay in the foreground, and make {COMMAND.format(app.name)}"
    return ""


def _processes(unit: str, root: Path) -> Iterable[Path]:
    for process in (root / "proc").glob("[0-9]*"):
        # Any of them may end meanwhile.
        with suppress(OSError):
            if f"/{unit}" in (process / "cgroup").read_text():
                yield process


def is_orphan(process: str, root: Path = Path("/")) -> bool:
    """Whether a process has left who made it, and nobody will replace it when it ends."""
    # The app may have said which one.
    if not process.isdecimal():
        return False
    with suppress(OSError):
        # The name, in parentheses, may hold anything.
        return (root / "proc" / process / "stat").read_text().rpartition(")")[2].split()[1] == "1"
    return False


def _listening(processes: Iterable[Path], root: Path) -> list[int]:
    """The TCP ports that some processes listen on."""
    sockets = set()
    for process in processes:
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    sockets.add(str(descriptor.readlink()))
    ports = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (root / "proc/net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and f"socket:[{fields[9]}]" in sockets:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return sorted(ports)
