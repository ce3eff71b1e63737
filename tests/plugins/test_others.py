"""Apps that the host runs and no entry names, as the host describes them and as preflight counts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forge import inventory_lint, others, sizing
from forge.connections import Demand, Server
from host_probe import described

LOCAL = Server("local", 100, "postgresql_max_connections", exporter=2, reserved=5)
LIVE = '{"live": {"release": "R1"}}'
DESCRIPTION = """
name = "{name}"
domain = "{name}.example.com"
[workers]
count = 2
[settings]
{prefix}_DATABASE_POOL_MAX = "7"
[database]
placement = "{placement}"
name = "{name}_data"
"""
COMMANDS = """pool_max = 11
[commands.beat]
memory_max_mib = 64
[commands.tick]
memory_max_mib = 100
schedule = "hourly"
"""


def describe(
    root: Path, name: str, *, placement: str = "local", state: str | None = LIVE, prefix: str = "FORGE"
) -> None:
    """Have the host run an app."""
    folder = root / "etc/forge/apps"
    (folder / f"{name}.d").mkdir(parents=True)
    (folder / f"{name}.toml").write_text(DESCRIPTION.format(name=name, placement=placement, prefix=prefix))
    (folder / f"{name}.d/slot.conf").write_text("[Service]\nMemoryMax=664M\n")
    if state is not None:
        (root / "var/lib/forge" / name).mkdir(parents=True)
        (root / "var/lib/forge" / name / "state.json").write_text(state)


def on_host(**changes: Any) -> dict[str, Any]:
    """What the host says of an app."""
    return {
        "name": "old",
        "domains": ["old.example.com", "www.old.example.com"],
        "database": "old_data",
        "workers": 2,
        "pool_max": 7,
        "memory_max_mib": 664,
        "commands": 0,
        "slot_commands_mib": 0,
        "host_commands_mib": 0,
        "removed": False,
        "served": True,
    } | changes


def test_the_host_describes_its_apps(tmp_path: Path) -> None:
    """What runs, what was removed, what was never released, and what cannot be read."""
    assert described(tmp_path) == []
    describe(tmp_path, "old")
    away_since = json.dumps(json.loads(LIVE) | {"removed": {"since": "now"}})
    describe(tmp_path, "away", placement="external", prefix="SHOP", state=away_since)
    describe(tmp_path, "failed", state='{"live": null, "history": [{"outcome": "failed"}]}')
    describe(tmp_path, "first", state='{"live": null, "operation": {"phase": "starting"}}')
    describe(tmp_path, "new", state=None)
    (tmp_path / "etc/forge/apps/broken.toml").write_text("name =")
    (tmp_path / "etc/forge/certificates.toml").write_text('[apps]\nold = ["old.example.com", "www.old.example.com"]\n')
    away, failed, first, new, old = described(tmp_path)
    assert old == on_host()
    assert away == on_host(name="away", domains=["away.example.com"], database="", removed=True)
    assert [(app["name"], app["removed"], app["served"]) for app in (failed, first, new)] == [
        ("failed", True, False),
        ("first", False, False),
        ("new", True, False),
    ]


def test_what_never_served_has_no_site_whose_certificate_somebody_looks_after() -> None:
    """There is none to be found for it, which would fail every later run."""
    found = others.found([on_host(), on_host(name="away", removed=True), on_host(name="failed", served=False)], {})
    assert list(others.domains(found)) == ["old", "away"]


def test_the_host_describes_what_an_app_runs_beside_its_server(tmp_path: Path) -> None:
    """And the pool of one whose variable has a name of its own."""
    describe(tmp_path, "old", prefix="MY")
    path = tmp_path / "etc/forge/apps/old.toml"
    path.write_text(path.read_text().replace("MY_DATABASE_POOL_MAX", "CONNECTIONS") + COMMANDS)
    (old,) = described(tmp_path)
    counted = {"commands": 2, "slot_commands_mib": 64, "host_commands_mib": 100}
    assert old == on_host(domains=["old.example.com"], pool_max=11, **counted)
    (plan,) = others.plans(others.found([old], {}), "local")
    assert (plan.slot_commands_mib, plan.host_commands_mib) == (64, 100)
    assert plan.demand == Demand("local", 1, 11, 0, 2)


def test_what_no_entry_names_is_told() -> None:
    """Once it is removed, nobody needs to hear of it."""
    found = others.found([on_host(), on_host(name="shop"), on_host(name="away", removed=True)], {"shop": None})
    assert [other.name for other in found] == ["old", "away"]
    (said,) = others.warnings(found)
    assert "old (old.example.com, www.old.example.com) is in no entry" in said
    assert said.endswith("playbooks/remove.yml -e only=old")


@pytest.mark.parametrize(
    ("entry", "where", "what"),
    [
        ({"domain": "old.example.com"}, "apps.shop.domain", "old.example.com, which old serves"),
        (
            {"domain": "shop.example.com", "aliases": ["a.example.com", "www.old.example.com"]},
            "apps.shop.aliases[1]",
            "www.old.example.com, which old serves",
        ),
        (
            {"domain": "shop.example.com", "database": {"placement": "local", "name": "old_data"}},
            "apps.shop.database.name",
            "old_data, which old uses",
        ),
    ],
)
def test_what_it_has_is_refused_until_it_is_removed(entry: dict[str, Any], where: str, what: str) -> None:
    """A renamed entry is the usual case."""
    found = others.found([on_host()], {})
    (problem,) = others.problems(found, {"shop": entry}, "local")
    assert problem.where == where
    assert what in problem.found
    assert "playbooks/remove.yml -e only=old" in problem.do
    assert others.problems(others.found([on_host(removed=True)], {}), {"shop": entry}, "local") == []
    external = {"domain": "shop.example.com", "database": {"placement": "external", "name": "old_data"}}
    assert others.problems(found, {"shop": external}, "local") == []


def test_its_memory_and_connections_count() -> None:
    """As much as it was given; and the messages say that it may go."""
    plans = others.plans(others.found([on_host(), on_host(name="away", removed=True)], {}), "local")
    assert [(plan.name, plan.fixed, plan.worker_mib) for plan in plans] == [("old", 2, 150)]
    shop = sizing.Plan("shop", 1, "apps.shop.workers", 150, 0, 0)
    roomy, tight = (sizing.Host(2, "cores", memory, "memory of the machine", kept_mib=100) for memory in (1000, 700))
    assert sizing.choose([shop, *plans], roomy, [LOCAL]) == []
    (problem,) = sizing.choose([shop, *plans], tight, [LOCAL])
    assert problem.found.startswith("750 MiB: shop 1 x 150 + old (in no entry) 2 x 150 + 300")
    assert "apps.shop.workers" in problem.do
    assert "take old out of service: playbooks/remove.yml" in problem.do
    few = Server("local", 35, "postgresql_max_connections", exporter=2, reserved=5)
    shop.demand = Demand("local", 1, 1, 0)
    (problem,) = sizing.choose([shop, *plans], roomy, [few])
    assert "old: 1 hosts x 2 workers x 2 slots x (7 pool_max + 1 listener) = 32" in problem.found
    assert "apps.shop.database.pool_max" in problem.do


def database(placement: str = "local", name: str = "") -> dict[str, Any]:
    """An entry with a database."""
    return {"database": {"placement": placement, "name": name}}


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"a": database(), "b": database()}, None),
        ({"a": database("external", "x"), "b": database("external", "x"), "c": {}}, None),
        ({"a": database(), "b": database(name="a")}, ("apps.b.database.name", "a, which apps.a.database.name has")),
        ({"a": database(name="x"), "b": database(name="x")}, ("apps.b.database.name", "x, which apps.a.database.name")),
        ({"a": database(name="postgres")}, ("apps.a.database.name", "postgres is PostgreSQL's")),
    ],
)
def test_each_app_has_a_database_of_its_own(entries: dict[str, dict[str, Any]], found: tuple[str, str] | None) -> None:
    """On this host, where its roles belong to one app."""
    problems = inventory_lint.database_problems(entries, "local")
    assert [(each.where, each.found[: len(found[1])]) for each in problems if found] == ([found] if found else [])
    assert bool(problems) == bool(found)
