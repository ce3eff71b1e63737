"""Throughput of ways to put the same running app behind TLS on one host, driven from the other host by wrk."""

from __future__ import annotations

import re
from statistics import median

from demo import PODMAN

from bench.forge import APP, ON_HOST, Forge
from bench.hosts import BARE, CADDY, DOMAIN, NO_POOL, POOL, STATE, BenchError, Host, run, say

PATH = "/health"
SECONDS = 3
ROUNDS = 3
CLIENTS = 32

NGINX = f"""
upstream bench {{
    server unix:/run/{APP}/live.sock;
    keepalive 32;
}}
upstream bench_fresh {{
    server unix:/run/{APP}/live.sock;
}}
""" + "".join(
    f"""
server {{
    listen {port} ssl;
    server_name {DOMAIN};
    ssl_certificate tls/{APP}.pem;
    ssl_certificate_key tls/{APP}.key;
    access_log off;
    location / {{
        proxy_pass http://{upstream};
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_set_header Connection "";
    }}
}}
"""
    for port, upstream in ((POOL, "bench"), (NO_POOL, "bench_fresh"))
)

CADDYFILE = f"""
{{
    admin off
    auto_https disable_redirects
    http_port 9080
}}
https://{DOMAIN}:{CADDY} {{
    tls /etc/nginx/tls/{APP}.pem /etc/nginx/tls/{APP}.key
    reverse_proxy unix//run/{APP}/live.sock
}}
"""

WAYS = {
    "Nginx as shipped": f"https://{DOMAIN}",
    "Nginx, pool": f"https://{DOMAIN}:{POOL}",
    "Nginx, no pool": f"https://{DOMAIN}:{NO_POOL}",
    "Caddy": f"https://{DOMAIN}:{CADDY}",
    "Gunicorn without TLS or proxy": f"http://{DOMAIN}:{BARE}",
}

UNITS = f"""
cat > /etc/nginx/conf.d/bench.conf
nginx -t -q
systemctl reload nginx
systemd-run --quiet --collect --unit bench-caddy --setenv HOME=/root \
    /usr/local/bin/caddy run --config /root/Caddyfile --adapter caddyfile
systemd-run --quiet --collect --unit bench-bare python3 /root/on_host.py serve {APP} "$1" {BARE}
for port in {POOL} {NO_POOL} {CADDY} {BARE}; do
    timeout 30 sh -c "until ss -Hltn sport = :$port | grep -q .; do sleep 0.2; done"
done
"""

AWAY = """
systemctl stop bench-caddy bench-bare
rm /etc/nginx/conf.d/bench.conf
systemctl reload nginx
"""


def measure(forge: Forge, driver: Host) -> dict[str, float]:
    """Return requests a second by way, the median of rounds in which each has its turn."""
    caddyfile = STATE / "Caddyfile"
    caddyfile.write_text(CADDYFILE)
    binary = STATE / "caddy"
    run([str(PODMAN), "cp", f"{driver.container}:/usr/bin/caddy", str(binary)], "the peer's Caddy")
    for source, target in ((binary, "/usr/local/bin/caddy"), (caddyfile, "/root/Caddyfile"), (ON_HOST, "/root/")):
        forge.host.copy_in(source, target)
    for path in (binary, caddyfile):
        path.unlink()
    forge.host.root(UNITS, forge.main_pid(), given=NGINX)
    trust(driver, forge.host)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, base in WAYS.items():
            found[way].append(wrk(driver, base + PATH))
    forge.host.root(AWAY)
    medians = {way: median(rates) for way, rates in found.items()}
    say(f"requests/s: {', '.join(f'{way} {rate:.0f}' for way, rate in medians.items())}")
    return medians


def trust(driver: Host, target: Host) -> None:
    """Have the driver find the target by its name."""
    driver.root(f"echo '{target.address} {DOMAIN}' >> /etc/hosts")


def wrk(driver: Host, url: str) -> float:
    """Return the requests a second that got a 2xx.

    Raises:
        BenchError: some did not.
    """
    output = driver.root(f"wrk --threads 1 --connections {CLIENTS} --duration {SECONDS}s {url}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", output)
    if found is None or "Non-2xx" in output or "Socket errors" in output:
        raise BenchError(f"Expected: nothing but 2xx from {url}. Found: {output}\nDo: run with --keep and look there.")
    return float(found[1])
