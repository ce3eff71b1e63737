"""database.py on a real PostgreSQL."""

import string
import threading
from typing import Any

import msgspec
import psycopg
import pytest
from conftest import admits
from forgectl import database
from forgectl.config import Database
from forgectl.errors import Refused, SecretsError
from forgectl.values import Fetched

PASSWORDS = ["plain-ascii", "pässwörd Ключ", "soft\u00adhyphen", "ﬁ ligature \u2168", "no\u00a0break", "q\"'$\\\nline"]
HERE = Database(
    placement="local",
    name="inbox",
    app_role="inbox_app",
    migrate_role="inbox_migrate",
    url="postgresql+asyncpg://inbox_app@%2Fvar%2Frun%2Fpostgresql/inbox",
)
THERE = Database(
    placement="external",
    name="inbox",
    app_role="a",
    url="postgresql+asyncpg://a@db:5433/inbox",
    migrate_url="postgresql+asyncpg://m@db:5433/inbox?ssl=require",
)


@pytest.fixture
def role(logins: tuple[str, str]) -> str:
    return logins[0]


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_verifier_is_set_once_and_lets_the_role_in(postgresql: str, role: str, password: str) -> None:
    assert database.set_verifiers({role: password}, dry_run=True) == {role: "would set"}
    assert database.set_verifiers({role: password}) == {role: "set"}
    assert database.set_verifiers({role: password}) == {role: "unchanged"}
    assert database.set_verifiers({role: password + "x"}, dry_run=True) == {role: "would set"}
    assert admits(postgresql, role, password)
    assert not admits(postgresql, role, password + "x")


def test_a_password_expires_and_the_other_role_keeps_its_own(postgresql: str, logins: tuple[str, str]) -> None:
    first, second = logins
    database.set_verifiers({first: "one", second: "two"})
    for _ in range(2):
        database.expire(first)
        assert not admits(postgresql, first, "one")
        assert admits(postgresql, second, "two")
    database.expire("nobody_here")


def test_a_new_password_works_everywhere(postgresql: str, role: str) -> None:
    passwords = {database.new_password() for _ in range(50)}
    assert len(passwords) == 50
    for password in passwords:
        # In each character there are six bits.
        assert len(password) * 6 >= 256
        assert set(password) <= set(string.ascii_letters + string.digits + "-_")
    password = passwords.pop()
    database.set_verifiers({role: password})
    place = dict(part.split("=") for part in postgresql.split())
    host = f"{place['host'].replace('/', '%2F')}:{place['port']}"
    with psycopg.connect("postgresql://" + f"{role}:{password}@{host}/postgres") as connection:
        assert connection.execute("SELECT current_user").fetchone() == (role,)


@pytest.mark.parametrize(
    ("where", "values", "expected"),
    [
        (HERE, {}, "inbox_app"),
        (HERE, {"database_user": "inbox_app_2"}, "inbox_app_2"),
        (HERE, {"database_user": "postgres"}, None),
        (HERE, {"database_user": ""}, None),
        (HERE, {"database_user": 5}, None),
        (HERE, {"database_user": ["inbox_app"]}, None),
        (THERE, {"database_user": "anybody"}, "anybody"),
        (THERE, {"database_user": ""}, None),
        (THERE, {"database_user": None}, None),
    ],
)
def test_the_secrets_may_name_the_role(where: Database, values: dict[str, Any], expected: str | None) -> None:
    if expected:
        assert database.user(where, Fetched(values, 3)) == expected
        return
    with pytest.raises(SecretsError, match="under the key database_user") as caught:
        database.user(where, Fetched(values, 3))
    assert (caught.value.state, caught.value.version) == ("incomplete", 3)
    assert "postgres" not in str(caught.value)


def test_only_the_role_in_use_has_its_verifier_set() -> None:
    migrate = Fetched({"database_password": "m"}, 1)
    for values, named in (({}, "inbox_app"), ({"database_user": "inbox_app_2"}, "inbox_app_2")):
        app = Fetched({"database_password": "p", **values}, 1)
        assert database.passwords(HERE, app, migrate) == {named: "p", "inbox_migrate": "m"}
    alone = msgspec.structs.replace(HERE, migrate_role=None)
    assert database.passwords(alone, Fetched({"database_password": "p"}, 1), None) == {"inbox_app": "p"}
    leased = msgspec.structs.replace(HERE, vault_role="inbox")
    assert database.passwords(leased, Fetched({}, 1), migrate) == {"inbox_migrate": "m"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (HERE.url, "postgresql+asyncpg://a%20b@%2Fvar%2Frun%2Fpostgresql/inbox"),
        ("postgresql://db.example.com:5433/x?ssl=require", "postgresql://a%20b@db.example.com:5433/x?ssl=require"),
    ],
)
def test_a_url_gets_another_user(url: str, expected: str) -> None:
    assert database.with_user(url, "a b") == expected


def test_a_dry_run_sets_nothing(postgresql: str, role: str) -> None:
    database.set_verifiers({role: "one"}, dry_run=True)
    with psycopg.connect(postgresql) as connection:
        assert connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (role,)).fetchone() == (None,)


@pytest.mark.usefixtures("logins")
def test_a_role_that_is_not_there() -> None:
    with pytest.raises(Refused, match="expected the role nobody_here in PostgreSQL; found none"):
        database.set_verifiers({"nobody_here": "x"})


@pytest.mark.usefixtures("logins")
def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "ADMINISTRATION", "host=/nowhere")
    for change in (lambda: database.set_verifiers({"inbox_app": "x"}), lambda: database.expire("inbox_app")):
        with pytest.raises(Refused, match="expected PostgreSQL on this host"):
            change()


@pytest.mark.parametrize("stored", [None, "", "md5abc", "SCRAM-SHA-256$x", "SCRAM-SHA-256$4096:!$a:b"])
def test_other_stored_passwords_do_not_match(stored: str | None) -> None:
    assert not database.matches("x", stored)


def test_one_migration_at_a_time(postgresql: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_TIMEOUT_SECONDS", 0.2)
    database.set_verifiers({role: "p"})
    url = f"{postgresql} user={role}"
    with database.migration_lock(url, "p"):
        with pytest.raises(Refused, match="another host is migrating"), database.migration_lock(url, "p"):
            pass
        monkeypatch.setattr(database, "LOCK_TIMEOUT_SECONDS", 10)
        entered = threading.Event()

        def wait() -> None:
            with database.migration_lock(url, "p"):
                entered.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not entered.wait(0.3)
        # The migration that holds it may build an index, which waits for the statements of everyone.
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '5s'")
            connection.execute("CREATE TABLE indexed (x int)")
            connection.execute("CREATE INDEX CONCURRENTLY ON indexed (x)")
            connection.execute("DROP TABLE indexed")
    waiting.join(5)
    assert entered.is_set()


def test_a_refused_password_is_not_repeated(postgresql: str, role: str) -> None:
    database.set_verifiers({role: "p"})
    with (
        pytest.raises(Refused, match="expected the database to let the migration in") as caught,
        database.migration_lock(f"{postgresql} user={role}", "hunter2"),
    ):
        pass
    assert "hunter2" not in str(caught.value)


def test_the_url_of_the_migration() -> None:
    assert database.migration_url(HERE) == "postgresql://inbox_migrate@%2Fvar%2Frun%2Fpostgresql/inbox"
    assert database.migration_url(THERE) == "postgresql://m@db:5433/inbox?sslmode=require"
