"""What is under way with an app, or was left half-way, and whether clients are kept out meanwhile."""

import time
from collections.abc import Iterator

from forgectl import lock, state
from forgectl.doctor.findings import Finding
from forgectl.doctor.sight import AppSight, Sight, span

# Longer than a release takes, with its environment to be built and a short migration.
HELD_SECONDS = 900.0


def operations(sight: Sight) -> Iterator[Finding]:
    """F301 and F302: a lock that somebody has held for long; a cutover that nobody goes on with."""
    for app in sight.apps:
        holder = lock.holder(app.layout)
        held = time.time() - holder.since if holder else 0.0
        if holder and held > HELD_SECONDS:
            evidence = [f"{app.layout.state_dir}/lock: {holder}"]
            title = f"its lock has been held for {span(held)}: {holder.reason} by {holder.by}"
            mend = f"sudo systemctl status {holder.pid}"
            yield Finding("F301", app.name, title, evidence, mend)
        if holder or app.state is None:
            continue
        # Read after the lock: what ended in between is no trouble. And looked at again: neither is what began.
        present = state.load(app.layout)
        operation, removed = present.operation, present.removed
        watched = bool(operation) and _watched(sight, app)
        if (operation or removed) and (lock.holder(app.layout) or state.load(app.layout) != present):
            continue
        # Watching and draining go on by themselves.
        if operation and (operation.phase in ("maintenance", "starting") or not watched):
            evidence = [
                f"{app.layout.state_dir}/state.json: {operation.phase} {operation.release} since {operation.began}",
                f"{app.layout.watch_unit()}: {'runs' if watched else 'does not run'}; nobody holds the lock",
            ]
            title = f"a {operation.action} of {operation.release} was left half-way ({operation.phase})"
            yield Finding("F302", app.name, title, evidence, f"sudo forgectl recover {app.name}")
        if removed and not removed.done:
            what = "purge" if removed.purging else "remove"
            evidence = [f"{app.layout.state_dir}/state.json: removed since {removed.since} by {removed.by}, not done"]
            yield Finding("F302", app.name, f"a {what} was left half-way", evidence, f"sudo forgectl {what} {app.name}")


def _watched(sight: Sight, app: AppSight) -> bool:
    """Whether the watch runs now; what all checks know of units may be older than the state."""
    unit = sight.now(app.layout.watch_unit())
    return unit["ActiveState"] in ("active", "activating", "deactivating")


def maintenance(sight: Sight) -> Iterator[Finding]:
    """F303: whether Nginx answers with the maintenance page, and why."""
    for app in sight.apps:
        present, page = app.state, app.layout.maintenance
        shown = page.exists()
        if present and present.removed:
            continue
        mend = f"sudo forgectl maintenance {app.name} off"
        if present and present.maintenance:
            evidence = [f"{app.layout.state_dir}/state.json: {present.maintenance}"]
            title = f"clients get the maintenance page of a breaking migration: {present.maintenance}"
            yield Finding("F303", app.name, title, evidence, f"sudo forgectl recover {app.name}")
        elif present and present.closed:
            closed = present.closed
            why = f": {closed.reason}" if closed.reason else ""
            evidence = [f"{app.layout.state_dir}/state.json: closed since {closed.since} by {closed.by}{why}"]
            yield Finding("F303", app.name, f"maintenance mode is on since {closed.since}{why}", evidence, mend)
        elif shown:
            evidence = [f"{page} is there", "the state tells of no maintenance" if present else "only root reads why"]
            yield Finding("F303", app.name, "clients get the maintenance page", evidence, mend)
