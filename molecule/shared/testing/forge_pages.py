"""Constant load of GET requests on any site, each answer judged by its status and a part of its content.

The schedule, the protocols and the verdicts are those of `forge_load`; only the event inbox can be asked for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_load import JSON_HEADERS, OK, STATUS, WRONG, Load, Running, _Request


@dataclass(frozen=True)
class Page:
    """What is asked for, and what is due."""

    target: str
    """Path and query."""
    part: bytes
    """What the answer holds, and a wrong one does not."""
    headers: tuple[tuple[str, str], ...] = ()
    """Beside those of every request; names in lower case, as HTTP/2 has them."""
    status: int = 200

    def __post_init__(self) -> None:
        """Refuse a page whose status alone would be judged, where that is the one that all have.

        Raises:
            ValueError: there is nothing to look for.
        """
        if self.status == 200 and not self.part:
            raise ValueError(f"expected a part of the answer to {self.target}; found none")


class PageLoad(Load):
    """Constant load on one site: its pages, one after the other."""

    def __init__(self, address: str, domain: str, cafile: str | Path, pages: Sequence[Page], **options: Any) -> None:
        super().__init__(address, domain, cafile, extras=False, **options)
        self._pages = tuple(pages)

    async def _prepare(self) -> int:
        # Nothing is stored: what the pages hold is there already.
        return 0

    def _kind(self, _number: int) -> str:
        return "get"

    def _page(self, request: _Request) -> Page:
        return self._pages[request.number % len(self._pages)]

    def message(self, request: _Request) -> tuple[str, str, tuple[tuple[str, str], ...], bytes]:
        """Method, target, headers and body of a request."""
        page = self._page(request)
        return "GET", page.target, (*JSON_HEADERS, *page.headers), b""

    def _judge(self, request: _Request) -> str:
        page = self._page(request)
        if request.status != page.status:
            return STATUS
        return OK if page.part in request.body else WRONG


def browsing(address: str, domain: str, cafile: str | Path, pages: Sequence[Page], **options: Any) -> Running:
    """Put a site under load for the length of a `with` block; see Load for the options."""
    return Running(PageLoad(address, domain, cafile, pages, **options))
