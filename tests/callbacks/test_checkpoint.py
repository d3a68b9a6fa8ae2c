"""Checkpoints are whole or absent, and run no code when read."""

import os
from pathlib import Path

import pytest
import torch

from repr.callbacks.checkpoint import AtomicCheckpointIO


def test_a_save_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "deep" / "step=1.ckpt"
    for value in (1.0, 2.0):
        io.save_checkpoint({"x": torch.tensor(value)}, path)
    assert io.load_checkpoint(path)["x"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["step=1.ckpt"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "step=1.ckpt"
    io.save_checkpoint({"x": 1}, path)
    with pytest.raises(Exception, match="pickle"):
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
