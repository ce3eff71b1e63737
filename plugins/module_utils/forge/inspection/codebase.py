"""The Python of a source, parsed and never run: modules, what they import, what they call, and when."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..app_source import Names, find_module

_MOST_FILES = 5000
# Nothing of an app that serves.
_ELSEWHERE = frozenset(
    {"tests", "test", "docs", "doc", "docs_src", "examples", "example", "benchmarks", "node_modules"}
)
_DEEPEST_CALL = 5
# What decorates the function of a route.
ROUTE_METHODS = frozenset(
    {"get", "post", "put", "delete", "patch", "head", "options", "websocket", "route", "api_route"}
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Call:
    """A call somewhere in a module.

    Attributes:
        name: What is called, by its full name as far as imports tell, such as `requests.get`.
        node: The call itself.
        file: Where it stands, relative to the source.
        asynchronous: Whether the event loop runs it: it stands in an `async def`.
        serving: Whether it runs while the app serves, as far as that shows: there, or in the function of a route.
        conditional: Whether an `if` decides about it.
    """

    name: str
    node: ast.Call
    file: str
    asynchronous: bool = False
    serving: bool = False
    conditional: bool = False

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.file}:{self.node.lineno}"

    def argument(self, position: int, *keywords: str) -> ast.expr | None:
        """Return an argument by its position or by one of its names."""
        if 0 <= position < len(self.node.args):
            return self.node.args[position]
        return next((keyword.value for keyword in self.node.keywords if keyword.arg in keywords), None)


@dataclass
class Module:
    """One file of Python."""

    name: str
    file: str
    package: str
    tree: ast.Module
    names: Names = field(init=False)

    def __post_init__(self) -> None:
        self.names = Names(self.tree)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Return the full name behind each imported one, wherever in the file it is imported."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    found[bound] = alias.name if alias.asname else bound
            elif isinstance(node, ast.ImportFrom):
                origin = self.absolute(node)
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{origin}.{alias.name}" if origin else alias.name
        return found

    @cached_property
    def instances(self) -> dict[str, str]:
        """Return what top-level and local names are made of: `client = httpx.Client()` gives httpx.Client."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                name = self.full_name(node.value.func, follow=False)
                found.update({target.id: name for target in targets if isinstance(target, ast.Name) and name})
            elif isinstance(node, (ast.With, ast.AsyncWith)):
                for item in node.items:
                    if isinstance(item.context_expr, ast.Call) and isinstance(item.optional_vars, ast.Name):
                        found[item.optional_vars.id] = self.full_name(item.context_expr.func, follow=False)
        return found

    @cached_property
    def calls(self) -> list[Call]:
        """Return every call that is not for scripts only."""
        return list(_calls(self, self.tree, _Place()))

    @cached_property
    def conditional(self) -> set[int]:
        """Return the ids of the calls that an `if` decides about."""
        branches = [node for node in ast.walk(self.tree) if isinstance(node, (ast.If, ast.IfExp))]
        statements = [part for node in branches for part in _branches(node)]
        return {id(node) for part in statements for node in ast.walk(part) if isinstance(node, ast.Call)}

    def absolute(self, statement: ast.ImportFrom) -> str:
        """Return the module that `from ... import` names."""
        if not statement.level:
            return statement.module or ""
        parents = self.package.split(".") if self.package else []
        base = parents[: len(parents) - statement.level + 1]
        return ".".join([*base, *([statement.module] if statement.module else [])])

    def full_name(self, node: ast.AST, follow: bool = True) -> str:
        """Return the dotted name of an expression with its imports resolved; empty when it is none."""
        if isinstance(node, ast.Name):
            if node.id in self.aliases:
                return self.aliases[node.id]
            if follow and node.id in self.instances:
                return f"{self.instances[node.id]}()"
            return f"{self.name}.{node.id}" if node.id in self.names.bound else node.id
        if isinstance(node, ast.Attribute):
            base = self.full_name(node.value, follow)
            return f"{base}.{node.attr}" if base else ""
        if isinstance(node, ast.Call):
            base = self.full_name(node.func, follow)
            return f"{base}()" if base else ""
        return ""


class Codebase:
    """All modules below one folder of `sys.path`."""

    def __init__(self, source: Path, root: Path, shipped: list[str]) -> None:
        self.source, self.root, self.shipped = source, root, shipped
        self.broken: dict[str, str] = {}
        """Files that are no valid Python, with the reason."""
        self._parsed: dict[str, Module | None] = {}
        self._files: dict[str, str] = {}
        for name in shipped[:_MOST_FILES]:
            file = source / name
            if not name.endswith(".py") or not file.is_relative_to(root):
                continue
            parts = list(file.relative_to(root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            if parts and all(part.isidentifier() for part in parts):
                self._files[".".join(parts)] = name

    def of_the_app(self) -> Iterator[Module]:
        """Yield every module but those of tests, documentation and examples."""
        for name in sorted(self._files):
            parts = name.split(".")
            if not _ELSEWHERE & set(parts) and not parts[-1].startswith("test_") and parts[-1] != "conftest":
                module = self.module(name)
                if module:
                    yield module

    def module(self, name: str) -> Module | None:
        """Return a module by its name, None when it is not of this source."""
        if name not in self._parsed:
            self._parsed[name] = self._parse(name)
        return self._parsed[name]

    def _parse(self, name: str) -> Module | None:
        file = find_module(self.root, name)
        if name not in self._files or file is None:
            return None
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        inside = file.relative_to(self.source).as_posix()
        try:
            return Module(name, inside, package, ast.parse(file.read_bytes(), filename=inside))
        except SyntaxError as error:
            self.broken[inside] = f"line {error.lineno}: {error.msg}"
        except (ValueError, RecursionError) as error:
            self.broken[inside] = str(error)
        return None

    def reachable(self, start: str, at_import: bool = False) -> list[Module]:
        """Return the modules of the source that `start` imports, directly or not.

        With `at_import` those alone that are imported as soon as it is, and not only once some function runs.
        """
        seen: dict[str, Module] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            parts = name.split(".")
            for known in (".".join(parts[: length + 1]) for length in range(len(parts))):
                module = self.module(known)
                if module is None or known in seen:
                    continue
                seen[known] = module
                nodes = run_at_import(module.tree) if at_import else ast.walk(module.tree)
                for node in nodes:
                    if isinstance(node, ast.Import):
                        waiting += [alias.name for alias in node.names]
                    elif isinstance(node, ast.ImportFrom):
                        origin = module.absolute(node)
                        waiting += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        return list(seen.values())

    def find(self, full_name: str, depth: int = 0) -> tuple[Module, ast.AST] | None:
        """Return the top-level definition behind a full name, through re-exports, and its module."""
        module_name, _, name = full_name.rpartition(".")
        module = self.module(module_name)
        if module is None or depth > _DEEPEST_CALL:
            return None
        node = module.names.bound.get(name)
        if isinstance(node, ast.ImportFrom):
            return self.find(module.aliases.get(name, ""), depth + 1)
        if node is None:
            for star in module.names.star_imports:
                if found := self.find(f"{module.absolute(star)}.{name}", depth + 1):
                    return found
            return None
        return module, node

    def find_class(self, full_name: str) -> tuple[Module, ast.ClassDef] | None:
        """Return the class behind a full name, and its module."""
        found = self.find(full_name)
        return (found[0], found[1]) if found and isinstance(found[1], ast.ClassDef) else None

    def calls_at_import(self, start: str, factory: str = "") -> list[Call]:
        """Return the calls that run when `start` is imported, and when its `factory` is called.

        Follows calls of the source's own functions.
        """
        found: dict[int, Call] = {}
        entered: set[int] = set()

        def enter(module: Module, nodes: Iterator[ast.AST], depth: int, conditional: bool) -> None:
            for node in nodes:
                if not isinstance(node, ast.Call):
                    continue
                name, perhaps = module.full_name(node.func), conditional or id(node) in module.conditional
                call = Call(name, node, module.file, conditional=perhaps)
                found.setdefault(id(node), call)
                definition = self.find(name)
                if definition and isinstance(definition[1], ast.FunctionDef) and depth < _DEEPEST_CALL:
                    follow(definition[0], definition[1], depth + 1, perhaps)

        def follow(module: Module, function: ast.FunctionDef, depth: int, conditional: bool) -> None:
            if id(function) not in entered and not is_generator(function):
                entered.add(id(function))
                for statement in function.body:
                    enter(module, run_at_import(statement), depth, conditional)

        for module in self.reachable(start, at_import=True):
            enter(module, run_at_import(module.tree), 0, conditional=False)
        definition = self.find(f"{start}.{factory}") if factory else None
        if definition and isinstance(definition[1], ast.FunctionDef):
            follow(definition[0], definition[1], 0, conditional=False)
        return list(found.values())


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module does: not the bodies of functions, nor what only a script runs."""
    if isinstance(tree, ast.If) and (for_scripts(tree.test) or for_types(tree.test)):
        for statement in tree.orelse:
            yield from run_at_import(statement)
        return
    yield tree
    if isinstance(tree, _FUNCTIONS):
        decorators = [] if isinstance(tree, ast.Lambda) else tree.decorator_list
        for node in [*decorators, *tree.args.defaults, *(node for node in tree.args.kw_defaults if node)]:
            yield from run_at_import(node)
        return
    for child in ast.iter_child_nodes(tree):
        yield from run_at_import(child)


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function's body, without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
            yield from own_nodes(child)


def is_generator(function: ast.AST) -> bool:
    """Tell whether calling a function runs none of it yet."""
    return any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in own_nodes(function))


def for_scripts(test: ast.expr) -> bool:
    """Tell whether a condition is `__name__ == "__main__"`."""
    return isinstance(test, ast.Compare) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(test)
    )


def for_types(test: ast.expr) -> bool:
    """Tell whether a condition is `TYPE_CHECKING`."""
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


class _Place(NamedTuple):
    """What surrounds a node."""

    asynchronous: bool = False
    serving: bool = False


def _calls(module: Module, tree: ast.AST, place: _Place) -> Iterator[Call]:
    if isinstance(tree, ast.If) and for_scripts(tree.test):
        return
    if isinstance(tree, ast.Call):
        serving, perhaps = place.serving or place.asynchronous, id(tree) in module.conditional
        yield Call(module.full_name(tree.func), tree, module.file, place.asynchronous, serving, perhaps)
    for child in ast.iter_child_nodes(tree):
        function = isinstance(child, _FUNCTIONS)
        inner = isinstance(child, ast.AsyncFunctionDef) or (place.asynchronous and not function)
        yield from _calls(module, child, _Place(inner, _is_route(child) if function else place.serving))


def _branches(node: ast.If | ast.IfExp) -> list[ast.AST]:
    parts: list[ast.AST] = []
    for part in (node.body, node.orelse):
        parts += part if isinstance(part, list) else [part]
    return parts


def _is_route(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else []
    called = [item.func for item in decorators if isinstance(item, ast.Call)]
    return any(isinstance(function, ast.Attribute) and function.attr in ROUTE_METHODS for function in called)


def text(node: ast.AST | None) -> str | None:
    """Return the text of a literal, None when it is none."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
