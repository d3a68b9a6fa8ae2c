"""What all command lines share: an error of our own checks is one line, any other is a bug and keeps its traceback."""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from repr.files import DISK_FULL

# What launchers set: torchrun and Lightning, SLURM, LSF; the last two are the number of the machine.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with ``error: <message>`` where one of our own checks fails, and with 130 at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")
    finally:
        _leave_group()


def _leave_group() -> None:
    """End gloo's threads; one that still lets go of a tensor while Python ends would abort the process.

    Lightning leaves groups of NCCL at the end of the program, and no others.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        gc.collect()  # what is trained holds the group in circles


def user_message(error: BaseException) -> str | None:
    """The message of an error that one of our own checks has raised; None for any other error, which is a bug."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: the disk is full; what was saved before is kept. Make room, then resume the run"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        return f"{error.filename}: {error.strerror}; make it readable and writable, or name another place"
    if not isinstance(error, ValueError | OSError):
        return None
    lines = str(error).splitlines()
    if lines and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:  # a traceback, as text
        where = [line for line in lines if line.lstrip().startswith("File ")]
        ours = bool(where) and f"{os.sep}repr{os.sep}" in where[-1]
        return lines[-1].partition(": ")[2] if ours else None
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return str(error) if raised_in.partition(".")[0] in ("__main__", "repr", "tools") else None


def is_first() -> bool:
    """Whether this is the first of all processes, however they were started, also before they know each other."""
    lightning = sys.modules.get("lightning.pytorch.utilities")  # as long as it is not imported, nothing else knows
    given = (os.environ.get(name, "0") for name in _RANKS)
    return getattr(getattr(lightning, "rank_zero_only", None), "rank", 0) == 0 and all(r in ("", "0") for r in given)
