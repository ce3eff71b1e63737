"""Lines out of blocks, within bounds whatever is written: of one that is too long nothing is left."""

# What journald takes of a process's output is 48 KiB a line at most, and as escaped JSON six times that.
LONGEST = 1024 * 1024


class Lines:
    """Puts lines together from blocks as they come, and leaves out those that are too long, to their very end."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest, self._rest, self._skipped = longest, b"", False

    def of(self, block: bytes) -> list[bytes]:
        """The lines that end in this block."""
        *whole, rest = (self._rest + block).split(b"\n")
        if whole and self._skipped:
            del whole[0]
            self._skipped = False
        self._skipped = self._skipped or len(rest) > self._longest
        self._rest = b"" if self._skipped else rest
        return whole
