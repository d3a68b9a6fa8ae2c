"""Rows of one picture are one picture, and pictures with one caption share it, in both programs that evaluate."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch import Tensor

from repr.batch import Batch, Embeddings
from repr.config import compose
from repr.data.datamodule import DataModule
from repr.data.questions.compositional import Case, Cases
from repr.data.sources.shards import Shards
from repr.data.sources.source import first_rows
from repr.data.sources.table import Table
from repr.data.views import View
from repr.evaluate.during_training import Evaluation
from repr.evaluate.encoder import Encoder
from repr.evaluate.protocol import compute, plan, read_protocols
from repr.evaluate.stored_tables import StoredTables
from tests.data.test_tables_and_shards import sample, tar

PROTOCOLS: dict[str, Any] = {
    "retrieval": {"_target_": "repr.evaluate.protocols.Retrieval", "ks": [1], "memory": 1},
    "knn": {"_target_": "repr.evaluate.probes.KNN", "k": 1, "temperature": 0.1},
}


class Perfect(pl.LightningModule):
    """Tells four shades apart, of which the last two go by one name, and the number in a text."""

    def embed(self, batch: Batch) -> Embeddings:
        shade = (batch["image"].mean((1, 2, 3)) * 3).round().long()
        image, trunk = (torch.nn.functional.one_hot(number, 4).float() for number in (shade.clamp(max=2), shade))
        return Embeddings(image=image, trunk=trunk, text=self.encode_text(batch["text"]) if "text" in batch else None)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens[:, 0], 4).float()

    validation_step = predict_step = lambda self, batch, batch_idx, dataloader_idx=0: self.embed(batch)


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[int(text.split()[1]), len(text)] for text in texts])


def evaluated(source: Any, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """What both programs find: name -> value, and name.chance -> its level at chance, during training, and after it."""
    data = DataModule(
        train=source, eval={"val": source}, views={"v": View(size=8, scale=(1, 1))}, batch_size=2, eval_batch_size=3,
        image_size=8, seed=0, mean=[0, 0, 0], std=[1, 1, 1], tokenizer=tokenize,
    )  # fmt: skip
    evaluation = Evaluation(**PROTOCOLS)
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(**quiet, callbacks=[evaluation], use_distributed_sampler=False).validate(Perfect(), data, verbose=False)
    during = {name: value for name, (value, _) in evaluation.results.items()}
    during |= {f"{name}.chance": chance for name, (_, chance) in evaluation.results.items()}

    encoder = Encoder.of_objective(Perfect(), 8, data.mean, data.std, tokenize)
    small = ["trainer.accelerator=cpu", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
    cfg = compose(["model=x", *small], root="evaluate")
    data.trainer = None
    tables = StoredTables(encoder, data, cfg, folder / "features")
    planned = plan(read_protocols(PROTOCOLS), tables)
    tables.extract()
    numbers, _ = compute(planned, tables)
    after = {name: number.value for name, number in numbers.items()}
    return during, after | {f"{name}.chance": number.chance for name, number in numbers.items()}


@pytest.mark.parametrize(("kind", "group_by"), [("csv", None), ("jsonl", None), ("csv", "image")])
def test_a_perfect_encoder_is_right_where_a_picture_has_several_rows(
    kind: str, group_by: str | None, tmp_path: Path
) -> None:
    """The third picture shares all its captions with the fourth; a path has two spellings, a caption stands twice."""
    for number in range(4):
        Image.new("RGB", (8, 8), (85 * number,) * 3).save(tmp_path / f"{number}.png")
    rows = [
        ("./" * (n == 2) + f"{number}.png", f"picture {min(number, 2)} in words {n % 4}", f"class {number}")
        for n in range(5)
        for number in range(4)
    ]
    if kind == "csv":
        text = "\n".join(map(",".join, [("image", "caption", "label"), *rows]))
    else:
        text = "\n".join(f'{{"image": "{i}", "caption": "{c}", "label": "{y}"}}' for i, c, y in rows)
    (tmp_path / f"t.{kind}").write_text(text)
    source = Table(tmp_path / f"t.{kind}", captions=["caption"], labels=["label"], group_by=group_by)
    assert len(source) == (4 if group_by else 20)
    during, after = evaluated(source, tmp_path)
    for found in (during, after):
        assert found["val/knn_label"] == 1
        assert found["val/knn_label.chance"] == 0.25  # each picture counts once
        assert (found["val/i2t_R@1"], found["val/t2i_R@1"]) == (1, 1)
    assert during["val/i2t_R@1.chance"] == pytest.approx(1 / 3)  # among the first captions
    assert after["val/i2t_R@1.chance"] == pytest.approx(4 / 12)  # among all
    assert during["val/t2i_R@1.chance"] == pytest.approx((1 + 1 + 2) / 3 / 4)


def test_questions_and_shards_of_one_name_stay_apart(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    asked = Cases(tmp_path, [Case("0.png", "0.png", f"a {n}", (f"b {n}",)) for n in range(3)], split="kind")
    assert first_rows(asked, torch.arange(3)).tolist() == [0, 1, 2]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tar(tmp_path / name / "0.tar", *sample("0"))
    shards = Shards([str(tmp_path / name / "0.tar") for name in ("a", "b")])
    assert [shards.key(row) for row in range(2)] == ["a/0.tar/0", "b/0.tar/0"]
    assert first_rows(shards, torch.arange(2)).tolist() == [0, 1]
