"""One app tries to reach the others, from inside its own live process."""

from __future__ import annotations

import httpx
import pytest
from forge_apps import run_inside
from forge_scenario import Status, main_pid, show
from testinfra.host import Host

Tries = list[list[str]]


def attempt(rogue: httpx.Client, tries: Tries) -> dict[str, str]:
    """What came of those that came to something."""
    answer = rogue.post("/try", json=tries)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def own_code(host: Host) -> str:
    """The file of the rogue's own program, in its environment."""
    return run_inside(host, "rogue", "-c", "import rogue; print(rogue.__file__)").strip()


@pytest.fixture
def victim(host: Host, status: Status) -> dict[str, str]:
    """Names of what the other app has."""
    live = status()["live"]
    unit = f"inbox@{live['slot']}.service"
    worker = host.check_output("pgrep --parent %s", str(main_pid(host, unit))).split()[0]
    return {"release": f"/srv/inbox/releases/{live['release']}", "slot": live["slot"], "unit": unit, "pid": worker}


def test_what_it_needs_it_has(host: Host, rogue: httpx.Client) -> None:
    """Or else the tests below would show nothing."""
    tries: Tries = [
        ["write", "/var/lib/rogue/mark"],
        ["read", "/var/lib/rogue/mark"],
        ["remove", "/var/lib/rogue/mark"],
        ["read", own_code(host)],
        ["read", "/proc/self/environ"],
        ["login", "/var/run/postgresql rogue_app rogue"],
        ["login", "127.0.0.1 rogue_app rogue"],
        ["query", "SELECT 1"],
        ["connect", "/var/run/postgresql/.s.PGSQL.5432"],
        ["run", "/usr/bin/true"],
    ]
    assert set(attempt(rogue, tries)) == {" ".join(each) for each in tries}


def test_it_reads_nothing_of_another_app(host: Host, rogue: httpx.Client, victim: dict[str, str]) -> None:
    """Code, settings, environment, state, sockets, credentials, certificates, logs."""
    journal = host.check_output("ls /var/log/journal/*/system.journal").split()[0]
    paths = [
        f"{victim['release']}/source/src/inbox/main.py",
        f"{victim['release']}/settings.toml",
        f"{victim['release']}/release.json",
        "/srv/inbox/venvs",
        "/var/lib/inbox",
        "/run/inbox",
        *(f"/proc/{victim['pid']}/{part}" for part in ("environ", "cmdline", "maps", "fd", "cwd")),
        "/etc/forge/apps/inbox.toml",
        "/etc/credstore.encrypted",
        "/etc/credstore.encrypted/forge.inbox.app.secret-id",
        f"/run/credentials/{victim['unit']}",
        "/var/lib/forge/inbox/state.json",
        "/var/cache/forge/inbox",
        "/etc/nginx/tls/live/inbox.pem",
        "/var/log/nginx/inbox.json",
        journal,
    ]
    for path in paths:
        assert host.file(path).exists, path
    assert attempt(rogue, [["read", path] for path in paths]) == {}


def test_it_changes_nothing_of_another_app(host: Host, rogue: httpx.Client, victim: dict[str, str]) -> None:
    """Nor of its own release; and no process or unit of another."""
    own = own_code(host)
    tries: Tries = [
        *(
            ["write", path]
            for path in (
                "/var/lib/inbox/x",
                "/run/inbox/x",
                "/run/rogue/x",
                "/srv/inbox/x",
                own,
                "/var/log/nginx/rogue.json",
                "/etc/forge/apps/rogue.toml",
            )
        ),
        ["connect", f"/run/inbox/{victim['slot']}.sock"],
        ["connect", "/run/inbox/live.sock"],
        ["remove", "/run/inbox/live.sock"],
        ["remove", "/run/rogue/live.sock"],
        ["signal", victim["pid"]],
        ["signal", str(main_pid(host, victim["unit"]))],
        ["run", f"/usr/bin/systemctl stop {victim['unit']}"],
        ["run", f"/usr/bin/systemctl set-property --runtime {victim['unit']} CPUWeight=1"],
        ["run", "/usr/local/sbin/forgectl remove inbox"],
    ]
    assert attempt(rogue, tries) == {}
    assert show(host, victim["unit"], "ActiveState") == "active"


def test_it_reads_no_line_of_another_app(host: Host, rogue: httpx.Client, victim: dict[str, str]) -> None:
    """Nor of its own, which are for operators."""
    assert host.check_output("journalctl --no-pager --lines=1 --output=cat --unit=%s", victim["unit"])
    found = attempt(rogue, [["run", f"/usr/bin/journalctl --no-pager --output=cat --lines=5 --unit={victim['unit']}"]])
    assert [text for text in found.values() if text.strip() not in ("", "-- No entries --")] == []


def test_it_gets_into_no_other_database(rogue: httpx.Client) -> None:
    """As no role, over neither way; and sees nothing of what the others ask theirs."""
    roles = ("inbox_app", "inbox_app_2", "inbox_migrate", "inbox_owner", "fractal_app", "rogue_app", "postgres")
    places = ("/var/run/postgresql", "127.0.0.1")
    tries: Tries = [
        ["login", f"{place} {role} {database}"]
        for place in places
        for role in roles
        for database in ("inbox", "fractal", "postgres", "template1")
    ]
    assert attempt(rogue, tries) == {}
    (seen,) = attempt(
        rogue, [["query", "SELECT DISTINCT query FROM pg_stat_activity WHERE datname IN ('inbox', 'fractal')"]]
    ).values()
    assert seen in ("[]", "[<Record query='<insufficient privilege>'>]")
    assert (
        attempt(
            rogue,
            [
                ["query", "SELECT pg_read_file('/etc/hostname')"],
                ["query", "COPY (SELECT 1) TO PROGRAM 'true'"],
                ["query", "SET ROLE inbox_rw"],
                ["query", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'inbox_app'"],
                ["query", "ALTER ROLE inbox_app PASSWORD 'x'"],
                ["query", "CREATE TABLE public.mine (x int)"],
            ],
        )
        == {}
    )


def test_nothing_of_one_is_in_the_temporary_files_of_another(host: Host, rogue: httpx.Client) -> None:
    """Each has folders of its own; what is shared memory is its maker's."""
    host.check_output("install --mode=0644 /dev/null /tmp/outside")
    found = attempt(rogue, [["read", "/tmp"], ["read", "/var/tmp"]])
    host.check_output("rm /tmp/outside")
    assert set(found) == {"read /tmp", "read /var/tmp"}
    assert "outside" not in " ".join(found.values())
