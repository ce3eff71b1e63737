"""What apps run beside their servers."""

from collections.abc import Iterator

from forgectl import lock
from forgectl.doctor.findings import Finding
from forgectl.doctor.sight import Sight


def commands(sight: Sight) -> Iterator[Finding]:
    """F208: a command that does not go on, whose last run failed, or whose timer is off."""
    for app in sight.serving:
        if app.running is None or (app.state and app.state.maintenance):
            continue
        # Whoever has the lock may be handing them over to another slot.
        handed_over = lock.holder(app.layout) is not None
        for name, command in app.running.commands.items():
            service, timer = app.layout.scheduled_units(name)
            if not command.schedule:
                service = app.layout.command_unit(name, app.live.slot)
            unit = sight.unit(service)
            problem = ""
            if command.schedule:
                if unit["ActiveState"] == "failed" or unit["Result"] not in ("success", ""):
                    problem = f"its last run failed ({unit['Result']}, exit status {unit['ExecMainStatus']})"
                elif sight.unit(timer)["ActiveState"] != "active" and not handed_over:
                    problem = f"its timer is {sight.unit(timer)['ActiveState']}"
            # After a boot or a cutover it is asked for, and waits for its turn.
            elif (
                unit["ActiveState"] not in ("active", "reloading", "deactivating")
                and unit["Job"] in ("", "0")
                and not handed_over
            ):
                restarts = f", restarted {unit['NRestarts']} times"
                problem = f"it does not run ({unit['ActiveState']}, {unit['Result']}{restarts})"
            # Between two of its ends it runs.
            elif unit["ActiveState"] == "active" and sight.loops(service):
                problem = f"it ends again and again, restarted {unit['NRestarts']} times"
            if problem:
                again = f"sudo systemctl start {timer if 'timer' in problem else service}"
                if not command.schedule and unit["ActiveState"] not in ("inactive", "failed"):
                    # It is started again by itself; what it says is why that does not help.
                    again = f"sudo forgectl logs {app.name} --command {name} --lines=20"
                evidence = [f"{service}: {unit['ActiveState']} ({unit['Result']})", *sight.last_words(service)]
                yield Finding("F208", app.name, f"command {name}: {problem}", evidence, again)
