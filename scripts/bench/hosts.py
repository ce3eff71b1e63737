"""The throwaway hosts of a run: a host of this project, an equal one of the peer, and a Vault-API server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import (
    PODMAN,
    ROOT,
    SHARED,
    VENV,
    DemoError,
    create_command,
    environment,
    last_lines,
    own,
    package_index,
    podman,
    write_if_changed,
)

SCENARIO = "bench"
STATE = ROOT / ".cache" / "bench"
NETWORK = f"forge-{SCENARIO}"
VAULT = f"forge-{SCENARIO}-vault"
DOMAIN = "inbox.example.com"
USER = "admin"
# What the ways to the app listen on that are measured beside Nginx as shipped.
POOL, NO_POOL, CADDY, BARE = 9443, 9444, 9445, 9446
# The control machine shares the hosts' cores here: what it does shall not cost their clients anything.
CONTROL = ("nice", "-n", "19")
PEER_VENV = ROOT / ".cache" / "bench-venv"


class BenchError(DemoError):
    """The bench could not go on."""


def say(line: str) -> None:
    """Print a line of progress, in seconds since the start of the program."""
    print(f"{time.monotonic() - _BEGAN:5.0f} s  {line}", file=sys.stderr, flush=True)


_BEGAN = time.monotonic()


def run(
    command: list[str], what: str, cwd: Path = ROOT, stdin: int = subprocess.DEVNULL, timeout: float | None = None
) -> str:
    """Run a command to its end and return its output; the whole of it is in the folder of the run.

    Raises:
        BenchError: it failed.
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was killed.
    """
    result = subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        stdin=stdin,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    log = STATE / "logs" / f"{what.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(result.stdout)
    if result.returncode:
        raise BenchError(
            f"{last_lines(result.stdout)}\n\nExpected: {what}. Found: exit status {result.returncode}, as above.\n"
            f"Do: read {log}; with --keep the hosts stay to be looked at."
        )
    return result.stdout


@dataclass(frozen=True)
class Host:
    """A host that runs."""

    name: str
    address: str

    @property
    def container(self) -> str:
        """Name of the container."""
        return f"forge-{SCENARIO}-{self.name}"

    def root(self, script: str, *arguments: str, given: str | None = None) -> str:
        """Run a shell script as root and return its output without the last newline; `given` goes to its input.

        Raises:
            BenchError: it failed.
        """
        result = subprocess.run(
            [str(PODMAN), "exec", "--interactive", self.container, "sh", "-euc", script, "sh", *arguments],
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise BenchError(
                f"Expected: on {self.container}: {script.strip().splitlines()[0]}. Found: exit status "
                f"{result.returncode}: {last_lines(result.stdout + result.stderr)}\n"
                f"Do: with --keep the hosts stay: {PODMAN} exec -it {self.container} bash"
            )
        return result.stdout.rstrip("\n")

    def python(self, program: Path, *arguments: str) -> str:
        """Run a program of this folder as root and return what it printed."""
        words = [str(PODMAN), "exec", "--interactive", self.container, "python3", "-", *arguments]
        result = subprocess.run(words, input=program.read_text(), capture_output=True, text=True, check=False)
        if result.returncode:
            raise BenchError(
                f"Expected: {program.name} {' '.join(arguments)} to work on {self.container}. "
                f"Found: {last_lines(result.stderr)}\nDo: run the bench with --keep and look there."
            )
        return result.stdout

    def copy_in(self, source: Path, target: str) -> None:
        """Copy a file or folder onto the host."""
        run([str(PODMAN), "cp", str(source), f"{self.container}:{target}"], f"a copy of {source.name}")


def playbook(name: Path | str, what: str, **variables: Any) -> str:
    """Run a playbook on this project's host and return its output."""
    return run(
        [
            *(*CONTROL, str(VENV / "ansible-playbook"), "--inventory", str(STATE / "inventory.json")),
            *("--extra-vars", json.dumps(variables), str(name)),
        ],
        what,
    )


def boot(distribution: str) -> tuple[Host, Host]:
    """Boot this project's host and the peer's, and return them in this order."""
    STATE.mkdir(parents=True, exist_ok=True)
    names = ("vm", "fujin")
    variables = {
        "scenario": SCENARIO,
        "platforms": [{"name": name, "distribution": distribution} for name in names],
        "state_directory": str(STATE),
    }
    with own(STATE):
        run(create_command(variables), "hosts that boot")
    hosts = []
    for name in names:
        address = run(
            [
                *(str(PODMAN), "container", "inspect", "--format"),
                *(f'{{{{(index .NetworkSettings.Networks "{NETWORK}").IPAddress}}}}', f"forge-{SCENARIO}-{name}"),
            ],
            "an address",
        )
        hosts.append(Host(name, address.strip()))
    return hosts[0], hosts[1]


def start_vault(distribution: str) -> None:
    """Start the server with the secrets of this project's host."""
    image = run([str(SHARED / "image"), distribution], "an image").strip().splitlines()[-1]
    run(
        [
            *(str(VENV / "python"), str(SHARED / "vault.py"), "up", "--container", VAULT, "--network", NETWORK),
            *("--image", image, "--state", str(STATE / "vault"), "--app", "inbox"),
        ],
        "a Vault-API server",
    )


def write_inventory(host: Host, source: Path) -> None:
    """Write the inventory of this project's host: all settings but two at their defaults."""
    control = json.loads((STATE / "vault" / "control.json").read_text())
    variables = {
        "base_package_index_url": package_index(),
        "secrets_vault_address": control["address"],
        "secrets_vault_ca_file": control["ca_file"],
        "secrets_vault_token": f"{{{{ lookup('ansible.builtin.file', '{control['token_file']}') }}}}",
        "hardening_allowed": [{"port": port} for port in (POOL, NO_POOL, CADDY, BARE)],
        "nginx_tls_source": "own_ca",
        "nginx_tls_ca_directory": str(STATE / "tls"),
        "apps": {
            "inbox": {
                "domain": DOMAIN,
                "source": str(source),
                "module": "inbox.main:app",
                "python_path": "src",
                # So that the old slot is warm yet when the bench rolls back, however busy the machine is.
                "watch_seconds": 40,
                # And so that Nginx measures its way to the app, and not what one client may have of it.
                "client_limits": {
                    "requests_per_second": 100_000,
                    "burst": 1_000_000,
                    "concurrent_requests": 10_000,
                    "streams": 1000,
                },
                "secrets": {
                    "role_id": control["role_ids"]["inbox"]["app"],
                    "variables": {"FORGE_SIGNING_KEY": "signing_key", "FORGE_DATABASE_PASSWORD": "database_password"},
                },
                "database": {"migration": {"role_id": control["role_ids"]["inbox"]["migrate"]}},
            }
        },
    }
    connection = {
        "ansible_host": host.address,
        "ansible_user": USER,
        "ansible_ssh_private_key_file": str(STATE / "id_ed25519"),
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={STATE}/known_hosts -o IdentitiesOnly=yes",
    }
    inventory = {"all": {"hosts": {host.name: connection}, "vars": variables}}
    write_if_changed(STATE / "inventory.json", json.dumps(inventory, indent=2))


def remove() -> None:
    """Remove the hosts, their network and the keys of the run; the results stay."""
    containers = [f"forge-{SCENARIO}-vm", f"forge-{SCENARIO}-fujin", VAULT]
    podman("rm", "--force", "--ignore", "--time", "0", "--volumes", *containers)
    podman("volume", "rm", "--force", VAULT, check=False)
    podman("network", "rm", "--force", NETWORK, check=False)
    for name in ("id_ed25519", "id_ed25519.pub", "inventory.json", "known_hosts", "instance_config.yml"):
        (STATE / name).unlink(missing_ok=True)
    for folder in ("vault", "tls"):
        shutil.rmtree(STATE / folder, ignore_errors=True)


def busy(seconds: float = 3) -> float:
    """Share of this machine's cores that is in use while the bench does nothing."""

    def ticks() -> tuple[int, int]:
        # proc(5): user, nice, system, idle, iowait ..
        values = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    before = ticks()
    time.sleep(seconds)
    total, idle = (after - earlier for after, earlier in zip(ticks(), before, strict=True))
    return 1 - idle / total


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
