"""database.py on a real PostgreSQL."""

import getpass
import threading
from collections.abc import Iterator

import psycopg
import pytest
from forgectl import database
from forgectl.config import Database
from forgectl.errors import Refused

PASSWORDS = ["plain-ascii", "pässwörd Ключ", "soft\u00adhyphen", "ﬁ ligature \u2168", "no\u00a0break", "q\"'$\\\nline"]


@pytest.fixture
def role(postgresql: str) -> Iterator[str]:
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE ROLE inbox_app LOGIN")
        yield "inbox_app"
        connection.execute("DROP ROLE inbox_app")


def set_verifiers(postgresql: str, passwords: dict[str, str], dry_run: bool = False) -> dict[str, str]:
    return database.set_verifiers(passwords, dry_run=dry_run, user=getpass.getuser(), conninfo=postgresql)


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_verifier_is_set_once_and_lets_the_role_in(postgresql: str, role: str, password: str) -> None:
    assert set_verifiers(postgresql, {role: password}, dry_run=True) == {role: "would set"}
    assert set_verifiers(postgresql, {role: password}) == {role: "set"}
    assert set_verifiers(postgresql, {role: password}) == {role: "unchanged"}
    assert set_verifiers(postgresql, {role: password + "x"}, dry_run=True) == {role: "would set"}
    with psycopg.connect(postgresql, user=role, password=password) as connection:
        assert connection.execute("SELECT current_user").fetchone() == (role,)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(postgresql, user=role, password=password + "x")


def test_a_dry_run_sets_nothing(postgresql: str, role: str) -> None:
    set_verifiers(postgresql, {role: "one"}, dry_run=True)
    with psycopg.connect(postgresql) as connection:
        assert connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (role,)).fetchone() == (None,)


def test_a_role_that_is_not_there(postgresql: str) -> None:
    with pytest.raises(Refused, match="expected the role nobody_here in PostgreSQL; found none"):
        set_verifiers(postgresql, {"nobody_here": "x"})


@pytest.mark.parametrize("stored", [None, "", "md5abc", "SCRAM-SHA-256$x", "SCRAM-SHA-256$4096:!$a:b"])
def test_other_stored_passwords_do_not_match(stored: str | None) -> None:
    assert not database.matches("x", stored)


def test_one_migration_at_a_time(postgresql: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_TIMEOUT_SECONDS", 0.2)
    set_verifiers(postgresql, {role: "p"})
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
    set_verifiers(postgresql, {role: "p"})
    with (
        pytest.raises(Refused, match="expected the database to let the migration in") as caught,
        database.migration_lock(f"{postgresql} user={role}", "hunter2"),
    ):
        pass
    assert "hunter2" not in str(caught.value)


def test_the_url_of_the_migration() -> None:
    here = Database(
        placement="local",
        name="inbox",
        app_role="inbox_app",
        migrate_role="inbox_migrate",
        url="postgresql+asyncpg://inbox_app@%2Fvar%2Frun%2Fpostgresql/inbox",
    )
    assert database.migration_url(here) == "postgresql://inbox_migrate@%2Fvar%2Frun%2Fpostgresql/inbox"
    there = Database(
        placement="external",
        name="inbox",
        app_role="a",
        url="postgresql+asyncpg://a@db:5433/inbox",
        migrate_url="postgresql+asyncpg://m@db:5433/inbox?ssl=require",
    )
    assert database.migration_url(there) == "postgresql://m@db:5433/inbox?sslmode=require"
