"""Migrations as another role, without the application's secrets, and in step with its code."""

import asyncpg
import pytest

from cluster import Cluster
from conftest import APP, migrate, provision


def test_objects_belong_to_the_owner_and_the_application_cannot_change_them(cluster: Cluster, migrated: str) -> None:
    owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'event'"
    assert cluster.admin(owner, database=migrated) == "inbox_owner"
    for forbidden in ("ALTER TABLE event ADD x int", "DROP TABLE event", "CREATE TABLE x ()"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            cluster.admin("SET ROLE inbox_app", forbidden, database=migrated)


def test_in_a_plain_development_database_it_fits_the_code_and_can_be_undone(cluster: Cluster) -> None:
    cluster.admin("CREATE ROLE developer LOGIN PASSWORD 'change-me'", "CREATE DATABASE plain OWNER developer")
    for step, tables in ((("upgrade", "head"), 2), (("check",), 2), (("downgrade", "base"), 1)):
        done = migrate(
            cluster,
            "plain",
            *step,
            FORGE_ENVIRONMENT="development",
            FORGE_DATABASE_URL=f"postgresql+asyncpg://developer@127.0.0.1:{cluster.port}/plain",
            FORGE_DATABASE_PASSWORD="change-me",  # noqa: S106 - a placeholder  # pragma: allowlist secret
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert cluster.admin("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", database="plain") == tables


def test_another_environments_database_is_not_migrated(cluster: Cluster) -> None:
    provision(cluster, "other_environment", "staging")
    done = migrate(cluster, "other_environment")
    assert done.returncode == 1
    assert "is marked 'staging'" in done.stdout
    assert "Traceback" not in done.stderr
    assert cluster.admin("SELECT to_regclass('alembic_version') IS NULL", database="other_environment")


def test_a_wrong_password_is_named_and_not_shown(cluster: Cluster, migrated: str) -> None:
    done = migrate(cluster, migrated, FORGE_DATABASE_PASSWORD="s3cret-and-wrong")  # noqa: S106 - wrong
    assert done.returncode == 1
    assert "InvalidPasswordError" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr


def test_a_failed_migration_leaves_the_schema_as_it_was(cluster: Cluster) -> None:
    provision(cluster, "in_the_way")
    # The last step of the first migration meets this name.
    cluster.admin("SET ROLE inbox_owner", "CREATE TABLE event_xid_id_idx ()", database="in_the_way")
    done = migrate(cluster, "in_the_way")
    assert done.returncode == 1
    assert "rolled back" in done.stdout
    assert "DuplicateTable" in done.stdout
    assert cluster.admin("SELECT to_regclass('event') IS NULL", database="in_the_way")


def test_nothing_runs_migrations_at_start() -> None:
    for source in (APP / "src").rglob("*.py"):
        assert "import alembic" not in source.read_text()
        assert "from alembic" not in source.read_text()
