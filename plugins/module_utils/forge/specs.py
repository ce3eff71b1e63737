"""Typed options out of `meta/argument_specs.yml`, and the validation of values against them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from .problems import Problem
from .values import kind, nearest, plain

Options = dict[str, dict[str, Any]]

_ARTICLE = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "dict": "a mapping",
    "list": "a list",
    "path": "a path",
    "raw": "a value",
}
_LONGEST_SHOWN = 40
# Every run reads every role's file; libyaml takes a tenth of the time, where PyYAML was built with it.
_LOADER: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_options(roles: Path, role: str, entry_point: str = "main") -> Options:
    """Return the options of one entry point of `role` below the folder `roles`; empty when it declares none."""
    file = roles / role / "meta" / "argument_specs.yml"
    if not file.is_file():
        return {}
    document = yaml.load(file.read_text(encoding="utf-8"), _LOADER) or {}  # noqa: S506 - either loader is a safe one
    entry = document.get("argument_specs", {}).get(entry_point) or {}
    return entry.get("options") or {}


def read_roles(roles: Path) -> dict[str, Options]:
    """Return the `main` options of every role below `roles` that declares a specification."""
    return {
        folder.name: read_options(roles, folder.name)
        for folder in sorted(roles.iterdir())
        if (folder / "meta" / "argument_specs.yml").is_file()
    }


def describe(spec: Mapping[str, Any]) -> str:
    """Say what `spec` accepts, for the `expected` of a problem."""
    text = _ARTICLE.get(str(spec.get("type", "str")), str(spec.get("type")))
    if spec.get("elements"):
        text += f" of {spec['elements']}"
    if spec.get("choices"):
        text += ", one of " + ", ".join(str(choice) for choice in spec["choices"])
    return text


def validate(options: Options, values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Problem]]:
    """Return `values` in their declared types with every default filled in, and what is wrong with them.

    Each option goes through Ansible's own `ArgumentSpecValidator` by itself, so that a problem names its full path and
    all of them are found at once. Ansible's messages are not passed on: they quote values.
    """
    problems = []
    for key in values:
        if key not in options:
            near = nearest(str(key), options)
            problems.append(
                Problem(
                    where=f"{where}.{key}",
                    expected="one of the options " + ", ".join(sorted(options)),
                    found=f"an option that does not exist: {key}",
                    do=f"did you mean `{near}`?" if near else "remove it",
                )
            )
    normalised: dict[str, Any] = {}
    for name, spec in options.items():
        normalised[name], found = _validate_option(name, spec, values, f"{where}.{name}" if where else name)
        problems += found
    return normalised, problems


def validate_value(name: str, spec: Mapping[str, Any], value: Any) -> list[Problem]:
    """Return what is wrong with the value of one role variable."""
    return _validate_option(name, spec, {name: value}, name)[1]


def _validate_option(
    name: str, spec: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> tuple[Any, list[Problem]]:
    value = values.get(name)
    if value is None:
        if spec.get("required"):
            found = "it is empty" if name in values else "it is not set"
            do = f"set it: {_first_sentence(spec.get('description', ''))}"
            return None, [Problem(where, describe(spec), found, do)]
        value = spec.get("default")
        if value is None:
            return None, []
    if spec.get("options"):
        return _validate_nested(spec, value, where)
    result = ArgumentSpecValidator({name: {k: v for k, v in spec.items() if k != "description"}}).validate(
        {name: value}
    )
    # The validator turns a mapping or a list into its text where a string is wanted; nobody ever means that.
    text_wanted = spec.get("type", "str") in ("str", "path")
    if result.error_messages or (text_wanted and not isinstance(value, (str, int, float))):
        return None, [Problem(where, describe(spec), _show(value), f"give it {describe(spec)}")]
    return plain(result.validated_parameters[name]), []


def _validate_nested(spec: Mapping[str, Any], value: Any, where: str) -> tuple[Any, list[Problem]]:
    if spec.get("type") == "list":
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            return None, [Problem(where, "a list of mappings", kind(value), "write one mapping for each item")]
        results = [validate(spec["options"], item, f"{where}[{index}]") for index, item in enumerate(value)]
        return [item for item, _ in results], [problem for _, found in results for problem in found]
    if not isinstance(value, Mapping):
        wanted = "a mapping with " + ", ".join(spec["options"])
        return None, [Problem(where, wanted, kind(value), "write it as a mapping, one option a line")]
    return validate(spec["options"], value, where)


def _show(value: Any) -> str:
    """Show a short scalar; only options that hold no secret come here, and the caller masks known secrets anyway."""
    if isinstance(value, (str, int, float, bool)) and 0 < len(str(value)) <= _LONGEST_SHOWN:
        return f"{kind(value)}: {value}"
    return kind(value)


def _first_sentence(description: Any) -> str:
    text = str(description[0]) if isinstance(description, list) and description else str(description)
    return text.split("; ")[0].rstrip(".")
