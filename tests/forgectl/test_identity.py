"""identity.py and the host's own systemd-creds, against a server that was set up by the commands of docs/vault.md."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import hvac
import msgspec
import pytest
from click.testing import CliRunner
from conftest import ROOT_TOKEN, Bao, describe, no_room
from forgectl import cli, config, identity, systemd
from forgectl.config import App
from forgectl.errors import ForgeError, Refused, SecretsError
from forgectl.layout import Layout

ROOT = Path(__file__).parents[2]
IDENTITIES = ("app", "migrate", "rotate")
SECRET = "hunter2-must-never-show"  # pragma: allowlist secret
MIGRATION = '[migration]\nuser = "inbox-migrate"\ncommand = ["alembic"]\npath = "forge/inbox/migrate"\n'
ROTATION = "[secrets.rotation.approles]\n" + "".join(f'{each} = "forge-inbox-{each}"\n' for each in IDENTITIES)
DAY = 86400


class Documented:
    """A server that was set up by the commands of docs/vault.md, as they stand there."""

    def __init__(self, bao: Bao) -> None:
        self.bao = bao
        bao.client.sys.disable_auth_method("approle")
        bao.client.sys.disable_secrets_engine("secret")
        page = (ROOT / "docs/vault.md").read_text()
        # Those need a database: test_lease.py.
        page = re.sub(r"^## Leased database users\n.*?(?=^## )", "", page, flags=re.MULTILINE | re.DOTALL)
        blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", "\n".join(blocks)],
            cwd=ROOT,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(bao.ca_file.parent),
                "BAO_ADDR": bao.address,
                "BAO_TOKEN": ROOT_TOKEN,
                "BAO_CACERT": str(bao.ca_file),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        role_ids = re.findall(r"^[0-9a-f]{8}-[0-9a-f-]{27}$", done.stdout, re.MULTILINE)
        self.role_ids = dict(zip(IDENTITIES, role_ids, strict=True))
        self.control = hvac.Client(bao.address, token=done.stdout.split()[-1], verify=str(bao.ca_file))

    def wrapped(self, which: str, **data: str) -> str:
        """What the control machine hands on."""
        path = f"auth/approle/role/forge-inbox-{which}/secret-id"
        return str(self.control.write_data(path, data=data, wrap_ttl="120s")["wrap_info"]["token"])

    def accessors(self, which: str) -> set[str]:
        try:
            return set(self.bao.client.auth.approle.list_secret_id_accessors(f"forge-inbox-{which}")["data"]["keys"])
        except hvac.exceptions.InvalidPath:
            return set()

    def tokens(self) -> int:
        return len(self.bao.client.auth.token.list_accessors()["data"]["keys"])


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Documented]:
    server = Bao(tmp_path_factory.mktemp("documented"))
    try:
        yield Documented(server)
    finally:
        server.stop()


@pytest.fixture
def host(layout: Layout, documented: Documented, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    """A host without any identity, whose key is in a file of the test; what it gets is destroyed in the end."""
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(layout.root / "host.key"))
    layout.credentials.parent.mkdir(exist_ok=True)
    describe_app(layout, documented)
    tokens = documented.tokens()
    yield layout
    # Whatever a test did, no token outlives it; the server ends one that was revoked or unwrapped in its own time.
    end = time.monotonic() + 20
    while documented.tokens() != tokens:
        assert time.monotonic() < end
        time.sleep(0.1)
    for which in IDENTITIES:
        for accessor in documented.accessors(which):
            documented.bao.client.auth.approle.destroy_secret_id_accessor(f"forge-inbox-{which}", accessor)


def describe_app(layout: Layout, documented: Documented, rotation: bool = True, bound: str = "[]") -> None:
    text = describe(documented.bao.address, str(documented.bao.ca_file), 'FORGE_SIGNING_KEY = "signing_key"\n')
    text = text.replace("[secrets]\n", f"[secrets]\nbound_cidrs = {bound}\n")
    layout.description.write_text(text + (ROTATION if rotation else "") + MIGRATION)


def app_of(layout: Layout) -> App:
    return config.load(layout.description)


def enrol(layout: Layout, documented: Documented, *which: str, **data: str) -> list[str]:
    said: list[str] = []
    for each in which or IDENTITIES:
        token = documented.wrapped(each, **data)
        bound = [cidr for cidr in data.get("cidr_list", "").split(",") if cidr]
        identity.enrol(layout, app_of(layout), each, documented.role_ids[each], token, bound, said.append)
    return said


def age(layout: Layout, which: str, days: float) -> None:
    """Let a secret id of 30 days be so old."""
    path = layout.state_dir / "identities.json"
    found = json.loads(path.read_bytes())
    began = datetime.now(UTC) - timedelta(days=days)
    found[which] |= {"issued": began.isoformat(), "expires": (began + timedelta(days=30)).isoformat()}
    path.write_text(json.dumps(found))


def states(layout: Layout) -> dict[str, str]:
    found = identity.check(layout, app_of(layout))
    return {name: seen["state"] for name, seen in found["identities"].items()}


def command(layout: Layout, monkeypatch: pytest.MonkeyPatch, *arguments: str, given: str = "") -> tuple[int, str]:
    monkeypatch.setattr(cli, "_app", lambda _: (layout, app_of(layout)))
    done = CliRunner().invoke(cli.forgectl, ["secrets", *arguments], input=given)
    if isinstance(done.exception, ForgeError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output


def test_what_vault_says_of_a_secret_id_is_kept(host: Layout, documented: Documented) -> None:
    """Its end and its accessor, in a file of root's that holds no secret; and all three identities work."""
    assert set(states(host).values()) == {"missing"}
    before = datetime.now(UTC)
    assert enrol(host, documented) == []
    path = host.state_dir / "identities.json"
    assert path.stat().st_mode & 0o777 == 0o600
    found = json.loads(path.read_bytes())
    assert set(found) == set(IDENTITIES)
    for which, record in found.items():
        assert set(record) == {"issued", "expires", "accessor", "bound_cidrs"}
        assert {record["accessor"]} == documented.accessors(which)
        issued, expires = (datetime.fromisoformat(record[each]) for each in ("issued", "expires"))
        assert expires - issued == timedelta(days=30)
        assert abs(issued - before) < timedelta(minutes=1)
        for part in identity.PARTS:
            assert systemd.decrypt(host.sealed(which, part), part) not in path.read_text()
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")
    assert set(identity.fetch(host, app_of(host), "migrate").values) == {"database_password"}


def test_a_secret_id_that_ends_soon_is_expiring(
    host: Layout, documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(host, documented)
    age(host, "app", 19.9)
    assert states(host)["app"] == "ok"
    age(host, "app", 20.1)
    assert states(host) == {"app": "expiring", "migrate": "ok", "rotate": "ok"}
    until = json.loads((host.state_dir / "identities.json").read_bytes())["app"]["expires"]
    code, text = command(host, monkeypatch, "check", "inbox")
    assert code == 0, text
    assert f"inbox (app): expiring, until {until}\n" in text
    # Nobody knows until when one lasts that was delivered before there were records.
    (host.state_dir / "identities.json").unlink()
    assert states(host) == dict.fromkeys(IDENTITIES, "expiring")


def test_a_secret_id_without_an_end_never_expires(host: Layout, documented: Documented) -> None:
    role = "auth/approle/role/forge-inbox-app"
    documented.bao.client.write_data(role, data={"secret_id_ttl": 0})
    try:
        enrol(host, documented)
    finally:
        documented.bao.client.write_data(role, data={"secret_id_ttl": 30 * DAY})
    assert identity.records(host)["app"].expires is None
    assert identity.due(host, app_of(host)) == []
    assert identity.check(host, app_of(host))["identities"]["app"]["expires"] is None


def test_the_predecessor_is_destroyed(host: Layout, documented: Documented) -> None:
    """By its accessor, when the one that follows is sealed: also that of the rotate identity itself."""
    enrol(host, documented)
    old = {which: documented.accessors(which) for which in IDENTITIES}
    for which in IDENTITIES:
        assert enrol(host, documented, which) == []
        assert documented.accessors(which) == {identity.records(host)[which].accessor}
        assert documented.accessors(which).isdisjoint(old[which])
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")


def test_a_predecessor_that_nobody_may_destroy_lives_on(host: Layout, documented: Documented) -> None:
    """Where there is no rotate identity, or one that does not work: then somebody is told."""
    describe_app(host, documented, rotation=False)
    enrol(host, documented, "app")
    assert enrol(host, documented, "app") == []
    assert len(documented.accessors("app")) == 2
    describe_app(host, documented)
    until = identity.records(host)["app"].expires
    (said,) = enrol(host, documented, "app")
    assert said.startswith(f"inbox (app): the secret id before is valid until {until}: expected the sealed role-id")
    assert states(host)["app"] == "ok"


def test_a_predecessor_that_is_gone_is_nothing_to_talk_about(host: Layout, documented: Documented) -> None:
    enrol(host, documented)
    accessor = identity.records(host)["app"].accessor
    documented.bao.client.auth.approle.destroy_secret_id_accessor("forge-inbox-app", accessor)
    assert states(host)["app"] == "rejected"
    assert enrol(host, documented, "app") == []
    assert states(host)["app"] == "ok"


def test_a_token_that_was_used_on_the_way_stops_everything(
    host: Layout, documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command says so and fails, and what worked before works still."""
    enrol(host, documented)
    before = {path: path.read_bytes() for path in host.credentials.iterdir()}
    token = documented.wrapped("app")
    thief = hvac.Client(documented.bao.address, token=token, verify=str(documented.bao.ca_file))
    stolen = thief.sys.unwrap()["data"]["secret_id"]
    arguments = ("enrol", "inbox", "--identity", "app", "--role-id", documented.role_ids["app"])
    code, message = command(host, monkeypatch, *arguments, given=f"{token}\n")
    assert code == 6
    assert "someone else unwrapped it; if it was fresh, treat the secret id as stolen" in message
    assert token not in message
    assert stolen not in message
    assert {path: path.read_bytes() for path in host.credentials.iterdir()} == before
    assert states(host)["app"] == "ok"


def test_a_token_that_wraps_something_else_is_refused(
    host: Layout, documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = documented.bao.wrapped("sys/wrapping/wrap")
    arguments = ("enrol", "inbox", "--identity", "app", "--role-id", documented.role_ids["app"])
    code, message = command(host, monkeypatch, *arguments, given=token)
    assert (code, "found one made at sys/wrapping/wrap; someone may have replaced it" in message) == (6, True)
    assert not host.credentials.exists()
    # It was not opened, for whoever finds out what it is.
    documented.bao.client.sys.unwrap(token)


def test_the_secret_id_of_another_role_is_refused(host: Layout, documented: Documented) -> None:
    with pytest.raises(SecretsError, match="the role id of the app identity in the inventory is not that") as caught:
        identity.enrol(
            host, app_of(host), "app", documented.role_ids["app"], documented.wrapped("migrate"), [], lambda _: None
        )
    assert caught.value.state == "rejected"
    assert not host.credentials.exists()


def test_an_identity_that_the_app_does_not_have(host: Layout, documented: Documented) -> None:
    describe_app(host, documented, rotation=False)
    with pytest.raises(Refused, match="inbox has no identity rotate; it has: app, migrate"):
        identity.enrol(host, app_of(host), "rotate", "r", "t", [], lambda _: None)


def test_the_control_machine_gets_wrapped_secret_ids_and_nothing_else(documented: Documented) -> None:
    """Also those of the rotate identity; no bare one, and no secret."""
    for which in IDENTITIES:
        assert documented.wrapped(which)
        with pytest.raises(hvac.exceptions.Forbidden):
            documented.control.write_data(f"auth/approle/role/forge-inbox-{which}/secret-id", data={})
    for path in ("app", "migrate"):
        with pytest.raises(hvac.exceptions.Forbidden):
            documented.control.secrets.kv.v2.read_secret_version(f"forge/inbox/{path}", raise_on_deleted_version=True)


def test_the_rotate_identity_may_do_no_more_than_it_needs(host: Layout, documented: Documented) -> None:
    """No bare secret id, not the migration's secrets, no role of another app, no change of a role."""
    enrol(host, documented, "rotate")
    role_id, secret_id = (systemd.decrypt(host.sealed("rotate", part), part) for part in identity.PARTS)
    client = hvac.Client(documented.bao.address, verify=str(documented.bao.ca_file))
    client.auth.approle.login(role_id, secret_id)
    try:
        for path in ("forge-inbox-app/secret-id", "forge-blog-app/secret-id", "forge-inbox-app", "forge-inbox-rotate"):
            with pytest.raises(hvac.exceptions.Forbidden):
                client.write_data(f"auth/approle/role/{path}", data={})
        with pytest.raises(hvac.exceptions.Forbidden):
            client.secrets.kv.v2.read_secret_version("forge/inbox/migrate", raise_on_deleted_version=True)
    finally:
        client.auth.token.revoke_self()


def test_the_scenarios_have_the_policies_of_the_page(documented: Documented) -> None:
    """What molecule/shared/vault.py writes is what docs/vault.md says."""

    def rules(policy: str) -> list[str]:
        """Its paths, without regard to space and order."""
        return sorted(" ".join(rule.split()) for rule in re.findall(r'path "[^}]*}', policy))

    shared = loaded(ROOT / "molecule/shared/vault.py")
    mounts = shared.Mounts("secret", "approle", "forge")
    every = [shared.Identity(mounts, "inbox", kind) for kind in shared.KINDS]
    wanted = {each.name: each.policy for each in every} | {"forge-control": shared.wrapped_secret_ids(every)}
    for name, policy in wanted.items():
        assert rules(documented.bao.client.sys.read_policy(name)["data"]["rules"]) == rules(policy)


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("shared_vault", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_renewal_of_what_expires(host: Layout, documented: Documented) -> None:
    """With the rotate identity alone, its own secret id included; the old ones are gone, the others stay."""
    enrol(host, documented)
    before = identity.records(host)
    said: list[str] = []
    assert identity.renew(host, app_of(host), said.append) == []
    age(host, "app", 21)
    age(host, "rotate", 21)
    assert identity.renew(host, app_of(host), said.append, dry_run=True) == ["app", "rotate"]
    assert said == []
    assert {which: documented.accessors(which) for which in IDENTITIES} == {
        which: {record.accessor} for which, record in before.items()
    }
    assert identity.renew(host, app_of(host), said.append) == ["app", "rotate"]
    after = identity.records(host)
    assert {which: documented.accessors(which) for which in IDENTITIES} == {
        which: {record.accessor} for which, record in after.items()
    }
    assert [which for which in IDENTITIES if after[which] == before[which]] == ["migrate"]
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")
    assert said == [
        f"inbox ({which}): a new secret id is sealed, valid until {after[which].expires}" for which in ("app", "rotate")
    ]
    assert identity.renew(host, app_of(host), said.append) == []


def test_a_secret_id_that_was_destroyed_is_due(host: Layout, documented: Documented) -> None:
    """Its end is far, but Vault takes it no more: the rotate identity gets another."""
    enrol(host, documented)
    before = identity.records(host)
    approle = documented.bao.client.auth.approle
    approle.destroy_secret_id_accessor("forge-inbox-app", before["app"].accessor)
    assert identity.due(host, app_of(host)) == []
    identity.forget_rejected(host, app_of(host))
    assert identity.due(host, app_of(host)) == ["app"]
    assert identity.renew(host, app_of(host), lambda _: None) == ["app"]
    renewed = identity.records(host)
    assert [which for which in IDENTITIES if renewed[which] == before[which]] == ["migrate", "rotate"]
    identity.forget_rejected(host, app_of(host))
    assert identity.records(host) == renewed
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")


def test_what_was_asked_for_without_addresses_is_outdated(host: Layout, documented: Documented) -> None:
    """Also by hand, as the runbook does it: nobody may take it for one that is bound."""
    describe_app(host, documented, bound='["127.0.0.1/32"]')
    enrol(host, documented)
    assert identity.due(host, app_of(host)) == list(IDENTITIES)
    enrol(host, documented, cidr_list="127.0.0.1/32")
    assert identity.due(host, app_of(host)) == []


def test_no_renewal_without_the_rotate_identity(host: Layout, documented: Documented) -> None:
    describe_app(host, documented, rotation=False)
    enrol(host, documented, "app")
    age(host, "app", 25)
    assert identity.renew(host, app_of(host), print) == []
    with pytest.raises(Refused, match=r"apps\.inbox\.secrets\.rotation"):
        identity.write(host, app_of(host), {}, 1)


def test_a_renewal_that_fails_does_not_stop_the_others(host: Layout, documented: Documented) -> None:
    """It fails in the end, says of which it failed, and leaves no secret id that nobody knows of."""
    enrol(host, documented)
    for which in IDENTITIES:
        age(host, which, 21)
    before = {which: documented.accessors(which) for which in IDENTITIES}
    host.sealed("app", "role-id").write_bytes(systemd.encrypt("of-nobody", "role-id"))
    with pytest.raises(SecretsError) as caught:
        identity.renew(host, app_of(host), lambda _: None)
    assert "inbox (app): Vault at " in str(caught.value)
    assert "(migrate)" not in str(caught.value)
    assert identity.due(host, app_of(host)) == ["app"]
    after = {which: documented.accessors(which) for which in IDENTITIES}
    assert after["app"] == before["app"]
    assert [len(after[which]) for which in IDENTITIES] == [1, 1, 1]
    assert after["rotate"].isdisjoint(before["rotate"])


def test_a_renewal_on_a_full_disk_leaves_what_was_there(host: Layout, documented: Documented) -> None:
    enrol(host, documented)
    for which in IDENTITIES:
        age(host, which, 21)
    before = {which: documented.accessors(which) for which in IDENTITIES}
    with no_room(), pytest.raises(SecretsError) as caught:
        identity.renew(host, app_of(host), lambda _: None)
    assert str(caught.value).count("File too large") == 3
    assert {which: documented.accessors(which) for which in IDENTITIES} == before
    assert states(host) == dict.fromkeys(IDENTITIES, "expiring")
    assert identity.renew(host, app_of(host), lambda _: None) == list(IDENTITIES)


def test_writing_is_of_one_version_on_top_of_another(host: Layout, documented: Documented) -> None:
    enrol(host, documented)
    app = app_of(host)
    found = identity.fetch(host, app, "app")
    version = identity.write(host, app, {**found.values, "signing_key": SECRET}, found.version)
    assert version == found.version + 1
    assert identity.fetch(host, app, "app") == ({**found.values, "signing_key": SECRET}, version)
    with pytest.raises(SecretsError, match=f"expected version {found.version} of secret/forge/inbox/app") as caught:
        identity.write(host, app, found.values, found.version)
    assert caught.value.state == "conflict"
    assert SECRET not in str(caught.value)
    assert identity.fetch(host, app, "app").version == version


def test_check_says_what_the_rotate_identity_may_not(host: Layout, documented: Documented) -> None:
    enrol(host, documented)
    client = documented.bao.client
    rules = client.sys.read_policy("forge-inbox-rotate")["data"]["rules"]
    client.sys.create_or_update_policy("forge-inbox-rotate", rules.replace("forge-inbox-app/secret-id-acc", "x"))
    try:
        found = identity.check(host, app_of(host))
        said = enrol(host, documented, "app")
        with pytest.raises(SecretsError, match="expected the rotate identity to be allowed to update"):
            enrol(host, documented, "rotate")
    finally:
        client.sys.create_or_update_policy("forge-inbox-rotate", rules)
    assert found["identities"]["rotate"]["state"] == "denied"
    assert "to update auth/approle/role/forge-inbox-app/secret-id-accessor/destroy; found that it is not" in str(
        found["problems"]
    )
    assert "denied destroying a secret id of forge-inbox-app by its accessor" in said[0]
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")


LOOPBACK, ELSEWHERE = '["127.0.0.0/8"]', '["192.0.2.0/24"]'


def bound(documented: Documented, host: Layout, cidrs: str) -> dict[str, str]:
    """What site.yml asks for when the inventory says so."""
    describe_app(host, documented, bound=cidrs)
    text = ",".join(json.loads(cidrs))
    return {"cidr_list": text, "token_bound_cidrs": text}


def test_a_secret_id_and_its_tokens_are_bound_to_addresses(host: Layout, documented: Documented) -> None:
    """Those that site.yml brings, and those that the host gets itself."""
    enrol(host, documented, **bound(documented, host, LOOPBACK))
    age(host, "app", 21)
    assert identity.renew(host, app_of(host), lambda _: None) == ["app"]
    for which in IDENTITIES:
        (accessor,) = documented.accessors(which)
        role = f"forge-inbox-{which}"
        known = documented.bao.client.auth.approle.read_secret_id_accessor(role, accessor)["data"]
        assert (known["cidr_list"], known["token_bound_cidrs"]) == (["127.0.0.0/8"], ["127.0.0.0/8"])
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")
    assert {seen["bound_cidrs"][0] for seen in identity.whoami(host, app_of(host))["identities"].values()} == {
        "127.0.0.0/8"
    }


def test_a_secret_id_for_another_address_is_refused(host: Layout, documented: Documented) -> None:
    """Before it takes the place of one that works."""
    enrol(host, documented)
    before = {path: path.read_bytes() for path in host.credentials.iterdir()}
    with pytest.raises(SecretsError) as caught:
        enrol(host, documented, "app", **bound(documented, host, ELSEWHERE))
    assert caught.value.state == "address"
    assert re.search(r"refused the address of this host \(.*127\.0\.0\.1.*secrets_bound_cidrs", str(caught.value))
    assert {path: path.read_bytes() for path in host.credentials.iterdir()} == before


def test_a_host_that_moved_gets_new_ones(host: Layout, documented: Documented) -> None:
    """What is bound to other addresses than it should be is outdated, whether it works from here or not."""
    data = bound(documented, host, ELSEWHERE)
    for which in IDENTITIES:
        path = f"auth/approle/role/forge-inbox-{which}/secret-id"
        fresh = documented.bao.client.write_data(path, data=data)["data"]
        host.credentials.mkdir(mode=0o700, exist_ok=True)
        for part, value in zip(identity.PARTS, (documented.role_ids[which], fresh["secret_id"]), strict=True):
            host.sealed(which, part).write_bytes(systemd.encrypt(value, part))
    now = datetime.now(UTC)
    record = identity.Record(now.isoformat(), None, "", ["192.0.2.0/24"])
    known = dict.fromkeys(IDENTITIES, record)
    (host.state_dir / "identities.json").write_bytes(msgspec.json.encode(known))
    assert states(host) == dict.fromkeys(IDENTITIES, "address")
    data = bound(documented, host, LOOPBACK)
    assert states(host) == dict.fromkeys(IDENTITIES, "outdated")
    enrol(host, documented, **data)
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")
    describe_app(host, documented)
    assert states(host) == dict.fromkeys(IDENTITIES, "outdated")
    assert identity.due(host, app_of(host)) == list(IDENTITIES)


def test_whoami_says_who_vault_takes_each_for(
    host: Layout, documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(host, documented)
    code, text = command(host, monkeypatch, "whoami", "inbox", "--json")
    assert code == 0
    found = json.loads(text)["identities"]
    for which in IDENTITIES:
        record = identity.records(host)[which]
        assert found[which] == {
            "state": "ok",
            "approle": f"forge-inbox-{which}",
            "policies": ["default", f"forge-inbox-{which}"],
            "token_ttl": 300,
            "role_id": documented.role_ids[which],
            "issued": record.issued,
            "expires": record.expires,
            "bound_cidrs": [],
            "sealed_with": "host key",
        }
    code, said = command(host, monkeypatch, "whoami", "inbox")
    assert code == 0
    assert "inbox (rotate): ok\n  AppRole forge-inbox-rotate, policies default, forge-inbox-rotate; tokens" in said
    assert f"lasts until {identity.records(host)['app'].expires} and works from any address" in said
    for which in IDENTITIES:
        assert systemd.decrypt(host.sealed(which, "secret-id"), "secret-id") not in text + said


def test_whoami_fails_for_one_that_is_rejected(
    host: Layout, documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(host, documented)
    documented.bao.client.auth.approle.destroy_secret_id_accessor(
        "forge-inbox-migrate", identity.records(host)["migrate"].accessor
    )
    code, text = command(host, monkeypatch, "whoami", "inbox")
    assert code == 6
    assert "inbox (app): ok\n" in text
    assert "inbox (migrate): rejected\n" in text


def test_a_host_that_can_not_open_its_credentials_gets_new_ones(
    host: Layout, documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the disk was put into another machine, or its TPM was cleared."""
    enrol(host, documented)
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(host.root / "other.key"))
    assert states(host) == dict.fromkeys(IDENTITIES, "missing")
    enrol(host, documented)
    assert states(host) == dict.fromkeys(IDENTITIES, "ok")


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ("", False),
        ('url_format = "postgres://{host}/{name}"', False),
        ('url_format = "postgres://{user}:{password}@{host}/{name}"', True),
        ('url_format = "postgres://{user}:{password}@{host}/{name}"\nvault_role = "inbox"', False),
    ],
)
def test_a_password_that_the_url_of_a_database_elsewhere_holds_is_needed(
    layout: Layout, more: str, wanted: bool
) -> None:
    """Where the app reads it from a variable of its own, or Vault leases it, nobody has to write it down."""
    section = '[database]\nplacement = "external"\nname = "inbox"\napp_role = "inbox"\nurl = "postgresql://db/inbox"\n'
    app = config.decode(f"{describe()}{section}{more}\n".encode(), layout.description)
    assert ("database_password" in identity.needed(app, "app").values()) == wanted


def test_an_app_without_secrets_has_no_identity(layout: Layout) -> None:
    """Nobody is asked, there is nothing to renew, and who wants to set a value is told where to begin."""
    secrets = config.Secrets(source="none")
    app = msgspec.structs.replace(config.decode(describe().encode(), layout.description), secrets=secrets)
    assert (identity.identities(app), identity.approles(app), identity.due(layout, app)) == ([], [], [])
    assert identity.fetch(layout, app, "app") == ({}, 0)
    assert identity.check(layout, app)["identities"] == {}
    with pytest.raises(
        Refused, match=r"expected inbox to have secrets; found none; name them under apps\.inbox\.secrets"
    ):
        identity.need_source(app, "vault", "")
