"""What follows from a habit of an app: whether it stops a release, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..problems import Problem
from .habits import Habit
from .settings import Setting


class Verdict(NamedTuple):
    """A problem, and whether the app runs all the same."""

    stops: bool
    problem: Problem


# What was expected, what was found and what to do; {what} is the code, {state} the app's own folder.
_WORDS = {
    "port": (
        "an app that leaves listening to the platform, which hands each worker its socket",
        "{what} runs when the app is imported",
        'put it below `if __name__ == "__main__":`',
    ),
    "exporter_port": (
        "metrics at a path of the app, as every worker of both slots runs this",
        "{what}, which opens a port that only the first of them gets",
        'mount prometheus_client.make_asgi_app() at "/metrics" instead',
    ),
    "daemon": (
        "an app that stays in the process it is started in",
        "{what}, which forks or leaves the unit's process group",
        "take it out: systemd and Gunicorn supervise the workers, and what runs beside them goes into `commands`",
    ),
    "processes": (
        "no process that the import starts, as each worker of both slots would start one",
        "{what}",
        "start it in `lifespan`, or make it one of the entry's `commands`",
    ),
    "scheduler": (
        "jobs that run once, however many workers there are",
        "{what}, which runs in each worker of both slots",
        "make each job one of the entry's `commands` with a `schedule`",
    ),
    "writes": (
        "nothing written into the release, which is read-only; {state} is the app's own",
        "{what}",
        "take the folder from a setting, and set that to {state}",
    ),
    "sqlite": (
        "a database outside the release, which is read-only; {state} is the app's own",
        "sqlite:///{what}, fixed in the code",
        "take the URL from a setting, and set that to sqlite:///{state}/{file}",
    ),
    "creates_tables": (
        "tables made by a migration: once, before the release takes traffic, by a role of its own",
        "{what}, by each worker, with the app's role, which may not create tables",
        "make migrations (alembic init, alembic revision --autogenerate), or call this from a module of its own and "
        "name that in database.migration.command",
    ),
    "blocks_import": (
        "an import that waits for nobody",
        "{what} when the app is imported",
        "do it in `lifespan`",
    ),
    "blocks_loop": (
        "an event loop that nothing blocks",
        "{what} in an async function: meanwhile the worker answers nobody",
        "await an asynchronous one, or hand it to `await run_in_threadpool(...)`",
    ),
}
# What an app can't do here, whether at import or while it serves; unless an `if` may keep it from that. To write is
# most often below an `if` that asks whether the file is there.
_IMPOSSIBLE = ("port", "exporter_port", "daemon", "writes")


def verdict(habit: Habit, app: str, settings: Iterable[Setting], postgresql: bool) -> Verdict | None:
    """Return what follows from a habit; None for nothing, where a setting or the kind of database takes care of it."""
    if habit.kind == "creates_tables" and not postgresql:
        return None
    if habit.kind == "sqlite" and (
        "{" in habit.what or any(habit.what in one.default for one in settings if isinstance(one.default, str))
    ):
        return None
    state = f"/var/lib/{app}"
    words = [text.format(what=habit.what, state=state, file=Path(habit.what).name) for text in _WORDS[habit.kind]]
    certain = habit.kind == "writes" or not habit.conditional
    stops = certain and habit.kind in _IMPOSSIBLE and (habit.at_import or habit.serving)
    return Verdict(stops, Problem(habit.where, *words))
