"""Reading files that somebody else may have put there: neither through a link, nor what waits or does something."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def opened(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: there is none, or it is a link, a FIFO, a device or a folder.
    """
    # To open some devices is to do something with them; and what is there may be another by then.
    _refuse(path, path.lstat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _refuse(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read(path: Path, most: int) -> bytes:
    """All of a regular file, of so many bytes at most.

    Raises:
        OSError: there is none, it is something else, or longer.
    """
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
