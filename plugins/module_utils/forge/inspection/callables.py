"""Where the ASGI callable of a source is: an app, something wrapped around one, or a factory."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .codebase import Codebase, Module, is_generator, own_nodes, run_at_import

FRAMEWORKS = {
    "fastapi.FastAPI": "FastAPI",
    "fastapi.applications.FastAPI": "FastAPI",
    "starlette.applications.Starlette": "Starlette",
    "litestar.Litestar": "Litestar",
    "quart.Quart": "Quart",
    "quart.app.Quart": "Quart",
    "blacksheep.Application": "BlackSheep",
    "blacksheep.server.Application": "BlackSheep",
    "falcon.asgi.App": "Falcon",
    "sanic.Sanic": "Sanic",
    "muffin.Application": "Muffin",
    "socketio.ASGIApp": "Socket.IO",
    "engineio.ASGIApp": "Engine.IO",
    "mangum.Mangum": "",
    "django.core.asgi.get_asgi_application": "Django",
    "fasthtml.common.FastHTML": "FastHTML",
    "fasthtml.FastHTML": "FastHTML",
    "asgiref.wsgi.WsgiToAsgi": "WSGI in ASGI",
    "a2wsgi.WSGIMiddleware": "WSGI in ASGI",
    "connexion.AsyncApp": "Connexion",
    "connexion.FastAPI": "Connexion",
    "fastmcp.FastMCP.http_app": "FastMCP",
}
# Decorators that make one of a function.
_MAKERS = {"asgineer.to_asgi": "asgineer", "asgineer._app.to_asgi": "asgineer"}
PLAIN = "plain ASGI"
_FACTORY = re.compile(r"(?:create|make|get|build|init)_(?:app|application|asgi|asgi_app|api|server)")
_RETURNS = frozenset({"FastAPI", "Starlette", "ASGIApp", "ASGIApplication", "Litestar", "Quart"})
_MODULES = ("asgi", "main", "app", "application", "server", "web", "api", "__init__")
_NAMES = ("app", "application", "asgi", "asgi_app", "api")
# How other servers are told of the callable, in files that are beside the code.
_SERVED = re.compile(
    r"\b(?:uvicorn|gunicorn|hypercorn|granian|daphne)\b(?:[\"',\s]+[^\s\"',]+)*?[\"',\s]+"
    r"(?P<target>[A-Za-z_][\w.]*:[A-Za-z_]\w*(?:\(\))?)(?P<rest>[^\n]*)"
)
_SERVED_IN = ("Dockerfile", "Procfile", "docker-compose.yml", "compose.yml", "compose.yaml", "docker-compose.yaml")
_SERVED_ENDINGS = ("README.md", "README.rst", ".sh", "Makefile", ".service", "Dockerfile", "justfile")
_DEEPEST = 6
_LARGEST_NOTE = 200_000


@dataclass(frozen=True)
class Callable:
    """Something that a server could serve.

    Attributes:
        module: Its module.
        name: Its name there.
        kind: The framework, or `plain ASGI`.
        factory: Whether it has to be called first.
        where: File and line.
    """

    module: str
    name: str
    kind: str
    factory: bool
    where: str

    @property
    def target(self) -> str:
        """The spelling of the option `module`."""
        return f"{self.module}:{self.name}" + ("()" if self.factory else "")


class Finder:
    """Looks for callables in one source."""

    def __init__(self, code: Codebase) -> None:
        self._code = code

    def all(self) -> list[Callable]:
        """Return every callable of the source, in no order that means anything."""
        return [found for module in self._code.of_the_app() for found in self._of(module)]

    def find(self, target: str) -> Callable | None:
        """Return the callable that an option `module` names."""
        module_name, _, name = target.partition(":")
        module, bare = self._code.module(module_name), name.partition("(")[0]
        node = module.names.bound.get(bare) if module else None
        if module is None:
            return None
        kind = self._kind(module, node, 0) if node is not None else ""
        factory = "(" in name
        if not kind and isinstance(node, ast.FunctionDef):
            kind = self._returns(module, node, 0)
        where = f"{module.file}:{getattr(node, 'lineno', 1)}"
        return Callable(module_name, bare, kind or "", factory, where)

    def _of(self, module: Module) -> Iterator[Callable]:
        for name, node in module.names.bound.items():
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            where = f"{module.file}:{getattr(node, 'lineno', 1)}"
            kind = self._kind(module, node, 0, name)
            if kind:
                yield Callable(module.name, name, kind, False, where)
            elif isinstance(node, ast.FunctionDef) and not _needs_arguments(node):
                kind = self._returns(module, node, 0)
                if kind and (kind != PLAIN or _FACTORY.fullmatch(name)):
                    yield Callable(module.name, name, kind, True, where)

    def _kind(self, module: Module, node: ast.AST, depth: int, bound_to: str = "") -> str:
        """Return what kind of ASGI app a value is; empty for none."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            made = [_MAKERS[name] for item in node.decorator_list if (name := module.full_name(item)) in _MAKERS]
            if made or isinstance(node, ast.FunctionDef):
                return made[0] if made else ""
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            return PLAIN if names[:3] == ["scope", "receive", "send"] else ""
        if isinstance(node, ast.Await):
            node = node.value
        if isinstance(node, ast.Attribute) and node.attr in _NAMES:
            return self._attribute(module, node, depth + 1)
        if not isinstance(node, ast.Call) or depth > _DEEPEST:
            return ""
        name = module.full_name(node.func)
        if name in FRAMEWORKS:
            return FRAMEWORKS[name]
        definition = self._code.find(name)
        if definition:
            where, what = definition
            if isinstance(what, ast.ClassDef):
                found = self._class(where, what, depth + 1)
                if found != PLAIN or not node.args:
                    return found
            elif isinstance(what, ast.FunctionDef):
                return self._returns(where, what, depth + 1)
        # Something around an app: Middleware(app, ...), socketio.ASGIApp(sio, app), or the name anew.
        inner = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg in ("app", "other_asgi_app"))]
        for argument in inner[:2]:
            if isinstance(argument, ast.Name) and argument.id == bound_to and bound_to in _NAMES:
                return self._first_of(module, bound_to, depth + 1) or PLAIN
            wrapped = module.names.bound.get(argument.id) if isinstance(argument, ast.Name) else argument
            if wrapped is not None and wrapped is not node and _wraps(name):
                found = self._kind(module, wrapped, depth + 1)
                if found:
                    return found
        return ""

    def _first_of(self, module: Module, name: str, depth: int) -> str:
        """Return the kind of an app that a later statement binds to the same name again."""
        for statement in ast.walk(module.tree):
            if isinstance(statement, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == name for target in statement.targets
            ):
                return self._kind(module, statement.value, depth)
        return ""

    def _attribute(self, module: Module, node: ast.Attribute, depth: int) -> str:
        """Return the kind of an app that an instance of a class of the source keeps, as in `Server().app`."""
        made = self._code.find_class(module.full_name(node.value).replace("()", ""))
        if made is None or depth > _DEEPEST:
            return ""
        kinds = [
            FRAMEWORKS[name]
            for inner in ast.walk(made[1])
            if isinstance(inner, ast.Call) and (name := made[0].full_name(inner.func)) in FRAMEWORKS
        ]
        return kinds[0] if kinds else ""

    def _class(self, module: Module, node: ast.ClassDef, depth: int) -> str:
        """Return the kind of app that a class makes: of a framework's class, or one with its own __call__."""
        if depth > _DEEPEST:
            return ""
        for statement in node.body:
            if isinstance(statement, ast.AsyncFunctionDef) and statement.name == "__call__":
                names = [argument.arg for argument in statement.args.args]
                if names[1:4] == ["scope", "receive", "send"]:
                    return PLAIN
        for base in node.bases:
            name = module.full_name(base)
            if name in FRAMEWORKS:
                return FRAMEWORKS[name]
            definition = self._code.find(name)
            if definition and isinstance(definition[1], ast.ClassDef):
                found = self._class(definition[0], definition[1], depth + 1)
                if found:
                    return found
        return ""

    def _returns(self, module: Module, node: ast.FunctionDef, depth: int) -> str:
        """Return the kind of app that a function returns."""
        if depth > _DEEPEST or is_generator(node):
            return ""
        inner_functions = [inner for inner in own_nodes(node) if isinstance(inner, ast.AsyncFunctionDef)]
        local: dict[str, ast.AST] = {function.name: function for function in inner_functions}
        returned: list[ast.expr] = []
        for statement in own_nodes(node):
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        local.setdefault(target.id, statement.value)
            elif isinstance(statement, ast.Return) and statement.value is not None:
                returned.append(statement.value)
        for value in returned:
            made = local.get(value.id) if isinstance(value, ast.Name) else value
            if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.attr in _NAMES:
                kept = local.get(value.value.id)
                made = ast.Attribute(kept, value.attr) if isinstance(kept, ast.expr) else value
            if made is None and isinstance(value, ast.Name):
                made = module.names.bound.get(value.id)
            found = self._kind(module, made, depth + 1) if made is not None else ""
            if found:
                return found
        annotation = node.returns
        name = getattr(annotation, "id", getattr(annotation, "attr", ""))
        if name in _RETURNS and returned:
            return name if name in ("FastAPI", "Starlette", "Litestar", "Quart") else PLAIN
        return ""


def _wraps(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.endswith(("Middleware", "ASGIApp", "App", "Wrapper")) or last.islower()


def _needs_arguments(node: ast.FunctionDef) -> bool:
    arguments = node.args
    needed = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return needed > 0 or any(default is None for default in arguments.kw_defaults)


def served(source: Path, shipped: Iterable[str]) -> list[str]:
    """Return what the files beside the code hand to a server, in the spelling of the option `module`."""
    found = []
    for name in sorted(shipped, key=lambda name: (name.count("/"), not name.endswith(_SERVED_IN), name)):
        if not name.endswith((*_SERVED_IN, *_SERVED_ENDINGS)) or name.count("/") > 2:
            continue
        text = (source / name).read_bytes()[:_LARGEST_NOTE].decode(errors="replace")
        for match in _SERVED.finditer(text.replace("\\\n", " ")):
            target = match["target"]
            if "--factory" in match[0] and not target.endswith("()"):
                target += "()"
            if target not in found:
                found.append(target)
    return found


def ranked(found: list[Callable], hints: list[str], code: Codebase) -> list[Callable]:
    """Return the callables, the likeliest first: what a server is told, the usual names, the whole before its parts.

    Hints may be spelt from another folder than the source's, so that they agree from the right.
    """
    mounted = _mounted(code, found)

    def rank(one: Callable) -> tuple[object, ...]:
        plain = f"{one.module}:{one.name}"
        hinted = [index for index, hint in enumerate(hints) if _agree(hint.removesuffix("()"), plain)]
        last = one.module.rpartition(".")[2]
        return (
            plain in mounted,
            hinted[0] if hinted else len(hints),
            one.kind == PLAIN,
            one.factory,
            _NAMES.index(one.name) if one.name in _NAMES else len(_NAMES),
            one.module.count("."),
            _MODULES.index(last) if last in _MODULES else len(_MODULES),
            one.target,
        )

    return sorted(found, key=rank)


def _agree(hint: str, target: str) -> bool:
    return hint == target or target.endswith(f".{hint}") or hint.endswith(f".{target}")


def _mounted(code: Codebase, found: list[Callable]) -> set[str]:
    """Return the apps that another one mounts."""
    apps = {f"{one.module}.{one.name}": f"{one.module}:{one.name}" for one in found}
    inside = set()
    for module in code.of_the_app():
        imported = set(module.aliases)
        top = {id(node) for node in run_at_import(module.tree)}
        for call in module.calls:
            mounts = call.name.endswith(".mount") and isinstance(call.node.func, ast.Attribute)
            if mounts or call.name.endswith("routing.Mount"):
                part = call.argument(1, "app")
                name = module.full_name(part, follow=False) if part is not None else ""
                # In a function the name may be one of its own.
                known = id(call.node) in top or getattr(part, "id", "") in imported
                if name in apps and known:
                    inside.add(apps[name])
    return inside
