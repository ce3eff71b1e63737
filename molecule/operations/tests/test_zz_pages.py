"""The pages have no command that no test of this scenario has seen work. Last, because the others run them."""

import pytest
from forge_runbook import Runbooks

PAGES = (
    "address-already-in-use",
    "clock",
    "command-failed",
    "database-down",
    "disk-filling",
    "errors-during-a-rollout",
    "event-loop-blocked",
    "file-descriptors",
    "half-finished-release",
    "journal-flooded",
    "live-but-not-ready",
    "memory-growing",
    "network",
    "nginx-down",
    "release-permissions",
    "schema-mismatch",
    "secrets-not-in-service",
    "service-exits-right-after-start",
    "too-many-database-connections",
    "variables-not-arriving",
    "workers-killed-on-timeout",
)


@pytest.mark.exhaustive
def test_every_command_was_run(runbooks: Runbooks) -> None:
    """Each in the fault that its page is for."""
    assert runbooks.left(*PAGES) == []
