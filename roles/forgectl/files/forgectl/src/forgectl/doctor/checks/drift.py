"""Whether what provisioning left is still as it was, and what forgectl wrote is what its releases say."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from forgectl.doctor import manifest
from forgectl.doctor.checks.provisioning import PROVISION
from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import NGINX, AppSight, Sight
from forgectl.staging import INPUTS

SHOWN = 10


def files(sight: Sight) -> Iterator[Finding]:
    """F006: files, units and settings that changed since the last run of site.yml came to its end."""
    known = manifest.load(sight.root)
    if known:
        removed = [app.name for app in sight.apps if app.state and app.state.removed]
        found = manifest.differences(sight.root, known, removed)
        if found:
            evidence = [f"{each.what} {each.how}" for each in found[:SHOWN]]
            evidence += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            evidence.append(f"{manifest.MANIFEST}: as site.yml left it at {known.at}, run by {known.by}")
            few = ", ".join(each.what for each in found[:2]) + (" ..." if len(found) > 2 else "")
            title = f"{len(found)} not as site.yml left {'it' if len(found) == 1 else 'them'}: {few}"
            yield Finding("F006", HOST, title, evidence, _mend(found))
    for app in sight.apps:
        yield from _of_app(sight, app)


def firewall(sight: Sight) -> Iterator[Finding]:
    """F006: whether the kernel has the firewall, which a file alone does not make."""
    path = "/etc/forge/firewall.nft"
    if sight.at(path).exists() and "table inet forge" not in sight.run("nft", "list", "tables"):
        evidence = [f"{path} is there", "nft list tables: no table inet forge"]
        yield Finding(
            "F006", HOST, "the firewall is not loaded", evidence, "sudo systemctl restart forge-firewall.service"
        )


def _mend(found: Sequence[manifest.Difference]) -> str:
    """What site.yml does not put right, since it did not write it, is put right here."""
    if all(each.how == manifest.ADDED for each in found):
        return f"sudo mv --backup=numbered {found[0].what} /root/"
    if all(each.what.startswith(manifest.SETTING) for each in found):
        return f"sudo /usr/lib/systemd/systemd-sysctl /{manifest.SYSCTL}"
    return PROVISION


def _of_app(sight: Sight, app: AppSight) -> Iterator[Finding]:
    layout = app.layout
    evidence = []
    if app.in_service:
        # That of the idle slot is written anew before it starts.
        release, drop_in = app.live.release, layout.drop_in(app.live.slot)
        if not _same(layout.releases / release / "slot.conf", drop_in.read_bytes() if drop_in.exists() else b""):
            evidence.append(f"{drop_in} is not the slot.conf of {release}, which it was copied from")
    stale = [unit for unit in _units(app) if sight.unit(unit).get("NeedDaemonReload") == "yes"]
    if stale:
        evidence.append(f"systemd has {', '.join(stale)} as before their files changed (NeedDaemonReload=yes)")
    if evidence and not app.moved():
        title = f"its units are not as its releases say: {evidence[0]}"
        yield Finding("F006", app.name, title, tuple(evidence), f"sudo forgectl recycle {app.name}")
    if app.described and app.in_service and (waiting := _unreleased(app)):
        title = f"its settings in /etc/forge/apps are in no release: {', '.join(waiting)}"
        yield Finding(
            "F006",
            app.name,
            title,
            tuple(
                f"{layout.description.parent}: {name} differs from that of each release on this host"
                for name in waiting
            ),
            PROVISION.replace("site.yml", "playbooks/deploy.yml"),
        )


def _units(app: AppSight) -> list[str]:
    layout = app.layout
    # Of a service whose properties were set while it runs, as its weight is in a cutover, systemd 252 always says so.
    sockets = [layout.socket_unit(app.live.slot)] if app.in_service else []
    return [*sockets, layout.boot_unit(), *layout.timers(), NGINX]


def _unreleased(app: AppSight) -> list[str]:
    """What the next release would be made with, and no release on this host has."""
    layout = app.layout
    files = {"settings.toml": layout.description} | {name: layout.inputs / name for name in INPUTS}
    releases = sorted(path.parent for path in layout.releases.glob("[0-9]*/release.json"))
    present = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    best = list(files)
    for release in reversed(releases):
        other = [name for name, data in present.items() if not _same(release / name, data)]
        best = min(best, other, key=len)
    return [layout.description.name if name == "settings.toml" else f"{app.name}.d/{name}" for name in best]


def _same(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data
