"""The support bundle: whole or not at all, bounded, without a secret that the host knows, and open about its gaps."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import APP, SOURCE
from forgectl import support, systemd
from forgectl.errors import ForgeError, Refused
from forgectl.support import Found, Part

SECRET = "4kZq9" * 9 + "+/=&"  # pragma: allowlist secret
PASSWORD = "hunter2" * 3  # pragma: allowlist secret


def opened(data: bytes) -> dict[str, str]:
    """The files of an archive, by their name in its one folder."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert len({member.name.split("/")[0] for member in members}) == 1
        assert {member.mode for member in members} == {0o600}
        found = {}
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            found[member.name.partition("/")[2]] = file.read().decode()
        return found


def part(name: str, text: str, **options: Any) -> Part:
    return Part(name, f"what {name} is", lambda: Found(text.encode(), **options))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with an app that runs, and things sealed."""
    description = APP.format(
        user="inbox", address="https://vault.example.com", ca_file="/ca", variables='FORGE_SIGNING_KEY = "signing_key"'
    ).replace("[secrets]", f'OTHER_TOKEN = "{SECRET[:20]}other"\n[secrets]')
    (tmp_path / "etc/forge/apps").mkdir(parents=True)
    (tmp_path / "etc/forge/apps/inbox.toml").write_text(description)
    (tmp_path / "etc/forge/apps/broken.toml").write_text("nonsense = ")
    for number, unit, environment in [
        (
            "11",
            "inbox@blue.service",
            {"FORGE_SIGNING_KEY": SECRET, "PATH": "/usr/bin", "FORGE_ENVIRONMENT": "production"},
        ),
        ("12", "inbox.mails@blue.service", {"DATABASE_URL": f"postgresql://inbox:{PASSWORD}@db.example.com/inbox"}),
        ("13", "other@blue.service", {"FORGE_SIGNING_KEY": "not of an app of this host"}),
    ]:
        folder = tmp_path / "proc" / number
        folder.mkdir(parents=True)
        (folder / "cgroup").write_text(f"0::/system.slice/system-inbox.slice/{unit}\n")
        (folder / "environ").write_bytes("\0".join(f"{name}={value}" for name, value in environment.items()).encode())
    (tmp_path / "etc/credstore.encrypted").mkdir()
    for name in ("forge.inbox.app.secret-id", "forge.shop.app.values", "forge-alerts.webhook_url", "closed"):
        (tmp_path / "etc/credstore.encrypted" / name).touch()
    contents = {
        "forge.inbox.app.secret-id": "6f0f9d2e-9a0b-4a40-8d9c-0f2a7c3f1c11",
        "forge.shop.app.values": json.dumps({"version": 2, "values": {"partner": "of-a-partner-1234"}}),
        "forge-alerts.webhook_url": "https://hooks.example.com/T0123456789/secret-of-the-hook",
    }

    def decrypt(path: Path, name: str) -> str:
        assert name == ""
        if path.name not in contents:
            raise ForgeError("it is not of this host")
        return contents[path.name]

    monkeypatch.setattr(systemd, "decrypt", decrypt)
    monkeypatch.setenv("VAULT_TOKEN", "a-token-of-the-caller")
    monkeypatch.setattr(os, "nice", lambda _: 0)
    return tmp_path


def test_every_value_that_root_can_read_is_known(root: Path) -> None:
    known = support.secrets(support.described(root), root)
    assert set(known.values) >= {
        SECRET,
        PASSWORD,
        SECRET[:20] + "other",
        "6f0f9d2e-9a0b-4a40-8d9c-0f2a7c3f1c11",
        "of-a-partner-1234",
        "https://hooks.example.com/T0123456789/secret-of-the-hook",
        "a-token-of-the-caller",
    }
    assert known.values[SECRET] == "FORGE_SIGNING_KEY of inbox"  # pragma: allowlist secret
    assert known.closed == ["closed"]
    assert not {"/usr/bin", "production", "not of an app of this host", "2"} & set(known.values)
    assert {"inbox", "signing_key", "inbox.example.com"} <= known.public


def test_nothing_known_is_in_the_bundle(root: Path) -> None:
    """Wherever it was, and in the manifest too, which says what a part is."""
    texts = {
        "log": f"a {SECRET} b\nc of-a-partner-1234 d /T0123456789/secret-of-the-hook\n",
        "url": f"/x?a={SECRET.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D').replace('&', '%26')}",
        "plain": "nothing of it: inbox.example.com",
        f"named {SECRET}": "x",
    }
    data, manifest = support.bundle(since="-1h", root=root, parts=[part(name, text) for name, text in texts.items()])
    found = opened(data)
    everything = "\n".join([*found, *found.values()])
    for value in (SECRET, SECRET[:22], "partner-1234", "secret-of-the-hook"):
        assert value not in everything
    assert found["plain"] == texts["plain"]
    counts = {each["what"]: each.get("scrubbed") for each in manifest["parts"]}
    assert (counts["what log is"], counts["what plain is"]) == (3, 0)
    assert json.loads(found["manifest.json"])["scrubbed"]["taken_out"]["FORGE_SIGNING_KEY of inbox"] >= 2
    assert next(iter(found)) == "manifest.json"


def test_what_can_not_be_had_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Found:
        raise FileNotFoundError(2, "No such file or directory", "/usr/bin/pg_lsclusters")

    def slow() -> Found:
        monkeypatch.setattr(time, "monotonic", lambda: 1e12)
        return Found(b"at last", truncated=True, exit=-9)

    parts = [Part("gone", "pg_lsclusters", gone), Part("slow", "sleep", slow), part("late", "x")]
    data, manifest = support.bundle(since="-1h", root=root, parts=parts)
    first, second, third = manifest["parts"]
    assert first == {
        "name": "gone",
        "what": "pg_lsclusters",
        "left_out": "/usr/bin/pg_lsclusters: No such file or directory",
    }
    assert (second["exit"], second["truncated"], second["bytes"]) == (-9, True, 7)
    assert third["left_out"].startswith("all of it took more than")
    assert set(opened(data)) == {"manifest.json", "slow"}


def test_a_command_is_bounded_in_size_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = support._run([sys.executable, "-c", "for n in range(200000): print('line', n)"], 1000)
    lines = found.data.decode().splitlines()
    assert (len(found.data) <= 1000, found.truncated, lines[-1]) == (True, True, "line 199999")
    assert all(line.startswith("line ") for line in lines)
    first = support._run([sys.executable, "-c", "for n in range(10**9): print('line', n)"], 1000, newest_first=True)
    assert (first.truncated, first.data[:14], first.data[-1:]) == (True, b"line 0\nline 1\n", b"\n")
    assert len(first.data) <= 1000
    monkeypatch.setattr(support, "PART_SECONDS", 0.2)
    began = time.monotonic()
    ended = support._run([sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"], 1000)
    assert (ended.exit, time.monotonic() - began < 30) == (-signal.SIGKILL, True)
    assert support._run(["sh", "-c", "echo out; echo err >&2; exit 3"], 1000) == Found(b"out\nerr\n", False, 3)


@pytest.mark.parametrize("begun", ["sleep 20", "setsid sleep 20"])
def test_what_a_command_leaves_behind_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, begun: str) -> None:
    """It has the other end of the pipe."""
    monkeypatch.setattr(support, "PART_SECONDS", 0.5)
    began = time.monotonic()
    found = support._run(["sh", "-c", f"{begun} & echo x; sleep 20"], 1000)
    assert (found.data, found.exit, time.monotonic() - began < 10) == (b"x\n", -signal.SIGKILL, True)


def test_a_link_that_somebody_else_made_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may make one in its own folder."""
    (tmp_path / "shadow").write_text("x")
    (tmp_path / "link").symlink_to("shadow")
    assert support._tail(tmp_path / "link", 100).data == b"x"
    if os.geteuid() == 0:
        os.lchown(tmp_path / "link", 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        support._tail(tmp_path / "link", 100)


def test_the_end_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(f"line {each}\n" for each in range(1000)))
    found = support._tail(tmp_path / "log", 100)
    assert found.truncated
    assert found.data.decode().splitlines()[0].startswith("line ")
    assert found.data.endswith(b"line 999\n")
    assert support._tail(tmp_path / "log", 10**6).truncated is False


def test_links_that_lead_elsewhere_are_left_alone(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "shadow"
    (root / "etc").mkdir(parents=True)
    outside.write_text("x")
    (root / "etc/away").symlink_to(outside)
    (root / "etc/here").write_text("x")
    assert list(support._files(root, "etc/*")) == [root / "etc/here"]


@pytest.mark.parametrize("supported", [True, False])
def test_written_whole_for_the_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    real = os.open

    def without(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *arguments, **options)

    if not supported:
        monkeypatch.setattr(os, "open", without)
    path = tmp_path / "x.tar.gz"
    support.write(path, b"abc")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"abc", 0o600)
    with pytest.raises(Refused, match="expected no file"):
        support.write(path, b"other")
    assert (path.read_bytes(), [each.name for each in tmp_path.iterdir()]) == (b"abc", ["x.tar.gz"])


def test_a_folder_that_takes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No such file or directory"):
        support.write(tmp_path / "nowhere" / "x", b"abc")


INTERRUPTED = """
import signal, sys, time
# Whatever runs in the background is begun without it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from forgectl import support
if sys.argv[4] == "collecting":
    part = support.Part("a", "b", lambda: support._run(["sleep", "60"], 10))
    print("ready", flush=True)
    support.bundle(since="-1h", root=Path(sys.argv[3]), parts=[part])
else:
    real = support.os.fsync
    def slow(descriptor):
        print("ready", flush=True)
        time.sleep(60)
    support.os.fsync = slow
    support.write(Path(sys.argv[3]) / "x.tar.gz", b"abc" * 10**6)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["collecting", "writing"])
def test_interrupted_it_leaves_nothing(tmp_path: Path, number: signal.Signals, phase: str) -> None:
    """Ctrl-C, or a kill without notice: neither a part of a file nor one under another name."""
    shared = Path(__file__).parents[2] / "plugins/module_utils"
    command = [sys.executable, "-c", INTERRUPTED, str(SOURCE), str(shared), str(tmp_path), phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_a_plan_names_nothing_twice(root: Path) -> None:
    parts = list(support.plan(support.described(root), "-1h", root))
    names = [part.name for part in parts]
    assert len(names) == len(set(names)) > 30
    assert {"forgectl/doctor.json", "journal/app-inbox.txt", "files/etc/forge/apps/inbox.toml"} <= set(names)
    assert not any("credstore" in name or "shadow" in name for name in names)
    assert next(part.what for part in parts if part.name == "forgectl/doctor.json") == "forgectl doctor --json"
