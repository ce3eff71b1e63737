"""sealed.py with the host's own systemd-creds, and with a key of the test's own."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from conftest import HARD_VALUES, SOURCE, describe
from forgectl import cli, config, identity, sealed, slots, state, systemd
from forgectl.config import App
from forgectl.errors import ForgeError, Refused, SecretsError
from forgectl.layout import Layout
from forgectl.values import LONGEST_VARIABLE, Fetched

SECRET = "hunter2-must-never-show"  # pragma: allowlist secret
VARIABLES = {"FORGE_SIGNING_KEY": "signing_key", "FORGE_API_KEY": "api key"}
DATABASE = """
[database]
placement = "local"
name = "inbox"
url = "postgresql+asyncpg://inbox_app@%2Fvar%2Frun%2Fpostgresql/inbox"
app_role = "inbox_app"
migrate_role = "inbox_migrate"
[migration]
user = "inbox-migrate"
command = ["alembic", "upgrade", "head"]
variables = { FORGE_DATABASE_PASSWORD = "database_password" }
"""


def described(variables: dict[str, str], more: str = "") -> str:
    lines = "".join(f"{name} = {json.dumps(key)}\n" for name, key in variables.items())
    text = describe(variables=lines).replace("[secrets]\n", '[secrets]\nsource = "systemd_creds"\n')
    return "".join(line for line in text.splitlines(True) if not line.startswith(("address", "ca_file", "path"))) + more


def app_of(layout: Layout) -> App:
    return config.load(layout.description)


@pytest.fixture
def host(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A host whose app has its secrets sealed, with none set yet; its key is in a file of the test."""
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(layout.root / "host.key"))
    layout.credentials.mkdir(parents=True, mode=0o700)
    layout.units.mkdir(parents=True)
    layout.description.write_text(described(VARIABLES))
    for release in ("R1", "R2"):
        (layout.releases / release).mkdir()
        (layout.releases / release / "slot.conf").write_text("[Service]\n")
        (layout.releases / release / "settings.toml").write_text(described(VARIABLES))
    return layout


def set_all(layout: Layout, value: str = "v") -> int:
    return sealed.change(layout, "app", dict.fromkeys(VARIABLES.values(), value))[0]


def copy_of(layout: Layout, slot: str) -> Fetched:
    text = systemd.decrypt(layout.sealed("app", f"values.{slot}"), "values")
    return sealed.handed_over(text, "inbox", "app", {})


def test_whatever_a_variable_can_carry_comes_back(host: Layout) -> None:
    values = {**HARD_VALUES, "longest": "x" * (LONGEST_VARIABLE - len("a variable for longest") - 2)}
    assert sealed.change(host, "app", values) == (1, True)
    assert identity.fetch(host, app_with(host, {}), "app") == Fetched(values, 1)
    path = host.sealed("app", "values")
    assert path.stat().st_mode & 0o777 == 0o600
    data = path.read_bytes()
    assert not [value for value in HARD_VALUES.values() if value.encode() in data]


def app_with(layout: Layout, variables: dict[str, str], more: str = "") -> App:
    layout.description.write_text(described(variables, more))
    return app_of(layout)


def test_every_change_is_a_version_and_no_change_is_none(host: Layout) -> None:
    assert sealed.change(host, "app", {"a": "1"}) == (1, True)
    assert sealed.change(host, "app", {"b": "2"}) == (2, True)
    before = host.sealed("app", "values").read_bytes()
    assert sealed.change(host, "app", {"b": "2", "c": None}) == (2, False)
    assert host.sealed("app", "values").read_bytes() == before
    assert sealed.change(host, "app", {"a": None}) == (3, True)
    assert sealed.newest(host, "app") == sealed.Sealed(3, {"b": "2"})
    assert sealed.newest(host, "migrate") == sealed.Sealed(0, {})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "key k at standard input is empty"),
        (f"{SECRET}\0", "holds a NUL or an invalid character"),
        (SECRET + "\udcff", "holds a NUL or an invalid character"),
        (SECRET + "x" * LONGEST_VARIABLE, "longer than the 128 KiB"),
    ],
)
def test_what_no_variable_can_carry_is_refused(host: Layout, value: str, expected: str) -> None:
    sealed.change(host, "app", {"k": "good"})
    with pytest.raises(Refused, match=expected) as caught:
        sealed.change(host, "app", {"k": value})
    assert SECRET not in str(caught.value)
    assert sealed.newest(host, "app") == sealed.Sealed(1, {"k": "good"})


def test_more_than_systemd_hands_over_is_refused(host: Layout) -> None:
    sealed.change(host, "app", {f"k{number}": "x" * 114 * 1024 for number in range(7)})
    with pytest.raises(Refused, match="expected all values of the app identity of inbox within 800 KiB"):
        sealed.change(host, "app", {"k7": "x" * 4 * 1024})
    assert len(sealed.newest(host, "app").values) == 7


def test_the_gate_says_what_to_call(host: Layout) -> None:
    with pytest.raises(SecretsError) as caught:
        identity.fetch(host, app_of(host), "app")
    assert (caught.value.state, caught.value.version) == ("incomplete", 0)
    assert "FORGE_SIGNING_KEY needs it: sudo forgectl secrets set inbox signing_key;" in str(caught.value)
    assert str(caught.value).endswith("FORGE_API_KEY needs it: sudo forgectl secrets set inbox 'api key'")
    sealed.change(host, "app", {"signing_key": "v"})
    with pytest.raises(SecretsError, match="FORGE_API_KEY needs it") as caught:
        identity.fetch(host, app_of(host), "app")
    assert caught.value.version == 1
    set_all(host)
    assert identity.fetch(host, app_of(host), "app").version == 2


def test_the_passwords_of_a_local_database_are_needed_too(host: Layout) -> None:
    app = app_with(host, {}, DATABASE)
    found = identity.check(host, app)
    command = "sudo forgectl secrets set inbox database_password"
    assert found["identities"]["app"]["missing"] == {"database_password": command}
    assert found["identities"]["migrate"]["missing"] == {"database_password": f"{command} --identity migrate"}
    assert f"{command} --identity migrate" in found["problems"][1]
    for each in ("app", "migrate"):
        sealed.change(host, each, {"database_password": sealed.generate()})
    found = identity.check(host, app)
    assert [each["state"] for each in found["identities"].values()] == ["ok", "ok"]
    assert found["problems"] == []
    passwords = [identity.fetch(host, app, each).values["database_password"] for each in ("app", "migrate")]
    assert len(set(passwords)) == 2
    assert min(map(len, passwords)) == 48


def test_another_host_cannot_open_them(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(host)
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(host.root / "other.key"))
    systemd.encrypt("so that there is a key", "x")
    found = identity.check(host, app_of(host))["identities"]["app"]
    assert found["state"] == "missing"
    assert f"expected to open {host.sealed('app', 'values')} with this host's key" in found["problem"]
    with pytest.raises(SecretsError):
        sealed.change(host, "app", {"signing_key": "new"})


def test_what_was_sealed_for_another_purpose_is_refused(host: Layout) -> None:
    host.sealed("app", "values").write_bytes(systemd.encrypt(SECRET, "values"))
    with pytest.raises(SecretsError, match="found something else; set every key again") as caught:
        identity.fetch(host, app_of(host), "app")
    assert SECRET not in str(caught.value)
    host.sealed("app", "values").write_bytes(systemd.encrypt('{"version": 1, "values": {}}', "secret-id"))
    with pytest.raises(SecretsError, match="expected to open"):
        identity.fetch(host, app_of(host), "app")


def test_an_interrupted_change_leaves_the_old_version(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(host)

    def fail(*_: object) -> bytes:
        raise ForgeError("killed")

    monkeypatch.setattr(systemd, "encrypt", fail)
    with pytest.raises(ForgeError, match="killed"):
        set_all(host, "w")
    assert sealed.newest(host, "app").version == 1


def prepare(layout: Layout, slot: str, release: str, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "daemon_reload", lambda: None)
    monkeypatch.setattr(systemd, "is_behind", lambda *_units: False)
    slots.prepare(layout, slot, release, version)


def test_a_slot_keeps_the_version_that_was_checked(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_all(host, "one") == 1
    prepare(host, "blue", "R1", 1, monkeypatch)
    assert set_all(host, "two") == 2
    # A boot, and a slot that systemd restarts.
    before = host.sealed("app", "values.blue").stat().st_ino
    prepare(host, "blue", "R1", 1, monkeypatch)
    assert host.sealed("app", "values.blue").stat().st_ino == before
    assert copy_of(host, "blue") == Fetched(dict.fromkeys(VARIABLES.values(), "one"), 1)
    # A fresh slot of the same version, as a recycling wants it.
    prepare(host, "green", "R1", 1, monkeypatch)
    assert copy_of(host, "green").version == 1
    prepare(host, "green", "R2", 2, monkeypatch)
    assert copy_of(host, "green") == Fetched(dict.fromkeys(VARIABLES.values(), "two"), 2)
    assert copy_of(host, "blue").version == 1
    # Nobody wrote down which, and one that is gone.
    for version in (0, 7):
        prepare(host, "blue", "R1", version, monkeypatch)
        assert copy_of(host, "blue").version == 2


def test_a_slot_keeps_what_cannot_be_opened_now(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key may be a TPM's that is busy: what the slot has is right, and what is newer nobody has tried."""
    set_all(host, "one")
    prepare(host, "blue", "R1", 1, monkeypatch)
    set_all(host, "two")
    before = host.sealed("app", "values.blue").read_bytes()
    with monkeypatch.context() as locked:
        locked.setenv("SYSTEMD_CREDENTIAL_SECRET", str(host.root / "another.key"))
        prepare(host, "blue", "R1", 1, monkeypatch)
    assert host.sealed("app", "values.blue").read_bytes() == before
    assert copy_of(host, "blue").version == 1


def test_a_version_never_comes_twice(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a slot that has 2 would take the other 2 for its own."""
    for value in ("one", "two"):
        set_all(host, value)
    prepare(host, "blue", "R1", 2, monkeypatch)
    host.sealed("app", "values").unlink()
    assert set_all(host, "three") == 3


def test_an_app_without_secrets_has_a_credential_all_the_same(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(host, "blue", "R1", 0, monkeypatch)
    assert copy_of(host, "blue") == Fetched({}, 0)
    before = host.sealed("app", "values.blue").stat().st_ino
    prepare(host, "blue", "R1", 0, monkeypatch)
    assert host.sealed("app", "values.blue").stat().st_ino == before


def test_a_release_with_vault_leaves_no_copy(host: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(host)
    prepare(host, "blue", "R1", 1, monkeypatch)
    (host.releases / "R2/settings.toml").write_text(describe())
    prepare(host, "blue", "R2", 5, monkeypatch)
    assert not host.sealed("app", "values.blue").exists()
    assert host.sealed("app", "values").exists()  # for a rollback to R1


LAUNCH = "import sys; from pathlib import Path; from forgectl.launch import main; main(sys.argv[2:], Path(sys.argv[1]))"
TELL = "import json, os, sys; print(json.dumps([dict(os.environ), [m for m in sys.modules if 'hvac' in m]]))"


def launch(layout: Layout, mode: str, which: str, credential: str | None) -> subprocess.CompletedProcess[str]:
    folder = layout.root / "credentials"
    folder.mkdir(exist_ok=True)
    (folder / "values").unlink(missing_ok=True)
    if credential is not None:
        (folder / "values").write_text(credential)
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(layout.root), mode, "inbox", which],
        env={"PYTHONPATH": str(SOURCE), "PATH": os.environ["PATH"], "CREDENTIALS_DIRECTORY": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def release(host: Layout) -> Layout:
    """A release in slot blue that tells what environment it got."""
    variables = {f"V_{key.upper()}": key for key in HARD_VALUES}
    folder = host.releases / "R1"
    (folder / "source/src/gunicorn").mkdir(parents=True)
    (folder / "source/src/gunicorn/__main__.py").write_text(TELL)
    (folder / "source/src/gunicorn/__init__.py").touch()
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/python").symlink_to(sys.executable)
    migrate = DATABASE.replace('"alembic", "upgrade", "head"', '"gunicorn"')
    (folder / "settings.toml").write_text(described(variables, migrate))
    (host.slots / "blue").symlink_to("../releases/R1")
    return host


def test_the_app_starts_with_what_systemd_has_opened(release: Layout) -> None:
    sealed.change(release, "app", dict(HARD_VALUES))
    done = launch(release, "app", "blue", systemd.decrypt(release.sealed("app", "values"), "values"))
    assert (done.returncode, done.stderr) == (0, "")
    environment, _ = json.loads(done.stdout)
    assert {key: environment[f"V_{key.upper()}"] for key in HARD_VALUES} == HARD_VALUES
    Path(environment["PROMETHEUS_MULTIPROC_DIR"]).rmdir()


def test_a_migration_starts_with_its_own(release: Layout) -> None:
    done = launch(release, "migrate", "R1", '{"version": 1, "values": {"database_password": "p"}}')
    environment, _ = json.loads(done.stdout)
    assert environment["FORGE_DATABASE_PASSWORD"] == "p"
    assert not [name for name in environment if name.startswith("V_")]


@pytest.mark.parametrize(
    ("credential", "expected"),
    [
        (None, "expected the sealed credential values; found none"),
        (SECRET, "expected the sealed values in the sealed values of the app identity; found something else"),
        ('{"version": 1, "values": {}}', "V_QUOTES needs it: sudo forgectl secrets set inbox quotes"),
    ],
)
def test_it_fails_closed_in_one_line(release: Layout, credential: str | None, expected: str) -> None:
    done = launch(release, "app", "blue", credential)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("forge-launch: inbox: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert SECRET not in done.stderr


@pytest.fixture
def call(host: Layout, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line on that host, with what is piped into it."""
    monkeypatch.setattr(cli, "_app", lambda _name: (host, app_of(host)))

    def run(*arguments: str, stdin: bytes = b"") -> Any:
        return CliRunner().invoke(cli.forgectl, ["secrets", *arguments], input=io.BytesIO(stdin))

    return run


@pytest.mark.parametrize(
    ("stdin", "value"),
    [
        (b"value", "value"),
        (b"value\n", "value"),
        (b"value\n\n", "value\n"),
        (b" value \r\n", " value \r"),
        ("ünïcode 鍵\nsecond\n".encode(), "ünïcode 鍵\nsecond"),
    ],
)
def test_one_newline_at_the_end_is_taken_off(host: Layout, call: Callable[..., Any], stdin: bytes, value: str) -> None:
    done = call("set", "inbox", "signing_key", "--json", stdin=stdin)
    assert json.loads(done.stdout) == {
        "app": "inbox",
        "identity": "app",
        "key": "signing_key",
        "version": 1,
        "changed": True,
    }
    assert sealed.newest(host, "app").values == {"signing_key": value}
    assert json.loads(call("set", "inbox", "signing_key", "--json", stdin=stdin).stdout)["changed"] is False


def test_what_is_no_text_is_refused(host: Layout, call: Callable[..., Any]) -> None:
    done = call("set", "inbox", "signing_key", stdin=SECRET.encode() + b"\xff")
    assert isinstance(done.exception, Refused)
    assert SECRET not in str(done.exception)
    assert not host.sealed("app", "values").exists()


def test_a_generated_value_is_shown_to_nobody(host: Layout, call: Callable[..., Any]) -> None:
    done = call("set", "inbox", "signing_key", "--generate", "--dry-run")
    assert done.output == "inbox (app): signing_key would be sealed: version 1\n"
    assert not host.sealed("app", "values").exists()
    done = call("set", "inbox", "signing_key", "--generate")
    value = sealed.newest(host, "app").values["signing_key"]
    assert done.exit_code == 0
    assert len(value) == 48
    assert value not in done.output


def test_a_new_database_password_is_for_the_idle_role(host: Layout, call: Callable[..., Any]) -> None:
    """What serves logs in with the other one until the cutover."""
    host.description.write_text(described({}, DATABASE))
    assert call("set", "inbox", "database_password", "--generate").exit_code == 0
    assert sealed.newest(host, "app").values.keys() == {"database_password"}
    for used, idle in (("inbox_app", "inbox_app_2"), ("inbox_app_2", "inbox_app")):
        state.save(host, state.State(live=state.Slotted("R1", "blue", "2026-01-01T00:00:00Z", 1, used)))
        before = sealed.newest(host, "app").values["database_password"]
        assert call("set", "inbox", "database_password", "--generate").exit_code == 0
        values = sealed.newest(host, "app").values
        assert values["database_user"] == idle
        assert values["database_password"] != before
    assert call("set", "inbox", "database_password", "--generate", "--identity", "migrate").exit_code == 0
    assert sealed.newest(host, "migrate").values.keys() == {"database_password"}


def test_a_slip_of_the_pen_is_noticed(call: Callable[..., Any]) -> None:
    assert "refers to signing_kye yet" in call("set", "inbox", "signing_kye", stdin=b"x").stderr
    assert call("set", "inbox", "signing_key", stdin=b"x").stderr == ""
    assert "releases are refused until it is set again" in call("unset", "inbox", "signing_key").stderr
    assert call("unset", "inbox", "signing_kye").stderr == ""


def test_the_other_source_is_pointed_at(host: Layout, call: Callable[..., Any]) -> None:
    done = call("enrol", "inbox", "--identity", "app", "--role-id", "r", stdin=b"token")
    assert isinstance(done.exception, Refused)
    assert "come from vault; found systemd_creds; use `forgectl secrets set inbox KEY`" in str(done.exception)
    done = call("whoami", "inbox")
    assert isinstance(done.exception, Refused)
    assert "come from vault; found systemd_creds" in str(done.exception)
    host.description.write_text(describe())
    for command in ("set", "unset"):
        done = call(command, "inbox", "signing_key", stdin=SECRET.encode())
        assert isinstance(done.exception, Refused)
        assert "use `bao kv patch -mount=secret forge/inbox/app signing_key=-`" in str(done.exception)
    assert not host.sealed("app", "values").exists()


def test_an_identity_that_the_app_has_not(call: Callable[..., Any]) -> None:
    done = call("set", "inbox", "k", "--identity", "migrate", stdin=b"x")
    assert isinstance(done.exception, Refused)
    assert "has no identity migrate" in str(done.exception)


def test_vault_needs_its_address(layout: Layout) -> None:
    text = describe()
    layout.description.write_text(text.replace('address = "https://127.0.0.1:1"\n', ""))
    with pytest.raises(Refused, match="expected `address`, `ca_file` and `path` of a Vault"):
        app_of(layout)
    layout.description.write_text(text + '[migration]\nuser = "u"\ncommand = ["c"]\n')
    with pytest.raises(Refused, match="expected `path` in `migration`"):
        app_of(layout)
    assert msgspec.structs.replace(app_of_text(layout, described({})), name="x").secrets.source == "systemd_creds"


def app_of_text(layout: Layout, text: str) -> App:
    layout.description.write_text(text)
    return app_of(layout)
