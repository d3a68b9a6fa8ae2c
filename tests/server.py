"""Forks a real process for each command line it reads, so that a test pays for the imports once.

A line on stdin is a list in JSON: the file for what the process prints, then the arguments of ``repr.fit``. The answer
is a line with the exit status, negative for the number of the signal that has killed it.
"""

import json
import os
import sys

import torch

torch.set_num_threads(1)

import lightning.pytorch  # noqa: E402 - what a run imports, ready before the fork
import lightning.pytorch.loggers.tensorboard  # noqa: F401, E402
import open_clip  # noqa: F401, E402
import timm  # noqa: F401, E402
import torch.utils.tensorboard  # noqa: E402

from repr.callbacks import checkpoint, evaluation, nonfinite, progress, throughput  # noqa: F401, E402
from repr.data import datamodule  # noqa: F401, E402
from repr.fit import main  # noqa: E402
from repr.multistage import Multistage  # noqa: F401, E402
from repr.objectives import image_text  # noqa: F401, E402


def child(log: str, arguments: list[str]) -> int:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        main(arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        if (process := os.fork()) == 0:
            status = 70  # of a traceback
            try:
                status = child(log, arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                if status == 70:
                    sys.excepthook(*sys.exc_info())
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(status, flush=True)
