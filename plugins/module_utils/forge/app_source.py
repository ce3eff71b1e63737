"""Does the source of an app hold what its entry says, judged without running any of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .problems import Problem
from .source_files import SourceError, list_files

_MODULE = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<object>.+)")
_NOT_APPS = (
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.JoinedStr,
    ast.ListComp,
    ast.DictComp,
    ast.SetComp,
)
_ASGI_ARGUMENTS = 3  # scope, receive, send
_FRAMEWORKS = frozenset({"FastAPI", "Starlette", "Quart", "Litestar", "BlackSheep", "Sanic", "Falcon", "App"})
_DEEPEST_IMPORT = 5
_MOST_MODULES_SEARCHED = 500


@dataclass(frozen=True)
class Target:
    """The object that Gunicorn will look up, by the syntax of gunicorn.util.import_app."""

    module: str
    name: str
    called: bool
    arguments: int = 0


class Names:
    """The top-level names of one module."""

    def __init__(self, tree: ast.Module) -> None:
        self.bound: dict[str, ast.AST] = {}
        self.star_imports: list[ast.ImportFrom] = []
        for statement in _top_level(tree.body):
            self._add(statement)

    def _add(self, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self.bound[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        self.bound[node.id] = statement.value if node is target else statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            self.bound[statement.target.id] = statement.value
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                self.bound[alias.asname or alias.name.partition(".")[0]] = statement
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if alias.name == "*":
                    self.star_imports.append(statement)
                else:
                    self.bound[alias.asname or alias.name] = statement


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import, into the branches of `if`, `try` and `with`, in their order."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            handlers = statement.handlers if isinstance(statement, ast.Try) else []
            branches = [statement.body, *(handler.body for handler in handlers)]
            for branch in [*branches, getattr(statement, "orelse", []), getattr(statement, "finalbody", [])]:
                yield from _top_level(branch)


def parse_target(text: str) -> Target | None:
    """Return what `package.module:name` or `package.module:factory()` names, None when it is neither."""
    match = _MODULE.fullmatch(text.strip())
    if match is None:
        return None
    try:
        expression = ast.parse(match["object"].strip(), mode="eval").body
    except SyntaxError:
        return None
    if isinstance(expression, ast.Name):
        return Target(match["module"], expression.id, called=False)
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name):
        values = [*expression.args, *(keyword.value for keyword in expression.keywords)]
        try:
            for value in values:
                ast.literal_eval(value)
        except ValueError:
            return None
        return Target(match["module"], expression.func.id, called=True, arguments=len(values))
    return None


def check(source: Path, module: str, python_path: str, where: str) -> list[Problem]:
    """Return what is wrong with the source folder of an app; `where` names the app's entry.

    The module is found and parsed, its top-level names are looked up, imports inside the source are followed. What
    comes from an installed package, or from a star import that cannot be followed, is believed.
    """
    if not source.is_dir():
        return [
            Problem(
                f"{where}.source",
                "the folder of the app on the control machine",
                f"no folder at {source}",
                "correct `source`; a relative path starts at the project's root",
            )
        ]
    try:
        shipped = set(list_files(source))
    except SourceError as error:
        expected, found, do = _three(str(error))
        return [Problem(f"{where}.source", expected, found, do)]
    target = parse_target(module)
    if target is None:
        return [
            Problem(
                f"{where}.module",
                "`package.module:name`, or `package.module:factory()` with literal arguments",
                module,
                "name the module that holds the ASGI app, a colon, and the name of the app in it",
            )
        ]
    root = source / python_path
    if not root.is_dir():
        return [
            Problem(f"{where}.python_path", f"a folder inside {source}", f"no folder {python_path}", "use `src` or `.`")
        ]
    if not root.resolve().is_relative_to(source.resolve()):
        return [Problem(f"{where}.python_path", f"a folder inside {source}", python_path, "use `src` or `.`")]
    return _check_target(source, root, target, shipped, where)


def _three(message: str) -> tuple[str, str, str]:
    expected, found, do = message.split("; ", 2)
    return expected.removeprefix("expected "), found.removeprefix("found ").removeprefix(": "), do


def _check_target(source: Path, root: Path, target: Target, shipped: set[str], where: str) -> list[Problem]:
    where = f"{where}.module"
    file = find_module(root, target.module)
    if file is None:
        candidates = _apps_below(source, root, shipped)
        return [
            Problem(
                where,
                f"a module {target.module} below {root}",
                f"no such file; ASGI apps there: {', '.join(candidates) or 'none'}",
                f"use `{candidates[0]}`"
                if candidates
                else "correct `module`, or `python_path` if the package lies elsewhere",
            )
        ]
    inside = file.relative_to(source).as_posix() if file.is_relative_to(source) else file.as_posix()
    if inside not in shipped:
        return [
            Problem(where, f"{inside} among the files of the release", "git ignores it", "take it out of .gitignore")
        ]
    names = _names(file)
    if isinstance(names, str):
        return [Problem(where, f"valid Python in {inside}", names, "mend the syntax")]
    definition = _resolve(root, target.module, target.name, 0)
    if definition is None:
        candidates = _apps_in(names, target.module) or [f"{target.module}:{name}" for name in sorted(names.bound)]
        return [
            Problem(
                where,
                f"a top-level callable `{target.name}` in {inside}",
                f"no such name; found {', '.join(candidates[:8]) or 'nothing'}",
                f"use `{candidates[0]}`" if _apps_in(names, target.module) else "correct the name after the colon",
            )
        ]
    mistake = _mistake(definition, target)
    return [Problem(where, *mistake)] if mistake else []


def find_module(root: Path, module: str) -> Path | None:
    """Return the file of `module` below `root`, None when there is none."""
    base = root.joinpath(*module.split("."))
    for file in (base / "__init__.py", base.with_name(base.name + ".py")):
        if file.is_file():
            return file
    return None


def _names(file: Path) -> Names | str:
    try:
        return Names(ast.parse(file.read_text(encoding="utf-8")))
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (UnicodeDecodeError, ValueError) as error:
        return str(error)


def _resolve(root: Path, module: str, name: str, depth: int) -> ast.AST | None:
    """Return the node that binds `name`; a node of an import when it comes from elsewhere and has to be believed."""
    file = find_module(root, module)
    names = _names(file) if file else None
    if file is None or names is None or isinstance(names, str):
        return ast.Pass()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    node = names.bound.get(name)
    if node is None:
        for star in names.star_imports:
            origin = _absolute(star, package)
            if find_module(root, origin) is None or depth >= _DEEPEST_IMPORT:
                return star
            node = _resolve(root, origin, name, depth + 1)
            if node is not None:
                return node
        return None
    if isinstance(node, ast.ImportFrom) and depth < _DEEPEST_IMPORT:
        origin = _absolute(node, package)
        wanted = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), name)
        if find_module(root, f"{origin}.{wanted}"):
            return ast.Constant(value=None)  # A module, never an app.
        if find_module(root, origin):
            return _resolve(root, origin, wanted, depth + 1)
    if isinstance(node, ast.Name) and node.id != name and depth < _DEEPEST_IMPORT:
        return _resolve(root, module, node.id, depth + 1)
    return node


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    if not statement.level:
        return statement.module or ""
    parents = package.split(".") if package else []
    base = parents[: len(parents) - statement.level + 1]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _mistake(node: ast.AST, target: Target) -> tuple[str, str, str] | None:
    spelt = f"`{target.module}:{target.name}`"
    if isinstance(node, (*_NOT_APPS, ast.Import)):
        return "an ASGI callable", f"{spelt} is bound to something that cannot be called", "name the app itself"
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.decorator_list:
        return None  # What a decorator makes of it takes what it likes.
    arguments = node.args
    positional = len(arguments.posonlyargs) + len(arguments.args)
    if target.called:
        required = positional - len(arguments.defaults) + sum(default is None for default in arguments.kw_defaults)
        if target.arguments < required:
            return (
                "a factory that can be called as written",
                f"`{target.name}` needs {required} arguments, {target.arguments} given",
                "give them as literals, or write a factory that needs none",
            )
        if isinstance(node, ast.AsyncFunctionDef):
            return "a factory that returns the app", f"`{target.name}` is a coroutine", "make it a plain function"
    elif positional < _ASGI_ARGUMENTS and arguments.vararg is None:
        return (
            "an ASGI callable, which takes scope, receive and send",
            f"{spelt} is a function of {positional} arguments, so probably a factory",
            f"write `{target.module}:{target.name}()` if it returns the app",
        )
    return None


def _apps_in(names: Names, module: str) -> list[str]:
    """Return what in a module looks like an app or a factory of one."""
    found = []
    for name, node in names.bound.items():
        if isinstance(node, ast.Call) and _called(node) in _FRAMEWORKS:
            found.append(f"{module}:{name}")
        elif isinstance(node, ast.FunctionDef) and name in ("create_app", "make_app", "get_app", "build_app"):
            found.append(f"{module}:{name}()")
    return found


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _apps_below(source: Path, root: Path, shipped: set[str]) -> list[str]:
    found: list[str] = []
    for name in sorted(shipped)[: 10 * _MOST_MODULES_SEARCHED]:
        file = source / name
        if not name.endswith(".py") or not file.is_relative_to(root) or len(found) > _MOST_MODULES_SEARCHED:
            continue
        parts = list(file.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if not parts or "tests" in parts or not all(part.isidentifier() for part in parts):
            continue
        names = _names(file)
        if isinstance(names, Names):
            found += _apps_in(names, ".".join(parts))
    return found[:5]
