"""rotation.py on a real Vault and PostgreSQL, as far as it needs no systemd."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import hvac
import msgspec
import psycopg
import pytest
from click.testing import CliRunner, Result
from conftest import SOURCE, Bao, admits, describe
from forgectl import cli, config, cutover, database, identity, lock, release, rotation, sealed, state, status
from forgectl.config import App
from forgectl.cutover import Cutover
from forgectl.errors import CandidateFailed, ForgeError, Refused, RolledBack, SecretsError
from forgectl.layout import Layout
from forgectl.staging import Record
from forgectl.state import INTERRUPTED, Entry, Operation, Outcome, Phase, Slotted, State
from forgectl.values import Fetched

PATH = "forge/inbox/rotated"
KEY = "a-signing-key-that-must-never-show"  # pragma: allowlist secret
OLD = "the-old-password-that-must-never-show"  # pragma: allowlist secret
POLICY = f"""
path "secret/data/{PATH}" {{ capabilities = ["create", "read", "update"] }}
path "auth/approle/role/inbox/secret-id" {{ capabilities = ["update"] }}
path "auth/approle/role/inbox/secret-id-accessor/destroy" {{ capabilities = ["update"] }}
path "auth/approle/role/inbox-rotate/secret-id" {{ capabilities = ["update"] }}
path "auth/approle/role/inbox-rotate/secret-id-accessor/destroy" {{ capabilities = ["update"] }}
"""
MORE = """
[secrets.rotation.approles]
app = "inbox"
rotate = "inbox-rotate"
[database]
placement = "local"
name = "inbox"
url = "postgresql+asyncpg://inbox_app@%2Fvar%2Frun%2Fpostgresql/inbox"
app_role = "inbox_app"
"""
RELEASE = "20260101-000001-aaaaaaaaaaaa"


def described(bao: Bao) -> str:
    variables = 'FORGE_SIGNING_KEY = "signing_key"\nFORGE_DATABASE_PASSWORD = "database_password"\n'
    return describe(bao.address, str(bao.ca_file), variables).replace("forge/inbox/app", PATH) + MORE


class Host:
    """A host whose live release has the newest secrets, which PostgreSQL accepts."""

    def __init__(self, layout: Layout, bao: Bao) -> None:
        self.layout, self.bao = layout, bao
        folder = layout.releases / RELEASE
        folder.mkdir()
        for path in (layout.description, folder / "settings.toml"):
            path.write_text(described(bao))
        (folder / "release.json").write_bytes(msgspec.json.encode(Record(RELEASE, "d", "s", "venv", "now", "me", [])))
        self.said: list[str] = []
        version = self.put(signing_key=KEY, database_password=OLD)
        self.save(State(live=Slotted(RELEASE, "blue", "now", version, "inbox_app")))

    @property
    def app(self) -> App:
        return config.load(self.layout.description)

    @property
    def database(self) -> config.Database:
        assert self.app.database
        return self.app.database

    @property
    def state(self) -> State:
        return state.load(self.layout)

    @property
    def live(self) -> Slotted:
        live = self.state.live
        assert live
        return live

    @property
    def newest(self) -> Fetched:
        return identity.fetch(self.layout, self.app, "app")

    def save(self, present: State) -> None:
        state.save(self.layout, present)

    def put(self, **values: str) -> int:
        answer = self.bao.client.secrets.kv.v2.create_or_update_secret(PATH, values)
        return int(answer["data"]["version"])

    def tried(
        self, version: int, outcome: Outcome = "failed", reason: str = "it was not ready", minutes_ago: float = 0
    ) -> None:
        present = self.state
        at = (datetime.now(UTC) - timedelta(minutes=minutes_ago)).isoformat()
        present.record(Entry(RELEASE, at, "me", outcome, {}, reason, "rotation", "b", version))
        self.save(present)

    def is_due(self) -> bool:
        return rotation.is_due(self.layout, self.app, self.said.append)

    def plan(self, *, if_due: bool = False, database_password: bool = False) -> release.Result:
        return rotation.rotate(
            self.layout,
            self.app,
            if_due=if_due,
            database_password=database_password,
            dry_run=True,
            say=self.said.append,
        )

    def check(self) -> Fetched:
        return rotation.newest_secrets(self.layout, self.app, self.state, dry_run=False)

    def change_password(self, newest: Fetched | None = None) -> Fetched:
        return rotation.change_password(self.layout, self.app, self.database, self.state, newest or self.newest)

    def cut_over(self, found: Fetched, *, keep: bool = True) -> State:
        """What a cutover to a version writes down, without systemd: as it is while it drains."""
        present = self.state
        change = Cutover(self.layout, self.app, present, self.said.append, "rotation")
        change.take(found)
        present.operation = change._operation("draining", RELEASE)
        if keep:
            present.live = cutover._slotted(present.operation)
        self.save(present)
        return present


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory, bao: Bao) -> Iterator[Layout]:
    """A host with the identities of the app and of rotation, sealed with a key of its own."""
    layout = Layout("inbox", tmp_path_factory.mktemp("enrolled"))
    for folder in (layout.releases / RELEASE, layout.state_dir, layout.description.parent):
        folder.mkdir(parents=True)
    bao.client.sys.create_or_update_policy("inbox-rotate", POLICY)
    bao.client.auth.approle.create_or_update_approle("inbox-rotate", token_policies=["inbox-rotate"], token_ttl="5m")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SYSTEMD_CREDENTIAL_SECRET", str(layout.root / "host.key"))
        for name, approle in (("app", "inbox"), ("rotate", "inbox-rotate")):
            role_id = bao.client.auth.approle.read_role_id(approle)["data"]["role_id"]
            token = bao.wrapped(f"auth/approle/role/{approle}/secret-id")
            layout.description.write_text(described(bao))
            identity.enrol(layout, config.load(layout.description), name, role_id, token, [], print)
        yield layout


@pytest.fixture
def host(
    layout: Layout, bao: Bao, enrolled: Layout, logins: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> Iterator[Host]:
    shutil.copytree(enrolled.credentials, layout.credentials)
    shutil.copyfile(enrolled.state_dir / "identities.json", layout.state_dir / "identities.json")
    found = Host(layout, bao)
    database.set_verifiers({logins[0]: OLD})
    yield found
    # Whatever a test did: no value in what was said or kept.
    shown = " ".join([*found.said, *capsys.readouterr(), (layout.state_dir / "state.json").read_text()])
    newest = bao.client.secrets.kv.v2.read_secret_version(PATH, raise_on_deleted_version=True)["data"]["data"]
    values = {KEY, OLD, *(value for key, value in newest.items() if key != "database_user")}
    assert not [value for value in values if value and value in shown]


def test_the_same_version_is_a_look_that_nobody_notices(host: Host) -> None:
    """Not even who holds the lock; and it leaves no token."""
    before = (host.layout.state_dir / "state.json").stat().st_mtime_ns
    tokens = len(host.bao.client.auth.token.list_accessors()["data"]["keys"])
    with lock.hold(host.layout, "release"):
        assert not host.is_due()
    assert len(host.bao.client.auth.token.list_accessors()["data"]["keys"]) == tokens
    assert (host.layout.state_dir / "state.json").stat().st_mtime_ns == before
    result = host.plan()
    assert (result.changed, result.secrets, result.plan) == (False, host.live.secrets, [])


def test_a_look_is_cheap(host: Host) -> None:
    """In processor time of a whole process, mostly Python and its imports."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from forgectl import config, rotation\nfrom forgectl.layout import Layout\n"
        "layout = Layout('inbox', Path(sys.argv[1]))\n"
        "print(rotation.is_due(layout, config.load(layout.description), print))\n"
        "print(*sorted({'psycopg', 'forgectl.release', 'forgectl.staging', 'tarfile'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, str(host.layout.root)],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
            check=True,
        )
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
        assert done.stdout == "False\n\n"
    assert min(seconds) < 1, seconds


def test_a_new_version_is_due(host: Host) -> None:
    version = host.put(signing_key=KEY + "2", database_password=OLD)
    assert host.is_due()
    result = host.plan(if_due=True)
    assert (result.changed, result.slot, result.secrets, result.release) == (True, "green", version, RELEASE)
    assert result.plan == [
        f"version {version} of the secrets instead of version {version - 1}",
        "start slot green, wait for /ready, move the traffic, watch it for 10 s, drain slot blue",
    ]


def test_a_version_that_nobody_wrote_down_is_due(host: Host) -> None:
    """A slot from before versions were kept may have old values."""
    host.save(State(live=Slotted(RELEASE, "blue", "now")))
    assert host.is_due()
    assert "instead of an older version" in host.plan().plan[0]


@pytest.mark.parametrize(
    ("outcome", "reason", "again"),
    [("failed", "it ended", False), ("rolled back", "not ready", False), ("failed", INTERRUPTED, True)],
)
def test_a_refused_version_is_not_tried_again(host: Host, outcome: Outcome, reason: str, again: bool) -> None:
    """But by an operator, and when it changes. One that was interrupted proved nothing."""
    version = host.put(signing_key=KEY + "2", database_password=OLD)
    host.tried(version, outcome, reason)
    if again:
        assert host.is_due()
        assert host.plan(if_due=True).changed
        return
    for look in (host.is_due, lambda: host.plan(if_due=True)):
        with pytest.raises(CandidateFailed, match=f"version {version} of the secrets was refused at 2") as caught:
            look()
        assert reason in str(caught.value)
        assert "sudo forgectl secrets rotate inbox" in str(caught.value)
    assert host.plan().changed
    host.put(signing_key=KEY + "3", database_password=OLD)
    assert host.is_due()


def test_a_refused_version_is_tried_again_now_and_then(host: Host) -> None:
    """What kept it from getting ready may have been something else."""
    version = host.put(signing_key=KEY + "2", database_password=OLD)
    host.tried(version, minutes_ago=59)
    with pytest.raises(CandidateFailed):
        host.is_due()
    host.tried(version, minutes_ago=61)
    assert host.is_due()
    assert host.plan(if_due=True).changed


def test_what_another_release_refused_is_tried(host: Host) -> None:
    version = host.put(signing_key=KEY + "2", database_password=OLD)
    present = host.state
    present.record(Entry("R0", "then", "me", "failed", {}, "it ended", "rotation", "b", version))
    host.save(present)
    assert host.is_due()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"database_password": OLD}, "key signing_key is missing"),
        ({"database_password": OLD, "signing_key": ""}, "key signing_key at .* is empty"),
        ({"database_password": OLD, "signing_key": KEY + "\0"}, "holds a NUL"),
        ({"database_password": OLD, "signing_key": KEY, "database_user": "root"}, "expected inbox_app or inbox_app_2"),
    ],
)
def test_a_version_that_fails_its_check_is_written_down_once(host: Host, values: dict[str, str], expected: str) -> None:
    version = host.put(**values)
    assert host.is_due(), "somebody has to write it down"
    with pytest.raises(SecretsError, match=expected):
        host.plan()
    assert not host.state.history, "a plan writes nothing"
    for _ in range(2):
        with pytest.raises(SecretsError, match=expected):
            host.check()
        with pytest.raises(SecretsError, match=expected):
            host.is_due()
    (entry,) = host.state.history
    assert (entry.release, entry.action, entry.outcome, entry.secrets) == (RELEASE, "rotation", "failed", version)
    assert host.live.secrets == version - 1
    host.put(signing_key=KEY, database_password=OLD)
    assert host.is_due()


def test_vault_that_does_not_answer_is_no_refusal(host: Host) -> None:
    settings = host.layout.releases / RELEASE / "settings.toml"
    settings.write_text(settings.read_text().replace(host.bao.address, "https://127.0.0.1:1"))
    with pytest.raises(SecretsError) as caught:
        host.is_due()
    assert (caught.value.state, caught.value.version) == ("unreachable", 0)
    with pytest.raises(SecretsError):
        host.plan()
    assert not host.state.history


def test_nothing_is_due_where_nothing_serves(host: Host) -> None:
    for present in (State(), State(live=Slotted(RELEASE, "blue", "now"), maintenance="R2 brings 0002")):
        host.save(present)
        assert not host.is_due()
        assert not host.plan(if_due=True).changed
        with pytest.raises(Refused, match=r"expected inbox to (have a live release|serve)"):
            host.plan()


def test_a_cutover_under_way_is_left_alone(host: Host) -> None:
    """But for one whose command was killed: somebody has to end it."""
    host.put(signing_key=KEY + "2", database_password=OLD)
    phases: dict[Phase, bool] = {"maintenance": True, "starting": True, "watching": False, "draining": False}
    for phase, interrupted in phases.items():
        host.save(State(live=host.live, operation=Operation(phase, RELEASE, "green", host.live, "now")))
        assert host.is_due() == interrupted
        assert not host.plan(if_due=True).changed
        with lock.hold(host.layout, "release"):
            assert not host.is_due()


def test_status_shows_what_serves_and_what_was_refused(host: Host) -> None:
    def text() -> str:
        present = host.state
        found: dict[str, Any] = {"app": "inbox", "domain": "d", "live_socket": "blue", "ready": True, "slots": {}}
        found |= {"workers": {"count": 1, "reasons": []}, "secrets": {}, "operation": None}
        found |= {"maintenance": None, "maintenance_mode": None, "removed": None, "source": {}}
        found |= {"readiness": "/ready", "commands": {}}
        found |= {"live": msgspec.to_builtins(present.live), "lock": None, "last": None}
        return status.text(found | {"secrets_refused": msgspec.to_builtins(present.refused())})

    version = host.live.secrets
    assert f"version {version}" in text()
    assert "REFUSED" not in text()
    host.tried(version + 1, reason="it was not ready")
    assert re.search(rf"REFUSED   version {version + 1} of its secrets at \S+: it was not ready", text())
    host.tried(version + 1, "live", "")
    assert "REFUSED" not in text()
    host.tried(version + 2)
    host.save(msgspec.structs.replace(host.state, live=Slotted(RELEASE, "green", "now", version + 3)))
    assert "REFUSED" not in text(), "a newer one serves"


def test_a_new_database_password_never_leaves_a_slot_with_a_wrong_one(
    host: Host, postgresql: str, logins: tuple[str, str]
) -> None:
    """At each step, what the live slot has works, and what the next start would get works."""
    first, second = logins
    served = host.newest
    for role, other in ((second, first), (first, second)):
        assert host.plan(database_password=True).plan[0] == (
            f"give {role} a new password, in PostgreSQL and among the secrets"
        )
        found = host.change_password()
        assert found == host.newest
        assert found.version == served.version + 1
        assert found.values | {"database_user": other, "database_password": served.values["database_password"]} == {
            **served.values,
            "database_user": other,
        }
        assert (found.values["database_user"], found.values["signing_key"]) == (role, KEY)
        assert admits(postgresql, role, found.values["database_password"])
        assert admits(postgresql, other, served.values["database_password"])
        present = host.cut_over(found)
        assert admits(postgresql, other, served.values["database_password"]), "the old slot still drains"
        cutover.finish(host.layout, host.app, present, 0, host.said.append)
        assert host.live.database_user == role
        assert admits(postgresql, role, found.values["database_password"])
        assert not admits(postgresql, other, served.values["database_password"])
        served = found


def test_killed_after_the_verifier(host: Host, postgresql: str, logins: tuple[str, str]) -> None:
    database.set_verifiers({logins[1]: "lost"})
    assert not host.is_due()
    found = host.change_password()
    assert not admits(postgresql, logins[1], "lost")
    assert admits(postgresql, logins[1], found.values["database_password"])
    assert admits(postgresql, logins[0], OLD)


def test_killed_after_the_write(host: Host) -> None:
    """The timer, or the same command, goes on with the pair that is there instead of making another."""
    found = host.change_password()
    assert host.is_due()
    for database_password in (False, True):
        result = host.plan(database_password=database_password)
        assert result.secrets == found.version
        assert "new password" not in " ".join(result.plan)


def test_somebody_else_writes_meanwhile(host: Host, postgresql: str, logins: tuple[str, str]) -> None:
    """Nothing of theirs is lost, and the slot keeps what it has."""
    stale = host.newest
    version = host.put(signing_key=KEY + "2", database_password=OLD)
    with pytest.raises(SecretsError) as caught:
        host.change_password(stale)
    assert caught.value.state == "conflict"
    assert host.newest == Fetched({"signing_key": KEY + "2", "database_password": OLD}, version)
    assert admits(postgresql, logins[0], OLD)


def test_nothing_is_written_that_postgresql_does_not_accept(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.newest
    monkeypatch.setattr(database, "ADMINISTRATION", "host=/nowhere")
    with pytest.raises(Refused, match="expected PostgreSQL on this host"):
        host.change_password()
    assert host.newest == before


def test_after_a_rollback_both_passwords_work(host: Host, postgresql: str, logins: tuple[str, str]) -> None:
    found = host.change_password()
    present = host.cut_over(found, keep=False)
    cutover.finish(host.layout, host.app, present, 0, host.said.append)
    assert host.live.database_user == logins[0]
    assert admits(postgresql, logins[0], OLD)
    assert admits(postgresql, logins[1], found.values["database_password"])


def test_the_password_expires_before_the_cutover_is_forgotten(
    host: Host, postgresql: str, logins: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL may be down just then: whoever goes on with the draining does it again."""
    present = host.cut_over(host.change_password())
    with monkeypatch.context() as down:
        down.setattr(database, "ADMINISTRATION", "host=/nowhere")
        with pytest.raises(Refused, match="expected PostgreSQL on this host"):
            cutover.finish(host.layout, host.app, present, 0, host.said.append)
    present = host.state
    assert present.operation
    assert admits(postgresql, logins[0], OLD)
    cutover.finish(host.layout, host.app, present, 0, host.said.append)
    assert host.state.operation is None
    assert not admits(postgresql, logins[0], OLD)


def test_a_reboot_leaves_the_draining_to_the_watch(host: Host) -> None:
    present = host.cut_over(host.change_password())
    cutover._after_reboot(host.layout, present)
    assert host.state.operation
    assert host.state.operation.phase == "draining"


def test_a_pair_that_somebody_wrote_by_hand_is_made_to_work(
    host: Host, postgresql: str, logins: tuple[str, str]
) -> None:
    """For the idle role; the verifier of the one in use is never touched, whatever the secrets say."""
    host.put(signing_key=KEY, database_password="by-hand", database_user=logins[1])
    host.cut_over(host.newest, keep=False)
    assert admits(postgresql, logins[1], "by-hand")
    version = host.put(signing_key=KEY, database_password="by-hand")
    with pytest.raises(SecretsError, match=f"as the live slot has it.* found another in version {version}; ") as caught:
        host.cut_over(host.newest, keep=False)
    assert caught.value.version == version
    assert admits(postgresql, logins[0], OLD)


def test_provisioning_takes_no_password_from_the_slot_that_uses_it(
    host: Host, postgresql: str, logins: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever newer secrets say, and also after the database has lost it."""
    host.put(signing_key=KEY, database_password="by-hand")  # pragma: allowlist secret
    monkeypatch.setattr(cli, "_app", lambda _name: (host.layout, host.app))
    for stored, changed in ((OLD, False), ("of a backup", True)):
        database.set_verifiers({logins[0]: stored})
        done = CliRunner().invoke(cli.forgectl, ["database", "verifiers", "inbox", "--json"])
        assert (done.exit_code, json.loads(done.stdout)["changed"]) == (0, changed), done.output
        assert admits(postgresql, logins[0], OLD)
    # Before anything serves there is nobody to take it from.
    host.save(State())
    assert CliRunner().invoke(cli.forgectl, ["database", "verifiers", "inbox"]).exit_code == 0
    assert admits(postgresql, logins[0], "by-hand")


def test_the_same_version_costs_no_look_at_the_database(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "ADMINISTRATION", "host=/nowhere")
    present = host.cut_over(host.newest)
    cutover.finish(host.layout, host.app, present, 0, host.said.append)


def test_the_password_of_another_role_is_never_taken(host: Host, postgresql: str) -> None:
    """A role that an older inventory named is nobody's business any more."""
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE ROLE somebody LOGIN")
        try:
            database.set_verifiers({"somebody": "theirs"})
            present = host.cut_over(host.newest)
            assert present.operation
            old = Slotted(RELEASE, "blue", "now", 1, "somebody")
            present.operation = msgspec.structs.replace(present.operation, old=old, slot="green")
            present.live = Slotted(RELEASE, "green", "now", 2, "inbox_app")
            cutover.finish(host.layout, host.app, present, 0, host.said.append)
            assert admits(postgresql, "somebody", "theirs")
        finally:
            connection.execute("DROP ROLE somebody")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('placement = "local"', 'placement = "external"', "whose roles are not this host's to change"),
        (MORE[MORE.index("[database]") :], "", "expected inbox to have a database"),
        ('name = "inbox"\nurl', 'vault_role = "inbox"\nname = "inbox"\nurl', "found that Vault leases it"),
        (MORE[: MORE.index("[database]")], "\n", "expected a rotate identity of inbox"),
    ],
)
def test_a_password_that_is_not_this_hosts_to_change(host: Host, old: str, new: str, expected: str) -> None:
    settings = host.layout.releases / RELEASE / "settings.toml"
    assert old in settings.read_text()
    settings.write_text(settings.read_text().replace(old, new))
    with pytest.raises(Refused, match=expected):
        host.plan(database_password=True)
    assert host.newest.version == host.live.secrets


def test_without_vault_the_pair_is_sealed_here(host: Host, postgresql: str, logins: tuple[str, str]) -> None:
    text = host.layout.description.read_text()
    text = text.replace("[secrets]\n", '[secrets]\nsource = "systemd_creds"\n').replace(
        MORE[: MORE.index("[database]")], "\n"
    )
    host.layout.description.write_text(text)
    sealed.change(host.layout, "app", {"signing_key": KEY, "database_password": OLD})
    found = host.change_password()
    assert found == host.newest == Fetched(found.values, 2)
    assert found.values["database_user"] == logins[1]
    assert admits(postgresql, logins[1], found.values["database_password"])


def test_secret_ids_that_cannot_be_renewed_keep_no_version_waiting(host: Host) -> None:
    path = host.layout.state_dir / "identities.json"
    known = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: each for name, each in known.items() if name != "app"}))
    assert host.is_due()
    assert host.plan().plan == ["renew the secret ids of: app"]
    assert rotation.renew_ids(host.layout, host.app, host.said.append, dry_run=False) == (["app"], "")
    assert not host.is_due()
    path.write_text("{}")
    rotate = host.layout.sealed("rotate", "secret-id")
    rotate.unlink()
    renewed, problem = rotation.renew_ids(host.layout, host.app, host.said.append, dry_run=False)
    assert (renewed, "of the rotate identity" in problem) == ([], True)
    host.put(signing_key=KEY + "2", database_password=OLD)
    assert host.plan().changed


@pytest.mark.parametrize("fault", ["", "refused", "incomplete"])
@pytest.mark.parametrize("moved", [False, True])
def test_the_way_back_is_not_barred_by_newer_secrets(host: Host, fault: str, moved: bool) -> None:
    """It then keeps those that serve, unless they came from elsewhere."""
    values = {"database_password": OLD} | ({} if fault == "incomplete" else {"signing_key": KEY + "2"})
    version = host.put(**values)
    if fault == "refused":
        host.tried(version)
    live = Record(RELEASE, "d", "s", "venv", "now", "me", [])
    if moved:
        settings = host.layout.settings(RELEASE)
        settings.write_text(settings.read_text().replace(host.app.secrets.path, "forge/elsewhere"))

    def chosen() -> Fetched | None:
        return release._secrets_to_go_back_with(host.layout, host.app, live, host.state, host.said.append)

    if moved and fault == "incomplete":
        with pytest.raises(SecretsError, match="signing_key is missing"):
            chosen()
    else:
        assert (chosen() is None) == (bool(fault) and not moved)
        assert bool(host.said) == (bool(fault) and not moved)


def test_what_was_rolled_back_is_told_by_its_version() -> None:
    entry = Entry(RELEASE, "now", "me", "rolled back", {}, "/ready answers 503", "rotation", "b", 4)
    error = cutover.verdict_error(entry, State(live=Slotted(RELEASE, "blue", "now", 3)))
    assert isinstance(error, RolledBack)
    assert "version 4 of the secrets was rolled back, and version 3 serves: /ready answers 503" in str(error)


def call(host: Host, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setattr(cli, "_app", lambda _name: (host.layout, host.app))
    done = CliRunner().invoke(cli.forgectl, ["secrets", "rotate", "inbox", *arguments])
    host.said += [done.output, str(done.exception)]
    return done


def test_the_timer_says_nothing_when_there_is_nothing_to_do(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call(host, monkeypatch, "--if-due")
    assert (done.exit_code, done.output) == (0, "")
    done = call(host, monkeypatch, "--if-due", "--json")
    assert json.loads(done.stdout) == {"app": "inbox", "action": "rotation", "changed": False}


@pytest.mark.parametrize(
    ("breakage", "code", "expected"),
    [("key", 6, "key signing_key is missing"), ("refused", 4, "was refused at 2"), ("vault", 6, "is unreachable")],
)
def test_each_run_of_the_timer_raises_one_alert(
    host: Host, monkeypatch: pytest.MonkeyPatch, breakage: str, code: int, expected: str
) -> None:
    if breakage == "key":
        host.tried(host.put(database_password=OLD))
    elif breakage == "refused":
        host.tried(host.put(signing_key=KEY + "2", database_password=OLD), reason="two\nlines")
    else:
        settings = host.layout.releases / RELEASE / "settings.toml"
        settings.write_text(settings.read_text().replace(host.bao.address, "https://127.0.0.1:1"))
    for arguments in (["--if-due"], ["--if-due", "--json"]):
        done = call(host, monkeypatch, *arguments)
        assert done.exit_code == code
        assert done.stderr.startswith("<3>ALERT inbox: ")
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_another_command_at_work_is_no_alert(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put(signing_key=KEY + "2", database_password=OLD)
    with lock.hold(host.layout, "release"):
        done = call(host, monkeypatch, "--if-due")
    assert isinstance(done.exception, ForgeError)
    assert done.exception.exit_code == 5
    assert "ALERT" not in done.output


def test_an_operator_gets_no_alert(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put(database_password=OLD)
    done = call(host, monkeypatch, "--dry-run")
    assert isinstance(done.exception, SecretsError)
    assert "ALERT" not in done.output
    assert call(host, monkeypatch, "--if-due", "--database-password").exit_code == 2


def test_only_the_rotate_identity_may_write(host: Host) -> None:
    """What the app holds is worth no more than reading."""
    role_id, secret_id = identity._credentials(host.layout, "app")
    with closing(hvac.Client(host.bao.address, verify=str(host.bao.ca_file)).adapter) as adapter:
        client = hvac.Client(host.bao.address, verify=str(host.bao.ca_file), session=adapter.session)
        client.auth.approle.login(role_id, secret_id)
        with pytest.raises(hvac.exceptions.Forbidden):
            client.secrets.kv.v2.create_or_update_secret(PATH, {"signing_key": "x"})
