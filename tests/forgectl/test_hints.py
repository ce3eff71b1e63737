"""hints.py: what a log means, and what the processes of a unit do that a server's must not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import describe
from forgectl import config, hints
from forgectl.config import App


@pytest.fixture
def app() -> App:
    return config.decode(describe().encode(), Path("inbox.toml"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "PermissionError: [Errno 13] Permission denied: '/srv/inbox/releases/R/source/x.db'",
            "it writes to /srv/inbox/",
        ),
        ("OSError: [Errno 30] Read-only file system: '/etc/x'", "only its home /var/lib/inbox and /tmp are its own"),
        ('"exception": "...\\nPermissionError: [Errno 13] Permission denied: \'/srv/x\'"', "it writes to /srv/x,"),
        ("OSError: [Errno 98] Address already in use", "apps.inbox.module, which names what is served"),
        ("[ERROR] error while attempting to bind on address ('0.0.0.0', 80): address already in use", "binds a port"),
        (
            "ModuleNotFoundError: No module named 'redis'",
            "redis is neither in its lock nor below apps.inbox.python_path",
        ),
        ("gunicorn.errors.AppImportError: Failed to find attribute 'a' in 'b'.", "apps.inbox.module names something"),
        ("KeyError: 'STRIPE_KEY'", "STRIPE_KEY: set it in apps.inbox.settings or, if it is secret"),
        ("pydantic_core.ValidationError: 2 validation errors for AppSettings", "its AppSettings reads is missing"),
        ("BlockingIOError: [Errno 11] Resource temporarily unavailable", "raise apps.inbox.tasks_max"),
        ("MemoryError: Cannot allocate write+execute memory for ffi.callback()", "set apps.inbox.executable_memory"),
        ("KeyError: 'lower case'", ""),
        ("PermissionError: [Errno 1] Operation not permitted", ""),
        ("something else", ""),
    ],
)
def test_a_log_is_told_in_words(app: App, line: str, expected: str) -> None:
    found = hints.of_log(app, f"before\n{line}\nafter")
    assert expected in found
    assert bool(found) == bool(expected)


def fake(root: Path, process: int, unit: str, parent: int) -> Path:
    """A process below a root of its own."""
    folder = root / "proc" / str(process)
    (folder / "fd").mkdir(parents=True)
    (folder / "cgroup").write_text(f"0::/system.slice/{unit}\n")
    (folder / "stat").write_text(f"{process} (a ) b) S {parent} 0 0\n")
    return folder


def test_processes_that_left_their_maker_are_told(app: App, tmp_path: Path) -> None:
    """But not the main process, which has none."""
    fake(tmp_path, 10, "inbox@blue.service", 1)
    fake(tmp_path, 11, "inbox@blue.service", 10)
    fake(tmp_path, 12, "other@blue.service", 1)
    assert hints.of_processes(app, "inbox@blue.service", "10", tmp_path) == ""
    fake(tmp_path, 13, "inbox@blue.service", 1)
    assert "as a daemon does: have apps.inbox.module" in hints.of_processes(app, "inbox@blue.service", "10", tmp_path)


@pytest.mark.parametrize(
    ("state", "result", "status", "expected"),
    [
        ("inactive", "success", "0", "it ends its own worker, or forks into the background"),
        ("activating", "oom-kill", "9", "raise apps.inbox.memory_max_mib"),
        ("failed", "exit-code", "3", ""),
        ("active", "success", "0", ""),
    ],
)
def test_an_end_is_told_in_words(app: App, state: str, result: str, status: str, expected: str) -> None:
    found = hints.of_end(app, {"ActiveState": state, "Result": result, "ExecMainStatus": status})
    assert expected in found
    assert bool(found) == bool(expected)


def test_a_listener_of_its_own_is_told(app: App, tmp_path: Path) -> None:
    """By the kernel's own table, of a socket that is really open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, inode = server.getsockname()[1], os.fstat(server.fileno()).st_ino
        (tmp_path / "proc/net").mkdir(parents=True)
        (tmp_path / "proc/net/tcp").write_text(Path("/proc/net/tcp").read_text())
    (fake(tmp_path, 11, "inbox@blue.service", 10) / "fd/5").symlink_to(f"socket:[{inode}]")
    assert f"it listens on port {port} by itself" in hints.of_processes(app, "inbox@blue.service", "10", tmp_path)


def test_a_real_process_has_its_parent() -> None:
    """The format is the kernel's."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert not hints.is_orphan(str(child.pid))
    finally:
        child.communicate(b"\n")
    assert not hints.is_orphan("no such process")


def test_what_an_app_says_is_no_path(tmp_path: Path) -> None:
    """The name of its worker comes with its answer."""
    (tmp_path / "proc/1").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in ("proc/1", "elsewhere"):
        (tmp_path / folder / "stat").write_text("1 (x) S 1 1")
    assert hints.is_orphan("1", tmp_path)
    assert not hints.is_orphan("../elsewhere", tmp_path)
