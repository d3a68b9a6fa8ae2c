"""Forks a real process for each command line it reads, so that a test pays for the imports once.

A line on stdin is a list in JSON: the folder and the environment of the processes, the files for what they print, a
pair each, the seconds after which they are killed, or null, then what follows ``python -m``, such as ``repr.fit``.
Several processes find one another as those of torchrun do. The answer is a line with their exit statuses, negative for
the number of the signal that has killed one.
"""

import faulthandler
import gc
import json
import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

gc.disable()  # until all is imported

import torch  # noqa: E402

torch.set_num_threads(1)

import lightning.pytorch  # noqa: E402 - what a run imports, ready before the fork
import lightning.pytorch.loggers.tensorboard  # noqa: F401, E402
import open_clip  # noqa: F401, E402
import plotly.io  # noqa: E402
import plotly.offline  # noqa: F401, E402
import s3fs  # noqa: F401, E402 - which Lightning imports where it is installed
import sklearn.linear_model  # noqa: E402
import sklearn.manifold  # noqa: E402
import sklearn.metrics  # noqa: F401, E402
import timm  # noqa: F401, E402
import torch.utils.tensorboard  # noqa: E402
from PIL import Image  # noqa: E402

from repr.config import CONF  # noqa: E402
from repr.data import datamodule  # noqa: F401, E402
from repr.data.sources.emoji import Emoji  # noqa: E402
from repr.evaluate import during_training as evaluation  # noqa: F401, E402
from repr.fit import main  # noqa: E402
from repr.objectives import image_text  # noqa: F401, E402
from repr.procedures.multistage import Multistage  # noqa: F401, E402
from repr.report import page  # noqa: F401, E402
from repr.signatures import arguments  # noqa: E402

Image.init()
Emoji("val")  # what is read once in a process is read before the fork
for path in CONF.rglob("*.yaml"):
    for target in re.findall(r"_target_: (repr\.[\w.]+)", path.read_text(encoding="utf-8")):
        arguments(target)
gc.freeze()  # or each process would look through all of it again
gc.enable()
HANGS = 500  # seconds, after which a process tells where it stands, and ends; less than what pytest waits for a test


def child(logs: list[str], module: str, arguments: list[str]) -> int:
    for number, log in enumerate(logs, start=1):
        with open(log, "w") as file:
            os.dup2(file.fileno(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.dump_traceback_later(HANGS, exit=True)
    sys.argv = [module, *arguments]
    sys.path[0] = str(Path.cwd())  # as of a fresh interpreter
    try:
        if module == "repr.fit":  # which has been imported, and would be run a second time
            main(arguments)
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def fork(logs: list[str], command: list[str], environment: dict[str, str]) -> int:
    if (process := os.fork()) == 0:
        os.environ.clear()
        os.environ.update(environment)
        status = 70  # of a traceback
        try:
            status = child(logs, command[0], command[1:])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if status == 70:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    return process


def environments(world: int) -> list[dict[str, str]]:
    if world == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    same |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def kill(processes: list[int], seconds: float) -> int:
    """A process that kills others after some time."""
    if (killer := os.fork()) == 0:
        time.sleep(seconds)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        os._exit(0)
    return killer


if __name__ == "__main__":
    for line in sys.stdin:
        folder, environment, logs, seconds, *command = json.loads(line)
        os.chdir(folder)
        pairs = zip(logs, environments(len(logs)), strict=True)
        processes = [fork(of_one, command, environment | of_rank) for of_one, of_rank in pairs]
        killer = None if seconds is None else kill(processes, seconds)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        if killer is not None:
            os.kill(killer, signal.SIGKILL)
            os.waitpid(killer, 0)
        print(json.dumps(statuses), flush=True)
