"""No room, no inodes, a full /tmp: what can't be stored is refused, and everything is back once there is room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import CONTAINER, podman, until
from testinfra.host import Host

PAGE, OVER = "disk-filling", "See that it is mended"
DISK = "/mnt/small"
FOLDERS = "/var/lib/postgresql /var/lib/nginx /var/log/nginx"
"""What is on it: the database, what Nginx buffers, what it logs."""
MOUNT = f"""
systemctl stop nginx.service 'postgresql@*'
size=$(du --summarize --total --block-size=1M {FOLDERS} | sed --quiet 's/\\s*total$//p')
files=$(find {FOLDERS} | wc --lines)
mkdir {DISK}
mount -t tmpfs -o mode=0755,size=$((size * 2 + 100))M,nr_inodes=$((files * 2 + 1000)) tmpfs {DISK}
for folder in {FOLDERS}; do
    mkdir --parents {DISK}$folder
    cp --archive --no-target-directory $folder {DISK}$folder
    mount --bind {DISK}$folder $folder
done
systemctl start postgresql.service nginx.service
"""
UNMOUNT = f"""
systemctl stop nginx.service 'postgresql@*'
for folder in {FOLDERS}; do
    umount $folder
    find $folder -mindepth 1 -delete
    cp --archive --no-target-directory {DISK}$folder $folder
done
umount {DISK}
rmdir {DISK}
systemctl start postgresql.service nginx.service
"""
# Empty files, until no more can be made.
MAKE_FILES = """
import itertools, os, sys
os.mkdir(sys.argv[1])
try:
    for number in itertools.count():
        open(f"{sys.argv[1]}/{number}", "w").close()
except OSError as error:
    print(error.strerror)
"""


@pytest.fixture(scope="module")
def disk(host: Host) -> Iterator[None]:
    """Put what grows on a host onto a disk with little room."""
    assert host.check_output("systemctl is-active nginx.service") == "active"
    podman("exec", CONTAINER, "sh", "-euc", MOUNT)
    try:
        yield
    finally:
        podman("exec", CONTAINER, "sh", "-euc", UNMOUNT)


@pytest.mark.usefixtures("disk")
def test_disk_full(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """Somebody's dump takes the rest: reading goes on, and what was acknowledged before is there afterwards."""
    dump = f"{DISK}/home/dump.sql"
    with fault("disk full") as happening:
        full = host.run("mkdir %s && cat /dev/zero > %s", f"{DISK}/home", dump)
        assert "No space left on device" in full.stderr
        until(lambda: happening.hurt, 60)
        happening.told("F601")
        runbooks.follow(PAGE, "What you see")
        assert dump in runbooks.follow(PAGE, "Look", {"place": DISK})
        happening.mended_by(PAGE)
        runbooks.follow(PAGE, "Take what nobody misses")
        runbooks.follow(PAGE, "Remove what has grown", {"victim": dump})
    runbooks.follow(PAGE, OVER)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("disk")
def test_inodes_full(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """No file can be made, with room to spare: a body that does not fit into memory is refused, the rest goes on."""
    cache = f"{DISK}/cache"
    with fault("inodes full") as happening:
        assert "No space left on device" in host.check_output("python3 -c %s %s", MAKE_FILES, cache)
        happening.told("F602")
        runbooks.follow(PAGE, "What you see")
        assert cache in runbooks.follow(PAGE, "Look", {"place": DISK})
        happening.mended_by(PAGE)
        runbooks.follow(PAGE, "Remove what has grown", {"victim": cache})
    runbooks.follow(PAGE, OVER)


@pytest.mark.exhaustive
def test_tmp_full(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """On a host whose /tmp is in memory, as Debian 13's is: clients notice nothing, and doctor itself needs none."""
    before = host.check_output("findmnt --noheadings --output=FSTYPE,OPTIONS --mountpoint /tmp")
    assert before.startswith("tmpfs"), before
    size = dict(option.partition("=")[::2] for option in before.split()[1].split(",")).get("size", "50%")
    ballast = "/tmp/upload.part"
    with fault("/tmp full") as happening:
        host.check_output("mount -o remount,size=64M /tmp")
        try:
            assert "No space left on device" in host.run("cat /dev/zero > %s", ballast).stderr
            happening.told("F605")
            runbooks.follow(PAGE, "What you see")
            assert ballast in runbooks.follow(PAGE, "Look", {"place": "/tmp"})
            happening.mended_by(PAGE)
            runbooks.follow(PAGE, "Remove what has grown", {"victim": ballast})
        finally:
            host.run("rm --force %s; mount -o remount,size=%s /tmp", ballast, size)
    assert happening.hurt == []
    runbooks.follow(PAGE, OVER)
