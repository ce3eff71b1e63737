"""Vault (or OpenBao): AppRole login, KV v2, revocation, and secret ids: wrapped, unwrapped, destroyed."""

import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import hvac
import requests
from hvac import exceptions
from urllib3 import Timeout

from forgectl.config import Secrets
from forgectl.errors import SecretsError
from forgectl.values import Fetched, problems

# More than a busy server takes now and then: what is not answered by then fails a release.
TIMEOUT_SECONDS = 10.0
# What a request gets that begins when the time is up, as the revocation after a late answer does.
LEAST_SECONDS = 0.5
# Long enough for a busy host to unwrap it, and within what the policies of docs/vault.md allow.
WRAP_SECONDS = 60


class SecretId(NamedTuple):
    """A secret id, the accessor that destroys it, and the seconds that it lives; 0 for ever."""

    value: str
    accessor: str
    ttl: int


class Login(NamedTuple):
    """A token with its TTL in seconds, and what Vault says of whoever logged in.

    `kept`: whether it can be renewed, as often as needed.
    """

    token: str
    ttl: int
    approle: str
    policies: list[str]
    kept: bool


class LeasedUser(NamedTuple):
    """A database user, its lease, the seconds that it has, and whether it can have more."""

    user: str
    password: str
    lease: str
    ttl: int
    renewable: bool


class _Session(requests.Session):
    """Gives each request TIMEOUT_SECONDS, or what is left until `deadline`."""

    def __init__(self, deadline: float | None) -> None:
        super().__init__()
        self._deadline = deadline

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        left = TIMEOUT_SECONDS
        if self._deadline is not None:
            left = max(LEAST_SECONDS, min(left, self._deadline - time.monotonic()))
        # `total`, or the connection and the answer would get as much each.
        return super().send(request, **options | {"timeout": Timeout(total=left)})


class Vault:
    """One connection to the server that `secrets` names.

    Every method raises SecretsError with one line that says what was found and what to do, and never a value. After
    `deadline`, in seconds of the monotonic clock, requests are given up.
    """

    def __init__(self, secrets: Secrets, deadline: float | None = None) -> None:
        self._secrets = secrets
        self._address = secrets.address.rstrip("/")
        session = _Session(deadline)
        # Proxies, .netrc and CA bundles of whoever calls are not part of the host's configuration.
        session.trust_env = False
        session.verify = secrets.ca_file
        # An empty token, or hvac would take the caller's VAULT_TOKEN.
        self._client = hvac.Client(url=self._address, token="", verify=secrets.ca_file, session=session)

    def close(self) -> None:
        self._client.adapter.close()

    def login(self, role_id: str, secret_id: str) -> str:
        """Log in through AppRole and return the token."""
        return self.identify(role_id, secret_id).token

    def identify(self, role_id: str, secret_id: str) -> Login:
        """Log in through AppRole."""
        mount = self._secrets.approle_mount
        try:
            with self._reachable():
                auth = self._client.auth.approle.login(role_id, secret_id, use_token=False, mount_point=mount)["auth"]
                return Login(
                    str(auth["client_token"]),
                    int(auth["lease_duration"]),
                    str(auth["metadata"]["role_name"]),
                    [str(name) for name in auth["policies"]],
                    bool(auth["renewable"]) and not auth.get("num_uses"),
                )
        except (exceptions.InvalidRequest, exceptions.Unauthorized) as error:
            # The two are told apart by nothing but the words.
            if "CIDR" in str(error):
                raise SecretsError(
                    "address",
                    f"Vault at {self._address} refused the address of this host ({_reason(error)}); bind the secret id "
                    "to the right one by secrets_bound_cidrs, and run site.yml with a Vault token",
                ) from None
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

    def read(self, token: str, path: str, version: int = 0) -> Fetched:
        """Read a version of a KV v2 path; the newest one for 0, or when the one asked for was deleted since."""
        mount = self._secrets.kv_mount
        self._client.token = token
        try:
            with self._reachable():
                answer = self._client.secrets.kv.v2.read_secret_version(
                    path, version=version or None, mount_point=mount, raise_on_deleted_version=True
                )
                return Fetched(dict(answer["data"]["data"]), int(answer["data"]["metadata"]["version"]))
        except exceptions.InvalidPath:
            if version:
                return self.read(token, path)
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

    def write(self, token: str, path: str, values: Mapping[str, Any], version: int) -> int:
        """Write all values of a KV v2 path if its newest version is still `version`; return the new one."""
        mount = self._secrets.kv_mount
        self._client.token = token
        try:
            with self._reachable():
                answer = self._client.secrets.kv.v2.create_or_update_secret(
                    path, dict(values), cas=version, mount_point=mount
                )
                return int(answer["data"]["version"])
        except exceptions.Forbidden:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} denied writing {mount}/{path}; give the AppRole a policy with "
                f'path "{mount}/data/{path}" {{ capabilities = ["create", "read", "update"] }}',
            ) from None
        except exceptions.VaultError as error:
            if "check-and-set" in str(error):
                raise SecretsError(
                    "conflict",
                    f"expected version {version} of {mount}/{path} to be the newest; someone has written another; "
                    "run the command again",
                ) from None
            raise SecretsError(
                "denied", f"Vault at {self._address} refused to write {mount}/{path} ({_reason(error)}); see its log"
            ) from None

    def wrapped_secret_id(self, token: str, approle: str, cidrs: Sequence[str]) -> str:
        """Ask for a secret id of an AppRole that works from `cidrs` alone (none: from anywhere).

        Returns:
            The response-wrapping token, good for WRAP_SECONDS and one use.
        """
        mount = self._secrets.approle_mount
        bound = ",".join(cidrs)
        self._client.token = token
        try:
            with self._reachable():
                answer = self._client.write_data(
                    f"auth/{mount}/role/{approle}/secret-id",
                    data={"cidr_list": bound, "token_bound_cidrs": bound} if bound else {},
                    wrap_ttl=f"{WRAP_SECONDS}s",
                )
                return str(answer["wrap_info"]["token"])
        except exceptions.VaultError as error:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} denied a wrapped secret id of {approle} ({_reason(error)}); give the rotate "
                "identity the policy of docs/vault.md",
            ) from None

    def destroy(self, token: str, approle: str, accessor: str) -> None:
        """Destroy the secret id of that accessor; one that has expired is gone already."""
        mount = self._secrets.approle_mount
        self._client.token = token
        try:
            with self._reachable(), _unless_gone():
                self._client.auth.approle.destroy_secret_id_accessor(approle, accessor, mount_point=mount)
        except exceptions.VaultError as error:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} denied destroying a secret id of {approle} by its accessor "
                f"({_reason(error)}); give the rotate identity the policy of docs/vault.md",
            ) from None

    def lease_user(self, token: str, mount: str, role: str) -> LeasedUser:
        """Have a user made by a role of a database engine; it lives no longer than the token."""
        self._client.token = token
        try:
            with self._reachable():
                answer = self._client.secrets.database.generate_credentials(role, mount_point=mount)
                return LeasedUser(
                    str(answer["data"]["username"]),
                    str(answer["data"]["password"]),
                    str(answer["lease_id"]),
                    int(answer["lease_duration"]),
                    bool(answer["renewable"]),
                )
        except exceptions.Forbidden:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} denied a database user; give the AppRole a policy with "
                f'path "{mount}/creds/{role}" {{ capabilities = ["read"] }}',
            ) from None
        except exceptions.VaultError as error:
            raise SecretsError(
                "denied",
                f"Vault at {self._address} refused a database user at {mount}/creds/{role} ({_reason(error)}); check "
                "the role and the connection of its engine (docs/vault.md)",
            ) from None

    def renew(self, token: str, lease: str = "") -> int:
        """Renew a lease, or without one the token itself; returns the seconds that it has now.

        SecretsError has the state lost when there is nothing left to renew.
        """
        self._client.token = token
        try:
            with self._reachable():
                if lease:
                    return int(self._client.sys.renew_lease(lease)["lease_duration"])
                return int(self._client.auth.token.renew_self()["auth"]["lease_duration"])
        except exceptions.VaultError as error:
            raise SecretsError(
                "lost",
                f"Vault at {self._address} did not renew the {'lease' if lease else 'token'} ({_reason(error)})",
            ) from None

    def lacking(self, token: str, needed: Mapping[str, set[str]]) -> list[str]:
        """The paths of `needed` at which the token has none of the capabilities; no path where it may not ask."""
        self._client.token = token
        try:
            with self._reachable():
                answer = self._client.sys.get_capabilities(list(needed))["data"]
                return [path for path, wanted in needed.items() if not wanted & set(answer.get(path) or [])]
        except exceptions.VaultError:
            return []

    def revoke(self, token: str) -> bool:
        """Revoke the token; false when it could not be, and it lives until it expires."""
        self._client.token = token
        try:
            with self._reachable():
                self._client.auth.token.revoke_self()
        except (SecretsError, exceptions.VaultError):
            return False
        return True

    def unwrap_secret_id(self, wrapping_token: str) -> SecretId:
        """Exchange a response-wrapping token for the secret id in it, once."""
        prefix = f"auth/{self._secrets.approle_mount}/role/"
        self._client.token = wrapping_token
        try:
            with self._reachable():
                lookup = self._client.write_data("sys/wrapping/lookup", data={"token": wrapping_token})
                origin = str(lookup["data"].get("creation_path", ""))
                if origin.startswith(prefix) and origin.endswith("/secret-id"):
                    data = self._client.sys.unwrap()["data"]
                    return SecretId(str(data["secret_id"]), str(data["secret_id_accessor"]), int(data["secret_id_ttl"]))
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
            # The same end of a connection, before Python 3.11.4 by the second name.
            if isinstance(_innermost(error), ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise SecretsError(
                    "unreachable",
                    f"Vault at {self._address} is unreachable (it hung up); start it, or mend the network between",
                ) from None
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
        except (
            exceptions.InternalServerError,
            exceptions.BadGateway,
            exceptions.RateLimitExceeded,
            # What hvac has no name for, as a load balancer's 504.
            exceptions.UnexpectedError,
        ) as error:
            raise SecretsError(
                "unreachable", f"Vault at {self._address} failed ({_reason(error)}); see the server's own log"
            ) from None
        except (AttributeError, KeyError, TypeError, ValueError):
            raise SecretsError(
                "unreachable", f"expected the API of Vault at {self._address}; found something else; check the address"
            ) from None


def fetch(
    secrets: Secrets,
    role_id: str,
    secret_id: str,
    path: str,
    variables: dict[str, str],
    version: int = 0,
    deadline: float | None = None,
) -> Fetched:
    """Log in, read a version of a path (0: the newest), revoke the token, and check what `variables` refer to.

    Raises:
        SecretsError: any of it failed, or took longer than until `deadline` of the monotonic clock.
    """
    server = Vault(secrets, deadline)
    try:
        token = server.login(role_id, secret_id)
        try:
            found = server.read(token, path, version)
        finally:
            server.revoke(token)
    finally:
        server.close()
    if wrong := problems(found.values, variables, f"{secrets.kv_mount}/{path}"):
        raise SecretsError("incomplete", "; ".join(wrong), found.version)
    return found


@contextmanager
def _unless_gone() -> Iterator[None]:
    """Pass over the complaint that there is no such accessor, which comes as 403, 404 or 500."""
    try:
        yield
    except exceptions.VaultError as error:
        if "accessor" not in str(error.errors):
            raise


def _reason(error: BaseException) -> str:
    """The shortest true description: of an error wrapped by several libraries the innermost one, on one line."""
    error = _innermost(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, exceptions.VaultError):
        return " ".join(", ".join(error.errors or [type(error).__name__]).split())
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _innermost(error: BaseException) -> BaseException:
    while (inner := _inner(error)) is not None:
        error = inner
    return error


def _inner(error: BaseException) -> BaseException | None:
    candidates = [getattr(error, "reason", None), *error.args, error.__cause__]
    return next((candidate for candidate in candidates if isinstance(candidate, BaseException)), None)
