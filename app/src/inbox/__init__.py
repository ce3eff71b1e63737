"""The event inbox: stores JSON events exactly once and lets clients page through and follow them."""
