"""NaN and infinity from real pictures: named, written down, and never in the weights."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor, nn

from repr.batch import Batch, StepOutput
from repr.data.datamodule import DataModule
from repr.data.views import View
from repr.distributed import gather
from repr.objectives.base import Objective
from repr.optim import Optim
from repr.training.guard import NonFiniteError, NonFiniteGuard

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_ROWS, BATCH = 24, 4


class Grays:
    """Pictures of one gray each; those of the rows in ``black`` are black."""

    def __init__(self, black: set[int]) -> None:
        self.black, self.attributes = black, {}

    def __len__(self) -> int:
        return NUM_ROWS

    def key(self, index: int) -> str:
        return str(index)

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4), (0 if index in self.black else 100 + index,) * 3)

    def captions(self, index: int) -> list[str]:
        return []


class Root(nn.Module):
    """NaN below zero; at zero the output is finite and the gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Net(nn.Module):
    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.root, self.norm = nn.Linear(3, 3, bias=False), Root(), nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 3)
        nn.init.eye_(self.gain.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.root(self.gain(images.mean((2, 3))))))


class Roots(Objective):
    """Counts the updates that follow a step, as a teacher's would; gathers only if told to."""

    TERMS = ("spread", "mean")

    def __init__(self, gathers: bool = False) -> None:
        super().__init__(Net(), weights={"spread": 1.0, "mean": 0.1}, optim=Optim(lr=1e-3))
        self.gathers, self.updates = gathers, 0
        self.scale = nn.Parameter(torch.ones(()))

    def step(self, batch: Batch) -> StepOutput:
        features = self.backbone(batch["views"][0])
        features = gather(features) if self.gathers else features
        terms = {"spread": features.pow(2).mean(), "mean": (self.scale * batch["views"][0].mean() - 1) ** 2}
        return StepOutput(terms)

    def update_targets(self) -> None:
        self.updates += 1


class Watch(Callback):
    """Keeps everything that a step may change, as it is after each one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[dict] = []
        self.indices: list[list[int]] = []

    def on_train_start(self, trainer: Trainer, module: Objective) -> None:
        self.keep(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Objective, outputs: object, batch: Batch, i: int) -> None:
        self.indices.append(batch["index"].tolist())
        if trainer.global_step == len(self.states):
            self.keep(trainer, module)

    def keep(self, trainer: Trainer, module: Objective) -> None:
        state = {"module": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
        self.states.append({"updates": module.updates, **flat(state)})

    def on_train_end(self, trainer: Trainer, module: Objective) -> None:
        skipped = int(trainer.callback_metrics.get("train/skipped_steps", 0))
        kept = {"states": self.states, "indices": self.indices, "skipped": skipped}
        torch.save(kept, self.folder / f"watch{trainer.global_rank}.pt")


def flat(state: dict) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        inner = flat(value) if isinstance(value, dict) else {"": value.clone()}
        found |= {f"{name}.{key}": tensor for key, tensor in inner.items()}
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)


def run(
    folder: Path, *, black: set[int], mean: float, gathers: bool = False, devices: int = 1, **options: object
) -> list[dict]:
    """One epoch; what each rank has watched. With ``mean`` 0.1 a black picture is below zero, with 0 it is zero."""
    guard = {name: options.pop(name) for name in ("action", "max_skips") if name in options}
    data = DataModule(
        train=Grays(black), eval={}, views={"one": View(size=4, scale=(1, 1))}, batch_size=BATCH, eval_batch_size=4,
        image_size=4, seed=3, mean=(mean,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, callbacks=[NonFiniteGuard(folder, **guard), Watch(folder)], **options,
    )  # fmt: skip
    trainer.fit(Roots(gathers), datamodule=data)
    return [torch.load(folder / f"watch{rank}.pt", weights_only=True) for rank in range(devices)]


def steps_with(row: int, watched: dict, accumulate: int = 1) -> list[int]:
    return [i // accumulate for i, indices in enumerate(watched["indices"]) if row in indices]


@pytest.mark.parametrize(
    ("mean", "terms", "where"),
    [
        (0.1, ["spread"], "the first module whose output is not finite is backbone.root"),
        (0.0, [], "the first module whose gradient is not finite is backbone.gain"),
    ],
)
def test_the_run_stops_and_says_where(mean: float, terms: list[str], where: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=where) as error:
        run(tmp_path, black={7}, mean=mean)
    assert str(error.value).startswith("spread is" if terms else "a gradient is")
    assert "callbacks.guard.action=skip" in str(error.value)
    record = json.loads((tmp_path / "non_finite_rank0.json").read_text())
    assert record["bad_terms"] == terms
    assert record["where"] == where
    assert 7 in record["index"]
    assert len(record["index"]) == BATCH
    state = torch.load(tmp_path / "non_finite_rank0.pt", weights_only=True)
    assert state["batch"]["index"].tolist() == record["index"]
    # The step can be run again from the file alone, and fails in the same way.
    objective = Roots()
    objective.load_state_dict(state["state_dict"])
    objective.total(objective.step(state["batch"]).terms).backward()
    assert objective.backbone.gain.weight.grad.isfinite().all().item() is False
    assert {path.name for path in tmp_path.iterdir()} == {"non_finite_rank0.json", "non_finite_rank0.pt"}


@pytest.mark.parametrize(("mean", "accumulate"), [(0.1, 1), (0.1, 2), (0.0, 3)])
def test_a_skipped_step_changes_nothing(mean: float, accumulate: int, tmp_path: Path) -> None:
    (watched,) = run(tmp_path, black={7}, mean=mean, action="skip", accumulate_grad_batches=accumulate)
    (bad,) = steps_with(7, watched, accumulate)
    assert len(watched["states"]) == NUM_ROWS // BATCH // accumulate + 1
    for step, (before, after) in enumerate(zip(watched["states"], watched["states"][1:], strict=False)):
        assert same(before, after) == (step == bad), step
        assert all(torch.as_tensor(value).isfinite().all() for value in after.values())
    assert watched["states"][-1]["updates"] == len(watched["states"]) - 2
    assert watched["skipped"] == 1
    record = json.loads((tmp_path / "non_finite_rank0.json").read_text())
    assert record["step"] == bad
    assert 7 in torch.load(tmp_path / "non_finite_rank0.pt", weights_only=True)["batch"]["index"] or mean == 0.0


def test_skips_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"at step 2.*2 steps before it were skipped; callbacks\.guard\.max_skips"):
        run(tmp_path, black=set(range(NUM_ROWS)), mean=0.1, action="skip", max_skips=2)
    assert json.loads((tmp_path / "non_finite_rank0.json").read_text())["step"] == 0  # where it began


def test_weights_and_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Objective, batch: Batch, batch_idx: int) -> None:
            if trainer.global_step == 1:
                module.backbone.head.weight.data[0] = torch.inf

    with pytest.raises(NonFiniteError, match=r"step 1: the parameter backbone\.head\.weight is not finite already"):
        fit_with(tmp_path, Poison())

    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Objective, batch: Batch, batch_idx: int) -> None:
            batch["views"][0][0, 0, 0, 0] = torch.nan

    with pytest.raises(NonFiniteError, match="step 0: the batch's views are not finite already"):
        fit_with(tmp_path, Spoil())


def fit_with(folder: Path, callback: Callback) -> None:
    data = DataModule(
        train=Grays(set()), eval={}, views={"one": View(size=4, scale=(1, 1))}, batch_size=BATCH, eval_batch_size=4,
        image_size=4, seed=3, mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, callbacks=[callback, NonFiniteGuard(folder)],
    )  # fmt: skip
    trainer.fit(Roots(), datamodule=data)


@pytest.mark.parametrize(("mean", "gathers", "accumulate"), [(0.1, False, 2), (0.1, True, 1), (0.0, True, 1)])
def test_two_processes_skip_together(mean: float, gathers: bool, accumulate: int, tmp_path: Path) -> None:
    options = {"action": "skip", "accumulate_grad_batches": accumulate, "devices": 2}
    ranks = run(tmp_path, black={7}, mean=mean, gathers=gathers, **options)
    (bad,) = {step for watched in ranks for step in steps_with(7, watched, accumulate)}
    assert [watched["skipped"] for watched in ranks] == [1, 1]
    assert len(ranks[0]["states"]) == NUM_ROWS // BATCH // accumulate + 1
    for step in range(len(ranks[0]["states"])):
        weights = [
            {k: v for k, v in watched["states"][step].items() if "norm" not in k} for watched in ranks
        ]  # each rank has statistics of its own
        assert same(*weights), step
        for watched in ranks:
            assert all(torch.as_tensor(value).isfinite().all() for value in watched["states"][step].values())
            if step:
                assert same(watched["states"][step - 1], watched["states"][step]) == (step - 1 == bad)
    records = [json.loads((tmp_path / f"non_finite_rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [record["step"] for record in records] == [bad, bad]
    assert sum(7 in record["index"] for record in records) == 1


def test_two_processes_stop_together(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="is not finite at step"):
        run(tmp_path, black={7}, mean=0.1, devices=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"non_finite_rank{r}.{k}" for r in (0, 1) for k in ("json", "pt")
    }
