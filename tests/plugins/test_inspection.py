"""`forgectl inspect`: what it says of small real apps, and that preflight accepts the entry that it prints."""

from __future__ import annotations

import ast
import io
import json
import sys
import tarfile
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from forge import preflight
from forge.inspection import text
from forge.inspection.draft import SEALED, draft
from forge.inspection.entry import FILL_IN
from forge.inspection.judge import Report, inspect
from forge.problems import Problem
from forge.source_files import SourceError
from sources import HASH

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = """
[project]
name = "shop"
version = "1.2"
requires-python = ">=3.11"
dependencies = ["fastapi>=0.115"]
"""
APP = "from fastapi import FastAPI\n\napp = FastAPI()\n"
# With the pins of the platform's own packages, so that nothing is to be said of it.
LOCK = "".join(
    f"{pin} {HASH}\n" for pin in ("fastapi==0.140.0", "gunicorn==27.0.0", "uvicorn==0.34.0", "uvicorn-worker==0.4.0")
)
UV_LOCK = """
version = 1

[[package]]
name = "shop"
source = { editable = "." }

[[package]]
name = "fastapi"
version = "0.140.0"
wheels = [{ url = "https://example.com/fastapi-0.140.0-py3-none-any.whl", hash = "sha256:00" }]

[[package]]
name = "embit"
version = "1"
sdist = { url = "https://example.com/embit-1.tar.gz", hash = "sha256:00" }
"""
POETRY_LOCK = """
[[package]]
name = "FastAPI"
version = "0.140.0"
files = [{ file = "fastapi-0.140.0-py3-none-any.whl", hash = "sha256:00" }]

[[package]]
name = "embit"
version = "1"
files = [{ file = "embit-1.tar.gz", hash = "sha256:00" }]
"""
GOOD = {"pyproject.toml": MANIFEST, "requirements.txt": LOCK, "shop/__init__.py": "", "shop/main.py": APP}


def project(folder: Path, files: dict[str, str], base: dict[str, str] = GOOD) -> Path:
    """Write files over those of a good app."""
    source = folder / "shop-app"
    for name, content in {**base, **files}.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return source


def inspected(folder: Path, files: dict[str, str], **options: str) -> Report:
    """Inspect a good app with such files."""
    return draft(inspect(project(folder, files), **options))


def main(code: str, **more: str) -> dict[str, str]:
    """Return the module of the app, with code below it."""
    return {"shop/main.py": f"{APP}{code}\n", **more}


def entry(report: Report) -> dict[str, Any]:
    """Return the printed entry, as Ansible reads it."""
    loaded: dict[str, Any] = yaml.safe_load(report.entry_text)["apps"][report.name]
    return loaded


def refused(report: Report, source: str = "vault") -> list[Problem]:
    """Return what preflight says of the printed entry once it is filled in."""
    apps = yaml.safe_load(report.entry_text.replace(FILL_IN, "something"))["apps"]
    given: dict[str, Any] = {
        "root": ROOT,
        "roles": ROOT / "roles",
        "play_roles": [],
        "apps": apps,
        "raw_apps": apps,
        "raw": {},
        "values": {"secrets_source": source},
        "hosts_of": {},
    }
    inventory = preflight.Inventory(**{field.name: given.get(field.name, {}) for field in fields(preflight.Inventory)})
    outcome = preflight.Outcome()
    preflight._entries(inventory, outcome)
    return outcome.problems


def test_a_good_app_has_nothing_to_be_done(tmp_path: Path) -> None:
    report = inspected(tmp_path, {})
    assert (report.will_run, report.problems, report.warnings) == (True, [], [])
    assert report.callable is not None
    assert (report.callable.target, report.callable.kind, report.callable.where) == (
        "shop.main:app",
        "FastAPI",
        "shop/main.py:3",
    )
    assert report.fill_in == ["the name under which clients reach it"]
    assert entry(report) | {"source": ""} == {
        "domain": "shop.example.com",
        "source": "",
        "module": "shop.main:app",
        "settings_prefix": "",
        "health_path": "",
        "ready_path": "",
        "metrics_path": "",
    }


def test_the_reference_app_needs_what_the_example_inventory_gives_it() -> None:
    """Of all that has no default, nothing is missing and nothing is more."""
    report = draft(inspect(ROOT / "app"), source="app")
    example_text = (ROOT / "inventory/example/group_vars/all.yml").read_text()
    # An example has the shape of a role id.
    example = yaml.safe_load(example_text.replace("00000000-0000-0000-0000-000000000000", FILL_IN))["apps"]["inbox"]
    assert report.problems == []
    assert entry(report) == example
    assert report.routes.health is not None
    assert (report.routes.health.path, report.routes.metrics and report.routes.metrics.path) == ("/health", "/metrics")
    assert [route.path for route in report.routes.websockets] == ["/v1/events/ws"]


def test_inspecting_runs_nothing(tmp_path: Path) -> None:
    """Neither the app nor the project's own build."""
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    report = inspected(tmp_path, {"setup.py": trap, "shop/main.py": trap + APP, "conftest.py": trap})
    assert report.callable is not None
    assert not (tmp_path / "ran").exists()
    assert "shop" not in sys.modules


@pytest.mark.parametrize(
    ("files", "target", "kind", "python_path"),
    [
        ({"shop/main.py": APP}, "shop.main:app", "FastAPI", "."),
        ({"shop/main.py": "import fastapi\napi = fastapi.FastAPI()\n"}, "shop.main:api", "FastAPI", "."),
        (
            {"shop/main.py": "from starlette.applications import Starlette\napplication = Starlette(routes=[])\n"},
            "shop.main:application",
            "Starlette",
            ".",
        ),
        ({"shop/main.py": "async def app(scope, receive, send): ...\n"}, "shop.main:app", "plain ASGI", "."),
        (
            {"shop/main.py": "class App:\n    async def __call__(self, scope, receive, send): ...\n\n\napp = App()\n"},
            "shop.main:app",
            "plain ASGI",
            ".",
        ),
        (
            {"shop/main.py": "import asgineer\n@asgineer.to_asgi\nasync def main(request): ...\n"},
            "shop.main:main",
            "asgineer",
            ".",
        ),
        # A factory, alone and with what it makes beside it.
        (
            {"shop/main.py": "from fastapi import FastAPI\ndef make():\n    return FastAPI()\n"},
            "shop.main:make()",
            "FastAPI",
            ".",
        ),
        (
            {
                "shop/factory.py": "import fastapi\ndef create_app():\n    app = fastapi.FastAPI()\n    return app\n",
                "shop/main.py": "from .factory import create_app\napp = create_app()\n",
            },
            "shop.main:app",
            "FastAPI",
            ".",
        ),
        # Something around it, and a class of its own.
        (
            {
                "shop/main.py": "from starlette.middleware.cors import CORSMiddleware\n"
                + APP
                + "app = CORSMiddleware(app, allow_origins=[])\n"
            },
            "shop.main:app",
            "FastAPI",
            ".",
        ),
        (
            {"shop/main.py": "from fastapi import FastAPI\nclass Shop(FastAPI): ...\n\n\nserver = Shop()\n"},
            "shop.main:server",
            "FastAPI",
            ".",
        ),
        (
            {
                "shop/main.py": "import fastapi\nclass Server:\n    def __init__(self):\n        self.app = fastapi."
                "FastAPI()\n\n\napp = Server().app\n"
            },
            "shop.main:app",
            "FastAPI",
            ".",
        ),
        # The whole before what it mounts.
        (
            {
                "shop/main.py": "from fastapi import FastAPI\nfrom shop.admin import app as admin\nserver = FastAPI()\n"
                "server.mount('/admin', admin)\n",
                "shop/admin.py": APP,
            },
            "shop.main:server",
            "FastAPI",
            ".",
        ),
        # What other servers are told, in files beside the code.
        (
            {
                "shop/web.py": "from fastapi import FastAPI\nsite = FastAPI()\n",
                "Dockerfile": 'CMD ["uvicorn", "shop.web:site", "--host", "0.0.0.0"]\n',
            },
            "shop.web:site",
            "FastAPI",
            ".",
        ),
        (
            {
                "shop/factory.py": "from fastapi import FastAPI\ndef build():\n    return FastAPI()\n",
                "Procfile": "web: uvicorn --factory shop.factory:build --port $PORT\n",
            },
            "shop.factory:build()",
            "FastAPI",
            ".",
        ),
        # Layouts.
        (
            {"shop/main.py": "", "src/store/__init__.py": "", "src/store/main.py": APP},
            "store.main:app",
            "FastAPI",
            "src",
        ),
        ({"shop/main.py": "", "main.py": APP}, "main:app", "FastAPI", "."),
        (
            {
                "shop/main.py": "",
                "backend/app/api.py": "",
                "backend/app/main.py": "from app.api import x\n" + APP,
            },
            "app.main:app",
            "FastAPI",
            "backend",
        ),
        # Tests and examples are no apps.
        ({"tests/test_main.py": APP, "examples/demo.py": APP}, "shop.main:app", "FastAPI", "."),
    ],
)
def test_the_callable_is_found(tmp_path: Path, files: dict[str, str], target: str, kind: str, python_path: str) -> None:
    report = inspected(tmp_path, files)
    assert report.callable is not None
    assert (report.callable.target, report.callable.kind, report.python_path) == (target, kind, python_path)
    assert report.problems == []


def test_another_callable_can_be_named(tmp_path: Path) -> None:
    files = main("", **{"shop/other.py": "from fastapi import FastAPI\ndef make(debug=False):\n    return FastAPI()\n"})
    assert entry(inspected(tmp_path, files, module="shop.other:make(True)"))["module"] == "shop.other:make()"
    wrong = inspected(tmp_path, files, module="shop.other:app")
    assert [(problem.where, problem.found) for problem in wrong.problems] == [
        ("apps.shop.module", "no such name; found shop.other:FastAPI, shop.other:make")
    ]


@pytest.mark.parametrize(
    ("files", "found", "do"),
    [
        (
            {"shop/main.py": "from flask import Flask\napp = Flask(__name__)\n"},
            "none in 2 files of Python below .",
            "name it with --module",
        ),
        (
            {"pyproject.toml": MANIFEST.replace(">=3.11", ">=3.14")},
            "requires-python >=3.14",
            "widen it if the app runs there; there is no other Python on the host",
        ),
        ({"pyproject.toml": MANIFEST.replace("fastapi>", "httpx>")}, "httpx is missing", "write it anew with "),
        (
            {"pyproject.toml": MANIFEST.replace("0.115", "1.0"), "requirements.txt": "", "uv.lock": UV_LOCK},
            "fastapi is 0.140.0, declared >=1.0",
            "write it anew with `uv lock`",
        ),
        (
            main("import shop.serve", **{"shop/serve.py": "import uvicorn\nuvicorn.run('shop.main:app')\n"}),
            "uvicorn.run runs when the app is imported",
            'put it below `if __name__ == "__main__":`',
        ),
        (
            main("import os\ndef detach():\n    if os.fork():\n        raise SystemExit\n\n\ndetach()"),
            "os.fork, which forks",
            "take it out: systemd and Gunicorn supervise the workers",
        ),
        (
            main("from prometheus_client import start_http_server\nstart_http_server(9000)"),
            "prometheus_client.start_http_server, which opens a port",
            "mount prometheus_client.make_asgi_app()",
        ),
        (
            main("import os\nos.makedirs('uploads', exist_ok=True)"),
            "os.makedirs('uploads', exist_ok=True)",
            "take the folder from a setting, and set that to /var/lib/shop",
        ),
        (
            main(
                "import pathlib\n@app.post('/x')\ndef save():\n    (pathlib.Path(__file__).parent / 'x').write_text('')"
            ),
            "(pathlib.Path(__file__).parent / 'x').write_text('')",
            "set that to /var/lib/shop",
        ),
        (
            main("async def save():\n    with open(f'data/{1}', mode='wb') as file:\n        file.write(b'')"),
            "open(f'data/{1}', mode='wb')",
            "set that to /var/lib/shop",
        ),
        (main("import logging\nlogging.FileHandler('shop.log')"), "logging.FileHandler('shop.log')", "/var/lib/shop"),
    ],
)
def test_what_has_to_be_done_first(tmp_path: Path, files: dict[str, str], found: str, do: str) -> None:
    """Each alone, with where it is."""
    report = inspected(tmp_path, files)
    assert not report.will_run
    assert len(report.problems) == 1
    assert found in report.problems[0].found
    assert do in report.problems[0].do
    if files.get("shop/main.py", "").startswith(APP):
        assert report.problems[0].where.startswith(("shop/main.py:", "shop/serve.py:"))


@pytest.mark.parametrize(
    "code",
    [
        "import uvicorn\nif __name__ == '__main__':\n    uvicorn.run(app)",
        "import uvicorn\ndef serve():\n    uvicorn.run(app)",
        "import os\ndef detach():\n    os.fork()",
        "import os\nos.makedirs('/var/lib/shop/x', exist_ok=True)",
        "import os\nos.makedirs(os.environ['DATA_DIR'], exist_ok=True)",
        "import os\nos.makedirs('shop', exist_ok=True)",  # The release has it.
        "async def load():\n    with open('shop/data.json') as file:\n        return file.read()",
        "import tempfile, pathlib\n(pathlib.Path(tempfile.mkdtemp()) / 'x').write_text('')",
        "import time\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    time.sleep(1)",
        "import time, asyncio\nasync def work():\n    await asyncio.to_thread(time.sleep, 1)",
        "import time\nasync def work():\n    def inner():\n        time.sleep(1)\n    return inner",
        "import sqlite3\nasync def work():\n    return sqlite3.connect(':memory:')",
    ],
)
def test_what_is_no_harm(tmp_path: Path, code: str) -> None:
    report = inspected(tmp_path, main(code))
    assert report.problems == []
    assert [warning for warning in report.warnings if "os.fork" not in warning.found] == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (main("import time\nasync def work():\n    time.sleep(1)"), "time.sleep in an async function"),
        (main("import requests as r\nasync def work():\n    r.get('x')"), "requests.get in an async function"),
        (
            main("import requests\nasync def work():\n    session = requests.Session()\n    session.post('x')"),
            "requests.Session().post in an async function",
        ),
        (main("from subprocess import run\nasync def work():\n    run(['x'])"), "subprocess.run in an async function"),
        (main("from urllib.request import urlopen\nurlopen('x')"), "urllib.request.urlopen when the app is imported"),
        (
            main(
                "from shop.data import load\nload()",
                **{"shop/data.py": "import psycopg2\ndef load():\n    psycopg2.connect()\n"},
            ),
            "psycopg2.connect when the app is imported",
        ),
        (
            main(
                "import shop.serve",
                **{"shop/serve.py": "import os, uvicorn\nif os.getenv('DEV'):\n    uvicorn.run('shop.main:app')\n"},
            ),
            "uvicorn.run runs when the app is imported",
        ),
        (
            main("from apscheduler.schedulers.asyncio import AsyncIOScheduler\njobs = AsyncIOScheduler()"),
            "apscheduler.schedulers.asyncio.AsyncIOScheduler, which runs in each worker of both slots",
        ),
        (main("import multiprocessing\nmultiprocessing.Process(target=print).start()"), "multiprocessing.Process"),
        (main("def save():\n    open('x.txt', 'w')"), "open('x.txt', 'w')"),
        (main("URL = 'sqlite:///./shop.db'"), "sqlite:///./shop.db, fixed in the code"),
        ({"requirements.txt": LOCK.replace(HASH, "")}, "versions alone"),
        ({"requirements.txt": LOCK.replace(HASH, "").replace("==0.140.0", ">=0.140")}, "not pinned: fastapi"),
        ({"requirements.txt": "\n".join(LOCK.splitlines()[:0])}, "only ranges of versions"),
        ({"requirements.txt": LOCK + f"psycopg2==2.9.10 {HASH}\n"}, "psycopg2, which has none on the index"),
    ],
)
def test_what_is_good_to_know(tmp_path: Path, files: dict[str, str], found: str) -> None:
    """It runs all the same."""
    if files.get("requirements.txt") == "":
        files = {**files, "requirements.txt": "# nothing\n"}
    report = inspected(tmp_path, files)
    assert report.will_run, report.problems
    assert found in "\n".join(warning.found for warning in report.warnings)


def test_what_only_a_script_imports_is_none_of_the_apps(tmp_path: Path) -> None:
    """Only modules that the app reaches are judged."""
    files = {
        "shop/cli.py": "import os, time\nos.fork()\nKEY = os.environ['CLI_KEY']\n",
        "setup.py": "import os\nos.fork()\n",
    }
    report = inspected(tmp_path, files)
    assert (report.problems, report.warnings, report.settings) == ([], [], [])


SETTINGS = """
from typing import Annotated, ClassVar
from pydantic import AliasChoices, BaseModel, Field, PostgresDsn, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "SHOP_"


class Mail(BaseModel):
    host: str
    port: int = 25
    password: SecretStr


class Base(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__")

    region: str


class Settings(Base):
    kinds: ClassVar[int] = 1
    database_url: PostgresDsn
    signing_key: SecretStr = Field(min_length=32)
    api_token: str = ""
    admin_password: str = "changeme"  # pragma: allowlist secret
    retries: int = 3
    optional: str | None = None
    renamed: str = Field(validation_alias="OTHER_NAME")
    either: Annotated[str, Field(validation_alias=AliasChoices("FIRST", "SECOND"))]
    mail: Mail
    name: str = Field(default="shop")
    tags: list[str] = Field(default_factory=list)
    sentinel: int = Field(...)
"""


def test_settings_classes_are_read(tmp_path: Path) -> None:
    """Prefix, inheritance, aliases, nested models; what is required and what is secret."""
    report = inspected(tmp_path, main("from shop.settings import Settings", **{"shop/settings.py": SETTINGS}))
    assert {one.prefix for one in report.classes} == {"SHOP_"}
    required = {one.name: one.secret for one in report.settings if one.required}
    assert required == {
        "SHOP_REGION": False,
        "SHOP_DATABASE_URL": False,
        "SHOP_SIGNING_KEY": True,
        "OTHER_NAME": False,
        "FIRST": False,
        "SHOP_MAIL__HOST": False,
        "SHOP_MAIL__PASSWORD": True,
        "SHOP_SENTINEL": False,
    }
    optional = {one.name: one.default for one in report.settings if not one.required}
    assert optional == {
        "SHOP_API_TOKEN": "",
        "SHOP_ADMIN_PASSWORD": "changeme",  # pragma: allowlist secret
        "SHOP_RETRIES": 3,
        "SHOP_OPTIONAL": None,
        "SHOP_NAME": "shop",
        "SHOP_TAGS": None,
        "SHOP_MAIL__PORT": 25,
    }
    found = entry(report)
    assert set(found["settings"]) == {"SHOP_REGION", "OTHER_NAME", "FIRST", "SHOP_MAIL__HOST", "SHOP_SENTINEL"}
    # A default that is in the source is known to all; what is empty by default may stay so.
    assert set(found["secrets"]["variables"]) == {
        "SHOP_SIGNING_KEY",
        "SHOP_MAIL__PASSWORD",
        "SHOP_ADMIN_PASSWORD",
        "SHOP_DATABASE_URL",
    }
    assert "        # SHOP_API_TOKEN: shop_api_token" in report.entry_text
    assert "changeme" not in report.entry_text
    assert "changeme" not in json.dumps(report.document())
    assert refused(report) == []


@pytest.mark.parametrize(
    ("code", "required", "optional"),
    [
        ("import os\nX = os.environ['SHOP_X']", ["SHOP_X"], []),
        ("from os import environ\nX = environ['SHOP_X']", ["SHOP_X"], []),
        ("import os\nX = os.environ.get('SHOP_X')\nY = os.getenv('SHOP_Y', '1')", [], ["SHOP_X", "SHOP_Y"]),
        ("import os\nif 'SHOP_X' in os.environ:\n    X = os.environ['SHOP_X']", [], ["SHOP_X"]),
        ("import os\ntry:\n    X = os.environ['SHOP_X']\nexcept KeyError:\n    X = ''", [], ["SHOP_X"]),
        ("import os\nos.environ['SHOP_X'] = '1'\nHOME = os.environ['HOME']", [], []),
        (
            "from starlette.config import Config\nc = Config('.env')\nX = c('SHOP_X')\nY = c('SHOP_Y', default='')",
            ["SHOP_X"],
            ["SHOP_Y"],
        ),
        ("from decouple import config\nX = config('SHOP_X')\nY = config('SHOP_Y', default=1)", ["SHOP_X"], ["SHOP_Y"]),
        (
            "from environs import Env\nenv = Env()\nX = env.str('SHOP_X')\nY = env.int('SHOP_Y', 1)",
            ["SHOP_X"],
            ["SHOP_Y"],
        ),
    ],
)
def test_settings_without_a_class_are_read(tmp_path: Path, code: str, required: list[str], optional: list[str]) -> None:
    report = inspected(tmp_path, main(code))
    assert [one.name for one in report.settings if one.required] == required
    assert [one.name for one in report.settings if not one.required] == optional


ROUTES = """
from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import make_asgi_app
from shop.probes import router as probes
from shop.settings import settings

app = FastAPI()
api = APIRouter(prefix="/v1")
api.include_router(probes, prefix="/system")
app.include_router(api, prefix=settings.API_PREFIX)
app.mount("/static", StaticFiles(directory="shop/static"), name="static")
app.mount("/internal/metrics", make_asgi_app())


@api.get("/{name}/health")
def not_this(name: str): ...


@app.websocket("/ws")
async def follow(): ...


@app.get("/export")
def export():
    return StreamingResponse([])
"""


def test_routes_are_put_together(tmp_path: Path) -> None:
    """From prefixes of routers, of what includes them, and from settings."""
    probes = (
        "from fastapi import APIRouter\nrouter = APIRouter()\n@router.get('/healthz')\ndef live(): ...\n"
        "@router.get('/readyz')\ndef ready(): ...\n@router.post('/ready')\ndef other(): ...\n"
    )
    settings = (
        "from pydantic_settings import BaseSettings\nclass Settings(BaseSettings):\n    API_PREFIX: str = '/api'\n"
        "settings = Settings()\n"
    )
    report = inspected(tmp_path, {"shop/main.py": ROUTES, "shop/probes.py": probes, "shop/settings.py": settings})
    found = entry(report)
    assert found["health_path"] == "/api/v1/system/healthz"
    assert found["ready_path"] == "/api/v1/system/readyz"
    assert found["metrics_path"] == "/internal/metrics"
    assert [route.path for route in report.routes.websockets] == ["/ws"]
    assert report.routes.streams == ["shop/main.py:27"]
    # Nginx would serve them for a year, so it is only suggested.
    assert "static" not in found
    assert "# static: {/static/: shop/static}" in report.entry_text


def test_usual_paths_need_no_line(tmp_path: Path) -> None:
    code = "".join(f"@app.get('/{name}')\ndef {name}(): ...\n" for name in ("health", "ready", "metrics"))
    assert not {"health_path", "ready_path", "metrics_path"} & set(entry(inspected(tmp_path, main(code))))


@pytest.mark.parametrize("name", ["health", "ready", "status"])
def test_the_one_path_decides_over_releases(tmp_path: Path, name: str) -> None:
    """It says more there than as liveness, and may not be both."""
    found = entry(inspected(tmp_path, main(f"@app.get('/{name}')\ndef {name}(): ...\n")))
    assert found["health_path"] == ""
    assert found.get("ready_path", "/ready") == f"/{name}"


def with_dependencies(*names: str) -> dict[str, str]:
    """Return a manifest and a lock with such packages."""
    lock = LOCK + "".join(f"{name}==1.0 {HASH}\n" for name in names)
    manifest = MANIFEST.replace('"fastapi>=0.115"', ", ".join(f'"{name}"' for name in ("fastapi", *names)))
    return {"pyproject.toml": manifest, "requirements.txt": lock}


def test_a_database_and_its_migrations(tmp_path: Path) -> None:
    """The URL's variable and form, the password for what reads it by itself, and the command where it is unusual."""
    files = main(
        "from shop.settings import Settings",
        **with_dependencies("sqlalchemy", "psycopg", "alembic"),
        **{
            "shop/settings.py": "from pydantic_settings import BaseSettings\nclass Settings(BaseSettings):\n"
            "    database_url: str\n    other_url: str\n",
            "shop/db/alembic.ini": "",
            "shop/db/versions/env.py": "",
        },
    )
    report = inspected(tmp_path, files)
    found = entry(report)
    assert found["settings"] == {"OTHER_URL": FILL_IN}
    assert found["secrets"]["variables"] == {"PGPASSWORD": "database_password"}
    assert found["database"] == {
        "url_variable": "DATABASE_URL",
        "url_format": "postgresql+psycopg://{user}:{password}@/{name}?host=/var/run/postgresql",
        "migration": {
            "command": ["alembic", "-c", "shop/db/alembic.ini", "upgrade", "head"],
            "role_id": FILL_IN,
            "variables": {"PGPASSWORD": "database_password"},
        },
    }
    assert report.keys == {"database_password": "PGPASSWORD"}  # pragma: allowlist secret
    assert refused(report) == []


def test_a_database_url_in_parts(tmp_path: Path) -> None:
    """Host, user and name are those of the database on the host."""
    code = "import os\n" + "\n".join(
        f"{part} = os.environ['POSTGRES_{part}']" for part in ("HOST", "USER", "PASSWORD", "DB")
    )
    report = inspected(tmp_path, main(code, **with_dependencies("asyncpg")))
    found = entry(report)
    assert found["settings"] == {"POSTGRES_HOST": "/var/run/postgresql", "POSTGRES_DB": "shop"}
    # Rotation changes both.
    assert found["secrets"]["variables"] == {"POSTGRES_PASSWORD": "database_password", "POSTGRES_USER": "database_user"}
    assert refused(report) == []


def test_sqlite_goes_into_the_apps_own_folder(tmp_path: Path) -> None:
    code = (
        "import os\nURL = os.getenv('DATABASE_URL', 'sqlite+aiosqlite:///./shop.db')\n"
        "DIR = os.getenv('UPLOAD_DIR', './up')"
    )
    report = inspected(tmp_path, main(code, **with_dependencies("aiosqlite")))
    assert (report.problems, report.warnings) == ([], [])
    assert "database" not in entry(report)
    assert entry(report)["settings"] == {
        "DATABASE_URL": "sqlite+aiosqlite:////var/lib/shop/shop.db",
        "UPLOAD_DIR": "/var/lib/shop/up",
    }


def test_tables_made_at_start_are_no_migration(tmp_path: Path) -> None:
    code = "async def start(connection, Base):\n    await connection.run_sync(Base.metadata.create_all)"
    report = inspected(tmp_path, main(code, **with_dependencies("asyncpg", "sqlalchemy")))
    assert "metadata.create_all" in report.warnings[-1].found
    assert inspected(tmp_path, main(code, **with_dependencies("aiosqlite", "sqlalchemy"))).warnings == []


@pytest.mark.parametrize(
    ("code", "commands"),
    [
        (
            "from celery import Celery\ncelery = Celery('shop')",
            {"worker": ["celery", "-A", "shop.tasks:celery", "worker"]},
        ),
        (
            "from celery import Celery\nc = Celery('shop')\nc.conf.beat_schedule = {}",
            {"worker": ["celery", "-A", "shop.tasks:c", "worker"], "beat": ["celery", "-A", "shop.tasks:c", "beat"]},
        ),
        ("class WorkerSettings:\n    functions = []", {"worker": ["arq", "shop.tasks.WorkerSettings"]}),
        ("import dramatiq\n@dramatiq.actor\ndef send(): ...", {"worker": ["dramatiq", "shop.tasks"]}),
    ],
)
def test_background_workers(tmp_path: Path, code: str, commands: dict[str, list[str]]) -> None:
    """Also in modules that the app itself does not import."""
    report = inspected(tmp_path, {"shop/tasks.py": f"{code}\n"})
    assert {name: one["command"] for name, one in entry(report)["commands"].items()} == commands
    assert refused(report) == []


def test_servers_that_are_elsewhere_are_named(tmp_path: Path) -> None:
    report = inspected(tmp_path, with_dependencies("redis", "aiomysql"))
    assert [note.partition(",")[0] for note in report.notes] == ["aiomysql speaks to MySQL", "redis speaks to Redis"]


@pytest.mark.parametrize(
    ("files", "file", "hashed", "packages"),
    [
        ({"requirements.txt": LOCK, "uv.lock": UV_LOCK}, "requirements.txt", True, 4),
        ({"requirements.txt": "fastapi==0.140.0\n", "uv.lock": UV_LOCK}, "uv.lock", True, 2),
        ({"poetry.lock": POETRY_LOCK}, "poetry.lock", True, 2),
        ({"pdm.lock": POETRY_LOCK}, "pdm.lock", True, 2),
        ({"requirements.txt": "fastapi==0.140.0\n"}, "requirements.txt", False, 1),
        ({}, "pyproject.toml", False, 0),
    ],
)
def test_the_first_lock_is_taken(tmp_path: Path, files: dict[str, str], file: str, hashed: bool, packages: int) -> None:
    """In the order of the option `lock`."""
    base = {name: content for name, content in GOOD.items() if name != "requirements.txt"}
    report = draft(inspect(project(tmp_path, files, base)))
    locked = report.project.locked
    assert (locked.file, locked.hashed, len(locked.versions)) == (file, hashed, packages)
    assert report.will_run
    assert any("as sdists alone: embit" in warning.found for warning in report.warnings) == (packages == 2)
    if hashed and packages == 2:
        assert "the platform adds gunicorn and uvicorn-worker" in text.render(report)


NEEDS_CORE = '[project]\nname = "shop"\nversion = "1"\ndependencies = ["fastapi", "core"]\n'
UV_ROOT = '[[package]]\nname = "shop"\nsource = { virtual = "." }\ndependencies = [{ name = "core" }]\n'


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"pyproject.toml": f"{NEEDS_CORE}[tool.uv.sources]\ncore = {{ workspace = true }}\n"}, "core (workspace)"),
        ({"pyproject.toml": f'{NEEDS_CORE}[tool.uv.sources]\nCore = [{{ git = "https://x" }}]\n'}, "Core (git)"),
        ({"uv.lock": f'{UV_ROOT}[[package]]\nname = "core"\nsource = {{ editable = "../core" }}\n'}, "core"),
        (
            {"poetry.lock": '[[package]]\nname = "core"\ngroups = ["main"]\n[package.source]\ntype = "git"\n'},
            "core",
        ),
        ({"pdm.lock": '[[package]]\nname = "core"\ngroups = ["default"]\npath = "./core"\n'}, "core"),
    ],
)
def test_packages_that_no_index_has(tmp_path: Path, files: dict[str, str], found: str) -> None:
    """Of a workspace, a repository or a folder: a run would refuse them."""
    base = {name: content for name, content in GOOD.items() if name != "requirements.txt"}
    (problem,) = inspect(project(tmp_path, files, base)).problems
    assert (problem.found, problem.where.rpartition(".")[2]) == (found, "lock")


@pytest.mark.parametrize(
    "files",
    [
        {"pyproject.toml": f'{NEEDS_CORE}[tool.uv.sources]\nlinter = {{ path = "../linter" }}\n'},
        {"uv.lock": f'{UV_ROOT}[[package]]\nname = "linter"\nsource = {{ git = "https://x" }}\n'},
        {"poetry.lock": '[[package]]\nname = "linter"\ngroups = ["dev"]\n[package.source]\ntype = "git"\n'},
    ],
)
def test_packages_for_development_may_be_anywhere(tmp_path: Path, files: dict[str, str]) -> None:
    base = {name: content for name, content in GOOD.items() if name != "requirements.txt"}
    assert not [each for each in inspect(project(tmp_path, files, base)).problems if "of an index" in each.expected]


def test_an_app_that_lists_no_dependencies(tmp_path: Path) -> None:
    """With the file that could be its list."""
    report = draft(inspect(project(tmp_path, {"main.py": APP, "requirements/base.txt": "fastapi\n"}, {})))
    missing = "neither pyproject.toml with dependencies, nor a lock, nor requirements.txt"
    assert [warning.found for warning in report.warnings] == [f"{missing}; but requirements/base.txt"]
    assert (report.will_run, entry(report)["lock"]) == (True, "requirements/base.txt")
    (tmp_path / "shop-app/requirements/base.txt").rename(tmp_path / "shop-app/requirements/dev.txt")
    report = draft(inspect(tmp_path / "shop-app"))
    assert [problem.found for problem in report.problems] == [missing]
    assert "lock" not in entry(report)


@pytest.mark.parametrize(
    ("manifest", "fits"),
    [
        ('[project]\nname = "x"\nrequires-python = ">=3.12"\n', ["Ubuntu 24.04", "Debian 13"]),
        ('[project]\nname = "x"\nrequires-python = ">=3.10,<3.13"\n', ["Debian 12", "Ubuntu 24.04"]),
        ('[tool.poetry]\nname = "x"\n[tool.poetry.dependencies]\npython = "^3.12"\n', ["Ubuntu 24.04", "Debian 13"]),
        ('[tool.poetry]\nname = "x"\n[tool.poetry.dependencies]\npython = "~3.11"\n', ["Debian 12"]),
        ('[tool.poetry]\nname = "x"\n[tool.poetry.dependencies]\npython = "3.13"\n', ["Debian 13"]),
        ('[project]\nname = "x"\n', ["Debian 12", "Ubuntu 24.04", "Debian 13"]),
    ],
)
def test_the_python_that_is_wanted(tmp_path: Path, manifest: str, fits: list[str]) -> None:
    assert inspected(tmp_path, {"pyproject.toml": manifest}).project.fits() == fits


def packed(folder: Path, name: str, files: dict[str, str]) -> Path:
    """Write an archive."""
    path = folder / name
    if name.endswith(".whl"):
        with zipfile.ZipFile(path, "w") as archive:
            for inner, content in files.items():
                archive.writestr(inner, content)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for inner, content in files.items():
                member = tarfile.TarInfo(inner)
                member.size = len(content.encode())
                tar.addfile(member, io.BytesIO(content.encode()))
    return path


def test_what_is_installed_has_no_folder(tmp_path: Path) -> None:
    """Options that name one are refused for a package."""
    code = f"{APP}from fastapi.staticfiles import StaticFiles\napp.mount('/static', StaticFiles(directory='static'))\n"
    files = {"src/shop/main.py": code, "src/shop/alembic.ini": "", "PKG-INFO": "Name: shop\nRequires-Dist: asyncpg\n"}
    path = packed(tmp_path, "shop-1.2.tar.gz", {f"shop-1.2/{name}": content for name, content in files.items()})
    report = draft(inspect(path))
    assert report.python_path == "src"
    assert not {"python_path", "lock", "static"} & set(entry(report))
    assert "static:" not in report.entry_text
    assert entry(report)["database"]["migration"]["command"] == [FILL_IN]
    assert report.warnings == []
    assert refused(report) == []


def test_wheels_and_sdists(tmp_path: Path) -> None:
    """What is in them is judged as a folder is."""
    metadata = "Metadata-Version: 2.1\nName: shop\nVersion: 1.2\nRequires-Python: >=3.12\nRequires-Dist: fastapi\n"
    wheel = packed(
        tmp_path, "shop-1.2-py3-none-any.whl", {"shop/main.py": APP, "shop-1.2.dist-info/METADATA": metadata}
    )
    sdist = packed(tmp_path, "shop-1.2.tar.gz", {f"shop-1.2/{name}": content for name, content in GOOD.items()})
    for path, kind in ((wheel, "wheel"), (sdist, "sdist")):
        report = draft(inspect(path))
        assert (report.kind, report.name, report.project.version) == (kind, "shop", "1.2")
        assert entry(report)["source"] == str(path)
        assert report.will_run
        assert refused(report) == []


@pytest.mark.parametrize("name", ["../x.py", "/x.py", "a/../../x.py"])
def test_an_archive_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="leads out of it"):
        inspect(packed(tmp_path, "shop.tar.gz", {name: APP}))
    assert not (tmp_path / "x.py").exists()


def test_there_has_to_be_something(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a folder, a wheel or an sdist"):
        inspect(tmp_path / "nowhere")
    (tmp_path / "broken.whl").write_text("no archive")
    with pytest.raises(SourceError, match="an archive that can be unpacked"):
        inspect(tmp_path / "broken.whl")


def test_a_project_in_a_folder_of_its_repository(tmp_path: Path) -> None:
    """Where the one manifest is, there is the source."""
    report = draft(
        inspect(project(tmp_path, {f"backend/{name}": content for name, content in GOOD.items()}, {"README.md": ""}))
    )
    assert report.source == "backend"
    assert entry(report)["source"] == str(tmp_path / "shop-app/backend")
    assert report.will_run


def test_syntax_of_a_newer_python(tmp_path: Path) -> None:
    """What this Python can't read is no verdict on the app."""
    code = "import shop.newer\n"
    newer = "def broken(:\n"
    with pytest.raises(SyntaxError):
        ast.parse(newer)
    report = inspected(tmp_path, main(code, **{"shop/newer.py": newer}))
    assert report.will_run
    assert [warning.where for warning in report.warnings] == ["shop/newer.py"]


@pytest.mark.parametrize(
    "value",
    # Numbers, words and signs that mean something to YAML, and what a line can't hold.
    [
        "",
        *"yes null ~ 1 1.5 0x1f 1:30 2026-01-01 #a [a] {a} *a &a !a %a @a `a 'a a: é | > ? = \\".split(),
        '"a',
        "a: b",
        "a #b",
        "- a",
        "a\nb",
        "a\tb",
        " a",
        "a ",
        "\u2028",
        "{{ x }}",
        "a, b",
    ],
)
def test_any_default_survives_yaml(tmp_path: Path, value: str) -> None:
    """The entry is written without a library."""
    report = inspected(
        tmp_path, main(f"import os\nX = os.environ.get('SHOP_LOG_DIR', {value!r})\nY = os.environ['SHOP_Y']")
    )
    suggested = [line.strip().removeprefix("# ") for line in report.entry_text.splitlines() if "SHOP_LOG_DIR" in line]
    loaded = yaml.safe_load(suggested[0])["SHOP_LOG_DIR"]
    assert loaded in (value, f"/var/lib/shop/{value}".rstrip("/."))
    assert refused(report) == []


def test_without_vault_no_role_ids_are_asked_for(tmp_path: Path) -> None:
    report = inspect(project(tmp_path, main("import os\nK = os.environ['SHOP_KEY']")))
    assert "role_id:" in draft(report).entry_text
    assert "role_id:" not in draft(report, secrets_source=SEALED).entry_text
    assert refused(report, SEALED) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("My_Shop.API", "my-shop-api"),
        ("9lives", "app-9lives"),
        ("a" * 40, "a" * 21),
        ("shop-", "shop"),
        ("Vault", "vault-app"),
        ("forge-x", "app-forge-x"),
    ],
)
def test_names_of_projects_become_names_of_entries(tmp_path: Path, name: str, expected: str) -> None:
    report = inspected(tmp_path, {"pyproject.toml": MANIFEST.replace('"shop"', f'"{name}"')})
    assert report.name == expected
    assert refused(report) == []


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    """As a run does."""
    report = inspected(tmp_path, {}, name="vault")
    assert [problem.found for problem in report.problems] == ["vault is reserved"]
    assert not report.will_run
