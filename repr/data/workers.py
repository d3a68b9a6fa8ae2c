"""A loader of ready batches whose worker processes leave it to the main process to stop a run."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import signal
import sys
import threading
from typing import Any

from torch.utils.data import DataLoader, Dataset

from repr.output import STOPS


class Loader(DataLoader):
    """A DataLoader of whole batches whose workers never see what stops a run, and end with the main process.

    Ctrl-C, SIGTERM and SIGHUP reach all processes of a terminal or a job, and a worker that died of them would take the
    run with it before its step is saved. They are blocked while workers are started, which inherit that: a handler of
    their own would come too late for some. torch's own watch over the main process looks every five seconds, not while
    a batch is read, and not at all if that process had died before the worker began.
    """

    def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
        usual: dict[str, Any] = {"collate_fn": _as_it_is, "worker_init_fn": _end_with_parent}
        if options.get("num_workers") and sys.platform == "linux":
            # Workers share the tables of the main process and what it blocks; Python 3.14 would copy the one to each.
            usual["multiprocessing_context"] = "fork"
        # Lightning may build a loader anew, and then passes all options that the first one had.
        super().__init__(dataset, **(usual | options))

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):  # on Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(batch: Any) -> Any:
    return batch


def _end_with_parent(worker: int) -> None:
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register  # after multiprocessing's own, hence called before it: that one sends SIGTERM, and waits
def _kill_workers() -> None:
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for worker in workers:
        worker.kill()
