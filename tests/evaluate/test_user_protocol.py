"""A protocol of one's own, named on the command line, in both programs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from repr.config import CONF, ConfigError
from repr.evaluate.__main__ import main as evaluate
from repr.evaluate.protocol import Protocol, read_protocols
from repr.evaluate.tables import Tables
from repr.fit import main as fit

HERE = "tests.evaluate.test_user_protocol"
SMALL = [
    "smoke=true", "backbone.name=test_resnet", "text.layers=1", "callbacks.progress=null", "callbacks.pictures=null",
    "logger.tensorboard=null", "trainer.accelerator=cpu", "trainer.limit_val_batches=1.0", "data.eval_batch_size=256",
]  # fmt: skip


@dataclass
class Share(Protocol):
    """The share of pictures whose trunk is longer than the median of the bank, times a factor, and of captions."""

    factor: float
    names: list[str]
    needs = ("bank", "captions")
    said: ClassVar = {"features": "trunk, text"}
    meanings: ClassVar = {"(wid)th": r"How \1e; neither direction is better."}

    def compute(self, tables: Tables, name: str) -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
        bank, query = tables.pictures("bank"), tables.captioned(name)
        assert query is not None
        assert query.text is not None
        median = bank.trunk.norm(dim=1).median()
        share = self.factor * (query.trunk.norm(dim=1) > median).double().mean().item()
        yield {self.names[0]: share, f"{self.names[0]}.chance": 0.5 * self.factor}, {"bank": len(bank.trunk)}
        yield {self.names[1]: query.text.shape[1]}, {}


def test_it_runs_in_both_and_is_recorded(tmp_path: Path) -> None:
    mine = [f"+eval.mine._target_={HERE}.Share", "+eval.mine.factor=2.0", "+eval.mine.names=[share, width]"]
    run = tmp_path / "run"
    fit([*SMALL, *mine, f"run_folder={run}", "eval.headline=[val/share]"])
    during = json.loads((run / "results.json").read_text())
    assert during["val/share"]["chance"] == 1
    assert during["val/width"] == {"value": 128, "chance": None}
    evaluate([f"model={run}", "eval=[]", *mine, f"out={tmp_path}/out", "trainer.accelerator=cpu"])
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())
    numbers = [f"{name}/{number}" for name in ("val", "test_style") for number in ("share", "width")]
    assert list(after["results"]) == numbers
    assert after["results"]["val/share"]["value"] == pytest.approx(during["val/share"]["value"], abs=0.01)
    assert after["results"]["val/share"]["meaning"] == ""
    assert after["results"]["val/width"]["meaning"] == "How wide; neither direction is better."
    record = after["results"]["val/share"]["protocol"]
    told = {"eval": "mine", "factor": 2.0, "names": ["share", "width"], "bank": 64, "features": "trunk, text"}
    assert record.items() >= (told | {"resolution": 32, "stored": "float32"}).items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"+eval.mine._target_={HERE}.Nothing"], "eval.mine._target_: .* does not import"),
        (["+eval.mine.k=3"], r"eval\.mine is no protocol .*set eval\.mine\._target_ to a subclass of repr\.evaluate"),
        (["+eval.mine._target_=repr.metrics.ridge.ridge", "+eval.mine._partial_=true"], r"eval\.mine is no protocol"),
        ([f"+eval.mine._target_={HERE}.Share", "+eval.mine.names=[a,b]"], r"eval\.mine\.factor has no value"),
    ],
)
def test_what_names_no_protocol_is_one_clear_error_in_both(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}"):
        fit([*SMALL, *words, f"run_folder={tmp_path}/run"])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        evaluate(["model=timm:test_resnet", "eval=[]", *words, f"out={tmp_path}/out", f"cache={tmp_path}/cache"])


@pytest.mark.parametrize("key", sorted(path.stem for path in (CONF / "evaluate").glob("*.yaml")))
def test_a_number_of_a_protocol_that_cannot_be_zero_is_refused_before_anything_is_trained(key: str) -> None:
    may_be_zero = {"exponents", "momentum", "weight_decay", "warmup_epochs"}
    node: Any = yaml.safe_load((CONF / "evaluate" / f"{key}.yaml").read_text().replace("${image_size}", "32"))
    for name in node.keys() - may_be_zero:
        wrong = {int: [0], float: [0.0], list: [[0], []]}.get(type(node[name]), [])
        for value in [*wrong, *([1.0] if name == "held_out" else [])]:
            with pytest.raises(ConfigError, match=rf"^eval\.{key}\.{name}=.*; set it (above 0|between 0 and 1)$"):
                read_protocols({key: node | {name: value}})
    for kind, metric in (node.get("metrics") or {}).items():
        for name in ("k", "temperature", "max_cells"):
            if name in metric:
                changed = node | {"metrics": node["metrics"] | {kind: metric | {name: 0}}}
                with pytest.raises(ConfigError, match=rf"^eval\.{key}\.metrics\.{kind}\.{name}=0; set it above 0$"):
                    read_protocols({key: changed})
    assert read_protocols({key: node})


def test_fine_tuning_is_refused_during_training(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"eval\.finetune trains a copy of the encoder: leave it to python -m"):
        fit([*SMALL, "+evaluate=finetune", f"run_folder={tmp_path}/run"])


def test_protocols_of_repr_evaluate_run_during_training(tmp_path: Path) -> None:
    more = ["+evaluate=[linear,lidar]", "eval.linear.max_iter=20", "eval.lidar.num_samples=6", "eval.lidar.num_views=3"]
    fit([*SMALL, *more, "eval.ridge=null", f"run_folder={tmp_path}/run"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() >= {"val/linear_category", "val/linear_category_C", "val/lidar_image", "val/lidar_trunk"}
    assert not any("ridge" in name for name in results)
