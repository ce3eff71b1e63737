"""One file with what somebody else needs to help: the state of this host, without its secrets.

Everything is collected and scrubbed in memory, each part within bounds, and written at the end in one go: the file is
there whole or not at all. A part that can't be had is named in the manifest, and ends nothing.
"""

import errno
import hashlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from forge.secret_scan import is_secret_name

from forgectl import config, layout, systemd
from forgectl.config import App
from forgectl.errors import ForgeError, Refused, explain
from forgectl.layout import Layout
from forgectl.lock import person
from forgectl.scrub import Scrubber

# Of each part, the most that is taken, and how long it may take; and all of them together.
PART_BYTES, LOG_BYTES = 256 * 1024, 512 * 1024
PART_SECONDS, SECONDS = 15.0, 120.0
# Its own, of what it runs.
NOTE = (
    "Secrets were taken out by their value, where this host knows it, and by their shape; <scrubbed: ...> stands in "
    "their place. Addresses of clients and what apps log of people are still in it: hand it to nobody who may not see "
    "them."
)
POSTGRES = {
    "settings": "SELECT name, setting, unit, source FROM pg_settings WHERE source NOT IN ('default', 'override')",
    "connections": "SELECT datname, usename, application_name, state, wait_event_type, wait_event, count(*), "
    "max(now() - state_change) AS longest FROM pg_stat_activity GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 7 DESC",
    "databases": "SELECT datname, pg_size_pretty(pg_database_size(oid)) AS size, datconnlimit FROM pg_database",
    "activity": "SELECT datname, numbackends, xact_commit, xact_rollback, deadlocks, temp_bytes, stats_reset "
    "FROM pg_stat_database WHERE datname IS NOT NULL",
    "locks": "SELECT locktype, mode, granted, count(*) FROM pg_locks GROUP BY 1, 2, 3 ORDER BY 4 DESC",
    "roles": "SELECT rolname, rolcanlogin, rolconnlimit FROM pg_roles WHERE rolname NOT LIKE 'pg\\_%'",
}


@dataclass(frozen=True)
class Part:
    """Something to collect: the name that it gets, where it comes from in words, and how it is had."""

    name: str
    what: str
    collect: Callable[[], "Found"]


@dataclass(frozen=True)
class Found:
    """What there was: the text, whether its older part is missing, and how a command ended."""

    data: bytes
    truncated: bool = False
    exit: int = 0


@dataclass
class Known:
    """Values that are secret here, each with what it is, and what could not be opened."""

    values: dict[str, str] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)
    closed: list[str] = field(default_factory=list)

    def add(self, value: str, label: str) -> None:
        """Remember a value, and what it holds if it is JSON."""
        if not value.strip():
            return
        self.values.setdefault(value, label)
        self.values.setdefault(value.strip(), label)
        with suppress(ValueError):
            for leaf in _leaves(json.loads(value)):
                self.values.setdefault(leaf, label)


def bundle(*, since: str, root: Path = Path("/"), parts: Sequence[Part] | None = None) -> tuple[bytes, dict[str, Any]]:
    """Collect and scrub all parts: the archive, and its manifest.

    `since` is how far logs go back, as journalctl takes it. `parts` are those of this host, but in tests.
    """
    systemd.step_back()
    apps = described(root)
    known = secrets(apps, root)
    scrubber = Scrubber(known.values, known.public)
    began = datetime.now(UTC)
    deadline = time.monotonic() + SECONDS
    name = f"forge-support-{os.uname().nodename}-{began:%Y%m%dT%H%M%SZ}"
    manifest: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "host": os.uname().nodename,
        "at": began.isoformat(timespec="seconds"),
        "by": person(),
        # Named after what it was made of.
        "forgectl": Path(sys.prefix).name,
        "since": since,
        "note": NOTE,
        "parts": [],
    }
    texts: dict[str, bytes] = {}
    for part in plan(apps, since, root) if parts is None else parts:
        entry, data = _collected(part, scrubber, late=time.monotonic() > deadline)
        manifest["parts"].append(entry)
        if data is not None:
            texts[entry["name"]] = data
    manifest["scrubbed"] = {
        "values_known": len(known.values),
        "taken_out": dict(sorted(scrubber.counts.items())),
        "too_short_to_look_for": sorted(set(scrubber.too_short)),
        "not_opened": known.closed,
    }
    texts["manifest.json"] = scrubber(json.dumps(manifest, indent=2, ensure_ascii=False)).encode()
    return _archive(name, texts, began), manifest


def described(root: Path = Path("/")) -> dict[str, App | None]:
    """The apps of this host by name; None where the description can't be read."""
    found: dict[str, App | None] = {}
    for name in layout.names(root):
        try:
            found[name] = config.load(Layout(name, root).description)
        except (ForgeError, OSError):
            found[name] = None
    return found


def secrets(apps: Mapping[str, App | None], root: Path = Path("/")) -> Known:
    """What is secret on this host: of running processes, sealed, leased, set, and of whoever calls."""
    known = Known()
    wanted: dict[str, set[str]] = {}
    for name, app in apps.items():
        known.public |= {name, f"{name}-migrate"}
        wanted[name] = set()
        for each in (app, *_released(Layout(name, root))):
            if each is not None:
                wanted[name] |= _variables(each, known.public)
                for variable, value in each.settings.items():
                    if is_secret_name(variable):
                        known.add(value, f"{variable} of {name}")
    for name, environment in _environments(list(apps), root):
        for variable, value in environment.items():
            if variable in wanted[name] or is_secret_name(variable):
                known.add(value, f"{variable} of {name}")
            elif password := _password(value):
                known.add(password, f"password in {variable} of {name}")
    for path in sorted((root / "etc/credstore.encrypted").glob("*")):
        try:
            # Whatever name is sealed into it.
            known.add(systemd.decrypt(path, ""), path.name)
        except (ForgeError, UnicodeDecodeError):
            known.closed.append(path.name)
    for path in sorted((root / "run/forge-lease").glob("*/*")):
        if path.is_file():
            known.add(path.read_text(errors="replace"), f"lease {path.parent.name}")
    for variable, value in os.environ.items():
        if is_secret_name(variable):
            known.add(value, f"{variable} of the caller")
    return known


def _released(paths: Layout) -> Iterator[App]:
    """The app as its releases have it, whose variables may be others."""
    for path in sorted(paths.releases.glob("*/settings.toml")):
        with suppress(ForgeError, OSError):
            yield config.load(path)


def _variables(app: App, public: set[str]) -> set[str]:
    """The variables whose values are secret; `public` gets what only looks like it."""
    mapped = dict(app.secrets.variables) | (dict(app.migration.variables) if app.migration else {})
    public |= {*mapped.values(), app.domain, *app.settings.values()} - {
        value for variable, value in app.settings.items() if is_secret_name(variable)
    }
    found = set(mapped)
    if app.database:
        database = app.database
        public |= {database.name, *database.app_roles, database.migrate_role or "", database.url, database.app_key}
        public |= {database.migrate_key, database.migrate_url}
    return found


def _password(value: str) -> str:
    """The password of a URL, as it stands there."""
    with suppress(ValueError):
        return urlsplit(value).password or "" if "://" in value else ""
    return ""


def _environments(apps: Sequence[str], root: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The environment of each process of an app's units."""
    units = re.compile(r"/(" + "|".join(map(re.escape, apps)) + r")(?:-migrate@|-lease@|@|\.)[^/\s]*\.service")
    for process in (root / "proc").glob("[0-9]*") if apps else ():
        # Any of them may end meanwhile.
        with suppress(OSError):
            if found := units.search((process / "cgroup").read_text()):
                pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                yield found[1], dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def plan(apps: Mapping[str, App | None], since: str, root: Path = Path("/")) -> Iterator[Part]:
    """All that is collected on a host, what explains most first."""
    me = (sys.executable, "-m", "forgectl")
    yield _command("forgectl/doctor.json", *me, "doctor", "--json")
    yield _command("forgectl/status.txt", *me, "status")
    yield _command("forgectl/status.json", *me, "status", "--json")
    yield _command("forgectl/alerts.json", *me, "alerts", "status", "--json")
    for name in apps:
        yield _command(f"forgectl/history-{name}.json", *me, "history", name, "--lines=200", "--json")
    yield from _journals(apps, since)
    for path in _files(root, "etc/forge/**/*", "etc/nginx/forge/*", "var/lib/forge/**/*.json"):
        yield _file(path, root)
    for path in _files(root, "srv/*/releases/*/release.json", "var/lib/forge-alerts/*.json"):
        yield _file(path, root)
    for path in _files(
        root,
        "etc/systemd/journald.conf.d/*forge*",
        "etc/systemd/system/forge-*",
        "etc/systemd/system/*@.service",
        "etc/systemd/system/*@.service.d/*",
        "etc/systemd/system/*@.socket",
        "etc/systemd/system/nginx.service.d/*",
        *(f"etc/systemd/system/{name}[@.-]*/*.conf" for name in apps),
        *(f"etc/systemd/system/{name}.*" for name in apps),
        "etc/logrotate.d/forge",
        "etc/apt/apt.conf.d/*forge*",
        "etc/needrestart/conf.d/*forge*",
        "etc/sysctl.d/*forge*",
        "etc/ssh/sshd_config.d/*forge*",
        "etc/fail2ban/jail.d/*forge*",
        "etc/os-release",
        "var/log/apt/history.log",
        "var/log/unattended-upgrades/unattended-upgrades.log",
    ):
        yield _file(path, root)
    yield _command("nginx/configuration.txt", "nginx", "-T")
    yield _command("nginx/build.txt", "nginx", "-V")
    for path in _files(root, "var/log/nginx/*.json", "var/log/nginx/error.log"):
        yield _file(path, root, LOG_BYTES)
    yield from _postgresql(root)
    for name, line in {
        "packages": "dpkg-query --show --showformat=${Package}\\t${Version}\\t${db:Status-Abbrev}\\n",
        "kernel": "uname -a",
        "uptime": "uptime",
        "memory": "free -m",
        "disks": "df -hT",
        "inodes": "df -i",
        "blocks": "lsblk --output NAME,SIZE,TYPE,FSTYPE,MOUNTPOINTS",
        # Without arguments, which may hold anything.
        "processes": "ps -eo pid,ppid,user,rss,pcpu,etimes,stat,comm --sort=-rss",
        "sockets": "ss -s",
        "listeners": "ss -lntupH",
        "addresses": "ip -brief address",
        "routes": "ip route",
        "clock": "timedatectl show",
        "failed": "systemctl --failed --no-pager --plain",
        "timers": "systemctl list-timers --all --no-pager",
        "units": "systemctl list-units --all --no-pager --plain --no-legend",
        "boots": "journalctl --list-boots --no-pager",
        "journal": "journalctl --disk-usage --header --no-pager",
        "firewall": "nft list ruleset",
        "outdated": "needrestart -b",
        "updates": "apt-get --simulate --quiet upgrade",
    }.items():
        yield _command(f"system/{name}.txt", *line.split())


def _journals(apps: Mapping[str, App | None], since: str) -> Iterator[Part]:
    chosen: dict[str, list[str]] = {
        "alerts": ["--priority=err", "--grep=^ALERT", "--lines=500"],
        "errors": ["--priority=err", "--lines=1000"],
        "kernel": ["--dmesg", "--boot=all", "--priority=warning", "--lines=1000"],
        "forge": ["--unit=forge-*", "--lines=3000"],
        "nginx": ["--unit=nginx.service", "--lines=1000"],
        "postgresql": ["--unit=postgresql*", "--lines=1000"],
        "updates": ["--unit=apt-daily*", "--unit=unattended-upgrades*", "--lines=1000"],
    }
    for name in apps:
        units = (f"{name}@*", f"{name}.*", f"{name}-migrate@*", f"{name}-lease@*", f"forge-*@{name}.service")
        chosen[f"app-{name}"] = [*(f"--unit={unit}" for unit in units), "--lines=5000"]
    # Where there is a --since, journalctl before systemd 254 has --lines count from there, but for --reverse.
    options = ("--no-pager", "--no-hostname", "--output=short-iso-precise", f"--since={since}", "--reverse", "--quiet")
    for name, match in chosen.items():
        yield _command(f"journal/{name}.txt", "journalctl", *options, *match, limit=LOG_BYTES, newest_first=True)


def _postgresql(root: Path) -> Iterator[Part]:
    if not (root / "etc/postgresql").exists():
        return
    yield _command("postgresql/clusters.txt", "pg_lsclusters")
    settings = ("env", "PGCONNECT_TIMEOUT=5", "PGOPTIONS=-c statement_timeout=5000")
    for name, query in POSTGRES.items():
        call = (
            "runuser",
            "--user=postgres",
            "--",
            *settings,
            "psql",
            "--no-psqlrc",
            "--command",
            query,
        )
        yield _command(f"postgresql/{name}.txt", *call)
    for path in _files(root, "var/log/postgresql/*.log"):
        yield _file(path, root, LOG_BYTES)


def _files(root: Path, *patterns: str) -> Iterator[Path]:
    """Files that are there; links only where they lead to one below the same folder."""
    for path in dict.fromkeys(each for pattern in patterns for each in sorted(root.glob(pattern))):
        with suppress(OSError):
            if path.is_file() and path.resolve().is_relative_to(root.resolve()):
                yield path


def _file(path: Path, root: Path, limit: int = PART_BYTES) -> Part:
    name = str(path.relative_to(root))
    return Part(f"files/{name}", f"/{name}", lambda: _tail(path, limit))


def _command(name: str, *command: str, limit: int = PART_BYTES, newest_first: bool = False) -> Part:
    shown = ["forgectl", *command[3:]] if command[:3] == (sys.executable, "-m", "forgectl") else command
    return Part(name, " ".join(shown), lambda: _run(command, limit, newest_first=newest_first))


def _tail(path: Path, limit: int) -> Found:
    """The end of a file, from the beginning of a line on."""
    # A link of root's is the platform's. One that a service made in its own folder may lead to what it may not read.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    if not (path.is_symlink() and path.lstat().st_uid in (0, os.geteuid())):
        flags |= os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - limit))
        data = file.read(limit)
    return Found(data.partition(b"\n")[2], truncated=True) if size > limit else Found(data)


def _run(command: Sequence[str], limit: int, *, newest_first: bool = False) -> Found:
    """The newest of what a command prints, in whole lines: its end, or its beginning; however much that is."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "PAGER": "cat"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    output, deadline = process.stdout.fileno(), time.monotonic() + PART_SECONDS
    kept, truncated = b"", False
    try:
        while select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
            chunk = os.read(output, 1 << 16)
            kept += chunk
            if newest_first and len(kept) > limit:
                return Found(kept[:limit].rpartition(b"\n")[0] + b"\n", truncated=True)
            if len(kept) > 2 * limit:
                kept, truncated = kept[-limit:], True
            if not chunk or time.monotonic() > deadline:
                break
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        # And what it has begun, which may hold the other end of the pipe for as long as it likes.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    if len(kept) > limit:
        kept, truncated = kept[-limit:], True
    return Found(kept.partition(b"\n")[2] if truncated else kept, truncated, process.returncode)


def _collected(part: Part, scrubber: Scrubber, *, late: bool) -> tuple[dict[str, Any], bytes | None]:
    """What the manifest says of a part, and the part; None of one that is left out."""
    entry: dict[str, Any] = {"name": scrubber(part.name), "what": scrubber(part.what)}
    if late:
        return {**entry, "left_out": f"all of it took more than {SECONDS:g} s"}, None
    before = scrubber.counts.total()
    try:
        found = part.collect()
    except OSError as error:
        return {**entry, "left_out": explain(error)}, None
    text = scrubber(found.data.decode(errors="replace"))
    if label := scrubber.leak(text):
        # It can't be, and if it is, it stays here.
        return {**entry, "left_out": f"{label} would not come out of it"}, None
    data = text.encode()
    entry |= {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "truncated": found.truncated,
        "exit": found.exit,
        "scrubbed": scrubber.counts.total() - before,
    }
    return entry, data


def _archive(name: str, texts: Mapping[str, bytes], at: datetime) -> bytes:
    """All of it as a compressed tar, the manifest first."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in ["manifest.json", *(path for path in texts if path != "manifest.json")]:
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size, member.mode, member.mtime = len(texts[path]), 0o600, int(at.timestamp())
            tar.addfile(member, io.BytesIO(texts[path]))
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    """Write a file that was not there, for its owner alone: it is there whole or not at all.

    Raises:
        Refused: there is one, or the disk refused something.
    """
    try:
        with _unnamed(path) as (descriptor, source):
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(descriptor)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # Python follows the link in /proc only where a folder is given, which an absolute path needs not.
                os.link(source, path, src_dir_fd=folder, follow_symlinks=True)
                os.fsync(folder)
            finally:
                os.close(folder)
    except FileExistsError:
        raise Refused(f"expected no file {path}; found one; name another with --output") from None
    except OSError as error:
        raise Refused(f"expected to write {path}; found: {explain(error)}; name another with --output") from error


@contextmanager
def _unnamed(path: Path) -> Iterator[tuple[int, str]]:
    """A file beside `path` that is gone with whoever writes it, and under what it can be linked to a name."""
    try:
        # https://man7.org/linux/man-pages/man2/open.2.html, O_TMPFILE
        descriptor, name = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o600), ""
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        # A file system that knows none: there only a kill without notice leaves something.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        yield descriptor, name or f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
        if name:
            Path(name).unlink()


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, str):
        yield value
