"""Measure this project beside a peer, in one run, on throwaway hosts of its own (`forge-bench-*`).

Writes the tables of docs/benchmarks.md, the picture docs/release.svg and every figure in .cache/bench/. It judges no
figure: it fails when a command fails, or when the load generator does not see a proxy that is killed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demo import PODMAN, become_able, guarded
from page import PAGE

from bench import hosts, report, throughput
from bench.forge import Cycle, Forge
from bench.hosts import STATE, Host, say
from bench.load import STEADY_SECONDS, WARM_SECONDS, Site, cost, during, prove_sight, window
from bench.peer import Fujin, versions

HUP = "/bin/kill -HUP $MAINPID"


def measure(distribution: str, times: int, folder: Path) -> dict[str, Any]:
    """Do all of it and return the figures."""
    others = hosts.busy()
    say(f"boot the hosts; other work has {others:.0%} of this machine's cores")
    own, other = hosts.boot(distribution)
    forge, fujin = Forge(own, folder / "forge"), Fujin(other, folder / "fujin")
    say("provision both; build the peer's releases")
    with ThreadPoolExecutor() as pool:
        # Both are waited for, so that a failure of one leaves nothing running.
        for job in [pool.submit(forge.prepare, distribution), pool.submit(fujin.prepare, 2 * times + 2)]:
            job.result()
    workers = forge.workers()
    peer = fujin.begin(workers)

    results: dict[str, Any] = {"made": datetime.now(UTC).strftime("%Y-%m-%d"), "repeats": times}
    results["machine"] = {**machine(own, workers), "busy": others}
    results["versions"] = {"Python": own.root("python3 -V").split()[1], **versions(other)}
    results["throughput"] = throughput.measure(forge, other)

    site = forge.site()
    capacities = {"forge": site.capacity(), "fujin": peer.capacity()}
    rate = min(capacities.values()) / 2
    site, peer = site.at(rate), peer.at(rate)
    results["rate"], results["capacity"] = rate, capacities
    say(f"requests/s in a closed loop: {capacities}; the load on either is {rate:.0f}")
    say("control event: kill Nginx")
    results["control"] = prove_sight(site)

    cycles, peers = [], []
    for number in range(1, times + 1):
        # By turns, so that what else the machine does meets both.
        say(f"deploy, roll back warm, deploy, roll back cold; {number} of {times}")
        cycles.append(forge.cycle(site))
        say(f"Fujin: redeploy, roll back; {number} of {times}")
        peers.append(peer_cycle(fujin, peer, ("redeploy", fujin.deploy), ("rollback", fujin.rollback)))
    fujin.restart_by(HUP)
    fujin.deploy()  # brings the unit, by a restart
    for number in range(1, times + 1):
        say(f"Fujin: redeploy by HUP; {number} of {times}")
        peers.append(peer_cycle(fujin, peer, ("redeploy by HUP", fujin.deploy)))
    results["forge"] = {
        "floor": {"idle": [each.idle_floor for each in cycles], "loaded": [each.loaded_floor for each in cycles]},
        "events": costs(cycles),
        "lost_outside": lost_outside(cycles),
    }
    results["fujin"] = {"events": costs(peers), "lost_outside": lost_outside(peers)}
    report.draw(cycles[0])
    return results


def peer_cycle(fujin: Fujin, site: Site, *works: tuple[str, Callable[[], dict[str, Any]]]) -> Cycle:
    """Do something to the peer's app under load."""
    events = []
    with site.load() as load:
        time.sleep(WARM_SECONDS + STEADY_SECONDS)
        for name, work in works:
            events.append(during(name, work, fujin.wait_until_ready))
    return Cycle(events, load.result)


def costs(cycles: list[Cycle]) -> list[dict[str, Any]]:
    """Put every event of every cycle in figures."""
    return [cost(event, cycle.result) for cycle in cycles for event in cycle.events]


def lost_outside(cycles: list[Cycle]) -> int:
    """Count the requests that failed although no event was near."""
    lost = 0
    for cycle in cycles:
        inside = {record for event in cycle.events for record in window(event, cycle.result)}
        lost += len(set(cycle.result.failed) - inside)
    return lost


def machine(host: Host, workers: int) -> dict[str, Any]:
    """Describe what it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    system = host.root(". /etc/os-release; echo $PRETTY_NAME")
    return {"cores": hosts.cores(), "processor": processor, "hosts": f"containers of {system}, {workers} workers each"}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--distribution", choices=["bookworm", "trixie"], default="trixie", help="of both hosts")
    parser.add_argument("--times", type=int, default=3, help="how often each event is repeated (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the hosts running at the end")
    arguments = parser.parse_args()

    def work() -> None:
        become_able()
        folder = Path(tempfile.mkdtemp(prefix="forge-bench-"))
        try:
            hosts.remove()
            results = measure(arguments.distribution, arguments.times, folder)
            (STATE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            report.write_page(results)
            say(f"done: {PAGE}, {report.PICTURE}, {STATE}/results.json")
        finally:
            if arguments.keep:
                say(f"the hosts stay; log in: {PODMAN} exec -it forge-bench-vm bash")
            else:
                say("remove the hosts")
                hosts.remove()
                shutil.rmtree(folder, ignore_errors=True)

    return guarded(work, "Stopped.")


if __name__ == "__main__":
    sys.exit(main())
