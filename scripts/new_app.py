#!/usr/bin/env python3
"""Write the entry of a new app into an inventory: `make new-app PATH=... [NAME=...] [MODULE=...] [INVENTORY=...]`.

The entry is added to the mapping `apps` where it stands; every other line of the inventory stays as it is, comments
included. What can't be done that way is refused, with the entry to be put there by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plugins" / "module_utils"))

from forge.inspection.draft import VAULT, draft  # noqa: E402
from forge.inspection.judge import Report, inspect  # noqa: E402
from forge.inspection.text import render  # noqa: E402
from forge.names import name_problems  # noqa: E402
from forge.source_files import SourceError  # noqa: E402

# The name that README.md gives a copy of the example, which stays as it is.
INVENTORY = ROOT / "inventory" / "production"
KEY = "apps"


class Impossible(Exception):
    """The entry can't be written; the message says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Place:
    """Where `apps` is, or is to be: a file and its text."""

    file: Path
    text: str
    apps: yaml.Node | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect, write, and say what is left to do; return 0 if the entry was written, 1 if not, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="make new-app", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path, help="a folder, a wheel or an sdist")
    parser.add_argument("--name", default="", help="name of the entry; without it that of the project")
    parser.add_argument("--module", default="", help="the callable, where it is not the one that is found")
    parser.add_argument("--inventory", type=Path, default=INVENTORY)
    options = parser.parse_args(arguments)
    try:
        report = inspect(options.path, name=options.name, module=options.module)
        check_name(report.name)
        sources = [value for file in variable_files(options.inventory) if (value := top_level(file, "secrets_source"))]
        draft(report, spelt(report), sources[-1] if sources else VAULT)
        if not report.will_run:
            print(render(report), end="")
            print(f"Nothing was written: mend this first. forgectl inspect --entry {options.path} prints the entry.")
            return 1
        place = find(options.inventory)
        new = added(place, report)
        write(place.file, new)
    except (SourceError, Impossible) as error:
        print(f"new-app: {error}", file=sys.stderr)
        return 1
    print(f"{place.file} has {KEY}.{report.name} now.")
    for number, what in enumerate(report.fill_in, start=1):
        print(f"  {number}. fill in: {what}")
    if report.keys:
        print(f"  Secrets to store: {', '.join(report.keys)} (docs/vault.md)")
    for warning in report.warnings:
        print(f"  {warning.where}: {warning.found}; {warning.do}")
    return 0


def check_name(name: str) -> None:
    """Refuse a name that preflight refuses.

    Raises:
        Impossible: it does.
    """
    for wrong in name_problems(name):
        raise Impossible(f"expected {wrong.expected}; found {wrong.found}; choose another: make new-app NAME=...")


def spelt(report: Report) -> str:
    """Return the source as an entry spells it: from the project's root if it is in there."""
    path = Path(report.path).resolve()
    whole = path / report.source if report.kind == "folder" else path
    return whole.relative_to(ROOT).as_posix() if whole.is_relative_to(ROOT) else str(whole)


def variable_files(inventory: Path) -> list[Path]:
    """Return the files of variables of an inventory."""
    found = [*inventory.glob("group_vars/**/*"), *inventory.glob("host_vars/**/*")]
    return sorted(file for file in found if file.is_file() and file.suffix in (".yml", ".yaml", ""))


def top_level(file: Path, key: str) -> str:
    """Return a scalar at the top level of a file, empty where there is none."""
    node = value_of(composed(file, file.read_text(encoding="utf-8")), key)
    return node.value if isinstance(node, yaml.ScalarNode) else ""


def composed(file: Path, text: str) -> yaml.Node | None:
    """Return the nodes of a file: nothing is constructed, so tags such as !vault mean nothing.

    Raises:
        Impossible: it is no YAML.
    """
    if text.startswith("$ANSIBLE_VAULT"):
        return None
    try:
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        reason = str(error).partition("\n")[0]
        raise Impossible(f"expected YAML in {file}; found: {reason}; mend the file") from error


def value_of(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """Return the value of a key of a mapping."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def find(inventory: Path) -> Place:
    """Return where the entry goes: the file that has `apps`, else that of the variables of all hosts.

    Raises:
        Impossible: there is no inventory, or several files have `apps`.
    """
    if not inventory.is_dir():
        raise Impossible(
            f"expected an inventory at {inventory}; found none; make one: cp -r inventory/example {inventory}"
        )
    places = []
    for file in variable_files(inventory):
        text = file.read_text(encoding="utf-8")
        apps = value_of(composed(file, text), KEY)
        if apps is not None:
            places.append(Place(file, text, apps))
    if len(places) > 1:
        names = ", ".join(str(place.file) for place in places)
        raise Impossible(f"expected one file with `{KEY}`; found {names}; add the entry by hand to the one you mean")
    for file in sorted(inventory.glob("*.y*ml")):
        if not places and re.search(rf"^\s+{KEY}:", file.read_text(encoding="utf-8"), re.MULTILINE):
            raise Impossible(
                f"expected `{KEY}` in group_vars or host_vars; found it in {file}; move it, or add the entry by hand"
            )
    if places:
        return places[0]
    folder = inventory / "group_vars"
    whole = next((file for file in (folder / "all.yml", folder / "all.yaml") if file.is_file()), None)
    file = whole or (folder / "all" / f"{KEY}.yml" if (folder / "all").is_dir() else folder / "all.yml")
    return Place(file, file.read_text(encoding="utf-8") if file.is_file() else "---\n")


def added(place: Place, report: Report) -> str:
    """Return the text of the file with the entry in it.

    Raises:
        Impossible: the name is taken, or `apps` is no mapping in block style.
    """
    lines = report.entry_text.splitlines()
    apps, text = place.apps, place.text
    if apps is None:
        new = text + ("" if not text or text.endswith("\n") else "\n") + "\n".join(["", *lines, ""])
        return checked(place, new, report)
    if isinstance(apps, yaml.MappingNode) and value_of(apps, report.name) is not None:
        raise Impossible(
            f"expected a name that {place.file} does not have yet; found {KEY}.{report.name}; choose another: "
            "make new-app NAME=..."
        )
    empty = isinstance(apps, yaml.ScalarNode) and apps.value in ("", "null", "~")
    if empty or (isinstance(apps, yaml.MappingNode) and not apps.value):
        # `apps:` and `apps: {}`
        head, tail = text[: apps.start_mark.index], text[apps.end_mark.index :]
        rest, _, below = tail.partition("\n")
        new = "\n".join([head.rstrip(" ") + rest.rstrip(), *lines[1:], below])
        return checked(place, new, report)
    if not isinstance(apps, yaml.MappingNode) or apps.flow_style:
        found = "a template or another value" if isinstance(apps, yaml.ScalarNode) else "one in braces, or a list"
        raise Impossible(
            f"expected `{KEY}` in {place.file} to be a mapping with one entry a block; found {found}; add the entry by "
            f"hand:\n{report.entry_text}"
        )
    margin = " " * apps.value[0][0].start_mark.column
    block = [f"{margin}{line.removeprefix('  ')}" for line in lines[1:]]
    above = text.splitlines()
    at = last_line(apps, above)
    new = "\n".join([*above[: at + 1], *block, *above[at + 1 :]]) + "\n"
    return checked(place, new, report)


def last_line(node: yaml.Node, lines: list[str]) -> int:
    """Return the number of the last line of a node, from 0."""
    while isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    at: int = node.end_mark.line
    if node.end_mark.column == 0 and at > node.start_mark.line:
        # A block of text ends where the next thing begins.
        at -= 1
        while not lines[at].strip() or re.match(r"#", lines[at]):
            at -= 1
    return at


def checked(place: Place, new: str, report: Report) -> str:
    """Return `new` after a look at what a reader of it gets: what was there, and the entry.

    Raises:
        Impossible: it would be something else.
    """
    before, after = composed(place.file, place.text), composed(place.file, new)
    apps = value_of(after, KEY)
    entries = dict(pairs(apps))
    gained = entries.pop(report.name, None)
    others = {name: value for name, value in pairs(after) if name != KEY}
    same = others == {name: value for name, value in pairs(before) if name != KEY}
    if (
        not same
        or entries != dict(pairs(place.apps))
        or gained is None
        or not all(
            line in new.splitlines()
            for line in place.text.splitlines()
            if line.strip() and not line.startswith(f"{KEY}:")
        )
    ):
        raise Impossible(
            f"expected to add the entry to {place.file} without touching another line; found no way; add it by hand:\n"
            f"{report.entry_text}"
        )
    return new


def pairs(node: yaml.Node | None) -> list[tuple[str, str]]:
    """Return keys and values of a mapping, the values spelt in one way whatever their style."""
    if not isinstance(node, yaml.MappingNode):
        return []
    return [(key.value, yaml.serialize(value)) for key, value in node.value]


def write(file: Path, text: str) -> None:
    """Replace a file, whole or not at all, with its mode and its ends of lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o644
    if file.exists() and b"\r\n" in file.read_bytes():
        text = text.replace("\n", "\r\n")
    with tempfile.NamedTemporaryFile("wb", dir=file.parent, prefix=".", delete=False) as temporary:
        temporary.write(text.encode())
    Path(temporary.name).chmod(mode)
    Path(temporary.name).replace(file)


if __name__ == "__main__":
    sys.exit(main())
