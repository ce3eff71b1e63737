"""Migrations as another role, without the application's secrets, and in step with its code."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from cluster import Cluster
from conftest import APP, migrate, provision

VERSION = "SELECT string_agg(version_num, ' ') FROM alembic_version"
INDEX = "event_type_xid_id_idx"
VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('event_type_xid_id_idx')"
INSERT = "INSERT INTO event (idempotency_key, fingerprint, type, payload, size) VALUES ('{}', '', {}, '1', 1)"
# What the index by type cannot hold; the API accepts 200 characters.
TOO_LONG = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) AS i)"


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


@pytest.fixture(scope="module")
def at_the_first(cluster: Cluster) -> Callable[[str], None]:
    """Give what makes a database at the first migration."""
    provision(cluster, "first")
    done = migrate(cluster, "first", "upgrade", "0001")
    assert done.returncode == 0, done.stdout

    def copy(database: str) -> None:
        cluster.admin(
            f"CREATE DATABASE {database} TEMPLATE first OWNER inbox_owner",
            f"ALTER DATABASE {database} SET forge.environment = 'production'",
        )

    return copy


def test_the_index_by_type_is_built_while_events_are_written(
    cluster: Cluster, at_the_first: Callable[[str], None]
) -> None:
    """It waits longer than LOCK_TIMEOUT_S for a transaction, and nobody waits for it."""
    at_the_first("busy")

    async def write_meanwhile() -> None:
        async with cluster.connect("busy") as first, cluster.connect("busy") as second:
            transaction = first.transaction()
            await transaction.start()
            await first.execute(INSERT.format("k1", "'t'"))
            with ThreadPoolExecutor() as threads:
                done = threads.submit(migrate, cluster, "busy")
                try:
                    async with asyncio.timeout(20):
                        while await second.fetchval(VALID) is None:  # noqa: ASYNC110 - another process makes it
                            await asyncio.sleep(0.05)
                    await second.execute("SET statement_timeout = '2s'")
                    await second.execute(INSERT.format("k2", "'t'"))
                    await asyncio.sleep(5.5)
                    assert not done.done()
                finally:
                    await transaction.commit()
            assert done.result().returncode == 0, done.result().stdout

    asyncio.run(write_meanwhile())
    assert cluster.admin(VALID, database="busy")


def test_a_build_that_failed_names_its_repair_and_works_the_next_time(
    cluster: Cluster, at_the_first: Callable[[str], None]
) -> None:
    at_the_first("broken")
    cluster.admin(INSERT.format("long", TOO_LONG), database="broken")
    done = migrate(cluster, "broken")
    assert done.returncode == 1
    assert "migration 0002 failed and cannot be rolled back" in done.stdout
    assert f"this undoes what it did: DROP INDEX CONCURRENTLY IF EXISTS {INDEX}" in done.stdout
    assert cluster.admin(VERSION, database="broken") == "0001"
    assert cluster.admin(VALID, database="broken") is False

    cluster.admin("TRUNCATE event", database="broken")
    done = migrate(cluster, "broken")
    assert done.returncode == 0, done.stdout
    assert cluster.admin(VERSION, database="broken") == "0002"
    assert cluster.admin(VALID, database="broken")


def test_what_was_not_transactional_is_kept_when_a_later_migration_fails(cluster: Cluster, tmp_path: Path) -> None:
    """The later ones, made from the template, leave nothing behind: one transaction for all of them."""
    for name in ("alembic.ini", "migrations", "src"):
        (shutil.copytree if (APP / name).is_dir() else shutil.copy)(APP / name, tmp_path / name)
    provision(cluster, "in_part")
    for revision, statement in (("9998", "CREATE TABLE later ()"), ("9999", "CREATE TABLE event ()")):
        made = migrate(cluster, "in_part", "revision", "--rev-id", revision, "-m", "later", folder=tmp_path)
        assert made.returncode == 0, made.stderr
        file = tmp_path / f"migrations/versions/{revision}_later.py"
        written = file.read_text()
        assert "\nbackward_compatible: bool = False\n" in written
        assert '\nrepair: str = ""\n' in written
        file.write_text(written.replace("    pass", f'    op.execute("{statement}")', 1))
    done = migrate(cluster, "in_part", folder=tmp_path)
    assert done.returncode == 1
    assert "DuplicateTable" in done.stdout
    assert "the migration failed and was rolled back" in done.stdout
    assert cluster.admin(VERSION, database="in_part") == "0002"
    assert cluster.admin(VALID, database="in_part")
    assert cluster.admin("SELECT to_regclass('later') IS NULL", database="in_part")


def unpack_previous(folder: Path, migration: Path) -> str:
    """Put the release before a migration into `folder`, so that its tests run on the schema of now; return the problem.

    That is the commit before the one that added the migration, or the last one while it is not committed.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=APP, capture_output=True, check=True).stdout  # noqa: S607

    try:
        added = git("log", "--diff-filter=A", "--format=%H^", "--", str(migration)).decode().split()
        archive = git("archive", *(added[:1] or ["HEAD"]), ".")
        subprocess.run(["tar", "--extract", "--directory", str(folder)], input=archive, capture_output=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return (
            f"expected the git history, to take the release before {migration.name} from; found: {said}; "
            "test in a clone that has it: git fetch --unshallow (in CI: fetch-depth: 0)"
        )
    # As on a host: the migrations of the new release run with its own code.
    (folder / "alembic.ini").write_text((APP / "alembic.ini").read_text().replace("%(here)s", str(APP)))
    # How a server is started and spoken to is no part of the release.
    shutil.copy(APP / "tests/server.py", folder / "tests")
    return ""


@pytest.fixture(scope="module", autouse=True)
def previous_release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], str]]:
    """Run the previous release's tests beside those of this file; give what waits for them and returns what failed."""
    newest = ScriptDirectory.from_config(Config(APP / "alembic.ini")).get_revision("head")
    wanted = any(item.name == test_the_previous_release_works_on_this_schema.__name__ for item in request.session.items)
    if not (wanted and newest.module.backward_compatible):
        # A migration that says so promises the release before it nothing that could be tested: forgectl closes the app
        # for its time, which scenario `release` sees on a host. The skip is called by the one test that is wanted.
        yield lambda: pytest.skip(f"{newest.revision} is not marked as compatible with the release before it")
        return
    folder = tmp_path_factory.mktemp("previous")
    if problem := unpack_previous(folder, Path(newest.path)):
        yield lambda: problem
        return
    # All but the test of how fast streams are, which wants the machine for itself.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_api.py",
        "tests/test_streams.py",
        "-k",
        "not next_poll",
    ]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
    yield lambda: "" if process.wait(300) == 0 else (folder / "out").read_text()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # it stops its servers
        process.wait(30)


def test_nothing_runs_migrations_at_start() -> None:
    for source in (APP / "src").rglob("*.py"):
        assert "import alembic" not in source.read_text()
        assert "from alembic" not in source.read_text()


def test_the_previous_release_works_on_this_schema(previous_release: Callable[[], str]) -> None:
    """What `backward_compatible` of the newest migration says."""
    assert (failed := previous_release()) == "", failed
