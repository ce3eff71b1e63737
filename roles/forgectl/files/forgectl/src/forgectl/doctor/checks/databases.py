"""The apps' databases: whether they let anybody in, how many connections they have left, and their schema."""

import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from forge.connections import Demand, Server, budget

from forgectl import database, lock, migration, schema, staging
from forgectl.config import App
from forgectl.doctor import reach
from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import AppSight, Sight
from forgectl.errors import Refused

CONNECT_SECONDS = 1.2
NEAR = 0.8
# What preflight reserves besides the workers, see its defaults.
MIGRATION, EXPORTER, RESERVED = 2, 2, 5
# Of an app that says nothing else.
POOL_MAX = 5
PORT = 5432
USED = """
SELECT current_setting('max_connections')::int, current_setting('superuser_reserved_connections')::int,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid())
"""
WHO = """
SELECT usename || ' ' || coalesce(state, '?'), count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY 1 ORDER BY 2 DESC LIMIT 3
"""
TOO_MANY = "too many clients"


def databases(sight: Sight) -> Iterator[Finding]:
    """F501, F502 and F304: of the server on this host all three, of others whether somebody listens."""
    users = [(app, its) for app in sight.serving if (its := app.running or app.described) and its.database]
    local = [(app, its) for app, its in users if its.database and its.database.placement == "local"]
    seconds = CONNECT_SECONDS * sight.patience
    # All at once: each may take all of its time.
    asked = {
        app.name: reach.begin(partial(_reached, its.database.url, seconds))
        for app, its in users
        if its.database and its.database.placement == "external"
    }
    if local:
        yield from _local(sight, local)
    for app, its in users:
        if app.name in asked:
            host, port = _place(its.database.url) if its.database else ("", PORT)
            if why := asked[app.name].result():
                where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                mend = f"timeout 5 bash -c '</dev/tcp/{host}/{port}'"
                if host.startswith("/"):
                    where = _socket(host, port)
                    mend = f"ls -l {where}"
                title = f"its database at {where} is unreachable: {why}"
                yield Finding("F501", app.name, title, (f"connect to {where}: {why}",), mend)


def _local(sight: Sight, users: Sequence[tuple[AppSight, App]]) -> Iterator[Finding]:
    import psycopg

    try:
        # libpq waits for two seconds at least; a socket of this host answers at once or not.
        with psycopg.connect(database.ADMINISTRATION, autocommit=True, connect_timeout=2) as connection:
            most, reserved, used = connection.execute(USED).fetchone() or (0, 0, 0)
            yield from _connections(users, most, reserved, used, connection)
    except psycopg.Error as error:
        words = str(error).strip().splitlines()
        why = words[-1].strip() if words else type(error).__name__
        if TOO_MANY in str(error):
            evidence = [f"connect as the administrator: {why}"]
            yield Finding(
                "F502", HOST, "PostgreSQL has no connection left, not even for its administrator", evidence, _MORE
            )
            return
        cluster = "postgresql@*.service"
        state = sight.attempt("systemctl", "list-units", "--all", "--plain", "--no-legend", cluster).stdout.split()
        evidence = [f"{database.ADMINISTRATION}: {why}", f"{cluster}: {' '.join(state[:4]) or 'no such unit'}"]
        for app, _ in users:
            title = f"its database is unreachable: {why}"
            yield Finding("F501", app.name, title, evidence, "sudo systemctl start postgresql")
        return
    for app, its in users:
        yield from _schema(app, its)


_MORE = "sudo runuser --user=postgres -- psql --command='TABLE pg_stat_activity'"


def _connections(
    users: Sequence[tuple[AppSight, App]], most: int, reserved: int, used: int, connection: Any
) -> Iterator[Finding]:
    left = most - reserved
    if used >= NEAR * left:
        who = [f"{name}: {number}" for name, number in connection.execute(WHO).fetchall()]
        title = f"{used} of the {left} connections that PostgreSQL has for apps are taken"
        evidence = [f"max_connections {most}, of which {reserved} for superusers", *who]
        yield Finding("F502", HOST, title, evidence, _MORE)
    server = Server("local", most, "max_connections", EXPORTER, RESERVED)
    planned = budget(server, [(app.name, its.workers.count, _demand(its)) for app, its in users])
    if planned.spare < 0:
        title = f"the apps of this host may open {planned.required} connections, and PostgreSQL has {most}"
        evidence = [planned.arithmetic, f"max_connections: {most}"]
        yield Finding("F502", HOST, title, evidence, "ansible-playbook -i inventory/production site.yml")


def _demand(its: App) -> Demand:
    pool = its.database.pool_max if its.database else None
    if pool is None:
        said = next((value for name, value in its.settings.items() if name.endswith("DATABASE_POOL_MAX")), "")
        pool = int(said) if said.isdigit() else POOL_MAX
    return Demand("local", 1, pool, MIGRATION if its.migration else 0, len(its.commands))


def _schema(app: AppSight, its: App) -> Iterator[Finding]:
    """F304: the revisions of the database, against those that its live release, or a newer one, brought."""
    if not its.uses_alembic or its.database is None or app.state is None:
        return
    if lock.holder(app.layout):
        # A release may migrate it just now, revision by revision.
        return
    import psycopg

    known = {record.id: record.schema_heads for record in staging.records(app.layout)}
    expected = known.get(app.live.release)
    # After a rollback the database keeps what the newer release brought.
    brought = known.get(app.state.schema) if app.state.schema else None
    if expected is None:
        return
    conninfo = psycopg.conninfo.make_conninfo(database.ADMINISTRATION, dbname=its.database.name)
    try:
        with psycopg.connect(conninfo, autocommit=True, connect_timeout=2) as connection:
            present = schema.current(connection)
    except (psycopg.Error, Refused) as error:
        title = f"its database {its.database.name} does not say what schema it has"
        yield Finding("F304", app.name, title, (" ".join(str(error).split()),), f"sudo forgectl status {app.name}")
        return
    if present == sorted(expected):
        return
    if present == sorted(brought or expected):
        yield from _ahead(app, known)
        return
    title = f"its database is at {_listed(present)}, and its live release was made for {_listed(expected)}"
    evidence = [
        f"alembic_version of {its.database.name}: {_listed(present)}",
        f"release.json of {app.live.release}: {_listed(expected)}",
    ]
    yield Finding("F304", app.name, title, evidence, "ansible-playbook -i inventory/production playbooks/deploy.yml")


def _ahead(app: AppSight, known: Mapping[str, Sequence[str] | None]) -> Iterator[Finding]:
    """F304 after a rollback that an operator forced: the newer schema is one that the live release may not fit."""
    newer = app.state.schema if app.state else ""
    try:
        revisions = schema.revisions(app.layout.releases / newer / "source")
        unfit = migration.incompatible(schema.missing_in(revisions, known.get(app.live.release) or []))
    except Refused:
        # Of a source that says nothing any more, nobody knows.
        return
    if unfit:
        files = ", ".join(each.file for each in unfit)
        title = f"its live release is older than its schema: {files} of {newer} is not marked as compatible with it"
        evidence = [f"schema of {newer}, live {app.live.release}"]
        yield Finding("F304", app.name, title, evidence, f"sudo forgectl rollback {app.name} --to {newer}")


def _listed(revisions: Sequence[str]) -> str:
    return ", ".join(revisions) or "no revision"


def _place(url: str) -> tuple[str, int]:
    """Where a server is: a name, an address or the folder of its socket, and the port."""
    parts = urlsplit(url)
    asked = dict(parse_qsl(parts.query))
    # As it is written: `hostname` has no capitals, which a path may have.
    name = parts.netloc.rpartition("@")[2]
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return asked.get("host") or unquote(name) or "localhost", int(asked.get("port") or parts.port or PORT)


def _socket(folder: str, port: int) -> str:
    return f"{folder}/.s.PGSQL.{port}"


def _reached(url: str, seconds: float) -> str:
    """Why an external server cannot be reached; empty where it can."""
    try:
        host, port = _place(url)
        if host.startswith("/"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(seconds)
                connection.connect(_socket(host, port))
        else:
            reach.connect(host, port, seconds).close()
    except OSError as error:
        return str(error)
    return ""
