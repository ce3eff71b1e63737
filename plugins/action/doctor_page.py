"""Judge what all hosts answered to `doctor_ask`, print a table, and write the page.

Arguments: `answers`, the result of that task by host; `page`, the file to write; `fail_on`, the least verdict that
makes a host `ill`: warning, critical or never. One of which nobody knows how it is always is. Returns `page`;
`ill`, the verdict of each such host; and all `verdicts` by host.
"""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.plugins.action import ActionBase

_UTILS = str(Path(__file__).resolve().parents[1] / "plugin_utils")
if _UTILS not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILS)

from ansible.module_utils.doctor_page import answers, page  # noqa: E402

FAILING: dict[str, tuple[answers.Verdict, ...]] = {
    # What hosts find may be for people to read; that one could not be asked is no finding.
    "never": ("unknown",),
    "critical": ("critical", "unknown"),
    "warning": ("critical", "unknown", "warning"),
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action behind the last task of playbooks/doctor.yml."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Judge, print and write."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "answers": {"type": "dict", "required": True},
                "page": {"type": "path", "required": True},
                "fail_on": {"type": "str", "choices": list(FAILING), "default": "critical"},
            }
        )
        hosts = [answers.read(name, answer or {}) for name, answer in arguments["answers"].items()]
        target = Path(arguments["page"]).absolute()
        try:
            _write(target, page.html(hosts, datetime.now().astimezone()))
        except OSError as error:
            return result | {
                "failed": True,
                "msg": f"expected to write {target}; found: {error.strerror}; name another file with -e page=FILE",
            }
        self._display.display("\n".join(["", *page.table(hosts), f"page: {target}", ""]))
        verdicts = {host.name: host.verdict for host in answers.order(hosts)}
        return result | {
            "changed": False,
            "page": str(target),
            "verdicts": verdicts,
            "ill": {name: verdict for name, verdict in verdicts.items() if verdict in FAILING[arguments["fail_on"]]},
            "_ansible_verbose_override": True,
        }


def _write(target: Path, text: str) -> None:
    """Write a file that whoever has the old one open does not see half of; it names hosts, paths and addresses."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, prefix=".", delete=False) as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o600)
    Path(file.name).replace(target)
