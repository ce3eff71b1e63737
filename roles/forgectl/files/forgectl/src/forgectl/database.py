"""PostgreSQL: the login roles and their verifiers, and the lock that lets one migration at a time run.

psycopg is imported where it is used, since it takes longer to import than most commands to run.
"""

import base64
import hashlib
import hmac
import secrets
import stringprep
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from forgectl import config
from forgectl.config import Database
from forgectl.errors import ForgeError, Refused, SecretsError
from forgectl.values import Fetched

if TYPE_CHECKING:
    import psycopg

# Any constant will do: advisory locks belong to one database each.
MIGRATION_LOCK = int.from_bytes(hashlib.sha256(b"forge migration").digest()[:8], "big", signed=True)
LOCK_TIMEOUT_SECONDS = 900
LOCK_EVERY_SECONDS = 0.5
CONNECT_TIMEOUT_SECONDS = 10
# Of the local server: its administrator, whom it takes root for (pg_ident.conf).
ADMINISTRATION = "host=/var/run/postgresql dbname=postgres user=postgres"
# The key beside the password that names the role it belongs to.
USER_KEY = config.USER_KEY
PASSWORD_BYTES = 32


def matches(password: str, verifier: str | None) -> bool:
    """Whether a stored SCRAM-SHA-256 verifier was made from a password (RFC 5803: its parts, RFC 5802: the keys)."""
    try:
        scheme, iterations_and_salt, keys = (verifier or "").split("$")
        iterations, salt = iterations_and_salt.split(":")
        stored = base64.b64decode(keys.split(":")[0])
        rounds, salt_bytes = int(iterations), base64.b64decode(salt)
    except ValueError:
        return False
    if scheme != "SCRAM-SHA-256":
        return False
    # PostgreSQL prepares a password with SASLprep, and takes it as it is when that is impossible.
    mapped = "".join(" " if stringprep.in_table_c12(c) else c for c in password if not stringprep.in_table_b1(c))
    for candidate in {password, unicodedata.normalize("NFKC", mapped)}:
        salted = hashlib.pbkdf2_hmac("sha256", candidate.encode(), salt_bytes, rounds)
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        if hmac.compare_digest(hashlib.sha256(client_key).digest(), stored):
            return True
    return False


def user(database: Database, found: Fetched) -> str:
    """The role that the app logs in as: the first one, unless its secrets name another under `database_user`.

    Raises:
        SecretsError: what they name is no role of the local server that is the app's, or no name at all.
    """
    name = found.values.get(USER_KEY, database.app_role)
    if isinstance(name, str) and (name in database.app_roles if database.has_own_roles else name):
        return name
    expected = " or ".join(database.app_roles) if database.has_own_roles else "the name of a role"
    raise SecretsError(
        "incomplete",
        f"expected {expected} under the key {USER_KEY} of the app's secrets; found something else; write it there, "
        "with that role's password",
        found.version,
    )


def new_password() -> str:
    """A password of 256 random bits that needs no quoting in a URL and that SASLprep leaves as it is."""
    return secrets.token_urlsafe(PASSWORD_BYTES)


def with_user(url: str, name: str) -> str:
    """A URL without a password, with the name of another user."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(name, safe='')}@{host}"))


def set_verifiers(passwords: Mapping[str, str], *, dry_run: bool = False) -> dict[str, str]:
    """Set the verifier of each login role of the local server whose stored one does not match its password.

    The password itself never reaches the server or its log.

    Returns role: "unchanged" or "set" ("would set" in a dry run).

    Raises:
        Refused: the server does not answer, or a role does not exist.
    """
    import psycopg
    from psycopg import sql

    results = {}
    with _administration() as connection:
        rows = connection.execute(
            "SELECT rolname, rolpassword FROM pg_authid WHERE rolname = ANY(%s)", (list(passwords),)
        ).fetchall()
        stored: dict[str, str | None] = dict(rows)
        for role, password in passwords.items():
            if role not in stored:
                raise Refused(f"expected the role {role} in PostgreSQL; found none; run site.yml, which creates it")
            if matches(password, stored[role]):
                results[role] = "unchanged"
            elif dry_run:
                results[role] = "would set"
            else:
                verifier = connection.pgconn.encrypt_password(
                    password.encode(), role.encode(), b"scram-sha-256"
                ).decode()
                try:
                    connection.execute(
                        sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier))
                    )
                except psycopg.Error as error:
                    raise Refused(f"PostgreSQL refused the verifier of {role}: {_words(error)}") from None
                results[role] = "set"
    return results


def expire(role: str) -> None:
    """Take the password of a login role of the local server: nobody gets in as that role until it has another.

    Raises:
        Refused: the server does not answer.
    """
    import psycopg
    from psycopg import sql

    with _administration() as connection:
        try:
            if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is not None:
                connection.execute(sql.SQL("ALTER ROLE {} PASSWORD NULL").format(sql.Identifier(role)))
        except psycopg.Error as error:
            raise Refused(f"PostgreSQL refused to take the password of {role}: {_words(error)}") from None


def drop(name: str, roles: Sequence[str]) -> None:
    """Drop a database of the local server, whoever is connected to it, and roles; those that are gone are no failure.

    Raises:
        Refused: the server does not answer, or something else there depends on a role.
    """
    import psycopg
    from psycopg import sql

    with _administration() as connection:
        try:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
            for role in roles:
                connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))
        except psycopg.Error as error:
            raise Refused(f"PostgreSQL refused to drop {name} or its roles: {_words(error)}; mend that") from None


def migration_url(database: Database) -> str:
    """The URL that the migration's role connects to, as libpq reads it."""
    parts = urlsplit(database.migrate_url or database.url)
    host = parts.netloc.rpartition("@")[2]
    user = parts.username if database.migrate_url and parts.username else quote(database.migrate_role or "", safe="")
    # asyncpg says ssl= where libpq says sslmode=
    query = urlencode([("sslmode" if key == "ssl" else key, value) for key, value in parse_qsl(parts.query)])
    return urlunsplit(("postgresql", f"{user}@{host}", parts.path, query, ""))


@contextmanager
def migration_lock(url: str, password: str) -> Iterator["psycopg.Connection"]:
    """Hold the database's migration lock on a connection of our own, however many hosts share the database.

    Raises:
        Refused: the database does not let the migration's role in, or the lock was not free in time.
    """
    import psycopg

    try:
        connection = psycopg.connect(
            url,
            password=password,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            application_name="forgectl",
        )
    except psycopg.Error as error:
        raise Refused(
            f"expected the database to let the migration in; found: {_words(error)}; check that it runs, and run "
            "site.yml to set the role's password"
        ) from None
    with connection:
        try:
            # Asked again and again: CREATE INDEX CONCURRENTLY waits for whoever waits inside a statement, as
            # pg_advisory_lock() would for the migration that builds the index.
            deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
            while connection.execute("SELECT pg_try_advisory_lock(%s)", (MIGRATION_LOCK,)).fetchone() != (True,):
                if time.monotonic() > deadline:
                    raise Refused(
                        f"expected the migration lock within {LOCK_TIMEOUT_SECONDS} s; found that another host is "
                        "migrating this database; wait for it"
                    )
                time.sleep(LOCK_EVERY_SECONDS)
        except psycopg.Error as error:
            raise Refused(
                f"expected the database to give the migration lock; found: {_words(error)}; check that it runs"
            ) from None
        yield connection


@contextmanager
def _administration(name: str = "") -> Iterator["psycopg.Connection"]:
    """Connect as the administrator of the local server, to its own database or to the one of that name."""
    import psycopg

    conninfo = psycopg.conninfo.make_conninfo(ADMINISTRATION, **({"dbname": name} if name else {}))
    try:
        connection = psycopg.connect(conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_SECONDS)
    except psycopg.Error as error:
        raise Refused(f"expected PostgreSQL on this host; found: {_words(error)}; start it") from None
    with connection:
        yield connection


def revisions(name: str) -> list[str]:
    """The Alembic revisions that a database of the local server is at.

    Raises:
        Refused: the server, or the database, does not answer.
    """
    from forgectl import schema

    with _administration(name) as connection:
        return schema.current(connection)


def passwords(database: Database, app: Fetched, migrate: Fetched | None) -> dict[str, str]:
    """Role: password, of the login roles, from the secrets of the two identities; of the app's two, the one in use."""
    found = {user(database, app): str(app.values[database.app_key])} if database.has_own_roles else {}
    if database.migrate_role and migrate is not None:
        found[database.migrate_role] = str(migrate.values[database.migrate_key])
    return found


def _words(error: Exception) -> str:
    words = str(error).strip().splitlines()
    if not words:
        raise ForgeError("PostgreSQL failed without a message") from error
    return words[0]
