"""What asks a run to stop: signals, and an output that can be written no more."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Ctrl-C, the end of a job, and that of the terminal; nohup lets a run ignore the last one.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopping_unread() -> Iterator[None]:
    """Ask the run that trains to stop, as the end of its terminal does, once its output cannot be written any more.

    A terminal that was closed, or ``tee`` that Ctrl-C has ended first, would otherwise end the run with an error at the
    next word that it says, before its step is saved.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = wrapped = [_Stream(stream) for stream in streams]
    try:
        yield
    finally:
        for stream in wrapped:
            with suppress(OSError):
                stream.flush()  # else Python would fail at it when it ends
        sys.stdout, sys.stderr = streams


class _Stream:
    """Standard output or error that ends up nowhere once it cannot be written, and sends SIGHUP to a run that saves."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also for what is left in its buffer
        if not callable(signal.getsignal(signal.SIGHUP)):  # there is nothing to save
            raise error
        os.kill(os.getpid(), signal.SIGHUP)
