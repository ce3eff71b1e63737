"""The processes of live slots: those that were killed, their memory, their files, and whether their loops turn."""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from forgectl import systemd
from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import HOUR, NGINX, AppSight, Process, Sight, ago, message, moment, shorten, size

# systemd's message of a unit that lost a process to the kernel (SD_MESSAGE_UNIT_OUT_OF_MEMORY of sd-messages.h).
OUT_OF_MEMORY = "fe6faa94e7774663a0da52717891d8ef"  # pragma: allowlist secret
# What Gunicorn's master says of its workers.
TIMED_OUT = re.compile(r"WORKER TIMEOUT \(pid:(\d+)\)")
KILLED = re.compile(r"Worker \(pid:(\d+)\) was sent SIGKILL")
# One that is over and was replaced is for the record; several, or one just now, are not.
OFTEN, NOW_SECONDS = 3, 30.0
# Recycling comes before that.
NEAR = 0.85
DESCRIPTORS_NEAR = 0.8
# A worker's loop wakes ten times a second (uvicorn's main loop), whether there are requests or not.
WATCHED_SECONDS = 1.0
# So long a worker may import the app.
YOUNG_SECONDS = 15.0
ASLEEP = 0.1


class Turns(NamedTuple):
    """What a thread has done so far: how often it gave the CPU away, and the seconds that it had it."""

    switches: int
    seconds: float


def kills(sight: Sight) -> Iterator[Finding]:
    """F204 and F205: workers that were killed since the live service started, in the last hour."""
    for app in sight.serving:
        unit = sight.unit(app.service)
        since = min(HOUR, ago(unit["ExecMainStartTimestampMonotonic"]))
        # The master's own lines: those of requests may be thousands a second.
        of_master = (f"_SYSTEMD_UNIT={app.service}", f"_PID={unit['MainPID']}")
        of_systemd = (f"MESSAGE_ID={OUT_OF_MEMORY}", f"UNIT={app.service}")
        entries = sight.journal(*of_master, "+", *of_systemd, since=since, lines=500)
        late: dict[str, tuple[float, str]] = {}
        killed: list[tuple[float, str]] = []
        for entry in entries:
            text, at = message(entry), moment(entry)
            if found := TIMED_OUT.search(text):
                late[found[1]] = at, text
            elif entry.get("MESSAGE_ID") == OUT_OF_MEMORY or ((found := KILLED.search(text)) and found[1] not in late):
                killed.append((at, text))
        # A kill may have a line of each of both.
        killed = [each for n, each in enumerate(killed) if not n or each[0] - killed[n - 1][0] > 1.5]
        recycle = f"sudo forgectl recycle {app.name}"
        yield from _killed(app, "F204", "killed for the memory that they took", killed, recycle)
        rollback = f"sudo forgectl rollback {app.name}"
        yield from _killed(app, "F205", "killed because their event loop stood still", sorted(late.values()), rollback)


def memory(sight: Sight) -> Iterator[Finding]:
    """F206: what a live slot has allocated, against its limit."""
    for app in sight.serving:
        limit = sight.unit(app.service)["MemoryMax"]
        if not limit.isdigit():
            continue
        used = systemd.memory(app.service)
        if used >= NEAR * int(limit):
            title = f"its workers have {size(used)} of the {size(int(limit))} that they may have"
            evidence = [f"{app.service}: MemoryMax={size(int(limit))}; /proc/PID/smaps_rollup: Pss_Anon {size(used)}"]
            yield Finding("F206", app.name, title, evidence, f"sudo forgectl recycle {app.name}")


def descriptors(sight: Sight) -> Iterator[Finding]:
    """F210: open files of each process of an app and of Nginx, against its limit."""
    owners = [(app.name, app.service, f"sudo forgectl recycle {app.name}") for app in sight.serving]
    for subject, unit, mend in [*owners, (HOST, NGINX, "sudo systemctl reload nginx")]:
        near = []
        for process in sight.tree(unit):
            used, limit = _files(sight, process.pid)
            if limit and used >= DESCRIPTORS_NEAR * limit:
                near.append(f"process {process.pid} ({process.name}) of {unit}: {used} of {limit} open files")
        if near:
            yield Finding("F210", subject, near[0], tuple(near), mend)


def event_loops(sight: Sight) -> Iterator[Finding]:
    """F207: workers that neither wait for work nor do any: something in the app sleeps, and its requests with it."""
    watched = {process.pid: (app, process) for app in sight.serving for process in _workers(sight, app)}
    before = {pid: turns for pid in watched if (turns := _turns(sight, pid))}
    if not before:
        return
    time.sleep(WATCHED_SECONDS)
    stuck: dict[str, list[str]] = {}
    for pid, was in before.items():
        is_now, (app, process) = _turns(sight, pid), watched[pid]
        if is_now and is_now.switches == was.switches and is_now.seconds - was.seconds < ASLEEP:
            where = ""
            with suppress(OSError):
                where = (sight.at(f"/proc/{pid}") / "wchan").read_text().strip("0\n")
            line = f"worker {pid} ({process.name}) did not run for {WATCHED_SECONDS:.0f} s" + (
                f"; it sleeps in {where}" if where else ""
            )
            stuck.setdefault(app.name, []).append(line)
    for name, lines in stuck.items():
        of = sum(app.name == name for app, _ in watched.values())
        title = f"the event loop of {len(lines)} of its {of} workers stands still while the CPU idles"
        yield Finding("F207", name, title, tuple(lines), f"sudo forgectl recycle {name}")


def _killed(app: AppSight, code: str, how: str, events: list[tuple[float, str]], mend: str) -> Iterator[Finding]:
    if not events:
        return
    newest = time.time() - events[-1][0]
    number = f"{len(events)} of its workers were" if len(events) > 1 else "one of its workers was"
    title = f"{number} {how if len(events) > 1 else how.replace('they', 'it').replace('their', 'its')}"
    evidence = tuple(f"journal of {app.service}: {shorten(text)}" for _, text in events[-3:])
    over = len(events) < OFTEN and newest > NOW_SECONDS
    yield Finding(code, app.name, f"{title}, last {newest:.0f} s ago", evidence, mend, over=over)


def _workers(sight: Sight, app: AppSight) -> list[Process]:
    unit = sight.unit(app.service)
    if unit["ActiveState"] != "active" or ago(unit["ActiveEnterTimestampMonotonic"]) < YOUNG_SECONDS:
        return []
    return [
        process
        for process in sight.tree(app.service)
        if str(process.parent) == unit["MainPID"] and _age(sight, process.pid) > YOUNG_SECONDS
    ]


def _age(sight: Sight, pid: int) -> float:
    """The seconds since a process began, by proc_pid_stat(5)."""
    with suppress(OSError, IndexError, ValueError):
        ticks = int(sight.at(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100
    return 0.0


def _turns(sight: Sight, pid: int) -> Turns | None:
    """What the main thread of a process, which has the event loop, has done; None where it is gone."""
    folder = sight.at(f"/proc/{pid}/task/{pid}")
    with suppress(OSError, ValueError, IndexError):
        switches = re.findall(r"ctxt_switches:\s+(\d+)", (folder / "status").read_text())
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        # USER_HZ, which is 100 wherever Linux tells anybody of it.
        return Turns(sum(map(int, switches)), (int(fields[11]) + int(fields[12])) / 100)
    return None


def _files(sight: Sight, pid: int) -> tuple[int, int]:
    """How many files a process has open, and may have."""
    folder = sight.at(f"/proc/{pid}")
    with suppress(OSError):
        found = re.search(r"^Max open files\s+(\d+)", (folder / "limits").read_text(), re.MULTILINE)
        return sum(1 for _ in (folder / "fd").iterdir()), int(found[1]) if found else 0
    return 0, 0
