"""Units of the platform that failed, and timers of it that do not run; those with findings of their own apart."""

import re
from collections.abc import Iterator

from forgectl import alerts as channels
from forgectl.doctor.checks.provisioning import PROVISION
from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import AppSight, Sight, shorten
from forgectl.errors import Refused

PLATFORM = re.compile(
    r"^(forge-|nginx\.|postgresql|fail2ban\.|ssh|systemd-(journald|timesyncd|resolved|networkd)\b|nftables\.)"
)
# Those that other checks look at more closely.
ELSEWHERE = re.compile(r"^(nginx\.service|forge-certificates\.|logrotate\.|apt-daily|forge-alerts)")
# Of a channel of alerts, one try that failed is no news.
ATTEMPTS = 2


def units(sight: Sight) -> Iterator[Finding]:
    """F704, and F804 of the unit that delivers alerts."""
    output = sight.run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager")
    failed = [line.split()[0] for line in output.splitlines() if line.strip()]
    for unit in failed:
        owner = next((app for app in sight.apps if _is_of(unit, app)), None)
        if unit.startswith("forge-alerts"):
            evidence = [f"{unit} failed", *sight.last_words(unit)]
            yield Finding(
                "F804", HOST, f"alerts are not delivered: {unit} failed", evidence, f"sudo systemctl restart {unit}"
            )
        elif owner and not _has_its_own(unit, owner):
            yield _failed(sight, unit, owner.name)
        elif not owner and PLATFORM.search(unit) and not ELSEWHERE.search(unit):
            yield _failed(sight, unit, HOST)
    for subject, timer in _timers(sight):
        found = sight.unit(timer)
        if found["UnitFileState"] == "enabled" and found["ActiveState"] != "active":
            evidence = [f"{timer}: {found['ActiveState']}, though it is enabled"]
            yield Finding("F704", subject, f"{timer} does not run", evidence, f"sudo systemctl start {timer}")


def alerts(sight: Sight) -> Iterator[Finding]:
    """F804: whether the unit runs, and what each of its channels wrote down of deliveries that fail."""
    yield from _delivery(sight)
    restart = f"sudo systemctl restart {channels.UNIT}"
    for name in channels.CHANNELS:
        path = channels.path(name, sight.root)
        try:
            failing = channels.state(name, sight.root).get("failing") or {}
            attempts = int(failing.get("attempts", 0))
        except OSError as error:
            # At its next start the unit writes it anew.
            title = f"what became of alerts by {name} can't be read: {error.strerror}"
            yield Finding("F804", HOST, title, (f"{path}: {error.strerror}",), restart)
            continue
        except (ValueError, TypeError, AttributeError):
            # One that is damaged the unit begins anew.
            continue
        if attempts >= ATTEMPTS:
            title = f"no alert gets through by {name}, after {attempts} attempts: {shorten(str(failing.get('error')))}"
            evidence = [f"{path}: failing since {failing.get('since')}"]
            yield Finding("F804", HOST, title, evidence, restart)


def _delivery(sight: Sight) -> Iterator[Finding]:
    """F804: channels, and nobody who serves them; one that failed is among the failed units."""
    restart = f"sudo systemctl restart {channels.UNIT}"
    if not sight.at(channels.CONFIG).exists():
        return
    try:
        wanted = channels.configured(sight.root)
    except (Refused, OSError) as error:
        yield Finding("F804", HOST, "where alerts go can't be read", (str(error),), PROVISION)
        return
    unit = sight.unit(channels.UNIT)
    state, waits = unit["ActiveState"], unit["Job"] not in ("", "0")
    # After a boot it waits for the network; between two tries of its own it is `activating`, and nobody's job.
    if wanted and state not in ("active", "reloading", "failed") and not waits:
        title = f"alerts are not delivered by {', '.join(wanted)}: {channels.UNIT} is {state}"
        evidence = [f"{channels.UNIT}: {state} ({unit['Result']})", *sight.last_words(channels.UNIT)]
        yield Finding("F804", HOST, title, evidence, restart)


def _failed(sight: Sight, unit: str, subject: str) -> Finding:
    evidence = [f"{unit}: failed ({sight.unit(unit)['Result']})", *sight.last_words(unit)]
    return Finding("F704", subject, f"{unit} failed", evidence, f"sudo systemctl restart {unit}")


def _timers(sight: Sight) -> Iterator[tuple[str, str]]:
    yield HOST, "forge-reboot.timer"
    for app in sight.apps:
        if not (app.state and app.state.removed):
            yield from ((app.name, timer) for timer in app.layout.timers())


def _is_of(unit: str, app: AppSight) -> bool:
    name = re.escape(app.name)
    return bool(re.match(rf"^{name}(@|\.|-migrate@|-lease@)", unit) or re.match(rf"^forge-[a-z]+@{name}\.", unit))


def _has_its_own(unit: str, app: AppSight) -> bool:
    """Whether the services of slots, or commands, tell more of it."""
    slots = bool(re.match(rf"^{re.escape(app.name)}@", unit))
    return slots or unit in [
        *app.layout.timed_units(),
        *app.layout.command_units("blue"),
        *app.layout.command_units("green"),
    ]
