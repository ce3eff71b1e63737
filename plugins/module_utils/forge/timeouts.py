"""The timeout chain of one app: every inner timeout ends before the one around it."""

from __future__ import annotations

from typing import TypedDict

# Nginx puts no connection to the app that is older than this back into its pool, and keeps none there for longer. So a
# slot that lost its traffic is rid of the pool long before it stops, and it is always Nginx that closes a connection.
PROXY_IDLE = 2
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
    pool_exit: int
    app_keepalive: int
    connect: int
    start: int


def chain(request: int) -> Timeouts:
    """Return the chain for an app that answers within `request` seconds.

    A request that was accepted just before the stop signal gets its full time (`app_graceful`), Gunicorn outlasts its
    workers (`gunicorn_graceful`), and systemd kills only what outlasts both (`stop`). `app_graceful` is also the limit
    at which a draining worker cuts streams, so that its application can still shut down in order.

    `pool_exit` after a cutover Nginx begins no request on a connection to the slot that lost: such a connection was at
    most `proxy_idle` old when it last came back to the pool, and lay there no longer than that.
    """
    return Timeouts(
        request=request,
        app_graceful=request + 2,
        gunicorn_graceful=request + 5,
        stop=request + 10,
        heartbeat=max(SHORTEST_HEARTBEAT, 2 * request),
        proxy_idle=PROXY_IDLE,
        # A second more for timers that run late.
        pool_exit=2 * PROXY_IDLE + 1,
        app_keepalive=APP_KEEPALIVE,
        connect=CONNECT,
        start=START,
    )
