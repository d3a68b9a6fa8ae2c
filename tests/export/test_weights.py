"""Which weights of a checkpoint are exported: those of one file or of shards, a teacher's, an average."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from repr.export.__main__ import main
from repr.fit import main as fit
from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import last_checkpoint
from tests.conftest import RunGroup

RUN = [
    "experiment=pixpro_emoji", "smoke=true", "objective.hidden_dim=16", "objective.dim=8", "backbone.name=test_resnet",
    "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy.save_distributed_checkpoint=true",
    "optim.lr=1e-2",
]  # fmt: skip


@pytest.mark.slow
def test_shards_of_a_student_and_its_teacher_are_exported(run_group: RunGroup, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for status, out in run_group(2, *RUN, f"run_folder={run}"):
        assert status == 0, out
    checkpoint = last_checkpoint(run)
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


@pytest.mark.slow
def test_an_average_is_evaluated_and_exported_unless_the_trained_weights_are_asked_for(tmp_path: Path) -> None:
    average = "+callbacks.average={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.9}"
    small = ["experiment=simclr_emoji", "smoke=true", "backbone.name=test_resnet", "optim.schedule=constant"]
    fit([*small, average, f"run_folder={tmp_path}/run"])
    content = read_checkpoint(tmp_path / "run" / "checkpoints" / "step=2.ckpt")
    keys = {"model": "state_dict", "unaveraged": "current_model_state"}
    for weights, key in keys.items():
        main([f"run={tmp_path}/run", "to=hf", f"weights={weights}", f"out={tmp_path}/{weights}"])
        exported = load_file(tmp_path / weights / "model.safetensors")
        assert all(torch.equal(tensor, content[key][f"backbone.{name}"]) for name, tensor in exported.items())
    cards = {weights: ModelCard.load(tmp_path / weights / "README.md").text for weights in keys}
    assert "the weights are the average that was kept" in cards["model"]
    assert "not the average" in cards["unaveraged"]
    assert "were not evaluated by the run" in cards["unaveraged"]
    assert "were not evaluated by the run" not in cards["model"]
    first = "backbone.conv1.0.weight"
    assert not torch.equal(content["state_dict"][first], content["current_model_state"][first])
    # A resumed run goes on from the trained weights, and from the average.
    fit([f"resume={tmp_path}/run", "trainer.max_epochs=2"])
    later = read_checkpoint(tmp_path / "run" / "checkpoints" / "step=4.ckpt")
    fit([*small, average, f"run_folder={tmp_path}/whole", "trainer.max_epochs=2"])
    whole = read_checkpoint(tmp_path / "whole" / "checkpoints" / "step=4.ckpt")
    for key in keys.values():
        assert all(torch.equal(tensor, later[key][name]) for name, tensor in whole[key].items())
