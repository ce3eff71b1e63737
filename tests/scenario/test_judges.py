"""How verdicts of judges are judged: a target, a waiver with a bound, and nothing that passes by saying nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forge_judges import RESULTS, TARGETS, WAIVERS, Target, Waiver, assert_satisfied, shortfalls
from forge_verdicts import Verdict

TARGET = Target("a judge", "in words", at_least={"score": 95}, at_most={"app@*": 1.5, "*.service": 2})
GOOD = {"score": 96.0, "app@blue.service": 1.5, "other.service": 2.0}


def problems(verdict: Verdict, *waivers: Waiver) -> list[str]:
    return shortfalls(TARGET, verdict, waivers, "trixie")[0]


@pytest.mark.parametrize(
    ("verdict", "waivers", "expected"),
    [
        (Verdict(GOOD), [], []),
        (Verdict(GOOD, {"weak cipher": 0}), [], []),
        (Verdict(GOOD, {"weak cipher": 2}), [], ["weak cipher: found 2 times"]),
        (Verdict(GOOD | {"score": 94}), [], ["score: expected at least 95; found 94"]),
        # The first pattern that fits counts, not the laxer one.
        (Verdict(GOOD | {"app@blue.service": 1.6}), [], ["app@blue.service: expected at most 1.5; found 1.6"]),
        (Verdict(GOOD | {"other.service": 2.1}), [], ["other.service: expected at most 2; found 2.1"]),
        # Nothing was measured.
        (Verdict(), [], ["score: was not measured", "app@*: was not measured", "*.service: was not measured"]),
        # Waived, by name and up to a bound.
        (Verdict(GOOD, {"old": 1}), [Waiver("a judge", "old", "why")], []),
        (Verdict(GOOD, {"old": 2}), [Waiver("a judge", "old", "why")], ["old: found 2 times, and waived for 1"]),
        (Verdict(GOOD, {"old": 2}), [Waiver("a judge", "old", "why", bound=2)], []),
        (Verdict(GOOD | {"score": 90}), [Waiver("a judge", "score", "why", bound=90)], []),
        (
            Verdict(GOOD | {"score": 89}),
            [Waiver("a judge", "score", "why", bound=90)],
            ["score: waived to 90; found 89"],
        ),
        (Verdict(GOOD | {"other.service": 8}), [Waiver("a judge", "other.service", "why", bound=8)], []),
        (
            Verdict(GOOD | {"other.service": 8.1}),
            [Waiver("a judge", "other.service", "why", bound=8)],
            ["other.service: waived to 8; found 8.1"],
        ),
        # Needed no more.
        (Verdict(GOOD), [Waiver("a judge", "old", "why")], ["old: waived, and nothing needs that any more"]),
        (
            Verdict(GOOD),
            [Waiver("a judge", "score", "why", bound=90)],
            ["score: waived, and nothing needs that any more"],
        ),
        # Somebody else's, and another distribution's.
        (Verdict(GOOD, {"old": 1}), [Waiver("another judge", "old", "why")], ["old: found 1 times"]),
        (Verdict(GOOD, {"old": 1}), [Waiver("a judge", "old", "why", only_on="bookworm")], ["old: found 1 times"]),
        (Verdict(GOOD), [Waiver("a judge", "old", "why", only_on="bookworm")], []),
    ],
)
def test_a_verdict_is_judged(verdict: Verdict, waivers: list[Waiver], expected: list[str]) -> None:
    assert problems(verdict, *waivers) == expected


def test_every_waiver_has_a_judge_and_a_reason() -> None:
    """A reason is a sentence or so; a name is waived once on each distribution."""
    judges = {target.judge for target in TARGETS}
    assert len(judges) == len(TARGETS)
    assert [each for each in WAIVERS if each.judge not in judges or len(each.reason) < 20] == []
    named = [(each.judge, each.name, each.only_on) for each in WAIVERS]
    assert len(set(named)) == len(named)
    assert [name for judge, name, only in named if only and (judge, name, "") in named] == []


def test_verdicts_are_kept_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that miss their target as well."""
    monkeypatch.setenv(RESULTS, str(tmp_path / "results"))
    with pytest.raises(AssertionError, match="grade B: found 1 times"):
        assert_satisfied("testssl.sh", Verdict({"score": 80.0}, {"grade B": 1}), "trixie")
    line = json.loads((tmp_path / "results").read_text())
    assert (line["judge"], line["distribution"], line["figures"]) == ("testssl.sh", "trixie", {"score": 80.0})
    assert line["problems"] == ["grade B: found 1 times", "score: expected at least 95; found 80"]
