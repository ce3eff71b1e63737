"""Which paths an app answers, put together from its routers, as far as they are written down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .codebase import ROUTE_METHODS, Call, Codebase, Module, text
from .settings import Setting

_ADDERS = frozenset({"add_route", "add_api_route", "add_websocket_route", "add_api_websocket_route"})
_ROUTES = frozenset({"Route", "APIRoute", "WebSocketRoute", "APIWebSocketRoute"})
# The likeliest first; what comes before, such as /api/v1, does not matter.
_LIVE = tuple(
    """
    healthz livez health live liveness alive health/live health/liveness live/health healthcheck health-check
    health_check utils/health-check heartbeat lbheartbeat ping _health up status
    """.split()
)
_READY = ("readyz", "ready", "readiness", "health/ready", "health/readiness", "health-ready", "is-ready", "_ready")
_METRICS = ("metrics", "metrics/")
_STREAMS = frozenset({"StreamingResponse", "EventSourceResponse"})
_DEEPEST = 8


@dataclass(frozen=True)
class Route:
    """A path and where it is written down."""

    path: str
    methods: tuple[str, ...]
    where: str
    parameters: bool = False


@dataclass
class Routes:
    """What an app answers."""

    all: list[Route] = field(default_factory=list)
    health: Route | None = None
    ready: Route | None = None
    metrics: Route | None = None
    static: dict[str, tuple[str, str]] = field(default_factory=dict)
    """URL prefix to the folder and where that is written down."""
    websockets: list[Route] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)


@dataclass
class _Router:
    """An app or a router: its own prefix, and who includes it."""

    prefix: str = ""
    parents: list[tuple[str, str]] = field(default_factory=list)


class _Reader:
    def __init__(self, code: Codebase, modules: list[Module], settings: Iterable[Setting]) -> None:
        self._code, self._modules = code, modules
        self._defaults = {setting.name.lower(): setting.default for setting in settings}
        self._routers: dict[str, _Router] = {}

    def read(self) -> Routes:
        found = Routes()
        every = [(module, call) for module in self._modules for call in module.calls]
        for module in self._modules:
            self._made(module)
        for module, call in every:
            self._included(module, call)
        for module, call in every:
            self._route(found, module, call)
        seen: dict[tuple[str, tuple[str, ...]], Route] = {}
        for route in found.all:
            seen.setdefault((route.path, route.methods), route)
        found.all = list(seen.values())
        found.websockets = [route for route in found.all if "WEBSOCKET" in route.methods]
        return found

    def _text(self, module: Module, node: ast.AST | None, depth: int = 0) -> str | None:
        """Return the text of an expression: literals, constants of the source, defaults of settings."""
        if node is None or depth > _DEEPEST:
            return None
        if (literal := text(node)) is not None:
            return literal
        if isinstance(node, ast.JoinedStr):
            parts = [
                self._text(module, part.value if isinstance(part, ast.FormattedValue) else part, depth + 1)
                for part in node.values
            ]
            return None if None in parts else "".join(part or "" for part in parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._text(module, node.left, depth + 1), self._text(module, node.right, depth + 1)
            return None if left is None or right is None else left + right
        if isinstance(node, (ast.Name, ast.Attribute)):
            definition = self._code.find(module.full_name(node, follow=False))
            if definition and isinstance(definition[1], ast.expr):
                return self._text(definition[0], definition[1], depth + 1)
            if isinstance(node, ast.Attribute):
                default = self._defaults.get(node.attr.lower()) or next(
                    (value for name, value in self._defaults.items() if name.endswith(f"_{node.attr.lower()}")), None
                )
                return default if isinstance(default, str) else None
        return None

    def _owner(self, module: Module, node: ast.AST) -> str:
        """Return the full name of a router or an app, where it is defined."""
        name = module.full_name(node, follow=False)
        for _ in range(_DEEPEST):
            module_name, _, last = name.rpartition(".")
            origin = self._code.module(module_name)
            if origin is None or last not in origin.aliases or last in origin.instances:
                break
            name = origin.aliases[last]
        # A module where its router is meant is no router.
        return name

    def _made(self, module: Module) -> None:
        for node in ast.walk(module.tree):
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, ast.Call):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            call = Call("", node.value, module.file)
            prefix = self._text(module, call.argument(-1, "prefix"))
            for target in targets:
                if isinstance(target, ast.Name) and prefix is not None:
                    self._routers.setdefault(self._local(module, target.id), _Router()).prefix = prefix

    def _local(self, module: Module, name: str) -> str:
        found = module.full_name(ast.Name(id=name), follow=False)
        return found if "." in found else f"{module.name}.{name}"

    def _name(self, module: Module, node: ast.AST) -> str:
        owner = self._owner(module, node)
        return owner if "." in owner or not owner else f"{module.name}.{owner}"

    def _included(self, module: Module, call: Call) -> None:
        function = call.node.func
        if not isinstance(function, ast.Attribute) or function.attr not in ("include_router", "mount"):
            return
        mount = function.attr == "mount"
        child = call.argument(1, "app") if mount else call.argument(0, "router")
        prefix = self._text(module, call.argument(0, "path") if mount else call.argument(1, "prefix"))
        if child is None or (mount and isinstance(child, ast.Call)):
            return
        parent = self._name(module, function.value)
        self._routers.setdefault(self._name(module, child), _Router()).parents.append((parent, prefix or ""))

    def _prefixes(self, router: str, depth: int = 0) -> list[str]:
        """Return every way in which clients get to a router."""
        known = self._routers.get(router)
        if known is None or depth > _DEEPEST:
            return [""]
        above = [
            f"{outer}{prefix.rstrip('/')}"
            for parent, prefix in known.parents
            for outer in self._prefixes(parent, depth + 1)
        ]
        return [f"{outer}{known.prefix.rstrip('/')}" for outer in above or [""]]

    def _route(self, found: Routes, module: Module, call: Call) -> None:
        function, last = call.node.func, call.name.rpartition(".")[2]
        if last in _STREAMS and call.where not in found.streams:
            found.streams.append(call.where)
        if last == "expose" and "nstrumentator" in call.name:
            endpoint = self._text(module, call.argument(-1, "endpoint")) or "/metrics"
            found.all.append(Route(endpoint, ("GET",), call.where))
            return
        if last == "Mount" or (isinstance(function, ast.Attribute) and function.attr == "mount"):
            self._mount(found, module, call)
            return
        path = self._text(module, call.argument(0, "path"))
        if path is None or not (path.startswith("/") or not path):
            return
        owner = ""
        if isinstance(function, ast.Attribute) and function.attr in ROUTE_METHODS | _ADDERS:
            if isinstance(function.value, ast.Name) and function.value.id in ("requests", "httpx", "client", "session"):
                return
            owner = self._name(module, function.value)
            methods = self._methods(function.attr, call)
        elif last in _ROUTES:
            methods = ("WEBSOCKET",) if "WebSocket" in last else self._methods("route", call)
        else:
            return
        for prefix in self._prefixes(owner) if owner else [""]:
            found.all.append(Route(f"{prefix}{path}" or "/", methods, call.where, "{" in path))

    def _methods(self, name: str, call: Call) -> tuple[str, ...]:
        if "websocket" in name:
            return ("WEBSOCKET",)
        if name in ("route", "api_route", "add_route", "add_api_route"):
            given = call.argument(-1, "methods")
            items = given.elts if isinstance(given, (ast.List, ast.Tuple, ast.Set)) else []
            return tuple(found.upper() for item in items if (found := text(item))) or ("GET",)
        return (name.upper(),)

    def _mount(self, found: Routes, module: Module, call: Call) -> None:
        path, inner = self._text(module, call.argument(0, "path")), call.argument(1, "app")
        if path is None or not isinstance(inner, ast.AST):
            return
        made = inner if isinstance(inner, ast.Call) else module.names.bound.get(getattr(inner, "id", ""))
        name = module.full_name(made.func) if isinstance(made, ast.Call) else ""
        if name.endswith("StaticFiles") and isinstance(made, ast.Call):
            folder = Call(name, made, module.file).argument(0, "directory")
            found.static[path] = (self._text(module, folder) or "", call.where)
        elif name.endswith("make_asgi_app"):
            found.all.append(Route(path, ("GET",), call.where))


def read(code: Codebase, modules: list[Module], settings: Iterable[Setting]) -> Routes:
    """Return the routes of the modules, and the probes among them."""
    found = _Reader(code, modules, settings).read()
    plain = [route for route in found.all if "GET" in route.methods and "{" not in route.path]
    found.ready = _first(plain, _READY)
    found.health = _first([route for route in plain if route != found.ready], _LIVE)
    found.metrics = _first(plain, _METRICS)
    return found


def _first(routes: list[Route], endings: tuple[str, ...]) -> Route | None:
    for ending in endings:
        matching = [route for route in routes if re.fullmatch(rf"(?:/[\w.-]+)*?/{re.escape(ending)}/?", route.path)]
        if matching:
            return min(matching, key=lambda route: (route.path.count("/"), route.path))
    return None
