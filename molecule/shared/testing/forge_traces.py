"""Where a host that runs shows secrets: memory file systems, units, processes, the journal."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from forge_scenario import CONTAINER, PODMAN, podman
from forge_search import Found, Search

# Prints an archive of what every process was started with: PID/UNIT/environ and PID/UNIT/cmdline.
PROCESSES = """
import io, pathlib, re, sys, tarfile
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            units = re.findall(r"[^/\\n]+[.](?:service|scope)$", (folder / "cgroup").read_text(), re.MULTILINE)
            for name in ("environ", "cmdline"):
                content = (folder / name).read_bytes()
                member = tarfile.TarInfo(f"{folder.name}/{units[-1] if units else '-'}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        except (FileNotFoundError, ProcessLookupError):
            pass
"""


@contextmanager
def output(*command: str) -> Iterator[IO[bytes]]:
    """What podman prints, as it comes."""
    with subprocess.Popen([PODMAN, *command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        except BaseException:
            # podman export does not end by itself when nobody reads on.
            process.kill()
            raise
    assert process.returncode == 0, command


def in_memory(search: Search) -> set[Found]:
    """Files in /run, /dev/shm, /tmp and the like."""
    find = ("findmnt", "--noheadings", "--list", "--output", "TARGET", "--types", "tmpfs,ramfs")
    mounts = podman("exec", CONTAINER, *find, text=True).stdout.split()
    assert {"/run", "/dev/shm"} <= set(mounts)
    command = f"tar --create {' '.join(mounts)} 2> /dev/null; test $? -le 1"
    with output("exec", CONTAINER, "sh", "-c", command) as stream:
        return search.archive(stream)


def in_units(search: Search) -> set[Found]:
    """Every property of every unit."""
    with output("exec", CONTAINER, "systemctl", "show", "--all", "*") as stream:
        return search.stream(stream, "units")


def in_processes(search: Search) -> set[Found]:
    """Environment and arguments of every process, the places being PID/UNIT/environ and PID/UNIT/cmdline."""
    with output("exec", CONTAINER, "python3", "-c", PROCESSES) as stream:
        return search.archive(stream)


def in_journal(search: Search) -> set[Found]:
    """All fields of all entries of all boots."""
    with output("exec", CONTAINER, "journalctl", "--all", "--output=export") as stream:
        return search.stream(stream, "journal")


def shown(search: Search) -> set[Found]:
    """All of that."""
    return in_memory(search) | in_units(search) | in_processes(search) | in_journal(search)
