"""Sets of questions, and LiDAR: in training and by `repr.evaluate`, on a run of two steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from repr.config import compose
from repr.config_check import check
from repr.data.colour import colour_views
from repr.data.drawn.composition import DrawnComposition
from repr.data.eval_datasets import RepeatedViews
from repr.data.views import View, crop_views, draw
from repr.evaluate.evaluation import config, evaluate, read_encoder
from repr.fit import fit
from repr.metrics.geometry import lidar
from repr.seeds import sample_seed
from tests.drawn_pairs import SCENES

OF_LIDAR = ["eval.lidar.num_samples=5", "eval.lidar.num_views=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A captioner's run on drawn questions, whose sets are of each kind, and what it found at its end."""
    folder = tmp_path_factory.mktemp("questions") / "run"
    options = [
        "experiment=clip_composition",
        "objective=coca",
        "objective.num_queries=4",
        "smoke=true",
        f"run_folder={folder}",
        "trainer.limit_val_batches=1.0",
    ]
    options += ["backbone.name=test_resnet", "data.train.num_items=8", "data.eval.composition.num_items=4"]
    options += ["callbacks.progress=null", "trainer.accelerator=cpu"]
    options += ["+data.eval.mmvp={_target_: tests.drawn_pairs.DrawnPairs, size: 32, pairs: 2}"]
    return folder, fit(
        compose([*options, "+data.eval.none={_target_: repr.data.drawn.scenes.Scenes, split: val, num_images: 9}"])
    )


def test_sets_of_questions_are_scored_by_split(run: tuple[Path, dict[str, Any]]) -> None:
    results = run[1]
    assert results["mmvp/num_items"] == (18, None)
    values = [results[f"mmvp/image_score_{name}"] for name in SCENES]
    assert all(value in (0, 0.5, 1) and chance == 0.25 for value, chance in values)
    for name in ("mmvp/image_score", "mmvp/macro_image_score"):
        assert results[name] == (pytest.approx(sum(value for value, _ in values) / 9), 0.25)
    assert not any(name.startswith("mmvp/text_score") for name in results)
    assert results["composition/num_items"] == (16, None)
    kinds = ("attribute", "relation", "count")
    for kind, chance in [*((f"text_score_{kind}", 1 / 4) for kind in kinds), ("text_score_order", 1 / 5)]:
        assert results[f"composition/{kind}"][1] == pytest.approx(chance)
    assert [results[f"composition/group_score_{kind}"][1] for kind in kinds] == pytest.approx([1 / 6] * 3)
    assert "composition/group_score_order" not in results
    for name in ("composition/text_score", "composition/group_score_count", "mmvp/image_score"):
        value, chance = results[name.replace("/", "/likelihood_")]
        assert 0 <= value <= 1
        assert chance == results[name][1]
    assert results["composition/likelihood_text_score"] != results["composition/text_score"]


def test_repr_evaluate_gives_the_same_and_says_what_asks_nothing(run: tuple[Path, dict[str, Any]]) -> None:
    folder, online = run
    words = [f"model={folder}", "trust=true", "eval=[compositional,lidar]", *OF_LIDAR, "callbacks.progress=null"]
    cfg, name, files = config([*words, "trainer.accelerator=cpu"])
    check(cfg)
    found = evaluate(cfg, data_name=name, class_files=files)
    assert found["left_out"] == {"none/compositional": "none asks no questions"}
    scores = {name: entry for name, entry in found["results"].items() if "lidar" not in name}
    expected = {name: value for name, value in online.items() if "_score" in name or name.endswith("/num_items")}
    assert scores.keys() == expected.keys()
    for name, (value, chance) in expected.items():
        assert (scores[name]["value"], scores[name]["chance"]) == (pytest.approx(value), chance), name
    protocol = found["results"]["composition/text_score"]["protocol"]
    assert {key: protocol[key] for key in ("eval", "resolution", "ties", "context_length")} == {
        "eval": "compositional", "resolution": 32, "ties": "count as failures", "context_length": 16,
    }  # fmt: skip

    assert {name for name in found["results"] if "lidar" in name} == {
        f"{name}/lidar_{features}" for name in ("composition", "mmvp", "none") for features in ("image", "trunk")
    }
    entry = found["results"]["mmvp/lidar_image"]
    told = entry["protocol"]
    assert (told["num_samples"], told["num_views"], told["delta"], told["features"]) == (5, 3, 1e-4, "image")
    encoder = read_encoder(str(folder), None, trust=True)
    view = View(**told["view"])
    rows = [0, 7, 14, 21, 28]  # of 36, evenly spread
    source = cfg_source(folder)
    samples = []
    for row in rows:
        seeds = sample_seed(told["seed"], torch.arange(3), torch.full((3,), row))
        crops, colour = draw(seeds, [view])
        pixels, _ = crop_views([source.image(row)] * 3, crops, [view])
        with torch.no_grad():
            samples.append(encoder.module.encode_image(*colour_views(pixels, colour, encoder.mean, encoder.std)))
    assert entry["value"] == pytest.approx(lidar(torch.stack(samples)), rel=1e-4)


def cfg_source(folder: Path) -> Any:
    """The set ``mmvp`` of the run."""
    from hydra.utils import instantiate

    from repr.runs.folder import load_run

    return instantiate(load_run(folder, trust=True).data.eval.mmvp)


class Damaged(DrawnComposition):
    """A set whose row 1 cannot be read."""

    def image(self, index: int) -> Any:
        if index == 1:
            raise OSError("row 1: no picture")
        return super().image(index)


def test_views_follow_each_other_and_bad_rows_are_told() -> None:
    data = RepeatedViews(Damaged(size=32, num_items=2), torch.tensor([0, 1, 3]), 2, View(size=16, scale=(0.3, 1)), 0)
    batch = data.__getitems__(list(range(6)))
    assert len(data) == 6
    assert batch["index"].tolist() == [0, 1, -3, -4, 4, 5]
    assert batch["bad"] == [(1, "row 1: no picture")]
    pixels = batch["views"][0]
    assert pixels.shape == (6, 3, 16, 16)
    assert not torch.equal(pixels[0], pixels[1])
    assert torch.equal(data.__getitems__([5])["views"][0][0], pixels[5])  # whatever the batch
