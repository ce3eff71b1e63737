"""What an app does that a server of several workers, read-only releases and a confined unit do not go along with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from .codebase import Call, Codebase, Module, run_at_import, text

_VERBS = "get|post|put|delete|patch|head|options|request|stream|send"
_BLOCKING = re.compile(
    rf"requests\.(?:api\.)?(?:{_VERBS})|requests\.(?:sessions\.)?Session\(\)\.(?:{_VERBS})"
    rf"|httpx\.(?:{_VERBS})|httpx\.Client\(\)\.(?:{_VERBS})"
    r"|urllib\.request\.(?:urlopen|urlretrieve)|urllib3\.(?:request|PoolManager\(\)\.\w*request)"
    r"|time\.sleep|subprocess\.(?:run|call|check_call|check_output|getoutput|getstatusoutput)|os\.(?:system|popen|wait\w*)"
    r"|psycopg2\.connect|psycopg\.connect|psycopg\.Connection\.connect|pymysql\.connect|MySQLdb\.connect|sqlite3\.connect"
    r"|pyodbc\.connect|socket\.create_connection|smtplib\.SMTP(?:_SSL)?|ftplib\.FTP(?:_TLS)?|pika\.BlockingConnection"
    r"|builtins\.input|input"
)
_CONNECTS = re.compile(r"pymongo\.MongoClient|kafka\.Kafka(?:Producer|Consumer)")
_OWN_PORT = re.compile(
    r"uvicorn\.(?:run|main\.run|Server\(\)\.(?:run|serve))|hypercorn\.(?:run|asyncio\.serve|trio\.serve)|daphne\.server\.Server"
    r"|granian\.Granian\(\)\.serve|waitress\.serve|aiohttp\.web\.run_app|wsgiref\.simple_server\.make_server"
    r"|(?:fastapi\.FastAPI|quart\.Quart|sanic\.Sanic|flask\.Flask|nicegui\.ui)(?:\(\))?\.run|socketserver\.\w+Server"
    r"|http\.server\.\w*HTTPServer|asyncio\.start_server|asyncio\.run"
)
_EXPORTER_PORT = re.compile(r"prometheus_client\.(?:exposition\.)?start_(?:http|wsgi)_server")
_DAEMON = re.compile(r"os\.(?:fork|forkpty|setsid|daemon)|daemon\.DaemonContext(?:\(\)\.open)?|daemonize\.Daemonize")
_PROCESSES = re.compile(r"(?:multiprocessing|multiprocess|billiard)\.(?:Process|Pool|Manager)|subprocess\.Popen")
_SCHEDULERS = re.compile(
    r"apscheduler\.schedulers\.\w+\.\w+Scheduler|schedule\.every|fastapi_utils\.tasks\.repeat_every|"
    r"fastapi_utilities\.repeat_every|rocketry\.Rocketry|aiocron\.crontab"
)
_OPENS = re.compile(r"open|builtins\.open|io\.open|aiofiles\.open|anyio\.open_file|codecs\.open|gzip\.open")
_MAKES = re.compile(
    r"os\.(?:mkdir|makedirs|replace|rename|remove|unlink|rmdir)|shutil\.(?:copy\w*|move|rmtree)|sqlite3\.connect"
    r"|logging\.(?:handlers\.)?\w*FileHandler|aiosqlite\.connect|tinydb\.TinyDB|shelve\.open"
)
_PATH_WRITES = frozenset({"write_text", "write_bytes", "mkdir", "touch", "unlink", "rmdir", "rename", "symlink_to"})
_WRITING = re.compile(r"[wax+]")
_FOLDERS = frozenset({"os.mkdir", "os.makedirs"})
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?!/)(?P<file>[^?:\s'\"]+)")


@dataclass(frozen=True)
class Habit:
    """Something that was seen.

    Attributes:
        kind: `blocks_import`, `blocks_loop`, `port`, `exporter_port`, `daemon`, `processes`, `scheduler`, `writes`,
            `sqlite`, or `creates_tables`.
        what: What the code says.
        where: File and line.
        at_import: Whether it happens as soon as the app is imported.
        serving: Whether it happens while the app serves, as far as that shows.
        conditional: Whether an `if` decides about it.
    """

    kind: str
    what: str
    where: str
    at_import: bool = False
    serving: bool = False
    conditional: bool = False


def read(code: Codebase, modules: list[Module], start: str, factory: str) -> list[Habit]:
    """Return the habits of the modules of an app; `start` is the one that the server imports."""
    found: dict[tuple[str, str], Habit] = {}

    def keep(habit: Habit) -> None:
        found.setdefault((habit.kind, habit.where), habit)

    early = code.calls_at_import(start, factory)
    for call in early:
        for habit in _early(call):
            keep(habit)
    places = {call.where for call in early}
    folders = {str(parent) for name in code.shipped for parent in PurePosixPath(name).parents}
    for module in modules:
        constants = _own_folders(module)
        for call in module.calls:
            for habit in _anywhere(call):
                keep(habit)
            if what := _writes(module, call, constants, folders):
                keep(Habit("writes", what, call.where, call.where in places, call.serving))
        for node in _sqlite(module):
            found_file = _SQLITE.search(node.value if isinstance(node.value, str) else "")
            if found_file:
                keep(Habit("sqlite", found_file["file"], f"{module.file}:{node.lineno}"))
    return list(found.values())


def _early(call: Call) -> Iterator[Habit]:
    if (_BLOCKING.fullmatch(call.name) and not _in_memory(call)) or _CONNECTS.fullmatch(call.name):
        yield Habit("blocks_import", call.name, call.where, True, conditional=call.conditional)
    if _OWN_PORT.fullmatch(call.name) and call.name != "asyncio.run":
        yield Habit("port", call.name, call.where, True, conditional=call.conditional)
    if _EXPORTER_PORT.fullmatch(call.name):
        yield Habit("exporter_port", call.name, call.where, True, conditional=call.conditional)
    if _DAEMON.fullmatch(call.name):
        yield Habit("daemon", call.name, call.where, True, conditional=call.conditional)
    if _PROCESSES.fullmatch(call.name):
        yield Habit("processes", call.name, call.where, True, conditional=call.conditional)


def _in_memory(call: Call) -> bool:
    return call.name == "sqlite3.connect" and text(call.argument(0, "database")) == ":memory:"


def _anywhere(call: Call) -> Iterator[Habit]:
    if call.asynchronous and _BLOCKING.fullmatch(call.name) and not _in_memory(call):
        yield Habit("blocks_loop", call.name, call.where)
    if _EXPORTER_PORT.fullmatch(call.name):
        yield Habit("exporter_port", call.name, call.where, serving=call.serving, conditional=call.conditional)
    if _DAEMON.fullmatch(call.name):
        yield Habit("daemon", call.name, call.where, serving=call.serving, conditional=call.conditional)
    if call.name.endswith("metadata.create_all"):
        yield Habit("creates_tables", call.name, call.where, serving=call.serving, conditional=call.conditional)
    if any(_creates(node) for node in call.node.args):  # await connection.run_sync(Base.metadata.create_all)
        yield Habit(
            "creates_tables", "metadata.create_all", call.where, serving=call.serving, conditional=call.conditional
        )
    if _SCHEDULERS.fullmatch(call.name):
        yield Habit("scheduler", call.name, call.where)


def _creates(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "create_all"


def _own_folders(module: Module) -> dict[str, ast.AST]:
    """Return the names of a module that stand for paths inside the source, with what they are bound to."""
    found: dict[str, ast.AST] = {}
    for node in run_at_import(module.tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if _is_own(module, node.value, found):
                found |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    return found


def _is_own(module: Module, node: ast.AST, constants: Mapping[str, ast.AST]) -> bool:
    """Tell whether an expression is a path inside the source: one of __file__, or a relative one."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    calls_ = [module.full_name(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    if any(name.startswith(("tempfile.", "os.environ", "os.getenv")) for name in calls_):
        return False
    if "__file__" in names or names & constants.keys():
        return True
    if isinstance(node, ast.Call) and module.full_name(node.func).rpartition(".")[2] in ("Path", "PurePath"):
        return bool(node.args) and _is_relative(text(node.args[0]))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _is_own(module, node.left, constants)
    if isinstance(node, ast.Call) and module.full_name(node.func) in ("os.path.join", "os.path.abspath"):
        return bool(node.args) and (_is_relative(text(node.args[0])) or _is_own(module, node.args[0], constants))
    return False


def _is_relative(path: str | None) -> bool:
    return (
        path is not None and bool(path) and not path.startswith(("/", "~")) and "://" not in path and path != ":memory:"
    )


def _writes(module: Module, call: Call, constants: Mapping[str, ast.AST], folders: set[str]) -> str:
    """Return what a call writes inside the source, as it is spelt; empty for nothing of the kind."""
    target: ast.AST | None = None
    if _OPENS.fullmatch(call.name):
        mode = text(call.argument(1, "mode")) or "r"
        target = call.argument(0, "file") if _WRITING.search(mode) else None
    elif _MAKES.fullmatch(call.name):
        last = call.name.rpartition(".")[2]
        position = 1 if last.startswith(("copy", "move", "replace", "rename")) else 0
        target = call.argument(position, "filename", "path", "name", "dst", "database")
    elif call.name == "loguru.logger.add":
        target = call.argument(0, "sink")
    elif isinstance(call.node.func, ast.Attribute):
        method, base = call.node.func.attr, call.node.func.value
        if method in _PATH_WRITES or (method == "open" and _WRITING.search(text(call.argument(0, "mode")) or "r")):
            is_path = isinstance(base, (ast.BinOp, ast.Call)) or getattr(base, "id", "") in constants
            there = method == "mkdir" and _is_there(call, base, constants, folders)
            own = is_path and not there and _is_own(module, base, constants)
            return ast.unparse(call.node)[:80] if own else ""
    if target is None or (call.name in _FOLDERS and _is_there(call, target, constants, folders)):
        return ""
    own = _is_relative(text(target)) or _is_own(module, target, constants) or _is_relative_text(target)
    return ast.unparse(call.node)[:80] if own else ""


def _is_there(call: Call, target: ast.AST, constants: Mapping[str, ast.AST], folders: set[str]) -> bool:
    """Tell whether a folder is made only if the release does not have it, and the release has it."""
    allowed = call.argument(-1, "exist_ok")
    if not (isinstance(allowed, ast.Constant) and allowed.value is True):
        return False
    parts = "/".join(part.strip("./") for part in _parts(target, constants, 0)).strip("/")
    return not parts or any(f"/{folder}/".endswith(f"/{parts}/") for folder in folders)


def _parts(node: ast.AST, constants: Mapping[str, ast.AST], depth: int) -> Iterator[str]:
    """Yield the literal parts of a path, those of the names in it first."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id in constants and depth < 5:
            yield from _parts(constants[inner.id], constants, depth + 1)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def _is_relative_text(node: ast.AST) -> bool:
    """Tell whether an f-string begins with a relative path."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else None
    start = text(first)
    return start is not None and "/" in start and _is_relative(start)


def _sqlite(module: Module) -> Iterator[ast.Constant]:
    documentation = {
        id(node.value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node


def workers(modules: Iterable[Module]) -> dict[str, tuple[list[str], str]]:
    """Return the background commands that the source is made for: name to the command, and where that shows."""
    found: dict[str, tuple[list[str], str]] = {}
    for module in modules:
        for name, node in module.names.bound.items():
            made = module.full_name(node.func) if isinstance(node, ast.Call) else ""
            where = f"{module.file}:{getattr(node, 'lineno', 1)}"
            if made in ("celery.Celery", "celery.app.Celery"):
                found.setdefault("worker", (["celery", "-A", f"{module.name}:{name}", "worker"], where))
                if _beat(module):
                    found.setdefault("beat", (["celery", "-A", f"{module.name}:{name}", "beat"], where))
            elif made.startswith("taskiq") and made.endswith("Broker"):
                found.setdefault("worker", (["taskiq", "worker", f"{module.name}:{name}"], where))
            elif made.startswith("faststream.") and made.endswith("FastStream"):
                found.setdefault("worker", (["faststream", "run", f"{module.name}:{name}"], where))
            elif made in ("huey.RedisHuey", "huey.SqliteHuey", "huey.Huey"):
                found.setdefault("worker", (["huey.bin.huey_consumer", f"{module.name}.{name}"], where))
            elif isinstance(node, ast.ClassDef) and name.endswith("WorkerSettings") and _imports_arq(name, module):
                found.setdefault("worker", (["arq", f"{module.name}.{name}"], where))
        actors = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for function in actors:
            decorated = [
                module.full_name(item.func if isinstance(item, ast.Call) else item) for item in function.decorator_list
            ]
            if "dramatiq.actor" in decorated:
                found.setdefault("worker", (["dramatiq", module.name], f"{module.file}:{function.lineno}"))
    return found


def _imports_arq(name: str, module: Module) -> bool:
    return name == "WorkerSettings" or any(full.partition(".")[0] == "arq" for full in module.aliases.values())


def _beat(module: Module) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == "beat_schedule" for node in ast.walk(module.tree)
    ) or any(isinstance(node, ast.keyword) and node.arg == "beat_schedule" for node in ast.walk(module.tree))
