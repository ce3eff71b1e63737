"""doctor_page: whatever hosts answer becomes a row, and all that they say is text."""

from __future__ import annotations

import json
import random
import re
import subprocess
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from doctor_page import answers, page, plots

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = "playbooks/doctor.yml"
BEGUN = datetime(2026, 1, 14, 12, 0, tzinfo=UTC)
STEPS = 288
AT = BEGUN + timedelta(minutes=5 * STEPS - 1)
NASTY = '<script>alert(1)</script> & "quoted" \'\x1b[31m'


def finding(severity: str = "critical", **changes: Any) -> dict[str, Any]:
    """A finding as doctor prints it."""
    return {
        "code": "F803",
        "name": "many 5xx answers",
        "severity": severity,
        "subject": "inbox",
        "title": "812 of 9310 answers of the last hour were 5xx",
        "evidence": ["/var/log/nginx/inbox.json: status 502"],
        "mend": "sudo forgectl rollback inbox",
        "runbook": "errors-in-numbers",
    } | changes


def report(*findings: dict[str, Any]) -> dict[str, Any]:
    """What `forgectl doctor --json` prints."""
    severities = {each["severity"] for each in findings}
    verdict = next((each for each in ("critical", "warning") if each in severities), "clean")
    checks = [{"name": "nginx", "seconds": 0.01, "outcome": "ok"}]
    start = {"schema": 1, "host": "web1", "at": "2026-01-15T12:00:00+00:00", "seconds": 1.25}
    return start | {"verdict": verdict, "findings": list(findings), "checks": checks}


def app_day(**changes: Any) -> dict[str, Any]:
    """The day of an app that is asked once a second."""
    zeros = [0] * STEPS
    return {
        "requests": [300] * STEPS,
        "answers": {"2xx": [300] * STEPS, "3xx": zeros, "4xx": zeros, "5xx": zeros},
        "p50": [0.01] * STEPS,
        "p95": [0.05] * STEPS,
        "p99": [0.2] * STEPS,
        "memory": [150 << 20] * STEPS,
        "memory_limit": 512 << 20,
        "happened": [],
        "complete_from": BEGUN.isoformat(),
        "unreadable": 0,
    } | changes


def day(**apps: dict[str, Any]) -> dict[str, Any]:
    """What `forgectl day --json` prints."""
    return {"schema": 1, "at": AT.isoformat(), "from": BEGUN.isoformat(), "step": 300, "apps": apps}


def answer(
    doctor: Any, last: Any, codes: tuple[int, int] = (0, 0), stderr: str = "", before: str = ""
) -> dict[str, Any]:
    """What the task that asks a host returns."""
    said = [before + (each if isinstance(each, str) else json.dumps(each)) for each in (doctor, last)]
    ends = [f"\n\nexit {name} {code}\n" for name, code in zip(("doctor", "day"), codes, strict=True)]
    return {"code": 0, "stdout": "".join(map("".join, zip(said, ends, strict=True))), "stderr": stderr}


def terminal(answered: dict[str, Any]) -> dict[str, Any]:
    """The same through a connection with a terminal."""
    return answered | {"stdout": answered["stdout"].replace("\n", "\r\n")}


@pytest.mark.parametrize(
    ("answered", "verdict", "why"),
    [
        (answer(report(), day(inbox=app_day())), "clean", ""),
        (answer(report(finding("note")), day(), (0, 0)), "clean", ""),
        (answer(report(finding("warning")), day(), (10, 0)), "warning", ""),
        (answer(report(finding("warning"), finding()), day(), (11, 0)), "critical", ""),
        (answer(report(), day(), before="Welcome to web1\n"), "clean", ""),
        (answer(report() | {"more": [1]}, day()), "clean", ""),
        (terminal(answer(report(), day(), before="forgectl: a warning\n")), "clean", ""),
        (terminal(answer("forgectl: boom", "", (1, 1))), "unknown", "exit code 1: forgectl: boom"),
        (
            {"unreachable": True, "msg": "Task failed: Connection timed out"},
            "unknown",
            "does not answer: Connection timed out",
        ),
        ({"code": 127, "stdout": "", "stderr": ""}, "unknown", "was never provisioned"),
        (answer("", "", (2, 2), "Usage: forgectl"), "unknown", "has an older forgectl, without `forgectl doctor`"),
        (answer("", "", (1, 1), "boom"), "unknown", "failed on it with exit code 1: boom"),
        (answer("", "", (124, 0)), "unknown", "took too long"),
        (answer({"schema": 2}, "", (0, 0)), "unknown", "answers in a way that this page does not read"),
        (answer("Traceback", "", (0, 0)), "unknown", "answers in a way that this page does not read"),
        ({"code": 1, "stdout": "", "stderr": "sudo: a password is required"}, "unknown", "a password is required"),
        ({"failed": True, "msg": "no shell"}, "unknown", "could not be asked: no shell"),
        ({}, "unknown", "could not be asked"),
    ],
)
def test_every_answer_is_a_row(answered: dict[str, Any], verdict: str, why: str) -> None:
    """With a verdict, and where there is none with the reason."""
    host = answers.read("web1", answered)
    assert host.verdict == verdict
    assert why in host.why
    assert bool(host.why) == bool(why)
    html = page.html([host], AT)
    assert f'<span class="badge {verdict}">{verdict}</span>' in html
    assert "".join(page.table([host])).startswith(f"web1  {verdict}")
    assert host.day is not None or host.why_no_day


@pytest.mark.parametrize(
    ("program", "verdict", "why"),
    [
        ("echo $1; exit 2", "unknown", "has an older forgectl"),
        ("test $1 = doctor && printf %s '{report}' && exit 11; exit 1", "critical", ""),
        ("kill -9 $$", "unknown", "failed on it with exit code 137"),
        ("", "unknown", "was never provisioned"),
    ],
)
def test_what_a_shell_makes_of_it(tmp_path: Path, program: str, verdict: str, why: str) -> None:
    """The command that asks, with a forgectl that prints no newline, fails or is not there."""
    forgectl = tmp_path / "forgectl"
    if program:
        forgectl.write_text("#!/bin/sh\n" + program.replace("{report}", json.dumps(report(finding()))))
        forgectl.chmod(0o755)
    command = answers.COMMAND.replace(answers.FORGECTL, str(forgectl))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    host = answers.read("web1", {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr})
    assert (host.verdict, why in host.why, bool(host.why)) == (verdict, True, bool(why)), host.why


def test_a_host_that_cannot_be_asked_is_a_row(tmp_path: Path) -> None:
    """One whose connection or password does not even come out: the others are on the page, and the run fails."""
    (tmp_path / "hosts.yml").write_text(
        "all: {vars: {ansible_connection: local, ansible_become: false}, hosts: {bare: {}, "
        "broken: {ansible_become: true, ansible_become_password: '{{ nowhere }}'}}}"
    )
    inventory = ["--inventory", str(tmp_path / "hosts.yml")]
    for limit in ("all", "broken"):
        done = subprocess.run(
            ["ansible-playbook", *inventory, "--limit", limit, "-e", f"page={tmp_path}/{limit}.html", PLAYBOOK],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert re.search(r"^broken +unknown +could not be asked: .*nowhere", done.stdout, re.MULTILINE), done.stdout
        assert (done.returncode, "bare  " in done.stdout) == (2, limit == "all"), done.stdout
        assert "broken" in (tmp_path / f"{limit}.html").read_text()


def test_plots_without_doctor() -> None:
    """Of a host whose doctor fails the last day is shown all the same."""
    host = answers.read("web1", answer("", day(inbox=app_day()), (1, 0)))
    assert host.verdict == "unknown"
    assert page.html([host], AT).count("<svg ") == 4


class Judge(HTMLParser):
    """What of a page could do something, and what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.active: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "img", "link", "form"):
            self.active.append(tag)
        self.active += [name for name, _ in attrs if name.startswith("on")]
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def test_nothing_of_a_page_runs_or_is_fetched() -> None:
    """Whatever hosts and apps are called, and say."""
    nasty = finding(title=NASTY, subject=NASTY, evidence=[NASTY], mend=NASTY, runbook=NASTY, code=NASTY)
    happened = [{"at": AT.isoformat(), "action": NASTY, "release": NASTY, "outcome": NASTY}]
    hosts = [
        answers.read(NASTY, answer(report(nasty), day(**{NASTY: app_day(happened=happened)}), (11, 0))),
        answers.read("old", answer("", "", (1, 1), NASTY)),
    ]
    html = page.html(hosts, AT)
    judge = Judge()
    judge.feed(html)
    assert (judge.active, judge.open) == ([], [])
    assert all(address.startswith("#host-") for address in judge.addresses)
    assert re.search(r"url\(|@import|https?:", html) is None
    assert "default-src 'none'" in html
    assert "\x1b" not in "".join(page.table(hosts))


def drawings(html: str) -> list[ElementTree.Element]:
    """The plots, as what they are."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]  # noqa: S314 - our own


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": []},
        {"answers": {"4xx": [1], "5xx": []}},
        {"complete_from": "yesterday"},
        {"complete_from": "2026-01-14T12:00:00"},
        {"happened": [{"at": "now", "action": "release", "release": "r1", "outcome": "live"}]},
    ],
)
def test_a_day_that_nobody_can_draw_is_said(changes: dict[str, Any]) -> None:
    """And takes no other host off the page."""
    odd = answers.read("odd", answer(report(), day(inbox=app_day(**changes))))
    well = answers.read("well", answer(report(), day(inbox=app_day())))
    html = page.html([odd, well], AT)
    assert html.count("<svg ") == 4
    assert "No plots: its forgectl day answers in a way that this page does not read: " in html


def test_a_day_is_drawn() -> None:
    """Gaps are gaps, errors are bars, releases are lines where they belong, and the figures are in words as well."""
    middle = (BEGUN + timedelta(hours=12)).isoformat()
    failed = [0] * 100 + [30] * 2 + [0] * 186
    gaps: list[float | None] = [None if 50 <= number < 60 else 0.2 for number in range(STEPS)]
    app = app_day(
        answers={"2xx": [300] * STEPS, "3xx": [0] * STEPS, "4xx": [1] * STEPS, "5xx": failed},
        p99=gaps,
        memory=[None] * 287 + [200 << 20],
        happened=[{"at": middle, "action": "release", "release": "20260115-a", "outcome": "rolled back"}],
        complete_from=(BEGUN + timedelta(hours=6)).isoformat(),
    )
    html = page.html([answers.read("web1", answer(report(), day(inbox=app)))], AT)
    requests, latency, errors, memory = drawings(html)
    assert requests.get("aria-label") == "Requests a second: 86,400 in all, up to 1.25/s"
    # One line before the gap and one behind it.
    (line,) = [path.get("d") or "" for path in latency.iter("path") if path.get("class") == "line p99"]
    assert line.count("M") == 2
    (bars,) = [path.get("d") or "" for path in errors.iter("path") if path.get("class") == "bars e5xx"]
    # The outline of both: up, along each, and down again.
    assert re.fullmatch(r"M100,100v-([\d.]+)h1 1v\1z", bars)
    assert "200 MiB now, up to 200 of 512 MiB" in html
    for plot in (requests, latency, errors, memory):
        (mark,) = [path.get("d") for path in plot.iter("path") if path.get("class") == "bad mark"]
        assert mark == "M144,0 L144,100"
        (unread,) = [rect for rect in plot.iter("rect") if rect.get("class") == "unread"]
        assert unread.get("width") == "72"
        (hover,) = [group for group in plot.iter("g") if group.get("class") == "hover"]
        assert len(hover) == 24
    assert "Requests before 18:00 are not counted" in html
    told = [title.text or "" for title in errors.iter("title")]
    assert "20:00 to 21:00: 60 x 5xx, 12 x 4xx" in told


def test_an_app_that_nobody_asks_is_drawn() -> None:
    """An empty day divides by nothing."""
    nothing: list[None] = [None] * STEPS
    zeros = [0] * STEPS
    app = app_day(
        requests=zeros,
        answers=dict.fromkeys(("2xx", "3xx", "4xx", "5xx"), zeros),
        **dict.fromkeys(("p50", "p95", "p99", "memory"), nothing),
        memory_limit=0,
    )
    html = page.html([answers.read("web1", answer(report(), day(inbox=app)))], AT)
    assert len(drawings(html)) == 4
    assert "not measured" in html
    assert "no request" in html


def test_the_worst_is_first() -> None:
    """And of many hosts those that are well begin folded."""
    well = [answers.read(f"web{number}", answer(report(), day())) for number in range(9)]
    ill = [
        answers.read("web98", answer(report(finding("warning")), day(), (10, 0))),
        answers.read("web97", {"unreachable": True, "msg": "gone"}),
        answers.read("web99", answer(report(finding()), day(), (11, 0))),
    ]
    html = page.html([*well, *ill], AT)
    assert re.findall(r'id="host-\d+"( open)?>\s*<summary><h2>(\w+)<', html)[:4] == [
        (" open", "web99"),
        (" open", "web97"),
        (" open", "web98"),
        ("", "web0"),
    ]
    assert page.summary([*well, *ill]) == "1 critical, 1 unknown, 1 warning, 9 clean"
    assert [line.split()[0] for line in page.table([*well, *ill]) if line.startswith("web")][:3] == [
        "web99",
        "web97",
        "web98",
    ]


@pytest.mark.parametrize(
    ("most", "top"), [(0, 1.0), (0.97, 1.0), (1.0, 1.5), (37, 40.0), (999, 1500.0), (0.0123, 0.015)]
)
def test_an_axis_ends_a_little_above_the_largest_value(most: float, top: float) -> None:
    """With a number that is easy to halve."""
    assert plots._top([most, None]) == pytest.approx(top)


def test_a_page_of_many_hosts_can_be_sent() -> None:
    """Also where nothing of their day is even."""
    chance = random.Random(1)  # noqa: S311 - figures of a drawing

    def spread(most: float) -> list[float]:
        return [most * chance.random() for _ in range(STEPS)]

    def uneven() -> dict[str, Any]:
        counts = [int(each) for each in spread(90000)]
        errors = [int(each) for each in spread(40)]
        p50, p95, p99 = ([least + each for each in spread(least)] for least in (0.01, 0.05, 0.2))
        answers_of = {"2xx": counts, "3xx": counts, "4xx": errors, "5xx": errors}
        memory = [int(each) for each in spread(400 << 20)]
        return app_day(requests=counts, answers=answers_of, p50=p50, p95=p95, p99=p99, memory=memory)

    hosts = [answers.read(f"web{number}", answer(report(), day(inbox=uneven()))) for number in range(20)]
    html = page.html(hosts, AT)
    assert len(html.encode()) / 20 < 30_000
    # A line has all its points, where they belong to within less than a pixel.
    requests = drawings(html)[0]
    (line,) = [path.get("d") or "" for path in requests.iter("path") if path.get("class") == "line requests"]
    assert len(re.findall(r"-?[\d.]+", line)) >= STEPS
