"""What the app runs beside its server; each leaves a trail in its home. `jobs beat` goes on, `jobs tick` ends."""

import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1].name
TRAIL = Path.home() / "trail"


def leave(*words: object) -> None:
    """Add a line to the trail."""
    with TRAIL.open("a") as file:
        file.write(" ".join(map(str, (sys.argv[1], os.getpid(), HERE, *words))) + "\n")


def beat() -> None:
    """Go on until told to end."""

    def end(_number: int, _frame: object) -> None:
        time.sleep(0.5)
        leave("ended")
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    leave("began")
    while True:
        time.sleep(1)


def tick() -> None:
    """Take longer than the time until the next one, or fail where that is wanted."""
    leave("began")
    if (Path.home() / "fail").exists():
        sys.exit("could not tick")
    time.sleep(4)
    leave("ended")


{"beat": beat, "tick": tick}[sys.argv[1]]()
