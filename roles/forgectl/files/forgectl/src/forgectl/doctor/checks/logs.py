"""The journal and the files of logs: whether they keep to their bounds and lose nothing."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import HOUR, Sight, message, moment, shorten, size, uptime

MIB = 1024**2
JOURNAL, CONFIG = "/var/log/journal", "/etc/systemd/journald.conf.d/50-forge.conf"
# journald counts in whole files of a sixteenth of its bound.
SLACK = 1.15
# Of sd-messages.h: SD_MESSAGE_JOURNAL_DROPPED, of a unit that said more than it may.
DROPPED = "a596d6fe7bfa4994828e72309e95d61e"  # pragma: allowlist secret
# It says so once in each interval of its limit, which is half a minute.
NOW_SECONDS = 40.0
RULES, STATUS, LOGS = "/etc/logrotate.d/forge", "/var/lib/logrotate/status", "/var/log/nginx"
# It is looked at every hour, and a busy log grows meanwhile.
GROWN = 2
DAYS = 2


def journal(sight: Sight) -> Iterator[Finding]:
    """F603: the room that the journal takes, and lines that it dropped in the last hour."""
    configured = re.search(r"^SystemMaxUse=(\d+)M$", sight.read(CONFIG), re.MULTILINE)
    folder = sight.at(JOURNAL)
    if configured and not folder.is_dir():
        evidence = [f"{JOURNAL}: no such folder", f"{CONFIG}: Storage=persistent"]
        title = "the journal is in memory alone: a reboot loses it"
        yield Finding("F603", HOST, title, evidence, "sudo systemctl restart systemd-journald.service")
    used = 0
    for path in folder.glob("*/*.journal*"):
        with suppress(OSError):
            used += path.stat().st_blocks * 512
    if configured and used > SLACK * int(configured[1]) * MIB:
        title = f"the journal takes {size(used)}, and may take {configured[1]} MiB"
        evidence = [f"{JOURNAL}: {size(used)}", f"{CONFIG}: {configured[0]}"]
        yield Finding("F603", HOST, title, evidence, f"sudo journalctl --vacuum-size={configured[1]}M")
    dropped = sight.journal(f"MESSAGE_ID={DROPPED}", since=HOUR, lines=200)
    if dropped:
        newest, lost = time.time() - moment(dropped[-1]), sum(_number(message(entry)) for entry in dropped)
        units = sorted(
            {str(entry.get("UNIT") or entry.get("OBJECT_SYSTEMD_UNIT") or _unit(message(entry))) for entry in dropped}
        )
        title = f"{', '.join(units)} said more than the journal takes: {lost} lines were lost in the last hour"
        evidence = [f"journal: {shorten(message(entry))}" for entry in dropped[-3:]]
        yield Finding("F603", HOST, title, evidence, "sudo forgectl status", over=newest > NOW_SECONDS)


def rotation(sight: Sight) -> Iterator[Finding]:
    """F604: logrotate's timer and its last run, and logs that have grown past where it rotates them."""
    timer, service = sight.unit("logrotate.timer"), sight.unit("logrotate.service")
    if timer["ActiveState"] != "active":
        evidence = [f"logrotate.timer is {timer['ActiveState']}, {timer['UnitFileState']}"]
        mend = "sudo systemctl enable --now logrotate.timer"
        yield Finding("F604", HOST, "nobody rotates the logs: the timer is off", evidence, mend)
    if service["Result"] not in ("success", "") or service["ActiveState"] == "failed":
        evidence = [f"logrotate.service: {service['Result']}", *sight.last_words("logrotate.service")]
        yield Finding(
            "F604", HOST, "the last rotation of the logs failed", evidence, "sudo systemctl start logrotate.service"
        )
    bound = re.search(r"^\s*maxsize (\d+)M$", sight.read(RULES), re.MULTILINE)
    for path in sorted(sight.at(LOGS).glob("*.json")) if bound and sight.is_root else ():
        with suppress(OSError):
            length = path.stat().st_size
            if bound and length > GROWN * int(bound[1]) * MIB:
                evidence = [f"{path}: {size(length)}", f"{RULES}: maxsize {bound[1]}M"]
                title = f"{path} has grown to {size(length)}, past the {bound[1]} MiB at which it is rotated"
                yield Finding("F604", HOST, title, evidence, "sudo systemctl start logrotate.service")
    with suppress(OSError):
        idle = time.time() - os.stat(sight.at(STATUS)).st_mtime  # noqa: PTH116
        up = uptime()
        if idle > DAYS * 24 * HOUR and up > DAYS * 24 * HOUR:
            title = f"the logs were last rotated {idle / 86400:.0f} days ago"
            yield Finding("F604", HOST, title, (f"{STATUS} is as old",), "sudo systemctl start logrotate.service")


def _number(text: str) -> int:
    found = re.search(r"Suppressed (\d+) messages", text)
    return int(found[1]) if found else 0


def _unit(text: str) -> str:
    found = re.search(r"messages from (\S+)", text)
    return found[1] if found else "a unit"
