"""Measure this project beside a peer, in one run, on throwaway hosts of its own (`forge-bench-*`).

Writes the tables of docs/benchmarks.md, the picture docs/release.svg and every figure in .cache/bench/. It judges no
figure: it fails when a command fails, or when the load generator does not see a proxy that is killed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from demo import PODMAN, DemoError, become_able

from bench import hosts, report, throughput
from bench.forge import Cycle, Forge
from bench.hosts import STATE, BenchError, Host, repeat, say
from bench.load import STEADY_SECONDS, WARM_SECONDS, Site, cost, during, prove_sight
from bench.peer import Fujin, versions

HUP = "/bin/kill -HUP $MAINPID"
SPARE = 2


def measure(distribution: str, times: int, folder: Path) -> dict[str, Any]:
    """Do all of it and return the figures."""
    others = hosts.busy()
    say(f"boot the hosts; other work has {others:.0%} of this machine's cores")
    own, other = hosts.boot(distribution)
    forge, fujin = Forge(own, folder / "forge"), Fujin(other, folder / "fujin")
    say("provision both; build the peer's releases")
    with ThreadPoolExecutor() as pool:
        # Both are waited for, so that a failure of one leaves nothing running.
        for job in [pool.submit(forge.prepare, distribution), pool.submit(fujin.prepare, 2 * (times + SPARE) + 2)]:
            job.result()
    workers = forge.workers()
    peer = fujin.begin(workers)

    results: dict[str, Any] = {"made": datetime.now(UTC).strftime("%Y-%m-%d"), "repeats": times}
    results["machine"] = {**machine(own, workers), "busy": others}
    results["versions"] = {"Python": own.root("python3 -V").split()[1], **versions(other)}
    results["throughput"] = throughput.measure(forge, other)

    site = forge.site().measured()
    say("control event: kill Nginx")
    results["control"] = prove_sight(site)
    cycles = repeat("deploy, roll back warm, deploy, roll back cold", times, lambda: forge.cycle(site))
    results["forge"] = {
        "rate": site.rate,
        "floor": {"idle": [each.idle_floor for each in cycles], "loaded": [each.loaded_floor for each in cycles]},
        "events": costs(cycles),
    }

    peer = peer.measured()
    results["fujin"] = {"rate": peer.rate, "events": costs(peer_cycles(fujin, peer, times))}
    report.draw(cycles[0])
    return results


def peer_cycles(fujin: Fujin, site: Site, times: int) -> list[Cycle]:
    """Redeploy and roll back the peer's app under load; then redeploy with a unit that reloads by HUP."""

    def under_load(*works: tuple[str, Any]) -> Cycle:
        events = []
        with site.load() as load:
            time.sleep(WARM_SECONDS + STEADY_SECONDS)
            for name, work in works:
                events.append(during(name, work))
                fujin.wait_until_ready()
        return Cycle(events, load.result)

    def until_whole(what: str, *works: tuple[str, Any]) -> list[Cycle]:
        # A cycle in which Fujin hung has no seconds; it stays in the figures, and another one is measured.
        cycles = repeat(what, times, lambda: under_load(*works))
        hung = sum(any(event.details["hung"] for event in cycle.events) for cycle in cycles)
        return cycles + repeat(f"{what}, again", min(hung, SPARE), lambda: under_load(*works))

    cycles = until_whole("Fujin: redeploy, roll back", ("redeploy", fujin.deploy), ("rollback", fujin.rollback))
    fujin.restart_by(HUP)
    fujin.deploy()  # brings the unit, by a restart
    return cycles + until_whole("Fujin: redeploy by HUP", ("redeploy by HUP", fujin.deploy))


def costs(cycles: list[Cycle]) -> list[dict[str, Any]]:
    """Put every event of every cycle in figures."""
    return [cost(event, cycle.result) for cycle in cycles for event in cycle.events]


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

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="forge-bench-"))
    try:
        become_able()
        hosts.remove()
        results = measure(arguments.distribution, arguments.times, folder)
        (STATE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        report.write_page(results)
    except (BenchError, DemoError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    finally:
        if arguments.keep:
            say(f"the hosts stay; log in: {PODMAN} exec -it forge-bench-vm bash")
        else:
            say("remove the hosts")
            hosts.remove()
            shutil.rmtree(folder, ignore_errors=True)
    say(f"done: {report.PAGE}, {report.PICTURE}, {STATE}/results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
