"""The live slot of each app: its service, its readiness, its sockets."""

import grp
import stat
from collections.abc import Iterator

from forgectl import slots as asking
from forgectl.doctor.findings import Finding
from forgectl.doctor.sight import HOUR, AppSight, Sight, ago, moment, span

# So many restarts at about the same distance are a loop, until it has run for twice that.
RESTARTS, DISTANCES, LEAST_SECONDS = 3, 2, 10.0
# SD_MESSAGE_UNIT_RESTART_SCHEDULED of sd-messages.h.
RESTARTED = "5eb03494b6584870a536b337290809b3"  # pragma: allowlist secret
PROBE_SECONDS = 1.6
SOCKET_MODE, SOCKET_GROUP = 0o660, "www-data"
# What the launcher and the servers say when something that they read is not there.
MISSING = ("is missing at", "has nothing at", "is empty; ", "is not a string", "validation error", "KeyError: '")


def services(sight: Sight) -> Iterator[Finding]:
    """F201 and F211: whether the live service runs, how often it was restarted, and whether a variable is why."""
    for app in sight.serving:
        unit = sight.unit(app.service)
        state, restarts, since = (
            unit["ActiveState"],
            int(unit["NRestarts"] or 0),
            ago(unit["ActiveEnterTimestampMonotonic"]),
        )
        facts = f"{app.service}: {state} ({unit['SubState']}, {unit['Result']}), restarted {restarts} times"
        mend = f"sudo forgectl rollback {app.name}"
        if state not in ("active", "reloading"):
            if app.moved():
                continue
            words = sight.last_words(app.service, 5)
            if missing := next((line for line in reversed(words) if any(each in line for each in MISSING)), ""):
                title = f"a variable that it needs does not arrive, and its service does not start: {missing}"
                yield Finding("F211", app.name, title, (facts, *words), f"sudo forgectl secrets check {app.name}")
            what = "is started again and again" if unit["SubState"] == "auto-restart" else f"is {state}"
            if state == "activating" and not restarts and unit["SubState"] != "auto-restart":
                what = "is still starting"
            yield Finding("F201", app.name, f"its live service {what} ({unit['Result']})", (facts, *words), mend)
        elif restarts >= RESTARTS and since < _loop(sight, app.service):
            title = f"its live service was restarted {restarts} times, last {span(since)} ago"
            yield Finding("F201", app.name, title, (facts, *sight.last_words(app.service)), mend)
        elif restarts and since < HOUR:
            title = f"its live service ended {span(since)} ago, and came back by itself"
            yield Finding("F201", app.name, title, (facts,), f"sudo forgectl logs {app.name}", over=True)


def readiness(sight: Sight) -> Iterator[Finding]:
    """F202: what the live slot answers on its own socket, as Nginx would ask."""
    for app in sight.serving:
        its = app.app
        if its is None or sight.unit(app.service)["ActiveState"] not in ("active", "reloading"):
            continue
        path = app.layout.socket(app.live.slot)
        status = asking.probe(path, its.ready_path, its.domain, PROBE_SECONDS * sight.patience)
        if status != 200 and not app.moved():
            answers = (
                f"answers {status}" if status else f"does not answer within {PROBE_SECONDS * sight.patience:.1f} s"
            )
            title = f"it runs and is not ready: {its.readiness} {answers}"
            evidence = [f"GET {its.ready_path or '/'} on {path}: {answers}", *sight.last_words(app.service)]
            yield Finding("F202", app.name, title, evidence, f"sudo forgectl recycle {app.name}")


def sockets(sight: Sight) -> Iterator[Finding]:
    """F203: the listener of the live slot, and the link that Nginx follows."""
    for app in sight.serving:
        problems = list(_socket_problems(sight, app))
        if problems and not app.moved():
            # A link is put right without a new slot; a listener is not.
            linked = all(each.startswith(f"{app.layout.live} ") for each in problems)
            mend = f"sudo forgectl {'boot' if linked else 'recycle'} {app.name}"
            yield Finding("F203", app.name, problems[0], tuple(problems), mend)


def _loop(sight: Sight, unit: str) -> float:
    """The seconds after its last restart within which a unit that was restarted several times may end once more."""
    times = [moment(entry) for entry in sight.journal(f"MESSAGE_ID={RESTARTED}", f"UNIT={unit}", lines=RESTARTS)]
    distance = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return max(LEAST_SECONDS, DISTANCES * distance)


def _socket_problems(sight: Sight, app: AppSight) -> Iterator[str]:
    layout, slot = app.layout, app.live.slot
    unit = sight.unit(layout.socket_unit(slot))
    if unit["ActiveState"] != "active":
        yield f"{layout.socket_unit(slot)} is {unit['ActiveState']} ({unit['Result']})"
    path = layout.socket(slot)
    try:
        status = path.lstat()
    except OSError:
        yield f"{path} is not there"
    else:
        group = _group(status.st_gid)
        if not stat.S_ISSOCK(status.st_mode):
            yield f"{path} is no socket"
        elif (status.st_uid, group, stat.S_IMODE(status.st_mode)) != (0, SOCKET_GROUP, SOCKET_MODE):
            found = f"uid {status.st_uid}, {group}, {stat.S_IMODE(status.st_mode):04o}"
            yield f"{path} is {found}, and has to be root's, of {SOCKET_GROUP}, {SOCKET_MODE:04o}"
    operation = app.state.operation if app.state else None
    if layout.live_slot() != slot and operation is None:
        leads = layout.live.readlink() if layout.live.is_symlink() else "nowhere"
        yield f"{layout.live} leads to {leads}, and slot {slot} is live"


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
