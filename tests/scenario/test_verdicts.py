"""What judges say is read from outputs of theirs in verdicts/: of a good host, of a bad one, and of none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import forge_verdicts
import pytest
from forge_verdicts import NoVerdict, Verdict

OUTPUTS = Path(__file__).with_name("verdicts")
SAMPLES = """
100.0 192.0.2.10:443
100.5 192.0.2.20:1 192.0.2.20:2 192.0.2.30:9
101.0 192.0.2.20:1 192.0.2.20:2 192.0.2.30:9
109.5 192.0.2.20:2 192.0.2.30:9
110.0 192.0.2.30:9
"""


def output(name: str) -> str:
    """A judge's output; cut to its verdict, where it is long."""
    return (OUTPUTS / name).read_text()


def intermediate(text: str) -> Verdict:
    return forge_verdicts.sslyze(text, "intermediate")


def web_ports(text: str) -> Verdict:
    return forge_verdicts.nmap(text, [22, 80, 443])


def no_udp(text: str) -> Verdict:
    return forge_verdicts.nmap(text, [])


@pytest.mark.parametrize(
    ("read", "name", "figures", "findings"),
    [
        (intermediate, "sslyze-compliant.txt", {}, {}),
        (intermediate, "sslyze-failed.txt", {}, {"maximum_certificate_lifespan": 1, "tls_curves": 1}),
        (forge_verdicts.testssl, "testssl-a-plus.json", {"score": 96}, {}),
        (
            forge_verdicts.testssl,
            "testssl-a.json",
            {"score": 96},
            {"grade A": 1, "Grade capped to A. HSTS is not offered": 1},
        ),
        (
            forge_verdicts.gixy,
            "gixy-two.json",
            {},
            {"missing_resolver (medium)": 1, "return_bypasses_allow_deny (medium)": 1},
        ),
        (forge_verdicts.observatory, "observatory-a-plus.json", {"score": 130}, {}),
        (
            forge_verdicts.observatory,
            "observatory-c.json",
            {"score": 55},
            {
                "grade C": 1,
                "content-security-policy: csp-not-implemented": 1,
                "x-frame-options: x-frame-options-not-implemented": 1,
            },
        ),
        (
            forge_verdicts.exposure,
            "systemd-analyze.txt",
            {
                "nginx.service": 9.6,
                "forge-boot@inbox.service": 9.6,
                "inbox@blue.service": 1.1,
                "inbox-migrate@inbox.service": 1.1,
            },
            {},
        ),
        (web_ports, "nmap-tcp.xml", {"ports": 1000}, {"closed ports": 997}),
        (no_udp, "nmap-udp.xml", {"ports": 20}, {"closed ports": 4}),
        (
            forge_verdicts.schemathesis,
            "schemathesis-waived.json",
            {"cases": 98},
            {f"Schema-valid request rejected: {method} /v1/events": 1 for method in ("GET", "POST")},
        ),
    ],
)
def test_a_verdict_is_read(
    read: Callable[[str], Verdict], name: str, figures: dict[str, float], findings: dict[str, int]
) -> None:
    found = read(output(name))
    assert dict(found.figures) == figures
    assert {name: times for name, times in found.findings.items() if times} == findings


def test_failures_and_warnings_of_schemathesis_are_findings() -> None:
    found = forge_verdicts.schemathesis(output("schemathesis-failures.json")).findings
    assert found["Wrong response to undeclared method: TRACE /health"] == 1
    assert found["unresolvable reference: POST /v1/events"] == 1
    assert sum(found.values()) == 9


def test_both_halves_of_ssh_audit_count() -> None:
    """A policy that passes says nothing of the algorithms beside it, and the other way round."""
    passed, failed = output("ssh-audit-policy-passed.json"), output("ssh-audit-policy-failed.json")
    sound, weak = output("ssh-audit-sound.json"), output("ssh-audit-weak.json")
    assert sum(forge_verdicts.ssh_audit(passed, sound).findings.values()) == 0
    assert "policy: Host keys" in forge_verdicts.ssh_audit(failed, sound).findings
    assert {"fail ecdh-sha2-nistp256", "warn ecdh-sha2-nistp256"} <= set(
        forge_verdicts.ssh_audit(passed, weak).findings
    )
    with pytest.raises(NoVerdict):
        forge_verdicts.ssh_audit(passed, output("ssh-audit-reset.json"))
    with pytest.raises(NoVerdict, match="saw no server"):
        forge_verdicts.ssh_audit(passed.replace('"passed": true', '"passed": false'), sound)


def test_lynis_is_read() -> None:
    """Findings by the test that made them; a report without an end is none."""
    report = output("lynis-63.dat")
    found = forge_verdicts.lynis(report)
    assert found.figures == {"hardening index": 63}
    assert (found.findings["warning DBS-1828"], found.findings["FILE-6310"], found.findings["SSH-7408"]) == (3, 2, 9)
    with pytest.raises(NoVerdict, match="did not come to its end"):
        forge_verdicts.lynis(report.replace("finish=true\n", ""))


def test_a_port_that_should_be_open_and_is_not_is_a_finding() -> None:
    found = forge_verdicts.nmap(output("nmap-tcp.xml"), [22, 443, 8443]).findings
    assert (found["80/tcp open"], found["8443/tcp not open"]) == (1, 1)
    with pytest.raises(NoVerdict, match="did not look at one host"):
        web_ports(output("nmap-tcp.xml").replace('exit="success"', 'exit="error"'))


def test_the_longest_of_the_slow_connections_counts() -> None:
    """Of this client alone, by what the host has open; fewer than were to be made are no measurement."""
    assert forge_verdicts.held(SAMPLES, "192.0.2.20", 2) == 9.0
    assert forge_verdicts.held(SAMPLES, "192.0.2.20", 2, 0.5) == 0.5
    assert forge_verdicts.held(SAMPLES, "192.0.2.30", 1) == 9.5
    with pytest.raises(NoVerdict, match="expected 3 slow connections"):
        forge_verdicts.held(SAMPLES, "192.0.2.20", 3)


def test_h2load_is_counted() -> None:
    """Answers of 200, and the 99th percentile in ms."""
    log = output("h2load.txt")
    answers, p99 = forge_verdicts.h2load(log, 100)
    assert answers == 100
    assert 100 < p99 < 1000
    refused = log.replace("\t200\t", "\t429\t", 3)
    assert forge_verdicts.h2load(refused, 100)[0] == 97
    with pytest.raises(NoVerdict):
        forge_verdicts.h2load(log, 99)


@pytest.mark.parametrize(
    "text", ["", "\n", "[", "{}", "[{}]", "Traceback (most recent call last):\n", "<xml/>", "null"]
)
@pytest.mark.parametrize(
    "read",
    [
        *(intermediate, forge_verdicts.testssl, forge_verdicts.gixy, forge_verdicts.lynis, forge_verdicts.exposure),
        *(forge_verdicts.observatory, forge_verdicts.schemathesis, web_ports),
        lambda text: forge_verdicts.ssh_audit(text, text),
        lambda text: forge_verdicts.h2load(text, 2000),
        lambda text: forge_verdicts.held(text, "192.0.2.20", 1),
    ],
)
def test_a_judge_that_says_nothing_passes_nothing(read: Callable[[str], object], text: str) -> None:
    """What is no verdict fails, whatever it is."""
    with pytest.raises(NoVerdict):
        read(text)


@pytest.mark.parametrize("said", ["OK - Compliant", "FAILED - Not compliant"])
def test_sslyze_contradicts_itself_only_when_its_format_changed(said: str) -> None:
    """A verdict without the criteria that go with it."""
    text = output("sslyze-failed.txt").replace("FAILED - Not compliant", said).replace("        * ", "        - ")
    text = text if said.startswith("FAILED") else output("sslyze-failed.txt").replace("FAILED - Not compliant", said)
    with pytest.raises(NoVerdict):
        intermediate(text)


def test_a_grade_that_is_missing_is_no_grade() -> None:
    entries = [each for each in json.loads(output("testssl-a-plus.json")) if each["id"] != "overall_grade"]
    with pytest.raises(NoVerdict):
        forge_verdicts.testssl(json.dumps(entries))
