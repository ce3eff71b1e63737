"""What the tests of this scenario share; and the fixtures of forge_receivers and forge_places, by name."""

from __future__ import annotations

from forge_places import control, runbooks
from forge_receivers import receivers

__all__ = ["control", "receivers", "runbooks"]
