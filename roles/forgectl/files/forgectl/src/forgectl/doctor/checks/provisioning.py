"""Whether this host was provisioned to its end, and what it knows of its apps can be read."""

from collections.abc import Iterator

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.manifest import MANIFEST
from forgectl.doctor.sight import Sight

PROVISION = "ansible-playbook -i inventory/production site.yml"


def provisioned(sight: Sight) -> Iterator[Finding]:
    """F003 and F004: whether site.yml ever came to its end, and each app has a release."""
    if not sight.provisioned:
        what = "no app is described, and nothing was ever written down of a run of site.yml"
        yield Finding("F003", HOST, what, ("/etc/forge/apps: no NAME.toml", f"{MANIFEST}: none"), PROVISION)
        return
    if not sight.at(MANIFEST).exists():
        names = ", ".join(app.name for app in sight.apps)
        evidence = [f"{MANIFEST}: none, which is the last that site.yml writes", f"apps that are described: {names}"]
        yield Finding("F004", HOST, "site.yml never ran to its end here", evidence, PROVISION)
    for app in sight.apps:
        state = app.state
        if state and state.live is None and state.operation is None and not (state.removed or state.maintenance):
            last = state.last_cutover
            how = f"the last try ended {last.outcome} at {last.at}: {last.reason}" if last else "there was no try"
            evidence = [f"{app.layout.state_dir}/state.json: no live release; {how}"]
            yield Finding("F004", app.name, "it is described, and no release of it ever served", evidence, PROVISION)


def configuration(sight: Sight) -> Iterator[Finding]:
    """F005: files of forgectl's own that can't be read, app by app; the others are looked at all the same."""
    for app in sight.apps:
        for problem in app.broken:
            yield Finding("F005", app.name, f"what is known of it can't be read: {problem}", (problem,), PROVISION)
