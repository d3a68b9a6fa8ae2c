"""What is sharded, on one process: a group of one has all the parts of FSDP2."""

import inspect
import json
import pickle
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from repr.objectives.base import Objective
from repr.optim import Optim, clip_each
from repr.runs.checkpoint_files import CHECKSUMS, METADATA, REST, read_beside, read_checkpoint, write_shards
from repr.runs.checkpoints import damage, last_checkpoint
from repr.runs.initial_weights import load_weights
from repr.shard import layers, local, shard, shard_like, total_norm, whole
from tests.objectives.conftest import build, make_batch


def in_group(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test in a forked process that is a group of one, and gives it the mesh.

    Backward under FSDP2 starts threads of autograd, after which the process of pytest could not be forked any more.
    """

    @wraps(test)
    def run(**arguments: Any) -> None:
        with TemporaryDirectory() as folder:
            mp.start_processes(_process, (test, folder, arguments), nprocs=1, start_method="fork")

    signature = inspect.signature(test)
    names = [parameter for name, parameter in signature.parameters.items() if name != "mesh"]
    run.__signature__ = signature.replace(parameters=names)  # type: ignore[attr-defined]
    return run


def _process(index: int, test: Callable[..., None], folder: str, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    test(**arguments, mesh=init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", [f"blocks.{i}" for i in range(12)]),
        ("resnet18", [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]),
        ("convnext_atto", [f"stages.{i}" for i in range(4)]),
    ],
)
def test_layers_of_timm_models(name: str, expected: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    names = {module: path for path, module in model.named_modules()}
    assert [names[layer] for layer in layers(model)] == expected


@in_group
def test_what_a_flow_calls_is_sharded_and_its_own_scalars_stay_whole(mesh: DeviceMesh) -> None:
    objective = build("clip")
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    shard(objective, mesh)
    assert {name for name, p in objective.named_parameters() if not isinstance(p, DTensor)} == {"logit_scale"}
    sharded = {name for name, module in objective.named_modules() if isinstance(module, FSDPModule)}
    assert sharded == {
        "backbone", "backbone.blocks.0", "backbone.blocks.1", "text", "text.transformer.resblocks.0", "image_projection"
    }  # fmt: skip
    batch = make_batch(4)
    objective.total(objective.step(batch).terms).backward()
    with torch.no_grad():
        objective.encode_image(batch["views"][0])
    assert all(isinstance(p, DTensor) for p in objective.backbone.parameters())  # after evaluation too
    after = {name: whole(tensor) for name, tensor in objective.state_dict().items()}
    assert all(torch.equal(after[name], before[name]) for name in before)


class Wrapped(Objective):
    TERMS = ("x",)

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(nn.Linear(2, 2), weights={"x": 1})
        for name, module in modules.items():
            self.add_module(name, module)


@in_group
def test_an_objective_that_cannot_be_sharded_says_why(mesh: DeviceMesh) -> None:
    scaled = nn.Linear(2, 2)
    scaled.gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"Wrapped cannot be sharded: head\.gain is a scalar .* Set trainer=ddp"):
        shard(Wrapped(head=scaled), mesh)
    tied = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"b\.inner\.weight is a parameter of a too"):
        shard(Wrapped(a=tied, b=nn.ModuleDict({"inner": tied})), mesh)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@in_group
def test_gradients_are_clipped_as_torch_clips_them(algorithm: str, mesh: DeviceMesh) -> None:
    gradients = []
    for sharded in (False, True):
        objective = build("clip")
        if sharded:
            shard(objective, mesh)
        optimizer, _ = objective.optim.build(objective, 3)
        objective.total(objective.step(make_batch(4)).terms).backward()
        if sharded:
            norm = total_norm(p.grad for p in objective.parameters() if p.grad is not None)
            torch.testing.assert_close(norm, nn.utils.get_total_norm([g for g in gradients[0] if g is not None]))
            objective.configure_gradient_clipping(optimizer, 1e-3, algorithm)
        else:
            gradients.append([None if p.grad is None else p.grad.clone() for p in objective.parameters()])
            clip = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
            clip(objective.parameters(), 1e-3)
        gradients.append([None if p.grad is None else whole(p.grad) for p in objective.parameters()])
    for ours, theirs in zip(gradients[2], gradients[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@in_group
def test_each_gradient_is_clipped_by_the_norm_of_the_whole(mesh: DeviceMesh) -> None:
    gradients = []
    for sharded in (False, True):
        objective = build("clip")
        if sharded:
            shard(objective, mesh)
        objective.total(objective.step(make_batch(4)).terms).backward()
        before = [whole(p.grad).clone() for p in objective.parameters() if p.grad is not None]
        clip_each(objective.parameters(), 1e-2)
        gradients.append([whole(p.grad) for p in objective.parameters() if p.grad is not None])
        for gradient, clipped in zip(before, gradients[-1], strict=True):
            expected = gradient * min(1.0, 1e-2 / (gradient.norm().item() + 1e-6))
            torch.testing.assert_close(clipped, expected)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@in_group
def test_a_share_is_that_of_fully_shard(mesh: DeviceMesh) -> None:
    objective = build("clip")
    values = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    shard(objective, mesh)
    for name, tensor in objective.state_dict().items():
        assert torch.equal(local(shard_like(values[name], tensor)), local(tensor))


@in_group
def write(path: Path, mesh: DeviceMesh) -> None:
    objective = build("clip")
    shard(objective, mesh)
    optimizer, _ = objective.optim.build(objective, 3)
    objective.total(objective.step(make_batch(4)).terms).backward()
    optimizer.step()
    for step in (2, 3):  # the second one takes the place of the first
        state = {"state_dict": objective.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        write_shards({**state, "loops": {}, "global_step": step}, path)
    torch.save({name: whole(tensor) for name, tensor in objective.state_dict().items()}, path.parent / "weights.pt")


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of shards and the weights that are in it."""
    path = tmp_path / "checkpoints" / "step=3.ckpt"
    write(path=path)
    assert {p.name for p in path.parent.iterdir()} == {"step=3.ckpt", "weights.pt"}
    return path, torch.load(path.parent / "weights.pt", weights_only=True)


def test_a_folder_of_shards_is_read_whole_and_for_init_from(folder: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, weights = folder
    assert damage(path) is None
    assert last_checkpoint(path.parents[1]) == path
    assert read_beside(path)["global_step"] == 3
    content = read_checkpoint(path)
    assert content["state_dict"].keys() == weights.keys()
    assert all(torch.equal(content["state_dict"][name], weights[name]) for name in weights)
    states = content["optimizer_states"][0]["state"]
    shapes = sorted(tuple(state["exp_avg"].shape) for state in states.values())
    assert shapes == sorted(tuple(tensor.shape) for tensor in weights.values())
    other = build("clip", seed=1)
    assert len(load_weights(other, str(path)).used) == len(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.state_dict().items())


def test_a_damaged_folder_of_shards_is_never_read(folder: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = folder
    for name in (METADATA, REST, "__0_0.distcp", CHECKSUMS):
        good = (path / name).read_bytes()
        (path / name).write_bytes(good[:-1])
        assert name in str(damage(path))
        (path / name).write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        assert damage(path) is not None
        (path / name).unlink()
        assert damage(path) == f"{name} is missing"
        (path / name).write_bytes(good)
    assert damage(path) is None
    (path / CHECKSUMS).write_text(json.dumps({}))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        last_checkpoint(path.parents[1])


class Attack:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return (print, ("code was run",))


def test_reading_shards_runs_no_code(
    folder: tuple[Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = folder
    with (path / METADATA).open("wb") as file:
        pickle.dump(Attack(), file)
    with pytest.raises(pickle.UnpicklingError, match=r"holds builtins\.print"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "a": SimpleNamespace()}, path / REST)
    with pytest.raises(pickle.UnpicklingError):
        read_beside(path)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options"),
    # Without eps Adam makes steps of the rounding of the bias of a key, whose gradient is zero. Rounding moves a step
    # by lr / eps times itself, and convolutions of another memory layout round gradients by 3e-7 on some CPUs.
    [
        ("lars", {}),
        ("lars_l2", {}),
        ("lamb", {"max_grad_norm": None, "eps": 1e-3}),
        ("adamw", {"eps": 1e-2}),
        ("sgd", {}),
    ],
)
@in_group
def test_optimizers_step_on_shards_as_on_whole_parameters(name: str, options: dict, mesh: DeviceMesh) -> None:
    ends: list[list[Any]] = []
    for sharded in (False, True):
        objective = build("clip")
        if sharded:
            shard(objective, mesh)
        optimizer, _ = Optim(name=name, lr=1e-2, options=options).build(objective, 3)
        for _ in range(2):
            optimizer.zero_grad()
            objective.total(objective.step(make_batch(4)).terms).backward()
            optimizer.step()
        ends.append([whole(p.detach()) for p in objective.parameters()])
    for ours, theirs in zip(ends[1], ends[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    if name == "lamb":
        with pytest.raises(ValueError, match=r"set optim\.options\.max_grad_norm=null"):
            Optim(name=name).build(objective, 3)
