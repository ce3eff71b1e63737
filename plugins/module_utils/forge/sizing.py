"""Worker counts and limits of all apps of a host together, each with the reasons for it.

Async workers start low: one a core, two to four. The memory of the host and the connections of the database server then
lower the counts that were left to choice; a count that the inventory sets is never changed, only refused when it does
not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .connections import Demand, Server, arithmetic, budget
from .problems import Problem

FEWEST_BY_CORES = 2
MOST_BY_CORES = 4
# Slots of one app at a time; the second exists only during a cutover, but then it has its full memory and pools.
SLOTS = 2
# Room for Gunicorn's master beside the workers, under the limit of a slot.
MASTER_MIB = 64
# A worker may grow to this multiple of what it is expected to need before the kernel kills it.
HEADROOM = 2


@dataclass
class Plan:
    """What one app asks for, and the count that was found for it.

    Attributes:
        fixed: Workers that the inventory sets, 0 when the choice is left to this module.
        worker_mib: Expected memory of one worker.
        memory_max_mib: Limit of a slot set by the inventory, 0 without.
        cpu_quota_percent: CPU time of a slot set by the inventory, in per cent of one core, 0 without.
        slot_commands_mib: Limits of the commands that go on, together; each slot has its own.
        host_commands_mib: Limits of those on a schedule, together.
        demand: What one worker needs of the database server, None without a database.
        unlisted: Whether it runs on the host, and no entry of the inventory names it any more.
    """

    name: str
    fixed: int
    fixed_by: str
    worker_mib: int
    memory_max_mib: int
    cpu_quota_percent: int
    slot_commands_mib: int = 0
    host_commands_mib: int = 0
    demand: Demand | None = None
    unlisted: bool = False
    count: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def slot_mib(self) -> int:
        """Expected memory of one slot's server, in MiB."""
        return self.count * self.worker_mib

    @property
    def whole_slot_mib(self) -> int:
        """The same with the commands that go on beside it."""
        return self.slot_mib + self.slot_commands_mib


@dataclass(frozen=True)
class Host:
    """Sizes of the host. `memory_mib` is all of it, `kept_mib` what is not for apps."""

    cpus: float
    cpus_from: str
    memory_mib: int
    memory_from: str
    kept_mib: int


def choose(plans: Sequence[Plan], host: Host, servers: Sequence[Server]) -> list[Problem]:
    """Fill in `count` and `reasons` of every plan; return what does not fit however low the counts are."""
    for plan in plans:
        _start(plan, host)
    _lower_for_memory(plans, host)
    for server in servers:
        _lower_for_connections(plans, server)
    problems = [problem for plan in plans for problem in _limit_problems(plan)]
    problems += _memory_problems(plans, host)
    problems += [problem for server in servers for problem in _connection_problems(plans, server)]
    return problems


def memory_needed(plans: Iterable[Plan]) -> int:
    """Return the memory of all apps, with the largest of them in the middle of a cutover, in MiB."""
    slots, scheduled = [], 0
    for plan in plans:
        slots.append(plan.whole_slot_mib)
        scheduled += plan.host_commands_mib
    return sum(slots) + max(slots, default=0) + scheduled


def memory_limit(plan: Plan, host: Host) -> int:
    """Return the memory at which the kernel kills a process of a slot, in MiB."""
    if plan.memory_max_mib:
        return plan.memory_max_mib
    generous = HEADROOM * plan.slot_mib + MASTER_MIB
    return max(plan.slot_mib + MASTER_MIB, min(generous, host.memory_mib - host.kept_mib))


def cpu_limit(plan: Plan, host: Host) -> int:
    """Return the CPU time of a slot in per cent of one core."""
    return plan.cpu_quota_percent or max(1, round(100 * host.cpus))


def _start(plan: Plan, host: Host) -> None:
    if plan.fixed:
        plan.count = plan.fixed
        plan.reasons = [f"{plan.fixed} set by {plan.fixed_by}"]
        return
    cores = host.cpus
    source = f"{host.cpus:g} cores" if host.cpus_from == "cores" else f"{host.cpus:g} usable ({host.cpus_from})"
    if plan.cpu_quota_percent and plan.cpu_quota_percent / 100 < cores:
        cores, source = plan.cpu_quota_percent / 100, f"cpu_quota_percent {plan.cpu_quota_percent}"
    plan.count = min(MOST_BY_CORES, max(FEWEST_BY_CORES, int(cores)))
    plan.reasons = [
        f"{plan.count} by cores: {source}; one worker a core, at least {FEWEST_BY_CORES}, at most {MOST_BY_CORES}"
    ]
    if plan.memory_max_mib:
        fitting = max(1, (plan.memory_max_mib - MASTER_MIB) // plan.worker_mib)
        if fitting < plan.count:
            plan.count = fitting
            plan.reasons.append(f"{fitting} by memory_max_mib {plan.memory_max_mib} at {plan.worker_mib} MiB a worker")


def _lower_for_memory(plans: Sequence[Plan], host: Host) -> None:
    available = host.memory_mib - host.kept_mib
    lowered: set[str] = set()
    while memory_needed(plans) > available:
        candidates = [plan for plan in plans if not plan.fixed and plan.count > 1]
        if not candidates:
            break
        largest = max(candidates, key=lambda plan: (plan.slot_mib, plan.name))
        largest.count -= 1
        lowered.add(largest.name)
    for plan in plans:
        if plan.name in lowered:
            plan.reasons.append(
                f"{plan.count} by memory: {available} MiB for apps ({host.memory_mib} MiB {host.memory_from}, "
                f"{host.kept_mib} kept), {plan.worker_mib} MiB a worker, two slots during a cutover"
            )


def _lower_for_connections(plans: Sequence[Plan], server: Server) -> None:
    lowered: set[str] = set()
    while budget(server, _demands(plans, server)).spare < 0:
        candidates = [
            plan
            for plan in plans
            if plan.demand and plan.demand.server == server.name and not plan.fixed and plan.count > 1
        ]
        if not candidates:
            break
        largest = max(
            candidates, key=lambda plan: (plan.count * (plan.demand.per_worker if plan.demand else 0), plan.name)
        )
        largest.count -= 1
        lowered.add(largest.name)
    for plan in plans:
        if plan.name in lowered and plan.demand:
            plan.reasons.append(
                f"{plan.count} by connections: {server.max_connections} at {server.name}, "
                f"{plan.demand.per_worker} a worker, {SLOTS} slots, hosts: {plan.demand.hosts}"
            )


def _demands(plans: Sequence[Plan], server: Server) -> list[tuple[str, int, Demand]]:
    return [(plan.name, plan.count, plan.demand) for plan in plans if plan.demand and plan.demand.server == server.name]


def connection_budgets(plans: Sequence[Plan], servers: Sequence[Server]) -> dict[str, dict[str, object]]:
    """Return the arithmetic of every database server by its name."""
    return {server.name: budget(server, _demands(plans, server)).as_dict() for server in servers}


def _limit_problems(plan: Plan) -> list[Problem]:
    least = plan.slot_mib + MASTER_MIB
    if not plan.memory_max_mib or plan.memory_max_mib >= least:
        return []
    return [
        Problem(
            f"apps.{plan.name}.memory_max_mib",
            f"at least {least} MiB: {plan.count} workers x {plan.worker_mib} MiB + {MASTER_MIB} for Gunicorn's master",
            f"{plan.memory_max_mib} MiB",
            "raise memory_max_mib, or lower workers or worker_memory_mib",
        )
    ]


def _memory_problems(plans: Sequence[Plan], host: Host) -> list[Problem]:
    needed, available = memory_needed(plans), host.memory_mib - host.kept_mib
    if not plans or needed <= available:
        return []
    largest = max(plans, key=lambda plan: plan.whole_slot_mib)
    parts = " + ".join(_parts(plan) for plan in plans)
    leaving = "".join(f", or take {plan.name} out of service: playbooks/remove.yml" for plan in plans if plan.unlisted)
    listed = max((plan for plan in plans if not plan.unlisted), key=lambda plan: plan.whole_slot_mib, default=largest)
    return [
        Problem(
            "memory of all apps together",
            f"at most {available} MiB: {host.memory_mib} MiB ({host.memory_from}) - {host.kept_mib} MiB kept for the "
            "system",
            f"{needed} MiB: {parts} + {largest.whole_slot_mib} for the second slot of {largest.name} during a cutover",
            f"lower apps.{listed.name}.workers, or worker_memory_mib to what a worker really needs, or take a larger "
            f"host{leaving}",
        )
    ]


def _parts(plan: Plan) -> str:
    commands = plan.slot_commands_mib + plan.host_commands_mib
    where = " (in no entry)" if plan.unlisted else ""
    more = f" + {commands} for its commands" if commands else ""
    return f"{plan.name}{where} {plan.count} x {plan.worker_mib}{more}"


def _connection_problems(plans: Sequence[Plan], server: Server) -> list[Problem]:
    demands = _demands(plans, server)
    result = budget(server, demands)
    if result.spare >= 0:
        return []
    unlisted = {plan.name for plan in plans if plan.unlisted}
    hungriest = max(demands, key=lambda item: (item[0] not in unlisted, item[1] * item[2].per_worker))[0]
    return [
        Problem(
            f"connections of PostgreSQL ({server.name})",
            f"at most {server.limited_by} = {server.max_connections}",
            f"{result.required}: {arithmetic(server, demands)}",
            f"raise {server.limited_by} to {result.required} or more, or lower apps.{hungriest}.database.pool_max "
            f"or apps.{hungriest}.workers",
        )
    ]
