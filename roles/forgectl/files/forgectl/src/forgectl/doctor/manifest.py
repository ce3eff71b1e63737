"""What provisioning left on this host, written down at the end of site.yml, so that a change since then shows.

It holds digests, modes and owners, no content: the files that bear Ansible's mark or are named after the project, all
of a few folders whose every file takes effect, and the kernel's settings as they were then. What forgectl itself
writes is not in it: descriptions, inputs and drop-ins are compared with the releases that they belong to.

A run answers for what has changed since it began; for everything else the older word counts, so that no run takes for
granted what somebody changed or added by hand before. A whole run also forgets what it wrote no more and is gone.
"""

import grp
import hashlib
import os
import pwd
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from forgectl import regular
from forgectl.errors import Refused
from forgectl.layout import names, write_atomically
from forgectl.lock import person
from forgectl.state import now

MANIFEST = "/var/lib/forge/manifest.json"
MARK = b"Ansible managed"
# A header of it stands within the first lines.
HEAD_BYTES = 512
# Secrets, what changes by itself, and what forgectl compares with releases.
LEFT_OUT = (
    "etc/credstore.encrypted",
    "etc/forge/apps",
    "etc/letsencrypt",
    "etc/nginx/tls",
    "etc/ssl",
    "etc/alternatives",
)
ELSEWHERE = (
    "usr/local/sbin/forge*",
    "usr/sbin/policy-rc.d",
    "usr/local/share/ca-certificates/*.crt",
    "etc/needrestart/restart.d/nginx.service",
    "etc/systemd/system/*.wants/nginx.service",
    "etc/systemd/system/*.wants/fail2ban.service",
)
# Each file in one of these takes effect, whoever put it there.
WHOLE = ("etc/nginx/forge/*.conf", "etc/nginx/conf.d/*.conf", "etc/ssh/sshd_config.d/*.conf", "etc/sudoers.d/*")
UNITS = ("etc/systemd/system", "etc/systemd/system.control")
OWN_UNITS = ("forge-*", "nginx.service", "postgresql*.service", "fail2ban.service")
# What forgectl writes, and compares with the releases that it is of.
OWN_DROP_IN, OWN_UNIT = "release.conf", b"# Made by forgectl"
SYSCTL = "etc/sysctl.d/90-forge.conf"
# How differences begin, or end, that are not of a file which site.yml writes.
SETTING, ADDED = "kernel setting", "was added"
# What is none has no content, whatever can be read from it.
NO_FILE = "no regular file"


class Mark(msgspec.Struct, frozen=True):
    """What a path was: `content` is the SHA-256 of a file, `-> TARGET` of a link, or that it is neither."""

    content: str
    mode: str
    owner: str


class Manifest(msgspec.Struct, frozen=True):
    """All of it: when and by whom site.yml last came to its end, for which apps."""

    at: str
    by: str
    apps: list[str]
    files: dict[str, Mark]
    settings: dict[str, str]
    version: int = 1


class Difference(NamedTuple):
    """A path, or a setting of the kernel, and how it differs, in words."""

    what: str
    how: str


def load(root: Path = Path("/")) -> Manifest | None:
    """Read the manifest; None where there is none.

    Raises:
        Refused: it is damaged.
    """
    path = root / MANIFEST.lstrip("/")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise Refused(
            f"expected what provisioning left in {path}; found: {error}; run site.yml, which writes it"
        ) from error


def record(root: Path, *, since: float, whole: bool = False, accept: bool = False, dry_run: bool = False) -> bool:
    """Write down what a run that began at `since` (Unix time) left; `whole` where it was one of all of site.yml.

    With `accept`, all that is there is taken for what provisioning left.

    Returns:
        Whether that is another than before. Where no whole run came to its end yet, one of a part writes nothing.
    """
    before = load(root)
    if before is None and not (whole or accept):
        return False
    files, settings = scan(root), kernel(root)
    if before is not None and not accept:
        files = _merged(root, before.files, files, since, whole)
        if not _touched(root / SYSCTL, since):
            settings = before.settings
    found = Manifest(now(), person(), names(root), files, settings)
    if before and (before.files, before.settings, before.apps) == (files, settings, found.apps):
        return False
    if not dry_run:
        path = root / MANIFEST.lstrip("/")
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.format(msgspec.json.encode(found), indent=2), 0o600)
    return True


def differences(root: Path, manifest: Manifest, out_of_service: Iterable[str] = ()) -> list[Difference]:
    """What is not as it was written down; apps that were removed since may lack what is theirs."""
    gone = {*out_of_service, *(set(manifest.apps) - set(names(root)))}
    found = []
    for name, was in manifest.files.items():
        mark = _mark(root / name)
        if mark is None:
            if not any(_belongs(name, app) for app in gone):
                found.append(Difference(f"/{name}", "is gone"))
        elif how := _changed(was, mark):
            found.append(Difference(f"/{name}", how))
    found += [
        Difference(f"/{name}", ADDED)
        for name in _effective(root, manifest.apps)
        if name not in manifest.files and not any(_belongs(name, app) for app in gone)
    ]
    present = kernel(root)
    found += [
        Difference(f"{SETTING} {name}", f"is {present.get(name, 'gone')} and was {was}")
        for name, was in manifest.settings.items()
        if present.get(name) != was
    ]
    return found


def scan(root: Path) -> dict[str, Mark]:
    """What provisioning wrote, as far as that shows, and what takes effect beside it."""
    apps = names(root)
    paths = {*_marked(root), *_effective(root, apps)}
    paths |= {str(path.relative_to(root)) for pattern in ELSEWHERE for path in root.glob(pattern)}
    found = {name: _mark(root / name) for name in sorted(paths)}
    return {name: mark for name, mark in found.items() if mark}


def kernel(root: Path) -> dict[str, str]:
    """The kernel's settings that provisioning names, as they are in force."""
    try:
        text = (root / SYSCTL).read_text()
    except OSError:
        return {}
    found = {}
    for name in re.findall(r"^\s*-?([\w./-]+)\s*=", text, re.MULTILINE):
        with suppress(OSError):
            found[name] = " ".join((root / "proc/sys" / name.replace(".", "/")).read_text().split())
    return found


def _marked(root: Path) -> Iterator[str]:
    """Files of /etc that are named after the project, or bear Ansible's mark."""
    for parent, folders, files in os.walk(root / "etc"):
        inside = os.path.relpath(parent, root)
        folders[:] = [each for each in folders if os.path.join(inside, each) not in LEFT_OUT]  # noqa: PTH118
        for file in files:
            name = os.path.join(inside, file)  # noqa: PTH118
            if file == OWN_DROP_IN or file.endswith((".removed", ".new", "~", ".swp")):
                continue
            path = root / name
            if path.is_symlink():
                if "forge" in file:
                    yield name
                continue
            head = _head(path)
            if ("forge" in name or MARK in head) and OWN_UNIT not in head:
                yield name


def _effective(root: Path, apps: Iterable[str]) -> Iterator[str]:
    """Files that take effect by where they lie: drop-ins of units that are the platform's, sites, rules of SSH."""
    for pattern in WHOLE:
        yield from (str(path.relative_to(root)) for path in root.glob(pattern))
    units = [*OWN_UNITS, *(f"{app}{kind}" for app in apps for kind in ("@*", ".*", "-migrate@*", "-lease@*"))]
    for folder in UNITS:
        for unit in units:
            drop_ins = (path for path in root.glob(f"{folder}/{unit}.d/*.conf") if path.name != OWN_DROP_IN)
            masked = (path for path in root.glob(f"{folder}/{unit}") if path.is_symlink())
            yield from (str(path.relative_to(root)) for path in (*drop_ins, *masked))


def _head(path: Path) -> bytes:
    try:
        with regular.opened(path) as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _mark(path: Path) -> Mark | None:
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content, mode = f"-> {path.readlink()}", ""
        elif stat.S_ISDIR(status.st_mode):
            return None
        else:
            content, mode = _content(path, status.st_mode), f"{stat.S_IMODE(status.st_mode):04o}"
    except OSError:
        return None
    return Mark(content, mode, _owner(status.st_uid, status.st_gid))


def _content(path: Path, mode: int) -> str:
    if not stat.S_ISREG(mode):
        return NO_FILE
    with regular.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _owner(uid: int, gid: int) -> str:
    user, group = str(uid), str(gid)
    with suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(gid).gr_name
    return f"{user}:{group}"


def _changed(was: Mark, present: Mark) -> str:
    if was.content != present.content:
        if present.content == NO_FILE:
            return f"is {NO_FILE}"
        return f"leads {present.content}" if present.content.startswith("->") else "has another content"
    if was.mode != present.mode:
        return f"has mode {present.mode}, not {was.mode}"
    return f"belongs to {present.owner}, not {was.owner}" if was.owner != present.owner else ""


def _merged(
    root: Path, before: Mapping[str, Mark], present: Mapping[str, Mark], since: float, whole: bool
) -> dict[str, Mark]:
    """What a run leaves: its own word for what it touched, the older one for the rest."""
    found = {}
    for name in sorted(before.keys() | present.keys()):
        was, mark = before.get(name), present.get(name)
        if mark:
            chosen = mark if _touched(root / name, since) else was
        else:
            chosen = None if whole or _touched((root / name).parent, since) else was
        if chosen:
            found[name] = chosen
    return found


def _touched(path: Path, since: float) -> bool:
    """Whether a path was changed since a time: a rename into place counts, and nobody can set that clock back."""
    try:
        return path.lstat().st_ctime >= since
    except OSError:
        return False


def _belongs(name: str, app: str) -> bool:
    """Whether a path is an app's own, by its name."""
    last = name.rpartition("/")[2]
    own = re.escape(app)
    return bool(re.search(rf"^{own}(@|\.|-migrate@|-lease@)|@{own}\.|^forge-{own}\.conf$", last)) or f"/{app}@" in name
