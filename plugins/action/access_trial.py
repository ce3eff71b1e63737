"""Try a configuration of SSH and the firewall, and keep it only if a new connection gets through.

`forge-trial` on the host puts it into force and undoes it after a while; this opens a new connection and confirms it
over that. A connection that is open already proves nothing: neither Ansible's own, which Mitogen keeps, nor one that
OpenSSH's ControlMaster shares.
"""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase

# OpenSSH goes by the first value of an option, so these come before whatever the inventory or ansible.cfg has.
FRESH = "-o ControlMaster=no -o ControlPath=none"
RETRY_SECONDS = 1.0
# Beyond the end of the trial: until the host has put everything back.
MARGIN_SECONDS = 5.0
NOT_FOUND = 127


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action behind the task of the role `hardening`."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _VALID_ARGS = frozenset({"program", "seconds", "ssh", "firewall"})

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return whether anything changed; or a failure, after which the old configuration is in force."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        plan = {
            "seconds": int(self._task.args["seconds"]),
            "ssh": self._task.args["ssh"],
            "firewall": self._task.args["firewall"],
        }
        checking = bool(self._task.check_mode)
        status, said, complaint = self._call("begin", *(["--check"] if checking else []), plan=plan)
        if checking and status == NOT_FOUND:
            answer: dict[str, Any] = {"changed": True, "before": {"ssh": None, "firewall": None}}
        elif status == 0:
            answer = json.loads(said)
        else:
            return result | _failure("a configuration that the host takes", complaint or said)
        result["changed"] = answer["changed"]
        result["diff"] = [
            {"before_header": name, "after_header": name, "before": before or "", "after": plan[name]}
            for name, before in sorted(answer["before"].items())
        ]
        if checking or not answer["changed"]:
            return result
        problem = self._confirm(answer["id"], time.monotonic() + plan["seconds"])
        return result | ({} if problem is None else {"changed": False} | problem)

    def _confirm(self, identity: str, end: float) -> dict[str, Any] | None:
        """Confirm the trial over a new connection; or return the failure, once the host has undone the trial."""
        self._connect_anew()
        while True:
            try:
                status, _, problem = self._call("confirm", identity)
                if status == 0:
                    return None
            except AnsibleError as error:
                problem = _first_line(error)
            if time.monotonic() >= end:
                break
            time.sleep(RETRY_SECONDS)
        time.sleep(max(0.0, end + MARGIN_SECONDS - time.monotonic()))
        expected = "a new SSH connection while the new configuration was in force"
        return _failure(expected, f"{problem}. {self._aftermath()}")

    def _aftermath(self) -> str:
        """Tell what the host says after the trial."""
        self._connect_anew()
        try:
            status, said, _ = self._call("status")
        except AnsibleError as error:
            return f"The host undoes it by itself, but can't be reached yet: {_first_line(error)}"
        if status == 0 and json.loads(said) is None:
            return "The old configuration is back in force, seen over a new connection"
        return "The host still tries to put the old configuration back: see journalctl --unit='forge-trial-*'"

    def _connect_anew(self) -> None:
        """Have the next command open a connection of its own, to the host itself."""
        # Mitogen tells connections apart by their arguments, so another pair of options makes another one each time.
        self._connection.set_option("ssh_args", f"{FRESH} {self._connection.get_option('ssh_args') or ''}")
        self._connection.close()

    def _call(self, *arguments: str, plan: dict[str, Any] | None = None) -> tuple[int, str, str]:
        """Call the program on the host; return its exit code and what it printed on both ways."""
        command = shlex.join([str(self._task.args["program"]), *arguments])
        # Without any input Mitogen would play a terminal, on which errors can't be told from output.
        answer = self._low_level_execute_command(command, in_data=json.dumps(plan or {}).encode())
        return int(answer["rc"]), str(answer["stdout"]), str(answer["stderr"])


def _failure(expected: str, found: str) -> dict[str, Any]:
    message = (
        f"Expected: {expected}. Found: {' '.join(found.split()).rstrip('.')}. "
        "Do: correct the variables of the role hardening; if nobody gets in, see docs/runbooks/locked-out.md."
    )
    return {"failed": True, "msg": message}


def _first_line(error: AnsibleError) -> str:
    return str(getattr(error, "message", error)).strip().partition("\n")[0][:200]
