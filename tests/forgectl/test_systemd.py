"""systemd.py with the host's own systemd-creds."""

import base64
import os
import subprocess
from pathlib import Path

import pytest
from conftest import HARD_VALUES
from forgectl import systemd
from forgectl.errors import ForgeError


@pytest.fixture(autouse=True)
def _key_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "host.key"))


def without_tpm() -> bool:
    """As everywhere that these tests have run so far."""
    return subprocess.run(["systemd-creds", "has-tpm2", "--quiet"], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("value", HARD_VALUES.values(), ids=HARD_VALUES)
def test_what_is_sealed_can_be_opened_under_its_name_alone(tmp_path: Path, value: str) -> None:
    sealed = tmp_path / "sealed"
    sealed.write_bytes(systemd.encrypt(value, "secret-id"))
    assert value.encode() not in base64.b64decode(sealed.read_bytes())
    assert systemd.decrypt(sealed, "secret-id") == value
    with pytest.raises(ForgeError):
        systemd.decrypt(sealed, "role-id")


def test_the_host_key_is_used_where_there_is_no_tpm(tmp_path: Path) -> None:
    """has-tpm2 decides; what it leaves is the key that the credential says it is."""
    assert systemd.sealing_keys() == (["host"] if without_tpm() else ["host+tpm2", "host"])
    sealed = tmp_path / "sealed"
    sealed.write_bytes(systemd.encrypt("value", "name", ["host"]))
    assert systemd.sealed_with(sealed) == "host key"


# A TPM that works can't be made to fail from here, so this one runs where there is none, as everywhere so far. The
# choice of keys above and the credential of other keys below are looked at everywhere.
@pytest.mark.skipif(not without_tpm(), reason="wants a host whose TPM does not work, as one without any is")
def test_a_tpm_that_does_not_work_is_passed_over(tmp_path: Path) -> None:
    """Found, but of no use: the host's key does it. Where nothing works, its own words say why."""
    sealed = tmp_path / "sealed"
    sealed.write_bytes(systemd.encrypt("value", "name", ["host+tpm2", "host"]))
    assert systemd.sealed_with(sealed) == "host key"
    assert systemd.decrypt(sealed, "name") == "value"
    with pytest.raises(ForgeError, match="TPM"):
        systemd.encrypt("value", "name", ["host+tpm2"])


def test_a_credential_of_other_keys_is_told_apart(tmp_path: Path) -> None:
    """The null key stands for any other than the host's alone: a TPM's can't be had here."""
    sealed = tmp_path / "sealed"
    command = ["systemd-creds", "encrypt", "--with-key=tpm2-absent", "--name=name", "-", str(sealed)]
    subprocess.run(command, input=b"value", capture_output=True, check=True)
    assert systemd.sealed_with(sealed) == "host key and TPM 2"


def sandboxed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The properties of the unit that a build runs in."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    systemd.run_sandboxed(
        ["true"],
        unit="forge-build-inbox.service",
        user="forge-build",
        writable=[Path("/srv/inbox/venvs/x"), Path("/var/cache/forge/inbox")],
        hidden=[Path("/srv"), Path("/var/cache/forge")],
        environment={},
        environment_file=Path("/nowhere"),
    )
    (command,) = (call for call in calls if call[0] == "systemd-run")
    given = (each.removeprefix("--property=") for each in command if each.startswith("--property="))
    return dict(each.split("=", 1) for each in given)


def test_a_build_takes_nothing_from_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may want every core and all memory there is."""
    monkeypatch.setattr(systemd, "memory_available", lambda: 1000)
    given = sandboxed(monkeypatch)
    assert (given["CPUWeight"], given["MemoryMax"], given["OOMScoreAdjust"]) == ("10", "750", "1000")
    assert int(given["TasksMax"]) > 0


def test_a_build_sees_nothing_of_another_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose builds are the same user's: its two folders are on top of an empty one each."""
    given = sandboxed(monkeypatch)
    assert given["TemporaryFileSystem"] == "/srv:ro /var/cache/forge:ro"
    assert given["BindPaths"] == "/srv/inbox/venvs/x /var/cache/forge/inbox"


def test_the_memory_that_nobody_uses() -> None:
    assert 0 < systemd.memory_available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("user", "unit", "niced", "asked"),
    [(0, "", [], True), (0, "0123abcd", [], False), (1000, "", [systemd.NICE], False)],
    ids=["root", "a unit", "somebody"],
)
def test_it_steps_back_even_without_systemd(
    user: int, unit: str, niced: list[int], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of its own is asked for, but not by a unit; that nobody answers is no reason to do nothing."""
    calls: list[list[str]] = []
    nice: list[int] = []

    def call(command: list[str], **_: object) -> None:
        calls.append(command)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", call)
    monkeypatch.setattr(os, "nice", nice.append)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("INVOCATION_ID", unit) if unit else monkeypatch.delenv("INVOCATION_ID", raising=False)
    systemd.step_back()
    assert nice == niced
    weights = [["CPUWeight", "t", str(systemd.BEHIND)] == call[call.index("CPUWeight") :][:3] for call in calls]
    assert weights == ([True] if asked else [])
