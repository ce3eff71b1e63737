"""Turn the measurements of a run into a table of ratios, docs/benchmarks.md and the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import page
from demo import ROOT
from forge_load import OK
from page import table

from bench.forge import Cycle
from bench.hosts import PEER_VENV, STATE, run
from bench.load import MARGIN_SECONDS

PICTURE = ROOT / "docs" / "release.svg"


def write_page(results: dict[str, Any]) -> None:
    """Put the tables into docs/benchmarks.md, between its markers."""
    page.write("bench", tables(results))


def tables(results: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n\n".join(
        [
            f"{results['made']}, {machine['cores']} cores ({machine['processor']}) shared by the load generator, "
            f"Ansible and the hosts, {machine['busy']:.0%} busy with other work when the run began; "
            f"{machine['hosts']}; {versions}. "
            f"Rounds of all events: {results['repeats']}. Medians, with the lowest and highest in brackets.",
            "### Deploy and rollback under load",
            releases(results),
            "### Of this project's cutovers",
            cutovers(results),
            "### Throughput through TLS",
            throughput(results),
        ]
    )


def releases(results: dict[str, Any]) -> str:
    """Compare with the peer, event by event."""
    own, peer = (group(results[name]["events"]) for name in ("forge", "fujin"))
    rows = []
    for ours, theirs in (
        (["deploy"], ["redeploy", "redeploy by HUP"]),
        (["rollback, cold", "rollback, warm"], ["rollback"]),
    ):
        ended = [event["seconds"] for event in peer.get(theirs[0], []) if not event.get("hung")]
        base = median(ended) if ended else math.nan
        for title, events, names in (("this project", own, ours), ("Fujin", peer, theirs)):
            for name in names:
                if not (found := events.get(name, [])):
                    continue
                ended = [event for event in found if not event.get("hung")]
                rows.append(
                    [
                        f"{title}: {name}",
                        spread(ended, "seconds") if ended else "",
                        # On the host itself, without the way there: no match for a whole command.
                        ratio(middle(ended, "seconds"), base) if ended and name != "rollback, warm" else "",
                        lost(found),
                        spread(found, "failing_seconds"),
                        spread(found, "p99_ratio"),
                    ]
                )
    own_most, peer_most = (results["capacity"][name] for name in ("forge", "fujin"))
    hung = sum(event["hung"] for event in results["fujin"]["events"])
    return (
        table("event | seconds | : Fujin | lost GET + POST | seconds of failures | p99 : steady p99", rows)
        + "\n\nSeconds are those of the whole command on the control machine; of the warm rollback, `forgectl "
        "rollback` on the host. Lost is of all repeats together. "
        f"The load is {results['rate']:.0f} requests/s, half of what the slower host's clients get through in a closed "
        f"loop ({own_most:.0f}/s on this project's, {peer_most:.0f}/s on Fujin's). "
        f"With no event near, this project lost {results['forge']['lost_outside']} requests and Fujin "
        f"{results['fujin']['lost_outside']}. A control event, Nginx killed, lost {results['control']}."
        + (f" Fujin hung {hung} times after its work was done; those runs have no seconds." if hung else "")
    )


def cutovers(results: dict[str, Any]) -> str:
    """Compare with the time that the app itself needs to start."""
    forge = results["forge"]
    quiet, loaded = (median(forge["floor"][name]) for name in ("idle", "loaded"))
    rows = []
    for name, events in group(forge["events"]).items():
        starts = "start" in events[0]["phases"]
        middle_start = middle(events, "start_to_swap")
        rows.append(
            [
                name,
                spread(events, "to_swap"),
                spread(events, "start_to_swap"),
                ratio(middle_start, loaded) if starts else "",
                ratio(middle_start, quiet) if starts else "",
                ", ".join(phase_medians(events)),
            ]
        )
    return (
        table("event | command to swap, s | start to swap, s | : floor under load | : floor idle | phases, s", rows)
        + "\n\nThe floor is the same Gunicorn, started by hand beside the live slot, until every worker has "
        "answered `/ready` with 200: "
        f"{quiet:.2f} s idle, {loaded:.2f} s under the same load. Steady p99: "
        f"{median(event['steady_p99_ms'] for event in forge['events']):.1f} ms."
    )


def throughput(results: dict[str, Any]) -> str:
    """Compare the ways to the same app with Caddy and with no proxy at all."""
    found: dict[str, float] = results["throughput"]
    caddy, bare = found["Caddy"], found["Gunicorn without TLS or proxy"]
    rows = [[way, f"{rate:.0f}", ratio(rate, caddy), ratio(rate, bare)] for way, rate in found.items()]
    return table("way to the same app | requests/s | : Caddy | : without TLS or proxy", rows)


def group(events: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Sort events by name, in the order of their first appearance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        found.setdefault(event["event"], []).append(event)
    return found


def middle(events: list[dict[str, Any]], key: str) -> float:
    """Median of a figure."""
    return float(median(event[key] for event in events))


def spread(events: list[dict[str, Any]], key: str) -> str:
    """Median, lowest and highest of a figure."""
    values = [event[key] for event in events]
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def lost(events: list[dict[str, Any]]) -> str:
    """Requests lost in all of the events, and of how many."""
    gets, posts, sent = (sum(event[key] for event in events) for key in ("lost_get", "lost_post", "requests"))
    return f"{gets} + {posts} of {sent}"


def ratio(one: float, other: float) -> str:
    """A ratio as a figure; empty when a side is not known."""
    return "" if math.isnan(one / other) else f"{one / other:.2f}"


def phase_medians(events: list[dict[str, Any]]) -> list[str]:
    """Name each phase that took a hundredth of a second or more."""
    medians = {name: median(event["phases"].get(name, 0.0) for event in events) for name in events[0]["phases"]}
    return [f"{name} {seconds:.2f}" for name, seconds in medians.items() if seconds >= 0.01]


def draw(cycle: Cycle) -> None:
    """Draw a deploy and the warm rollback after it."""
    deploy, rollback = cycle.events[:2]
    zero = deploy.began
    after: Callable[[float], float] = lambda moment: round(moment - zero, 3)  # noqa: E731
    requests = [
        [after(each.due), round(each.latency * 1000, 2), "POST" if each.kind == "post" else "GET", each.outcome != OK]
        for each in cycle.result.between(zero - MARGIN_SECONDS, rollback.ended + MARGIN_SECONDS)
    ]
    swaps = deploy.details["swapped"], rollback.details["swapped"]
    phases = deploy.details["phases"]
    bands: list[list[Any]] = []
    end = swaps[0]
    for names in (("start", "swap"), ("secrets", "stage", "environment", "migrate")):
        begin = end - sum(phases.get(name, 0.0) for name in names)
        bands.insert(0, [after(begin), after(end), "start" if "start" in names else "stage, migrate"])
        end = begin
    bands.insert(0, [0.0, after(end), "pack, upload"])
    bands.append([after(swaps[0]), after(swaps[1]), "watch, old slot warm"])
    data = {
        "requests": requests,
        "bands": bands,
        "events": [[0.0, "deploy"], [after(swaps[0]), "swap"], [after(swaps[1]), "rollback: swap"]],
    }
    file = STATE / "picture.json"
    file.write_text(json.dumps(data))
    program = Path(__file__).with_name("plot.py")
    run([str(PEER_VENV / "bin" / "python"), str(program), str(file), str(PICTURE)], "a picture")
