"""A source to release."""

from forge_events import source

__all__ = ["source"]
