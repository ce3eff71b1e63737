"""Memory of the host: what is left, how much of the time somebody waits for it, and whom the kernel killed."""

import re
from collections.abc import Iterator

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import HOUR, Sight, message, shorten, size

LEFT = 0.05
# Percent of the last minute in which something waited for memory (PSI, Documentation/accounting/psi.rst).
WAITING = 20.0
SWAP_USED = 0.8
# Of a whole host, not of a unit that met its own limit.
KILLED = re.compile(r"^Out of memory: Killed process \d+ \(([^)]*)\)")


def memory(sight: Sight) -> Iterator[Finding]:
    """F606 and F204."""
    numbers = {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+)", sight.read("/proc/meminfo"), re.MULTILINE)
    }
    total, available = numbers.get("MemTotal", 0), numbers.get("MemAvailable", 0)
    problems = []
    if total and available < LEFT * total:
        problems.append(f"{size(available)} of {size(total)} memory are left")
    pressure = re.search(r"^some avg10=\S+ avg60=(\S+)", sight.read("/proc/pressure/memory"), re.MULTILINE)
    if pressure and float(pressure[1]) > WAITING:
        problems.append(f"something waited for memory in {pressure[1]} % of the last minute")
    swap, free = numbers.get("SwapTotal", 0), numbers.get("SwapFree", 0)
    if swap and problems and free < (1 - SWAP_USED) * swap:
        problems.append(f"{size(swap - free)} of {size(swap)} swap are used")
    if problems:
        evidence = [f"/proc/meminfo: MemAvailable {size(available)} of {size(total)}", *problems]
        mend = "sudo systemctl status --no-pager --lines=0 system.slice"
        yield Finding("F606", HOST, problems[0], evidence, mend)
    kernel = sight.journal("_TRANSPORT=kernel", "PRIORITY=3", since=HOUR, lines=200)
    killed = [match[1] for entry in kernel if (match := KILLED.search(message(entry)))]
    if killed:
        title = (
            f"the host ran out of memory {len(killed)} times in the last hour; killed: {', '.join(sorted(set(killed)))}"
        )
        evidence = [shorten(message(entry)) for entry in kernel if KILLED.search(message(entry))][-3:]
        yield Finding("F204", HOST, title, evidence, "sudo forgectl status", over=len(killed) < 3)
