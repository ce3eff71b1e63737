"""docs/benchmarks.md, in which each program writes between markers of its own."""

from __future__ import annotations

from demo import ROOT, DemoError

PAGE = ROOT / "docs" / "benchmarks.md"


def write(program: str, text: str) -> None:
    """Replace what `make PROGRAM` wrote last.

    Raises:
        DemoError: the markers are gone.
    """
    begin, end = (f"<!-- written by make {program}: {which} -->" for which in ("begin", "end"))
    page = PAGE.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise DemoError(f"Expected: {begin} and {end}, once each, in {PAGE}. Found: not so. Do: put them back.")
    before, rest = page.split(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def table(head: str, rows: list[list[str]], numbers: bool = True) -> str:
    """Return a table in Markdown; `numbers` go to the right."""
    titles = [title.strip() for title in head.split("|")]
    lines = [titles, ["---"] + ["--:" if numbers else "---"] * (len(titles) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
