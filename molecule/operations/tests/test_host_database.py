"""PostgreSQL goes away, or has no connection left: the app goes on, and takes up again by itself what it can."""

from __future__ import annotations

import json
import time

import pytest
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import main_pid, until
from testinfra.host import Host

DOWN, CONNECTIONS = "database-down", "too-many-database-connections"
OVER = "See that it is mended"
SERVER = "postgresql@*.service"
KEPT = 3
"""Connections that PostgreSQL keeps for its administrator."""
# Takes every connection that others leave or lose, but for those.
HOLD = f"""
import time
import psycopg2
TAKEN = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename IN ('inbox_app', 'inbox_app_2')"
held = []
def connect():
    connection = psycopg2.connect("host=/var/run/postgresql user=postgres dbname=postgres application_name=report")
    connection.autocommit = True
    held.append(connection)
    return connection
def ask(cursor, query):
    cursor.execute(query)
    return int(cursor.fetchone()[0])
with connect().cursor() as cursor:
    wanted = ask(cursor, "SELECT current_setting('max_connections')") - {KEPT}
    while len(held) < wanted:
        cursor.execute(END)
        while ask(cursor, TAKEN) < wanted:
            connect()
time.sleep(600)
"""


def test_stopped(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """By somebody: nobody starts it again but the runbook, and the app needs nothing for itself."""
    with fault("PostgreSQL stopped") as happening:
        host.check_output("systemctl stop %s", SERVER)
        happening.told("F501")
        runbooks.follow(DOWN, "What you see")
        assert " down " in runbooks.follow(DOWN, "Look")
        happening.mended_by(DOWN)
        runbooks.follow(DOWN, "Start it")
    assert {record.status for record in happening.hurt if record.kind in ("get", "page", "post")} <= {500, 503}
    runbooks.follow(DOWN, OVER)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mark", ["killed", "restarted"])
def test_back_by_itself(fault: FaultContext, host: Host, runbooks: Runbooks, mark: str) -> None:
    """Debian's unit would leave it down when its first process is killed."""
    was = main_pid(host, SERVER)
    command = {"killed": "systemctl kill --kill-whom=main --signal=KILL", "restarted": "systemctl restart"}[mark]
    with fault(f"PostgreSQL {mark}"):
        host.check_output(f"{command} %s", SERVER)
        until(lambda: main_pid(host, SERVER) not in (0, was), 30)
    runbooks.follow(DOWN, OVER)


@pytest.mark.exhaustive
def test_stopped_by_its_own_command(host: Host, runbooks: Runbooks) -> None:
    """What brings it back by itself leaves it down when an administrator wants it so."""
    version, name = host.check_output("pg_lsclusters --no-header").split()[:2]
    host.check_output("pg_ctlcluster %s %s stop", version, name)
    time.sleep(5)
    assert " down " in host.run("pg_lsclusters --no-header").stdout
    runbooks.follow(DOWN, "Start it")
    until(lambda: host.run("forgectl status inbox").stdout.count("ready"), 30)
    runbooks.follow(DOWN, OVER)


@pytest.mark.exhaustive
def test_configuration_broken(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """It was changed by hand and does not start again, however often systemd tries; the inventory puts it right."""
    folder = host.check_output("ls --directory /etc/postgresql/*/main")
    with fault("PostgreSQL's configuration broken") as happening:
        host.check_output("echo 'no_such_setting = 1' >> %s/conf.d/50-forge.conf", folder)
        host.run("systemctl restart %s", SERVER)
        happening.told("F501")
        assert "no_such_setting" in runbooks.follow(DOWN, "Look")
        happening.mended_by(DOWN)
        runbooks.follow(DOWN, "Its configuration")
    runbooks.follow(DOWN, OVER)


@pytest.mark.exhaustive
def test_out_of_connections(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """Somebody else's program has them all, and the app lost its own: it answers 503 until there are some again."""
    with fault("PostgreSQL out of connections") as happening:
        host.check_output("systemd-run --quiet --collect --unit=report python3 -c %s", HOLD)
        try:
            until(lambda: happening.hurt, 60)
            happening.told("F502")
            runbooks.follow(CONNECTIONS, "What you see")
            assert "report" in runbooks.follow(CONNECTIONS, "Look")
            happening.mended_by(CONNECTIONS)
            runbooks.follow(CONNECTIONS, "Close what is idle", {"program": "report"})
        finally:
            host.run("systemctl stop report.service")
    assert 503 in {record.status for record in happening.hurt}
    runbooks.follow(CONNECTIONS, OVER)
    assert json.loads(host.check_output("forgectl status inbox --json"))["live"]
