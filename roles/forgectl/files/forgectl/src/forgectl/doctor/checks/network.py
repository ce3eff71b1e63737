"""The network, without asking anybody beyond it: interfaces, routes, name servers, the clock."""

import re
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import CLOCKS, Sight, uptime

ANSWER_SECONDS = 1.5
DNS_PORT = 53
UP = ("up", "unknown")
# So long a fresh host may take to agree with its servers.
SETTLE_SECONDS = 900.0


def network(sight: Sight) -> Iterator[Finding]:
    """F609: interfaces that are up, and a way out of this host."""
    links = {}
    for folder in sorted(sight.at("/sys/class/net").glob("*")):
        if folder.name != "lo":
            with suppress(OSError):
                links[folder.name] = (folder / "operstate").read_text().strip()
    states = ", ".join(f"{name} {state}" for name, state in links.items()) or "none"
    evidence = [f"/sys/class/net: {states}"]
    mend = "sudo systemctl restart networking.service"
    if not any(state in UP for state in links.values()):
        yield Finding("F609", HOST, f"no interface is up ({states})", evidence, mend)
    elif not _default_route(sight):
        yield Finding(
            "F609", HOST, "there is no way out: no default route", [*evidence, "/proc/net/route: no default"], mend
        )


def names(sight: Sight) -> Iterator[Finding]:
    """F608: whether any name server answers; what it answers is no matter."""
    servers = re.findall(r"^\s*nameserver\s+(\S+)", sight.read("/etc/resolv.conf"), re.MULTILINE)
    where = "/etc/resolv.conf"
    mend = "ansible-playbook -i inventory/production site.yml"
    if not servers:
        yield Finding("F608", HOST, "no name server is named", (f"{where}: no nameserver",), f"cat {where}")
        return
    why = _silence(servers, ANSWER_SECONDS * sight.patience)
    if why:
        evidence = [f"{where}: {', '.join(servers)}", *(f"{server}: {reason}" for server, reason in why.items())]
        mend = "sudo systemctl restart systemd-resolved.service" if "127.0.0.53" in servers else f"cat {where}"
        yield Finding("F608", HOST, f"no name server answers ({', '.join(servers)})", evidence, mend)


def clock(sight: Sight) -> Iterator[Finding]:
    """F607: whether somebody keeps the clock, and the kernel agrees. In a container it is the machine's."""
    timesyncd = sight.unit(CLOCKS[0])
    running = [name for name in CLOCKS if sight.unit(name)["ActiveState"] == "active"]
    # systemd itself does not start it there.
    wanted = (timesyncd["LoadState"], timesyncd["UnitFileState"]) == ("loaded", "enabled")
    left_out = wanted and timesyncd["ConditionResult"] == "no" and sight.at("/run/systemd/container").exists()
    if not running and left_out:
        return
    mend = "sudo systemctl enable --now systemd-timesyncd.service"
    if not running:
        evidence = [f"{CLOCKS[0]}: {timesyncd['ActiveState']}, {timesyncd['UnitFileState']}"]
        yield Finding("F607", HOST, "nobody keeps the clock", evidence, mend)
        return
    said = sight.run("timedatectl", "show", "--property=NTPSynchronized", "--value").strip()
    if said == "no" and uptime() > SETTLE_SECONDS:
        evidence = [f"{running[0]} runs", "timedatectl: NTPSynchronized=no"]
        mend = f"sudo systemctl restart {running[0]}"
        yield Finding("F607", HOST, "the clock is not synchronised: no time server answers", evidence, mend)


def _default_route(sight: Sight) -> bool:
    routes = (line.split() for line in sight.read("/proc/net/route").splitlines()[1:])
    # Destination and mask 0; RTF_REJECT is 0x0200.
    if any(len(route) > 7 and route[1] == route[7] == "00000000" and not int(route[3], 16) & 0x200 for route in routes):
        return True
    routes = (line.split() for line in sight.read("/proc/net/ipv6_route").splitlines())
    return any(
        len(route) > 9
        and route[0] == "0" * 32
        and route[1] == "00"
        and route[9] != "lo"
        and not int(route[8], 16) & 0x200
        for route in routes
    )


def _silence(servers: Sequence[str], seconds: float) -> dict[str, str]:
    """Why each of the servers does not answer; empty as soon as one does."""
    why = {}
    waiting = {}
    # The root's name servers (RFC 1035, 4.1): one header with one question for ".", type NS, class IN.
    number = secrets.randbits(16)
    query = struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + b"\0" + struct.pack(">2H", 2, 1)
    try:
        for server in servers:
            try:
                # Whatever stands there, nobody is asked for its address.
                numeric = socket.AI_NUMERICHOST
                kind, _, _, _, address = socket.getaddrinfo(server, DNS_PORT, type=socket.SOCK_DGRAM, flags=numeric)[0]
                asked = socket.socket(kind, socket.SOCK_DGRAM)
                waiting[server] = asked
                asked.connect(address)
                asked.send(query)
            except OSError as error:
                why[server] = error.strerror or str(error)
        deadline = time.monotonic() + seconds
        for server, asked in waiting.items():
            if server in why:
                continue
            asked.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                if asked.recv(512)[:2] == query[:2]:
                    return {}
                why[server] = "answers something else"
            except OSError as error:
                why[server] = str(error) or type(error).__name__
    finally:
        for asked in waiting.values():
            asked.close()
    return why
