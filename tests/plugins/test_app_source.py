"""Finding the ASGI callable of a source without running it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from forge.app_source import check, parse_target
from sources import APP, write

OTHER = {"src/shop/__init__.py": "from .main import app\n", "src/shop/star.py": "from shop.main import *\n"}


def found(folder: Path, module: str, main: str = APP, **files: str) -> str:
    """Return what is wrong with `module`, empty when nothing is."""
    source = write(folder / "shop", app=main, **OTHER, **files)
    return "; ".join(f"{problem.found} -> {problem.do}" for problem in check(source, module, "src", "apps.shop"))


@pytest.mark.parametrize(
    ("module", "main"),
    [
        ("shop.main:app", APP),
        ("shop.main:create_app()", APP),
        ("shop.main:create_app('x')", APP),
        ("shop.main:create_app(title='x')", APP),
        ("shop:app", APP),  # imported into the package
        ("shop.star:app", APP),
        ("shop.main:app", "from somewhere import app\n"),  # of an installed package, so believed
        ("shop.main:app", "from somewhere import *\n"),
        ("shop.main:app", "async def app(scope, receive, send): ...\n"),
        ("shop.main:app", "@framework.to_asgi\nasync def app(request): ...\n"),
        ("shop.main:app", "class App:\n    async def __call__(self, scope, receive, send): ...\n\n\napp = App()\n"),
        ("shop.main:app", "try:\n    import x\nexcept ImportError:\n    app = None\nelse:\n    app = x.App()\n"),
        ("shop.main:app", "inner = make()\napp = Middleware(inner)\n"),
        ("shop.main:app", "inner = make()\napp: object = inner\n"),
        ("shop.main:app", "app: object = make()\napp.state.pool = {}\n"),
        ("shop.main:app", f"{APP}\nif __name__ == '__main__':\n    import uvicorn\n\n    uvicorn.run(app)\n"),
        ("shop.main:app", f"{APP}\ndef main():\n    uvicorn.run(app)\n"),
    ],
)
def test_apps_that_gunicorn_would_find(tmp_path: Path, module: str, main: str) -> None:
    """In every usual place."""
    assert found(tmp_path, module, main) == ""


@pytest.mark.parametrize(
    ("module", "main", "expected"),
    [
        ("shop.main", APP, "shop.main -> name the module that holds the ASGI app, a colon"),
        ("shop/main.py:app", APP, "name the module"),
        ("shop.main:app[0]", APP, "name the module"),
        ("shop.main:create_app(title=open('x'))", APP, "name the module"),
        ("shop.main:create_app", APP, "probably a factory -> write `shop.main:create_app()`"),
        ("shop.main:make(1)", "def make(a, b): ...\n", "`make` needs 2 arguments, 1 given"),
        ("shop.main:make()", "async def make(): ...\n", "`make` is a coroutine"),
        ("shop.main:app", "app = {}\n", "something that cannot be called"),
        ("shop.main:app", "import app\n", "something that cannot be called"),
        ("shop.main:app", "application = FastAPI()\n", "found shop.main:application -> use `shop.main:application`"),
        ("shop.main:app", "import app\napp.state.pool = 1\n", "something that cannot be called"),
        ("shop.main:app", "def broken(:\n", "line 1: "),
        ("shop.web:app", APP, "ASGI apps there: shop.main:app"),
        ("shop:main", APP, "no such name"),
        ("shop.main:app", f"{APP}\nuvicorn.run(app, port=8000)\n", "line 10 starts a server of its own"),
        ("shop.main:app", f"{APP}\nif DEBUG:\n    uvicorn.run(app)\n", "put that line behind `if __name__"),
        ("shop.main:app", "if __name__ == '__main__':\n    app = make()\n", "no such name"),
    ],
)
def test_apps_that_gunicorn_would_not_find(tmp_path: Path, module: str, main: str, expected: str) -> None:
    """Each with what it could be instead."""
    assert expected in found(tmp_path, module, main)


def test_an_app_that_git_ignores_is_not_released(tmp_path: Path) -> None:
    """The file is there, and the release would not have it."""
    subprocess.run(["git", "init", "--quiet", tmp_path / "shop"], check=True)
    assert "git ignores it" in found(tmp_path, "shop.main:app", **{".gitignore": "main.py\n"})


def test_python_path_stays_inside(tmp_path: Path) -> None:
    """A folder of the source, not one beside it."""
    source = write(tmp_path / "shop")
    for path in ("lib", ".."):
        assert [problem.where for problem in check(source, "shop.main:app", path, "apps.shop")] == [
            "apps.shop.python_path"
        ]


def test_a_target_is_parsed_as_gunicorn_parses_it() -> None:
    """`util.import_app` of Gunicorn: a name, or a call of one with literal arguments."""
    target = parse_target(" shop.main:create_app(1, key=[2]) ")
    assert target is not None
    assert (target.module, target.name, target.called, target.arguments) == ("shop.main", "create_app", True, 2)
