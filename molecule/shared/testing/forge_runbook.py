"""Running a runbook: what docs/runbooks/ tells a person to paste is read from there, and run where it says.

A block of commands names the place in its info string, and may say more:

    ```sh on=vm            the host, as its operator
    ```sh on=control       the control machine, in the project's folder; the inventory is inventory/production
    ```sh on=console       the host, as root, where SSH does not lead
    ```sh on=vault         wherever `bao` runs, with BAO_ADDR, BAO_CACERT and an administrator's BAO_TOKEN
    exit=6                 the exit code that is due, if it is not 0
    types=NAME             something that the person types when asked, which the test has under that name

and a block `text shows` after it has lines that it prints, <...> being anything. No other block is run.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PLACES = ("vm", "control", "console", "vault")
ATTRIBUTES = {"on", "exit", "types"}
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)
PATIENCE_SECONDS = 600.0


class Step(NamedTuple):
    """A block of commands."""

    section: str
    """The nearest heading above it."""
    line: int
    """Where it begins on its page."""
    on: str
    """One of PLACES."""
    commands: str
    exit: int
    types: str
    """What is typed, by name; empty as a rule."""
    shows: tuple[str, ...]
    """Lines of its output, <...> being anything."""


def steps(page: str) -> list[Step]:
    """The commands of a page, in its order.

    Raises:
        ValueError: a block is marked in a way that nobody reads.
    """
    # A comment in a block is no heading: blocks are blanked out, line by line.
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), page)
    headings = [(page_line(prose, found.start()), found["title"]) for found in HEADING.finditer(prose)]
    found: list[Step] = []
    for block in FENCE.finditer(page):
        line = page_line(page, block.start())
        words = block["info"].split()
        if words == ["text", "shows"]:
            if not found:
                raise ValueError(f"line {line}: expected commands before what they show; found none")
            found[-1] = found[-1]._replace(shows=tuple(block["text"].splitlines()))
        elif words[:1] == ["sh"] and len(words) > 1:
            attributes = dict(word.partition("=")[::2] for word in words[1:])
            if not attributes.keys() <= ATTRIBUTES or attributes.get("on") not in PLACES:
                raise ValueError(f"line {line}: expected on={'|'.join(PLACES)}, exit=, types=; found {block['info']}")
            section = [title for start, title in headings if start < line][-1]
            exit_code, types = int(attributes.get("exit", 0)), attributes.get("types", "")
            found.append(Step(section, line, attributes["on"], block["text"], exit_code, types, ()))
    return found


def page_line(page: str, offset: int) -> int:
    """The number of the line that a character is on."""
    return page.count("\n", 0, offset) + 1


def pattern(line: str) -> re.Pattern[str]:
    """A line that a page shows, as what has to be in an output."""
    return re.compile(".+".join(re.escape(part) for part in re.split(r"<[^<>]*>", line.strip())))


@dataclass(frozen=True)
class Place:
    """Where commands run: what runs them there, and the folder and environment here.

    With `remote` a shell on the way takes its arguments apart, as that of ssh.
    """

    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    remote: bool = False


@dataclass
class Runbooks:
    """The runbooks of a folder, and which of their steps were run."""

    folder: Path
    places: Mapping[str, Place]
    done: set[tuple[str, int]] = field(default_factory=set)

    def follow(
        self,
        page: str,
        section: str,
        typed: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Do what a section of a page says, and return all that was printed.

        `typed` has what is typed, by name; `environment` what a place has besides its own.

        Raises:
            AssertionError: a step ended or printed otherwise than the page says.
            subprocess.TimeoutExpired: a step took too long.
            LookupError: there is no such section with commands, or no such thing to type.
        """
        chosen = [step for step in self.steps(page) if step.section == section]
        if not chosen:
            raise LookupError(f"expected commands in section {section!r} of {page}; found none")
        output = ""
        for step in chosen:
            status, said = self._run(step, (typed or {})[step.types] if step.types else None, environment or {})
            where = f"{page}:{step.line}"
            assert status == step.exit, f"{where}: expected exit code {step.exit}; found {status}\n{said}"
            for line in step.shows:
                assert pattern(line).search(said), f"{where}: expected {line!r}; found:\n{said}"
            self.done.add((page, step.line))
            output += said
        return output

    def steps(self, page: str) -> list[Step]:
        """The steps of a page."""
        return steps((self.folder / f"{page}.md").read_text())

    def left(self, *pages: str) -> list[str]:
        """The steps that nobody ran, as `page:line`; of these pages, or of all."""
        chosen = pages or [path.stem for path in self.folder.glob("*.md")]
        return [
            f"{page}:{step.line}"
            for page in sorted(chosen)
            for step in self.steps(page)
            if (page, step.line) not in self.done
        ]

    def _run(self, step: Step, typed: str | None, environment: Mapping[str, str]) -> tuple[int, str]:
        """Run a step; the exit code, and what it printed."""
        place = self.places[step.on]
        ours, theirs = pty.openpty() if typed is not None else (-1, subprocess.DEVNULL)
        with subprocess.Popen(
            [*place.command, shlex.quote(step.commands) if place.remote else step.commands],
            cwd=place.folder,
            env={**os.environ, **place.environment, **environment},
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            if typed is not None:
                os.close(theirs)
                # Enter, and Ctrl-D for what reads to the end.
                os.write(ours, f"{typed}\n\x04".encode())
            try:
                said, _ = process.communicate(timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        if typed is not None:
            os.close(ours)
        return process.returncode, said
