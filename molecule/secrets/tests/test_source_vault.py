"""Back to Vault, from values that were sealed on the host.

On its own, since the app's signing key is another one then: no client could go on with a cursor from before.
"""

from __future__ import annotations

import hvac
from forge_events import Provisioning
from forge_scenario import Status, secrets_at
from forge_vault import PATH, put, serving
from testinfra.host import Host


def test_back_to_vault(host: Host, vault: hvac.Client, status: Status, provisioning: Provisioning) -> None:
    """A release, once Vault names the database role that no slot uses."""
    used = "inbox_app_2" if "//inbox_app_2@" in serving(host, status)["FORGE_DATABASE_URL"] else "inbox_app"
    put(vault, database_user="inbox_app" if used == "inbox_app_2" else "inbox_app_2")
    provisioning.ensure(host)
    assert serving(host, status)["PARTNER_TOKEN"] == secrets_at(vault, PATH)["partner_token"]
    assert f"//{used}@" not in serving(host, status)["FORGE_DATABASE_URL"]
