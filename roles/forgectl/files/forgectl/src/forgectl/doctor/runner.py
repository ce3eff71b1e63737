"""Running the checks side by side, each with a limit of its time, and so that an app never waits for the CPU."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

from forgectl.doctor.findings import HOST, Finding, Looked, Outcome, Report, urgency
from forgectl.doctor.sight import Sight, Unseen
from forgectl.state import now

# All checks begin at once, so this bounds the whole as well.
CHECK_SECONDS = 2.2
# On a host whose CPUs are all taken, everything takes longer, and that is no reason to see less.
BUSY, PATIENCE = 1.5, 3.0


class Check(NamedTuple):
    """One look; `root`: who else sees nothing of it. `anywhere`: also on a host that was never provisioned."""

    name: str
    look: Callable[[Sight], Iterable[Finding]]
    root: bool = False
    anywhere: bool = False


@dataclass
class _Running:
    check: Check
    began: float = field(default_factory=time.monotonic)
    findings: list[Finding] = field(default_factory=list)
    looked: Looked | None = None


def examine(sight: Sight, checks: Sequence[Check]) -> Report:
    """Run all checks that make sense here, and return what they say.

    A check that hangs is left behind in its thread: whoever calls this must not wait for it when the process ends.
    """
    began, at = time.monotonic(), now()
    sight.patience = patience(sight.root)
    provisioned = sight.provisioned
    wanted, looked, findings = [], [], []
    for check in checks:
        if check.root and not sight.is_root:
            looked.append(Looked(check.name, 0, "skipped", "only root sees that"))
        elif not (check.anywhere or provisioned):
            looked.append(Looked(check.name, 0, "skipped", "the host was never provisioned"))
        else:
            wanted.append(check)
    # Before they race for it: each property of its own would be made by several of them.
    _ = sight.apps
    for running in _side_by_side(sight, wanted):
        taken = time.monotonic() - running.began
        result = running.looked or Looked(running.check.name, taken, "too slow", f"no answer within {taken:.1f} s")
        looked.append(result)
        # What it saw before it failed counts.
        findings += list(running.findings)
        if result.outcome in ("failed", "too slow"):
            findings.append(_unseen(result))
    blind = [each.name for each in looked if each.outcome == "skipped" and each.why.startswith("only root")]
    if blind:
        findings.append(_not_root(blind))
    return Report(
        socket.gethostname(), at, time.monotonic() - began, sorted(findings, key=urgency), _in_order(looked, checks)
    )


def patience(root: Path = Path("/")) -> float:
    """By how much time limits are stretched."""
    with suppress(OSError, ValueError, IndexError):
        load = float((root / "proc/loadavg").read_text().split()[0])
        return PATIENCE if load > BUSY * (os.cpu_count() or 1) else 1.0
    return 1.0


def _side_by_side(sight: Sight, checks: Sequence[Check]) -> list[_Running]:
    done: SimpleQueue[_Running] = SimpleQueue()
    running = [_Running(check) for check in checks]
    for each in running:
        Thread(target=_look, args=(sight, each, done), daemon=True).start()
    deadline = time.monotonic() + CHECK_SECONDS * sight.patience
    for _ in running:
        try:
            done.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            break
    return running


def _look(sight: Sight, running: _Running, done: "SimpleQueue[_Running]") -> None:
    why = ""
    try:
        # One by one, so that what was found by then is there when the time is up.
        for finding in running.check.look(sight):
            running.findings.append(finding)
    except Unseen as error:
        why = str(error)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    outcome: Outcome = "failed" if why else "found" if running.findings else "ok"
    running.looked = Looked(running.check.name, time.monotonic() - running.began, outcome, why)
    done.put(running)


def _unseen(looked: Looked) -> Finding:
    return Finding(
        "F002",
        HOST,
        f"the check {looked.name} could not look: {looked.why}",
        (f"check {looked.name}: {looked.outcome} after {looked.seconds:.1f} s",),
        "sudo forgectl doctor",
    )


def _not_root(blind: Sequence[str]) -> Finding:
    return Finding(
        "F001",
        HOST,
        f"not called by root: {len(blind)} checks could not look",
        (f"not seen: {', '.join(sorted(blind))}",),
        "sudo forgectl doctor",
    )


def _in_order(looked: Sequence[Looked], checks: Sequence[Check]) -> list[Looked]:
    places = {check.name: place for place, check in enumerate(checks)}
    return sorted(looked, key=lambda each: places[each.name])
