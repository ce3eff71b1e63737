"""The way of a certificate to Nginx, with a certbot and an Nginx that do as they are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import forge_certificates
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from forge_certificates import Places, der, is_placeholder, main, mistakes, now, read_chain, read_ours
from pairs import Key, certificate, pem

DIRECTORY = "https://acme.example.com/directory"
SHOP = ("shop.example.com", "www.shop.example.com")
BLOG = ("blog.example.com",)
NAMES = {"shop": SHOP, "blog": BLOG}


@dataclass
class Machine:
    """A host."""

    places: Places
    source: str = "acme"
    running: bool = True
    fails: dict[str, str] = field(default_factory=dict)
    """What certbot says of the apps that it gets nothing for."""
    reasons: tuple[str, ...] = ("unspecified", "keycompromise")
    reload_fails: bool = False
    reload_hangs: bool = False
    lives: timedelta = timedelta(days=90)
    age: timedelta = timedelta(hours=1)
    """Of what is issued, from its beginning."""
    serves: dict[str, bytes] = field(default_factory=dict)
    calls: list[list[str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def certbot(self, arguments: list[str]) -> tuple[int, str]:
        """As certbot: a new key and certificate in the app's archive, and links to them."""
        options = dict(zip(arguments, [*arguments[1:], ""], strict=True))
        if arguments[0] == "revoke":
            refused = options["--reason"] not in self.reasons
            return (1, "the revocation reason provided is not allowed by the server") if refused else (0, "Revoked!")
        name = options["--cert-name"]
        if name in self.fails:
            return 1, f"Saving debug log to x\n\nDomain: {name}\nDetail: {self.fails[name]}\nAsk for help\n"
        key = rsa.generate_private_key(65537, 2048) if options["--key-type"] == "rsa" else curve()
        self.lineage(name, key, tuple(options["--domains"].split(",")), options["--server"])
        return 0, "Successfully received certificate."

    def lineage(self, name: str, key: Key, names: tuple[str, ...], server: str) -> None:
        """Write what certbot keeps."""
        chain = certificate(name, key, names, begins=-self.age, ends=self.lives - self.age)
        root = self.places.certbot
        for folder in ("archive", "live"):
            (root / folder / name).mkdir(parents=True, exist_ok=True)
        (root / "renewal").mkdir(exist_ok=True)
        (root / "renewal" / f"{name}.conf").write_text(f"version = 4.0.0\n[renewalparams]\nserver = {server}\n")
        number = 1 + len([*(root / "archive" / name).glob("cert*")])
        for part, content in {"privkey": pem(key), "cert": chain, "fullchain": chain}.items():
            file = root / "archive" / name / f"{part}{number}.pem"
            file.write_bytes(content)
            link = root / "live" / name / f"{part}.pem"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(file, link.parent))

    def run(
        self, command: Sequence[str], _seconds: float, environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Run a program."""
        self.calls.append([*command])
        if command[0] == "certbot":
            self.environment = dict(environment or {})
            return self.certbot([*command[1:]])
        if command[1] == "is-active":
            return (0 if self.running else 3), ""
        if self.reload_fails:
            return 1, "Job for nginx.service failed."
        if not self.reload_hangs:
            self.start()
        return 0, ""

    def start(self) -> None:
        """Have Nginx read its files."""
        self.serves = {file.stem: der(read_chain(file.read_bytes())[0]) for file in self.places.live.glob("*.pem")}

    def served(self, domain: str) -> bytes | None:
        """What Nginx serves."""
        (name,) = [name for name, names in NAMES.items() if names[0] == domain]
        return self.serves.get(name)

    def do(self, *arguments: str) -> int:
        """Run the program as the inventory is."""
        config = self.places.root / "certificates.toml"
        lines = [f'source = "{self.source}"', "alert_days = 21"]
        if self.source == "acme":
            lines += [f'directory = "{self.directory}"', 'email = ""', 'ca_file = "/ca.pem"', 'key_type = "ecdsa"']
        lines += ["[apps]", *(f"{name} = {[*names]}" for name, names in NAMES.items())]
        config.write_text("\n".join(lines))
        return main(["--config", str(config), *arguments], self.places)

    directory: str = DIRECTORY

    def live(self, name: str) -> bytes:
        """What Nginx reads."""
        return (self.places.live / f"{name}.pem").read_bytes()

    def asked(self) -> list[str]:
        """For which apps certbot was called."""
        return [call[call.index("--cert-name") + 1] for call in self.calls if "--cert-name" in call]

    def reloads(self) -> int:
        """How often Nginx was reloaded."""
        return sum(call[:2] == ["systemctl", "reload"] for call in self.calls)


def curve() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host without certificates."""
    places = Places(tmp_path)
    places.tls.mkdir(parents=True)
    places.webroot.parent.mkdir(parents=True)
    made = Machine(places)
    monkeypatch.setattr(forge_certificates, "run", made.run)
    monkeypatch.setattr(forge_certificates, "served", made.served)
    monkeypatch.setattr(forge_certificates, "SERVED_SECONDS", 0.3)
    return made


def provide(
    machine: Machine, name: str, begins: timedelta = timedelta(days=-1), ends: timedelta = timedelta(days=90)
) -> None:
    """What Ansible does for the sources other than an ACME server."""
    key = curve()
    (machine.places.tls / f"{name}.key").write_bytes(pem(key))
    (machine.places.tls / f"{name}.pem").write_bytes(certificate(name, key, NAMES[name], begins=begins, ends=ends))
    for kind in ("key", "pem"):
        (machine.places.tls / f"{name}.{kind}").chmod(0o600)


def test_first_issuance(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A placeholder lets Nginx start; then each app has a certificate of its own, in one file for root only."""
    assert machine.do("install") == 0
    assert machine.calls == []
    assert is_placeholder(read_chain(machine.live("shop"))[0])
    machine.start()
    assert machine.do("renew") == 0
    assert machine.asked() == ["shop", "blog"]
    assert machine.reloads() == 1
    for name, names in NAMES.items():
        assert [*mistakes(machine.live(name), machine.live(name), names, now())] == []
        assert (machine.places.live / f"{name}.pem").stat().st_mode & 0o777 == 0o600
    assert machine.places.webroot.stat().st_mode & 0o777 == 0o755
    assert capsys.readouterr().out.count("there is none") == 2


def test_what_certbot_is_asked_for(machine: Machine) -> None:
    """All of an app's names, an ECDSA key, the inventory's server, and only its CA vouches for that."""
    machine.do("renew")
    command = machine.calls[0]
    for option, value in {
        "--domains": "shop.example.com,www.shop.example.com",
        "--server": DIRECTORY,
        "--key-type": "ecdsa",
        "--elliptic-curve": "secp256r1",
        "--webroot-path": str(machine.places.webroot),
    }.items():
        assert command[command.index(option) + 1] == value
    assert machine.environment == {"REQUESTS_CA_BUNDLE": "/ca.pem"}
    assert {"--non-interactive", "--agree-tos", "--register-unsafely-without-email"} <= set(command)


def test_nothing_due_is_nothing_done(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither is the server asked nor Nginx reloaded, and nothing is said."""
    machine.do("install")
    machine.do("renew")
    machine.calls.clear()
    capsys.readouterr()
    assert (machine.do("install"), machine.do("renew"), machine.do("watch")) == (0, 0, 0)
    assert machine.calls == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.lineage("shop", curve(), SHOP[:1], DIRECTORY), "it is for shop.example.com and not for"),
        (lambda m: m.lineage("shop", curve(), SHOP, "https://other.example.com"), "it is of https://other.example.com"),
        (lambda m: m.lineage("shop", rsa.generate_private_key(65537, 2048), SHOP, DIRECTORY), "its key is not ecdsa"),
    ],
)
def test_what_else_is_due(
    machine: Machine, capsys: pytest.CaptureFixture[str], change: Callable[[Machine], None], why: str
) -> None:
    """Other names, another server, another kind of key."""
    machine.do("renew")
    change(machine)
    machine.calls.clear()
    assert machine.do("renew", "--dry-run") == 0
    assert why in capsys.readouterr().out
    assert machine.calls == []
    machine.do("renew")
    assert machine.asked() == ["shop"]


@pytest.mark.parametrize("lives", [timedelta(hours=6), timedelta(days=90)])
@pytest.mark.parametrize(("share", "due"), [(0.66, False), (0.67, True)])
def test_renewal_at_a_third_of_the_lifetime(machine: Machine, lives: timedelta, share: float, due: bool) -> None:
    """Whatever the lifetime."""
    machine.lives, machine.age = lives, lives * share
    machine.do("renew")
    machine.calls.clear()
    machine.do("renew")
    assert machine.asked() == (["shop", "blog"] if due else [])


def test_failure_of_one_app(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """What served serves, the others get theirs, and the error says what the server said."""
    machine.lives, machine.age = timedelta(days=90), timedelta(days=70)
    machine.do("install")
    machine.do("renew")
    before = machine.live("shop"), machine.live("blog")
    machine.fails["shop"] = "no valid A record"
    capsys.readouterr()
    assert machine.do("renew") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"shop: expected: {DIRECTORY} to do as asked; found: certbot certonly failed: Domain: shop")
    assert "Detail: no valid A record" in error
    assert "Saving debug log" not in error
    assert machine.live("shop") == before[0]
    assert machine.live("blog") != before[1]
    assert machine.serves["shop"] == der(read_chain(before[0])[0])


def test_alert_is_one_line(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """For the app that failed, with the priority of an error; the unit itself has not failed."""
    machine.lives, machine.age = timedelta(days=90), timedelta(days=70)
    machine.do("renew")
    machine.fails |= {"shop": "connection\nrefused"}
    capsys.readouterr()
    assert machine.do("watch") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "ALERT" in line]
    assert line.startswith("<3>ALERT shop: the old certificate serves, and no new one is in service: ")
    assert line.endswith("then: sudo forge-certificates renew")


@pytest.mark.parametrize(
    ("source", "do"),
    [("files", "put a new pair where nginx_tls_certificates says"), ("own_ca", "run site.yml --tags nginx")],
)
@pytest.mark.parametrize(
    ("begins", "ends", "alert"),
    [
        (-300, 22, ""),
        (-300, 20, "ALERT shop: the certificate of shop.example.com ends on "),
        (-5, 2, ""),
        (-5, 1, "ALERT shop: the certificate of shop.example.com ends on "),
    ],
)
def test_alert_of_what_runs_out(
    machine: Machine, capsys: pytest.CaptureFixture[str], source: str, do: str, begins: int, ends: int, alert: str
) -> None:
    """Of every source; a fifth of the lifetime where that is less than the days of the inventory."""
    machine.source = source
    provide(machine, "shop", begins=timedelta(days=begins), ends=timedelta(days=ends))
    provide(machine, "blog")
    assert machine.do("install") == 0
    machine.start()
    capsys.readouterr()
    assert machine.do("watch") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"<3>{alert}") if alert else said == ""
    assert do in said or not alert


def test_alert_of_an_end(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A certificate that is over stays where it is, for its key is right, and is called by its name."""
    machine.source = "own_ca"
    key = curve()
    for name in NAMES:
        provide(machine, name)
    machine.do("install")
    over = pem(key) + certificate("shop", key, SHOP, ends=timedelta(hours=-1))
    (machine.places.live / "shop.pem").write_bytes(over)
    (machine.places.tls / "shop.pem").write_bytes(over)
    capsys.readouterr()
    assert machine.do("watch") == 0
    said = capsys.readouterr().out
    assert said.startswith("<3>ALERT shop: the certificate of shop.example.com ended on ")
    assert machine.live("shop") == over


def test_placeholder_is_an_alert(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Clients refuse it."""
    machine.fails |= {"shop": "no", "blog": "no"}
    machine.do("install")
    machine.do("watch")
    assert capsys.readouterr().out.count("clients get a placeholder, which they refuse, and no new one") == 2


@pytest.mark.parametrize("what", ["wrong key", "half", "expired"])
def test_bad_pair_is_refused(machine: Machine, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """Before Nginx can see it; the other app gets its own."""
    machine.source = "files"
    for name in NAMES:
        provide(machine, name)
    machine.do("install")
    before = machine.live("shop")
    provide(machine, "shop", ends=timedelta(days=-1 if what == "expired" else 5))
    provide(machine, "blog", ends=timedelta(days=5))
    if what == "wrong key":
        (machine.places.tls / "shop.key").write_bytes(pem(curve()))
    elif what == "half":
        text = (machine.places.tls / "shop.pem").read_bytes()
        (machine.places.tls / "shop.pem").write_bytes(text[: len(text) // 2])
    assert machine.do("install") == 1
    assert capsys.readouterr().err.startswith("shop: expected: ")
    assert machine.live("shop") == before
    assert [*mistakes(machine.live("blog"), machine.live("blog"), BLOG, now())] == []


def test_unreadable_pair_stops_no_other(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there, or a folder in its place."""
    machine.source = "own_ca"
    (machine.places.tls / "shop.pem").mkdir()
    provide(machine, "blog")
    assert machine.do("install") == 1
    assert capsys.readouterr().err.startswith("shop: ")
    assert machine.live("blog")


def test_change_of_the_source_keeps_what_serves(machine: Machine) -> None:
    """Until the ACME server has issued, Nginx has the old certificate and no placeholder; the way back is at once."""
    machine.source = "own_ca"
    for name in NAMES:
        provide(machine, name)
    machine.do("install")
    before = machine.live("shop")
    machine.source = "acme"
    machine.do("install")
    assert machine.live("shop") == before
    machine.do("renew")
    issued = machine.live("shop")
    assert issued != before
    machine.source = "own_ca"
    machine.do("install")
    assert machine.live("shop") == before
    # What was issued is still good, so that nobody is asked for another.
    machine.source, machine.calls = "acme", []
    machine.do("install")
    assert machine.live("shop") == issued
    assert machine.calls == []


def test_dry_run_changes_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """And says what would be done."""
    assert (machine.do("install", "--dry-run"), machine.do("renew", "--dry-run")) == (0, 0)
    said = capsys.readouterr().out
    assert "shop: would install a placeholder" in said
    assert f"shop: would ask {DIRECTORY} for a certificate: there is none" in said
    assert not machine.places.live.exists()
    machine.source = "own_ca"
    assert machine.do("install", "--dry-run") == 0
    assert machine.calls == []


def test_failed_reload_goes_back(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """So that Nginx would survive a restart with what it serves."""
    machine.do("install")
    machine.start()
    before = machine.live("shop")
    machine.reload_fails = True
    assert machine.do("renew") == 1
    assert "it did not reload: Job for nginx.service failed." in capsys.readouterr().err
    assert machine.live("shop") == before
    machine.reload_fails = False
    assert machine.do("renew") == 0
    assert machine.live("shop") != before
    assert machine.asked() == ["shop", "blog"]


def test_reload_that_takes_no_effect_is_an_error(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """The program waits for clients to get it, and says when they do not; the next run tries again."""
    machine.do("install")
    machine.start()
    machine.reload_hangs = True
    assert machine.do("renew") == 1
    assert "found: the one before" in capsys.readouterr().err
    machine.reload_hangs = False
    assert machine.do("watch") == 0
    assert machine.serves["shop"] == der(read_chain(machine.live("shop"))[0])
    assert "ALERT" not in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["is-active", "reload"])
def test_reload_that_never_ends_is_an_alert(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    """Each app that waits for it is named, and has the file that it had."""
    machine.do("install")
    machine.start()
    before = {name: machine.live(name) for name in NAMES}

    def hang(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        if command[1] == asked:
            raise forge_certificates.Refused("systemctl to end", "it did not", "try again later")
        return machine.run(command, seconds, environment)

    monkeypatch.setattr(forge_certificates, "run", hang)
    assert machine.do("watch") == 0
    said = capsys.readouterr().out
    assert {name: said.count(f"<3>ALERT {name}: ") for name in NAMES} == dict.fromkeys(NAMES, 1)
    assert "found: it did not" in said
    assert {name: machine.live(name) for name in NAMES} == before


def test_file_that_cannot_be_put_back_is_in_the_alert(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that has become full meanwhile keeps nobody from being called."""
    machine.do("install")
    machine.start()
    machine.reload_fails = True
    written: list[Path] = []
    write = forge_certificates.write_whole

    def fill(path: Path, content: bytes) -> None:
        if len(written) == len(NAMES):
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(forge_certificates, "write_whole", fill)
    assert machine.do("watch") == 0
    said = capsys.readouterr().out
    assert said.count("<3>ALERT ") == said.count("nor could the file before be put back: ") == len(NAMES)


def test_watch_that_cannot_begin_is_an_alert(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody reads the unit's own failure."""
    machine.places.tls.rmdir()
    assert machine.do("watch") == 1
    assert capsys.readouterr().out.startswith("<3>ALERT host: nobody looks after its certificates: ")


def test_nginx_that_is_stopped_is_left_alone(machine: Machine) -> None:
    """It reads its files when it starts."""
    machine.running = False
    assert machine.do("renew") == 0
    assert machine.reloads() == 0


def test_killed_at_the_rename(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nginx has the old pair, whole, and the next run is not held up by what was left."""
    machine.do("install")
    before = machine.live("shop")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            machine.do("renew")
    assert machine.live("shop") == before
    assert machine.do("renew") == 0
    assert machine.live("shop") != before


def test_files_of_others_are_refused(machine: Machine, tmp_path: Path) -> None:
    """What others may write, and links in the place of the file that is written first."""
    machine.source = "own_ca"
    for name in NAMES:
        provide(machine, name)
    (machine.places.tls / "shop.key").chmod(0o666)
    assert machine.do("install") == 1
    with pytest.raises(forge_certificates.Refused, match="only root may write"):
        read_ours(machine.places.tls / "shop.key")
    (machine.places.tls / "shop.key").chmod(0o600)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (machine.places.live / ".shop.pem.new").symlink_to(elsewhere)
    assert machine.do("install") == 0
    assert elsewhere.read_text() == "kept"
    assert not (machine.places.live / "shop.pem").is_symlink()


def test_reissue_and_revoke(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A new key, and the old certificate is revoked where it came from once the new one serves."""
    machine.do("install")
    machine.do("renew")
    before, machine.calls = machine.live("shop"), []
    assert machine.do("reissue", "shop", "--revoke") == 0
    new = machine.live("shop")
    assert [each.part for each in mistakes(new, before, SHOP, now())] == ["key"]
    revoked = machine.calls[-1]
    assert revoked[:2] == ["certbot", "revoke"]
    old = Path(revoked[revoked.index("--cert-path") + 1])
    assert der(read_chain(old.read_bytes())[0]) == der(read_chain(before)[0])
    assert machine.calls[-2][1] == "reload"
    assert "had the old one revoked" in capsys.readouterr().out
    assert machine.do("reissue", "shopp") == 1
    assert "one of the apps shop, blog" in capsys.readouterr().err


@pytest.mark.parametrize(("reasons", "code"), [(("unspecified",), 0), ((), 1)])
def test_reasons_that_a_server_does_not_know(
    machine: Machine, capsys: pytest.CaptureFixture[str], reasons: tuple[str, ...], code: int
) -> None:
    """It is revoked without one; and where it is not at all, the new one serves and nobody thinks all was done."""
    machine.do("install")
    machine.do("renew")
    before, machine.reasons = machine.live("shop"), reasons
    assert machine.do("reissue", "shop", "--revoke") == code
    said = capsys.readouterr()
    assert ("had the old one revoked" in said.out) == (code == 0)
    assert said.err.startswith("shop: the new certificate serves, but the old one was not revoked: " if code else "")
    old = machine.places.certbot.resolve() / "archive/shop/cert1.pem"
    assert said.err.endswith(f"certbot revoke --cert-path {old} --server {DIRECTORY}\n" if code else "")
    assert machine.live("shop") != before


def test_reissue_that_fails_revokes_nothing(machine: Machine) -> None:
    """Otherwise clients would be left with a revoked certificate."""
    machine.do("install")
    machine.do("renew")
    machine.fails["shop"] = "no"
    assert machine.do("reissue", "shop", "--revoke") == 1
    machine.fails.clear()
    machine.reload_fails = True
    assert machine.do("reissue", "shop", "--revoke") == 1
    assert not [call for call in machine.calls if call[1] == "revoke"]


def test_reissue_is_for_acme(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """The other sources have other ways."""
    machine.source = "own_ca"
    assert machine.do("reissue", "shop") == 1
    assert (
        "expected: certificates of an ACME server; found: those of nginx_tls_source: own_ca" in capsys.readouterr().err
    )


def test_status(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each app: source, names, issuer, end, and whether clients get it."""
    machine.do("install")
    machine.do("renew")
    capsys.readouterr()
    assert machine.do("status") == 0
    shop, blog = capsys.readouterr().out.splitlines()
    assert shop.startswith("shop: acme, shop.example.com, www.shop.example.com, from CN=ca, until 20")
    assert shop.endswith("(90.0 days), served")
    assert blog.startswith("blog: ")
    machine.serves.clear()
    machine.do("status")
    assert capsys.readouterr().out.count("NOT served") == 2


def test_no_description_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the path of what is missing."""
    assert main(["--config", str(tmp_path / "none.toml"), "status"]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_programs_that_are_missing_or_hang() -> None:
    """Are errors with what to do."""
    with pytest.raises(forge_certificates.Refused, match=r"run site\.yml, which installs it"):
        forge_certificates.run(["no-such-program"], 1)
    with pytest.raises(forge_certificates.Refused, match="try again later"):
        forge_certificates.run(["sleep", "5"], 0.1)
    assert forge_certificates.run(["sh", "-c", "echo $X; echo y >&2; exit 3"], 5, {"X": "x"}) == (3, "x\ny\n")


def test_nobody_looks_after_an_app_that_was_removed(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Its challenges would not be answered; once it is back, or its site written anew, it is looked after again."""
    (first, *_) = NAMES
    sites = machine.places.root / "etc/nginx/forge"
    sites.mkdir(parents=True)
    (sites / f"{first}.conf.removed").touch()
    machine.source = "acme"
    machine.do("watch")
    assert first not in machine.asked()
    assert set(machine.asked()) == set(NAMES) - {first}
    assert f"ALERT {first}" not in capsys.readouterr().out
    (sites / f"{first}.conf").touch()
    machine.do("watch")
    assert first in machine.asked()
