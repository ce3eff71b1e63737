"""Vault (or OpenBao): AppRole login, one KV v2 read, revocation, unwrapping."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hvac
import requests
from hvac import exceptions

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
        session = requests.Session()
        # Proxies, .netrc and CA bundles of whoever calls are not part of the host's configuration.
        session.trust_env = False
        session.verify = secrets.ca_file
        # An empty token, or hvac would take the caller's VAULT_TOKEN.
        self._client = hvac.Client(
            url=self._address, token="", verify=secrets.ca_file, timeout=TIMEOUT_SECONDS, session=session
        )

    def close(self) -> None:
        self._client.adapter.close()

    def login(self, role_id: str, secret_id: str) -> str:
        """Log in through AppRole and return the token."""
        mount = self._secrets.approle_mount
        try:
            with self._reachable():
                answer = self._client.auth.approle.login(role_id, secret_id, use_token=False, mount_point=mount)
                return str(answer["auth"]["client_token"])
        except (exceptions.InvalidRequest, exceptions.Unauthorized):
            raise SecretsError(
                "rejected",
                f"Vault at {self._address} rejected this host's role id or secret id; it is wrong, expired or used up; "
                "run site.yml with a Vault token to deliver a new one",
            ) from None
        except exceptions.InvalidPath:
            raise SecretsError(
                "denied", f"Vault at {self._address} has no AppRole method at auth/{mount}; check secrets_approle_mount"
            ) from None
        except exceptions.VaultError as error:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} denied the login at auth/{mount} ({_reason(error)}); check that the "
                "method is enabled, that the AppRole allows this host's address, and that earlier failures have not "
                f"locked it (bao auth tune -user-lockout-disable=true {mount}/)",
            ) from None

    def read(self, token: str, path: str) -> dict[str, Any]:
        """Read the newest version of a KV v2 path."""
        mount = self._secrets.kv_mount
        self._client.token = token
        try:
            with self._reachable():
                answer = self._client.secrets.kv.v2.read_secret_version(
                    path, mount_point=mount, raise_on_deleted_version=True
                )
                return dict(answer["data"]["data"])
        except exceptions.InvalidPath:
            raise SecretsError(
                "incomplete",
                f"Vault at {self._address} has nothing at {mount}/{path}; write it there: "
                f"bao kv put -mount={mount} {path} KEY=-",
            ) from None
        except exceptions.Forbidden:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} denied reading {mount}/{path}; give the AppRole a policy with "
                f'path "{mount}/data/{path}" {{ capabilities = ["read"] }}',
            ) from None
        except exceptions.VaultError as error:
            raise SecretsError(
                "denied", f"Vault at {self._address} refused {mount}/{path} ({_reason(error)}); see its log"
            ) from None

    def revoke(self, token: str) -> bool:
        """Revoke the token; false when it could not be, and it lives until it expires."""
        self._client.token = token
        try:
            with self._reachable():
                self._client.auth.token.revoke_self()
        except (SecretsError, exceptions.VaultError):
            return False
        return True

    def unwrap_secret_id(self, wrapping_token: str) -> str:
        """Exchange a response-wrapping token for the secret id in it, once."""
        prefix = f"auth/{self._secrets.approle_mount}/role/"
        self._client.token = wrapping_token
        try:
            with self._reachable():
                lookup = self._client.write_data("sys/wrapping/lookup", data={"token": wrapping_token})
                origin = str(lookup["data"].get("creation_path", ""))
                if origin.startswith(prefix) and origin.endswith("/secret-id"):
                    return str(self._client.sys.unwrap()["data"]["secret_id"])
        except exceptions.VaultError:
            raise SecretsError(
                "intercepted",
                f"Vault at {self._address} does not know the wrapping token: it expired, or someone else unwrapped it; "
                "if it was fresh, treat the secret id as stolen: destroy the AppRole's secret ids, then run site.yml "
                "again",
            ) from None
        raise SecretsError(
            "intercepted",
            f"expected a wrapped secret id made at {prefix}ROLE/secret-id; found one made at {origin}; someone "
            "may have replaced it: find out who, then run site.yml again",
        )

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Turn whatever keeps the server from answering a question into SecretsError; its answers pass."""
        try:
            yield
        except requests.exceptions.SSLError as error:
            raise SecretsError(
                "untrusted",
                f"the certificate of Vault at {self._address} is not trusted by {self._secrets.ca_file} "
                f"({_reason(error)}); install the right CA there, or mend the server's certificate",
            ) from None
        except (requests.exceptions.InvalidHeader, UnicodeError):
            raise SecretsError("rejected", "expected a token of printable ASCII; found something else") from None
        except requests.exceptions.RequestException as error:
            raise SecretsError(
                "unreachable",
                f"Vault at {self._address} is unreachable ({_reason(error)}); start it, or mend the network between",
            ) from None
        except OSError as error:
            # requests looks for the file itself, and says so with an error of its own making.
            raise SecretsError(
                "untrusted",
                f"expected the CA of Vault in {self._secrets.ca_file}; found: {_reason(error)}; put its PEM file there",
            ) from None
        except (exceptions.VaultDown, exceptions.VaultNotInitialized):
            raise SecretsError(
                "sealed",
                f"Vault at {self._address} is sealed or not initialised; unseal it (bao operator unseal), "
                "then the unit starts by itself",
            ) from None
        except (exceptions.InternalServerError, exceptions.BadGateway, exceptions.RateLimitExceeded) as error:
            raise SecretsError(
                "unreachable", f"Vault at {self._address} failed ({_reason(error)}); see the server's own log"
            ) from None
        except (AttributeError, KeyError, TypeError, ValueError):
            raise SecretsError(
                "unreachable", f"expected the API of Vault at {self._address}; found something else; check the address"
            ) from None


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


def _reason(error: BaseException) -> str:
    """The shortest true description: of an error wrapped by several libraries the innermost one, on one line."""
    while (inner := _inner(error)) is not None:
        error = inner
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, exceptions.VaultError):
        return " ".join(", ".join(error.errors or [type(error).__name__]).split())
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _inner(error: BaseException) -> BaseException | None:
    candidates = [getattr(error, "reason", None), *error.args, error.__cause__]
    return next((candidate for candidate in candidates if isinstance(candidate, BaseException)), None)
