"""The `linear` strategy of Mitogen, found through the installed package wherever the virtual environment lies."""

from __future__ import annotations

from ansible_mitogen.strategy import StrategyMixin

import ansible.plugins.strategy.linear


class StrategyModule(StrategyMixin, ansible.plugins.strategy.linear.StrategyModule):
    """Runs every task of a host inside one Python process that stays up on it."""
