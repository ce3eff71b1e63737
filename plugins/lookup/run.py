"""What a run of Ansible is: its `hosts`, for a play, or whether it is `whole`, of all tasks of the playbook.

Ansible itself takes a run without a host for a success, and has no variable for --start-at-task and --step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible import context
from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

NONE = (
    "Expected: a host in the inventory. Found: none. Do: name the inventory with -i inventory/production, or add the "
    "host to it."
)


class LookupModule(LookupBase):  # type: ignore[misc]
    """The lookup `run`."""

    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **_: Any) -> list[Any]:
        """Return an answer for each of the terms.

        Raises:
            AnsibleLookupError: there is no host; but whoever only checks the syntax needs none.
        """
        known = variables or {}
        answers: dict[str, Callable[[dict[str, Any]], Any]] = {"hosts": _hosts, "whole": _whole}
        return [answers[term](known) for term in terms]


def _hosts(variables: dict[str, Any]) -> str:
    if not (variables.get("groups") or {}).get("all") and not context.CLIARGS.get("syntax"):
        raise AnsibleLookupError(NONE)
    return "all"


def _whole(variables: dict[str, Any]) -> bool:
    # Each role has its name for a tag.
    skipped = {*variables["ansible_skip_tags"]} & {*variables["ansible_play_role_names"], "always"}
    left_out = skipped or context.CLIARGS.get("start_at_task") or context.CLIARGS.get("step")
    return list(variables["ansible_run_tags"]) == ["all"] and not left_out
