"""Exports of a run whose processes have each written their shards of the checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repr.export.__main__ import main
from repr.models.checkpoint_files import read_checkpoint
from repr.models.pretrained import last_checkpoint

RUN = [
    "experiment=pixpro_emoji", "smoke=true", "objective.hidden_dim=16", "objective.dim=8", "backbone.name=test_resnet",
    "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy.save_distributed_checkpoint=true",
    "optim.lr=1e-2",
]  # fmt: skip


@pytest.mark.slow
def test_shards_of_a_student_and_its_teacher_are_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "repr.fit", *RUN, f"run_folder={run}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checkpoint = last_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.is_dir()
    tensors = read_checkpoint(checkpoint)["state_dict"]
    main([f"run={run}", "to=timm", f"out={tmp_path}/model"])
    main([f"run={checkpoint}", "to=hf", "weights=teacher", f"out={tmp_path}/teacher"])
    exported = {}
    for name, prefix in {"model": "backbone.", "teacher": "teacher.backbone."}.items():
        exported[name] = load_file(tmp_path / name / "model.safetensors")
        wanted = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        assert exported[name].keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in exported[name].items())
    assert not torch.equal(exported["model"]["conv1.0.weight"], exported["teacher"]["conv1.0.weight"])
