"""lock.py with real processes."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import SOURCE, no_room
from forgectl import lock
from forgectl.errors import Locked
from forgectl.layout import Layout

HOLD = """
import sys, time; from pathlib import Path; from forgectl import lock; from forgectl.layout import Layout
with lock.hold(Layout("inbox", Path(sys.argv[1])), sys.argv[2]):
    print("held", flush=True); time.sleep(60)
"""


@contextmanager
def hold_elsewhere(layout: Layout, reason: str = "release") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(layout.root), reason],
        env={"PYTHONPATH": str(SOURCE), "SUDO_USER": "alice"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_holds_it(layout: Layout) -> None:
    with hold_elsewhere(layout) as process:
        expected = rf"release by alice, process {process.pid}, since \d+ s"
        with pytest.raises(Locked, match=expected), lock.hold(layout, "x"):
            pass
        assert str(lock.holder(layout)).startswith("release by alice")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_holder_that_ends_leaves_nothing_behind(layout: Layout, number: signal.Signals) -> None:
    with hold_elsewhere(layout) as process:
        process.send_signal(number)
        process.wait()
    assert lock.holder(layout) is None
    with lock.hold(layout, "next"):
        found = lock.holder(layout)
        assert found is not None
        assert found.reason == "next"
    assert lock.holder(layout) is None


def test_a_patient_command_waits_for_the_holder(layout: Layout) -> None:
    with hold_elsewhere(layout) as process:
        threading.Timer(0.4, process.kill).start()
        with lock.hold(layout, "boot", patience=20):
            assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("reason", lock.ROUTINES)
def test_what_a_timer_began_is_waited_for(layout: Layout, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_elsewhere(layout, reason) as process:
        threading.Timer(0.6, process.kill).start()
        with lock.hold(layout, "release"):
            assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(lock, "ROUTINE_SECONDS", 0.3)
    with hold_elsewhere(layout, reason), pytest.raises(Locked, match=reason), lock.hold(layout, "release"):
        pass


def test_whoever_waited_for_a_timer_has_patience_with_the_next_in_line(layout: Layout) -> None:
    """Which may be the watch, for milliseconds, or somebody who has not said yet who it is."""
    with hold_elsewhere(layout, "recycle") as process:

        def next_in_line() -> None:
            with lock.hold(layout, "watch", patience=20):
                time.sleep(0.1)

        ahead = threading.Thread(target=next_in_line)
        ahead.start()
        time.sleep(0.5)
        threading.Timer(0.1, process.kill).start()
        with lock.hold(layout, "release"):
            process.wait()
        ahead.join()


def test_a_full_disk_keeps_nobody_from_the_lock(layout: Layout) -> None:
    with no_room(), lock.hold(layout, "boot"):
        assert str(lock.holder(layout)).startswith("unknown")


def test_children_do_not_inherit_it(layout: Layout) -> None:
    with lock.hold(layout, "release"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with lock.hold(layout, "next"):
            pass
    finally:
        child.kill()
        child.wait()


def test_looking_does_not_count_as_holding(layout: Layout) -> None:
    with lock.hold(layout, "first"):
        pass
    looker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from forgectl import lock; from forgectl.layout import Layout\n"
            "print('on', flush=True)\nwhile True: lock.holder(Layout('inbox', Path(sys.argv[1])))",
            str(layout.root),
        ],
        env={"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
    )
    assert looker.stdout is not None
    with looker:
        looker.stdout.readline()
        ends = time.monotonic() + 1
        try:
            while time.monotonic() < ends:
                with lock.hold(layout, "release"):
                    pass
        finally:
            looker.kill()
