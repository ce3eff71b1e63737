"""The values that a source of secrets gave, and whether they are usable; needs no client of any source."""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

# Linux refuses an environment string longer than this, its name included (MAX_ARG_STRLEN).
LONGEST_VARIABLE = 131072


class Fetched(NamedTuple):
    """Every key of an identity's secrets with its value, and the version (1 and up) that they are of."""

    values: dict[str, Any]
    version: int


def problems(
    values: Mapping[str, Any], variables: Mapping[str, str], where: str, write: str = "write it there"
) -> list[str]:
    """What is wrong with the values that a mapping of variable to key refers to; one line each, never a value.

    `write` says how to write a value; {key} in it becomes the key, quoted for a shell.
    """
    found = []
    for variable, key in variables.items():
        value, do = values.get(key), write.format(key=shlex.quote(key))
        if key not in values:
            found.append(f"key {key} is missing at {where}; {variable} needs it: {do}")
        elif not isinstance(value, str):
            found.append(f"key {key} at {where} is not a string; {variable} needs one: write it as a string")
        elif not value:
            found.append(f"key {key} at {where} is empty; {variable} needs a value: {do}")
        elif "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            found.append(f"key {key} at {where} holds a NUL or an invalid character; {variable} cannot carry it")
        elif len(value.encode()) + len(variable) + 2 > LONGEST_VARIABLE:
            found.append(f"key {key} at {where} is longer than the 128 KiB that {variable} can carry; shorten it")
    return found
