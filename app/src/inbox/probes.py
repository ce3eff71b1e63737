"""What the platform asks: is the process alive, may it take traffic, what has it counted."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from inbox.database import DatabaseUnavailable
from inbox.dependencies import DatabaseDep, DrainingDep, MetricsDep

router = APIRouter(tags=["probes"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Say that the process runs and its event loop turns; depends on nothing else."""
    return {"status": "alive"}


@router.get("/ready", responses={503: {"description": "Not ready; `reason` is `draining` or `database`."}})
async def ready(database: DatabaseDep, draining: DrainingDep) -> JSONResponse:
    """Say whether this worker can serve requests now."""
    if draining:
        return _not_ready("draining")
    try:
        await database.check()
    except DatabaseUnavailable:
        return _not_ready("database")
    return JSONResponse({"status": "ready"})


@router.get("/metrics", include_in_schema=False)
def metrics(counted: MetricsDep) -> Response:
    """Answer in Prometheus' text format; not a coroutine, since it may read files."""
    return Response(counted.exposition(), media_type=CONTENT_TYPE_LATEST)


def _not_ready(reason: str) -> JSONResponse:
    return JSONResponse({"status": "unready", "reason": reason}, 503)
