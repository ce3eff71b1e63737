"""Worker counts, their reasons, and limits."""

from __future__ import annotations

from typing import Any

import pytest
from forge.connections import Demand, Server
from forge.sizing import Host, Plan, choose, cpu_limit, memory_limit, memory_needed

LOCAL = Server("local", 100, "postgresql_max_connections", exporter=2, reserved=5)


def plan(name: str = "shop", **changes: Any) -> Plan:
    """Describe an app that leaves everything to choice."""
    options: dict[str, Any] = {"fixed": 0, "fixed_by": f"apps.{name}.workers", "worker_mib": 150}
    return Plan(name, **options | {"memory_max_mib": 0, "cpu_quota_percent": 0} | changes)


def host(cpus: float = 4, memory_mib: int = 8192, cpus_from: str = "cores") -> Host:
    """Describe a host."""
    return Host(cpus, cpus_from, memory_mib, "memory of the machine", kept_mib=160)


def demand(pool_max: int, hosts: int = 1) -> Demand:
    """Describe what a worker asks of the database."""
    return Demand("local", hosts, pool_max, migration=2)


@pytest.mark.parametrize(
    ("options", "machine", "count", "reasons"),
    [
        ({}, host(1), 2, ["2 by cores: 1 cores; one worker a core, at least 2, at most 4"]),
        ({}, host(3), 3, ["3 by cores: 3 cores; one worker a core, at least 2, at most 4"]),
        ({}, host(64), 4, ["4 by cores: 64 cores; one worker a core, at least 2, at most 4"]),
        (
            {},
            host(2.5, cpus_from="cgroup quota"),
            2,
            ["2 by cores: 2.5 usable (cgroup quota); one worker a core, at least 2, at most 4"],
        ),
        (
            {"cpu_quota_percent": 300},
            host(64),
            3,
            ["3 by cores: cpu_quota_percent 300; one worker a core, at least 2, at most 4"],
        ),
        (
            {},
            host(4, 700),
            1,
            [
                "4 by cores: 4 cores; one worker a core, at least 2, at most 4",
                "1 by memory: 540 MiB for apps (700 MiB memory of the machine, 160 kept), 150 MiB a worker, "
                "two slots during a cutover",
            ],
        ),
        (
            {"memory_max_mib": 400},
            host(),
            2,
            [
                "4 by cores: 4 cores; one worker a core, at least 2, at most 4",
                "2 by memory_max_mib 400 at 150 MiB a worker",
            ],
        ),
        (
            {"demand": demand(20)},
            host(),
            2,
            [
                "4 by cores: 4 cores; one worker a core, at least 2, at most 4",
                "2 by connections: 100 at local, 21 a worker, 2 slots, hosts: 1",
            ],
        ),
        ({"demand": demand(5, hosts=4)}, host(), 1, None),
        ({"fixed": 9}, host(1), 9, ["9 set by apps.shop.workers"]),
    ],
)
def test_count_and_its_reasons(options: dict[str, Any], machine: Host, count: int, reasons: list[str] | None) -> None:
    """The tightest bound decides, and every bound that lowered the count is named."""
    app = plan(**options)
    assert choose([app], machine, [LOCAL]) == []
    assert app.count == count
    assert reasons is None or app.reasons == reasons


def test_a_chosen_count_gives_way_to_one_that_is_set() -> None:
    """What the inventory sets is never changed."""
    fixed, free = plan("fixed", fixed=4, demand=demand(5)), plan("free", demand=demand(5))
    assert choose([fixed, free], host(), [LOCAL]) == []
    assert (fixed.count, free.count) == (4, 3)
    assert 2 * (4 + 3) * 6 + 2 * 2 + 2 + 5 <= 100 < 2 * (4 + 4) * 6 + 2 * 2 + 2 + 5


@pytest.mark.parametrize("memory_mib", range(460, 4000, 60))
@pytest.mark.parametrize("worker_mib", [100, 150, 400])
def test_what_was_chosen_fits(memory_mib: int, worker_mib: int) -> None:
    """All slots, with one app in the middle of a cutover, or it is refused; never neither."""
    machine = host(4, memory_mib)
    apps = [plan("shop", worker_mib=worker_mib), plan("blog", worker_mib=150)]
    problems = choose(apps, machine, [])
    assert bool(problems) == (memory_needed(apps) > memory_mib - machine.kept_mib)
    if problems:
        assert [app.count for app in apps] == [1, 1]


def test_limits() -> None:
    """A slot may use the double of what it is expected to, within the host; what the inventory sets stands."""
    app = plan(fixed=2)
    choose([app], host(), [])
    assert memory_limit(app, host()) == 2 * 2 * 150 + 64
    assert memory_limit(app, host(memory_mib=600)) == 600 - 160
    assert memory_limit(app, host(memory_mib=100)) == 2 * 150 + 64
    assert memory_limit(plan(memory_max_mib=77), host()) == 77
    assert cpu_limit(app, host(1.5)) == 150
    assert cpu_limit(plan(cpu_quota_percent=40), host()) == 40


def test_commands_count_in_full() -> None:
    """Those that go on are in both slots of a cutover; those on a schedule are there once."""
    shop = plan(fixed=2, worker_mib=100, slot_commands_mib=300, host_commands_mib=50)
    assert choose([shop], host(4, 2000), []) == []
    assert memory_needed([shop]) == 2 * (200 + 300) + 50
    blog = plan("blog", fixed=1, worker_mib=100)
    choose([shop, blog], host(4, 8000), [])
    assert memory_needed([shop, blog]) == 500 + 100 + 500 + 50
    (problem,) = choose([shop], host(4, 1200), [])
    assert "shop 2 x 100 + 350 for its commands + 500 for the second slot of shop" in problem.found
    # The limit of the server's own unit is not theirs.
    assert memory_limit(shop, host(4, 8000)) == 2 * 200 + 64


def test_commands_connect_as_workers_do() -> None:
    """Each may have a pool of its own."""
    shop = plan(fixed=2, demand=Demand("local", 1, 4, migration=2, commands=3))
    (problem,) = choose([shop], host(), [Server("local", 40, "postgresql_max_connections", exporter=2, reserved=5)])
    assert problem.found.startswith(
        "59: shop: 1 hosts x (2 workers + 3 commands) x 2 slots x (4 pool_max + 1 listener)"
    )
