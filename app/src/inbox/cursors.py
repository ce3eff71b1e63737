"""Cursors: signed, opaque positions in the order in which events become visible."""

import base64
import binascii
import hashlib
import hmac
import struct
from typing import NamedTuple

from pydantic import SecretStr

_POSITION = struct.Struct(">QQ")
_MAC_BYTES = 16
_PURPOSE = b"inbox cursor v1\0"


class Position(NamedTuple):
    """A place between two events; events are ordered by transaction id, then by their own."""

    xid: int
    id: int


START = Position(0, 0)


class CursorInvalid(ValueError):
    """The text is no cursor that this key signed."""


def encode(position: Position, key: SecretStr) -> str:
    """Return the URL-safe text for `position`."""
    packed = _POSITION.pack(*position)
    return base64.urlsafe_b64encode(packed + _mac(packed, key)).decode().rstrip("=")


def decode(text: str, key: SecretStr) -> Position:
    """Return the position in `text`. Raises CursorInvalid."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise CursorInvalid from None
    packed, mac = raw[: _POSITION.size], raw[_POSITION.size :]
    if len(packed) != _POSITION.size or not hmac.compare_digest(mac, _mac(packed, key)):
        raise CursorInvalid
    return Position(*_POSITION.unpack(packed))


def _mac(packed: bytes, key: SecretStr) -> bytes:
    digest = hmac.digest(key.get_secret_value().encode(), _PURPOSE + packed, hashlib.sha256)
    return digest[:_MAC_BYTES]
