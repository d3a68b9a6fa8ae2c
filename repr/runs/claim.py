"""A run folder belongs to one process at a time, and a new run never takes one that holds another run."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from repr.cli import is_first
from repr.config import ConfigError
from repr.runs.folder import LOCK, RESULTS, can_resume
from repr.runs.trust import resuming

try:
    import fcntl
except ImportError:  # Windows has other locks; there the folder is not held
    fcntl = None  # type: ignore[assignment]


@contextmanager
def claimed(cfg: DictConfig) -> Iterator[None]:
    """Give a run that has no folder one, and hold it until the block ends; the first of several processes does.

    A process that is killed holds nothing. Where the disk knows no locks, the folder is not held.

    Args:
        cfg: a config that was checked; ``run_folder`` is set where it is null.

    Raises:
        ConfigError: a new run would take the folder of another one, or another process holds it.
    """
    if cfg.run_folder is not None and Path(cfg.run_folder).is_file():
        raise ConfigError([f"run_folder={cfg.run_folder} is a file: name another place"])
    if cfg.run_folder is None:
        cfg.run_folder = str(_new_folder(cfg))
    elif not cfg.resume and is_first() and (can_resume(cfg.run_folder) or Path(cfg.run_folder, RESULTS).exists()):
        raise ConfigError(
            [
                f"run_folder={cfg.run_folder} holds a run already: {resuming(cfg)} goes on with it; for a new "
                "one name another folder, or remove this one"
            ]
        )
    if not is_first() or fcntl is None:
        yield
        return
    path = Path(cfg.run_folder, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            # Of the process, not of the open file: workers that outlive a killed process do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError([f"{cfg.run_folder} is being trained by {holder}: wait until that has ended"]) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _new_folder(cfg: DictConfig) -> Path:
    """A folder that no other start has, ``runs/<name>/<time>``; that of a smoke run lies below ``runs/smoke``."""
    folder = Path("runs", *(["smoke"] if cfg.get("smoke") else []), cfg.name, time.strftime("%Y-%m-%d_%H-%M-%S"))
    if not is_first():  # it takes the name from the first one
        return folder
    for number in range(2, 1000):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        folder = folder.with_name(f"{folder.name.partition('~')[0]}~{number}")
    raise ConfigError([f"{folder.parent} has a thousand runs of this second; set run_folder"])
