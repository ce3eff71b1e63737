"""removal.py on the host of test_cutover.py: killed at every change, then called again."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from forgectl import config, database, identity, release, removal, state, status, systemd
from forgectl.cutover import Cutover
from forgectl.errors import CandidateFailed, ForgeError, Locked, Refused
from forgectl.layout import SLOTS, Layout
from test_cutover import Host, name, new_host, two_releases, watch

__all__ = ["new_host"]
NEIGHBOUR = "inbox-two"
DOMAINS = {"inbox": "inbox.example.com", NEIGHBOUR: "two.example.com"}


class Served(Host):
    """A host with Nginx in front and an app beside this one, whose name begins as this one's does."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sites: set[str] = set()
        self.enabled: set[str] = set()
        self.refuses = False
        layout, other = self.layout, Layout(NEIGHBOUR, root)
        for here in (layout, other):
            for folder in (here.site.parent, here.app_state, here.home, here.cache, here.access_log.parent, here.units):
                folder.mkdir(parents=True, exist_ok=True)
            for part in ("app.role-id", "app.secret-id"):
                here.credentials.mkdir(parents=True, exist_ok=True)
                (here.credentials / f"forge.{here.name}.{part}").touch()
            for kind in ("@.service", "@.socket", "-migrate@.service"):
                (here.units / f"{here.name}{kind}").touch()
            here.site.write_text(
                f"server {{\n    server_name {DOMAINS[here.name]} www.{DOMAINS[here.name]};\n"
                f"    ssl_certificate tls/live/{here.name}.pem;\n}}\n"
            )
            (layout.root / "etc/nginx/tls/live").mkdir(parents=True, exist_ok=True)
            for path in ("key", "pem", "live"):
                certificate = layout.root / "etc/nginx/tls" / f"{here.name}.{path}"
                if path == "live":
                    certificate = layout.root / "etc/nginx/tls/live" / f"{here.name}.pem"
                certificate.touch()
            here.access_log.touch()
            stamps = layout.root / "var/lib/systemd/timers"
            stamps.mkdir(parents=True, exist_ok=True)
            for stamp in (f"stamp-{here.name}.tick.timer", f"stamp-forge-recycle@{here.name}.timer"):
                (stamps / stamp).touch()
            here.access_log.with_name(f"{here.access_log.name}-20260101-1.gz").touch()
        other.state_dir.mkdir(parents=True)
        other.description.write_text(self.settings.replace('name = "inbox"', f'name = "{NEIGHBOUR}"'))
        (root / "etc/forge/certificates.toml").write_text(
            f'[apps]\ninbox = ["inbox.example.com"]\n{NEIGHBOUR} = ["two.example.com"]\n'
        )
        for unit in (*layout.timers(), removal.NGINX):
            self.start(unit)
        self.enabled = {*layout.timers(), layout.boot_unit()}
        self.reload(removal.NGINX)

    # What stands for systemd.

    def reload(self, _unit: str) -> None:
        self.point()
        if self.refuses:
            raise ForgeError("systemctl reload nginx.service failed")
        self.sites = {path.stem for path in self.layout.site.parent.glob("*.conf")}

    def enable(self, *units: str, now: bool) -> None:
        self.point()
        self.enabled |= set(units)
        if now:
            self.start(*units)

    def disable(self, *units: str) -> None:
        self.point()
        self.enabled -= set(units)
        self.stop(*units)

    def is_wanted(self, unit: str) -> bool:
        return self.units.get(unit, {}).get("ActiveState") == "active"

    # Commands, with what each does before.

    def remove(self, *, dry_run: bool = False) -> removal.Result:
        if not dry_run:
            self.recover()
        return removal.remove(self.layout, self.app, dry_run=dry_run, say=self.say)

    def restore(self, *, dry_run: bool = False) -> removal.Result:
        return release.restore(self.layout, self.app, dry_run=dry_run, say=self.say)

    def purge(self, *, dry_run: bool = False) -> removal.Result:
        return removal.purge(self.layout, dry_run=dry_run, say=self.say)

    def assert_removed(self) -> None:
        """Nothing of it runs or comes back by itself, and all is kept."""
        assert self.sites == {NEIGHBOUR}
        assert not any(map(self.is_up, SLOTS))
        assert self.enabled == set()
        assert set(self.units) <= {removal.NGINX}
        assert self.state.removed
        assert self.state.removed.done
        assert self.state.live
        assert self.layout.app_state.is_dir()

    def assert_in_service(self) -> None:
        """As it was before, once what lost has drained."""
        if self.units.get(self.layout.watch_unit()):
            self.follow()
        assert self.sites == {"inbox", NEIGHBOUR}
        assert self.state.removed is None
        assert self.enabled == {*self.layout.timers(), self.layout.boot_unit()}
        assert all(map(self.is_wanted, self.layout.timers()))
        self.assert_whole()

    def traces(self) -> list[str]:
        """Every file and folder of the app."""
        found = (str(path.relative_to(self.layout.root)) for path in self.layout.root.rglob("*"))
        return sorted(path for path in found if "inbox" in path and NEIGHBOUR not in path)


@pytest.fixture
def served(new_host: Callable[[], Host], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Served]:
    """Makes such hosts."""
    new_host()
    for each in ("reload", "enable", "disable", "is_wanted"):
        monkeypatch.setattr(systemd, each, lambda *a, _name=each, **k: getattr(Host.current, _name)(*a, **k))
    monkeypatch.setattr(systemd, "daemon_reload", lambda: None)
    numbers = itertools.count()

    def make() -> Served:
        if Host.current:
            Host.current.__exit__()
        host = Served(tmp_path / f"served-{next(numbers)}")
        host.__enter__()
        two_releases(host)
        return host

    return make


@pytest.fixture
def host(served: Callable[[], Served]) -> Served:
    return served()


def test_removed_restored_and_purged(host: Served) -> None:
    """Each once and once more, and what a dry run says comes true."""
    assert host.remove(dry_run=True).changed
    host.assert_in_service()
    assert host.remove().changed
    host.assert_removed()
    assert not host.remove().changed
    assert not host.remove(dry_run=True).changed

    assert host.restore(dry_run=True).plan == [
        f"start {name(1)} and wait until it is ready",
        "give inbox.example.com back to Nginx",
    ]
    host.assert_removed()
    assert host.restore().changed
    host.assert_in_service()
    assert not host.restore().changed
    assert [entry.outcome for entry in host.state.history] == ["removed", "live", "live"]
    assert host.state.last_cutover
    assert host.state.last_cutover.action == "restore"

    neighbours = sorted(path for path in host.layout.root.rglob("*") if NEIGHBOUR in str(path))
    host.remove()
    deleted = host.purge(dry_run=True).deleted
    assert host.traces()
    done = host.purge()
    assert (done.changed, done.deleted, done.kept) == (True, deleted, [])
    assert host.traces() == []
    assert removal.is_gone(host.layout)
    assert sorted(path for path in host.layout.root.rglob("*") if NEIGHBOUR in str(path)) == neighbours
    assert "inbox =" not in (host.layout.root / "etc/forge/certificates.toml").read_text()
    assert f"{NEIGHBOUR} =" in (host.layout.root / "etc/forge/certificates.toml").read_text()


def killed(served: Callable[[], Served], before: Callable[[Served], object], work: Callable[[Served], object]) -> Any:
    """Hosts on which some work was killed, at each of its changes."""
    for step in itertools.count():
        host = served()
        before(host)
        ended = not host.killed_at(step, lambda: work(host))  # noqa: B023
        yield host
        if ended:
            assert step > 5
            return


def nothing(_host: Served) -> None: ...


@pytest.mark.parametrize("reboots", [False, True])
@pytest.mark.parametrize("again", ["remove", "restore"])
def test_a_removal_killed_at_any_step_goes_on_or_back(served: Callable[[], Served], again: str, reboots: bool) -> None:
    for host in killed(served, nothing, Served.remove):
        if reboots:
            host.boot()
            host.start(removal.NGINX, *(host.enabled & set(host.layout.timers())))
            host.reload(removal.NGINX)
        begun = host.state.removed is not None
        # Nothing is done in secret.
        assert begun or host.sites == {"inbox", NEIGHBOUR}
        getattr(host, again)()
        if again == "remove":
            host.assert_removed()
        elif begun or not reboots:
            host.assert_in_service()


@pytest.mark.parametrize("again", ["remove", "restore"])
def test_a_restore_killed_at_any_step_goes_on_or_back(served: Callable[[], Served], again: str) -> None:
    for host in killed(served, Served.remove, Served.restore):
        getattr(host, again)()
        host.assert_removed() if again == "remove" else host.assert_in_service()


def test_a_purge_killed_at_any_step_goes_on(served: Callable[[], Served]) -> None:
    whole: list[str] = []

    def removed(host: Served) -> None:
        host.remove()
        whole[:] = host.traces()

    for host in killed(served, removed, Served.purge):
        # Nothing goes before it is written down that it may not come back.
        if (present := host.state).removed and not set(whole) <= set(host.traces()):
            assert present.removed
            assert present.removed.purging
        if removal.is_gone(host.layout):
            continue
        assert bool(removal.half_purged(host.layout.root)) != host.layout.description.exists()
        if host.state.removed and host.state.removed.purging and host.layout.description.exists():
            with pytest.raises(Refused, match="a purge that has begun; `sudo forgectl purge inbox` ends it"):
                host.restore()
            assert not host.remove().changed
        host.purge()
        assert host.traces() == []


def test_nginx_that_does_not_reload_keeps_the_app_in_service(host: Served) -> None:
    host.refuses = True
    with pytest.raises(Refused, match="serves as before"):
        host.remove()
    host.assert_in_service()


def test_nginx_that_does_not_take_the_site_back_leaves_it_out(host: Served) -> None:
    host.remove()
    host.refuses = True
    with pytest.raises(Refused, match="clients do not reach it"):
        host.restore()
    assert host.layout.removed_site.exists()
    host.refuses = False
    host.restore()
    host.assert_in_service()


def test_what_does_not_get_ready_stays_out_of_service(host: Served) -> None:
    host.remove()
    host.broken.add(name(1))
    with pytest.raises(CandidateFailed):
        host.restore()
    host.assert_removed()


def test_a_timer_that_did_not_run_stays_off(host: Served) -> None:
    recycle, rotate = host.layout.timers()
    host.disable(rotate)
    host.remove()
    host.restore()
    assert (recycle in host.enabled, rotate in host.enabled) == (True, False)


def test_a_release_that_is_watched_is_not_removed(host: Served) -> None:
    watch(host)
    with pytest.raises(Locked, match="watched"):
        host.remove()
    assert host.sites == {"inbox", NEIGHBOUR}


def test_what_is_in_service_is_not_purged(host: Served) -> None:
    with pytest.raises(Refused, match="call `sudo forgectl remove inbox` first"):
        host.purge()
    host.assert_in_service()


def test_other_commands_say_how_it_comes_back(host: Served) -> None:
    removal.refuse(host.layout)
    host.remove()
    with pytest.raises(Refused, match="`sudo forgectl restore inbox` brings it back"):
        removal.refuse(host.layout)
    # What a timer calls has nothing to do.
    done = release.recycle(host.layout, host.app, if_due=True, dry_run=False, say=host.say)
    assert not done.changed
    assert "OUT OF SERVICE" in status.text(status.of(host.layout, host.app))


def test_it_stays_out_of_service_over_a_reboot(host: Served) -> None:
    host.remove()
    host.boot()
    assert not any(map(host.is_up, SLOTS))
    host.start(removal.NGINX)
    host.restore()
    host.assert_in_service()


def test_maintenance_stays_on_over_removal_and_restore(host: Served) -> None:
    host.close()
    host.remove()
    host.boot()
    host.start(removal.NGINX)
    host.restore()
    host.assert_in_service()
    assert host.layout.maintenance.exists()


def test_under_the_page_of_a_breaking_migration_nothing_is_started(host: Served) -> None:
    present = host.state
    present.maintenance = "the schema is newer"
    state.save(host.layout, present)
    host.remove()
    assert host.restore().changed
    assert not any(map(host.is_up, SLOTS))
    assert host.layout.maintenance.exists()
    assert host.sites == {"inbox", NEIGHBOUR}


def with_database(host: Served, name: str = "inbox") -> None:
    section = f'\n[database]\nplacement = "local"\nname = "{name}"\napp_role = "{name}_app"\nurl = "postgresql:///x"\n'
    host.layout.description.write_text(host.layout.description.read_text() + section)


def roles(conninfo: str) -> set[str]:
    with psycopg.connect(conninfo) as connection:
        return {row[0] for row in connection.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'inbox%'")}


def databases(conninfo: str) -> set[str]:
    with psycopg.connect(conninfo) as connection:
        return {row[0] for row in connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'inbox%'")}


@pytest.fixture
def filled(postgresql: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Conninfo of a cluster with the app's database, its roles, and those of a neighbour."""
    monkeypatch.setattr(database, "ADMINISTRATION", postgresql)
    mine = [f"inbox_{suffix}" for suffix in ("app", "app_2", "migrate", "rw", "owner")]
    with psycopg.connect(postgresql, autocommit=True) as connection:
        for role in (*mine, "inbox-two_app"):
            connection.execute(f'CREATE ROLE "{role}"'.encode())
        connection.execute("CREATE DATABASE inbox OWNER inbox_owner")
        connection.execute('CREATE DATABASE "inbox-two"')
        yield postgresql
        connection.execute("DROP DATABASE IF EXISTS inbox WITH (FORCE)")
        connection.execute('DROP DATABASE "inbox-two"')
        for role in (*mine, "inbox-two_app"):
            connection.execute(f'DROP ROLE IF EXISTS "{role}"'.encode())


def test_a_purge_drops_the_database_and_its_roles_whoever_is_connected(host: Served, filled: str) -> None:
    with_database(host)
    host.remove()
    with psycopg.connect(filled, dbname="inbox"):
        assert "the database inbox with its roles" in host.purge().deleted
    assert (databases(filled), roles(filled)) == ({"inbox-two"}, {"inbox-two_app"})


def test_a_purge_drops_a_database_that_only_an_older_release_names(host: Served, filled: str) -> None:
    """The entry names another since; one that another app's release names is kept."""
    with_database(host)
    settings = host.layout.settings(name(1))
    text = host.layout.description.read_text()
    settings.write_text(text)
    before, _, section = text.partition("[database]")
    host.layout.description.write_text(f"{before}[database]{section.replace('inbox', 'inbox_new')}")
    host.remove()
    assert removal._shared_with(Layout(NEIGHBOUR, host.layout.root), "inbox") == "inbox"
    assert "the database inbox with its roles" in host.purge(dry_run=True).deleted
    host.purge()
    assert (databases(filled), roles(filled)) == ({"inbox-two"}, {"inbox-two_app"})


def test_a_database_that_another_app_uses_is_kept(host: Served, filled: str) -> None:
    with_database(host)
    other = Layout(NEIGHBOUR, host.layout.root)
    text = host.layout.description.read_text()
    other.description.write_text(text.replace('name = "inbox"', f'name = "{NEIGHBOUR}"', 1))
    host.remove()
    kept = f"the database inbox with its roles, which {NEIGHBOUR} uses"
    assert f"keep {kept}" in host.purge(dry_run=True).plan
    done = host.purge()
    assert done.kept == [kept]
    assert not any(each.startswith("the database") for each in done.deleted)
    assert "inbox" in databases(filled)


def test_a_role_that_owns_something_else_stops_the_purge(host: Served, filled: str) -> None:
    with_database(host)
    host.remove()
    with psycopg.connect(filled, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.kept AS SELECT 1")
        connection.execute("ALTER TABLE public.kept OWNER TO inbox_rw")
        with pytest.raises(Refused, match="PostgreSQL refused to drop inbox or its roles"):
            host.purge()
        assert host.layout.app_state.is_dir()
        connection.execute("DROP TABLE public.kept")
    host.purge()
    assert host.traces() == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_domain_that_went_to_another_app_is_not_taken_back(host: Served, dry_run: bool) -> None:
    host.remove()
    other = Layout(NEIGHBOUR, host.layout.root).site
    before = other.read_text()
    other.write_text(before.replace("www.two.example.com", "www.inbox.example.com"))
    with pytest.raises(Refused, match=rf"expected www\.inbox\.example\.com to be free .* {NEIGHBOUR} serves it"):
        host.restore(dry_run=dry_run)
    host.assert_removed()
    other.write_text(before)
    host.restore()
    host.assert_in_service()


def test_a_database_that_went_to_another_app_is_not_taken_back(host: Served) -> None:
    """Of one that is out of service itself, it does not matter."""
    host.remove()
    assert host.state.live
    settings = host.layout.settings(host.state.live.release)
    section = '\n[database]\nplacement = "local"\nname = "inbox"\napp_role = "inbox_app"\nurl = "postgresql:///x"\n'
    settings.write_text(settings.read_text() + section.replace("local", "external"))
    other = Layout(NEIGHBOUR, host.layout.root)
    other.description.write_text(other.description.read_text() + section)
    removal.refuse_what_another_has(host.layout, config.load(settings))
    settings.write_text(settings.read_text().replace("external", "local"))
    with pytest.raises(Refused, match=f"expected the database inbox to be free .* {NEIGHBOUR} uses it"):
        host.restore()
    host.assert_removed()
    state.save(other, state.State(removed=state.Removed("now", "somebody", done=True)))
    removal.refuse_what_another_has(host.layout, config.load(settings))


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_secret_id_that_ended_meanwhile_is_told_before_anything_starts(host: Served, dry_run: bool) -> None:
    host.remove()
    ended = {"app": identity.Record("2026-01-01T00:00:00+00:00", "2026-01-31T00:00:00+00:00", "accessor")}
    (host.layout.state_dir / identity.RECORDS).write_bytes(msgspec.json.encode(ended))
    with pytest.raises(Refused, match=r"ended at 2026-01-31.* put its entry back and run site\.yml"):
        host.restore(dry_run=dry_run)
    host.assert_removed()


def test_a_certificate_that_another_site_names_is_kept(host: Served) -> None:
    host.remove()
    Layout("shop", host.layout.root).site.write_text("ssl_certificate tls/live/inbox.pem;\n")
    done = host.purge()
    path = host.layout.root / "etc/nginx/tls/live/inbox.pem"
    assert done.kept == [f"{path}, which another site names"]
    assert host.traces() == ["etc/nginx/tls/live/inbox.pem"]


def test_a_folder_of_state_that_is_somebody_elses_is_kept(host: Served) -> None:
    """As /var/lib/git would be, for an app of that name."""
    host.remove()
    dropped = host.layout.units / "inbox.service.d"
    dropped.mkdir()
    os.chown(host.layout.app_state, 4711, -1)
    kept = f"its own state: {host.layout.app_state}, which belongs to uid 4711"
    assert f"keep {kept}" in host.purge(dry_run=True).plan
    done = host.purge()
    assert done.kept == [kept]
    assert not any(each.startswith("its own state") for each in done.deleted)
    assert host.traces() == ["etc/systemd/system/inbox.service.d", "var/lib/inbox"]


def test_a_folder_that_can_not_be_deleted_is_named(host: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    host.remove()

    def busy(path: Path) -> None:
        raise OSError(16, os.strerror(16), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.raises(ForgeError, match=r"busy; mend that, then try again"):
        host.purge()
    monkeypatch.undo()


def test_a_release_brings_a_removed_app_back(host: Served) -> None:
    """The state machine of a release is that of every cutover; then its site comes back."""
    host.remove()
    host.recover()
    present = host.state
    with removal.returning(host.layout, present, host.say):
        Cutover(host.layout, host.app, present, host.say, "release").run(name(2))
    host.assert_in_service()
    assert host.state.live
    assert host.state.live.release == name(2)
    assert host.state.previous
    assert host.state.previous.release == name(1)
