"""A fault on a live host under moderate load: what clients saw, what doctor said, and how it healed in how long.

A test causes its fault inside of the context that the fixture `fault` makes, and mends it there, unless it heals alone:

    with fault("PostgreSQL stopped") as happening:
        host.check_output("systemctl stop postgresql@*")
        happening.told("F501")
        happening.mended_by("database-down")
        runbooks.follow("database-down", "Mend")

The end of the context waits until clients are served and doctor is as clean as before, and holds the fault to what
forge_reliability expects of it. Every fault that was seen is a line in the file that the environment names (RESULTS),
of which docs/reliability.md has its table. A conftest imports the fixture, and `say` and `site` of forge_events.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forge_load
import pytest
from forge_diagnosis import CLEAN, CRITICAL, WARNING
from forge_events import STEADY_RATE, Event, settle, table
from forge_load import lost_and_doubled, percentile
from forge_reliability import FAULTS, RESULTS
from forge_scenario import CONTAINER, PODMAN, Status, until
from testinfra.host import Host

DOCTOR_SECONDS = 60.0
"""A bound on a hang; how quick doctor has to be is for its own tests to say."""
BEFORE, AFTER = 3.0, 3.0
"""Seconds of load before a fault and after it has healed, in which nothing may fail."""
SERVED, ANSWERED = 3.0, 1.0
"""Clients are served again when all that was due between so many seconds ago was answered as it should."""
PATIENCE = 30.0
"""Seconds after which a client gives a request up."""
PAST = frozenset({"F803"})
"""Findings over the last hour, which tell of a fault that is over."""


@dataclass
class Fault(Event):
    """A fault, and what came of it."""

    said: dict[str, float] = field(default_factory=dict)
    """Seconds from the begin until doctor first said a code; what it said before the fault apart."""
    before: Sequence[dict[str, Any]] = ()
    """What it found before."""
    page: str = ""
    mending: float = 0.0
    """When its runbook's first command ran."""
    left: Sequence[str] = ()
    """What doctor found last that was not there before and has to be mended."""
    cleaned: float = 0.0
    """When doctor was as clean as before."""

    def look(self) -> set[str]:
        """Ask doctor, and return the codes of what was not there before; also of what has passed, which is a note."""
        known = {(each["code"], each["subject"]) for each in self.before}
        ours = {(each["code"], each["subject"]) for each in self.before if severe(each)}
        found = doctor()["findings"]
        # What was a note, as of a fault that is over, and is one no more, is new.
        new = [each for each in found if (each["code"], each["subject"]) not in (ours if severe(each) else known)]
        self.left = sorted({each["code"] for each in new if severe(each)})
        for each in new:
            self.said.setdefault(each["code"], time.time() - self.began)
        return {each["code"] for each in new}

    def clean(self) -> bool:
        """Whether doctor finds no more than before that anybody has to mend."""
        self.look()
        return not set(self.left) - PAST

    def told(self, *codes: str, within: float = 60.0) -> None:
        """Wait until doctor says all of these at once.

        Raises:
            AssertionError: it did not within so many seconds; the message has what it said.
        """
        deadline = time.monotonic() + within
        while not (found := self.look()) >= set(codes):
            assert time.monotonic() < deadline, f"expected {codes} of doctor; found {sorted(found)}"

    def mended_by(self, page: str) -> None:
        """From here on it is mended with what this runbook says."""
        self.page, self.mending = page, time.time()

    def served(self) -> bool:
        """Whether clients are served again."""
        now = time.time()
        last = self.result.between(now - SERVED, now - ANSWERED)
        # One that hangs is on no record yet.
        enough = len(last) > 0.9 * STEADY_RATE * (SERVED - ANSWERED)
        return enough and all(record.outcome == forge_load.OK for record in last)

    @property
    def hurt(self) -> list[forge_load.Record]:
        """Requests that were not answered as they should, in the order in which they were due."""
        return sorted(self.result.failed, key=lambda record: record.due)

    @property
    def outage(self) -> float:
        """Seconds from the first of these to the last."""
        return self.hurt[-1].due - self.hurt[0].due if self.hurt else 0.0

    @property
    def healing(self) -> float:
        """Seconds from the begin, or from the first command of the runbook, to the last of these."""
        return max(0.0, self.hurt[-1].due - (self.mending or self.began)) if self.hurt else 0.0

    def record(self, distribution: str) -> dict[str, Any]:
        """All of it, as a line of the results."""
        lost, doubled = lost_and_doubled(self.result, iter(self.stored))
        before = self.result.between(self.result.began, self.began)
        return {
            "fault": self.name,
            "distribution": distribution,
            "at": time.strftime("%Y-%m-%d", time.gmtime(self.began)),
            "seconds": round(self.ended - self.began, 1),
            "requests": len(self.inside),
            "failed": len(self.hurt),
            "kinds": dict(Counter(answered(record) for record in self.hurt)),
            "outage": round(self.outage, 1),
            "p99": round(percentile(self.inside, 99), 3),
            "p99_before": round(percentile(before, 99), 3),
            "doctor": {code: round(seconds, 1) for code, seconds in sorted(self.said.items())},
            "page": self.page,
            "healed": round(self.healing, 1),
            "clean": round(self.cleaned - (self.mending or self.began), 1),
            "acknowledged": len(self.result.acknowledged),
            "lost": len(lost),
            "doubled": len(doubled),
        }


FaultContext = Callable[[str], AbstractContextManager[Fault]]


def doctor() -> dict[str, Any]:
    """What doctor says, asked past SSH, which may be part of a fault."""
    run = subprocess.run(
        [PODMAN, "exec", CONTAINER, "forgectl", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=DOCTOR_SECONDS,
    )
    assert run.returncode in (CLEAN, WARNING, CRITICAL), (run.returncode, run.stdout, run.stderr)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def until_clean(happening: Fault, seconds: float) -> None:
    """Wait until doctor is as clean as before.

    Raises:
        AssertionError: it is not, within so many seconds; the message has what it still says.
    """
    deadline = time.monotonic() + seconds
    while not happening.clean():
        assert time.monotonic() < deadline, f"expected doctor to be clean again; found {happening.left}"


def severe(finding: dict[str, Any]) -> bool:
    """Whether somebody has to do something: a note asks for nothing."""
    return bool(finding["severity"] != "note")


def answered(record: forge_load.Record) -> str:
    """How a client saw a request fail: a status, or what became of the connection."""
    return str(record.status) if record.outcome == forge_load.STATUS and record.status else record.outcome


@pytest.fixture
def fault(
    host: Host,
    site: tuple[str, str, Path],
    status: Status,
    say: Callable[[str], None],
) -> FaultContext:
    """Put the app under load around a fault of FAULTS, and hold it to what is expected there.

    Nothing that was acknowledged may be lost, whatever the fault; doctor has to say what it is; and afterwards clients
    are served and doctor is as clean as before.
    """

    @contextmanager
    def around(name: str) -> Iterator[Fault]:
        due = FAULTS[name]
        settle(status)
        before = doctor()["findings"]
        with forge_load.running(*site, rate=STEADY_RATE, timeout=PATIENCE) as load:
            happening = Fault(name, load, before=before)
            time.sleep(BEFORE)
            happening.began = time.time()
            yield happening
            until(happening.served, due.healed + PATIENCE, every=0.2)
            until_clean(happening, due.healed + DOCTOR_SECONDS)
            happening.cleaned = time.time()
            settle(status)
            happening.ended = time.time()
            time.sleep(AFTER)
        happening.stored = table(host, happening.result.run)
        line = happening.record(os.environ.get("DISTRO", "trixie"))
        say(json.dumps(line))
        happening.assert_nothing_lost()
        # The load itself is well: what failed did so because of the fault.
        assert [record for record in happening.hurt if record.due + record.latency < happening.began] == []
        assert [record for record in happening.hurt if record.due > happening.ended] == []
        assert due.codes <= happening.said.keys(), (due.codes, happening.said)
        assert (happening.page, happening.healing < due.healed) == (due.page, True), line
        if file := os.environ.get(RESULTS):
            with Path(file).open("a") as results:
                results.write(json.dumps(line) + "\n")

    return around
