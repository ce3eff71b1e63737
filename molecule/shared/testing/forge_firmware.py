"""What starts a host again that was told to reboot: in a container nothing does; on a machine that is the firmware."""

from __future__ import annotations

import threading

from forge_scenario import CONTAINER, podman


class Firmware(threading.Thread):
    """While its context lasts, the host is started whenever it has ended; `boots` is how often."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.boots = 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.5):
            if podman("inspect", "--format={{.State.Running}}", CONTAINER).stdout.strip() == b"false":
                podman("start", CONTAINER)
                self.boots += 1

    def __enter__(self) -> Firmware:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self.join()
