"""What an app may be called."""

from __future__ import annotations

import re

from .problems import Problem

_NAME = re.compile(r"[a-z][a-z0-9-]{0,20}")

# An app's name becomes a user, a group, a database, a template unit, and a folder below /srv, /run, /var/lib and
# /var/cache/forge, which a purge deletes. These are users, units and folders of the supported distributions, of what
# is often installed on them, and of this product.
RESERVED_NAMES = frozenset(
    """
    root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc gnats nobody sshd messagebus
    polkitd postgres postgresql nginx ssh ssl-cert sudo adm tty disk kmem dialout fax voice cdrom floppy tape audio dip
    operator src shadow utmp video sasl plugdev staff users nogroup input sgx kvm render crontab netdev landscape
    pollinate syslog uuidd tcpdump tss lxd admin ubuntu debian vault openbao haproxy prometheus forge forgectl
    user getty serial-getty container-getty console-getty autovt modprobe logrotate cron dbus
    blue green live
    apt certbot containerd credentials docker dpkg fail2ban letsencrypt lock log misc mount nftables pam private python
    shm snapd ucf udev uploads
    """.split()
)


def name_problems(name: str) -> list[Problem]:
    """Return what is wrong with the name of an app."""
    where = f"apps.{name}"
    if not _NAME.fullmatch(name):
        return [
            Problem(
                where,
                "a name of lower-case letters, digits and hyphens, a letter first, at most 21 characters",
                name,
                "rename the entry",
            )
        ]
    taken = (
        name in RESERVED_NAMES or name.startswith(("systemd-", "forge-", "_")) or name.endswith(("-migrate", "-lease"))
    )
    if taken:
        return [
            Problem(
                where,
                "a name that no user, unit or folder of the system has (the app gets one of each)",
                f"{name} is reserved",
                f"rename the entry, for example {name[:17]}-app",
            )
        ]
    return []
