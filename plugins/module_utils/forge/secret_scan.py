"""Secrets in plain text, found by the name of a variable or by the shape of its value."""

from __future__ import annotations

import re
from typing import Any

from .values import leaves

# Names under which a setting holds a secret.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|SECRET_ID|CREDENTIALS?|(?<!PUBLIC_)KEY)$", re.IGNORECASE
)
# For role variables a KEY is as often the name of a key or of a file, so there the value decides.
_SECRET_VARIABLE = re.compile(r"_(?:password|passwd|passphrase|secret|token|secret_id|credentials?)$")

_SHAPES = (
    ("a private key", re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----")),
    # https://developer.hashicorp.com/vault/docs/concepts/tokens#token-prefixes; OpenBao issues the short form.
    ("a Vault token", re.compile(r"(?<![\w.-])(?:hv[sbr]\.[\w-]{20,}|[sr]\.[A-Za-z0-9]{24}(?![\w.-])|b\.[\w-]{60,})")),
    # {{password}} is a place for one, and so is {password}.
    ("a URL with a password", re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:(?!{+\w+}+@)[^/\s@]+@")),
    ("a GitHub token", re.compile(r"\b(?:gh[opsur]_[A-Za-z0-9]{36,}|github_pat_\w{50,})")),
    ("a Slack token", re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}")),
    ("an AWS secret access key", re.compile(r"(?i)aws.{0,20}secret.{0,20}['\"=:\s][A-Za-z0-9/+]{40}\b")),
)


def is_secret_name(name: str) -> bool:
    """Tell whether an environment variable called `name` is one that holds a secret."""
    return bool(_SECRET_NAME.search(name))


def is_secret_variable(name: str) -> bool:
    """Tell whether a role variable called `name` is one that holds a secret."""
    return bool(_SECRET_VARIABLE.search(name))


def holds_value(value: Any) -> bool:
    """Tell whether `value` could be a secret at all: a flag, an empty value and a template (which names one) cannot.

    On the command line a flag is text: `-e database_password=true`.
    """
    text = "" if value is None else str(value)
    return text.lower() not in ("", "true", "false", "yes", "no") and not is_template(text)


def is_template(text: str) -> bool:
    """Tell whether Ansible would take `text` for a template."""
    return "{{" in text or "{%" in text


def shape(text: str) -> str | None:
    """Say which kind of secret `text` contains, or None."""
    for name, pattern in _SHAPES:
        if pattern.search(text):
            return name
    return None


def shapes(value: Any, where: str) -> list[tuple[str, str, str]]:
    """Return path, kind and text of every scalar in `value` that has the shape of a secret."""
    found = []
    for path, leaf in leaves(value, where):
        if isinstance(leaf, str):
            name = shape(leaf)
            if name:
                found.append((path, name, leaf))
    return found


def looks_like_value(text: str) -> bool:
    """Tell whether `text`, which should be the name of a key, rather is a secret itself."""
    if len(text) > 64 or not re.fullmatch(r"[\w.-]+", text):
        return True
    letters, digits = re.search(r"[A-Za-z]", text), re.findall(r"\d", text)
    return len(text) >= 24 and bool(letters) and len(digits) >= 3 and "_" not in text
