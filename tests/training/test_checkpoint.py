"""Checkpoints are whole or absent, and run no code when read."""

import errno
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from repr.files import replacing
from repr.runs.checkpoints import checkpoints, damage
from repr.training.checkpoints import AtomicCheckpointIO, Checkpoints


def test_a_save_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "deep" / "step=1.ckpt"
    for value in (1.0, 2.0):
        io.save_checkpoint({"x": torch.tensor(value)}, path)
    assert io.load_checkpoint(path)["x"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["step=1.ckpt"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "step=1.ckpt"
    io.save_checkpoint({"x": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local object"):  # the second as from Python 3.13 on
        io.save_checkpoint({"x": torch.zeros(10), "bad": lambda: None}, path)
    assert io.load_checkpoint(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step=1.ckpt"]


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Code()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "executed").exists()


class Step(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [6, 5]), (9, [6, 5, 4, 3, 2, 1])])
def test_older_checkpoints_are_removed_and_so_are_damaged_ones_and_remains(
    keep: int, left: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step=7.ckpt", "step=70.ckpt", "step=3.ckpt.part"):
        (folder / name).write_bytes(b"half")
    (folder / "mine.ckpt").write_bytes(b"kept")
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Checkpoints(tmp_path, every_n_steps=1, keep=keep)], plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(Step(), DataLoader(torch.zeros(3, 1)))
    assert [path.name for path in checkpoints(tmp_path)] == [f"step={step}.ckpt" for step in left]
    assert len(list(folder.iterdir())) == len(left) + 1
    assert all(damage(path) is None for path in checkpoints(tmp_path))
    with pytest.raises(ValueError, match=r"callbacks\.checkpoints\.keep=0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 5}])
def test_older_ones_that_a_kill_after_the_last_save_has_left_are_removed(end: dict, tmp_path: Path) -> None:
    last = None
    for keep in (9, 1):
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **end,
            callbacks=[Checkpoints(tmp_path, every_n_steps=1, keep=keep)], plugins=[AtomicCheckpointIO()],
        )  # fmt: skip
        trainer.fit(Step(), DataLoader(torch.zeros(3, 1)), ckpt_path=last)
        last = checkpoints(tmp_path)[0]
        assert len(checkpoints(tmp_path)) == min(keep, trainer.global_step)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_whichever_error_hides_it(code: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            try:
                raise OSError(code, os.strerror(code))
            except OSError:
                raise RuntimeError("unexpected pos 768 vs 662")  # noqa: B904 - as torch does it

    with pytest.raises(
        OSError, match=rf"{path} cannot be written \({os.strerror(code)}\); what was saved before is kept"
    ):
        fail()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"before")]
