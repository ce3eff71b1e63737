"""Throughput of ways to put the same running app behind TLS on one host, driven from the other host by wrk."""

from __future__ import annotations

import re

from demo import PODMAN

from bench.forge import APP, ON_HOST, Forge
from bench.hosts import DOMAIN, STATE, BenchError, Host, run, say

PATH = "/health"
SECONDS = 6
CLIENTS = 32
POOL, NO_POOL, CADDY, BARE = 9443, 9444, 9445, 9446

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


def measure(forge: Forge, driver: Host) -> dict[str, float]:
    """Return requests a second by way; the ways run one after the other."""
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
    found = {}
    for way, scheme, port in (
        ("Nginx as shipped", "https", 443),
        ("Nginx, pool", "https", POOL),
        ("Nginx, no pool", "https", NO_POOL),
        ("Caddy", "https", CADDY),
        ("Gunicorn without TLS or proxy", "http", BARE),
    ):
        found[way] = wrk(driver, f"{scheme}://{DOMAIN}:{port}{PATH}")
        say(f"{way}: {found[way]:.0f} requests/s")
    return found


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
