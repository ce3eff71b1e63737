"""schema.py against Alembic itself: the same revisions, heads and order, and no code that runs."""

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psycopg
import pytest
from forgectl import schema
from forgectl.errors import Refused

PROJECT = Path(__file__).parents[2]
APP = PROJECT / "app"
PYTHON = PROJECT / ".cache/app-venv/bin/python"

ALEMBIC = """
import json, os, sys
from alembic.config import Config
from alembic.script import ScriptDirectory
script = ScriptDirectory.from_config(Config("alembic.ini", toml_file="pyproject.toml"))
def upgrade(current):
    return [step.revision.revision for step in script._upgrade_revs("heads", tuple(current))]
print(json.dumps([sorted(script.get_heads()), *map(upgrade, json.loads(sys.argv[1]))]))
"""
INI = "[alembic]\nscript_location = %(here)s/migrations\n"


def ask_alembic(source: Path, *currents: list[str]) -> list[list[str]]:
    """The heads, and what an upgrade would run from each of `currents`, as Alembic has it."""
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", ALEMBIC, json.dumps(currents)],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: list[list[str]] = json.loads(done.stdout)
    return answer


def write(source: Path, files: dict[str, str], ini: str = INI) -> Path:
    (source / "alembic.ini").write_text(ini)
    for name, text in files.items():
        path = source / "migrations/versions" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return source


def ids(found: Iterable[schema.Revision]) -> list[str]:
    return [revision.id for revision in found]


def one(name: str, down: object = None, **more: object) -> str:
    said = {"revision": name, "down_revision": down, **more}
    return "".join(f"{key} = {value!r}\n" for key, value in said.items()) + "def upgrade(): pass\n"


GRAPHS: dict[str, dict[str, str]] = {
    "line": {"1.py": one("c", "b"), "2.py": one("a"), "3.py": one("b", "a")},
    "merge": {
        "1.py": one("root"),
        "2.py": one("left", "root"),
        "3.py": one("right", "root"),
        "4.py": one("right2", "right"),
        "5.py": one("merge", ("left", "right2")),
        "6.py": one("top", "merge"),
    },
    "two heads": {"1.py": one("root"), "2.py": one("x", "root"), "3.py": one("y", "root"), "4.py": one("y2", "y")},
    "branches that depend on each other": {
        "1.py": one("users1", branch_labels="users"),
        "2.py": one("users2", "users1"),
        "3.py": one("orders1", branch_labels=("orders",), depends_on="users"),
        "4.py": one("orders2", "orders1", depends_on=["users2"]),
        "5.py": one("bills1", depends_on="orders2"),
        "6.py": one("bills2", "bills1", depends_on="users"),
    },
}


def test_the_apps_own_migrations_are_those_that_alembic_runs() -> None:
    found = schema.revisions(APP)
    assert [schema.heads(found), ids(schema.pending(found, []))] == ask_alembic(APP, [])
    assert (found["0001"].file, found["0001"].transactional) == ("migrations/versions/0001_events.py", True)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_has_alembics_heads_and_order_from_every_revision(tmp_path: Path, graph: str) -> None:
    found = schema.revisions(write(tmp_path, GRAPHS[graph]))
    currents = [[], *([name] for name in found)]
    ours = [schema.heads(found), *(ids(schema.pending(found, current)) for current in currents)]
    assert ours == ask_alembic(tmp_path, *currents)


@pytest.mark.parametrize(
    ("ini", "toml"),
    [
        ("[alembic]\nscript_location = migrations\n", ""),
        (INI + "version_locations = %(here)s/more:%(here)s/migrations/versions\npath_separator = os\n", ""),
        (INI + "version_locations = more migrations/versions,\n", ""),
        (INI + "recursive_version_locations = true\n", ""),
        ("[alembic]\nsqlalchemy.url = %(unknown)s\n", "[tool.alembic]\nscript_location = '%(here)s/migrations'\n"),
        (
            "[alembic]\n",
            "[tool.alembic]\nscript_location = 'migrations'\nversion_locations = ['more', 'migrations/versions']\n",
        ),
    ],
)
def test_revisions_are_found_where_the_configuration_says(tmp_path: Path, ini: str, toml: str) -> None:
    source = write(
        tmp_path, {"2.py": one("b", "a"), "1.py": one("a"), "in/0.py": one("in", "a"), "__init__.py": "x"}, ini
    )
    (source / "more").mkdir()
    (source / "more/3.py").write_text(one("c", "b"))
    (source / "pyproject.toml").write_text(toml)
    found = schema.revisions(source)
    assert [schema.heads(found), ids(schema.pending(found, []))] == ask_alembic(source, [])


def test_what_a_file_says_of_itself_is_read_and_nothing_of_it_runs(tmp_path: Path) -> None:
    found = schema.revisions(
        write(
            tmp_path,
            {
                "1.py": "revision: str = 'a'\ndown_revision: None = None\n",
                "2.py": """
                    \nimport no_such_module, os\nos.unlink(__file__)\nrevision = 'b'\ndown_revision: str | None = 'a'
backward_compatible: bool = True\nrepair: str = ("DROP INDEX CONCURRENTLY "
    "IF EXISTS i")\ndef upgrade():\n    with op.get_context().autocommit_block():\n        op.execute('')\n""",
            },
        )
    )
    assert [*found.values()] == [
        schema.Revision("a", (), "migrations/versions/1.py", False, True, ""),
        schema.Revision("b", ("a",), "migrations/versions/2.py", True, False, "DROP INDEX CONCURRENTLY IF EXISTS i"),
    ]
    assert (tmp_path / "migrations/versions/2.py").exists()


AUTOCOMMIT = "def upgrade():\n    with context.autocommit_block(): pass\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.py": "revision = 'a'\ndown_revision = (\n"}, "1.py to be Python; found SyntaxError"),
        ({"1.py": "(" * 5000}, "1.py to be Python"),
        ({"1.py": "revision = '\0'\n"}, "1.py to be Python"),
        ({"1.py": "#" * 1024 * 1025}, "at most 1048576 bytes"),
        ({"1.py": "down_revision = None\n"}, "expected revision = ... at the top level of migrations/versions/1.py"),
        ({"1.py": "revision = 'a'\n"}, "expected down_revision = ..."),
        ({"1.py": "revision = name()\ndown_revision = None\n"}, "a literal for revision in .*1.py, line 1; found code"),
        ({"1.py": one("a", 7)}, "down_revision of .*1.py to be None, a string or several; found int"),
        ({"1.py": one("a", backward_compatible="yes")}, "backward_compatible of .* to be True or False"),
        ({"1.py": one("a"), "2.py": one("a", "a")}, "one file of revision a; found .*1.py and .*2.py"),
        ({"1.py": one("a", "gone")}, "the down_revision gone of .*1.py; found no file of it"),
        ({"1.py": one("a", depends_on="gone")}, "one revision for depends_on gone of .*1.py; found none"),
        ({"1.py": one("a"), "2.py": one("b", "c"), "3.py": one("c", "b")}, "the cycle b > c > b"),
        ({"1.py": one("a") + AUTOCOMMIT}, "repair = '...' in .*1.py, which uses autocommit_block"),
        ({"1.py": one("a", repair="") + AUTOCOMMIT}, "repair = '...' in .*1.py, which uses autocommit_block"),
    ],
)
def test_what_alembic_would_not_run_is_refused_with_the_file(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        schema.revisions(write(tmp_path, files))


@pytest.mark.parametrize(
    ("ini", "message"),
    [
        ("[alembic]\n", "script_location in .*; found none"),
        ("script_location", "a readable .*alembic.ini"),
        ("[alembic]\nscript_location = %(there)s\n", "a readable .*alembic.ini"),
        ("[alembic]\nscript_location = inbox:migrations\n", "inbox:migrations/versions .*; found none there"),
        ("[alembic]\nscript_location = ..\n", "../versions .*; found one outside of it"),
    ],
)
def test_a_configuration_that_leads_nowhere_is_refused(tmp_path: Path, ini: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        schema.revisions(write(tmp_path, {"1.py": one("a")}, ini))


def test_a_placeholder_that_nobody_fills_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"1.py": one("a")}, "[alembic]\n")
    (source / "pyproject.toml").write_text("[tool.alembic]\nscript_location = '%(there)s/migrations'\n")
    with pytest.raises(Refused, match=r"a readable .*alembic.ini; found 'there'"):
        schema.revisions(source)


def test_a_file_of_the_host_is_not_read(tmp_path: Path) -> None:
    source = write(tmp_path, {"1.py": one("a")})
    (source / "migrations/versions/2.py").symlink_to("/etc/passwd")
    with pytest.raises(Refused, match=r"2.py in .* to be a file of the release"):
        schema.revisions(source)


def test_a_rollback_crosses_what_the_older_release_lacks(tmp_path: Path) -> None:
    found = schema.revisions(write(tmp_path, GRAPHS["merge"]))
    assert ids(schema.missing_in(found, ["left"])) == ["right", "right2", "merge", "top"]
    assert schema.missing_in(found, ["top"]) == []
    with pytest.raises(Refused, match="newest only in the older"):
        schema.missing_in(found, ["left", "newest"])


def test_a_database_that_is_newer_than_the_release_is_named(tmp_path: Path) -> None:
    found = schema.revisions(write(tmp_path, GRAPHS["line"]))
    with pytest.raises(Refused, match=r"revision of this release \(c\); found d: the database is newer"):
        schema.pending(found, ["d"])


def test_the_database_tells_where_it_is(postgresql: str) -> None:
    with psycopg.connect(postgresql) as connection:
        assert schema.current(connection) == []
        connection.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        assert schema.current(connection) == []
        connection.execute("INSERT INTO alembic_version VALUES ('b'), ('a')")
        assert schema.current(connection) == ["a", "b"]
        connection.execute("CREATE ROLE stranger")
        connection.execute("SET LOCAL ROLE stranger")
        with pytest.raises(Refused, match="permission denied"):
            schema.current(connection)
        connection.rollback()
