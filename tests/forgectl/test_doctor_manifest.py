"""The manifest: what provisioning left, what differs from it, and what a run of a part may say."""

import os
import time
from pathlib import Path

import pytest
from forgectl.doctor import manifest
from forgectl.errors import Refused

MARKED = "#\n# Ansible managed\n#\n"
FILES = {
    "etc/nginx/nginx.conf": MARKED + "worker_processes auto;\n",
    "etc/nginx/forge/inbox.conf": MARKED + "server {}\n",
    "etc/nginx/mime.types": "types {}\n",
    "etc/sysctl.d/90-forge.conf": MARKED + "# why\nnet.ipv4.tcp_syncookies = 1\nkernel.nothing.such = 1\n",
    "etc/forge/certificates.toml": 'source = "own_ca"\n',
    "etc/forge/apps/inbox.toml": MARKED,
    "etc/credstore.encrypted/forge.inbox.app.role-id": "x",
    "etc/systemd/system/forge-reboot.timer": MARKED,
    "etc/systemd/system/inbox@.service": MARKED,
    "etc/systemd/system/inbox@blue.service.d/release.conf": MARKED,
    "etc/systemd/system/inbox.mails@blue.service": "# Made by forgectl of R\n" + MARKED,
    "etc/systemd/system/nginx.service.d/forge-sandbox.conf": MARKED,
    "etc/passwd": "root:x:0:0\n",  # pragma: allowlist secret
    "usr/local/sbin/forge-nginx-reload": "#!/bin/sh\n",
    "usr/sbin/policy-rc.d": "#!/bin/sh\n",
    "proc/sys/net/ipv4/tcp_syncookies": "1\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host as provisioning leaves it, and its manifest."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    wants = tmp_path / "etc/systemd/system/timers.target.wants"
    wants.mkdir()
    (wants / "forge-recycle@inbox.timer").symlink_to("/etc/systemd/system/forge-recycle@.timer")
    assert manifest.record(tmp_path, since=0.0, whole=True)
    return tmp_path


def found(root: Path, *out_of_service: str) -> dict[str, str]:
    known = manifest.load(root)
    assert known
    return {each.what: each.how for each in manifest.differences(root, known, out_of_service)}


def test_it_knows_what_provisioning_wrote_and_nothing_else(root: Path) -> None:
    """No secret, nothing of the distribution's, nothing that forgectl itself writes; and no content."""
    known = manifest.load(root)
    assert known
    assert set(known.files) == {
        "etc/nginx/nginx.conf",
        "etc/nginx/forge/inbox.conf",
        "etc/sysctl.d/90-forge.conf",
        "etc/forge/certificates.toml",
        "etc/systemd/system/forge-reboot.timer",
        "etc/systemd/system/inbox@.service",
        "etc/systemd/system/nginx.service.d/forge-sandbox.conf",
        "etc/systemd/system/timers.target.wants/forge-recycle@inbox.timer",
        "usr/local/sbin/forge-nginx-reload",
        "usr/sbin/policy-rc.d",
    }
    assert known.settings == {"net.ipv4.tcp_syncookies": "1"}
    text = (root / "var/lib/forge/manifest.json").read_text()
    assert "worker_processes" not in text
    assert (root / "var/lib/forge/manifest.json").stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_stops_nobody(root: Path) -> None:
    """A FIFO never ends for whoever reads it, and who opens a device may have done something with it."""
    os.mkfifo(root / "etc/initctl")
    os.mkfifo(root / "etc/forge/forge-pipe")
    os.mkfifo(root / "etc/nginx/forge/pipe.conf")
    (root / "etc/nginx/nginx.conf").unlink()
    os.mkfifo(root / "etc/nginx/nginx.conf")
    (root / "etc/zero").symlink_to("/dev/zero")
    assert found(root) == {"/etc/nginx/nginx.conf": "is no regular file", "/etc/nginx/forge/pipe.conf": "was added"}
    assert manifest.record(root, since=0.0, whole=True)
    assert found(root) == {}


def test_a_host_that_nobody_touched_differs_in_nothing(root: Path) -> None:
    assert found(root) == {}
    before = (root / "var/lib/forge/manifest.json").read_bytes()
    assert not manifest.record(root, since=time.time() + 60, whole=True)
    assert (root / "var/lib/forge/manifest.json").read_bytes() == before


def test_each_kind_of_change_is_seen(root: Path) -> None:
    """Content, mode, loss, a link that leads elsewhere, a setting of the kernel, and what was put beside."""
    (root / "etc/nginx/nginx.conf").write_text(MARKED + "worker_processes 1;\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o777)
    (root / "usr/local/sbin/forge-nginx-reload").unlink()
    link = root / "etc/systemd/system/timers.target.wants/forge-recycle@inbox.timer"
    link.unlink()
    link.symlink_to("/dev/null")
    (root / "proc/sys/net/ipv4/tcp_syncookies").write_text("0\n")
    (root / "etc/nginx/forge/extra.conf").write_text("server {}\n")
    (root / "etc/systemd/system/inbox@green.service.d").mkdir()
    (root / "etc/systemd/system/inbox@green.service.d/override.conf").write_text("[Service]\n")
    (root / "etc/systemd/system/nginx.service").symlink_to("/dev/null")
    assert found(root) == {
        "/etc/nginx/nginx.conf": "has another content",
        "/usr/sbin/policy-rc.d": "has mode 0777, not 0644",
        "/usr/local/sbin/forge-nginx-reload": "is gone",
        "/etc/systemd/system/timers.target.wants/forge-recycle@inbox.timer": "leads -> /dev/null",
        "kernel setting net.ipv4.tcp_syncookies": "is 0 and was 1",
        "/etc/nginx/forge/extra.conf": "was added",
        "/etc/systemd/system/inbox@green.service.d/override.conf": "was added",
        "/etc/systemd/system/nginx.service": "was added",
    }


def test_what_is_not_the_platforms_is_left_alone(root: Path) -> None:
    (root / "etc/passwd").write_text("root:x:0:0\nsomebody:x:1:1\n")
    (root / "etc/forge/apps/inbox.toml").write_text("other")
    (root / "etc/systemd/system/inbox@blue.service.d/release.conf").write_text("other")
    (root / "etc/systemd/system/backup.service").write_text("[Service]\n")
    assert found(root) == {}


def test_an_app_that_was_removed_may_lack_what_is_its_own(root: Path) -> None:
    """Taken out of service, or purged; what is the host's may not be missing."""
    (root / "etc/nginx/forge/inbox.conf").rename(root / "etc/nginx/forge/inbox.conf.removed")
    (root / "etc/systemd/system/timers.target.wants/forge-recycle@inbox.timer").unlink()
    (root / "usr/sbin/policy-rc.d").unlink()
    assert found(root, "inbox") == {"/usr/sbin/policy-rc.d": "is gone"}
    assert len(found(root)) == 3
    (root / "etc/forge/apps/inbox.toml").unlink()
    (root / "etc/systemd/system/inbox@.service").unlink()
    assert found(root) == {"/usr/sbin/policy-rc.d": "is gone"}


def test_a_run_of_a_part_answers_for_what_it_wrote_alone(root: Path) -> None:
    """What somebody changed or added before it stays a difference; what it changed, added or removed does not.

    So does one of the whole, which forgets what it wrote no more; and who accepts, accepts it all.
    """
    (root / "etc/forge/certificates.toml").write_text("by hand\n")
    (root / "etc/nginx/forge/by-hand.conf").write_text("by hand\n")
    (root / "proc/sys/net/ipv4/tcp_syncookies").write_text("0\n")
    (root / "usr/local/sbin/forge-nginx-reload").unlink()
    os.utime(root / "etc/forge/certificates.toml", (0, 0))
    since = _later(root)
    (root / "etc/nginx/nginx.conf").write_text(MARKED + "by the run\n")
    (root / "etc/systemd/system/forge-new.timer").write_text(MARKED)
    (root / "usr/sbin/policy-rc.d").unlink()
    by_hand = {
        "/etc/forge/certificates.toml": "has another content",
        "/etc/nginx/forge/by-hand.conf": "was added",
        "kernel setting net.ipv4.tcp_syncookies": "is 0 and was 1",
    }
    assert manifest.record(root, since=since)
    assert found(root) == {**by_hand, "/usr/local/sbin/forge-nginx-reload": "is gone"}
    assert manifest.record(root, since=since, whole=True)
    assert found(root) == by_hand
    assert manifest.record(root, since=0.0, accept=True)
    assert found(root) == {}


def test_a_part_alone_is_no_beginning(tmp_path: Path) -> None:
    """A host on which no whole run came to its end is half provisioned, whatever part of it was run."""
    assert not manifest.record(tmp_path, since=0.0)
    assert manifest.load(tmp_path) is None


def test_a_dry_run_writes_nothing(root: Path) -> None:
    (root / "usr/sbin/policy-rc.d").unlink()
    assert manifest.record(root, since=0.0, whole=True, dry_run=True)
    assert found(root) == {"/usr/sbin/policy-rc.d": "is gone"}


def test_a_damaged_one_says_so(root: Path) -> None:
    (root / "var/lib/forge/manifest.json").write_text('{"at": 1')
    with pytest.raises(Refused, match=r"run site\.yml"):
        manifest.load(root)


def _later(root: Path) -> float:
    """A moment after which whatever is changed is newer: clocks of file systems tick more slowly than the system's."""
    moment, probe = time.time(), root / "clock"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        probe.write_text("")
        if probe.stat().st_ctime > moment:
            break
        time.sleep(0.005)
    return moment
