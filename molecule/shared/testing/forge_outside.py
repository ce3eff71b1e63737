"""Programs beside the scenario's host: on other hosts of its network, each with an address of its own, or from here.

What looks at a host hard may be banned by it, so that it must not come from where Ansible comes from.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from forge_scenario import PODMAN, PROJECT
from testinfra.host import Host

JUDGES = PROJECT / ".cache" / "judges-venv"
NODE_MODULES = PROJECT / ".cache" / "judges-node" / "node_modules"
INSTALL_SECONDS = 600


class Site(NamedTuple):
    """The scenario's app, as a client knows it."""

    address: str
    name: str
    ca: Path

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://{self.name}"


def site(host: Host) -> Site:
    """Read it from the inventory."""
    variables = host.ansible.get_variables()
    ca = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem"
    return Site(variables["ansible_host"], variables["apps"]["inbox"]["domain"], ca)


@cache
def installed() -> Path:
    """Install the judges from PyPI and npm, once; returns the folder of their programs."""
    _build([str(PROJECT / "scripts" / "judges" / "install")])
    return JUDGES / "bin"


@cache
def image() -> str:
    """Build the image of a host with the judges from Debian, once. Of Debian 13: some are too old in 12."""
    return _build([str(PODMAN.parent / "image"), "trixie", "judge"]).split()[-1]


def _build(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(at: Site, *words: str, mounts: Mapping[Path, str] | None = None, options: Sequence[str] = ()) -> list[str]:
    """A command that runs on a host of its own beside the app's, where the app's name leads to it.

    /ca.pem is the CA to trust; `mounts` are further files and folders by their path there, read-only; `options` are
    those of podman.
    """
    bound = {at.ca: "/ca.pem", **(mounts or {})}
    return [
        *(str(PODMAN), "run", "--rm", "--interactive", "--network", f"forge-{os.environ['MOLECULE_SCENARIO_NAME']}"),
        *("--add-host", f"{at.name}:{at.address}"),
        *(f"--volume={source}:{target}:ro" for source, target in bound.items()),
        *options,
        *(image(), *words),
    ]


def outside(at: Site, *words: str, seconds: float, mounts: Mapping[Path, str] | None = None) -> str:
    """Run it to its end, within so many seconds, and return its output; how it ended is for its output to say."""
    whole = command(at, *words, mounts=mounts)
    done = subprocess.run(whole, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds)
    # 125 to 127: podman's own failures, or no such program.
    assert done.returncode not in (125, 126, 127), done.stderr
    return done.stdout


def here(*words: str, seconds: float, folder: Path | None = None, **environment: str) -> str:
    """Run one of the judges from PyPI here, in a folder, and return its output."""
    done = subprocess.run(
        [str(installed() / words[0]), *words[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    return done.stdout
