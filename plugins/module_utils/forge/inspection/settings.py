"""Which settings an app reads from its environment, and which of them it can't do without."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .. import secret_scan
from .codebase import Call, Codebase, Module, text

_BASES = frozenset(
    {
        "pydantic_settings.BaseSettings",
        "pydantic.BaseSettings",
        "pydantic.v1.BaseSettings",
        "pydantic_settings.main.BaseSettings",
    }
)
_CONFIGS = frozenset({"starlette.config.Config", "decouple.config", "environs.Env", "environs.env", "environ.Env"})
_GETTERS = frozenset({"os.getenv", "os.environ.get", "os.environ.setdefault", "os.getenvb"})
# Of the system and of the servers, not of the app.
_NOT_OF_THE_APP = re.compile(
    r"PATH|HOME|USER|SHELL|LANG|LC_\w+|TZ|TMPDIR|TEMP|TMP|PWD|HOSTNAME|TERM|COLUMNS|LINES|EDITOR|DISPLAY"
    r"|NO_COLOR|FORCE_COLOR|XDG_\w+|PYTEST_\w+|PYTHON\w+|VIRTUAL_ENV|CONDA\w*|APPDATA|LOCALAPPDATA|USERPROFILE"
    r"|WEB_CONCURRENCY|PROMETHEUS_MULTIPROC_DIR|prometheus_multiproc_dir|KUBERNETES_\w+|AWS_LAMBDA_\w+|RUN_MAIN"
    r"|HTTPS?_PROXY|NO_PROXY|https?_proxy|no_proxy|SSL_CERT_\w+|READTHEDOCS"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL = re.compile(r"(?:^|_)(?:DATABASE|DB|POSTGRES(?:QL)?|PG|SQLALCHEMY)\w*?_?(?:URL|URI|DSN)$|^DSN$", re.IGNORECASE)
_WITH_CREDENTIALS = re.compile(
    r"(?:^|_)(?:DATABASE|DB|PG|POSTGRES\w*|MYSQL|MONGO\w*|REDIS|BROKER|CELERY\w*|AMQP|RABBIT\w*|SMTP|CACHE|QUEUE)\w*?"
    r"_?(?:DSN|URL|URI)$",
    re.IGNORECASE,
)
_DEEPEST = 5


@dataclass(frozen=True)
class Setting:
    """One variable of the environment.

    Attributes:
        name: The variable.
        required: Whether the app has nothing else to go by.
        default: What it goes by otherwise, as far as that is a literal.
        secret: Whether it looks like one that holds a secret.
        kind: Its type, in the words of the source.
        where: File and line.
        reader: Who reads it: a class of settings, or the call.
    """

    name: str
    required: bool
    default: Any
    secret: bool
    kind: str
    where: str
    reader: str

    @property
    def is_database_url(self) -> bool:
        """Tell whether it is the URL of the app's database."""
        return bool(_URL.search(self.name)) or self.kind == "PostgresDsn"


@dataclass(frozen=True)
class SettingsClass:
    """A pydantic-settings class."""

    name: str
    prefix: str
    where: str


@dataclass
class _Field:
    name: str
    annotation: ast.expr | None
    value: ast.expr | None
    where: str
    module: Module


def read(code: Codebase, modules: Iterable[Module]) -> tuple[list[Setting], list[SettingsClass]]:
    """Return the settings that the modules read, each once, the required first, and the classes among the readers."""
    found: dict[str, Setting] = {}
    classes = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and _is_settings(code, module, node, 0):
                one, fields = _class(code, module, node)
                classes.append(one)
                for setting in fields:
                    _keep(found, setting)
        for setting in _reads(module):
            _keep(found, setting)
    ordered = sorted(found.values(), key=lambda setting: (not setting.required, setting.name))
    return ordered, sorted(classes, key=lambda one: one.where)


def _keep(found: dict[str, Setting], setting: Setting) -> None:
    if not _VARIABLE.fullmatch(setting.name) or _NOT_OF_THE_APP.fullmatch(setting.name):
        return
    known = found.get(setting.name)
    # Whoever reads it without anything to fall back on decides.
    if known is None or (setting.required and not known.required):
        found[setting.name] = setting


def _is_settings(code: Codebase, module: Module, node: ast.ClassDef, depth: int) -> bool:
    for base in node.bases:
        name = module.full_name(base)
        if name in _BASES:
            return True
        definition = code.find_class(name)
        if definition and depth < _DEEPEST and _is_settings(code, *definition, depth + 1):
            return True
    return False


def _lineage(
    code: Codebase, module: Module, node: ast.ClassDef, depth: int = 0
) -> Iterator[tuple[Module, ast.ClassDef]]:
    """Yield a class and those of the source that it is made of, the farthest first."""
    if depth < _DEEPEST:
        for base in reversed(node.bases):
            definition = code.find_class(module.full_name(base))
            if definition:
                yield from _lineage(code, *definition, depth + 1)
    yield module, node


def _class(code: Codebase, module: Module, node: ast.ClassDef) -> tuple[SettingsClass, list[Setting]]:
    config: dict[str, ast.expr] = {}
    fields: dict[str, _Field] = {}
    for where, one in _lineage(code, module, node):
        config |= _config(where, one)
        for field in _fields(where, one):
            fields[field.name] = field
    prefix = text(config.get("env_prefix")) or ""
    delimiter = text(config.get("env_nested_delimiter")) or ""
    settings = []
    for field in fields.values():
        settings += _settings_of(code, field, prefix, delimiter, node.name, 0)
    return SettingsClass(node.name, prefix, f"{module.file}:{node.lineno}"), settings


def _config(module: Module, node: ast.ClassDef) -> dict[str, ast.expr]:
    found = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    for statement in node.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == "model_config" for target in targets):
                value = statement.value
                if isinstance(value, ast.Call):
                    found |= {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
                elif isinstance(value, ast.Dict):
                    pairs = zip(value.keys, value.values, strict=True)
                    found |= {key: item for node_, item in pairs if (key := text(node_))}
        elif isinstance(statement, ast.ClassDef) and statement.name == "Config":
            for inner in statement.body:
                if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                    found[inner.targets[0].id] = inner.value
    return {name: _constant(module, value) for name, value in found.items()}


def _constant(module: Module, node: ast.expr) -> ast.expr:
    """Return what a name of the module stands for."""
    bound = module.names.bound.get(node.id) if isinstance(node, ast.Name) else None
    return bound if isinstance(bound, ast.expr) else node


def _fields(module: Module, node: ast.ClassDef) -> Iterator[_Field]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name, annotation, value = statement.target.id, statement.annotation, statement.value
        elif (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
            and not isinstance(statement.value, ast.Lambda)
        ):
            name, annotation, value = statement.targets[0].id, None, statement.value
        else:
            continue
        spelt = ast.unparse(annotation) if annotation else ""
        if name.startswith("_") or name == "model_config" or spelt.startswith(("ClassVar", "typing.ClassVar")):
            continue
        if annotation is None and not _is_field_call(module, value):
            continue  # Pydantic takes no field without a type.
        yield _Field(name, annotation, value, f"{module.file}:{statement.lineno}", module)


def _is_field_call(module: Module, node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and module.full_name(node.func).rpartition(".")[2] == "Field"


def _field_calls(field: _Field) -> list[Call]:
    inside = list(ast.walk(field.annotation)) if field.annotation is not None else []
    nodes = [*inside, field.value]
    return [
        Call("Field", node, "") for node in nodes if isinstance(node, ast.Call) and _is_field_call(field.module, node)
    ]


def _settings_of(code: Codebase, field: _Field, prefix: str, delimiter: str, reader: str, depth: int) -> list[Setting]:
    kind = ast.unparse(field.annotation) if field.annotation is not None else ""
    named, default = _names_and_default(field)
    required = default is None and not _has_default(field)
    names = named or [f"{prefix}{field.name}".upper()]
    nested = _nested(code, field)
    if nested and depth < _DEEPEST:
        # A model of its own: what it requires is read through the delimiter.
        if not required or not delimiter:
            return [] if not required else [_setting(names[0], required, None, kind, field, reader)]
        found = []
        for where, one in _lineage(code, *nested):
            for inner in _fields(where, one):
                found += _settings_of(code, inner, f"{names[0]}{delimiter}", delimiter, reader, depth + 1)
        return found
    return [_setting(names[0], required, default, kind, field, reader)]


def _setting(name: str, required: bool, default: Any, kind: str, field: _Field, reader: str) -> Setting:
    short = _short(kind)
    named_so = secret_scan.is_secret_name(name) and short not in ("bool", "int", "float")
    return Setting(name, required, default, "Secret" in kind or named_so, short, field.where, reader)


def _short(kind: str) -> str:
    kind = re.sub(r"^(?:typing\.)?(?:Annotated|Optional)\[(.*)\]$", r"\1", kind.replace("\n", " "))
    return re.sub(r",\s*(?:Field|AfterValidator|BeforeValidator|NoDecode).*$", "", kind)[:40]


def _has_default(field: _Field) -> bool:
    if field.value is not None and not _is_field_call(field.module, field.value):
        return not (isinstance(field.value, ast.Constant) and field.value.value is ...)
    for call in _field_calls(field):
        first = call.argument(0, "default")
        if first is not None and not (isinstance(first, ast.Constant) and first.value is ...):
            return True
        if call.argument(-1, "default_factory") is not None:
            return True
    return False


def _names_and_default(field: _Field) -> tuple[list[str], Any]:
    """Return the variables that a field names itself, and its default when that is a literal."""
    names: list[str] = []
    default = _value(field.value) if not _is_field_call(field.module, field.value) else None
    for call in _field_calls(field):
        if default is None:
            default = _value(call.argument(0, "default"))
        for keyword in ("validation_alias", "alias", "env"):
            node = call.argument(-1, keyword)
            if isinstance(node, ast.Call) and node.args:  # AliasChoices("A", "b")
                names += [found for item in node.args if (found := text(item))]
            elif isinstance(node, (ast.List, ast.Tuple)):
                names += [found for item in node.elts if (found := text(item))]
            elif found := text(node):
                names.append(found)
    return [name.upper() if name.islower() else name for name in names], default


def _value(node: ast.AST | None) -> Any:
    try:
        value = ast.literal_eval(node) if isinstance(node, ast.expr) else None
        json.dumps(value)
    except (ValueError, TypeError):
        return None  # No literal, or one that no report can hold.
    return value


def _nested(code: Codebase, field: _Field) -> tuple[Module, ast.ClassDef] | None:
    if field.annotation is None:
        return None
    name = field.module.full_name(field.annotation)
    definition = code.find_class(name) if name else None
    if definition is None:
        return None
    bases = [definition[0].full_name(base).rpartition(".")[2] for base in definition[1].bases]
    return definition if any(base == "BaseModel" or base.endswith("Settings") for base in bases) else None


def _reads(module: Module) -> Iterator[Setting]:
    """Yield what is read without a class: os.environ, os.getenv, and the callables of small libraries."""
    guarded = _guarded(module)
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Load)
            and module.full_name(node.value) == "os.environ"
            and (name := text(node.slice))
        ):
            yield _read(name, name not in guarded, None, f"{module.file}:{node.lineno}", "os.environ")
    for call in module.calls:
        name = text(call.argument(0, "key"))
        if not name:
            continue
        if call.name in _GETTERS:
            given = call.argument(1, "default")
            # None is no value to go by, but who asks this way can live with it.
            yield _read(name, False, _value(given), call.where, call.name)
        elif _is_config(call.name):
            given = (
                call.argument(2, "default")
                if call.name == "starlette.config.Config()"
                else call.argument(-1, "default")
            )
            if given is None and call.name.startswith("environs."):
                given = call.argument(1, "default")
            found = _read(name, given is None, _value(given), call.where, call.name.partition("(")[0])
            # `cast=Secret` of Starlette says it, whatever the name.
            yield replace(found, secret=found.secret or "Secret" in ast.unparse(call.node))


def _guarded(module: Module) -> set[str]:
    """Return the variables that the module looks for before it takes them, or does without."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Compare) and any(isinstance(operator, (ast.In, ast.NotIn)) for operator in node.ops):
            found.add(text(node.left))
        elif isinstance(node, ast.Call) and module.full_name(node.func) in _GETTERS and node.args:
            found.add(text(node.args[0]))
        elif isinstance(node, ast.Try) and any(
            "KeyError" in ast.unparse(one.type) for one in node.handlers if one.type
        ):
            found |= {
                text(inner.slice) for part in node.body for inner in ast.walk(part) if isinstance(inner, ast.Subscript)
            }
    return {name for name in found if name}


def _is_config(name: str) -> bool:
    base = re.sub(r"\(\).*$", "", name)
    if base not in _CONFIGS:
        return False
    # decouple and environs make one ready; the others have to be made first.
    return base in ("decouple.config", "environs.env") or name.startswith(f"{base}()")


def _read(name: str, required: bool, default: Any, where: str, reader: str) -> Setting:
    return Setting(name, required, default, secret_scan.is_secret_name(name), "str", where, reader)


def may_hold_credentials(setting: Setting) -> bool:
    """Tell whether a setting is the URL of a server that asks for a password as a rule."""
    return bool(_WITH_CREDENTIALS.search(setting.name)) or setting.kind.endswith("Dsn")
