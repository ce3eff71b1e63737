"""PostgreSQL: the verifiers of the login roles, and the lock that lets one migration at a time run.

psycopg is imported where it is used, since it takes longer to import than most commands to run.
"""

import base64
import hashlib
import hmac
import os
import pwd
import stringprep
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from forgectl.config import Database
from forgectl.errors import ForgeError, Refused

if TYPE_CHECKING:
    import psycopg

# Any constant will do: advisory locks belong to one database each.
MIGRATION_LOCK = int.from_bytes(hashlib.sha256(b"forge migration").digest()[:8], "big", signed=True)
LOCK_TIMEOUT_SECONDS = 900
LOCK_EVERY_SECONDS = 0.5
CONNECT_TIMEOUT_SECONDS = 10


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


def set_verifiers(
    passwords: dict[str, str], *, dry_run: bool = False, user: str = "postgres", conninfo: str = ""
) -> dict[str, str]:
    """Set the verifier of each login role whose stored one does not match its password.

    The password itself never reaches the server or its log. `conninfo` is for tests; on a host it is the local
    socket, as the system user `user`, by peer.

    Returns role: "unchanged" or "set" ("would set" in a dry run).

    Raises:
        Refused: the server does not answer, or a role does not exist.
    """
    import psycopg
    from psycopg import sql

    results = {}
    with _connect_as(user, conninfo or "host=/var/run/postgresql dbname=postgres user=postgres") as connection:
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
def _connect_as(user: str, conninfo: str) -> Iterator["psycopg.Connection"]:
    """Connect as a system user: a peer is who calls connect()."""
    import psycopg

    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        raise Refused(f"expected the system user {user}; found none; install PostgreSQL (site.yml does)") from None
    before = os.geteuid()
    os.seteuid(uid)
    try:
        connection = psycopg.connect(conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_SECONDS)
    except psycopg.Error as error:
        raise Refused(f"expected PostgreSQL on this host; found: {_words(error)}; start it") from None
    finally:
        os.seteuid(before)
    with connection:
        yield connection


def passwords(database: Database, app: dict[str, str], migrate: dict[str, str] | None) -> dict[str, str]:
    """Role: password, of the roles that log in, from the values of the two identities."""
    found = {database.app_role: app[database.app_key]}
    if database.migrate_role and migrate is not None:
        found[database.migrate_role] = migrate[database.migrate_key]
    return found


def _words(error: Exception) -> str:
    words = str(error).strip().splitlines()
    if not words:
        raise ForgeError("PostgreSQL failed without a message") from error
    return words[0]
