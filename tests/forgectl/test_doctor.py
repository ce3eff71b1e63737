"""doctor: its catalogue, its findings, and how it runs the checks."""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCE, describe
from forgectl.doctor import runner, table
from forgectl.doctor.catalogue import BY_CODE, CATALOGUE
from forgectl.doctor.checks import CHECKS
from forgectl.doctor.findings import Finding, Looked, Report
from forgectl.doctor.runner import Check, examine
from forgectl.doctor.sight import Sight, Unseen

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/doctor.md").read_text()


def finding(code: str = "F601", subject: str = "host", title: str = "it is", over: bool = False) -> Finding:
    return Finding(code, subject, title, ("seen",), "sudo mend", over)


def report(*findings: Finding) -> Report:
    return Report("vm", "2026-01-01T00:00:00+00:00", 1.0, findings, [Looked("disks", 0.1, "found")])


def check(name: str, *findings: Finding, root: bool = False, anywhere: bool = True) -> Check:
    return Check(name, lambda _: list(findings), root, anywhere)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends the checks that hang, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


def test_catalogue_is_one_table() -> None:
    """No code or name twice, and nothing but the three severities."""
    assert len(BY_CODE) == len(CATALOGUE) == len({entry.name for entry in CATALOGUE})
    assert [entry.code for entry in CATALOGUE] == sorted(BY_CODE)
    assert {entry.severity for entry in CATALOGUE} == {"critical", "warning", "note"}


def test_every_code_is_found_by_some_check() -> None:
    """And no check knows a code that the catalogue does not."""
    sources = [*(SOURCE / "forgectl/doctor/checks").glob("*.py"), SOURCE / "forgectl/doctor/runner.py"]
    used = {code for path in sources for code in re.findall(r'"(F\d{3})"', path.read_text())}
    assert used == set(BY_CODE)


def test_the_page_has_the_catalogue() -> None:
    """Each code with its severity and its runbook, in one row."""
    rows = {
        row[1]: row for row in re.finditer(r"^\| (F\d{3}) \| (.*?) \| (\w+) \| \[(\S+)\]\(\S+\) \|$", DOC, re.MULTILINE)
    }
    assert {code: (row[3], row[4]) for code, row in rows.items()} == {
        entry.code: (entry.severity, entry.runbook) for entry in CATALOGUE
    }


def test_the_page_has_the_document() -> None:
    """Every key that --json prints, and every outcome of a check."""
    document = report(finding()).document()
    keys = {*document, *document["findings"][0], *document["checks"][0]}
    assert {key for key in keys if f"`{key}`" not in DOC} == set()
    assert all(f"`{outcome}`" in DOC for outcome in ("ok", "found", "skipped", "failed", "too slow"))


def test_checks_have_names_of_their_own() -> None:
    assert len({each.name for each in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize(
    ("codes", "verdict", "code"),
    [([], "clean", 0), (["F701"], "clean", 0), (["F701", "F601"], "warning", 10), (["F601", "F801"], "critical", 11)],
)
def test_the_worst_decides(codes: list[str], verdict: str, code: int) -> None:
    """Notes count for nothing."""
    found = report(*map(finding, codes))
    assert (found.verdict, found.exit_code) == (verdict, code)
    assert found.document()["verdict"] == verdict


def test_what_is_over_is_a_note() -> None:
    """Whatever the catalogue says of it."""
    assert finding("F801", over=True).severity == "note"
    assert report(finding("F801", over=True)).exit_code == 0


def test_document_is_json() -> None:
    found = json.loads(json.dumps(report(finding()).document()))
    assert found["schema"] == 1
    assert found["findings"] == [
        {
            "code": "F601",
            "name": "disk nearly full",
            "severity": "warning",
            "subject": "host",
            "title": "it is",
            "evidence": ["seen"],
            "mend": "sudo mend",
            "runbook": "disk-filling",
        }
    ]
    assert found["checks"] == [{"name": "disks", "seconds": 0.1, "outcome": "found"}]


def test_table_says_what_and_what_to_do() -> None:
    """A line for each, and below it the evidence, what mends it and its page."""
    text = table.text(report(finding(title="/ is 95% full")), colour=False)
    assert re.search(r"^F601  warning   host     /? ?/ is 95% full$", text, re.MULTILINE)
    for line in ("  saw      seen", "  mend     sudo mend", "  runbook  docs/runbooks/disk-filling.md"):
        assert line in text.splitlines()
    assert "\x1b[" not in text
    assert "\x1b[" in table.text(report(finding()), colour=True)
    assert table.text(report(), colour=False) == "vm: clean (nothing found), 1 checks in 1.0 s"


def test_what_others_said_does_nothing_to_a_terminal() -> None:
    """Apps, clients and servers choose the words that evidence quotes."""
    quoted = Finding("F201", "inbox", "it \x1b]0;x\x07 ended", ("journal: \x1b[2J gone\r\u202e",), "sudo mend \x9b")
    text = table.text(report(quoted), colour=False)
    assert all(char.isprintable() for char in text.replace("\n", ""))


class _Said(Sight):
    """A host whose journal has one line."""

    def journal(self, *_: str, **__: Any) -> list[dict[str, Any]]:
        """That of an app which quotes what it was given."""
        return [{"MESSAGE": f"no such database: postgresql://inbox:{'hunter2' * 2}@db/inbox"}]


def test_evidence_has_no_secret_by_its_shape(tmp_path: Path) -> None:
    (line,) = _Said(tmp_path).last_words("inbox@blue.service")
    assert "hunter2" not in line
    assert line.startswith("journal of inbox@blue.service: no such database: postgresql://inbox:<scrubbed")


def test_the_worst_comes_first(tmp_path: Path) -> None:
    found = examine(Sight(tmp_path), [check("a", finding("F701"), finding("F601")), check("b", finding("F801"))])
    assert [each.code for each in found.findings] == ["F801", "F601", "F701"]
    assert [(each.name, each.outcome) for each in found.checks] == [("a", "found"), ("b", "found")]


def test_a_check_that_breaks_hides_nothing(tmp_path: Path) -> None:
    """What it saw before, and what others see, is there; that it broke is a finding."""

    def breaks(_: Sight) -> Iterator[Finding]:
        yield finding("F602")
        raise ZeroDivisionError("of nothing")

    def blind(_: Sight) -> Iterator[Finding]:
        yield from ()
        raise Unseen("no systemd")

    found = examine(Sight(tmp_path), [Check("a", breaks, False, True), Check("b", blind, False, True), check("c")])
    assert sorted(each.code for each in found.findings) == ["F002", "F002", "F602"]
    titles = " ".join(each.title for each in found.findings)
    assert "check a could not look: ZeroDivisionError: of nothing" in titles
    assert "check b could not look: no systemd" in titles
    assert [each.outcome for each in found.checks] == ["failed", "failed", "ok"]


def test_a_check_that_hangs_is_left_behind(
    tmp_path: Path, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are all there, after the limit of one and not of several."""
    monkeypatch.setattr(runner, "CHECK_SECONDS", 0.3)

    def hangs(_: Sight) -> Iterator[Finding]:
        yield finding("F602")
        release.wait(60)

    checks = [Check(f"h{number}", hangs, False, True) for number in range(5)]
    began = time.monotonic()
    found = examine(Sight(tmp_path), [*checks, check("c", finding("F801"))])
    assert time.monotonic() - began < 10
    assert [each.outcome for each in found.checks] == ["too slow"] * 5 + ["found"]
    assert sorted(each.code for each in found.findings) == ["F002"] * 5 + ["F602"] * 5 + ["F801"]


def test_a_busy_host_gets_patience(tmp_path: Path) -> None:
    """Everything takes longer there."""
    (tmp_path / "proc").mkdir()
    for load, stretched in (("0.10", 1.0), (str(10 * (os.cpu_count() or 1)), runner.PATIENCE)):
        (tmp_path / "proc/loadavg").write_text(f"{load} 0 0 1/100 1\n")
        assert runner.patience(tmp_path) == stretched


def test_who_is_not_root_is_told_what_was_not_seen(tmp_path: Path) -> None:
    """And gets what anybody may see."""
    found = examine(Sight(tmp_path, is_root=False), [check("a", root=True), check("b", finding("F601"))])
    assert [each.code for each in found.findings] == ["F001", "F601"]
    assert found.findings[0].evidence == ("not seen: a",)
    assert [each.outcome for each in found.checks] == ["skipped", "found"]


def test_on_a_host_without_anything_the_host_is_looked_at(tmp_path: Path) -> None:
    """Not even /etc is there."""
    real = {each.name: each for each in CHECKS}
    found = examine(
        Sight(tmp_path / "nowhere", is_root=True),
        [real["provisioning"], check("apps", finding("F201"), anywhere=False), check("disks", finding("F601"))],
    )
    assert [each.code for each in found.findings] == ["F003", "F601"]
    assert [each.outcome for each in found.checks] == ["found", "skipped", "found"]


def test_one_broken_description_hides_no_other_app(tmp_path: Path) -> None:
    """It is a finding, with what the decoder says; the state is looked at all the same."""
    apps = tmp_path / "etc/forge/apps"
    apps.mkdir(parents=True)
    (apps / "blog.toml").write_text("name = \n")
    (apps / "inbox.toml").write_text(describe())
    real = {each.name: each for each in CHECKS}
    sight = Sight(tmp_path, is_root=True)
    found = examine(sight, [real["configuration"], real["provisioning"]])
    broken = [each for each in found.findings if each.code == "F005"]
    assert [each.subject for each in broken] == ["blog"]
    assert "blog.toml" in broken[0].title
    assert {each.name: each.described is not None for each in sight.apps} == {"blog": False, "inbox": True}
    # Neither was ever released, and site.yml never came to its end.
    assert [(each.code, each.subject) for each in found.findings if each.code == "F004"] == [
        ("F004", "blog"),
        ("F004", "host"),
        ("F004", "inbox"),
    ]


def test_only_one_app_is_looked_at_when_asked(tmp_path: Path) -> None:
    apps = tmp_path / "etc/forge/apps"
    apps.mkdir(parents=True)
    for name in ("blog", "inbox"):
        (apps / f"{name}.toml").write_text(describe())
    assert [each.name for each in Sight(tmp_path, is_root=True, only="blog").apps] == ["blog"]


def test_commands_have_a_limit_of_their_own() -> None:
    """What does not end, is not there, or fails is a reason, and no traceback."""
    sight = Sight()
    with pytest.raises(Unseen, match="did not end within"):
        sight.run("sleep", "5", seconds=0.1)
    with pytest.raises(Unseen, match="no-such-program is not installed"):
        sight.run("no-such-program")
    with pytest.raises(Unseen, match=r"cat /nowhere: .*No such file"):
        sight.run("cat", "/nowhere")
    assert sight.run("echo", "yes") == "yes\n"
