"""What all command lines share: an error of our own checks is one line, any other is a bug and keeps its traceback."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import io
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repr.errors import constructor_error
from repr.files import DISK_FULL
from repr.hub import unfetched

# Where nothing can be written, or a file stands in the place of a folder.
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
COMMAND = "repr-pretrain"  # the console command, see pyproject.toml
# What launchers set: torchrun and Lightning, SLURM, LSF; the last two are the number of the machine.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")


def program(verb: str) -> str:
    """How the user has called a program, for its usage: by the console command, ``python -m repr``, or its module."""
    called = Path(sys.argv[0])
    if called.name == COMMAND:
        return f"{COMMAND} {verb}"
    return f"python -m repr {verb}" if called.parts[-2:] == ("repr", "__main__.py") else f"python -m repr.{verb}"


def command(verb: str, description: str, overrides: str, **options: Any) -> argparse.ArgumentParser:
    """The arguments that every program with a composed config has: overrides, and ``--config-dir``.

    Args:
        verb: of the program.
        description: one sentence.
        overrides: examples of them.
        options: of the parser.
    """
    parser = argparse.ArgumentParser(prog=program(verb), description=description, **options)
    add_overrides(parser, overrides)
    return parser


def add_overrides(parser: argparse.ArgumentParser, told: str) -> None:
    """Give a program overrides, of which ``told`` has examples, and ``--config-dir``."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=told)
    parser.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files come first")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with ``error: <message>`` where one of our own checks fails, and with 130 at Ctrl-C.

    Where nobody reads on, as in ``... | head``, it ends without a word, as other programs do. A warning of our own is
    one line of the first process.
    """
    usual, warnings.formatwarning = warnings.formatwarning, _one_line
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal has no letters for must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sys.exit(f"error: {printable(message)}")
    finally:
        warnings.formatwarning = usual
        _leave_group()


@contextmanager
def importing() -> Iterator[None]:
    """Keep Python's collector from looking through all modules again and again while a program imports them.

    It takes a fourth of a start. What stands then stays to the end, so it is not looked at later, either. Where torch
    has been imported before, as in a notebook, the collector is left alone.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if sys.version_info >= (3, 12):  # where nanobind, of Triton, says at the end that all of it has leaked
            atexit.register(gc.unfreeze)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if not os.path.abspath(filename).startswith(os.path.dirname(os.path.abspath(__file__)) + os.sep):
        return f"{filename}:{lineno}: {category.__name__}: {message}\n"
    return f"warning: {message}\n" if is_first() else ""


def _output_is_closed() -> bool:
    """Whether nobody reads standard output any more; a pipe between processes of a run may break, too."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _leave_group() -> None:
    """End gloo's threads; one that still lets go of a tensor while Python ends would abort the process.

    Lightning leaves groups of NCCL at the end of the program, and no others.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        # Torch 2.6 waits for the threads of a group with Python's lock, for which one of them may wait, too.
        # The last reference to the backend lets go of the lock.
        cpu = sys.modules["torch"].device("cpu")
        backends = [group._get_backend(cpu) for group in dist.distributed_c10d._world.pg_map]
        dist.destroy_process_group()
        gc.collect()  # what is trained holds the group in circles
        backends.clear()


def user_message(error: BaseException) -> str | None:
    """The message of an error that its user can act on; None for any other, which is a bug.

    Our own checks raise such errors, a full or protected disk and a hub out of reach do, and so do the Trainer and
    classes of other libraries that refuse what a config says.
    """
    error, section = constructor_error(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: the disk is full; what was saved before is kept. Make room, then resume the run"
    if isinstance(error, OSError) and error.errno in _NO_PLACE and error.filename:
        return f"{error.filename}: {error.strerror}; make it readable and writable, or name another place"
    if isinstance(error, ValueError | OSError) and (message := _own_message(error)):
        return message
    if message := unfetched(error, section or "a file of a hub"):
        return message
    if type(error).__name__ == "MisconfigurationException" or (section and isinstance(error, ValueError)):
        return " ".join(f"{section or 'trainer'}: {error}".split())
    if isinstance(error, RuntimeError) and _raised_in(error).startswith("lightning.pytorch.callbacks."):
        return " ".join(f"callbacks: {error}".split())
    return None


def _own_message(error: BaseException) -> str | None:
    """The message of an error that our own code has raised, here or in a worker of a DataLoader."""
    lines = str(error).splitlines()
    if lines and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:  # a traceback, as text
        where = [line for line in lines if line.lstrip().startswith("File ")]
        ours = bool(where) and f"{os.sep}repr{os.sep}" in where[-1]
        return lines[-1].partition(": ")[2] if ours else None
    return str(error) if _raised_in(error).partition(".")[0] in ("__main__", "repr", "tools") else None


def _raised_in(error: BaseException) -> str:
    """The module whose code has raised an error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "") if frames else ""


def printable(text: str) -> str:
    """A text without what a terminal would obey, which names and captions of other people may hold."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def is_first() -> bool:
    """Whether this is the first of all processes, however they were started, also before they know each other."""
    known = getattr(sys.modules.get("lightning_utilities.core.rank_zero"), "rank_zero_only", None)  # where it is loaded
    given = (os.environ.get(name, "0") for name in _RANKS)
    return getattr(known, "rank", 0) == 0 and all(rank in ("", "0") for rank in given)
