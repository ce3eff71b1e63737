"""The entry of `apps` to start from: YAML with comments, made without a library as the host has none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# What stands for a value that only a person knows; preflight refuses it.
FILL_IN = "FILL_IN"
_PLAIN = re.compile(r"[A-Za-z/._][\w ./:+@=()-]*")
# YAML 1.1, which Ansible reads, takes these for something else.
_OTHER = re.compile(
    r"(?i)y|n|yes|no|on|off|true|false|null|~|\.inf|\.nan|[\d.:_+-]+|.*:\s.*|.*\s#.*|.*:$|.*\s$|[-+.]?\d.*"
)
_INDENT = "  "


@dataclass
class Mapping:
    """A mapping of YAML that keeps its order and its comments."""

    items: list[tuple[str, Any, str]] = field(default_factory=list)
    """Key, value and comment; an empty key is a line that is a comment alone."""

    def add(self, key: str, value: Any, comment: str = "") -> None:
        """Append an option."""
        self.items.append((key, value, comment))

    def say(self, comment: str) -> None:
        """Append a comment."""
        self.items.append(("", None, " ".join(comment.splitlines())))

    def suggest(self, key: str, value: Any, comment: str = "") -> None:
        """Append an option that is commented out."""
        self.say(f"{key}: {flow(value)}" + (f"  # {comment}" if comment else ""))

    def plain(self) -> dict[str, Any]:
        """Return what a reader of the YAML gets."""
        pairs = {key: value.plain() if isinstance(value, Mapping) else value for key, value, _ in self.items if key}
        return {key: value for key, value in pairs.items() if value != {}}

    def lines(self, depth: int) -> Iterable[str]:
        """Yield its lines."""
        margin = depth * _INDENT
        for key, value, comment in self.items:
            after = f"  # {' '.join(comment.split())}" if comment else ""
            if not key:
                yield f"{margin}# {comment}"
            elif not isinstance(value, Mapping):
                yield f"{margin}{flow(key)}: {flow(value)}{after}"
            elif value.plain():
                yield f"{margin}{flow(key)}:{after}"
                yield from value.lines(depth + 1)
            else:
                # Suggestions alone: with the key active they would be a mapping without content.
                yield f"{margin}# {flow(key)}:{after}"
                yield from (f"{margin}# {_INDENT}{line.strip().removeprefix('# ')}" for line in value.lines(0))


def flow(value: Any) -> str:
    """Return a value on one line of YAML."""
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and not _OTHER.fullmatch(value)
        return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_item(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_item(key)}: {_item(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _item(value: Any) -> str:
    """Return a value inside a list, where commas and brackets mean something."""
    spelt = flow(value)
    return (
        spelt
        if not isinstance(value, str) or re.fullmatch(r"[\w./+@=-]+(?::[\w./+-]+)*|\".*\"", spelt)
        else json.dumps(value)
    )


def render(name: str, entry: Mapping) -> str:
    """Return the YAML of `apps` with this one entry."""
    outer = Mapping()
    inner = Mapping()
    inner.add(name, entry)
    outer.add("apps", inner)
    return "\n".join(outer.lines(0)) + "\n"
