"""What an operator wants to see of an app, without changing anything."""

from typing import Any

import msgspec

from forgectl import commands, config, identity, lock, slots, staging, state, systemd
from forgectl.config import App
from forgectl.layout import SLOTS, Layout


def of(layout: Layout, app: App) -> dict[str, Any]:
    """The state of an app as one JSON-ready object."""
    present = state.load(layout)
    live, known = present.live, staging.records(layout)
    # The newest description is what the next release is made with.
    its_app = config.load(layout.settings(live.release)) if live else app
    found: dict[str, Any] = {
        "app": app.name,
        "domain": app.domain,
        "live": msgspec.to_builtins(live),
        "live_socket": layout.live_slot(),
        "ready": live is not None
        and not present.removed
        and slots.probe(layout.live, its_app.ready_path, its_app.domain) == 200,
        "readiness": its_app.ready_path or None,
        "slots": {},
        "workers": msgspec.to_builtins(its_app.workers),
        "commands": commands.describe(layout, its_app, live.slot) if live else {},
        "secrets": {name: _enrolled(layout, app, name) for name in identity.identities(app)},
        "secrets_refused": msgspec.to_builtins(present.refused()),
        "releases": [record.id for record in known],
        "source": next((record.source for record in known if live and record.id == live.release), {}),
        "previous": msgspec.to_builtins(present.previous),
        "last": msgspec.to_builtins(present.last_cutover),
        "operation": msgspec.to_builtins(present.operation),
        "maintenance": present.maintenance or None,
        "removed": msgspec.to_builtins(present.removed),
        "maintenance_mode": msgspec.to_builtins(present.closed),
        "lock": str(holder) if (holder := lock.holder(layout)) else None,
    }
    for slot in SLOTS:
        found["slots"][slot] = {
            "release": layout.slot_release(slot),
            "service": systemd.show(layout.service(slot))["ActiveState"],
            "socket": systemd.show(layout.socket_unit(slot))["ActiveState"],
        }
    return found


def text(found: dict[str, Any]) -> str:
    """The same for a person."""
    live = found["live"]
    lines = [f"{found['app']}  https://{found['domain']}"]
    if removed := found["removed"]:
        what, then = "HALF REMOVED", "remove or restore"
        if removed["purging"]:
            what, then = "HALF PURGED", "purge"
        elif removed["done"]:
            what, then = "OUT OF SERVICE", "restore or purge"
        lines.append(f"  {what} since {removed['since']} by {removed['by']}: forgectl {then} {found['app']}")
    elif live:
        lines.append(f"  live      {live['release']} in slot {live['slot']}, since {live['since']}")
        if source := found["source"]:
            lines.append(f"  source    {' '.join(f'{name}={value}' for name, value in source.items())}")
        why = "" if found["readiness"] else ": its workers take requests; the app has no readiness path"
        lines.append(f"  ready     {f'yes{why}' if found['ready'] else 'NO'}")
        if refused := found["secrets_refused"]:
            lines.append(
                f"  REFUSED   version {refused['secrets']} of its secrets at {refused['at']}: {refused['reason']}"
            )
    else:
        lines.append("  live      nothing was released yet")
    for slot, unit in found["slots"].items():
        lines.append(
            f"  {slot:<8}  service {unit['service']}, socket {unit['socket']}, release {unit['release'] or '-'}"
        )
    lines.append(f"  workers   {found['workers']['count']}: {'; '.join(found['workers']['reasons'])}")
    lines.append(
        "  secrets   "
        + (f"version {live['secrets']}; " if live and live["secrets"] else "")
        + (", ".join(f"{name} {'enrolled' if yes else 'MISSING'}" for name, yes in found["secrets"].items()) or "none")
    )
    for name, command in found["commands"].items():
        lines.append(f"  command   {name}: {_how(command)}")
    if found["maintenance"]:
        lines.append(f"  MAINTENANCE PAGE: {found['maintenance']}")
    if mode := found["maintenance_mode"]:
        why = f": {mode['reason']}" if mode["reason"] else ""
        lines.append(f"  MAINTENANCE MODE since {mode['since']} by {mode['by']}{why}")
    if last := found["last"]:
        lines.append(f"  last      {_line(last)}")
    if under_way := found["operation"]:
        lines.append(f"  under way {under_way['action']} of {under_way['release']}: {under_way['phase']}")
    if found["lock"]:
        lines.append(f"  locked    {found['lock']}")
    return "\n".join(lines)


def history(present: state.State, count: int) -> list[str]:
    """The newest entries as lines, newest last, and the cutover that is under way."""
    lines = [_line(msgspec.to_builtins(entry)) for entry in present.history[-count:]]
    if (operation := present.operation) and operation.phase != "draining":
        lines.append(f"{operation.began}  {operation.action:<8}  {operation.release}  {operation.phase}")
    return lines


def _line(entry: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in entry["phases"].items())
    reason = f"; {entry['reason']}" if entry["reason"] else ""
    secrets = f" with version {entry['secrets']} of its secrets" if entry["action"] == "rotation" else ""
    return (
        f"{entry['at']}  {entry['action']:<8}  {entry['release'] or '-'}{secrets}  {entry['outcome']} by {entry['by']}"
        + (f": {phases}" if phases else "")
        + reason
    )


def _how(command: dict[str, Any]) -> str:
    """How a command is, in words."""
    if not command["schedule"]:
        return f"{command['state']}" + (f", restarted {command['restarts']} times" if command["restarts"] else "")
    last = f"last {command['last']} ({command['last_result']})" if command["last"] else "never ran"
    following = f"next {command['next'] or 'after this run'}" if command["timer"] == "active" else "its TIMER IS OFF"
    return f"{command['state']} ({command['schedule']}); {last}, {following}"


def _enrolled(layout: Layout, app: App, name: str) -> bool:
    return all(layout.sealed(name, part).exists() for part in identity.parts(app))
