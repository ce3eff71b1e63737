"""Virtual environments: one for each lock and Python version, read-only, shared by the releases that need it."""

import hashlib
import os
import platform
import shutil
import stat
import sys
from pathlib import Path

from forgectl import systemd
from forgectl.errors import ForgeError, Refused
from forgectl.layout import Layout, fsync, fsync_tree, made_whole, walk

BUILD_USER = "forge-build"
# Inside a release's source, what the control machine made for it, and in there what of the lock is in no index.
RESERVED, PACKAGES = ".forge", "packages"
# The file that says that an environment is whole.
COMPLETE = ".complete"


def name(lock: bytes) -> str:
    """The folder of a lock's environment: a hash over the lock, the Python version and the machine's kind.

    A package that came along with the release is in the lock with its hash, like any other.
    """
    identity = f"{sys.implementation.cache_tag} {platform.machine()}\n".encode()
    return hashlib.sha256(identity + lock).hexdigest()[:16]


def is_complete(layout: Layout, venv: str) -> bool:
    return (layout.venvs / venv / COMPLETE).exists()


def build(layout: Layout, lock: Path, group: int) -> str:
    """Build the environment of a lock unless it is there, and return its name.

    The build runs as a user of its own in a sandbox, with a cache for each app: what one app's packages run while they
    are built reaches neither the host nor another app's code, environments and cache.

    Raises:
        Refused: the lock cannot be installed.
    """
    venv = name(lock.read_bytes())
    folder = layout.venvs / venv
    if is_complete(layout, venv):
        return venv
    shutil.rmtree(folder, ignore_errors=True)
    with made_whole(folder, 0o755):
        shutil.chown(folder, BUILD_USER, BUILD_USER)
        # The build user may read neither the release nor the upload: it gets a copy of the lock.
        copied = folder / "lock.txt"
        shutil.copyfile(lock, copied)
        copied.chmod(0o644)
        if (along := lock.parent / PACKAGES).is_dir() and lock.parent.name == RESERVED:
            shutil.copytree(along, folder / RESERVED / PACKAGES, copy_function=shutil.copyfile)
            for path in walk(folder / RESERVED):
                path.chmod(0o755 if path.is_dir() else 0o644)
        uv = Path(sys.prefix) / "bin" / "uv"
        python = folder / "bin" / "python"
        script = (
            # The lock names what came along relative to here.
            f'cd "{folder}" && '
            f'"{uv}" venv --quiet --allow-existing --python "{os.path.realpath(sys.executable)}" "{folder}" && '
            f'"{uv}" pip sync --quiet --require-hashes --link-mode copy --compile-bytecode --python "{python}" '
            f'"{copied}"'
        )
        try:
            systemd.run_sandboxed(
                ["/bin/sh", "-c", script],
                unit=f"forge-build-{layout.name}.service",
                user=BUILD_USER,
                writable=[folder, layout.cache],
                # All builds are one user's.
                hidden=[layout.home.parent, layout.cache.parent],
                environment={
                    "HOME": str(layout.cache),
                    "UV_CACHE_DIR": str(layout.cache),
                    "UV_PYTHON_DOWNLOADS": "never",
                    "UV_NO_CONFIG": "1",
                    "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
                },
                environment_file=layout.build_environment,
            )
        except ForgeError as error:
            raise Refused(
                f"expected to install the lock {lock.name}; found: {error}\nwrite the lock anew with hashes "
                "(uv pip compile --generate-hashes), name the Debian packages that a build lacks in build_packages and "
                "run site.yml, which installs them, or check the package index of this host"
            ) from error
        shutil.rmtree(folder / RESERVED, ignore_errors=True)
        seal(folder, group)
        fsync_tree(folder)
        (folder / COMPLETE).touch(mode=0o444)
        fsync(folder)
    return venv


def seal(folder: Path, group: int) -> None:
    """Give a tree to the caller, who is root, let the app's group read it, and let nobody write it.

    Raises:
        ForgeError: a file is linked from elsewhere too, so whoever made it could change it later.
    """
    for path in walk(folder):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            raise ForgeError(f"expected one link to each file; found {status.st_nlink} to {path}")
        os.chown(path, os.geteuid(), group, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            executable = stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_IXUSR
            path.chmod(0o550 if executable else 0o440)


def is_sealed(path: Path, group: int) -> bool:
    """Tell whether a file or folder is as `seal` leaves it, or lets everybody read it besides."""
    status = path.lstat()
    if (status.st_uid, status.st_gid) != (os.geteuid(), group):
        return False
    needed = 0o550 if stat.S_ISDIR(status.st_mode) else 0o440
    return stat.S_ISLNK(status.st_mode) or (status.st_mode & needed == needed and not status.st_mode & 0o222)


def remove(folder: Path) -> None:
    """Remove an environment; one that was removed in part no longer counts as complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)
