"""The timeout chain of one app: every inner timeout ends before the one around it."""

from __future__ import annotations

from typing import TypedDict

# Nginx keeps an idle connection to the app this long; the app keeps it longer, so it is always Nginx that closes it and
# no request is ever sent down a connection that the app is closing.
PROXY_IDLE = 60
APP_KEEPALIVE = 75
CONNECT = 2
START = 60
# Gunicorn's heartbeat catches a blocked event loop. It is no limit on a request, so it never goes below a minute.
SHORTEST_HEARTBEAT = 60


class Timeouts(TypedDict):
    """All in seconds."""

    request: int
    app_graceful: int
    gunicorn_graceful: int
    stop: int
    heartbeat: int
    proxy_idle: int
    app_keepalive: int
    connect: int
    start: int


def chain(request: int) -> Timeouts:
    """Return the chain for an app that answers within `request` seconds.

    A request that was accepted just before the stop signal gets its full time (`app_graceful`), Gunicorn outlasts its
    workers (`gunicorn_graceful`), and systemd kills only what outlasts both (`stop`).
    """
    return Timeouts(
        request=request,
        app_graceful=request + 2,
        gunicorn_graceful=request + 5,
        stop=request + 10,
        heartbeat=max(SHORTEST_HEARTBEAT, 2 * request),
        proxy_idle=PROXY_IDLE,
        app_keepalive=APP_KEEPALIVE,
        connect=CONNECT,
        start=START,
    )
