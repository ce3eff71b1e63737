"""Ask a host how it is, and how its last day was: `forgectl doctor --json` and `forgectl day --json`, in one go.

It needs nothing on the host but a shell, so that one that was never provisioned says so, too. Whatever the host
answers, the task does not fail: `doctor_page` judges it. Returns `code`, `stdout` and `stderr`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.plugins.action import ActionBase

# What is for the control machine alone lies beside what hosts get as well.
_UTILS = str(Path(__file__).resolve().parents[1] / "plugin_utils")
if _UTILS not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILS)

from ansible.module_utils.doctor_page.answers import COMMAND  # noqa: E402


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action behind the first task of playbooks/doctor.yml."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _VALID_ARGS = frozenset[str]()

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run both, and pass on what they print."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        answer = self._low_level_execute_command(COMMAND)
        return result | {
            "changed": False,
            # Under its usual name it would fail the task.
            "code": answer["rc"],
            "stdout": answer["stdout"],
            "stderr": answer["stderr"],
            # It is for programs.
            "_ansible_verbose_override": True,
        }
