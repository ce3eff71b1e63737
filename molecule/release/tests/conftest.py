"""The fixtures of forge_events, by name."""

from forge_events import event, ledger, rate, say, site, source

__all__ = ["event", "ledger", "rate", "say", "site", "source"]
