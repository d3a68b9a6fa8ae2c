"""Callbacks that really kill their own process, fill its disk, or write down what it trains on, for tests of runs."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from repr.distributed import gather, rank


class SignalAt(pl.Callback):
    """Signals its own process, if it is of that rank, when the batch after ``step`` optimizer steps has come."""

    def __init__(self, step: int, number: int, rank: int = 0) -> None:
        self.step, self.number, self.rank = step, number, rank

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class StopAt(pl.Callback):
    """Asks Lightning to stop after ``step`` optimizer steps, as EarlyStopping and ``trainer.max_time`` do.

    At the end of the batch, of the first one of the next step, or of an evaluation.
    """

    def __init__(self, step: int, after: str) -> None:
        self.step, self.after = step, after
        self.seen = 0  # batches that ended with that step as the last one

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.seen += trainer.global_step == self.step
        if self.after != "evaluation" and self.seen == {"step": 1, "micro_batch": 2}[self.after]:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, *args: object) -> None:
        if self.after == "evaluation" and trainer.global_step == self.step:
            trainer.should_stop = True


class HangAt(pl.Callback):
    """Waits for ever, as a process does in NCCL where another one is gone, once the batch after ``step`` has come."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            threading.Event().wait()


class Record(pl.Callback):
    """Appends ``[step, epoch, indices]`` of every optimizer step to a file, and ``[step, "evaluation"]``.

    The indices are those of all ranks.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.step, self.index = 0, []

    def on_train_start(self, trainer: pl.Trainer, *args: object) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: object, outputs: object, batch: dict, *args: int) -> None:
        self.index += gather(batch["index"]).tolist()
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.write([self.step, trainer.current_epoch, self.index])
            self.index = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.write([trainer.global_step, "evaluation"])

    def write(self, line: list) -> None:
        if rank() > 0:
            return
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")


class Listening(pl.Callback):
    """Writes down at which addresses the sockets of this process listen, as the kernel has them, once it trains."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: pl.Trainer, *args: object) -> None:
        net = Path("/proc/self/net")
        rows = [line.split() for name in ("tcp", "tcp6") for line in (net / name).read_text().splitlines()]
        listening = {row[9]: row[1].partition(":")[0] for row in rows if row[3] == "0A"}
        files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        own = {listening.get(file.removeprefix("socket:[").removesuffix("]")) for file in files} - {None}
        (self.folder / f"listening_{trainer.global_rank}.json").write_text(json.dumps(sorted(own)))


class Tell(pl.Callback):
    """Prints ``at step <n>`` when the batch after n optimizer steps has come, so that others can send a signal."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        trainer.print(f"at step {trainer.global_step}", flush=True)


class KillWhileSaving(pl.Callback):
    """SIGKILL once ``step=<step>.ckpt.part`` is there and has begun to fill; 64 MB in the checkpoint make it last."""

    def __init__(self, folder: str, step: int) -> None:
        self.path = Path(folder, f"step={step}.ckpt.part")

    def on_train_start(self, *args: object) -> None:
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not (self.path.exists() and self.path.stat().st_size > 2**20):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict:
        return {"ballast": torch.ones(2**24)}


class KillAt(pl.Callback):
    """SIGKILL at one of three places of a process.

    Args:
        folder: of the checkpoints.
        place: ``batch``: when the ``number``-th batch of training, evaluation or clustering has come; ``saving``: while
            a checkpoint is being written; ``saved``: as soon as it is there; any other: nowhere.
        number: of the batch.
    """

    def __init__(self, folder: str, place: str = "nowhere", number: int = 1) -> None:
        self.folder, self.place, self.number = Path(folder), place, number

    def on_train_start(self, *args: object) -> None:
        if self.place in ("saving", "saved"):
            there = set(self.folder.glob("*.ckpt"))
            threading.Thread(target=self.watch, args=(there,), daemon=True).start()

    def watch(self, there: set[Path]) -> None:
        ending = "*.part" if self.place == "saving" else "*.ckpt"
        while not any(map(is_not_empty, set(self.folder.glob(ending)) - there)):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    def count(self, *args: object) -> None:
        self.number -= 1
        if self.place == "batch" and self.number <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, *args: object) -> None:
        self.count()

    def on_validation_batch_start(self, *args: object) -> None:
        self.count()

    def on_predict_batch_start(self, *args: object) -> None:
        self.count()

    def state_dict(self) -> dict:
        return {"ballast": torch.ones(2**24)} if self.place == "saving" else {}


def is_not_empty(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


class FillDisk(pl.Callback):
    """Fills the disk below ``folder`` when the batch after ``step`` optimizer steps has come."""

    def __init__(self, folder: str, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            fill(Path(self.folder, "filler"))


def fill(path: Path) -> None:
    """Writes zeros until the disk is full."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


class KillInStage(pl.Callback):
    """SIGKILL when, in the run of one folder, the batch after ``step`` optimizer steps has come."""

    def __init__(self, folder: str, stage: str, step: int) -> None:
        self.here, self.step = Path(folder).name == stage, step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if self.here and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledKMeans(MiniBatchKMeans):
    """SIGKILL instead of clustering, when its seed is that of one stage."""

    def __init__(self, kill_at: int, n_clusters: int, n_init: int = 3, random_state: int | None = None) -> None:
        super().__init__(n_clusters=n_clusters, n_init=n_init, random_state=random_state)
        self.kill_at = kill_at

    def fit_predict(self, features: np.ndarray) -> np.ndarray:
        if self.random_state == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit_predict(features)


class WaitForSignals(pl.Callback):
    """Holds the first step up until it is interrupted, and prints when the first signal has come."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        handler, came = signal.getsignal(signal.SIGINT), threading.Event()

        def tell(number: int, frame: object) -> None:
            handler(number, frame)
            came.set()

        signal.signal(signal.SIGINT, tell)
        print("waits", flush=True)
        while not came.is_set():  # signal.pause() would miss one that comes just before it
            time.sleep(0.01)
        print("one", flush=True)
        while True:
            time.sleep(0.01)
