"""A temporary PostgreSQL cluster on a free port, owned by an unprivileged user and stopped by its pid."""

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg

_HBA = """\
local all admin trust
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
"""
_CONFIG = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
max_connections = 60
fsync = off
"""


class Cluster:
    """The server, and statements that only an administrator may run."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self._data = folder / "data"
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
        on_path = shutil.which("initdb")
        if not programs and not on_path:
            raise RuntimeError("PostgreSQL's server programs are missing; install the package postgresql")
        self._programs = programs[-1] if programs else Path(on_path or "").parent

    def create(self) -> None:
        """Make the data folder."""
        self._run("initdb", "-D", self._data, "-U", "admin", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        (self._data / "pg_hba.conf").write_text(_HBA)
        with (self._data / "postgresql.conf").open("a") as config:
            config.write(_CONFIG.format(port=self.port, folder=self.folder))

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        self._run("pg_ctl", "-D", self._data, "-l", self.folder / "log", "-w", "-t", "30", "start")

    def stop(self) -> None:
        """Stop the server and wait until it is gone."""
        if (self._data / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", self._data, "-m", "fast", "-w", "-t", "30", "stop")

    def crash(self) -> None:
        """End the server at once: what it has not written yet is lost."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "-t", "30", "stop")

    def admin(self, *statements: str, database: str = "postgres") -> Any:  # noqa: ANN401 - a column of any type
        """Run statements as superuser; return the first column of the last one's first row."""

        async def run() -> Any:  # noqa: ANN401 - see above
            async with self.connect(database) as connection:
                value = None
                for statement in statements:
                    value = await connection.fetchval(statement)
                return value

        return asyncio.run(run())

    @asynccontextmanager
    async def connect(self, database: str) -> AsyncIterator[asyncpg.Connection]:
        """Connect as superuser."""
        connection: asyncpg.Connection = await asyncpg.connect(
            host=str(self.folder), port=self.port, user="admin", database=database
        )
        try:
            yield connection
        finally:
            await connection.close()

    def _run(self, program: str, *arguments: str | Path) -> None:
        # PostgreSQL refuses to run as root.
        root = os.geteuid() == 0
        # A file and no pipe: the server inherits it and would keep a pipe open for as long as it runs.
        with (self.folder / "out").open("a") as out:
            done = subprocess.run(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
                cwd=self.folder,
                user="nobody" if root else None,
                group=pwd.getpwnam("nobody").pw_gid if root else None,
                extra_groups=[] if root else None,
            )
        if done.returncode:
            said = "".join(path.read_text() for path in (self.folder / "out", self.folder / "log") if path.exists())
            raise RuntimeError(f"{program} failed with {done.returncode}:\n{said}")


@contextmanager
def temporary_cluster() -> Iterator[Cluster]:
    """Create a cluster, start it, and remove it at the end."""
    # Not pytest's own folder: the path of a unix socket has at most 107 characters, and root's is private.
    folder = Path(tempfile.mkdtemp(prefix="inbox-pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        folder.chmod(0o755)
        cluster = Cluster(folder, free_port())
        cluster.create()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder)


def free_port() -> int:
    """Return a TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
