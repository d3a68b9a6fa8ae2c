"""From rows of batches to tables, from tables to numbers, and from results to what is printed."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from repr.evaluate.during_training import GatheredTables, joined
from repr.evaluate.probes import Probe
from repr.evaluate.protocol import Protocol, compute, plan, read_protocols
from repr.metrics.features import Features

Rows = list[dict[str, torch.Tensor]]


def gathered(attributes: dict[str, list[str]], **rows: Rows) -> GatheredTables:
    """The tables of sets from the batches of one process."""
    data: Any = SimpleNamespace(
        eval_names=list(rows), attributes=attributes, image_size=8, mean=[0.5], std=[0.5], tokenizer=list,
        bank_size=4, evaluated=lambda name: ([], torch.arange(10)),
    )  # fmt: skip
    trainer: Any = SimpleNamespace(datamodule=data, precision="32-true")
    module: Any = SimpleNamespace(device=torch.device("cpu"), encode_text=None)
    tables = GatheredTables(trainer, module)
    tables.begin({name: joined(batches) for name, batches in rows.items()})
    return tables


def feature_table(rows: Rows, attributes: dict[str, list[str]]) -> Features:
    return gathered(attributes, val=rows).pictures("val")


def test_rows_that_fill_up_a_batch_are_dropped_and_order_is_that_of_the_data() -> None:
    def rows(index: list[int]) -> dict[str, torch.Tensor]:
        x = torch.tensor(index)
        return {
            "image": x[:, None].float(),
            "trunk": x[:, None] * 2.0,
            "text": x[:, None] * 3.0,
            "index": x,
            "tokens": torch.stack([x % 2, x % 2], 1),
            "label": torch.stack([x, -x], 1),
        }

    table = feature_table([rows([4, 5, 0]), rows([1, 9, 9])], {"a": [], "b": []})
    assert table.index.tolist() == [0, 1, 4, 5, 9]
    assert table.image[:, 0].tolist() == [0, 1, 4, 5, 9]
    assert table.trunk[:, 0].tolist() == [0, 2, 8, 10, 18]
    assert table.caption.tolist() == [0, 1, 0, 1, 1]
    assert table.labels["a"].tolist() == [0, 1, 4, 5, 9]
    assert table.labels["b"].tolist() == [0, -1, -4, -5, -9]


def test_rows_that_could_not_be_read_are_left_out() -> None:
    index = torch.tensor([3, -2, 0, -2])
    x = index[:, None].float()
    table = feature_table([{"image": x, "trunk": x, "index": index, "label": torch.empty(4, 0)}], {})
    assert table.index.tolist() == [0, 3]
    assert table.image[:, 0].tolist() == [0, 3]


def test_a_set_without_text_or_labels_has_none() -> None:
    rows = {"image": torch.ones(2, 3), "trunk": torch.ones(2, 4), "index": torch.arange(2), "label": torch.empty(2, 0)}
    table = feature_table([rows], {})
    assert (table.text, table.caption, table.labels) == (None, None, {})


class One(Protocol):
    """A protocol of one number, 1."""

    def __init__(self, number: str, *needs: str) -> None:
        self._number, self.needs = number, needs  # type: ignore[misc]

    def compute(self, tables: Any, name: str) -> Any:
        yield {self._number: 1.0}, {}


@dataclass
class Sums(Probe):
    """A probe that tells which tables it was given."""

    @staticmethod
    def metric(bank: Features, query: Features, *, attribute: str) -> dict[str, float]:
        name = f"q_{attribute}"
        return {name: query.trunk.sum().item(), f"{name}.chance": bank.trunk.sum().item()}


def numbers(tables: GatheredTables, **protocols: Protocol) -> dict[str, tuple[float, float | None]]:
    found, _ = compute(plan(read_protocols(protocols), tables), tables)
    return {name: (number.value, number.chance) for name, number in found.items()}


def test_what_needs_captions_or_shared_classes_is_left_out_without_them() -> None:
    index, x = torch.arange(4), torch.ones(4, 2)

    def rows(*labels: list[int], **more: torch.Tensor) -> Rows:
        return [{"index": index, "image": x, "trunk": x, "label": torch.tensor(labels).T, **more}]

    attributes: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    bank = rows([1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0])
    labelled = rows([0, 1, 2, -1], [0, 0, 0, 0], [3, 4, 3, 4])
    captioned = rows([-1] * 4, [-1] * 4, [-1] * 4, text=x)
    tables = gathered(attributes, bank=bank, labelled=labelled, captioned=captioned)
    values = numbers(tables, m=One("m"), p=One("p", "captions"), q=Sums())
    assert values.keys() == {"labelled/m", "labelled/q_a", "captioned/m", "captioned/p"}
    assert tables.left_out == {
        "labelled/p": "labelled has no captions", "captioned/q": "captioned has no labels",
    }  # fmt: skip


def test_probes_look_at_every_pooling_and_say_which() -> None:
    def rows(index: list[int]) -> Rows:
        x = torch.tensor(index)
        kept = {"index": x, "label": x[:, None] % 2, "image": x[:, None].float()}
        return [kept | {"trunk": x[:, None] * 2.0, "trunk.mean_pool": x[:, None] * 3.0}]

    tables = gathered({"a": []}, bank=rows([0, 1]), val=rows([0, 2, 3]))
    assert numbers(tables, q=Sums()) == {"val/q_a": (10, 2), "val/mean_pool_q_a": (15, 3)}
    found, _ = compute(plan(read_protocols({"q": Sums()}), tables), tables)
    records = [number.protocol for number in found.values()]
    assert [record.get("features") for record in records] == [None, "mean_pool"]
    assert {(record["eval"], record["bank"], record["resolution"], record["stored"]) for record in records} == {
        ("q", 4, 8, "float32")
    }


@pytest.mark.parametrize("node", [{"k": 3}, {"_target_": "repr.metrics.knn.knn"}, {"_target_": "pathlib.Path"}, 3])
def test_what_is_no_protocol_is_refused(node: Any) -> None:
    with pytest.raises(ValueError, match=r"eval\.mine is no protocol .*set eval\.mine\._target_ to a subclass of repr"):
        read_protocols({"mine": node})
