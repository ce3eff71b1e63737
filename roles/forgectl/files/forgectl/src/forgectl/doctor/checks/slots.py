"""The live slot of each app: its service, its readiness, its sockets."""

import grp
import stat
from collections.abc import Iterator, Mapping, Sequence

from forgectl import slots as asking
from forgectl.doctor.findings import Finding
from forgectl.doctor.sight import HOUR, AppSight, Sight, ago, span

PROBE_SECONDS = 1.6
SOCKET_MODE, SOCKET_GROUP = 0o660, "www-data"
# How lines of the launcher begin, which has become the server once all is well.
LAUNCHER = "forge-launch: "
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
        if state not in ("active", "reloading"):
            if app.moved():
                continue
            words = sight.last_words(app.service, 5)
            mend = _start(app, unit, words)
            if missing := next((line for line in reversed(words) if any(each in line for each in MISSING)), ""):
                title = f"a variable that it needs does not arrive, and its service does not start: {missing}"
                yield Finding("F211", app.name, title, (facts, *words), f"sudo forgectl secrets check {app.name}")
            what = "is started again and again" if unit["SubState"] == "auto-restart" else f"is {state}"
            if state == "activating" and not restarts and unit["SubState"] != "auto-restart":
                what = "is still starting"
            yield Finding("F201", app.name, f"its live service {what} ({unit['Result']})", (facts, *words), mend)
        elif sight.loops(app.service):
            title = f"its live service was restarted {restarts} times, last {span(since)} ago"
            yield Finding("F201", app.name, title, (facts, *sight.last_words(app.service)), app.back())
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
            # What answers that it is not ready waits for something, which a fresh slot would wait for as well.
            mend = f"sudo forgectl {f'logs {app.name} --lines=10' if status else f'recycle {app.name}'}"
            yield Finding("F202", app.name, title, evidence, mend)


def sockets(sight: Sight) -> Iterator[Finding]:
    """F203: the listener of the live slot, and the link that Nginx follows."""
    for app in sight.serving:
        problems = list(_socket_problems(sight, app))
        if problems and not app.moved():
            # A link is put right without a new slot; a listener is not.
            linked = all(each.startswith(f"{app.layout.live} ") for each in problems)
            mend = f"sudo forgectl {'boot' if linked else 'recycle'} {app.name}"
            yield Finding("F203", app.name, problems[0], tuple(problems), mend)


def _start(app: AppSight, unit: Mapping[str, str], words: Sequence[str]) -> str:
    """What brings a service back that does not run."""
    if unit["ActiveState"] == "inactive":
        # Somebody stopped it: what ends by itself is started again.
        return f"sudo systemctl start {app.service}"
    if any(LAUNCHER in line for line in words):
        # It gets no secrets, which an older release would not get either.
        return f"sudo forgectl secrets check {app.name}"
    return app.back()


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
