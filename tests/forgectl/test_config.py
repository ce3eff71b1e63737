"""config.py: what it refuses."""

from pathlib import Path

import pytest
from conftest import describe
from forgectl import config
from forgectl.errors import Refused
from forgectl.layout import Layout


@pytest.mark.parametrize(
    ("was", "becomes", "expected"),
    [
        ("keep_releases = 2", "keep_releases = 1", "keep_releases"),
        ("keep_releases = 2", "keep_relaeses = 2", "keep_relaeses"),
        ('domain = "inbox.example.com"', "", "domain"),
        ('name = "inbox"', 'name = "../etc"', "name"),
        ("count = 2", 'count = "2"', "count"),
        ('address = "https:', 'address = "http:', "address"),
        ("request = 60", "request = 0", "request"),
        ('module = "inbox.main:app"', 'module = "inbox.main"', "module"),
        ('FORGE_ENVIRONMENT = "production"', "FORGE_ENVIRONMENT = 1", "settings"),
        ("[timeouts]", "[timeouts", "line"),
    ],
)
def test_a_wrong_description_is_refused(layout: Layout, was: str, becomes: str, expected: str) -> None:
    assert was in describe()
    layout.description.write_text(describe().replace(was, becomes))
    with pytest.raises(Refused, match=expected) as caught:
        config.load(layout.description)
    assert str(layout.description) in str(caught.value)


def test_an_unknown_app(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="found no such file"):
        config.load(tmp_path / "none.toml")


def test_database_and_migration_are_optional(layout: Layout) -> None:
    found = config.load(layout.description)
    assert (found.database, found.migration) == (None, None)
