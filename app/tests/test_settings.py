"""Settings: what is refused, with which words, and never with the value."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from dotenv import dotenv_values
from pydantic import ValidationError

from conftest import APP, SIGNING_KEY, Environ
from inbox.database import connect_arguments
from inbox.settings import DatabaseSettings, Settings, SettingsInvalid, get_settings, load
from server import Server

GOOD = {
    "FORGE_ENVIRONMENT": "production",
    "FORGE_DATABASE_URL": "postgresql+asyncpg://inbox_app@%2Fvar%2Frun%2Fpostgresql/inbox",
    "FORGE_DATABASE_PASSWORD": "p@ss/w:rd %41",  # pragma: allowlist secret
    "FORGE_SIGNING_KEY": SIGNING_KEY,
}


@pytest.fixture
def in_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Environ], None]:
    monkeypatch.chdir(tmp_path)

    def use(variables: Environ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


def problems(kind: type[DatabaseSettings] = Settings) -> list[str]:
    with pytest.raises(SettingsInvalid) as caught:
        load(kind)
    return caught.value.problems


def test_a_unix_socket_and_any_password_reach_the_driver(in_environment: Callable[[Environ], None]) -> None:
    in_environment(GOOD)
    arguments = connect_arguments(get_settings())
    assert arguments["host"] == "/var/run/postgresql"
    assert arguments["user"] == "inbox_app"
    assert arguments["database"] == "inbox"
    assert arguments["password"] == GOOD["FORGE_DATABASE_PASSWORD"]


def test_settings_are_read_once(in_environment: Callable[[Environ], None]) -> None:
    in_environment(GOOD)
    assert get_settings() is get_settings()


def test_no_representation_shows_a_secret(in_environment: Callable[[Environ], None]) -> None:
    in_environment(GOOD)
    settings = get_settings()
    for secret in (SIGNING_KEY, GOOD["FORGE_DATABASE_PASSWORD"]):
        assert secret not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_pydantics_own_message_shows_no_value(in_environment: Callable[[Environ], None]) -> None:
    in_environment(GOOD | {"FORGE_SIGNING_KEY": "s3cret-but-short", "FORGE_DEBUG": "s3cret"})
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "s3cret" not in str(caught.value)


def test_every_missing_variable_is_named(in_environment: Callable[[Environ], None]) -> None:
    in_environment({})
    assert problems() == [
        "FORGE_ENVIRONMENT: is missing",
        "FORGE_DATABASE_URL: is missing",
        "FORGE_SIGNING_KEY: is missing",
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FORGE_ENVIRONMENT", "prod", "'development', 'staging' or 'production'"),
        ("FORGE_ENVIRONMENT", "", "is empty"),
        ("FORGE_DATABASE_URL", "s3cret-no-url", "valid URL"),
        ("FORGE_DATABASE_URL", "postgresql://s3cret@h/inbox", "scheme has to be postgresql\\+asyncpg"),
        ("FORGE_DATABASE_URL", "postgresql+asyncpg://s3cret@h", "name of the database is missing"),
        ("FORGE_DATABASE_URL", "postgresql+asyncpg://h/s3cret", "user is missing"),
        # pragma: allowlist nextline secret
        ("FORGE_DATABASE_URL", "postgresql+asyncpg://u:s3cret@h/inbox", "FORGE_DATABASE_PASSWORD"),
        ("FORGE_DATABASE_URL", "postgresql+asyncpg://u@a,b/s3cret", "exactly one host"),
        ("FORGE_DATABASE_URL", "postgresql+asyncpg://u@h/inbox?host=/s3cret", "only query parameter"),
        ("FORGE_DATABASE_URL", "postgresql+asyncpg://u@/inbox?host=/s3cret", "URL"),
        ("FORGE_DATABASE_PASSWORD", "", "is empty"),
        ("FORGE_DATABASE_PASSWORD", "changeme-s3cret", "placeholder"),
        ("FORGE_SIGNING_KEY", "s3cret-but-short", "at least 32 characters"),
        ("FORGE_SIGNING_KEY", "change-me-s3cret-change-me-s3cret-change-me", "placeholder"),
        ("FORGE_SIGNING_KEY", "x" * 40, "placeholder"),
        ("FORGE_SIGNING_KEY", "   ", "is empty"),
        ("FORGE_DEBUG", "true", "must be off in production"),
        ("FORGE_DEBUG", "s3cret", "valid boolean"),
        ("FORGE_DATABASE_POOL_MAX", "0", "greater than or equal to 1"),
        ("FORGE_DATABASE_POOL_MAX", "51", "less than or equal to 50"),
        ("FORGE_DATABASE_POOL_MAX", "s3cret", "valid integer"),
        ("FORGE_CORS_ORIGINS", "*", "every origin"),
        ("FORGE_CORS_ORIGINS", "https://a.example,https://s3cret.example/path", "every origin"),
        ("FORGE_MAX_BODY_BYTES", "1", "greater than or equal to 1024"),
        ("FORGE_LOG_LEVEL", "s3cret", "'DEBUG', 'INFO'"),
    ],
)
def test_a_bad_value_is_refused_by_name(
    in_environment: Callable[[Environ], None], name: str, value: str, expected: str
) -> None:
    in_environment(GOOD | {name: value})
    [problem] = problems()
    assert problem.startswith(f"{name}: ")
    assert re.search(expected, problem)
    assert "s3cret" not in problem
    assert GOOD["FORGE_DATABASE_PASSWORD"] not in problem


def test_outside_development_a_password_is_required(
    in_environment: Callable[[Environ], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_environment(GOOD)
    monkeypatch.delenv("FORGE_DATABASE_PASSWORD")
    assert problems() == ["FORGE_DATABASE_PASSWORD: is missing, and outside development it is required"]


def test_the_two_secrets_differ(in_environment: Callable[[Environ], None]) -> None:
    in_environment(GOOD | {"FORGE_DATABASE_PASSWORD": SIGNING_KEY})
    [problem] = problems()
    assert problem.startswith("FORGE_SIGNING_KEY: ")


def test_a_misspelt_variable_is_reported_with_the_nearest_name(in_environment: Callable[[Environ], None]) -> None:
    in_environment(GOOD | {"FORGE_DATABSE_POOL_MAX": "s3cret"})
    assert problems() == ["FORGE_DATABSE_POOL_MAX: no such setting; the nearest name is FORGE_DATABASE_POOL_MAX"]


def test_all_faults_are_reported_at_once(in_environment: Callable[[Environ], None]) -> None:
    in_environment(GOOD | {"FORGE_SINGING_KEY": "x", "FORGE_DATABASE_POOL_MAX": "many", "FORGE_LOG_LEVEL": ""})
    assert [problem.split(":")[0] for problem in problems()] == [
        "FORGE_SINGING_KEY",
        "FORGE_LOG_LEVEL",
        "FORGE_DATABASE_POOL_MAX",
    ]


def test_a_migration_needs_no_secret_of_the_application(
    in_environment: Callable[[Environ], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_environment(GOOD | {"FORGE_DATABASE_POOL_MAX": "5"})
    monkeypatch.delenv("FORGE_SIGNING_KEY")
    assert load(DatabaseSettings).environment == "production"


def test_env_file_is_for_development(in_environment: Callable[[Environ], None]) -> None:
    Path(".env").unlink(missing_ok=True)
    in_environment({})
    example = APP / ".env.example"
    Path(".env").write_text(example.read_text())
    settings = load(Settings)
    assert settings.environment == "development"
    in_environment({"FORGE_ENVIRONMENT": "staging"})
    assert "FORGE_DATABASE_URL: is missing" in problems()


def test_env_file_cannot_claim_another_environment(in_environment: Callable[[Environ], None]) -> None:
    in_environment({})
    Path(".env").write_text("".join(f"{name}='{value}'\n" for name, value in GOOD.items() if "KEY" not in name))
    in_environment({"FORGE_SIGNING_KEY": SIGNING_KEY})
    [problem] = problems()
    assert problem.startswith("FORGE_ENVIRONMENT: .env is for development")


def test_env_file_is_checked_for_typos(in_environment: Callable[[Environ], None]) -> None:
    in_environment({})
    Path(".env").write_text((APP / ".env.example").read_text() + "FORGE_DEBUGG=1\n")
    assert problems() == ["FORGE_DEBUGG: no such setting; the nearest name is FORGE_DEBUG"]


def test_the_example_names_every_setting() -> None:
    named = set(dotenv_values(APP / ".env.example"))
    assert named == {f"FORGE_{field.upper()}" for field in Settings.model_fields}


def test_the_readme_names_every_setting() -> None:
    documented = set(re.findall(r"^\| `(FORGE_[A-Z_]+)`", (APP / "README.md").read_text(), re.MULTILINE))
    assert documented == {f"FORGE_{field.upper()}" for field in Settings.model_fields}


def test_a_server_stops_at_once_and_says_why() -> None:
    environ = GOOD | {"FORGE_SIGNING_KEY": "s3cret-but-short", "FORGE_DATABASE_POOL_MAX": "s3cret"}
    with Server(environ, boots=False) as server:
        assert server.wait() == 3
        assert [line["message"].rpartition(", ")[0] for line in server.logged(level="CRITICAL")] == [
            "invalid setting: FORGE_SIGNING_KEY: Value should have at least 32 characters",
            "invalid setting: FORGE_DATABASE_POOL_MAX: Input should be a valid integer",
        ]
        assert "s3cret" not in server.output()
