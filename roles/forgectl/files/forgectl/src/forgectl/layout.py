"""Where everything of an app lies on the host."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forgectl.errors import Refused, explain

SLOTS = ("blue", "green")
FSYNC_THREADS = 16


class Layout:
    """The paths of one app below `root`, which is / but in tests."""

    def __init__(self, name: str, root: Path = Path("/")) -> None:
        self.name = name
        self.root = root
        self.description = root / "etc/forge/apps" / f"{name}.toml"
        self.inputs = root / "etc/forge/apps" / f"{name}.d"
        self.build_environment = root / "etc/forge/build.env"
        self.credentials = root / "etc/credstore.encrypted"
        self.units = root / "etc/systemd/system"
        self.home = root / "srv" / name
        self.releases = self.home / "releases"
        self.venvs = self.home / "venvs"
        self.slots = self.home / "slots"
        self.app_state = root / "var/lib" / name
        self.state_dir = root / "var/lib/forge" / name
        self.cache = root / "var/cache/forge" / name
        self.sockets = root / "run" / name
        self.live = self.sockets / "live.sock"
        # Where Nginx looks for static files first.
        self.live_files = self.sockets / "live"
        # Only of an app whose database user Vault leases.
        self.lease_template = self.units / f"{name}-lease@.service"
        # While it exists, Nginx answers with the maintenance page.
        self.maintenance = self.sockets / "maintenance"
        # Nginx reads what ends in .conf.
        self.site = root / "etc/nginx/forge" / f"{name}.conf"
        self.removed_site = root / "etc/nginx/forge" / f"{name}.conf.removed"
        self.access_log = root / "var/log/nginx" / f"{name}.json"

    def settings(self, release: str) -> Path:
        """The description of the app that a release was made with; what it does is judged by that one."""
        return self.releases / release / "settings.toml"

    def socket(self, slot: str) -> Path:
        """The listener of a slot."""
        return self.sockets / f"{slot}.sock"

    def sealed(self, identity: str, part: str) -> Path:
        """An encrypted credential of an identity; `part` is role-id or secret-id, or without Vault values."""
        return self.credentials / f"forge.{self.name}.{identity}.{part}"

    def drop_in(self, slot: str) -> Path:
        """The [Service] body of a slot, copied from the release that it runs."""
        return self.units / f"{self.name}@{slot}.service.d" / "release.conf"

    def pin(self, slot: str) -> Path:
        """The version of the secrets that a slot starts with, in decimal digits; none for the newest."""
        return self.slots / f"{slot}.secrets"

    def service(self, slot: str) -> str:
        return f"{self.name}@{slot}.service"

    def socket_unit(self, slot: str) -> str:
        return f"{self.name}@{slot}.socket"

    def lease_unit(self, slot: str) -> str:
        """What keeps the database user of a slot, where Vault leases one."""
        return f"{self.name}-lease@{slot}.service"

    def lease_folder(self, slot: str) -> Path:
        """Where that unit hands the user out; gone with the unit."""
        return self.root / "run/forge-lease" / f"{self.name}-{slot}"

    def command_unit(self, command: str, slot: str) -> str:
        """What goes on beside a slot's server. No app's name has a dot, so no other app's unit has that name."""
        return f"{self.name}.{command}@{slot}.service"

    def command_units(self, slot: str) -> list[str]:
        """Those that a slot has."""
        return sorted(path.name for path in self.units.glob(f"{self.name}.*@{slot}.service"))

    def scheduled_units(self, command: str) -> tuple[str, str]:
        """A command that runs now and then, and what starts it."""
        return f"{self.name}.{command}.service", f"{self.name}.{command}.timer"

    def timed_units(self) -> list[str]:
        """All of those that there are."""
        found = (path.name for kind in ("service", "timer") for path in self.units.glob(f"{self.name}.*.{kind}"))
        return sorted(name for name in found if "@" not in name)

    def migration_unit(self, release: str) -> str:
        return f"{self.name}-migrate@{release}.service"

    def watch_unit(self) -> str:
        return f"forge-watch@{self.name}.service"

    def timers(self) -> list[str]:
        return [f"forge-{what}@{self.name}.timer" for what in ("recycle", "rotate")]

    def boot_unit(self) -> str:
        return f"forge-boot@{self.name}.service"

    def slot_release(self, slot: str) -> str | None:
        """The release that a slot points at."""
        try:
            return (self.slots / slot).readlink().name
        except OSError:
            return None

    def live_slot(self) -> str | None:
        """The slot that live.sock leads to, which is where traffic goes."""
        try:
            slot = self.live.readlink().name.removesuffix(".sock")
        except OSError:
            return None
        return slot if slot in SLOTS else None


def names(root: Path = Path("/")) -> list[str]:
    """The apps that this host knows."""
    return sorted(path.stem for path in (root / "etc/forge/apps").glob("*.toml"))


def replace_symlink(path: Path, target: str) -> None:
    """Point `path` at `target` by an atomic rename: whoever opens it finds the old or the new, never nothing."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)


def write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Write a file so that a crash or power cut leaves the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # Whatever the umask of the caller is.
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        # What writes by number does not know the name.
        error.filename = str(path)
        raise
    temporary.replace(path)
    fsync(path.parent)


@contextmanager
def made_whole(folder: Path, mode: int) -> Iterator[None]:
    """Make a folder, and take it away again when what fills it fails.

    Raises:
        Refused: the disk refused something.
    """
    try:
        folder.mkdir(mode=mode)
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise Refused(f"expected to write {folder}; found: {explain(error)}; then try again") from error
        raise


def fsync(path: Path) -> None:
    """Make a file durable, or of a folder what it names, such as after a rename inside it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make a folder and all in it durable, and nothing else: a flush of the whole disk would hold up the database.

    Side by side, since what the file system writes to its journal for one of them it writes for all that wait.
    """
    # It takes longer to import than most commands take.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(FSYNC_THREADS) as pool:
        list(pool.map(fsync, (path for path in walk(folder) if not path.is_symlink())))


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder, and the folder itself; links are not followed."""
    yield folder
    for parent, directories, files in os.walk(folder):
        for name in (*directories, *files):
            yield Path(parent) / name
