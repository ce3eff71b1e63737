"""The state machine of a release: stage, build, check, migrate, start, gate, swap, drain, record, prune.

What a crash at any step leaves behind, and how `recover` at the start of the next command repairs it:

    staging, pruning    releases/.ID.incomplete, removed; a release folder appears and disappears by one rename
    building            an environment without its .complete marker, built anew; its unit is stopped
    migrating           the migration's unit may still run, and is waited for: half a migration is worse than a late one
    starting            operation "starting", live.sock leads to the old slot: the new one is stopped
    between the rename of live.sock and the write after it
                        operation "starting", live.sock leads to the new slot: traffic decides, so the new one is live.
                        After a reboot there is no live.sock, and the old one is started: it was not stopped yet
    draining            operation "draining": the old slot is drained and stopped
"""

import compileall
import grp
import gzip
import hashlib
import os
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

from forgectl import database, identity, slots, state, systemd, venv
from forgectl.config import App
from forgectl.errors import CandidateFailed, ForgeError, Refused, explain
from forgectl.layout import SLOTS, Layout, fsync_directory, walk
from forgectl.lock import person
from forgectl.state import Entry, Operation, Slotted, State

Say = Callable[[str], None]
INPUTS = ("gunicorn.conf.py", "slot.conf")
GZIP_MAGIC = b"\x1f\x8b"


class Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """release.json. `digest` covers source and settings, `source_digest` the uploaded archive alone."""

    id: str
    digest: str
    source_digest: str
    venv: str
    at: str
    by: str
    schema_heads: list[str] | None = None


class Result(msgspec.Struct, frozen=True):
    """What a release did, or would do; phases in seconds."""

    app: str
    changed: bool
    release: str | None
    previous: str | None
    slot: str | None
    upload_needed: bool
    plan: list[str]
    phases: dict[str, float]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def digest_of(layout: Layout, source_digest: str) -> str:
    """The digest of a release: its source, its settings, its Gunicorn configuration and its unit."""
    whole = hashlib.sha256()
    for part in (source_digest.encode(), layout.description.read_bytes(), *map(Path.read_bytes, _inputs(layout))):
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def records(layout: Layout) -> list[Record]:
    """The releases on disk, oldest first."""
    found = []
    for path in sorted(layout.releases.glob("[0-9]*/release.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Record))
        except msgspec.DecodeError as error:
            raise Refused(f"expected the record of a release in {path}; found: {error}; remove that folder") from error
    return found


def release(
    layout: Layout, app: App, *, archive: Path | None, source_digest: str | None, dry_run: bool, say: Say
) -> Result:
    """Put a source with the present settings into service, or say what that would do.

    Raises:
        Refused: nothing was changed.
        SecretsError: a secret is not usable; nothing was changed.
        CandidateFailed: the new release failed, what served before still serves.
    """
    if not dry_run:
        recover(layout, app, say)
    if archive is not None and archive.exists():
        found = _digest_file(archive)
        if source_digest not in (None, found):
            raise Refused(f"expected an archive with digest {source_digest}; found {found}; upload {archive} again")
        source_digest = found
    if source_digest is None:
        raise Refused(f"expected an archive at {archive}; found none; upload it")
    digest = digest_of(layout, source_digest)
    present = state.load(layout)
    known = records(layout)
    live = present.live
    staged = next((record for record in reversed(known) if record.digest == digest), None)
    if staged and live and staged.id == live.release and _serves(layout, app, present):
        return Result(app.name, False, staged.id, _name(present.previous), live.slot, False, [], {})
    donor = next((record for record in reversed(known) if record.source_digest == source_digest), None)
    occupied = _occupied(layout, present)
    result = Result(
        app=app.name,
        changed=True,
        release=staged.id if staged else None,
        previous=_name(live),
        slot=slots.other(occupied),
        upload_needed=donor is None,
        plan=_plan(layout, app, occupied, staged, donor, archive),
        phases={},
    )
    if dry_run:
        return result
    return _Cutover(layout, app, present, say).run(result, digest, source_digest, archive, staged, donor)


class _Cutover:
    """One release under way."""

    def __init__(self, layout: Layout, app: App, present: State, say: Say) -> None:
        self._layout, self._app, self._state, self._say = layout, app, present, say
        self._phases: dict[str, float] = {}
        self._group = grp.getgrnam(app.user).gr_gid

    def run(
        self,
        result: Result,
        digest: str,
        source_digest: str,
        archive: Path | None,
        staged: Record | None,
        donor: Record | None,
    ) -> Result:
        layout, app = self._layout, self._app
        with self._phase("secrets"):
            values = {name: identity.fetch(layout, app, name) for name in identity.identities(app)}
        with self._phase("stage"):
            if staged is None:
                staged = stage(layout, app, digest, source_digest, archive, donor, self._group)
        name = staged.id
        with self._phase("environment"):
            venv.build(layout, layout.releases / name / "source" / app.lock, self._group)
        if app.migration:
            with self._phase("migrate"):
                self._migrate(name, values.get("migrate", {}))
        values.clear()
        previous = _name(self._state.live)
        old = _occupied(layout, self._state)
        slot = slots.other(old)
        self._state.operation = Operation("starting", name, slot, old, now())
        state.save(layout, self._state)
        try:
            with self._phase("start"):
                slots.ensure_socket_folder(layout)
                slots.stop(layout, slot)
                slots.prepare(layout, slot, name)
                slots.start(layout, slot)
                seconds = slots.wait_ready(layout, app, slot, slots.deadline(app, self._state.starts))
            self._state.measured(seconds)
            with self._phase("swap"):
                slots.swap(layout, slot)
        except BaseException as error:
            self._abort(name, error)
            raise
        try:
            _commit(layout, self._state)
            if old:
                with self._phase("drain"):
                    slots.drain(layout, app, old)
            self._state.operation = None
            self._state.record(Entry(name, now(), person(), "live", self._phases))
            state.save(layout, self._state)
        except (ForgeError, OSError) as error:
            raise ForgeError(
                f"{name} takes all traffic, but the rest failed: {_words(error)}; mend that and release again, which "
                "ends it"
            ) from error
        try:
            prune(layout, app, self._state)
        except OSError as error:
            self._say(f"old releases were left: {explain(error)}")
        return msgspec.structs.replace(result, release=name, slot=slot, previous=previous, phases=self._phases)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self._say(f"{name} ...")
        try:
            yield
        finally:
            self._phases[name] = round(time.monotonic() - began, 3)

    def _abort(self, name: str, error: BaseException) -> None:
        """End a cutover that failed or was interrupted; once traffic has moved, the next command completes it.

        Raises:
            CandidateFailed: what failed was systemd or the disk; other failures say so themselves.
        """
        if (operation := self._state.operation) is None or self._layout.live_slot() == operation.slot:
            return
        try:
            slots.stop(self._layout, operation.slot)
            self._state.operation = None
            self._state.record(Entry(name, now(), person(), "failed", self._phases, _words(error).splitlines()[0]))
            state.save(self._layout, self._state)
        except (ForgeError, OSError) as second:
            self._say(f"the next command ends this release: {_words(second)}")
        if isinstance(error, (ForgeError, OSError)) and not isinstance(error, (CandidateFailed, Refused)):
            raise CandidateFailed(f"{name} could not be started: {_words(error)}; then release again") from error

    def _migrate(self, name: str, values: dict[str, str]) -> None:
        unit = self._layout.migration_unit(name)
        began = time.time() - 0.05
        db = self._app.database
        held = database.migration_lock(database.migration_url(db), values[db.migrate_key]) if db else nullcontext()
        try:
            with held:
                try:
                    systemd.start(unit)
                except KeyboardInterrupt:
                    # It goes on without us; the database stays locked for other hosts until it has ended.
                    self._say(f"interrupted; waiting for {unit}, because half a migration is worse than a late one")
                    systemd.wait_ended(unit)
                    raise
        except Refused:
            raise
        except ForgeError:
            lines = systemd.journal(unit, began)
            systemd.stop(unit)
            failure = CandidateFailed(
                f"the migration {unit} failed; mend it and release again. Its last log lines:\n"
                f"{lines or '(it said nothing)'}"
            )
            self._state.record(Entry(name, now(), person(), "failed", self._phases, f"the migration {unit} failed"))
            state.save(self._layout, self._state)
            raise failure from None


def stage(
    layout: Layout,
    app: App,
    digest: str,
    source_digest: str,
    archive: Path | None,
    donor: Record | None,
    group: int,
) -> Record:
    """Make the folder of a release: complete, durable and read-only, or not there at all.

    Raises:
        Refused: the archive is unusable, or the disk is full.
    """
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{digest[:12]}"
    incomplete = _incomplete(layout, name)
    try:
        incomplete.mkdir(mode=0o700)
        if archive is not None and archive.exists():
            unpack(archive, incomplete / "source")
        elif donor is not None:
            copy(layout.releases / donor.id / "source", incomplete / "source")
        else:
            raise Refused(f"expected an archive at {archive}; found none; upload it")
        lock = incomplete / "source" / app.lock
        if not lock.is_file():
            raise Refused(f"expected the lock {app.lock} in the source; found none; set `lock`, or write one")
        shutil.copyfile(layout.description, incomplete / "settings.toml")
        for path in _inputs(layout):
            shutil.copyfile(path, incomplete / path.name)
        environment = venv.name(lock.read_bytes())
        (incomplete / "venv").symlink_to(f"../../venvs/{environment}")
        # Nobody may write bytecode here later, so it is written now; its sources never change, so nobody checks them.
        compileall.compile_dir(
            incomplete / "source",
            stripdir=incomplete,
            prependdir=layout.releases / name,
            quiet=2,
            workers=1,
            invalidation_mode=_unchecked(),
        )
        record = Record(name, digest, source_digest, environment, now(), person())
        (incomplete / "release.json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        venv.seal(incomplete, group)
        systemd.run("sync", "--file-system", str(incomplete))
        incomplete.rename(layout.releases / name)
        fsync_directory(layout.releases)
    except BaseException as error:
        shutil.rmtree(incomplete, ignore_errors=True)
        if isinstance(error, OSError):
            raise Refused(f"expected to write {incomplete}; found: {explain(error)}; then try again") from error
        raise
    return record


def copy(source: Path, target: Path) -> None:
    """Copy a tree without its bytecode. shutil.copytree hides why it could not."""
    for path in walk(source):
        copied = target / path.relative_to(source)
        if "__pycache__" in copied.parts:
            continue
        if path.is_symlink():
            copied.symlink_to(path.readlink())
        elif path.is_dir():
            copied.mkdir()
        else:
            shutil.copy(path, copied)


def unpack(archive: Path, target: Path) -> None:
    """Unpack folders, files and links that stay inside; anything else is refused, whatever made the archive.

    The standard library's extraction filter does the same; Debian 12's Python does not have it.
    """
    target.mkdir(mode=0o700)
    links: set[str] = set()
    try:
        with _stream(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = os.path.normpath(member.name)
                if name == ".":
                    continue
                parts = Path(name).parts
                through_link = any("/".join(parts[: count + 1]) in links for count in range(len(parts)))
                if name.startswith("/") or parts[0] == ".." or through_link:
                    raise Refused(
                        f"expected names inside the source; found {member.name!r} in {archive}; pack it again"
                    )
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if member.isdir():
                    path.mkdir(exist_ok=True)
                elif member.issym():
                    leads_to = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))  # noqa: PTH118, PTH120
                    if os.path.isabs(member.linkname) or leads_to.startswith(".."):  # noqa: PTH117
                        raise Refused(f"expected links inside the source; found {member.name!r} -> {member.linkname!r}")
                    path.symlink_to(member.linkname)
                    links.add(name)
                elif member.isreg() and (content := tar.extractfile(member)):
                    with path.open("xb") as file:
                        shutil.copyfileobj(content, file)
                    path.chmod(0o755 if member.mode & 0o100 else 0o644)
                else:
                    raise Refused(
                        f"expected files, folders and links in {archive}; found {member.name!r}; leave it out"
                    )
            # The checksum stands after the last thing that tarfile reads.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f"expected a tar or tar.gz archive in {archive}; found: {error}; upload it again") from error


def _stream(archive: Path) -> gzip.GzipFile | BinaryIO:
    """Open an archive for reading: Ansible uploads it plain, a person may have compressed it."""
    with archive.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    return gzip.open(archive) if compressed else archive.open("rb")


def recover(layout: Layout, app: App, say: Say) -> None:
    """Repair what a command that was killed left behind; see the module's table. The caller holds the lock.

    Raises:
        OSError: the disk is full; nothing got worse.
    """
    present = state.load(layout)
    for leftover in layout.releases.glob(".*.incomplete"):
        shutil.rmtree(leftover)
    for unit in systemd.active_units(f"{layout.name}-migrate@*.service"):
        say(f"waiting for {unit}, which an interrupted command began")
        systemd.wait_ended(unit)
    if (operation := present.operation) is None:
        return
    say(f"ending the interrupted release {operation.release}")
    if operation.phase == "starting" and layout.live_slot() == operation.slot:
        operation = _commit(layout, present)
    if operation.phase == "draining":
        if operation.old_slot:
            slots.drain(layout, app, operation.old_slot)
        present.record(Entry(operation.release, now(), person(), "live", {}, "ended by the next command"))
    else:
        slots.stop(layout, operation.slot)
        present.record(Entry(operation.release, now(), person(), "failed", {}, "interrupted"))
    present.operation = None
    state.save(layout, present)


def boot(layout: Layout, app: App, say: Say) -> str | None:
    """Bring the live release back after a boot: its listener, live.sock, and its service without waiting for it."""
    try:
        recover(layout, app, say)
    except OSError as error:
        # What was live is live until a release says otherwise, and to start it takes no room.
        say(f"an interrupted release is left to the next command: {explain(error)}")
    live = state.load(layout).live
    if live is None:
        return None
    if not (layout.releases / live.release / "release.json").exists():
        raise ForgeError(
            f"expected the live release in {layout.releases / live.release}; found none; restore it from a backup"
        )
    slots.ensure_socket_folder(layout)
    slots.prepare(layout, live.slot, live.release)
    slots.start(layout, live.slot)
    if layout.live_slot() != live.slot:
        slots.swap(layout, live.slot)
    return live.release


def prune(layout: Layout, app: App, present: State) -> list[str]:
    """Remove the oldest releases beyond keep_releases, and environments that none needs; returns what was removed.

    Never removes what is live, what was live before it, or what a slot points at.
    """
    needed = {_name(present.live), _name(present.previous), *map(layout.slot_release, SLOTS)}
    known = records(layout)
    kept = {record.id for record in known[-app.keep_releases :]} | needed
    removed = [record for record in known if record.id not in kept]
    for record in removed:
        hidden = _incomplete(layout, record.id)
        (layout.releases / record.id).rename(hidden)
        shutil.rmtree(hidden)
    used = {record.venv for record in known if record.id in kept}
    unused = [path for path in layout.venvs.iterdir() if path.name not in used]
    for path in unused:
        venv.remove(path)
    return [record.id for record in removed] + [path.name for path in unused]


def _commit(layout: Layout, present: State) -> Operation:
    """Write down that the new slot is the live one and the old one is to be drained."""
    operation = present.operation
    if operation is None:
        raise ForgeError("expected a cutover under way; found none; report this")
    present.previous = present.live or present.previous
    present.live = Slotted(operation.release, operation.slot, now())
    present.operation = draining = msgspec.structs.replace(operation, phase="draining")
    state.save(layout, present)
    return draining


def _serves(layout: Layout, app: App, present: State) -> bool:
    """Whether the live slot is where state.json says, and its unit is up or on its way."""
    if present.live is None or present.operation is not None or layout.live_slot() != present.live.slot:
        return False
    return systemd.show(layout.service(present.live.slot))["ActiveState"] in ("active", "activating")


def _occupied(layout: Layout, present: State) -> str | None:
    """The slot that must not be touched: where traffic goes, or, before live.sock is restored, where it went."""
    return layout.live_slot() or (present.live.slot if present.live else None)


def _plan(
    layout: Layout, app: App, occupied: str | None, staged: Record | None, donor: Record | None, archive: Path | None
) -> list[str]:
    lines = []
    if staged:
        lines.append(f"use the staged release {staged.id}")
    else:
        lines.append("stage new settings with the source of " + donor.id if donor else "stage a new source")
        if archive is None and donor is None:
            lines.append("the virtual environment: built when the source's lock is new")
    if (known := staged or donor) and not venv.is_complete(layout, known.venv):
        lines.append("build the virtual environment of its lock")
    lines.append(f"check the secrets of: {', '.join(identity.identities(app))}")
    if app.migration:
        lines.append(f"migrate: {' '.join(app.migration.command)}")
    lines.append(f"start slot {slots.other(occupied)}, wait for {app.ready_path}, swap live.sock")
    if occupied:
        lines.append(f"drain and stop slot {occupied} ({layout.slot_release(occupied)})")
    return lines


def _inputs(layout: Layout) -> list[Path]:
    paths = [layout.inputs / name for name in INPUTS]
    for path in paths:
        if not path.is_file():
            raise Refused(f"expected {path}; found none; run site.yml, which renders it")
    return paths


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _incomplete(layout: Layout, release: str) -> Path:
    return layout.releases / f".{release}.incomplete"


def _words(error: BaseException) -> str:
    """What went wrong, for the operator."""
    match error:
        case ForgeError():
            return str(error)
        case OSError():
            return explain(error)
        case KeyboardInterrupt():
            return "interrupted"
    return type(error).__name__


def _name(slotted: Slotted | None) -> str | None:
    return slotted.release if slotted else None


def _unchecked() -> "compileall.PycInvalidationMode":  # type: ignore[name-defined]
    from py_compile import PycInvalidationMode

    return PycInvalidationMode.UNCHECKED_HASH
