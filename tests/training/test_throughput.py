"""The share of time spent waiting for data, of a loader that is really slow and of one that is not."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from PIL import Image
from torch.utils.data import DataLoader

from repr.data.datamodule import DataModule
from repr.data.views import View
from repr.training.checkpoints import AtomicCheckpointIO, Checkpoints
from repr.training.throughput import Phases, Throughput, hint

pytestmark = pytest.mark.filterwarnings("ignore")
PEAK = 1e12


class Pictures:
    """Pictures that take work: noise of the given side, turned anew each time."""

    def __init__(self, side: int) -> None:
        self.attributes: dict = {}
        self.noise = Image.effect_noise((side, side), 100).convert("RGB")

    def __len__(self) -> int:
        return 40

    def key(self, index: int) -> str:
        return str(index)

    def image(self, index: int) -> Image.Image:
        return self.noise.rotate(index, resample=Image.Resampling.BICUBIC)

    def captions(self, index: int) -> list[str]:
        return []


class Work(LightningModule):
    """Multiplies matrices of the given side in each step."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(side))

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        x = self.weight
        for _ in range(4):
            x = x @ self.weight
        return x.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def run(folder: Path, picture: int, matrix: int) -> Throughput:
    data = DataModule(
        train=Pictures(picture), eval={}, views={"one": View(size=8, scale=(0.5, 1))}, batch_size=4, eval_batch_size=4,
        image_size=8, seed=0, mean=(0.5,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    throughput = Throughput(every=5, settle=5, enough=10, phases=7, peak=PEAK)
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[throughput, Checkpoints(folder, every_n_steps=3)],
        plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(Work(matrix), datamodule=data)
    assert throughput.waited + throughput.busy < time.perf_counter() - start
    assert 0 < float(trainer.callback_metrics["train/data_wait"]) < 1
    assert float(trainer.callback_metrics["train/samples_per_s"]) > 0
    assert throughput.operations == 4 * 3 * 2 * matrix**3  # products, each with two gradients
    rate = float(trainer.callback_metrics["train/samples_per_s"]) / 4
    assert float(trainer.callback_metrics["train/mfu"]) == pytest.approx(throughput.operations * rate / PEAK, rel=1e-4)
    shares = {name: float(trainer.callback_metrics[f"train/time_{name}"]) for name in Phases.NAMES}
    assert all(share >= 0 for share in shares.values())
    assert 0.5 < sum(shares.values()) <= 1
    assert shares["load"] > 0.5 if picture > 8 else shares["load"] < shares["forward"] + shares["backward"]
    return throughput


def test_slow_data_gives_one_hint_and_slow_steps_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow_data = run(tmp_path / "data", picture=512, matrix=2)
    out = capsys.readouterr().out
    assert slow_data.waited > slow_data.busy
    assert out.count("hint: ") == 1
    assert "waiting for data: raise data.num_workers from 0 towards" in out
    assert re.search(r"of the time spent waiting for data, \d+% of the card's peak$", out.splitlines()[-1])
    slow_steps = run(tmp_path / "steps", picture=8, matrix=500)
    assert slow_steps.waited < slow_steps.busy / 2
    assert "hint: " not in capsys.readouterr().out


class Machine:
    """What the hint asks of a trainer."""

    def __init__(self, num_workers: int, num_devices: int) -> None:
        self.num_devices = num_devices
        self.datamodule = self
        self.num_workers = num_workers


def test_the_hint_says_what_can_still_be_set() -> None:
    cores = len(os.sched_getaffinity(0))
    assert hint(0.5, Machine(cores, 1)).startswith("hint: 50% of the time goes to waiting for data: store smaller")
    assert f"data.num_workers={cores} already takes the {cores} cores" in hint(0.5, Machine(cores, 1))
    assert f"raise data.num_workers from 0 towards {cores} ({cores} cores)" in hint(0.4, Machine(0, 1))


def test_where_no_peak_is_known_nothing_is_counted(tmp_path: Path) -> None:
    """A profiler of one's own stays."""
    throughput, profiler = Throughput(every=1, settle=0), SimpleProfiler()
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[throughput], profiler=profiler,
    )  # fmt: skip
    trainer.fit(Work(2), DataLoader([{"index": torch.arange(4)}] * 2, batch_size=None))
    assert trainer.profiler is profiler
    assert throughput.operations is None
    assert {"train/mfu", "train/memory_gb", "train/time_load"}.isdisjoint(trainer.callback_metrics)


@pytest.mark.parametrize("option", ["every", "phases", "peak"])
def test_a_number_that_cannot_be_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.throughput.{option}=0; set it above 0"):
        Throughput(**{option: 0})
