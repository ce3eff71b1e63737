"""Do the variables of the role `alerts` lead an alert anywhere, and do they keep what is secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from .inventory_lint import is_encrypted
from .problems import Problem
from .secret_scan import is_template
from .specs import Options

ROLE = "alerts"
SECRETS = ("alerts_webhook_url", "alerts_mail_password")
_RANGES = {
    "alerts_repeat_minutes": (0, 7 * 1440),
    "alerts_messages_per_hour": (1, 3600),
    "alerts_mail_port": (1, 65535),
}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def problems(options: Options, raw: Mapping[str, Any], values: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong beyond types; `raw` as it stands in the inventory, `values` what could be templated."""
    wrong = [
        Problem(name, f"a number from {least} to {most}", str(values[name]), "correct it")
        for name, (least, most) in _RANGES.items()
        if isinstance(values.get(name), int) and not least <= values[name] <= most
    ]
    chosen = {name: values.get(name, option.get("default")) for name, option in options.items()}
    return [*wrong, *_command(chosen), *_webhook(raw, values, chosen), *_mail(raw, values, chosen)]


def _command(chosen: Mapping[str, Any]) -> Iterator[Problem]:
    command = chosen.get("alerts_command")
    if isinstance(command, list) and command and not str(command[0]).startswith("/"):
        expected = "a list that begins with the whole path of a program on the host"
        yield Problem("alerts_command", expected, str(command[0]), "write /usr/local/bin/... or where it lies")


def _webhook(raw: Mapping[str, Any], values: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[Problem]:
    url = chosen.get("alerts_webhook_url")
    if not isinstance(url, str):
        return
    yield from _unfilled("alerts_webhook_url", raw, values)
    if not url:
        return
    stands = raw.get("alerts_webhook_url")
    if isinstance(stands, str) and not is_template(stands) and not is_encrypted(stands):
        do = "take it from the environment or a file with a lookup, or encrypt it with ansible-vault"
        yield Problem("alerts_webhook_url", "no secret in plain text: who has the URL can post", "a plain URL", do)
    try:
        parts = urlsplit(url)
        well = bool(parts.hostname) and (parts.scheme == "https" or parts.hostname in _LOOPBACK)
        well = well and parts.scheme in ("http", "https") and url.isascii() and url.isprintable() and " " not in url
        well = well and (parts.port is None or parts.port > 0) and "@" not in parts.netloc
    except ValueError:
        well = False
    if not well:
        # It is not quoted: it may be nearly right.
        expected = "an https URL without a user; http only to the host itself"
        yield Problem("alerts_webhook_url", expected, "something else", "correct it where it comes from")


def _mail(raw: Mapping[str, Any], values: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[Problem]:
    recipients = chosen.get("alerts_mail_to")
    if not isinstance(recipients, list) or not recipients:
        return
    sender, server, user = (str(chosen.get(f"alerts_mail_{name}") or "") for name in ("from", "server", "user"))
    for where, address in [
        *((f"alerts_mail_to[{i}]", str(each)) for i, each in enumerate(recipients)),
        ("alerts_mail_from", sender),
    ]:
        name, _, domain = address.rpartition("@")
        if (
            not name
            or not domain
            or "," in address
            or any(char.isspace() or not char.isprintable() for char in address)
        ):
            yield Problem(where, "an address such as ops@example.com", address or "it is not set", "correct it")
    if not server:
        yield Problem("alerts_mail_server", "the name of a mail server", "it is not set", "set it, such as localhost")
    password = chosen.get("alerts_mail_password")
    yield from _unfilled("alerts_mail_password", raw, values)
    if bool(user) != bool(password):
        found = "a user without a password" if user else "a password without a user"
        yield Problem("alerts_mail_user", "both a user and alerts_mail_password, or neither", found, "set the other")
    if user and chosen.get("alerts_mail_security") == "none" and server not in _LOOPBACK:
        expected = "starttls or tls, since a password goes through the connection"
        yield Problem("alerts_mail_security", expected, "none", "protect it, or log in as nobody")


def _unfilled(name: str, raw: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Problem]:
    """A secret that was forgotten today would silence a channel without a word."""
    stands = raw.get(name)
    if isinstance(stands, str) and is_template(stands) and values.get(name) == "":
        do = "set what its template reads, such as the environment variable; or leave the variable out"
        yield Problem(name, "a value", "a template that comes out empty", do)
