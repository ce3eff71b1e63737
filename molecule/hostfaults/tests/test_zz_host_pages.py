"""The pages have no command that no test of this scenario has seen work. Last, because the others run them."""

import pytest
from forge_runbook import Runbooks

PAGES = (
    "clock",
    "database-down",
    "disk-filling",
    "journal-flooded",
    "network",
    "nginx-down",
    "too-many-database-connections",
)


@pytest.mark.exhaustive
def test_every_command_was_run(runbooks: Runbooks) -> None:
    """Each in the fault that its page is for."""
    assert runbooks.left(*PAGES) == []
