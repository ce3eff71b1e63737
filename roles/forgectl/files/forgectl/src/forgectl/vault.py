"""Vault (or OpenBao): AppRole login, one KV v2 read, revocation, unwrapping.

Four requests of the HTTP API through the standard library: importing a client library takes longer than all of them,
and every start of an app waits for it.

Sources: https://openbao.org/api-docs/auth/approle/, .../secret/kv/kv-v2/, .../system/wrapping-unwrap/.
"""

import http.client
import json
import ssl
from typing import Any
from urllib.parse import quote, urlsplit

from forgectl.config import Secrets
from forgectl.errors import SecretsError

TIMEOUT_SECONDS = 5.0
# Linux refuses an environment string longer than this, its name included (MAX_ARG_STRLEN).
LONGEST_VARIABLE = 131072


class Vault:
    """One connection to the server that `secrets` names.

    Every method raises SecretsError with one line that says what was found and what to do, and never a value.
    """

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._address = secrets.address.rstrip("/")
        parts = urlsplit(self._address)
        try:
            context = ssl.create_default_context(cafile=secrets.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise SecretsError(
                "untrusted",
                f"expected the CA of Vault in {secrets.ca_file}; found: {_reason(error)}; put its PEM file there",
            ) from None
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port or 443, timeout=TIMEOUT_SECONDS, context=context
        )

    def close(self) -> None:
        self._connection.close()

    def login(self, role_id: str, secret_id: str) -> str:
        """Log in through AppRole and return the token."""
        mount = self._secrets.approle_mount
        status, answer = self._request(
            "POST", f"auth/{mount}/login", {"role_id": role_id, "secret_id": secret_id}, token=None
        )
        if status == 200:
            return str(answer["auth"]["client_token"])
        if status in (400, 401):
            raise SecretsError(
                "rejected",
                f"Vault at {self._address} rejected this host's role id or secret id; it is wrong, expired or used up; "
                "run site.yml with a Vault token to deliver a new one",
            )
        if status == 404:
            raise SecretsError(
                "denied", f"Vault at {self._address} has no AppRole method at auth/{mount}; check secrets_approle_mount"
            )
        raise SecretsError(
            "denied",
            f"Vault at {self._address} denied the login at auth/{mount} (HTTP {status}); check that the method is "
            "enabled and that the AppRole allows this host's address",
        )

    def read(self, token: str, path: str) -> dict[str, Any]:
        """Read the newest version of a KV v2 path."""
        mount = self._secrets.kv_mount
        status, answer = self._request("GET", f"{mount}/data/{path}", None, token)
        if status == 200:
            return dict(answer["data"]["data"])
        if status == 404:
            raise SecretsError(
                "incomplete",
                f"Vault at {self._address} has nothing at {mount}/{path}; write it there: "
                f"bao kv put -mount={mount} {path} KEY=-",
            )
        if status == 403:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} denied reading {mount}/{path}; give the AppRole a policy with "
                f'path "{mount}/data/{path}" {{ capabilities = ["read"] }}',
            )
        raise SecretsError("denied", f"Vault at {self._address} answered HTTP {status} for {mount}/{path}; see its log")

    def revoke(self, token: str) -> bool:
        """Revoke the token; false when it could not be, and it lives until it expires."""
        try:
            status, _ = self._request("POST", "auth/token/revoke-self", {}, token)
        except SecretsError:
            return False
        return status == 204

    def unwrap_secret_id(self, wrapping_token: str) -> str:
        """Exchange a response-wrapping token for the secret id in it, once."""
        status, answer = self._request("POST", "sys/wrapping/lookup", {"token": wrapping_token}, wrapping_token)
        prefix = f"auth/{self._secrets.approle_mount}/role/"
        spent = SecretsError(
            "intercepted",
            f"Vault at {self._address} does not know the wrapping token: it expired, or someone else unwrapped it; "
            "if it was fresh, treat the secret id as stolen: destroy the AppRole's secret ids, then run site.yml again",
        )
        if status != 200:
            raise spent
        origin = str(answer["data"].get("creation_path", ""))
        if not (origin.startswith(prefix) and origin.endswith("/secret-id")):
            raise SecretsError(
                "intercepted",
                f"expected a wrapped secret id made at {prefix}ROLE/secret-id; found one made at {origin}; someone "
                "may have replaced it: find out who, then run site.yml again",
            )
        status, answer = self._request("POST", "sys/wrapping/unwrap", {}, wrapping_token)
        if status != 200:
            raise spent
        return str(answer["data"]["secret_id"])

    def _request(
        self, method: str, path: str, body: dict[str, str] | None, token: str | None
    ) -> tuple[int, dict[str, Any]]:
        headers = {"X-Vault-Request": "true", "Content-Type": "application/json"}
        if token is not None:
            headers["X-Vault-Token"] = token
        try:
            self._connection.request(
                method, "/v1/" + quote(path), None if body is None else json.dumps(body).encode(), headers
            )
            response = self._connection.getresponse()
            data = response.read()
        except ssl.SSLError as error:
            self._connection.close()
            raise SecretsError(
                "untrusted",
                f"the certificate of Vault at {self._address} is not trusted by {self._secrets.ca_file} "
                f"({_reason(error)}); install the right CA there, or mend the server's certificate",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise SecretsError(
                "unreachable",
                f"Vault at {self._address} is unreachable ({_reason(error)}); start it, or mend the network between",
            ) from None
        except UnicodeError:
            raise SecretsError("rejected", "expected a token of printable ASCII; found something else") from None
        if response.status in (501, 503):
            raise SecretsError(
                "sealed",
                f"Vault at {self._address} is sealed or not initialised; unseal it (bao operator unseal), "
                "then the unit starts by itself",
            )
        if response.status in (429, 500, 502, 504):
            raise SecretsError(
                "unreachable", f"Vault at {self._address} answered HTTP {response.status}; see the server's own log"
            )
        try:
            answer = json.loads(data) if data else {}
        except ValueError:
            answer = {}
        if not isinstance(answer, dict) or (response.status == 200 and not answer):
            raise SecretsError(
                "unreachable", f"expected the API of Vault at {self._address}; found something else; check the address"
            )
        return response.status, answer


def problems(values: dict[str, Any], variables: dict[str, str], where: str) -> list[str]:
    """What is wrong with the values that a mapping of variable to key refers to; one line each, never a value."""
    found = []
    for variable, key in variables.items():
        value = values.get(key)
        if key not in values:
            found.append(f"key {key} is missing at {where}; {variable} needs it: write it there")
        elif not isinstance(value, str):
            found.append(f"key {key} at {where} is not a string; {variable} needs one: write it as a string")
        elif not value:
            found.append(f"key {key} at {where} is empty; {variable} needs a value: write it there")
        elif "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            found.append(f"key {key} at {where} holds a NUL or an invalid character; {variable} cannot carry it")
        elif len(value.encode()) + len(variable) + 2 > LONGEST_VARIABLE:
            found.append(f"key {key} at {where} is longer than the 128 KiB that {variable} can carry; shorten it")
    return found


def fetch(secrets: Secrets, role_id: str, secret_id: str, path: str, variables: dict[str, str]) -> dict[str, Any]:
    """Log in, read a path, revoke the token, and check what `variables` refer to.

    Returns every key of the path with its value.

    Raises:
        SecretsError: any of it failed.
    """
    server = Vault(secrets)
    try:
        token = server.login(role_id, secret_id)
        try:
            values = server.read(token, path)
        finally:
            server.revoke(token)
    finally:
        server.close()
    if wrong := problems(values, variables, f"{secrets.kv_mount}/{path}"):
        raise SecretsError("incomplete", "; ".join(wrong))
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
