"""Secrets without Vault: the values of each identity, sealed on this host as one encrypted systemd credential.

    /etc/credstore.encrypted/forge.NAME.IDENTITY.values     the newest version
    /etc/credstore.encrypted/forge.NAME.app.values.SLOT     the version that a slot starts with

Each holds a JSON object, {"version": n, "values": {key: value}}, and every change is a new version of all keys.
"""

import secrets
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from forgectl import systemd
from forgectl.errors import ForgeError, Refused, SecretsError
from forgectl.layout import SLOTS, Layout, write_atomically
from forgectl.values import Fetched, problems

PART = "values"
# systemd reads at most 1152 KiB of a sealed credential, which is in base64; and seals for a TPM add to it.
LARGEST = 800 * 1024
# What `generate` makes of 36 random bytes: 48 letters, digits, - and _.
RANDOM_BYTES = 36


class Sealed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A version (1 and up; 0 when nothing was ever set) and its values."""

    version: int = 0
    values: dict[str, str] = {}


def fetch(layout: Layout, identity: str, variables: Mapping[str, str], version: int = 0) -> Fetched:
    """A version of the values of an identity, after a check of those that `variables` (variable: key) refers to.

    It is the newest for 0, or when that version is gone.

    Raises:
        SecretsError: they cannot be opened on this host, or one of them is missing or malformed.
    """
    path = layout.sealed(identity, PART)
    pinned = next((each for each in _copies(layout, identity) if each.version == version), None) if version else None
    return _checked(pinned or newest(layout, identity), variables, str(path), command(layout.name, identity))


def handed_over(data: str, app: str, identity: str, variables: Mapping[str, str]) -> Fetched:
    """The same from what systemd has decrypted for a unit."""
    where = f"the sealed values of the {identity} identity"
    return _checked(_decode(data, where), variables, where, command(app, identity))


def newest(layout: Layout, identity: str) -> Sealed:
    """The newest version, unchecked; version 0 when nothing was ever set.

    Raises:
        SecretsError: it cannot be opened on this host.
    """
    path = layout.sealed(identity, PART)
    return _open(path) if path.exists() else Sealed()


def missing(layout: Layout, identity: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Key: the command that sets it, of those that `variables` (variable: key) refers to and that were not set yet."""
    keys = sorted(set(variables.values()) - newest(layout, identity).values.keys())
    return {key: command(layout.name, identity).format(key=shlex.quote(key)) for key in keys}


def change(
    layout: Layout, identity: str, changes: Mapping[str, str | None], *, dry_run: bool = False
) -> tuple[int, bool]:
    """Set keys, or remove those whose value is None; returns the version, and whether that made a new one.

    The caller holds the lock. A dry run returns the same and writes nothing.

    Raises:
        Refused: a value is none that a variable can carry, or all of them together are too long.
        SecretsError: what is there cannot be opened on this host.
    """
    setting = {key: value for key, value in changes.items() if value is not None}
    if wrong := problems(setting, {f"a variable for {key}": key for key in setting}, "standard input"):
        raise Refused("; ".join(wrong))
    before = newest(layout, identity)
    values = {key: value for key, value in before.values.items() if key not in changes} | setting
    if values == before.values:
        return before.version, False
    # A number that a slot has seen never comes again, even after the newest file was removed.
    version = 1 + max([before.version, *(each.version for each in _copies(layout, identity))])
    data = msgspec.json.encode(Sealed(version, dict(sorted(values.items())))).decode()
    if len(data.encode()) > LARGEST:
        raise Refused(
            f"expected all values of the {identity} identity of {layout.name} within {LARGEST >> 10} KiB, because "
            f"systemd reads no more; found {len(data.encode()) >> 10} KiB; shorten them, or unset what is not "
            "used any more"
        )
    if not dry_run:
        layout.credentials.mkdir(mode=0o700, exist_ok=True)
        write_atomically(layout.sealed(identity, PART), systemd.encrypt(data, PART), 0o600)
    return version, True


def generate() -> str:
    """A random value for a key that nobody needs to know."""
    return secrets.token_urlsafe(RANDOM_BYTES)


def pin(layout: Layout, slot: str, version: int) -> None:
    """Give a slot its own copy of a version; of the newest for 0, or when that version is gone."""
    copy = layout.sealed("app", f"{PART}.{slot}")
    # Its own first: at a boot that is the one, and nothing is written.
    paths = sorted(_paths(layout, "app"), key=lambda path: path != copy) if version else []
    found = {path: opened for path in paths if (opened := _opened(path))}
    if paths and not found and copy.exists():
        # A key of this host that fails for a moment, as a TPM may at a boot, is no reason to lose what is right.
        return
    path = next((path for path, opened in found.items() if opened.version == version), layout.sealed("app", PART))
    if path.exists():
        data = path.read_bytes()
    elif (opened := _opened(copy)) and opened.version == 0:
        return
    else:
        # systemd refuses a unit whose credential is not there, also where the app needs none.
        data = systemd.encrypt(msgspec.json.encode(Sealed()).decode(), PART)
    if not copy.exists() or copy.read_bytes() != data:
        layout.credentials.mkdir(mode=0o700, exist_ok=True)
        write_atomically(copy, data, 0o600)


def unpin(layout: Layout, slot: str) -> None:
    """Remove the copy of a slot that gets its secrets elsewhere."""
    layout.sealed("app", f"{PART}.{slot}").unlink(missing_ok=True)


def command(app: str, identity: str) -> str:
    """What an operator calls to set a key, which is {key} here; it reads the value from standard input."""
    return f"sudo forgectl secrets set {app} {{key}}" + ("" if identity == "app" else f" --identity {identity}")


def _checked(found: Sealed, variables: Mapping[str, str], where: str, write: str) -> Fetched:
    if wrong := problems(found.values, variables, where, write):
        raise SecretsError("incomplete", "; ".join(wrong), found.version)
    return Fetched(dict(found.values), found.version)


def _paths(layout: Layout, identity: str) -> list[Path]:
    """Every file that may hold a version of an identity's values: the newest first, then the slots' copies."""
    slots = SLOTS if identity == "app" else ()
    return [layout.sealed(identity, PART), *(layout.sealed(identity, f"{PART}.{slot}") for slot in slots)]


def _copies(layout: Layout, identity: str) -> Iterator[Sealed]:
    # One that this host cannot open has no number to avoid: no slot can start with it.
    return filter(None, map(_opened, _paths(layout, identity)))


def _opened(path: Path) -> Sealed | None:
    try:
        return _open(path)
    except SecretsError:
        return None


def _open(path: Path) -> Sealed:
    try:
        data = systemd.decrypt(path, PART)
    except ForgeError as error:
        raise SecretsError(
            "missing",
            f"expected to open {path} with this host's key; found: {error}; remove it, and set every key again",
        ) from None
    return _decode(data, str(path))


def _decode(data: str, where: str) -> Sealed:
    try:
        return msgspec.json.decode(data, type=Sealed)
    except msgspec.DecodeError:
        raise SecretsError(
            "incomplete", f"expected the sealed values in {where}; found something else; set every key again"
        ) from None
