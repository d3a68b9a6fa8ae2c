"""Re-ranking by match logit, in a run and after it: the scores of all pairs, one by one, and the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from repr.config import compose
from repr.data.views import evaluation_view
from repr.evaluate.__main__ import main as evaluate
from repr.fit import fit, main
from repr.metrics.rerank import reranked
from repr.runs.trained import Trained

QUIET = ["trainer.accelerator=cpu", "callbacks.progress=null"]
RUN = [
    *QUIET, "objective=albef", "smoke=true", "data=composition", "data.train.num_items=16",
    "data.eval.composition.num_items=5", "data.eval.composition.kinds=[relation]", "eval=matching",
    "eval.exhibits=null", "eval.geometry=null", "eval.knn=null", "eval.ridge=null", "eval.rerank.batch_size=7",
    "callbacks.pictures=null", "logger.tensorboard=null", "backbone=vit_emoji", "objective.queue_length=16",
    "embed_dim=64",
]  # fmt: skip


@pytest.mark.slow
def test_the_numbers_are_those_of_all_pairs_during_training_and_after(tmp_path: Path) -> None:
    run = tmp_path / "run"
    during = fit(compose([*RUN, f"run_folder={run}"]))
    evaluate([f"model={run}", "eval=[rerank]", f"out={tmp_path}/out", *QUIET])
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    names = [name for name in during if "reranked" in name]
    assert len(names) == 6
    assert {name: during[name][0] for name in names} == {name: after[name]["value"] for name in names}

    trained = Trained.read(run)
    source = compose(RUN).data.eval.composition
    objective: Any = trained.objective.eval()
    pictures = instantiate(source)
    rows = range(len(pictures))
    images = torch.stack([evaluation_view(pictures.image(row), 32) for row in rows]).float() / 255
    mean, std = (torch.tensor(trained.cfg.data[name])[:, None, None] for name in ("mean", "std"))
    texts = sorted({text for row in rows for text in pictures.captions(row)})
    right = torch.tensor([(row, texts.index(text)) for row in rows for text in pictures.captions(row)])
    tokenizer = instantiate(trained.cfg.tokenizer)
    with torch.no_grad():
        tokens = objective.encode_tokens((images - mean) / std)
        logits = torch.stack([objective.match(tokens, tokenizer([text]).expand(len(tokens), -1)) for text in texts], 1)
        scores = logits[..., 1] - logits[..., 0]  # all are among the nearest
        image, text = objective.encode_image((images - mean) / std), objective.encode_text(tokenizer(texts))
    assert len(texts) <= 16
    listed = torch.arange(len(texts)).expand(len(images), -1)
    expected = reranked(image, text, right, listed, scores)
    for key, value in expected.items():
        if not key.endswith(".chance"):
            assert during[f"composition/reranked_i2t_{key}"] == (
                pytest.approx(value),
                pytest.approx(expected[f"{key}.chance"]),
            )


@pytest.mark.slow
def test_an_encoder_that_sees_one_half_is_refused(tmp_path: Path) -> None:
    words = [word for word in RUN if "queue" not in word]
    with pytest.raises(SystemExit, match=r"eval\.rerank needs an encoder that scores pairs: set objective=albef"):
        main([*words, "objective=clip", f"run_folder={tmp_path}"])
