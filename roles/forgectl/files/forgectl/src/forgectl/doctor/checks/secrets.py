"""The secrets of the apps: whether their source answers, takes this host for who it is, and has something newer."""

import http.client
import ssl
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit

from forgectl import identity
from forgectl.config import App
from forgectl.doctor import reach
from forgectl.doctor.findings import Finding
from forgectl.doctor.sight import AppSight, Sight
from forgectl.errors import SecretsError

HEALTH_SECONDS, ANSWER_SECONDS = 1.2, 0.5
# Of sys/health: active, standby, and a secondary that answers; whatever else is a server that serves nobody.
HEALTHY = (200, 429, 472, 473)
# Below the third at which a rotate identity, or site.yml, gets the next.
ENDING = 0.3
SEALED = "is sealed"
UNSEAL = "bao operator unseal"
DELIVER = "ansible-playbook -i inventory/production site.yml --tags forgectl,secrets"


def secrets(sight: Sight) -> Iterator[Finding]:
    """F401, F402, F404 and F405: a login with the app's own identity, and the version that it would get now."""
    users = [(app, its) for app in sight.serving if (its := app.running or app.described)]
    seconds = HEALTH_SECONDS * sight.patience
    # Each server once, and all at once: each may take all of its time.
    servers = {its.secrets.address: its for _, its in users if its.secrets.source == "vault"}
    health = {address: reach.begin(partial(_trouble, its, seconds)) for address, its in servers.items()}
    # Who is connected within them, and then says nothing or little, gets no longer.
    deadline = time.monotonic() + seconds + ANSWER_SECONDS
    for app, its in users:
        if its.secrets.source == "none":
            continue
        address = its.secrets.address
        if its.secrets.source == "vault":
            try:
                trouble = health[address].result(max(0.01, deadline - time.monotonic()))
            except TimeoutError:
                trouble = f"is unreachable (no answer within {seconds + ANSWER_SECONDS:.1f} s)"
            if trouble:
                title = f"Vault at {address} {trouble}; what runs goes on, what starts waits for it"
                evidence = [f"GET {address}/v1/sys/health: {trouble}"]
                sealed = trouble == SEALED
                yield Finding("F401", app.name, title, evidence, UNSEAL if sealed else _check(app))
                continue
        yield from _versions(app, its)


def secret_ids(sight: Sight) -> Iterator[Finding]:
    """F402 and F403: the secret ids that this host has, by what Vault said of them when it made them."""
    for app in sight.apps:
        its = app.described or app.running
        if its is None or its.secrets.source != "vault" or (app.state and app.state.removed):
            continue
        known = identity.records(app.layout)
        mend = f"sudo forgectl secrets rotate {app.name}" if its.secrets.rotation else DELIVER
        for name in identity.approles(its):
            paths = [app.layout.sealed(name, part) for part in identity.PARTS]
            if missing := [str(path) for path in paths if not path.exists()]:
                title = f"its {name} identity has no secret id on this host"
                yield Finding("F402", app.name, title, tuple(f"{path}: none" for path in missing), DELIVER)
                continue
            record = known.get(name)
            if record is None or record.expires is None:
                continue
            expires, issued = (datetime.fromisoformat(each) for each in (record.expires, record.issued))
            left, life = (expires - datetime.now(UTC)).total_seconds(), (expires - issued).total_seconds()
            evidence = [
                f"{app.layout.state_dir}/identities.json: {name}, issued {record.issued}, until {record.expires}",
            ]
            if left <= 0:
                title = f"the secret id of its {name} identity ended at {record.expires}"
                yield Finding("F402", app.name, title, evidence, DELIVER)
            elif left < ENDING * life:
                days = f"{left / 86400:.0f} days" if left > 2 * 86400 else f"{left / 3600:.0f} hours"
                title = f"the secret id of its {name} identity ends in {days}"
                yield Finding("F403", app.name, title, evidence, mend)


def _versions(app: AppSight, its: App) -> Iterator[Finding]:
    present, live = app.state, app.live
    if present is None:
        return
    rotate = f"sudo forgectl secrets rotate {app.name}"
    try:
        newest = identity.fetch(app.layout, its, "app", lease_user=False).version
    except SecretsError as error:
        evidence = [f"a login as its app identity: {error.state}", str(error)]
        if error.state in ("unreachable", "untrusted", "sealed"):
            yield Finding("F401", app.name, str(error), evidence, _check(app))
        elif error.version and error.version != live.secrets:
            title = f"version {error.version} of its secrets is no good, and {present.serving_secrets} serves: {error}"
            yield Finding("F405", app.name, title, evidence, _check(app))
        elif error.version or error.state == "incomplete":
            title = f"its secrets lack what its live release needs: {error}"
            yield Finding("F211", app.name, title, evidence, _check(app))
        else:
            yield Finding("F402", app.name, str(error), evidence, _mend(its.secrets.rotation is not None, error, app))
        return
    if not live.secrets or newest == live.secrets:
        return
    refused = present.refused(newest)
    if refused:
        title = f"version {newest} of its secrets was refused at {refused.at}, and {present.serving_secrets} serves"
        yield Finding("F405", app.name, title, (f"history: {refused.reason}",), rotate)
    else:
        title = f"version {newest} of its secrets is there, and version {live.secrets} serves"
        evidence = [f"newest version: {newest}", f"{app.layout.state_dir}/state.json: version {live.secrets}"]
        yield Finding("F404", app.name, title, evidence, rotate)


def _check(app: AppSight) -> str:
    return f"sudo forgectl secrets check {app.name}"


def _mend(rotates: bool, error: SecretsError, app: AppSight) -> str:
    return f"sudo forgectl secrets rotate {app.name}" if rotates and error.state == "rejected" else DELIVER


def _trouble(its: App, seconds: float, healthy: Sequence[int] = HEALTHY) -> str:
    """Why Vault serves nobody, in words; empty where it does. No proxy and no CA but its own, as for a start."""
    parts = urlsplit(its.secrets.address)
    try:
        context = ssl.create_default_context(cafile=its.secrets.ca_file)
    except (OSError, ssl.SSLError) as error:
        return f"cannot be trusted: {its.secrets.ca_file}: {error}"
    host, port = parts.hostname or "", parts.port or 443
    connection = http.client.HTTPSConnection(host, port, context=context)
    try:
        raw = reach.connect(host, port, seconds)
        connection.sock = raw
        connection.sock = context.wrap_socket(raw, server_hostname=host)
        connection.request("GET", f"{parts.path.rstrip('/')}/v1/sys/health?standbyok=true")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"is unreachable ({error})"
    finally:
        connection.close()
    if status in healthy:
        return ""
    return {503: SEALED, 501: "is not initialised"}.get(status, f"answers {status}")
