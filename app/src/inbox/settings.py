"""Settings of the process: read once from the environment, checked before anything starts.

A message of this module names variables and never repeats a value.
"""

import difflib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import unquote

from dotenv import dotenv_values
from pydantic import Field, PostgresDsn, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "FORGE_"
ENV_FILE = Path(".env")
_PLACEHOLDER = re.compile(
    r"change[-_ ]?(me|this)|replace[-_ ]?(me|this)|placeholder|insert[-_ ]?here|todo", re.IGNORECASE
)
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9A-Fa-f:]+\](:[0-9]{1,5})?")

Environment = Literal["development", "staging", "production"]


class SettingsInvalid(Exception):
    """The environment does not describe a valid configuration; `problems` has one line for each fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class DatabaseSettings(BaseSettings):
    """What a process needs to reach the database: all that a migration is given."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, hide_input_in_errors=True)

    environment: Environment
    """Compared with the marker `forge.environment` of the database."""
    database_url: PostgresDsn = Field(repr=False)
    """`postgresql+asyncpg://USER@HOST/NAME`; a folder of unix sockets goes percent-encoded into the host."""
    database_password: SecretStr | None = Field(default=None, min_length=1)
    """Password of the URL's user; required outside development."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("database_url")
    @classmethod
    def _database_url_is_usable(cls, url: PostgresDsn) -> PostgresDsn:
        if url.scheme != "postgresql+asyncpg":
            raise ValueError("the scheme has to be postgresql+asyncpg")
        if len(url.hosts()) != 1:
            raise ValueError("exactly one host is expected")
        if not unquote((url.path or "").removeprefix("/")):
            raise ValueError("the name of the database is missing: it is the path of the URL")
        if not url.hosts()[0]["username"]:
            raise ValueError("the user is missing: it stands before the @")
        if url.hosts()[0]["password"]:
            raise ValueError("the URL must not carry a password: it belongs in FORGE_DATABASE_PASSWORD")
        if set(dict(url.query_params())) - {"ssl"}:
            raise ValueError("the only query parameter that is understood is ssl")
        return url

    @model_validator(mode="after")
    def _database_password_is_real(self) -> Self:
        if self.environment == "development":
            return self
        if self.database_password is None:
            raise ValueError("FORGE_DATABASE_PASSWORD: is missing, and outside development it is required")
        _refuse_placeholder("FORGE_DATABASE_PASSWORD", self.database_password)
        return self


class Settings(DatabaseSettings):
    """Everything the application reads from its environment."""

    signing_key: SecretStr = Field(min_length=32)
    """Signs the cursors that clients hold; changing it invalidates them."""
    debug: bool = False
    """Logs every SQL statement, without its parameters."""
    database_pool_max: int = Field(default=5, ge=1, le=50)
    """Pooled connections of one worker; it holds one more for LISTEN."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins that browsers may call from, separated by commas."""
    max_body_bytes: int = Field(default=1_048_576, ge=1_024, le=67_108_864)
    """Largest request body, in bytes."""

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:  # noqa: ANN401 - a validator sees what it is given
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_explicit(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_ORIGIN.fullmatch(origin) for origin in origins):
            raise ValueError("every origin has to be https://HOST or https://HOST:PORT, without a path or wildcard")
        return origins

    @model_validator(mode="after")
    def _fit_for_environment(self) -> Self:
        if self.environment == "production" and self.debug:
            raise ValueError("FORGE_DEBUG: must be off in production")
        if self.environment != "development":
            _refuse_placeholder("FORGE_SIGNING_KEY", self.signing_key)
            if (
                self.database_password
                and self.database_password.get_secret_value() == self.signing_key.get_secret_value()
            ):
                raise ValueError("FORGE_SIGNING_KEY: must be a secret of its own, not the database password")
        return self


AnySettings = TypeVar("AnySettings", bound=DatabaseSettings)


def load(kind: type[AnySettings]) -> AnySettings:
    """Read settings of `kind` from the environment and, in development alone, from `.env`.

    Raises SettingsInvalid with every fault that was found.
    """
    # In staging and production a forgotten .env in the working folder must not have a say.
    develops = os.environ.get("FORGE_ENVIRONMENT", "development") == "development"
    env_file = ENV_FILE if develops and ENV_FILE.is_file() else None
    given = {**(dotenv_values(env_file) if env_file else {}), **os.environ}
    problems = _misspelt(given) + [
        f"{name}: is empty; give it a value or remove it"
        for name, value in sorted(given.items())
        if name.startswith(PREFIX) and not (value or "").strip()
    ]
    try:
        settings = kind(_env_file=env_file)
    except ValidationError as error:
        named = {problem.split(":")[0] for problem in problems}
        problems += [line for line in _describe(error) if line.split(":")[0] not in named]
    else:
        if env_file and settings.environment != "development":
            problems.append(f"FORGE_ENVIRONMENT: {ENV_FILE} is for development; set this one in the real environment")
        if not problems:
            return settings
    raise SettingsInvalid(problems) from None


@lru_cache
def get_settings() -> Settings:
    """Return the application's settings, read once; override this dependency to replace them."""
    return load(Settings)


def _misspelt(given: dict[str, str | None]) -> list[str]:
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    problems = []
    for name in sorted(given):
        if name.upper().startswith(PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
            problems.append(f"{name}: no such setting; the nearest name is {nearest[0]}")
    return problems


def _describe(error: ValidationError) -> list[str]:
    problems = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        # pydantic counts the characters of a SecretStr as items.
        message = fault["msg"].removeprefix("Value error, ").replace("items after validation", "characters")
        if fault["loc"]:
            what = "is missing" if fault["type"] == "missing" else message
            problems.append(f"{PREFIX}{str(fault['loc'][0]).upper()}: {what}")
        else:
            problems.append(message)
    return problems


def _refuse_placeholder(name: str, secret: SecretStr) -> None:
    value = secret.get_secret_value()
    if _PLACEHOLDER.search(value) or len(set(value)) < 4:
        raise ValueError(f"{name}: is a placeholder; outside development it has to be a random secret")
