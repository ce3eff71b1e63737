"""Room on the disks of this host, in bytes and in files."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import Sight, size

GIB = 1024**3
# Nearly full: so small a share is left, and of a large disk so little besides.
LEFT, LEFT_BYTES = 0.10, 10 * GIB
INODES_LEFT = 0.10
# File systems that hold what somebody writes. One over a network may hang whoever asks, and is another host's.
KINDS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "vfat"}
# In memory, and of nobody who writes much.
SYSTEM = ("/dev", "/proc", "/sys", "/run/credentials", "/run/user", "/run/lock")
ROOM = "sudo journalctl --vacuum-size=256M"


class Mount(NamedTuple):
    """A place where a file system begins, and which it is."""

    path: str
    kind: str


def disks(sight: Sight) -> Iterator[Finding]:
    """F601, F602 and F605: every file system of this host that can be written to."""
    for mount in mounts(sight):
        with suppress(OSError):
            status = _room(sight, mount.path)
            total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
            # What root alone may still write is nobody's.
            usable = total - (status.f_bfree - status.f_bavail) * status.f_frsize
            if usable and free < LEFT * usable and free < LEFT_BYTES:
                used = f"{1 - free / usable:.0%} full" if free else "full"
                title = f"{mount.path} is {used}: {size(free)} of {size(usable)} left"
                evidence = [f"statvfs {mount.path} ({mount.kind}): {free} of {usable} bytes free"]
                if mount.path == "/tmp":
                    yield Finding("F605", HOST, title, evidence, "sudo du -xhd1 /tmp")
                else:
                    yield Finding(
                        "F601", HOST, title, evidence, f"sudo du -xhd2 {mount.path}" if mount.path != "/" else ROOM
                    )
            if status.f_files and status.f_favail < INODES_LEFT * status.f_files:
                title = f"{mount.path} has {status.f_favail} of {status.f_files} inodes left"
                evidence = [f"statvfs {mount.path} ({mount.kind}): {status.f_favail} of {status.f_files} files free"]
                yield Finding("F602", HOST, title, evidence, f"sudo du -x --inodes -d2 {mount.path}")


def mounts(sight: Sight) -> list[Mount]:
    """Each file system once, by the shortest path that leads to it, if somebody may write there."""
    found: dict[tuple[int, int], Mount] = {}
    for line in sight.read("/proc/self/mounts").splitlines():
        _, path, kind, options, *_ = line.split()
        path = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), path)
        if kind not in KINDS or "ro" in options.split(",") or _is_system(path):
            continue
        with suppress(OSError):
            # Of what is mounted over another, the later one counts, which is the one that the path leads to.
            key = _device(sight, path), _room(sight, path).f_blocks
            if key not in found or len(path) < len(found[key].path):
                found[key] = Mount(path, kind)
    return list(found.values())


def _room(sight: Sight, path: str) -> os.statvfs_result:
    return os.statvfs(sight.at(path))


def _device(sight: Sight, path: str) -> int:
    return sight.at(path).stat().st_dev


def _is_system(path: str) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in SYSTEM) and path != "/dev/shm"
