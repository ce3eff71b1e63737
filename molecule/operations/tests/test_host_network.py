"""Names do not resolve, or there is no network: what runs goes on, and doctor needs neither to say so."""

from __future__ import annotations

import json

import pytest
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import CONTAINER, podman
from testinfra.host import Host

PAGE, OVER = "network", "See that it is mended"
RESOLVERS = "/etc/resolv.conf"


def inside(*command: str) -> str:
    """Run a command on the host, past its network."""
    return str(podman("exec", CONTAINER, *command, text=True).stdout)


@pytest.mark.exhaustive
def test_names_do_not_resolve(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """Clients notice nothing: the app has its secrets, and its database is behind a socket."""
    before = inside("cat", RESOLVERS)
    servers = [line.split()[1] for line in before.splitlines() if line.startswith("nameserver")]
    with fault("names do not resolve") as happening:
        # In place: a container's is a mount. Nobody answers from an address of documentation.
        host.check_output("echo nameserver 192.0.2.1 > %s", RESOLVERS)
        try:
            happening.told("F608")
            runbooks.follow(PAGE, "What you see")
            assert "nameserver 192.0.2.1" in runbooks.follow(PAGE, "Look")
            happening.mended_by(PAGE)
            runbooks.follow(PAGE, "Names", {"nameserver": servers[0]})
        finally:
            podman("exec", "--interactive", CONTAINER, "sh", "-c", f"cat > {RESOLVERS}", input=before.encode())
    assert happening.hurt == []
    runbooks.follow(PAGE, OVER)


@pytest.mark.exhaustive
def test_network_gone(fault: FaultContext, runbooks: Runbooks) -> None:
    """Clients reach nobody, and wait; the console reaches the host, and what was acknowledged is there afterwards."""
    (route,) = json.loads(inside("ip", "-json", "route", "show", "default"))
    with fault("network gone") as happening:
        inside("ip", "link", "set", "dev", route["dev"], "down")
        try:
            happening.told("F609")
            runbooks.follow(PAGE, "What you see")
            runbooks.follow(PAGE, "Look")
            happening.mended_by(PAGE)
            runbooks.follow(PAGE, "The interface", {"interface-and-gateway": f"{route['dev']} {route['gateway']}"})
        finally:
            inside("ip", "link", "set", "dev", route["dev"], "up")
            inside("ip", "route", "replace", "default", "via", route["gateway"], "dev", route["dev"])
    assert max(record.latency for record in happening.inside) > happening.mending - happening.began - 1
    runbooks.follow(PAGE, OVER)
