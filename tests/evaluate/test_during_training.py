"""From rows of batches to tables, and from results to what is printed."""

import io

import torch
from rich.console import Console

from repr.evaluate.during_training import Evaluation, Metric, feature_table, results_table
from repr.metrics.features import Features


def test_rows_that_fill_up_a_batch_are_dropped_and_order_is_that_of_the_data() -> None:
    def rows(index: list[int]) -> dict[str, torch.Tensor]:
        x = torch.tensor(index)
        return {
            "image": x[:, None].float(),
            "trunk": x[:, None] * 2.0,
            "text": x[:, None] * 3.0,
            "batch.index": x,
            "batch.text": torch.stack([x % 2, x % 2], 1),
            "batch.label": torch.stack([x, -x], 1),
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
    rows = [{"image": index[:, None].float(), "trunk": index[:, None].float(), "batch.index": index}]
    table = feature_table(rows, {})
    assert table.index.tolist() == [0, 3]
    assert table.image[:, 0].tolist() == [0, 3]


def test_a_set_without_text_or_labels_has_none() -> None:
    table = feature_table([{"image": torch.ones(2, 3), "trunk": torch.ones(2, 4), "batch.index": torch.arange(2)}], {})
    assert (table.text, table.caption, table.labels) == (None, None, {})


def test_what_needs_captions_or_shared_classes_is_left_out_without_them() -> None:
    def metric(name: str) -> Metric:
        return lambda *tables, attribute="": {name + attribute: 1.0}

    evaluation = Evaluation(metrics={"m": metric("m")}, pairs={"p": metric("p")}, probes={"q": metric("q_")})
    index, x = torch.arange(4), torch.ones(4, 2)
    labels = {"a": torch.tensor([0, 1, 2, -1]), "b": torch.tensor([0, 0, 0, 0]), "c": torch.tensor([3, 4, 3, 4])}
    bank = Features(
        index, x, x, labels={"a": torch.tensor([1, 1, 1, 1]), "b": torch.zeros(4).long(), "c": torch.zeros(4).long()}
    )
    assert evaluation._compute(bank, Features(index, x, x, labels=labels)) == {"m": 1, "q_a": 1}
    assert evaluation._compute(bank, Features(index, x, x, text=x, labels={})) == {"m": 1, "p": 1}


def test_probes_look_at_every_pooling_and_pairs_at_none() -> None:
    def rows(index: list[int]) -> dict[str, torch.Tensor]:
        x = torch.tensor(index)
        kept = {"batch.index": x, "batch.label": x[:, None] % 2, "image": x[:, None].float()}
        return kept | {"trunk": x[:, None] * 2.0, "trunk.mean_pool": x[:, None] * 3.0}

    def probe(bank: Features, query: Features, *, attribute: str) -> dict[str, float]:
        return {f"q_{attribute}": query.trunk.sum().item(), f"q_{attribute}.chance": bank.trunk.sum().item()}

    bank, query = (feature_table([rows(index)], {"a": []}) for index in ([0, 1], [0, 2, 3]))
    values = Evaluation(probes={"q": probe})._compute(bank, query)
    assert values == {"q_a": 10, "q_a.chance": 2, "mean_pool_q_a": 15, "mean_pool_q_a.chance": 3}


def test_the_printed_table_has_each_number_beside_its_chance() -> None:
    out = io.StringIO()
    results = {"val/i2t_R@1": (0.25, 0.0034), "test/i2t_R@1": (0.5, 0.01), "val/uniformity": (-3.2, None)}
    Console(file=out, width=100).print(results_table(results))
    lines = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    assert ["i2t_R@1", "0.250", "0.0034", "0.500", "0.0100"] in lines
    assert ["uniformity", "-3.200"] in lines
