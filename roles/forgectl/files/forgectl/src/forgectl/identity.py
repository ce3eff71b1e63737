"""The host's identities: one for the app, one for its migrations, each with a source of secrets of its own.

Towards Vault each is a role id and a secret id, sealed with the host's key; without Vault its values are sealed here.
A third one, `rotate`, reads nothing for anybody: with it, root renews the secret ids of all three and writes the app's
secrets. What Vault said of each secret id is in /var/lib/forge/NAME/identities.json.

Vault's client is imported where it is used, since that takes longer than most commands: a warm rollback is one rename.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from forgectl import database, sealed, systemd
from forgectl.config import App
from forgectl.errors import ForgeError, Refused, SecretsError
from forgectl.layout import Layout, write_atomically
from forgectl.values import Fetched

if TYPE_CHECKING:
    from forgectl.vault import SecretId, Vault

PARTS = ("role-id", "secret-id")
RECORDS = "identities.json"
# The share of a secret id's life that is left when it is time for the next: ten days of thirty.
EXPIRING = 1 / 3


class Record(msgspec.Struct, frozen=True):
    """What Vault said of a secret id when it made it; no secret.

    `issued` and `expires` are RFC 3339, UTC; `expires` is None for one without an end. All that the `accessor` is good
    for is to destroy it. It works from `bound_cidrs` alone, or from anywhere.
    """

    issued: str
    expires: str | None
    accessor: str
    bound_cidrs: list[str] = []

    @property
    def until(self) -> str:
        """Its end, for people."""
        return self.expires or "it is destroyed"


def identities(app: App) -> list[str]:
    """The identities whose values an app needs."""
    if app.secrets.source == "none":
        return []
    return ["app", "migrate"] if app.migration else ["app"]


def approles(app: App) -> list[str]:
    """Every identity that the host has towards Vault: those, and the one that renews them."""
    return [*identities(app), "rotate"] if app.secrets.rotation else identities(app)


def parts(app: App) -> tuple[str, ...]:
    """The parts of an identity that are sealed on this host."""
    return (sealed.PART,) if app.secrets.source == "systemd_creds" else PARTS


def need_source(app: App, source: str, instead: str) -> None:
    """Check that an app's secrets come from a source; `instead` says what to do where they do not.

    Raises:
        Refused: they do not.
    """
    if app.secrets.source == "none":
        raise Refused(
            f"expected {app.name} to have secrets; found none; name them under apps.{app.name}.secrets in the "
            "inventory, and run site.yml"
        )
    if app.secrets.source != source:
        raise Refused(
            f"expected the secrets of {app.name} to come from {source}; found {app.secrets.source}; {instead}"
        )


def needed(app: App, identity: str) -> dict[str, str]:
    """Variable (or what else needs it): key, of all that an identity has to give.

    Raises:
        Refused: the app has no such identity.
    """
    if identity == "app":
        variables, key = app.variables, app.database.app_key if app.database else None
    elif app.migration and identity == "migrate":
        variables, key = dict(app.migration.variables), app.database.migrate_key if app.database else None
    else:
        raise Refused(f"{app.name} has no identity {identity}; it has: {', '.join(identities(app))}")
    db = app.database
    if key and db and (db.placement == "local" or identity == "migrate"):
        variables.setdefault("the database role", key)
    elif key and db and db.wants_password and not app.leases:
        variables.setdefault("the database's URL", key)
    return variables


def enrol(
    layout: Layout,
    app: App,
    identity: str,
    role_id: str,
    wrapping_token: str,
    bound_cidrs: list[str],
    say: Callable[[str], None],
) -> None:
    """Unwrap a secret id, prove it by a login, and seal it with its role id; then destroy its predecessor.

    Who asked for it says from which addresses it works: it cannot say so itself.

    Only the rotate identity may destroy one; without it the predecessor lives until its own end.

    Raises:
        Refused: the app has no such identity.
        SecretsError: the token was used before, Vault does not accept what was in it, or the rotate identity may not do
            what it is there for.
    """
    if identity not in approles(app):
        raise Refused(f"{app.name} has no identity {identity}; it has: {', '.join(approles(app))}")
    need_source(app, "vault", f"use `forgectl secrets set {app.name} KEY`")
    from forgectl import vault

    with closing(vault.Vault(app.secrets)) as server:
        predecessor = _adopt(
            layout, app, identity, role_id, server.unwrap_secret_id(wrapping_token), bound_cidrs, server
        )
    if predecessor and app.secrets.rotation:
        try:
            with _signed_in(layout, app, "rotate") as (server, token):
                server.destroy(token, app.secrets.rotation.approles[identity], predecessor.accessor)
        except SecretsError as error:
            say(f"{app.name} ({identity}): the secret id before is valid until {predecessor.until}: {error}")
    if identity == "rotate":
        _check_rotation(layout, app)


def renew(layout: Layout, app: App, say: Callable[[str], None], *, dry_run: bool = False) -> list[str]:
    """Get new secret ids for the identities that need one soon, its own included, as the rotate identity.

    Returns:
        The identities that were renewed, or that would be; none without a rotate identity.

    Raises:
        SecretsError: it may not, or one of them failed; the others are renewed.
    """
    rotation = app.secrets.rotation
    waiting = due(layout, app) if rotation else []
    if dry_run or not waiting or not rotation:
        return waiting
    renewed, failures = [], []
    with _signed_in(layout, app, "rotate") as (server, token):
        for identity in waiting:
            try:
                approle = rotation.approles[identity]
                role_id, _ = _credentials(layout, identity)
                fresh = server.unwrap_secret_id(server.wrapped_secret_id(token, approle, app.secrets.bound_cidrs))
                try:
                    predecessor = _adopt(layout, app, identity, role_id, fresh, app.secrets.bound_cidrs, server)
                except (ForgeError, OSError):
                    # Nobody has it: it must not live on where nobody looks.
                    server.destroy(token, approle, fresh.accessor)
                    raise
                renewed.append(identity)
                say(
                    f"{app.name} ({identity}): a new secret id is sealed, valid until {records(layout)[identity].until}"
                )
                if predecessor:
                    server.destroy(token, approle, predecessor.accessor)
            except (ForgeError, OSError) as error:
                failures.append(f"{app.name} ({identity}): {error}")
    if failures:
        raise SecretsError("denied", "; ".join(failures))
    return renewed


def write(layout: Layout, app: App, values: Mapping[str, Any], version: int) -> int:
    """Write all values of the app, as the rotate identity, if `version` is still the newest; return the new version.

    Raises:
        Refused: the app has no rotate identity.
        SecretsError: it may not, or another version was written meanwhile (state conflict).
    """
    need_rotation(app)
    with _signed_in(layout, app, "rotate") as (server, token):
        return server.write(token, app.secrets.path, values, version)


def need_rotation(app: App) -> None:
    """Check that an app has the identity that may write its secrets.

    Raises:
        Refused: it has none.
    """
    if not app.secrets.rotation:
        raise Refused(
            f"expected a rotate identity of {app.name}, which alone may write its secrets; found none; set "
            f"apps.{app.name}.secrets.rotation in the inventory (docs/vault.md), then run site.yml"
        )


def records(layout: Layout) -> dict[str, Record]:
    """What this host knows of its secret ids, by identity; nothing of those that it got before it kept records."""
    try:
        return msgspec.json.decode((layout.state_dir / RECORDS).read_bytes(), type=dict[str, Record])
    except (FileNotFoundError, msgspec.DecodeError):
        return {}


def refuse_expired(layout: Layout, app: App) -> None:
    """Check that the app's secret id is not past its end, as far as this host knows.

    Raises:
        Refused: it is, since nobody renews those of an app that is out of service.
    """
    record = records(layout).get("app") if app.secrets.source == "vault" else None
    if record and record.expires and datetime.fromisoformat(record.expires) <= datetime.now(UTC):
        raise Refused(
            f"expected a secret id of {app.name} that Vault still takes; found that it ended at {record.expires}, "
            "while the app was out of service; put its entry back and run site.yml, which delivers another and brings "
            "it back"
        )


def forget_rejected(layout: Layout, app: App) -> None:
    """Drop the records of secret ids that Vault takes no more, far from their end: destroyed, or used up.

    Without a record they are due.
    """
    known = records(layout)
    for identity in identities(app):
        try:
            with _signed_in(layout, app, identity):
                pass
        except SecretsError as error:
            if error.state != "rejected":
                raise
            known.pop(identity, None)
    _keep(layout, known)


def due(layout: Layout, app: App) -> list[str]:
    """The identities that need a new secret id soon."""
    known = records(layout)
    return [identity for identity in approles(app) if _outlook(app, known.get(identity)) != "ok"]


def _outlook(app: App, record: Record | None) -> str:
    """Ok, expiring (also when nobody knows its end), or outdated: bound to other addresses than it should be."""
    if record is None:
        return "expiring"
    if record.bound_cidrs != app.secrets.bound_cidrs:
        return "outdated"
    if record.expires is None:
        return "ok"
    expires = datetime.fromisoformat(record.expires)
    life = expires - datetime.fromisoformat(record.issued)
    return "expiring" if expires - datetime.now(UTC) < life * EXPIRING else "ok"


def _adopt(
    layout: Layout,
    app: App,
    identity: str,
    role_id: str,
    fresh: "SecretId",
    bound_cidrs: list[str],
    server: "Vault",
) -> Record | None:
    """Prove a fresh secret id by a login, seal it, and write down its end; returns the record of its predecessor.

    What is sealed when it is killed in between has no record of its own, and counts as expiring with its predecessor.
    """
    now = datetime.now(UTC)
    try:
        server.revoke(server.login(role_id, fresh.value))
    except SecretsError as error:
        if error.state != "rejected":
            raise
        raise SecretsError(
            "rejected",
            f"Vault at {app.secrets.address} rejected the role id with its fresh secret id; "
            f"the role id of the {identity} identity in the inventory is not that of the secret id's AppRole",
        ) from None
    layout.credentials.mkdir(mode=0o700, exist_ok=True)
    for part, value in zip(PARTS, (role_id, fresh.value), strict=True):
        write_atomically(layout.sealed(identity, part), systemd.encrypt(value, part), 0o600)
    known = records(layout)
    expires = (now + timedelta(seconds=fresh.ttl)).isoformat(timespec="seconds") if fresh.ttl else None
    record = Record(now.isoformat(timespec="seconds"), expires, fresh.accessor, bound_cidrs)
    _keep(layout, known | {identity: record})
    return known.get(identity)


def _keep(layout: Layout, known: Mapping[str, Record]) -> None:
    layout.state_dir.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(known), indent=2)
    write_atomically(layout.state_dir / RECORDS, data, 0o600)


@contextmanager
def _signed_in(layout: Layout, app: App, identity: str) -> "Iterator[tuple[Vault, str]]":
    """A connection to Vault, and a token of an identity that is revoked in the end."""
    from forgectl import vault

    with closing(vault.Vault(app.secrets)) as server:
        token = server.login(*_credentials(layout, identity))
        try:
            yield server, token
        finally:
            server.revoke(token)


def _credentials(layout: Layout, identity: str) -> tuple[str, str]:
    """Role id and secret id, opened with this host's key.

    Raises:
        SecretsError: they are not there, or were sealed elsewhere.
    """
    found = []
    for part in PARTS:
        path = layout.sealed(identity, part)
        if not path.exists():
            raise SecretsError(
                "missing",
                f"expected the sealed {part} of the {identity} identity in {path}; found none; run site.yml",
            )
        try:
            found.append(systemd.decrypt(path, part))
        except ForgeError as error:
            raise SecretsError(
                "missing", f"expected to open {path} with this host's key; found: {error}; run site.yml to seal it anew"
            ) from error
    return found[0], found[1]


def same_source(one: App, another: App) -> bool:
    """Whether both read the same secrets, so that a version of one's is the same version of the other's."""
    return all(
        getattr(one.secrets, name) == getattr(another.secrets, name)
        for name in ("source", "address", "kv_mount", "path")
    )


def fetch(layout: Layout, app: App, identity: str, version: int = 0, *, lease_user: bool = True) -> Fetched:
    """A version of the values of an identity (0: the newest), after a check of all that the app refers to.

    Without `lease_user` nobody tries whether Vault gives it a database user, where it leases one.

    Raises:
        SecretsError: one of them is not usable, or Vault is not.
    """
    if app.secrets.source == "none":
        return Fetched({}, 0)
    variables = needed(app, identity)
    if app.secrets.source == "systemd_creds":
        found = sealed.fetch(layout, identity, variables, version)
    else:
        from forgectl import vault

        credentials = _credentials(layout, identity)
        found = vault.fetch(app.secrets, *credentials, _path(layout, app, identity), variables, version)
        if identity == "app" and app.leases and lease_user:
            from forgectl import lease

            lease.check(app, *credentials)
    if identity == "app" and app.database:
        database.user(app.database, found)
    return found


def check(layout: Layout, app: App) -> dict[str, Any]:
    """Try all identities and check every value; the result holds no value.

    The state of an identity is ok, expiring, outdated (bound to other addresses than it should be), or that of its
    SecretsError, which is a problem. `expires` is RFC 3339; null for a secret id without an end, and for one of which
    nobody knows. Where values are sealed on this host, `missing` are the keys of an identity that were not set yet.
    """
    states: dict[str, dict[str, Any]] = {}
    problems = []
    known = records(layout)
    for identity in approles(app):
        states[identity] = {"state": "ok", "path": _path(layout, app, identity), "variables": _variables(app, identity)}
        try:
            if app.secrets.source == "systemd_creds":
                states[identity]["missing"] = sealed.missing(layout, identity, needed(app, identity))
            else:
                record = known.get(identity)
                states[identity] |= {"state": _outlook(app, record), "expires": record.expires if record else None}
            if identity == "rotate":
                _check_rotation(layout, app)
            else:
                fetch(layout, app, identity)
        except SecretsError as error:
            # One that is bound to where this host was before gets a new one: that is no problem of Vault's.
            if (error.state, states[identity]["state"]) != ("address", "outdated"):
                states[identity]["state"] = error.state
            states[identity]["problem"] = str(error)
            problems.append(f"{app.name} ({identity}): {error}")
    return {"app": app.name, "source": app.secrets.source, "identities": states, "problems": problems}


def _check_rotation(layout: Layout, app: App) -> None:
    """Ask Vault whether the rotate identity may do all that it is there for.

    Raises:
        SecretsError: it may not.
    """
    mount = f"auth/{app.secrets.approle_mount}/role"
    needed = {f"{app.secrets.kv_mount}/data/{app.secrets.path}": {"update"}}
    for approle in app.secrets.rotation.approles.values() if app.secrets.rotation else ():
        needed |= {f"{mount}/{approle}/{each}": {"update"} for each in ("secret-id", "secret-id-accessor/destroy")}
    with _signed_in(layout, app, "rotate") as (server, token):
        lacking = server.lacking(token, needed)
    if lacking:
        raise SecretsError(
            "denied",
            f"expected the rotate identity to be allowed to update {', '.join(lacking)}; found that it is not; give it "
            "the policy of docs/vault.md",
        )


def whoami(layout: Layout, app: App) -> dict[str, Any]:
    """Who Vault takes each identity for, and how it is kept here; the result holds no secret, but the role ids.

    `token_ttl` is in seconds; `expires` (RFC 3339) is null for a secret id without an end, and where nobody wrote it
    down, in which case `issued` is null, too. `bound_cidrs` is null where it is not known.
    """
    from forgectl import vault

    found: dict[str, dict[str, Any]] = {}
    problems = []
    known = records(layout)
    for identity in approles(app):
        record = known.get(identity)
        found[identity] = {
            "state": "ok",
            "issued": record.issued if record else None,
            "expires": record.expires if record else None,
            "bound_cidrs": record.bound_cidrs if record else None,
        }
        try:
            role_id, secret_id = _credentials(layout, identity)
            sealed_with = systemd.sealed_with(layout.sealed(identity, "secret-id"))
            found[identity] |= {"role_id": role_id, "sealed_with": sealed_with}
            with closing(vault.Vault(app.secrets)) as server:
                login = server.identify(role_id, secret_id)
                server.revoke(login.token)
            found[identity] |= {"approle": login.approle, "policies": login.policies, "token_ttl": login.ttl}
        except SecretsError as error:
            found[identity] |= {"state": error.state, "problem": str(error)}
            problems.append(f"{app.name} ({identity}): {error}")
    return {"app": app.name, "identities": found, "problems": problems}


def _variables(app: App, identity: str) -> list[str]:
    """The environment variables whose values an identity reads; the rotate identity reads for nobody."""
    if identity == "rotate":
        return []
    return sorted(app.migration.variables if app.migration and identity == "migrate" else app.secrets.variables)


def _path(layout: Layout, app: App, identity: str) -> str:
    """Where the values of an identity are: a KV v2 path, or a file."""
    if app.secrets.source == "systemd_creds":
        return str(layout.sealed(identity, sealed.PART))
    return app.migration.path if app.migration and identity == "migrate" else app.secrets.path
