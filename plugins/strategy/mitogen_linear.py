"""The `linear` strategy of Mitogen, found through the installed package wherever the virtual environment lies."""

from __future__ import annotations

from functools import cache

import ansible.collections.list
import ansible.plugins.strategy.linear
from ansible_mitogen import module_finder
from ansible_mitogen.strategy import StrategyMixin

# Mitogen asks both questions again for every task, in processes that forget the answers. With the hundred collections
# of the `ansible` package that was a tenth of a run without changes.
_installed = tuple(ansible.collections.list.list_collection_dirs())
ansible.collections.list.list_collection_dirs = lambda *_arguments, **_options: iter(_installed)
module_finder.compile = cache(compile)  # the same helper modules, for each Ansible module that imports them


class StrategyModule(StrategyMixin, ansible.plugins.strategy.linear.StrategyModule):  # type: ignore[misc] # untyped
    """Runs every task of a host inside one Python process that stays up on it."""
