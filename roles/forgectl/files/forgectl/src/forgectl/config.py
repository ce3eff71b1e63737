"""The description of an app, NAME.toml, as provisioning renders it and each release keeps a copy of."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from forgectl.errors import Refused

# Inside the source, no part of it hidden.
Folder = Annotated[str, msgspec.Meta(pattern=r"^[^/.][^/]*(/[^/.][^/]*)*$")]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,30}$")]
CommandName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,20}$")]
Role = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,62}$")]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Variable = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

# Among the app's secrets, the role that it logs in to the database as.
USER_KEY = "database_user"


class Timeouts(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The timeout chain, seconds; all derived from the longest allowed request.

    `pool_exit`: how long Nginx may still use a connection to a slot that live.sock no longer leads to.
    """

    request: Seconds
    app_graceful: Seconds
    gunicorn_graceful: Seconds
    stop: Seconds
    heartbeat: Seconds
    proxy_idle: Seconds
    app_keepalive: Seconds
    connect: Seconds
    start: Seconds
    # Releases that were staged before there was a pool do not say it.
    pool_exit: Seconds = 5


class Workers(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How many worker processes run, and why that many."""

    count: Annotated[int, msgspec.Meta(ge=1)]
    reasons: list[str]


class Rotation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The identity that renews all of the app's, itself included; `approles` are their names by identity."""

    approles: dict[Text, Text]


class Secrets(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the app's secrets are, and environment variable = key there.

    `source` is vault, which needs `address`, `ca_file` and the KV v2 `path`, or systemd_creds: sealed on this host; or
    none, for an app without any.
    `bound_cidrs` are the only addresses that secret ids and their tokens work from (empty: any); `retry_seconds` is how
    long a start goes on asking while Vault is unreachable or sealed.
    """

    source: Literal["vault", "systemd_creds", "none"] = "vault"
    address: Annotated[str, msgspec.Meta(pattern=r"^(https://|$)")] = ""
    ca_file: str = ""
    path: str = ""
    kv_mount: Text = "secret"
    approle_mount: Text = "approle"
    database_mount: Text = "database"
    variables: dict[Variable, Text] = {}
    bound_cidrs: list[Text] = []
    retry_seconds: Annotated[float, msgspec.Meta(ge=0)] = 30
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.source == "vault" and not (self.address and self.ca_file and self.path):
            raise ValueError("expected `address`, `ca_file` and `path` of a Vault")
        if self.source == "none" and self.variables:
            raise ValueError("expected no `variables` of a source that is none")


class Migration(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How the schema is migrated: `python -m command` as `user`, with settings and secrets of its own."""

    user: Name
    command: Annotated[list[Text], msgspec.Meta(min_length=1)]
    path: str = ""
    settings: dict[Variable, str] = {}
    variables: dict[Variable, Text] = {}


class Database(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The app's PostgreSQL database. URLs hold no password; keys name the passwords in Vault.

    `url_variable` receives `url`, with the user that the app's secrets may name beside the password; in the form of
    `url_format`, if any, whose {user}, {password}, {host} and {name} are filled in. With `vault_role`, a role of
    Vault's database engine, user and password of the app are leased for each slot. `pool_max`, of one worker, is
    preflight's alone, which counts the connections of all apps of the host.
    """

    placement: Literal["local", "external"]
    name: Role
    app_role: Role
    url: Text
    app_key: Text = "database_password"
    migrate_role: Role | None = None
    migrate_key: Text = "database_password"
    migrate_url: str = ""
    # Empty for an app that is not told.
    url_variable: Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")] = "FORGE_DATABASE_URL"
    url_format: str = ""
    vault_role: str = ""
    pool_max: Annotated[int, msgspec.Meta(ge=1)] | None = None

    @property
    def wants_password(self) -> bool:
        """Whether its URL holds the password, for an app that reads that from nowhere else."""
        return "{password}" in self.url_format

    @property
    def has_own_roles(self) -> bool:
        """Whether the app logs in as roles of this host's server, whose passwords this host may set."""
        return self.placement == "local" and not self.vault_role

    @property
    def app_roles(self) -> tuple[str, str]:
        """The two roles that the app logs in as by turns, so that a password can change under a running app."""
        return self.app_role, f"{self.app_role}_2"


class Command(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the app runs beside its server: a program of its environment, or `python -m command`.

    With a `schedule`, a calendar event of systemd.time(7), it is started then; otherwise it goes on for ever. It gets
    `stop_seconds` to end before it is killed.
    """

    command: Annotated[list[Text], msgspec.Meta(min_length=1)]
    memory_max_mib: Annotated[int, msgspec.Meta(ge=1)]
    stop_seconds: Annotated[int, msgspec.Meta(ge=1)]
    schedule: str = ""


class App(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One app of this host.

    A new slot is watched for `watch_seconds` after the cutover; a slot is recycled after `recycle_after_hours`, or
    when its own memory is above `recycle_memory_percent` of its limit (0: never). `static` are the folders of the
    source that Nginx serves.
    """

    name: Name
    user: Name
    domain: Text
    module: Annotated[str, msgspec.Meta(pattern=r"^[\w.]+:\w+(\(.*\))?$")]
    timeouts: Timeouts
    workers: Workers
    secrets: Secrets
    python_path: Text = "."
    lock: Text = "requirements.txt"
    # Empty where the app has none: then the server answers in its place.
    ready_path: Annotated[str, msgspec.Meta(pattern=r"^(/|$)")] = "/ready"
    health_path: Annotated[str, msgspec.Meta(pattern=r"^(/|$)")] = "/health"
    keep_releases: Annotated[int, msgspec.Meta(ge=2)] = 5
    watch_seconds: Annotated[float, msgspec.Meta(ge=0)] = 10
    recycle_after_hours: Annotated[float, msgspec.Meta(ge=0)] = 168
    recycle_memory_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 80
    settings: dict[Variable, str] = {}
    static: list[Folder] = []
    migration: Migration | None = None
    database: Database | None = None
    commands: dict[CommandName, Command] = {}

    def __post_init__(self) -> None:
        if self.migration and self.secrets.source == "vault" and not self.migration.path:
            raise ValueError("expected `path` in `migration`, which is that of its secrets in Vault")

    @property
    def readiness(self) -> str:
        """Who is asked whether the app is ready: its own path, or without one the server of each worker."""
        return self.ready_path or "the server"

    @property
    def variables(self) -> dict[str, str]:
        """Variable: key, of what the app's secrets have to hold: all but what Vault leases."""
        leased = (self.database.app_key, USER_KEY) if self.database and self.database.vault_role else ()
        return {variable: key for variable, key in self.secrets.variables.items() if key not in leased}

    @property
    def leases(self) -> bool:
        """Whether Vault leases a database user for each slot."""
        return bool(self.database and self.database.vault_role)

    @property
    def uses_alembic(self) -> bool:
        """Whether the migrations are Alembic's, whose revisions forgectl can read."""
        return self.migration is not None and self.migration.command[0] == "alembic"


def decode(data: bytes, source: Path) -> App:
    """Decode an app's description strictly.

    Raises:
        Refused: it is no TOML, misses a key, holds an unknown one or a value of the wrong kind.
    """
    try:
        return msgspec.toml.decode(data, type=App)
    except msgspec.DecodeError as error:
        raise Refused(f"expected the description of an app in {source}; found: {error}; run site.yml again") from error


def load(path: Path) -> App:
    """Read an app's description.

    Raises:
        Refused: there is none, or it is malformed.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Refused(f"expected {path}; found no such file; check the app's name, or run site.yml first") from None
    return decode(data, path)
