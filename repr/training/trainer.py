"""The Trainer of a run, and the encoders as its config wants them."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors import callback_connector
from omegaconf import DictConfig
from torch.distributed import DistError, TCPStore

from repr.config import ConfigError
from repr.files import DISK_FULL
from repr.models.batchnorm import synchronise, unsynchronised_fault
from repr.models.freezing import freeze
from repr.models.slicing import checkpoint_encoders, compile_encoders, slice_encoders
from repr.runs.trust import resuming
from repr.training.checkpoints import AtomicCheckpointIO

LOOPBACK = "127.0.0.1"  # Lightning's main address where none is given
FIRST = "REPR_FIRST_PROCESS"  # variable of the environment: the process that has Lightning start the others
ORPHAN_SECONDS = 10.0  # that a process has to see by itself that the first one has died


def make_trainer(cfg: DictConfig, callbacks: Sequence[pl.Callback], loggers: Sequence[Any]) -> pl.Trainer:
    """The Trainer of a config, with these callbacks and loggers alone.

    Raises:
        ConfigError: the precision is bfloat16, and the GPU has none; or the strategy forks or spawns its processes.
    """
    _quiet()
    with no_external_callbacks():
        trainer = instantiate(
            cfg.trainer,
            callbacks=list(callbacks),
            logger=list(loggers),
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(cfg.run_folder),
            _convert_="all",  # max_time is a plain dict
            use_distributed_sampler=False,  # ours gives every number of processes the same global batch
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        fault = (
            f"trainer.strategy={cfg.trainer.strategy} forks or spawns {trainer.world_size} processes, which give back "
            "neither weights nor results: set trainer=ddp and run python -m repr.fit, or, in a notebook, "
            "trainer.devices=1"
        )
        raise ConfigError([fault])
    device = trainer.strategy.root_device
    is_half = str(trainer.precision).startswith("bf16")
    if device.type == "cuda" and is_half and torch.cuda.get_device_capability(device) < (8, 0):  # torch emulates it
        name = torch.cuda.get_device_name(device)
        raise ConfigError([f"{name} has no bfloat16: set trainer.precision=16-mixed, or 32-true"])
    if isinstance(trainer.strategy, ParallelStrategy):
        environment = trainer.strategy.cluster_environment
        if isinstance(environment, LightningEnvironment) and not environment.creates_processes_externally:
            os.environ[FIRST] = str(os.getpid())
            if trainer.num_nodes == 1 and "MASTER_ADDR" not in os.environ:
                _meet_on_loopback()
    return trainer


@contextmanager
def no_external_callbacks() -> Iterator[None]:
    """Keep out the callbacks that an installed package has Lightning add to every Trainer.

    Those of stable-pretraining take 12 ms of a step, print all metrics, and write the environment into the run folder.
    """
    load = callback_connector._load_external_callbacks
    callback_connector._load_external_callbacks = lambda group: []
    try:
        yield
    finally:
        callback_connector._load_external_callbacks = load


@cache
def _meet_on_loopback() -> TCPStore:
    """Let the processes that Lightning will start on this machine meet where no other machine can reach them.

    torch's store would listen on every interface. The first process's own store of this port shares this one's server.
    """
    with socket.create_server((LOOPBACK, 0)) as listener:
        port, descriptor = listener.getsockname()[1], os.dup(listener.fileno())
    os.environ["MASTER_PORT"] = str(port)  # where Lightning looks, and the processes that it starts
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=descriptor,
        use_libuv=False,  # which takes no open socket in torch 2.6
    )


def progress(cfg: DictConfig) -> list[pl.Callback]:
    """The progress bar of a config, if it has one."""
    node = cfg.callbacks.get("progress")
    return [instantiate(node)] if node else []


@contextmanager
def telling_how_to_go_on(trainer: pl.Trainer, cfg: DictConfig) -> Iterator[None]:
    """Say in one line what to do where a collective fails, as it does on every process once another one has died.

    torchrun and srun tell which one that was. Lightning's own launcher would look only seconds later, so it is asked;
    it is part of the first process, so where that one has died, the others end by themselves.

    Raises:
        ConnectionError: in the place of the error of gloo or NCCL.
    """
    over = threading.Event()
    if str(os.getppid()) == os.environ.get(FIRST):
        threading.Thread(target=_end_as_orphan, args=(over, resuming(cfg)), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or "gloo" in str(error)):  # gloo's errors are plain ones
            raise
        started = enumerate(getattr(trainer.strategy.launcher, "procs", ()), start=1)
        ended = [f"local rank {rank} was ended by signal {-p.returncode}" for rank, p in started if (p.poll() or 0) < 0]
        raise ConnectionError(
            f"another process has died ({'; '.join(ended) or 'the launcher, or its own last words, say why'}); "
            f"{resuming(cfg)} goes on from the last checkpoint. {str(error).partition('. ')[0]}"
        ) from error
    finally:
        over.set()


def _end_as_orphan(over: threading.Event, how: str) -> None:
    """End this process once its parent has died, unless ``over`` is set before.

    Under NCCL it would wait for the first process, and hold its GPU, for the many minutes of a timeout.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        if over.wait(1):
            return
    if not over.wait(ORPHAN_SECONDS):
        text = f"error: the first process has died; {how} goes on from the last checkpoint"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)


def prepare(objective: pl.LightningModule, cfg: DictConfig, num_processes: int) -> None:
    """Set up the encoders for ``num_processes`` that train together as the config says, before anything is sharded."""
    freeze(objective, cfg.get("freeze") or {})
    if cfg.get("sync_batchnorm"):
        synchronise(objective)
    if fault := unsynchronised_fault(objective, num_processes):
        warnings.warn(fault, stacklevel=2)
    if num_processes == 1 and cfg.get("exchange") == "ring":
        warnings.warn("exchange=ring changes nothing: there is one process", stacklevel=2)
    if cfg.get("grad_checkpointing"):
        checkpoint_encoders(objective)
    if cfg.get("compile"):
        compile_encoders(objective)
    slice_encoders(objective, cfg.get("micro_batch"))


def _quiet() -> None:
    """Silence what Lightning says on every run and no one can act on."""
    threading.excepthook = _quiet_thread
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # The only word of a process that has died, where the others hang until Lightning ends them.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*exists and is not empty.*",  # the run folder is ours
        ".*does not have many workers.*",
        "This DataLoader will create .* worker processes",  # a run tells by itself what it waits for
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # evaluation results are broadcast already
        ".*LeafSpec.*",  # Lightning's use of torch
        ".*no `val_dataloader`.*",
        ".*is smaller than the logging interval.*",  # steps are counted on over the epochs
        ".*custom batch sampler `EvalBatchSampler` for prediction.*",  # it does return all rows
        ".*in eval mode at the start of training.*",  # they are frozen
        "FSDP2-wrapped module .* returned a view tensor.*",  # no flow changes an output in place
        ".*Total length of `list` across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _quiet_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer meets a full disk in a thread of its own; the run itself says so once."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in DISK_FULL):
        threading.__excepthook__(failed)
