"""Files of a run folder that are replaced as a whole, so that a kill or a full disk never leaves half of one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # what a file is called until it is complete
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` that takes its place once it is complete and on the disk.

    Until then, and if writing fails, whatever stood at ``path`` stays.

    Raises:
        OSError: the disk is full; the message says what is kept and what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PART)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch hides the first behind the second
        if not is_disk_full(error):
            raise
        raise OSError(
            f"no space left on the disk for {path}; what was saved before is kept. Make room, then go on with "
            "python -m repr.fit resume=RUN_FOLDER"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a full disk or a spent quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
