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
