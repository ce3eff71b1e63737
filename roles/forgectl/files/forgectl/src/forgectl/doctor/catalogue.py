"""Everything that doctor can find: the one table that its output, its pages and their tests go by.

critical    clients notice it
warning     it will come to that, or nobody could tell
note        somebody should know; nothing is wrong
"""

from typing import Literal, NamedTuple

Severity = Literal["critical", "warning", "note"]


class Entry(NamedTuple):
    """One kind of finding; `runbook` is the stem of its page in docs/runbooks."""

    code: str
    name: str
    severity: Severity
    runbook: str


CATALOGUE = (
    Entry("F001", "not run as root", "warning", "not-provisioned"),
    Entry("F002", "a check failed or took too long", "warning", "not-provisioned"),
    Entry("F003", "host never provisioned", "critical", "not-provisioned"),
    Entry("F004", "host half provisioned", "warning", "not-provisioned"),
    Entry("F005", "configuration broken", "warning", "not-provisioned"),
    Entry("F006", "not as provisioning left it", "warning", "drift"),
    Entry("F101", "certificate expires soon", "warning", "certificate-expiring"),
    Entry("F102", "certificate expired", "critical", "certificate-expiring"),
    Entry("F103", "certificate is not renewed", "warning", "certificate-expiring"),
    Entry("F104", "clients get a placeholder certificate", "critical", "certificate-expiring"),
    Entry("F201", "live service does not run", "critical", "service-exits-right-after-start"),
    Entry("F202", "running but not ready", "critical", "live-but-not-ready"),
    Entry("F203", "address in use, or socket not as it should be", "critical", "address-already-in-use"),
    Entry("F204", "process killed for memory", "warning", "memory-growing"),
    Entry("F205", "worker killed on timeout", "warning", "workers-killed-on-timeout"),
    Entry("F206", "memory near its limit", "warning", "memory-growing"),
    Entry("F207", "event loop blocked", "critical", "event-loop-blocked"),
    Entry("F208", "command failed", "warning", "command-failed"),
    Entry("F209", "release changed or unreadable", "warning", "release-permissions"),
    Entry("F210", "file descriptors nearly used up", "warning", "file-descriptors"),
    Entry("F211", "variables do not arrive", "warning", "variables-not-arriving"),
    Entry("F301", "lock held for long", "warning", "half-finished-release"),
    Entry("F302", "half-finished release", "warning", "half-finished-release"),
    Entry("F303", "maintenance page", "critical", "maintenance"),
    Entry("F304", "schema is not the release's", "warning", "schema-mismatch"),
    Entry("F401", "Vault unreachable or sealed", "warning", "vault-unreachable-or-sealed"),
    Entry("F402", "secret id rejected or missing", "warning", "secret-id-expired"),
    Entry("F403", "secret id ends soon", "warning", "secret-id-expired"),
    Entry("F404", "newer secrets are not in service", "note", "secrets-not-in-service"),
    Entry("F405", "newest secrets were refused", "warning", "secrets-not-in-service"),
    Entry("F501", "database unreachable", "critical", "database-down"),
    Entry("F502", "connections near PostgreSQL's maximum", "warning", "too-many-database-connections"),
    Entry("F601", "disk nearly full", "warning", "disk-filling"),
    Entry("F602", "inodes nearly used up", "warning", "disk-filling"),
    Entry("F603", "journal over its budget, or losing lines", "warning", "journal-flooded"),
    Entry("F604", "logs are not rotated", "warning", "log-rotation"),
    Entry("F605", "/tmp full", "warning", "disk-filling"),
    Entry("F606", "memory of the host short", "warning", "memory-growing"),
    Entry("F607", "clock not synchronised", "warning", "clock"),
    Entry("F608", "names do not resolve", "warning", "network"),
    Entry("F609", "no network", "critical", "network"),
    Entry("F701", "reboot pending", "note", "updates-and-reboot"),
    Entry("F702", "security updates pending or failing", "warning", "updates-and-reboot"),
    Entry("F703", "unit more exposed than provisioned", "warning", "drift"),
    Entry("F704", "unit failed, or timer off", "warning", "unit-failed"),
    Entry("F801", "Nginx down", "critical", "nginx-down"),
    Entry("F802", "configuration of Nginx does not hold", "warning", "nginx-down"),
    Entry("F803", "many 5xx answers", "critical", "errors-in-numbers"),
    Entry("F804", "alerts not delivered", "warning", "alerts-not-delivered"),
)
BY_CODE = {entry.code: entry for entry in CATALOGUE}
