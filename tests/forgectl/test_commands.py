"""commands.py: what is checked before anything moves, and what a unit is made of. The rest is in test_cutover.py."""

import shutil
from pathlib import Path

import msgspec
import pytest
from conftest import describe
from forgectl import commands, config, slots, systemd
from forgectl.config import App, Command
from forgectl.errors import Refused
from forgectl.layout import Layout

SLOT_CONF = "[Service]\nType=notify\nLoadCredentialEncrypted=values:/etc/x.values.%i\n"


def app(layout: Layout, **given: Command) -> App:
    return msgspec.structs.replace(config.decode(describe().encode(), layout.description), commands=given)


def release(layout: Layout) -> Path:
    folder = layout.releases / "R1"
    for path in ("source/src/shop/mails.py", "venv/bin/celery", "venv/lib/python3.11/site-packages/arq/__init__.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    (folder / "venv/lib/python3.11/site-packages/single.py").touch()
    (folder / "slot.conf").write_text(SLOT_CONF)
    return folder


@pytest.mark.parametrize("first", ["shop.mails", "shop", "celery", "arq", "arq.cli", "single", "json.tool"])
def test_what_a_release_holds_can_be_run(layout: Layout, first: str) -> None:
    release(layout)
    commands.check_programs(layout, app(layout, beat=Command([first, "-v"], 64, 5)), "R1")


@pytest.mark.parametrize("first", ["nowhere", "nowhere.mails", "/bin/sh", "../celery", "cel"])
def test_what_a_release_lacks_is_refused(layout: Layout, first: str) -> None:
    release(layout)
    with pytest.raises(Refused, match=r"expected apps\.inbox\.commands\.beat to begin with a Python module"):
        commands.check_programs(layout, app(layout, beat=Command([first], 64, 5)), "R1")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_a_schedule_is_judged_by_systemd(layout: Layout) -> None:
    commands.check_schedules(app(layout, beat=Command(["x"], 64, 5), tick=Command(["x"], 64, 5, "Mon *-*-* 03:00:00")))
    for schedule in ("every full moon", "--version", "* * * * *"):
        with pytest.raises(Refused, match=r"apps\.inbox\.commands\.tick\.schedule"):
            commands.check_schedules(app(layout, tick=Command(["x"], 64, 5, schedule)))


def test_a_unit_is_the_slots_with_another_program(layout: Layout) -> None:
    """Of its instance, also where it has none; and it is written once."""
    layout.units.mkdir(parents=True)
    described = (
        describe()
        + """
[commands.beat]
command = ["shop.beat"]
memory_max_mib = 64
stop_seconds = 5
[commands.tick]
command = ["shop.tick"]
memory_max_mib = 65
stop_seconds = 6
schedule = "hourly"
"""
    )
    (release(layout) / "settings.toml").write_text(described)
    assert commands.write(layout, "green", "R1")
    assert not commands.write(layout, "green", "R1")
    assert layout.command_units("green") == ["inbox.beat@green.service"]
    assert layout.command_units("blue") == []
    assert layout.timed_units() == []
    text = (layout.units / "inbox.beat@green.service").read_text()
    assert text.index("Type=notify") < text.index("Type=exec")
    assert "values:/etc/x.values.green\n" in text
    lines = text.splitlines()
    assert lines[lines.index("ExecStart=") + 1].endswith("/forge-launch command inbox green beat")
    assert {"MemoryMax=64M", "TimeoutStopSec=5", "Restart=always"} <= set(lines)


@pytest.mark.parametrize(
    ("name", "slice_"), [("inbox", "system-inbox.slice"), ("in-box-2", r"system-in\x2dbox\x2d2.slice")]
)
def test_commands_share_the_cpu_with_the_slots_of_their_app(layout: Layout, name: str, slice_: str) -> None:
    """Not with other apps, as a unit of its own does."""
    release(layout)
    other = msgspec.structs.replace(app(layout), name=name)
    lines = commands._unit(layout, "green", "R1", other, "beat", Command(["x"], 64, 5)).splitlines()
    assert {f"Slice={slice_}", "CPUWeight=20"} <= set(lines)


def test_a_reload_of_systemd_that_did_not_come_is_made_up_for(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was killed between the files and the reload has left them as they are to be."""
    (layout.units / "inbox@green.service.d").mkdir(parents=True)
    section = '\n[commands.tick]\ncommand = ["x"]\nmemory_max_mib = 64\nstop_seconds = 5\nschedule = "hourly"\n'
    (release(layout) / "settings.toml").write_text(describe() + section)
    behind: set[str] = set()
    calls: list[str] = []

    def run(*command: str) -> bytes:
        calls.append(command[1])
        return b"yes\n" if behind & set(command) else b"no\n\nno\n"

    monkeypatch.setattr(systemd, "run", run)

    def reloads() -> tuple[int, int]:
        calls.clear()
        slots.prepare(layout, "green", "R1", 0)
        first = calls.count("daemon-reload")
        commands.schedule(layout, "green")
        return first, calls.count("daemon-reload") - first

    assert reloads() == (1, 1)
    assert reloads() == (0, 0)
    behind.add("inbox@green.service")
    assert reloads() == (1, 0)
    behind.add("inbox.tick.timer")
    assert reloads() == (1, 1)


def test_other_apps_units_are_not_its_own(layout: Layout) -> None:
    layout.units.mkdir(parents=True)
    for name in ("inbox-two.beat@green.service", "inbox@green.service", "inbox@.service", "inbox-migrate@.service"):
        (layout.units / name).touch()
    assert (layout.command_units("green"), layout.timed_units()) == ([], [])
