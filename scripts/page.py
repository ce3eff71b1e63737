"""Pages in which a program writes between markers of its own; docs/benchmarks.md is that of most."""

from __future__ import annotations

from pathlib import Path

from demo import ROOT, DemoError

PAGE = ROOT / "docs" / "benchmarks.md"


def write(program: str, text: str, path: Path | None = None) -> None:
    """Replace what `make PROGRAM` wrote last.

    Raises:
        DemoError: the markers are gone.
    """
    path = path or PAGE
    begin, end = (f"<!-- written by make {program}: {which} -->" for which in ("begin", "end"))
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise DemoError(f"Expected: {begin} and {end}, once each, in {path}. Found: not so. Do: put them back.")
    before, rest = page.split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def table(head: str, rows: list[list[str]], numbers: bool = True) -> str:
    """Return a table in Markdown; `numbers` go to the right."""
    titles = [title.strip() for title in head.split("|")]
    lines = [titles, ["---"] + ["--:" if numbers else "---"] * (len(titles) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
