"""The worker processes of loaders: what stops a run reaches its main process alone."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import signal
import threading


def start_worker(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach all processes of a terminal or a job, and end with the main process.

    A worker that died of a signal would take the run with it before its step is saved. torch's own watch over the main
    process looks every five seconds, not while a batch is read, and not if that process died before the worker began.

    Args:
        worker: its number; this is a ``worker_init_fn``.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@atexit.register  # after multiprocessing's own, hence called before it: that one sends SIGTERM, and waits
def _kill_workers() -> None:
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for worker in workers:
        worker.kill()
