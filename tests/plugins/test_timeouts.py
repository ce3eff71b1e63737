"""The timeout chain, for every request timeout that the inventory admits."""

from __future__ import annotations

import pytest
from forge import preflight, timeouts

LEAST, MOST = preflight._RANGES["request_timeout"]


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("request", "app_graceful"),  # a request accepted just before the signal gets its full time,
        ("app_graceful", "gunicorn_graceful"),  # Gunicorn outlasts its workers,
        ("gunicorn_graceful", "stop"),  # systemd outlasts Gunicorn,
        ("request", "heartbeat"),  # and no answer that may still come costs its worker.
        ("proxy_idle", "app_keepalive"),  # It is Nginx that closes an idle connection.
        ("pool_exit", "app_keepalive"),
        ("app_graceful", "heartbeat"),  # A worker that is recycled may use up all of its drain.
        ("connect", "request"),
    ],
)
def test_no_inner_timeout_outlives_its_outer_one(inner: str, outer: str) -> None:
    """From the shortest to the longest."""
    chains = [dict(timeouts.chain(request)) for request in range(max(LEAST, 3), MOST + 1)]
    assert [chain for chain in chains if not 0 < chain[inner] < chain[outer]] == []  # type: ignore[operator]


def test_the_number_that_all_come_from_is_kept() -> None:
    """Nginx gives up exactly when the inventory says."""
    assert all(timeouts.chain(request)["request"] == request for request in range(LEAST, MOST + 1))


def test_pool_leaves_a_slot_within_the_default_watch() -> None:
    """A connection is at most `proxy_idle` old when it last comes back to the pool, and lies there no longer."""
    chains = [timeouts.chain(request) for request in range(LEAST, MOST + 1)]
    assert all(2 * chain["proxy_idle"] < chain["pool_exit"] < 10 for chain in chains)
