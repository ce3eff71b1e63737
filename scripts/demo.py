#!/usr/bin/env python3
"""Boot a throwaway host and a Vault-API server, provision the host, post an event through TLS. Standard library only.

Every step finds out what is there already, so that a run goes on from wherever the last one was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / "molecule" / "shared"
PODMAN = SHARED / "podman"
VENV = ROOT / ".venv" / "bin"
STATE = ROOT / ".cache" / "demo"
GENERATED = ROOT / "inventory" / "demo" / "group_vars" / "all" / "generated.yml"

SCENARIO = "demo"
HOST = "vm"
DOMAIN = "inbox.localhost"
CONTAINER = f"forge-{SCENARIO}-{HOST}"
VAULT = f"forge-{SCENARIO}-vault"
NETWORK = f"forge-{SCENARIO}"
IMAGES = "localhost/forge-host"
# Port on the host: where it is looked for first on this machine's loopback.
PORTS = {443: 8443, 80: 8080, 22: 2222}


class DemoError(Exception):
    """What was expected, what was found, what to do."""


class Progress:
    """Tells what goes on: a line that moves on a terminal; elsewhere a line each time there is news."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.number = 0
        self.terminal = sys.stdout.isatty()
        self.detail = ""
        self.notes: list[str] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Show a step, and once it is done how long it took and what was noted meanwhile."""
        self.number += 1
        self.detail = ""
        start = time.monotonic()
        label = f"[{self.number}/{self.total}] {title}"
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(label, start, done), daemon=True)
        if not self.terminal:
            print(f"{label} ...", flush=True)
        ticker.start()
        try:
            yield
        except BaseException:
            done.set()
            ticker.join()
            self._end(f"{label:<58} stopped after {time.monotonic() - start:.1f} s")
            raise
        done.set()
        ticker.join()
        self._end(f"{label:<58} {time.monotonic() - start:6.1f} s")

    def _end(self, line: str) -> None:
        self._show(line, end="\n")
        for note in self.notes:
            print(f"      {note}", flush=True)
        self.notes.clear()

    def _tick(self, label: str, start: float, done: threading.Event) -> None:
        shown = ""
        while not done.wait(0.5 if self.terminal else 5):
            line = f"{label} {time.monotonic() - start:.0f} s  {self.detail}"
            if self.terminal:
                self._show(line)
            elif self.detail != shown:
                shown = self.detail
                print(f"      {time.monotonic() - start:3.0f} s  {self.detail}", flush=True)

    def _show(self, line: str, end: str = "") -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{line[:width]}", end=end, flush=True)
        else:
            print(line, flush=True)


class Runner:
    """Runs the parts, keeps their output, and takes them down with itself."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.running: list[subprocess.Popen[str]] = []

    def start(self, command: list[str], log: Path) -> subprocess.Popen[str]:
        """Start a command whose output goes to a file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(),
                text=True,
            )
        self.running.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], log: Path, what: str) -> str:
        """Wait for a command and return its output.

        Raises:
            DemoError: it failed.
        """
        with log.open() as output:
            while process.poll() is None:
                self._follow(output)
                time.sleep(0.1)
        self.running.remove(process)
        content = log.read_text()
        if process.returncode:
            raise DemoError(
                f"{last_lines(content)}\n\n"
                f"Expected: {what}. Found: it failed with exit status {process.returncode}, as above.\n"
                f"Do: put right what it names (the whole output: {log}), then `make demo` again; it goes on from here."
            )
        return content

    def run(self, command: list[str], log: Path, what: str) -> str:
        """Start a command and wait for it."""
        return self.finish(self.start(command, log), log, what)

    def _follow(self, output: IO[str]) -> None:
        for line in output:
            task = re.match(r"(?:TASK|RUNNING HANDLER) \[(.*?)\] \**$", line)
            if task:
                self.progress.detail = task[1]

    def stop(self) -> None:
        """End what is still running, in an orderly way."""
        for process in self.running:
            if process.poll() is None:
                process.terminate()
        for process in self.running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def environment() -> dict[str, str]:
    """Environment of every command: the virtual environment first, no proxy to the demo's own hosts."""
    result = dict(os.environ)
    # A user's path may lack what root's commands need, as podman does iptables.
    result["PATH"] = f"{VENV}:{result['PATH']}:/usr/sbin:/sbin"
    result["ANSIBLE_NOCOLOR"] = "1"
    direct = "localhost,.localhost,127.0.0.1,10.0.0.0/8"
    for name in ("no_proxy", "NO_PROXY"):
        result[name] = f"{result[name]},{direct}" if result.get(name) else direct
    return result


def last_lines(content: str, count: int = 25) -> str:
    """Return the end of a command's output."""
    return "\n".join(content.rstrip().splitlines()[-count:])


def podman(*arguments: str, check: bool = True) -> str:
    """Run podman and return what it printed.

    Raises:
        DemoError: it failed and `check` was asked for.
    """
    result = subprocess.run([str(PODMAN), *arguments], capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise DemoError(
            f"Expected: `podman {' '.join(arguments)}` to work. Found: {result.stderr.strip() or 'no message'}.\n"
            f"Do: see that podman works for root here: {PODMAN} info"
        )
    return result.stdout.strip() if result.returncode == 0 else ""


def become_able() -> None:
    """Make sure that commands can run as root, asking for the password once.

    Raises:
        DemoError: neither root nor sudo.
    """
    if os.geteuid() == 0:
        return
    if shutil.which("sudo") is None or subprocess.run(["sudo", "--validate"], check=False).returncode:
        raise DemoError(
            "Expected: root, or a user who may use sudo; hosts with systemd need the root user's podman.\n"
            "Found: neither. Do: run `make demo` as such a user."
        )


def as_root() -> list[str]:
    """Return what to put before a command that has to run as root."""
    return [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]


def create_command(variables: dict[str, Any]) -> list[str]:
    """Return the command that boots hosts, with the variables of create.yml."""
    sudo = []
    if os.geteuid():
        # As a whole: Ansible runs its tasks without a terminal, where sudo would ask for the password again.
        settings = [f"PATH={environment()['PATH']}", "PYTHONDONTWRITEBYTECODE=1"]
        sudo = [*as_root(), "--preserve-env", "--set-home", "env", *settings]
    options = ["--inventory", "localhost,", "--extra-vars", json.dumps(variables)]
    return [*sudo, str(VENV / "ansible-playbook"), *options, str(SHARED / "create.yml")]


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Make a folder the user's again, whatever root does there meanwhile."""
    try:
        yield
    finally:
        if os.geteuid():
            owner = f"{os.getuid()}:{os.getgid()}"
            subprocess.run([*as_root(), "chown", "--recursive", owner, str(folder)], check=True)


def choose_ports(notes: list[str]) -> dict[int, int]:
    """Take the ports that the host has already; for a new host the usual ones, or free ones in their place."""
    present = podman("container", "inspect", "--format", "{{json .HostConfig.PortBindings}}", CONTAINER, check=False)
    if present:
        bindings = json.loads(present)
        try:
            return {port: int(bindings[f"{port}/tcp"][0]["HostPort"]) for port in PORTS}
        except (KeyError, IndexError, TypeError, ValueError):
            pass  # left half-made: it is made anew
    chosen = {}
    for port, preferred in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", preferred))
            except OSError:
                probe.bind(("127.0.0.1", 0))
            chosen[port] = probe.getsockname()[1]
        if chosen[port] != preferred:
            notes.append(f"Port {preferred} is taken, so {chosen[port]} stands in for it.")
    return chosen


def package_index() -> str:
    """Package index of this machine that a host can use as well, if it has one of its own."""
    settings = subprocess.run(
        [str(VENV / "python"), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    found = re.findall(r"^\S+\.index-url='(https?://.*)'$", settings, flags=re.MULTILINE)
    index = found[-1] if found else ""
    return "" if urllib.parse.urlsplit(index).hostname in {"localhost", "127.0.0.1", "::1"} else index


def write_if_changed(path: Path, content: str) -> None:
    """Write a file that only its owner can read."""
    if not path.exists() or path.read_text() != content:
        path.touch(mode=0o600)
        path.write_text(content)


class Demo:
    """The steps."""

    def __init__(self, distribution: str, *, provision: bool) -> None:
        self.distribution = distribution
        self.provision = provision
        self.progress = Progress(6 if provision else 4)
        self.runner = Runner(self.progress)
        self.ports: dict[int, int] = {}

    def run(self) -> None:
        """Run all steps, or those up to the point where a host is ready to be provisioned."""
        try:
            self._steps()
        finally:
            self.runner.stop()

    def _steps(self) -> None:
        began = time.monotonic()
        become_able()
        with self.progress.step("Packages of this machine"):
            log = STATE / "packages.log"
            self.runner.run([str(ROOT / "scripts" / "packages"), "demo"], log, "the packages that the demo needs")
            self._check_podman()
        with self.progress.step(f"Python packages and the image of a {self.distribution} host"):
            image = self._prepare()
        with self.progress.step("Throwaway host"):
            self._boot(image)
        with self.progress.step("Vault-API server with TLS"):
            self._vault(image)
        if self.provision:
            with self.progress.step("ansible-playbook site.yml"):
                self._site()
            with self.progress.step("An event over HTTPS and back"):
                self._event()
        self._tell(time.monotonic() - began)

    def _check_podman(self) -> None:
        version = podman("version", "--format", "{{.Client.Version}}")
        if int(version.split(".")[0]) < 4:
            raise DemoError(f"Expected: podman 4 or newer. Found: {version}. Do: use Debian 12 or newer.")

    def _prepare(self) -> str:
        # Building the image keeps one core busy and fetching packages the network: they go side by side.
        image_log, venv_log = STATE / "image.log", STATE / "venv.log"
        image = self.runner.start([str(SHARED / "image"), self.distribution], image_log)
        venv = self.runner.start([str(ROOT / "scripts" / "venv")], venv_log)
        self.runner.finish(venv, venv_log, "a virtual environment from requirements.txt")
        return self.runner.finish(image, image_log, "an image to boot").strip().splitlines()[-1]

    def _boot(self, image: str) -> None:
        self.ports = choose_ports(self.progress.notes)
        platform = {
            "name": HOST,
            "distribution": self.distribution,
            "ports": [f"{outer}:{inner}" for inner, outer in self.ports.items()],
        }
        variables = {"scenario": SCENARIO, "platforms": [platform], "state_directory": str(STATE)}
        command = create_command(variables)
        stamp = STATE / "booted.json"
        # The host that runs may be the one that this command would make: no need to ask Ansible.
        if stamp.exists() and json.loads(stamp.read_text()) == self._boot_inputs(command, image):
            return
        with own(STATE):
            self.runner.run(command, STATE / "create.log", "a host that boots")
        write_if_changed(
            STATE / "ssh_config",
            f"Host {HOST}\n  HostName 127.0.0.1\n  Port {self.ports[22]}\n  User admin\n"
            f"  IdentityFile {STATE}/id_ed25519\n  IdentitiesOnly yes\n  UserKnownHostsFile {STATE}/known_hosts\n",
        )
        write_if_changed(stamp, json.dumps(self._boot_inputs(command, image)))

    def _boot_inputs(self, command: list[str], image: str) -> list[str]:
        # A host that was stopped, started or made again since has another time or none.
        state = "{{.Id}} {{.State.Running}} {{.State.StartedAt}}"
        running = podman("container", "inspect", "--format", state, CONTAINER, check=False)
        parts = [(SHARED / name).read_text() for name in ("create.yml", "provide")]
        return [running, hashlib.sha256("\0".join([image, *command, *parts]).encode()).hexdigest()]

    def _vault(self, image: str) -> None:
        command = [
            *(str(VENV / "python"), str(SHARED / "vault.py"), "up", "--container", VAULT, "--network", NETWORK),
            *("--image", image, "--state", str(STATE / "vault"), "--app", "inbox"),
        ]
        self.runner.run(command, STATE / "vault.log", "a Vault-API server")
        control = json.loads((STATE / "vault" / "control.json").read_text())
        values = {
            "demo_ssh": {"address": "127.0.0.1", "port": self.ports[22]},
            "demo_vault": control,
            "demo_package_index_url": package_index(),
        }
        write_if_changed(GENERATED, f"# Written by `make demo`.\n{json.dumps(values, indent=2)}\n")

    def _site(self) -> None:
        command = [str(VENV / "ansible-playbook"), "--inventory", "inventory/demo", "site.yml"]
        output = self.runner.run(command, STATE / "site.log", "a provisioned host")
        recap = re.search(r"ok=(\d+)\s+changed=(\d+)", output)
        if recap:
            self.progress.notes.append(f"{recap[1]} tasks, {recap[2]} changed; output in {STATE / 'site.log'}")

    def _event(self) -> None:
        sent = {"type": "demo.posted", "payload": {"said": "hello"}}
        key = str(uuid.uuid4())
        posted = self._curl("--header", f"Idempotency-Key: {key}", "--json", json.dumps(sent), "/v1/events")
        read = self._curl(f"/v1/events/{posted['id']}")
        if {name: read.get(name) for name in sent} != sent:
            raise DemoError(
                f"Expected: event {posted['id']} as it was posted. Found: {json.dumps(read)}.\n"
                f"Do: look at the app's log: ssh -F {STATE}/ssh_config {HOST} sudo forgectl logs inbox"
            )

    @property
    def url(self) -> str:
        """Where the app answers."""
        return f"https://{DOMAIN}:{self.ports[443]}"

    @property
    def ca_file(self) -> Path:
        """Certificate of the authority that signed the app's."""
        return STATE / "tls" / "ca.pem"

    def _curl(self, *arguments: str) -> dict[str, object]:
        *options, path = arguments
        command = ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "20"]
        result = subprocess.run(
            [*command, "--cacert", str(self.ca_file), *options, self.url + path],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        if result.returncode:
            raise DemoError(
                f"Expected: an answer from {self.url}{path}. Found: {result.stderr.strip()} {result.stdout.strip()}\n"
                f"Do: look at the host: ssh -F {STATE}/ssh_config {HOST} sudo forgectl status"
            )
        answer: dict[str, object] = json.loads(result.stdout)
        return answer

    def _tell(self, seconds: float) -> None:
        login = f"ssh -F {(STATE / 'ssh_config').relative_to(ROOT)} {HOST}"
        ansible = ".venv/bin/ansible-playbook -i inventory/demo"
        print(f"\nDone in {seconds:.0f} s.")
        if not self.provision:
            print(f"The host waits to be provisioned: {ansible} site.yml\nLog in: {login}")
            return
        print(
            "Try:\n"
            f"  curl --cacert {self.ca_file} {self.url}/health\n"
            f"  {login} sudo forgectl status\n"
            f"  {ansible} playbooks/deploy.yml    # after a change in app/: the next release\n"
            f"  {ansible} playbooks/rollback.yml  # back to the one before\n"
            f"`make demo-down` removes all of it.\n\nURL: {self.url}\nCA: {self.ca_file}"
        )


def images() -> list[str]:
    """List the tags of the images that hosts are booted from."""
    listed = podman("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    return sorted(image for image in listed if image.startswith(f"{IMAGES}:"))


def down() -> None:
    """Remove containers, network, volumes, images and files of the demo."""
    if PODMAN.exists() and shutil.which("podman"):
        become_able()
        podman("rm", "--force", "--ignore", "--time", "0", "--volumes", CONTAINER, VAULT)
        podman("volume", "rm", "--force", VAULT, check=False)
        podman("network", "rm", "--force", NETWORK, check=False)
        for image in images():
            podman("rmi", image, check=False)  # refused, and rightly so, while a scenario's host runs on it
        if left := images():
            print(f"Kept, because other hosts run on it: {', '.join(left)}")
    shutil.rmtree(STATE, ignore_errors=True)
    for path in (ROOT / ".cache").glob("image-*"):
        subprocess.run([*as_root(), "rm", "--recursive", "--force", "--one-file-system", str(path)], check=True)
    GENERATED.unlink(missing_ok=True)
    print("The demo is gone. Kept: the packages it installed on this machine, and .venv (`make clean` removes that).")


def guarded(work: Callable[[], object], stopped: str) -> int:
    """Do it and return an exit code; a failure, Ctrl-C and SIGTERM end in a message, `stopped` for the latter two."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        work()
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["up", "host", "down"], help="host: stop before provisioning")
    parser.add_argument("--distribution", choices=["bookworm", "trixie"], default="trixie")
    arguments = parser.parse_args()
    demo = Demo(arguments.distribution, provision=arguments.command == "up")
    work = down if arguments.command == "down" else demo.run
    return guarded(work, "Stopped. `make demo` goes on from here; `make demo-down` removes what there is.")


if __name__ == "__main__":
    sys.exit(main())
