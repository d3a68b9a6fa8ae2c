"""Resumed from the checkpoint of every single step, a run does what it would have done: training, evaluation, rows.

One process, a few weights with dropout, and many set-ups; kills of real processes are in ``tests/test_resume.py``.
"""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from repr.data.datamodule import DataModule
from repr.data.views import View
from repr.training.checkpoints import AtomicCheckpointIO, Checkpoints
from repr.training.metrics_file import MetricsFile, Row, keep_rows, read_rows

pytestmark = pytest.mark.filterwarnings("ignore")


class Grays:
    """Pictures of one gray each."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.attributes = num_rows, {}

    def __len__(self) -> int:
        return self.num_rows

    def key(self, index: int) -> str:
        return str(index)

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (8 * index,) * 3)

    def captions(self, index: int) -> list[str]:
        return []


class Weight(LightningModule):
    """Writes down every batch and evaluation with its step and epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = torch.nn.Parameter(torch.ones(8)), torch.nn.Dropout(0.5)
        self.events: list[tuple] = []

    def setup(self, stage: str) -> None:
        torch.manual_seed(self.global_rank)  # so that a rank which took another's generator would show

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.events.append(("batch", self.global_step, self.current_epoch, tuple(batch["index"].tolist())))
        loss = self.dropout(self.weight).sum() * batch["views"][0].float().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing: that it ran is what counts."""

    def on_validation_epoch_end(self) -> None:
        self.events.append(("evaluation", self.global_step, self.current_epoch))
        self.log("val/weight", self.weight.sum())

    def configure_optimizers(self) -> dict:
        optimizer, total = torch.optim.Adam(self.parameters(), lr=0.1), self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class KeepAll(Checkpoints):
    """Copies each checkpoint into ``all/``, since the next one removes it."""

    def _save(self, trainer: Trainer) -> None:
        super()._save(trainer)
        (self.folder / "all").mkdir(exist_ok=True)
        shutil.copy(self._saved, self.folder / "all")

    @property
    def state_key(self) -> str:
        return "Checkpoints"


def run(
    folder: Path, checkpoint: Path | None = None, *, devices: int = 1, **options: object
) -> tuple[list[tuple], torch.Tensor, list[Row]]:
    torch.manual_seed(0)
    data = DataModule(
        train=Grays(31), eval={"val": Grays(4)}, views={"one": View(size=8, scale=(0.5, 1))}, batch_size=6,
        eval_batch_size=4, image_size=8, seed=5, mean=(0.5,) * 3, std=(0.2,) * 3, bank_size=4,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto",
        logger=MetricsFile(folder), log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[KeepAll(folder, every_n_steps=1)], plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip
    keep_rows(trainer, torch.load(checkpoint, weights_only=True) if checkpoint else {})
    module = Weight()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.events, module.weight.detach(), read_rows(folder / "metrics.csv")


ENDS = ({"max_epochs": 3}, {"max_epochs": -1, "max_steps": 5})
INTERVALS = ((1.0, 1), (1.0, 2), (2, 1), (0.5, 1), (3, None), (4, None))
SHORT = [(2, 1.0, (2, 1), 0), (1, 4, (3, None), 0), (2, 1.0, (1.0, 2), 1), (1, 1.0, (1.0, 1), 0)]
ALL = list(itertools.product((1, 2), (1.0, 4), INTERVALS, (0, 1)))


@pytest.mark.parametrize(
    ("accumulate", "limit", "interval", "end"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in SHORT)],
)
def test_a_run_goes_on_from_every_step(
    accumulate: int, limit: float, interval: tuple[float, int | None], end: int, tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": accumulate, "limit_train_batches": limit, **ENDS[end]}
    options |= {"val_check_interval": interval[0], "check_val_every_n_epoch": interval[1]}
    events, weight, rows = run(tmp_path / "whole", **options)
    steps = [int(path.stem.removeprefix("step=")) for path in (tmp_path / "whole" / "all").iterdir()]
    assert len(steps) >= 5
    for step in sorted(steps):
        again = tmp_path / f"from {step}"
        again.mkdir()
        shutil.copy(tmp_path / "whole" / "metrics.csv", again)
        found = run(again, tmp_path / "whole" / "all" / f"step={step}.ckpt", **options)
        expected = [event for event in events if event[1] >= step]
        if step == max(steps) and "max_steps" in options:  # Lightning's loops do not start; `fit` evaluates then
            assert found[0] == []
        else:
            assert found[0] == expected, step
            assert found[2] == rows, step
        assert torch.equal(found[1], weight), step


def test_two_processes_go_on_each_with_its_own_generator(tmp_path: Path) -> None:
    """Dropout differs between the ranks; so do the weights if one of them draws anything else after a resume."""
    options = {"devices": 2, "max_epochs": 2, "val_check_interval": 2, "accumulate_grad_batches": 2}
    _, _, rows = run(tmp_path / "whole", **options)
    (last,) = (tmp_path / "whole" / "checkpoints").iterdir()
    generators = torch.load(last, weights_only=True)["callbacks"]["Checkpoints"]["generators"]["cpu"]
    assert not torch.equal(*generators)
    for step in (2, 3):
        again = tmp_path / f"from {step}"
        again.mkdir()
        shutil.copy(tmp_path / "whole" / "metrics.csv", again)
        _, _, found = run(again, tmp_path / "whole" / "all" / f"step={step}.ckpt", **options)
        states = [
            torch.load(folder / "checkpoints" / last.name, weights_only=True) for folder in (again, last.parents[1])
        ]
        assert torch.equal(*(state["state_dict"]["weight"] for state in states))
        assert found == rows
