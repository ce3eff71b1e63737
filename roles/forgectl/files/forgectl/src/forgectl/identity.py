"""The host's identities towards Vault: one for the app, one for its migrations, sealed with the host's key.

Vault's client is imported where it is used, since that takes longer than most commands: a warm rollback is one rename.
"""

from typing import Any

from forgectl import systemd
from forgectl.config import App
from forgectl.errors import ForgeError, Refused, SecretsError
from forgectl.layout import Layout, write_atomically

PARTS = ("role-id", "secret-id")


def identities(app: App) -> list[str]:
    """The identities that an app needs."""
    return ["app", "migrate"] if app.migration else ["app"]


def enrol(layout: Layout, app: App, identity: str, role_id: str, wrapping_token: str) -> None:
    """Unwrap a secret id, prove it by a login, and seal it with its role id.

    Raises:
        Refused: the app has no such identity.
        SecretsError: the token was used before, or Vault does not accept what was in it.
    """
    if identity not in identities(app):
        raise Refused(f"{app.name} has no identity {identity}; it has: {', '.join(identities(app))}")
    from forgectl import vault

    server = vault.Vault(app.secrets)
    try:
        secret_id = server.unwrap_secret_id(wrapping_token)
        try:
            server.revoke(server.login(role_id, secret_id))
        except SecretsError as error:
            if error.state != "rejected":
                raise
            raise SecretsError(
                "rejected",
                f"Vault at {app.secrets.address} rejected the role id with its fresh secret id; "
                f"the role id of the {identity} identity in the inventory is not that of the secret id's AppRole",
            ) from None
    finally:
        server.close()
    layout.credentials.mkdir(mode=0o700, exist_ok=True)
    for part, value in zip(PARTS, (role_id, secret_id), strict=True):
        write_atomically(layout.sealed(identity, part), systemd.encrypt(value, part), 0o600)


def fetch(layout: Layout, app: App, identity: str) -> dict[str, Any]:
    """Every value at an identity's path, after a check of all that the app refers to.

    Raises:
        SecretsError: one of them is not usable, or Vault is not.
    """
    from forgectl import vault

    found = {}
    for part in PARTS:
        path = layout.sealed(identity, part)
        if not path.exists():
            raise SecretsError(
                "missing",
                f"expected the sealed {part} of the {identity} identity in {path}; found none; run site.yml",
            )
        try:
            found[part] = systemd.decrypt(path, part)
        except ForgeError as error:
            raise SecretsError(
                "missing", f"expected to open {path} with this host's key; found: {error}; run site.yml to seal it anew"
            ) from error
    if identity == "app":
        path_in_vault, variables = app.secrets.path, dict(app.secrets.variables)
        needed = app.database.app_key if app.database else None
    else:
        if app.migration is None:
            raise Refused(f"{app.name} has no identity {identity}")
        path_in_vault, variables = app.migration.path, dict(app.migration.variables)
        needed = app.database.migrate_key if app.database else None
    if needed and app.database and (app.database.placement == "local" or identity == "migrate"):
        variables.setdefault("the database role", needed)
    return vault.fetch(app.secrets, found["role-id"], found["secret-id"], path_in_vault, variables)


def check(layout: Layout, app: App) -> dict[str, Any]:
    """Try both identities and check every value; the result holds no value."""
    states: dict[str, dict[str, Any]] = {}
    problems = []
    for identity in identities(app):
        migration = identity == "migrate" and app.migration is not None
        path = app.migration.path if migration and app.migration else app.secrets.path
        variables = app.migration.variables if migration and app.migration else app.secrets.variables
        states[identity] = {"state": "ok", "path": path, "variables": sorted(variables)}
        try:
            fetch(layout, app, identity)
        except SecretsError as error:
            states[identity] |= {"state": error.state, "problem": str(error)}
            problems.append(f"{app.name} ({identity}): {error}")
    return {"app": app.name, "identities": states, "problems": problems}
