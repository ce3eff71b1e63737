"""How exposed the platform's units are, by `systemd-analyze security`, against what docs/host.md holds them to."""

import re
from collections.abc import Iterator

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import NGINX, Sight, Unseen

SLOT, SERVER, OTHER = 1.5, 2.5, 2.0
# It takes systemd-analyze a tenth of a second for each.
SHARED = ("forge-reboot.service",)


def exposure(sight: Sight) -> Iterator[Finding]:
    """F703: 0 is nothing, 10 everything."""
    limits = {NGINX: (HOST, SERVER), **dict.fromkeys(SHARED, (HOST, OTHER))}
    for app in sight.apps:
        if not any(unit.startswith("forge-watch@") for unit in limits):
            # One of a template is all of it, but for drop-ins, which F006 tells of.
            limits[f"forge-watch@{app.name}.service"] = (HOST, OTHER)
        if app.in_service:
            limits[app.service] = (app.name, SLOT)
    present = [unit for unit in limits if sight.unit(unit)["LoadState"] == "loaded"]
    if not present:
        return
    said = sight.attempt("systemd-analyze", "security", "--no-pager", *present).stdout
    scores = {unit: float(score) for unit, score in re.findall(r"exposure level for (\S+): ([\d.]+)", said)}
    if not scores:
        raise Unseen("systemd-analyze security says nothing")
    for unit, score in scores.items():
        subject, limit = limits.get(unit, (HOST, 10.0))
        if score > limit:
            title = f"{unit} is exposed to {score}, and provisioned to {limit} at most"
            evidence = [f"systemd-analyze security {unit}: {score}"]
            mend = (
                f"sudo forgectl recycle {subject}"
                if subject != HOST
                else "ansible-playbook -i inventory/production site.yml"
            )
            yield Finding("F703", subject, title, evidence, mend)
