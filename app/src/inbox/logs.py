"""JSON logs: one object a line on standard output, which systemd hands to the journal."""

import json
import logging
import logging.config
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that the current task serves."""

database_pids: ContextVar[set[int] | None] = ContextVar("database_pids", default=None)
"""Processes of PostgreSQL that worked for it; each of their log lines names its own."""

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; what `extra=` added becomes fields of the object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline; a traceback is the field `traceback`."""
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            line["request_id"] = current
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(level: str) -> None:
    """Send the root logger's records to standard output.

    The loggers of Gunicorn and uvicorn have handlers of their own and are left as the server configured them.
    """
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonFormatter}},
            "handlers": {
                "stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}
            },
            "root": {"level": level, "handlers": ["stdout"]},
        }
    )
