"""Hooks of schemathesis: the app's name leads to the scenario's host, by FORGE_RESOLVE=NAME=ADDRESS."""

from __future__ import annotations

import os
import socket
from typing import Any

_resolve = socket.getaddrinfo


def _getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
    name, _, address = os.environ.get("FORGE_RESOLVE", "").partition("=")
    return _resolve(address if address and host == name else host, *arguments, **options)


socket.getaddrinfo = _getaddrinfo
