"""Which processes have died, when a collective has failed because of it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_PROCESS, _ALIVE, _LOST, _TOLD = (f"repr/{name}" for name in ("process", "alive", "lost", "told"))


class RanksLostError(ConnectionError):
    """Processes of the run have died; the others cannot go on."""


def announce() -> None:
    """Tell the others where this process runs; before :func:`lost_ranks` can be asked."""
    if dist.is_available() and dist.is_initialized():
        _store().set(f"{_PROCESS}/{dist.get_rank()}", f"{os.getpid()} {socket.gethostname()}")


@contextmanager
def naming_lost_ranks(run_folder: Path) -> Iterator[None]:
    """Turn the error of a collective into one that names the processes that died.

    Raises:
        RanksLostError: some have.
    """
    try:
        yield
    except RuntimeError as error:
        of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's are plain ones
        if not (of_collective and dist.is_initialized() and (lost := lost_ranks())):
            raise
        raise RanksLostError(f"{lost} died; resume={run_folder} goes on from the last checkpoint") from error


def lost_ranks(seconds: float = 20.0) -> str | None:
    """Which ranks have died and where they ran, as words; None if none has.

    Every rank that meets an error of a collective asks. A process of the same machine is looked up by its number; of
    another one is believed what a rank there says, or that it is lost if it does not ask too.

    Args:
        seconds: how long to wait for the others.
    """
    me, ranks, store = dist.get_rank(), range(dist.get_world_size()), _store()
    try:
        store.set(f"{_ALIVE}/{me}", "")
        places = {rank: store.get(f"{_PROCESS}/{rank}").decode() for rank in ranks}
        lost = _find(store, places, seconds)
        store.set(f"{_TOLD}/{me}", "")
        if me == 0:  # the store ends with this process
            _wait(store, [f"{_TOLD}/{rank}" for rank in ranks if rank not in lost], seconds)
    except (dist.DistNetworkError, dist.DistStoreError):
        return "rank 0, which held the run together," if me else None
    words = [f"rank {rank} (process {' on '.join(places[rank].split(' ', 1))})" for rank in lost]
    return ", ".join(words) or None


def _find(store: dist.Store, places: dict[int, str], seconds: float) -> list[int]:
    end, here = time.monotonic() + seconds, socket.gethostname()
    while True:
        if store.check([_LOST]):
            return [int(rank) for rank in store.get(_LOST).decode().split()]
        silent = [rank for rank in places if not store.check([f"{_ALIVE}/{rank}"])]
        gone = [rank for rank in silent if _gone(places[rank], here)]
        if gone or not silent or time.monotonic() > end:
            lost = gone or silent
            if lost:
                store.set(_LOST, " ".join(map(str, lost)))
            return lost
        _wait(store, [f"{_ALIVE}/{rank}" for rank in silent], 0.5)


def _gone(place: str, here: str) -> bool:
    """Whether a process of this machine has ended; one that its parent has not asked for yet is still listed."""
    pid, _, host = place.partition(" ")
    if host != here or not Path("/proc/self/stat").exists():
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def _wait(store: dist.Store, keys: list[str], seconds: float) -> None:
    """Until all keys are there, or not longer."""
    with suppress(dist.DistStoreError):
        store.wait(keys, timedelta(seconds=seconds))


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
