"""Security updates, and reboots that they ask for."""

import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import Sight, uptime

DAY = 86400.0
# Whoever installs has it, from the first package to the last.
DPKG_LOCK = "/var/lib/dpkg/lock-frontend"
CONFIG = "/etc/apt/apt.conf.d/52forge-unattended-upgrades"
# What apt's daily jobs leave behind: when lists were fetched, and when unattended-upgrades last ran to its end.
FETCHED, RAN = "/var/lib/apt/periodic/update-success-stamp", "/var/lib/apt/periodic/unattended-upgrades-stamp"
# They run every night.
LATE_DAYS = 3
# What it left out, though its origin is one to install from: on hold, or at odds with what is installed.
KEPT_BACK = "/var/lib/unattended-upgrades/kept-back"
PACKAGES = "/var/lib/dpkg/status"
LOG = "/var/log/unattended-upgrades/unattended-upgrades.log"
UPGRADE = "sudo unattended-upgrade --verbose"
BY_HAND = "sudo apt-get --with-new-pkgs upgrade"
REBOOT = "ansible-playbook -i inventory/production playbooks/patch.yml"


def updates(sight: Sight) -> Iterator[Finding]:
    """F702: whether the nightly updates run, end well, and leave nothing out."""
    if 'Unattended-Upgrade "1"' not in sight.read(CONFIG):
        return
    timer, service = sight.unit("apt-daily-upgrade.timer"), sight.unit("apt-daily-upgrade.service")
    if timer["ActiveState"] != "active":
        evidence = [f"apt-daily-upgrade.timer is {timer['ActiveState']}, {timer['UnitFileState']}"]
        mend = "sudo systemctl enable --now apt-daily-upgrade.timer"
        yield Finding("F702", HOST, "nobody installs security updates: the timer is off", evidence, mend)
    if service["Result"] not in ("success", ""):
        evidence = [f"apt-daily-upgrade.service: {service['Result']}", *sight.last_words("apt-daily-upgrade.service")]
        yield Finding("F702", HOST, "the last installation of security updates failed", evidence, UPGRADE)
    installed = _age(sight, CONFIG)
    for path, what in ((FETCHED, "package lists were last fetched"), (RAN, "security updates were last installed")):
        age = _age(sight, path)
        # A host that was off, or is new, makes up for it in its next night.
        up = uptime()
        if min(age, installed, up) > LATE_DAYS * DAY:
            when = f"{age / DAY:.0f} days ago" if age < float("inf") else "never"
            yield Finding("F702", HOST, f"{what} {when}", (f"{path}: {when}", f"see {LOG}"), UPGRADE)
    # Whatever was installed since may have been that.
    if (kept := sight.read(KEPT_BACK).split()) and _age(sight, KEPT_BACK) < _age(sight, PACKAGES):
        title = f"{len(kept)} security updates were held back: {', '.join(kept[:5])}"
        yield Finding("F702", HOST, title, (f"{KEPT_BACK}: {' '.join(kept)}", f"see {LOG}"), BY_HAND)
    broken = [line for line in sight.read(PACKAGES).split("\n\n") if _is_broken(line)]
    # Meanwhile that is how packages are.
    if broken and not _is_locked(sight):
        packages = [re.sub(r"Package: (\S+).*", r"\1", each, flags=re.DOTALL) for each in broken]
        title = f"{len(packages)} packages are installed in part: {', '.join(packages[:5])}"
        yield Finding("F702", HOST, title, (PACKAGES,), "sudo dpkg --configure --pending")


def reboot(sight: Sight) -> Iterator[Finding]:
    """F701: what asks for a reboot: packages, or a kernel that is newer than the one that runs."""
    why = []
    if sight.at("/run/reboot-required").exists():
        packages = sorted(set(sight.read("/run/reboot-required.pkgs").split()))
        why.append(f"/run/reboot-required: {', '.join(packages) or 'an update asks for it'}")
    running = sight.read("/proc/sys/kernel/osrelease").strip()
    kernels = {path.name.removeprefix("vmlinuz-") for path in sight.at("/boot").glob("vmlinuz-*")}
    # In a container it is the machine's.
    if running in kernels and (newest := max(kernels, key=_version)) != running:
        why.append(f"/boot: kernel {newest} is installed, {running} runs")
    if why:
        window = re.search(r"--window (\S+)", sight.read("/etc/systemd/system/forge-reboot.service"))
        when = f"comes in the window {window[1]}" if window else "waits for somebody: there is no window for it"
        title = f"a reboot is pending, and {when}: {why[0].partition(': ')[2]}"
        yield Finding("F701", HOST, title, tuple(why), REBOOT)


def _age(sight: Sight, path: str) -> float:
    """The seconds since a file was written; infinite where there is none."""
    try:
        return time.time() - sight.at(path).stat().st_mtime
    except OSError:
        return float("inf")


def _is_locked(sight: Sight) -> bool:
    """Whether somebody has the lock of the packages; asked so that nobody ever finds it taken by this."""
    with suppress(OSError), sight.at(DPKG_LOCK).open("rb") as file:
        # struct flock of Linux on 64 bits: type, whence, start, length, process.
        asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        (kind,) = struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return bool(kind != fcntl.F_UNLCK)
    return False


def _is_broken(paragraph: str) -> bool:
    found = re.search(r"^Status: \S+ \S+ (\S+)$", paragraph, re.MULTILINE)
    return bool(found) and found[1] in ("half-installed", "unpacked", "half-configured") if found else False


def _version(name: str) -> list[tuple[int, str]]:
    return [(int(number or -1), word) for number, word in re.findall(r"(\d+)|(\D+)", name)]
