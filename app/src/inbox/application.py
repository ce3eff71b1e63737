"""Putting the application together, and what a worker opens and closes."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from inbox import api, draining, events, logs, middleware, probes, problems
from inbox.database import Database, DatabaseUnavailable, EnvironmentMismatch
from inbox.dependencies import State
from inbox.feed import Feed
from inbox.metrics import Metrics
from inbox.settings import Settings, get_settings

logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; without `settings` they come from the environment. Raises SettingsInvalid."""
    given = settings or get_settings()
    logs.configure("DEBUG" if given.debug else given.log_level)
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        database = Database(given)
        try:
            await database.open(events.rehearse)
        except EnvironmentMismatch:
            # Logged where it was found. Serving another environment's data is worse than not serving.
            await database.close()
            raise
        except DatabaseUnavailable:
            # A worker that fails to boot makes Gunicorn stop its healthy siblings: /ready answers 503 instead.
            logger.warning("started without the database; it is tried again with every request")
        stopping = asyncio.Event()
        feed = Feed(database, stopping)
        following = asyncio.create_task(feed.run())
        with draining.set_by_signals(stopping):
            logger.info("worker started", extra={"environment": given.environment})
            try:
                yield State(database=database, feed=feed, metrics=metrics, draining=stopping)
            finally:
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await following
                await database.close()
                logger.info("worker stopped")

    public_docs = given.environment != "production"
    app = FastAPI(
        title="Event inbox",
        version="1.0.0",
        lifespan=lifespan,
        openapi_url="/openapi.json" if public_docs else None,
        docs_url="/docs" if public_docs else None,
        redoc_url=None,
    )
    if settings is not None:
        app.dependency_overrides[get_settings] = lambda: settings
    app.include_router(probes.router)
    app.include_router(api.router)
    problems.install(app)
    # The last one added is the outermost.
    app.add_middleware(middleware.BodyLimit, max_bytes=given.max_body_bytes)
    app.add_middleware(middleware.CatchErrors)
    if given.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=given.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Content-Type", "Idempotency-Key", "Last-Event-ID"],
            expose_headers=["Idempotency-Replayed", "Location", "X-Request-ID"],
        )
    app.add_middleware(middleware.RequestContext, metrics=metrics)
    return app
