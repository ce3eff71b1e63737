"""Failures that an operator can act on, and the exit code of each.

Every message says what was expected, what was found and what to do, and never holds a secret value.
"""

import errno

DONE = 0
UNEXPECTED = 1
USAGE = 2
REFUSED = 3
CANDIDATE_FAILED = 4
LOCKED = 5
SECRETS = 6
ROLLED_BACK = 7
INTERRUPTED = 130

# No room on a disk, for a user, in a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: OSError) -> str:
    """What the kernel refused, on which file, and what to do when a disk is full."""
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return what + ("; make room (df -h, df -i)" if error.errno in FULL else "")


class ForgeError(Exception):
    """Base of every failure with a message for the operator."""

    exit_code = UNEXPECTED


class Refused(ForgeError):
    """The request was refused, and nothing was changed."""

    exit_code = REFUSED


class CandidateFailed(ForgeError):
    """The new release failed before it took traffic.

    The old one serves, or, after a breaking migration, clients get the maintenance page.

    Attributes:
        summary: the message without the log lines.
        log: those; None where there are none to show.
    """

    exit_code = CANDIDATE_FAILED

    def __init__(self, summary: str, log: str | None = None) -> None:
        said = "" if log is None else f". Its last log lines:\n{log or '(it said nothing)'}"
        super().__init__(summary + said)
        self.summary = summary
        self.log = log


class RolledBack(ForgeError):
    """The new release took traffic, turned unready while the old one was not, and the old one has it back."""

    exit_code = ROLLED_BACK


class Locked(ForgeError):
    """Another command holds the app's lock."""

    exit_code = LOCKED


class SecretsError(ForgeError):
    """Vault or one of its values is not usable.

    Attributes:
        state: for programs: missing, rejected, address (refused), unreachable, untrusted, sealed, denied, incomplete,
            conflict, intercepted or lost.
        version: the version of the secrets whose content is the reason; 0 when the reason is another one.
    """

    exit_code = SECRETS

    def __init__(self, state: str, message: str, version: int = 0) -> None:
        super().__init__(message)
        self.state = state
        self.version = version
