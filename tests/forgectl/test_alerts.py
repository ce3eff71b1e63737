"""`forgectl alerts`: what is said of each channel, and a test that arrived, did not, or could not begin."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from forgectl import alerts, systemd
from forgectl.errors import Refused

CONFIG = 'repeat_minutes = 60\n[webhook]\nformat = "json"\n[mail]\nto = ["ops@example.com"]\n'


class Unit:
    """forge-alerts.service: what it is, and what it does with a line that is written."""

    def __init__(self, root: Path) -> None:
        self.root, self.state, self.lines = root, "active", list[str]()
        self.takes = ["webhook", "mail"]
        (root / "etc/forge").mkdir(parents=True)
        (root / "var/lib/forge-alerts").mkdir(parents=True)
        (root / "etc/forge/alerts.toml").write_text(CONFIG)

    def keep(self, name: str, **state: Any) -> None:
        """Have it keep a channel's state."""
        (self.root / "var/lib/forge-alerts" / f"{name}.json").write_text(json.dumps(state))

    def write(self, line: str) -> None:
        """Take a line, and deliver it a moment later."""
        self.lines.append(line)
        number = line.split()[3]

        def deliver() -> None:
            time.sleep(0.05)
            for name in self.takes:
                self.keep(name, test=number, delivered={"at": 1.8e9, "id": "x", "alerts": 1}, failing=None, held={})

        threading.Thread(target=deliver).start()


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unit:
    """One with two channels."""
    found = Unit(tmp_path)
    monkeypatch.setattr(systemd, "show", lambda _: {"ActiveState": found.state})
    monkeypatch.setattr(alerts, "_write", found.write)
    monkeypatch.setattr(alerts, "POLL_SECONDS", 0.01)
    return found


def test_a_test_arrives(unit: Unit) -> None:
    found = alerts.test(10, unit.root)
    assert unit.lines[0].startswith(f"ALERT host: test {found['test']} of the alerts")
    assert [channel["arrived"] for channel in found["channels"].values()] == [True, True]


def test_a_test_does_not_arrive_everywhere(unit: Unit) -> None:
    unit.takes = ["mail"]
    unit.keep("webhook", test="", failing={"since": 1.8e9, "attempts": 3, "error": "hooks.example.com answers 404"})
    found = alerts.test(0.5, unit.root)["channels"]
    assert (found["mail"]["arrived"], found["webhook"]["arrived"]) == (True, False)
    assert found["webhook"]["failing"]["error"] == "hooks.example.com answers 404"


def test_there_is_nowhere_to_deliver_to(unit: Unit) -> None:
    (unit.root / "etc/forge/alerts.toml").write_text("repeat_minutes = 60\n")
    with pytest.raises(Refused, match="set alerts_command, alerts_webhook_url or alerts_mail_to"):
        alerts.test(1, unit.root)
    assert (unit.lines, alerts.text(alerts.status(unit.root))) == ([], ["alerts are in the journal alone"])


def test_the_unit_does_not_run(unit: Unit) -> None:
    unit.state = "failed"
    with pytest.raises(Refused, match=r"expected forge-alerts\.service to run; found it failed"):
        alerts.test(1, unit.root)
    assert unit.lines == []


def test_a_host_that_was_never_told(unit: Unit) -> None:
    (unit.root / "etc/forge/alerts.toml").unlink()
    with pytest.raises(Refused, match=r"alerts\.toml; found no such file; run site.yml first"):
        alerts.status(unit.root)
    (unit.root / "etc/forge/alerts.toml").write_text("[mail")
    with pytest.raises(Refused, match="expected TOML in"):
        alerts.status(unit.root)


def test_state_in_words(unit: Unit) -> None:
    unit.keep("webhook", failing={"since": 1.8e9, "attempts": 3, "error": "hooks.example.com answers 404"}, held={})
    assert alerts.text(alerts.status(unit.root)) == [
        "forge-alerts.service: active",
        "webhook: FAILS since 2027-01-15 08:00:00 UTC, 3 times: hooks.example.com answers 404",
        "mail: nothing was to be delivered yet",
    ]
    unit.keep("mail", delivered={"at": 1.8e9, "id": "x", "alerts": 1}, failing=None, held={})
    assert alerts.text(alerts.status(unit.root))[2] == "mail: ok, last at 2027-01-15 08:00:00 UTC"
