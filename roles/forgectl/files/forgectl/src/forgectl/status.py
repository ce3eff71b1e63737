"""What an operator wants to see of an app, without changing anything."""

from typing import Any

import msgspec

from forgectl import identity, lock, release, slots, state, systemd
from forgectl.config import App
from forgectl.layout import SLOTS, Layout


def of(layout: Layout, app: App) -> dict[str, Any]:
    """The state of an app as one JSON-ready object."""
    present = state.load(layout)
    live = present.live
    found: dict[str, Any] = {
        "app": app.name,
        "domain": app.domain,
        "live": msgspec.to_builtins(live),
        "live_socket": layout.live_slot(),
        "ready": slots.probe(layout.live, app.ready_path, app.domain) == 200 if live else False,
        "slots": {},
        "workers": msgspec.to_builtins(app.workers),
        "secrets": {name: _enrolled(layout, name) for name in identity.identities(app)},
        "releases": [record.id for record in release.records(layout)],
        "previous": msgspec.to_builtins(present.previous),
        "last": msgspec.to_builtins(present.history[-1]) if present.history else None,
        "operation": msgspec.to_builtins(present.operation),
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
    if live:
        lines.append(f"  live      {live['release']} in slot {live['slot']}, since {live['since']}")
        lines.append(f"  ready     {'yes' if found['ready'] else 'NO'}")
    else:
        lines.append("  live      nothing was released yet")
    for slot, unit in found["slots"].items():
        lines.append(
            f"  {slot:<8}  service {unit['service']}, socket {unit['socket']}, release {unit['release'] or '-'}"
        )
    lines.append(f"  workers   {found['workers']['count']}: {'; '.join(found['workers']['reasons'])}")
    lines.append(
        "  secrets   "
        + ", ".join(f"{name} {'enrolled' if yes else 'MISSING'}" for name, yes in found["secrets"].items())
    )
    if last := found["last"]:
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in last["phases"].items())
        lines.append(
            f"  last      {last['release']} {last['outcome']} at {last['at']} by {last['by']}"
            + (f": {phases}" if phases else "")
        )
        if last["reason"]:
            lines.append(f"            {last['reason']}")
    if found["operation"]:
        lines.append(f"  under way {found['operation']['phase']} {found['operation']['release']}")
    if found["lock"]:
        lines.append(f"  locked    {found['lock']}")
    return "\n".join(lines)


def _enrolled(layout: Layout, name: str) -> bool:
    return all(layout.sealed(name, part).exists() for part in identity.PARTS)
