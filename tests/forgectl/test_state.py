"""state.py: what a crash leaves, and what is kept."""

import os

import pytest
from conftest import no_room
from forgectl import state
from forgectl.errors import Refused
from forgectl.layout import Layout
from forgectl.state import KEPT_HISTORY, Entry, Operation, Slotted, State, hours_since


def test_the_state_survives_a_write_that_is_cut_short(layout: Layout) -> None:
    present = State(
        live=Slotted("R1", "blue", "now"),
        operation=Operation("starting", "R2", "green", Slotted("R1", "blue", "now"), "now"),
        starts=[1.5],
        history=[Entry("R1", "now", "me", "live", {"start": 1.0})],
    )
    state.save(layout, present)
    (layout.state_dir / ".state.json.new").write_text('{"live": ')
    assert state.load(layout) == present
    with no_room(), pytest.raises(OSError, match=r"state\.json"):
        state.save(layout, State())
    assert state.load(layout) == present


@pytest.mark.parametrize("umask", [0o000, 0o277])
def test_the_state_is_roots_whatever_the_umask(layout: Layout, umask: int) -> None:
    before = os.umask(umask)
    try:
        state.save(layout, State())
    finally:
        os.umask(before)
    assert (layout.state_dir / "state.json").stat().st_mode & 0o777 == 0o600


def test_a_damaged_state_is_refused(layout: Layout) -> None:
    (layout.state_dir / "state.json").write_text("{}x")
    with pytest.raises(Refused, match="expected the state of inbox"):
        state.load(layout)


def test_what_serves_is_known_without_the_file(layout: Layout) -> None:
    """Where it was lost, a cutover still has an old slot to leave alone, to go back to, and to drain."""
    (layout.slots / "green").symlink_to("../releases/R1")
    assert state.load(layout) == State()
    layout.live.symlink_to("green.sock")
    live = state.load(layout).live
    assert live
    assert (live.release, live.slot) == ("R1", "green")
    assert hours_since(live.since) < 1


def test_the_history_is_bounded() -> None:
    present = State()
    for number in range(KEPT_HISTORY + 10):
        present.record(Entry(f"R{number}", "now", "me", "live", {}))
        present.measured(number)
    assert (len(present.history), present.history[-1].release) == (KEPT_HISTORY, f"R{KEPT_HISTORY + 9}")
    assert present.starts == list(range(KEPT_HISTORY + 5, KEPT_HISTORY + 10))


def test_recyclings_push_no_release_out_of_the_history() -> None:
    """They come often, and a rollback goes by the releases."""
    present = State()
    for number in range(2):
        present.record(Entry(f"R{number}", "now", "me", "live", {}))
    for number in range(KEPT_HISTORY + 10):
        present.record(Entry("R1", str(number), "me", "live", {}, action="recycle"))
    assert present.lineage() == ["R0", "R1"]
    assert len(present.history) == KEPT_HISTORY + 2
    assert present.history[-1].at == str(KEPT_HISTORY + 9)
