"""Reading of whole files, so that nothing that stands in their place holds a run up or fills its memory."""

from __future__ import annotations

import os
import stat

MAX_BYTES = 2**29  # of a picture, or of a file of questions
MAX_TEXT = 2**19  # bytes of the captions of a row


def read_plain(path: str, limit: int, what: str) -> bytes:
    """The bytes of a plain file.

    Args:
        path: the file.
        limit: so many bytes it may have.
        what: what it is read as, for the error: ``an image``.

    Raises:
        OSError: it is missing, larger, or no plain file; a pipe or a device could be read for ever.
    """
    try:
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "no plain file")
            check_size(status.st_size, limit)
            return file.read(limit)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path}: not readable as {what} ({reason})") from error


def check_size(size: int, limit: int) -> None:
    """Raise OSError where there are more bytes than a limit allows."""
    if size > limit:
        raise OSError(0, f"{size:,} bytes, more than {limit:,}")


def open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
