"""Runbooks are read and run as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from forge_runbook import Place, Runbooks, steps

PAGE = """# A page

Prose, and a block that nobody runs:

```sh
# Not a heading
exit 1
```

## What you see

```sh on=vm exit=3
echo "found: $((40 + 2)) of them"
exit 3
```

```text shows
found: <number> of them
```

## What to do

```sh on=vault types=key
# Nor this
read -r key < /dev/tty || read -r key
echo "typed $key"
```

```sh on=control
pwd
echo "$NAMED"
```
"""


@pytest.fixture
def runbooks(tmp_path: Path) -> Runbooks:
    """The page in a folder of its own; every place is this machine."""
    (tmp_path / "page.md").write_text(PAGE)
    place = Place(("bash", "-euc"), tmp_path, {"NAMED": "by the environment"})
    remote = Place(("bash", "-c", 'bash -euc "$1"', "ssh"), tmp_path)
    return Runbooks(tmp_path, {"vm": remote, "vault": place, "control": place})


def test_steps_of_a_page() -> None:
    """Only what is marked, with its section, place and what it shows."""
    found = steps(PAGE)
    assert [(step.section, step.line, step.on, step.exit, step.types, step.shows) for step in found] == [
        ("What you see", 12, "vm", 3, "", ("found: <number> of them",)),
        ("What to do", 23, "vault", 0, "key", ()),
        ("What to do", 29, "control", 0, "", ()),
    ]
    assert found[2].commands == 'pwd\necho "$NAMED"\n'


def test_sections_are_followed(runbooks: Runbooks) -> None:
    """In order; what is typed arrives; what nobody ran is told."""
    assert runbooks.left() == ["page:12", "page:23", "page:29"]
    assert runbooks.follow("page", "What you see") == "found: 42 of them\n"
    assert runbooks.left() == ["page:23", "page:29"]
    said = runbooks.follow("page", "What to do", {"key": "it"})
    assert "typed it\n" in said
    assert said.endswith(f"{runbooks.folder}\nby the environment\n")
    assert runbooks.left() == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("exit 3", "exit 4", r"page:12: expected exit code 3; found 4"),
        ('echo "found: $((40 + 2)) of them"', "echo nothing", r"expected 'found: <number> of them'; found:\nnothing"),
    ],
)
def test_step_that_does_otherwise_fails(runbooks: Runbooks, old: str, new: str, complaint: str) -> None:
    """Another exit code, another output."""
    (runbooks.folder / "page.md").write_text(PAGE.replace(old, new))
    with pytest.raises(AssertionError, match=complaint):
        runbooks.follow("page", "What you see")
    assert "page:12" in runbooks.left()


def test_unknown_section_is_refused(runbooks: Runbooks) -> None:
    """A test that follows nothing would prove nothing."""
    with pytest.raises(LookupError, match="in section 'Elsewhere' of page; found none"):
        runbooks.follow("page", "Elsewhere")


@pytest.mark.parametrize("info", ["sh on=moon", "sh exit=1", "sh on=vm once", "sh on=vm exit=x"])
def test_misspelt_marks_are_refused(info: str) -> None:
    """A block that was meant to be run is."""
    with pytest.raises(ValueError, match=r"expected on=|invalid literal"):
        steps(f"# Page\n\n```{info}\ntrue\n```\n")


def test_what_is_shown_follows_commands() -> None:
    """Or it would be checked against nothing."""
    with pytest.raises(ValueError, match="expected commands before"):
        steps("# Page\n\n```text shows\nit\n```\n")
