"""Whether alerts reach somebody: what forge-alerts.service says of its channels, and a line that tries them.

The unit follows the journal by itself; this only writes to the journal, as everything that alerts does, and reads the
state that the unit keeps of each channel.
"""

import json
import secrets
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

from forgectl import regular, systemd
from forgectl.errors import ForgeError, Refused

UNIT = "forge-alerts.service"
CONFIG = "etc/forge/alerts.toml"
CHANNELS = ("command", "webhook", "mail")
POLL_SECONDS = 0.2
# Some hundred lines of a thousand characters are held back at most.
STATE_BYTES = 8 * 1024 * 1024


def configured(root: Path = Path("/")) -> list[str]:
    """The channels that the inventory asks for.

    Raises:
        Refused: provisioning did not say.
    """
    path = root / CONFIG
    try:
        found = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise Refused(f"expected {path}; found no such file; run site.yml first") from None
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"expected TOML in {path}; found: {error}; run site.yml again") from None
    return [name for name in CHANNELS if name in found]


def path(name: str, root: Path = Path("/")) -> Path:
    """Where the unit keeps what it knows of a channel: in a folder of its own."""
    return root / "var/lib/forge-alerts" / f"{name}.json"


def state(name: str, root: Path = Path("/")) -> dict[str, Any]:
    """What the unit keeps of a channel; nothing while it never ran.

    Raises:
        OSError: it is no file of the size that it has. The unit is not root, and root does not read what it leads to.
    """
    try:
        found = json.loads(regular.read(path(name, root), STATE_BYTES))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def status(root: Path = Path("/")) -> dict[str, Any]:
    """Whether the unit runs, and of each channel what it delivered last, and since when and why it fails."""
    names = configured(root)
    return {
        "unit": systemd.show(UNIT)["ActiveState"],
        "channels": {name: _channel(state(name, root)) for name in names},
    }


def _channel(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "delivered": found.get("delivered"),
        "failing": found.get("failing"),
        "held_back": len(found.get("held") or {}),
    }


def test(patience: float, root: Path = Path("/")) -> dict[str, Any]:
    """Write an alert line that says it is a test, and wait until every channel has delivered it, or time is up.

    Raises:
        Refused: there is no channel, or the unit does not run.
    """
    names = configured(root)
    if not names:
        raise Refused(
            "expected somewhere to deliver alerts to; found none; set alerts_command, alerts_webhook_url or "
            "alerts_mail_to in the inventory, and run site.yml"
        )
    found = systemd.show(UNIT)["ActiveState"]
    if found != "active":
        raise Refused(f"expected {UNIT} to run; found it {found}; see journalctl -u {UNIT}, then systemctl restart it")
    number = secrets.token_hex(4)
    _write(f"ALERT host: test {number} of the alerts, which somebody asked for: nothing is to be done")
    began, seconds = time.monotonic(), dict[str, float]()
    while len(seconds) < len(names) and time.monotonic() - began < patience:
        for name in names:
            if name not in seconds and state(name, root).get("test") == number:
                seconds[name] = round(time.monotonic() - began, 1)
        time.sleep(POLL_SECONDS)
    return {
        "test": number,
        "channels": {
            name: {
                "arrived": name in seconds,
                "seconds": seconds.get(name),
                "failing": state(name, root).get("failing"),
            }
            for name in names
        },
    }


def text(found: dict[str, Any]) -> list[str]:
    """What `status` found, for a person."""
    lines = [f"{UNIT}: {found['unit']}"] if found["channels"] else ["alerts are in the journal alone"]
    for name, channel in found["channels"].items():
        if failing := channel["failing"]:
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(failing["since"]))
            lines.append(f"{name}: FAILS since {since}, {failing['attempts']} times: {failing['error']}")
        elif delivered := channel["delivered"]:
            lines.append(f"{name}: ok, last at {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(delivered['at']))}")
        else:
            lines.append(f"{name}: nothing was to be delivered yet")
    return lines


def _write(line: str) -> None:
    try:
        command = ["systemd-cat", "--identifier=forgectl", "--priority=err"]
        subprocess.run(command, input=line.encode(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ForgeError(f"systemd-cat does not write to the journal: {error}") from error
