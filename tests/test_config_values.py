"""Values that are out of range are told before torch is imported, by the name of the option that sets them."""

import lightning.pytorch as pl
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.trainer.states import TrainerFn

from repr.cli import user_message
from repr.config import ConfigError, compose
from repr.config_check import check, value_faults
from repr.training.trainer import make_trainer

CALLBACKS = "lightning.pytorch.callbacks"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["seed=-1"], "seed=-1; set it to a whole number from 0 to 4294967295"),
        (["run_folder="], "run_folder is empty: name a folder, or leave it out"),
        (["trainer.devices=0"], "trainer.devices=0; set it to the number of processes of a machine, or to auto"),
        (["trainer.devices=-5"], "trainer.devices=-5; set it to the number of processes of a machine, or to auto"),
        (["trainer.num_nodes=0"], "trainer.num_nodes=0; set it to a whole number of 1 or more"),
        (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0; set it to a whole number of 1 or"),
        (["trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0; set it to a whole number of 1 or"),
        (["trainer.max_epochs=1.5"], "trainer.max_epochs=1.5; set it to a whole number of 0 or more"),
        (["trainer.max_epochs=-1"], "the run has no end: set trainer.max_epochs or trainer.max_steps"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1; set it to the largest norm of a gradient"),
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0 trains nothing: set it above 0, or to null"),
        (["data.num_workers=-1"], "data.num_workers=-1; set it to 0 or more"),
        (["objective=simclr", "objective.dim=0"], "objective.dim=0; set it to 1 or more"),
        (["objective=byol", "objective.hidden_dim=-1"], "objective.hidden_dim=-1; set it to 1 or more"),
        (["objective=mocov2", "objective.queue_length=-1"], "objective.queue_length=-1; set it to 0 or more"),
        (["objective=swav", "objective.temperature=0"], "objective.temperature=0; set it above 0"),
        (["objective=swav", "objective.epsilon=0"], "objective.epsilon=0; set it above 0"),
        (["objective=pixpro", "objective.threshold=0"], "objective.threshold=0; set it above 0"),
        (["objective=slip", "objective.parts.simclr.dim=0"], "objective.parts.simclr.dim=0; set it to 1 or more"),
        (["objective=simclr", "views.main.size=null"], "views.main.size is null, and repr.data.views.View needs a"),
        (["objective=albef", "embed_dim=0"], "embed_dim=0; set it to 1 or more"),
        (
            [f"+callbacks.average={{_target_: {CALLBACKS}.StochasticWeightAveraging, swa_lrs: 0.01}}"],
            "callbacks.average is a StochasticWeightAveraging: it takes the schedules of optim away",
        ),
        (
            [f"+callbacks.more={{_target_: {CALLBACKS}.GradientAccumulationScheduler, scheduling: {{0: 2}}}}"],
            "callbacks.more is a GradientAccumulationScheduler: a resumed run finds its place",
        ),
    ],
)
def test_a_value_out_of_range_is_told_once(options: list[str], fault: str) -> None:
    found = value_faults(compose([*options, *([] if "run_folder=" in options else ["run_folder=x"])]))
    assert [text for text in found if text.startswith(fault)] == found
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("objective.weights.contrast=nan", r"weights\.contrast=nan; set it to a number, or to 0"),
        ("optim.lr=-1", r"optim\.lr is -1; set it to a number of 0 or more"),
        ("optim.weight_decay=nan", r"optim\.weight_decay is nan; set it to a number of 0 or more"),
    ],
)
def test_what_a_constructor_refuses_is_told_by_the_check(option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(compose(["objective=simclr", "backbone.name=test_resnet", option, "run_folder=x"]))


@pytest.mark.parametrize(
    ("callback", "option"), [("collapse", "every=0"), ("pictures", "num_samples=0"), ("guard", "max_skips=-1")]
)
def test_what_a_callback_refuses_is_one_line(callback: str, option: str) -> None:
    cfg = compose([f"callbacks.{callback}.{option}"])
    with pytest.raises(InstantiationException) as caught:
        instantiate(cfg.callbacks[callback])
    assert str(user_message(caught.value)).startswith(f"callbacks.{callback}.{option}; set it to ")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("trainer.strategy=foo", "trainer: You selected an invalid strategy name: `strategy='foo'`"),
        ("trainer.precision=foo", "trainer: Precision 'foo' is invalid"),
        ("trainer.limit_train_batches=-1", "trainer: You have passed invalid value -1 for limit_train_batches"),
    ],
)
def test_what_the_trainer_refuses_is_one_line(option: str, words: str) -> None:
    cfg = compose(["objective=simclr", option, "run_folder=x"])
    with pytest.raises(Exception) as caught:  # noqa: PT011
        make_trainer(cfg, [], [])
    message = user_message(caught.value)
    assert message is not None
    assert message.startswith(words)
    assert "\n" not in message


def test_a_number_that_early_stopping_misses_is_one_line() -> None:
    stopping = pl.callbacks.EarlyStopping("val/nothing")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(RuntimeError) as caught:
        stopping.on_validation_end(trainer, pl.LightningModule())
    message = user_message(caught.value)
    assert message is not None
    assert message.startswith("callbacks: Early stopping conditioned on metric `val/nothing`")
