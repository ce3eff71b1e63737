"""This project: deploys and rollbacks of the event inbox under load, and the floor below which no start can be."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import ROOT
from forge_load import Result

from bench.hosts import STATE, BenchError, Host, playbook, start_vault, write_inventory
from bench.load import MARGIN_SECONDS, STEADY_SECONDS, WARM_SECONDS, Event, Site, during
from bench.peer import revise

ON_HOST = Path(__file__).with_name("on_host.py")
APP = "inbox"
SETTLE_SECONDS = 90.0


@dataclass
class Cycle:
    """One round of all events; of this project's, with the floor (s) before it and at the end of its load."""

    events: list[Event]
    result: Result
    idle_floor: float = 0.0
    loaded_floor: float = 0.0


class Forge:
    """This project's host, and the source that is released to it."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.source = folder / "app"
        self._revisions = itertools.count(1)

    def prepare(self, distribution: str) -> None:
        """Provision the host and release the app."""
        shutil.copytree(ROOT / "app", self.source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        start_vault(distribution)
        write_inventory(self.host, self.source)
        playbook(ROOT / "site.yml", "a provisioned host")

    def site(self) -> Site:
        """Return the site that it serves."""
        return Site(self.host, STATE / "tls" / "ca.pem")

    def status(self) -> dict[str, Any]:
        """Ask forgectl."""
        answer: dict[str, Any] = json.loads(self.host.root(f"forgectl status {APP} --json"))
        return answer

    def main_pid(self) -> str:
        """Return the process id of the live slot's Gunicorn."""
        slot = self.status()["live"]["slot"]
        return self.host.root(f"systemctl show --property MainPID --value {APP}@{slot}.service")

    def workers(self) -> int:
        """Return how many workers the live slot has."""
        return int(self.host.root(f"pgrep --count --parent {self.main_pid()}"))

    def floor(self) -> float:
        """Return the seconds that the app needs by itself from the start of Gunicorn to ready."""
        return float(self.host.python(ON_HOST, "floor", APP, self.main_pid()))

    def cycle(self, site: Site) -> Cycle:
        """Deploy, roll back while the old slot is warm, deploy, roll back to a slot that has to be started."""
        idle = self.floor()
        with site.load() as load:
            time.sleep(WARM_SECONDS + STEADY_SECONDS)
            events = [
                during("deploy", self._deploy, look=self._released),
                during("rollback", self._rollback, look=self._rolled_back),
            ]
            if "start" in events[1].details["phases"]:
                raise BenchError(
                    "Expected: a rollback while the old slot is warm. Found: one that started it, since the watch was "
                    "over. Do: raise watch_seconds in scripts/bench/hosts.py."
                )
            self.settle()
            events.append(during("deploy", self._deploy, look=self._released))
            self.settle()
            events.append(during("rollback", lambda: self._play("rollback"), look=self._rolled_back))
            self.settle()
            loaded = self.floor()
        for event in events:
            if event.name == "rollback":
                event.name += ", cold" if "start" in event.details["phases"] else ", warm"
        return Cycle(events, load.result, idle, loaded)

    def settle(self) -> None:
        """Wait until the last operation has its verdict and the slot that lost has stopped."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.status()["operation"]:
            if time.monotonic() > deadline:
                raise BenchError(
                    f"Expected: the operation over within {SETTLE_SECONDS:.0f} s. "
                    f"Found: {json.dumps(self.status()['operation'])}. Do: run the bench with --keep and look there."
                )
            time.sleep(1)
        # Neither draining nor these questions belong to what comes next.
        time.sleep(MARGIN_SECONDS)

    def _deploy(self) -> dict[str, Any]:
        revise(self.source, next(self._revisions))
        return self._play("deploy")

    def _play(self, name: str) -> dict[str, Any]:
        playbook(ROOT / "playbooks" / f"{name}.yml", f"a {name}", no_wait=True)
        return {}

    def _rollback(self) -> dict[str, Any]:
        command = f"forgectl rollback {APP} --no-wait --json"
        began, answer, ended = self.host.root(
            f"date +%s.%N; {command} 2> /dev/null | tr '\\n' ' '; echo; date +%s.%N"
        ).splitlines()
        if not json.loads(answer)["changed"]:
            raise BenchError(f"Expected: `{command}` to roll back. Found: {answer}. Do: see if the history allows it.")
        # Without the way into the container: an operator is on the host already.
        return {"seconds": round(float(ended) - float(began), 3)}

    def _released(self) -> dict[str, Any]:
        return self._recorded("release")

    def _rolled_back(self) -> dict[str, Any]:
        return self._recorded("rollback")

    def _recorded(self, action: str) -> dict[str, Any]:
        """Return what forgectl knows of the operation that just ended or is being watched, and when it swapped."""
        state = json.loads(self.host.root(f"forgectl history {APP} --json"))
        entries = [*state["history"], *([state["operation"]] if state["operation"] else [])]
        newest = max((entry for entry in entries if entry["action"] == action), key=lambda entry: str(entry["began"]))
        phases: dict[str, float] = newest["phases"]
        return {
            "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
            "start_to_swap": round(sum(phases.get(name, 0.0) for name in ("start", "swap")), 3),
            "swapped": float(self.host.root(f"stat --format %.9Y /run/{APP}/live.sock")),
        }
