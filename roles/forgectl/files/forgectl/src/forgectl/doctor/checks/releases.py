"""The live release: its files, and whether what it needs is in the environment of its processes."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from forgectl import staging
from forgectl.doctor.findings import Finding
from forgectl.doctor.sight import AppSight, Sight, Unseen
from forgectl.errors import Refused
from forgectl.layout import walk

# Of a larger release only modes and owners are looked at, so that it takes no time from anybody.
LARGEST_BYTES, MOST_FILES = 64 * 1024 * 1024, 5000
SHOWN = 5


def intact(sight: Sight) -> Iterator[Finding]:
    """F209: files of the live release that the app cannot read, that somebody may write, or that changed."""
    for app in sight.serving:
        folder = app.layout.releases / app.live.release
        mend = f"sudo forgectl rollback {app.name}"
        if not folder.is_dir():
            evidence = [f"{folder}: no such folder"]
            yield Finding("F209", app.name, f"its live release {app.live.release} is gone", evidence, mend)
            continue
        problems, small = _modes(app, folder)
        if problems:
            title = f"{len(problems)} files of its live release have the wrong owner or mode: {problems[0]}"
            yield Finding("F209", app.name, title, tuple(problems[:SHOWN]), f"sudo forgectl recover {app.name}")
        record = next((each for each in staging.records(app.layout) if each.id == app.live.release), None)
        if record and small:
            try:
                staging.check_intact(app.layout, record)
            except Refused as error:
                yield Finding("F209", app.name, "its live release was changed since it was made", (str(error),), mend)


def variables(sight: Sight) -> Iterator[Finding]:
    """F211: names of variables that the live release has, and its running process has not; no value is compared."""
    for app in sight.serving:
        pid = sight.unit(app.service)["MainPID"]
        if app.running is None or pid in ("", "0"):
            continue
        try:
            data = sight.at(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            # It ended meanwhile.
            continue
        present = {part.partition(b"=")[0].decode(errors="replace") for part in data.split(b"\0")}
        # The launcher becomes the server only once it has everything.
        if "LISTEN_FDS" not in present or b"forge-launch" in _command(sight, pid):
            continue
        missing = sorted({*app.running.settings, *app.running.variables} - present)
        if missing:
            title = f"{len(missing)} variables of its release are not in its environment: {', '.join(missing)}"
            evidence = [
                f"/proc/{pid}/environ of {app.service} has {len(present)} names; {app.live.release} needs more",
            ]
            yield Finding("F211", app.name, title, evidence, f"sudo forgectl recycle {app.name}")


def _command(sight: Sight, pid: str) -> bytes:
    with suppress(OSError):
        return sight.at(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _modes(app: AppSight, folder: Path) -> tuple[list[str], bool]:
    """What is not as a release is sealed: root's, readable to the app's group, writable to nobody; and if it is small.

    Raises:
        Unseen: the folder of the releases says nothing of the group.
    """
    try:
        group = app.layout.releases.stat().st_gid
    except OSError as error:
        raise Unseen(f"{app.layout.releases}: {error.strerror}") from None
    problems, size, count = [], 0, 0
    for path in walk(folder):
        with suppress(FileNotFoundError):
            status = path.lstat()
            size, count = size + status.st_size, count + 1
            if stat.S_ISLNK(status.st_mode):
                continue
            wanted = stat.S_IRGRP | (stat.S_IXGRP if stat.S_ISDIR(status.st_mode) else 0)
            owned = (status.st_uid, status.st_gid) == (os.geteuid(), group)
            if not owned or status.st_mode & 0o222 or status.st_mode & wanted != wanted:
                mode = stat.S_IMODE(status.st_mode)
                problems.append(f"{path}: uid {status.st_uid}, gid {status.st_gid}, {mode:04o}")
    return problems, size <= LARGEST_BYTES and count <= MOST_FILES
