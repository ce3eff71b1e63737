"""Errors as problem details (RFC 9457); no answer carries the text of an exception."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request

from inbox import logs
from inbox.database import DatabaseUnavailable

RETRY_AFTER_S = 2


class Problem(Exception):
    """Ends a request with a problem document; `code` is for programs, `detail` for people."""

    def __init__(self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers

    def response(self) -> "ProblemResponse":
        """Build the answer."""
        return problem_response(self.status, self.code, self.detail, self.headers)


class Fault(BaseModel):
    """One part of a request that was refused."""

    pointer: str = Field(examples=["body/type"])
    detail: str


class ProblemDocument(BaseModel):
    """The body of every error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None = None
    errors: list[Fault] | None = None


class ProblemResponse(JSONResponse):
    """An answer of the media type `application/problem+json`."""

    media_type = "application/problem+json"


def _schema() -> dict[str, Any]:
    # A reference would be looked up from the root of the OpenAPI document, which does not know the part.
    schema = ProblemDocument.model_json_schema()
    schema["properties"]["errors"]["anyOf"][0]["items"] = schema.pop("$defs")["Fault"]
    return schema


OPENAPI_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "Problem details",
        "content": {"application/problem+json": {"schema": _schema()}},
    }
}


def problem_response(
    status: int,
    code: str | None = None,
    detail: str | None = None,
    headers: Mapping[str, str] | None = None,
    errors: list[Fault] | None = None,
) -> ProblemResponse:
    """Build a problem document; code and detail default to those of the status."""
    phrase = HTTPStatus(status).phrase
    document = ProblemDocument(
        title=phrase,
        status=status,
        code=code or phrase.lower().replace(" ", "-"),
        detail=detail or HTTPStatus(status).description or phrase,
        request_id=logs.request_id.get(),
        errors=errors,
    )
    return ProblemResponse(document.model_dump(exclude_none=True), status, dict(headers or {}))


def unavailable() -> ProblemResponse:
    """Build the answer to a request that needs the database while it cannot be used."""
    return problem_response(
        503,
        "database-unavailable",
        "The database cannot be used at the moment; the same request may be sent again.",
        {"Retry-After": str(RETRY_AFTER_S)},
    )


def _from_problem(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, Problem)  # noqa: S101 - narrows what Starlette passes
    return error.response()


def _from_http(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - narrows what Starlette passes
    detail = error.detail if error.detail != HTTPStatus(error.status_code).phrase else None
    return problem_response(error.status_code, detail=detail, headers=error.headers)


def _from_validation(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - narrows what Starlette passes
    # Only place and reason: "input" and "ctx" would send back what the client sent, secrets included.
    faults = [
        Fault(pointer="/".join(map(str, fault["loc"])), detail=fault["msg"].removeprefix("Value error, "))
        for fault in error.errors()
    ]
    return problem_response(422, "invalid-request", "Parts of the request are missing or malformed.", errors=faults)


def _from_database(_: Request, __: Exception) -> ProblemResponse:
    return unavailable()


def install(app: FastAPI) -> None:
    """Answer every expected error of `app` with a problem document; middleware.CatchErrors answers the rest."""
    app.add_exception_handler(Problem, _from_problem)
    app.add_exception_handler(HTTPException, _from_http)
    app.add_exception_handler(RequestValidationError, _from_validation)
    app.add_exception_handler(DatabaseUnavailable, _from_database)
