"""OBoW against trajectories of the authors' code, its vocabulary on one process and on two, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.distributed import rank
from repr.models.backbone import backbone
from repr.models.vocabulary import Vocabulary
from repr.objectives.bow import OBoW
from repr.seeds import uniform
from tests.golden import golden
from tests.losses.test_golden_teachers import close
from tests.objectives.conftest import make_batch
from tests.objectives.test_momentum import slots
from tests.parity_cases import in_processes

OBOW, TWO = golden("obow"), golden("ssl_dist2")


class Blocks(nn.Module):
    """The encoder of the golden runs, with the part of timm's interface that the flow takes."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.num_features, self.feature_info = widths[-1], [{"num_chs": width} for width in widths]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2 if i == 3 else 1, padding=1, bias=False), nn.BatchNorm2d(o))
            for i, o in zip([3, *widths[:-1]], widths, strict=True)
        )

    def forward_intermediates(self, x: Tensor, indices: int, **_: Any) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x).relu()
            maps.append(x)
        return maps[-indices:]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x, 1)[0].mean((2, 3))


def places(picked: Tensor, num: int) -> Tensor:
    """Seeds (B,) whose draws choose these places (L, B) among ``num``."""
    draws = (uniform(torch.arange(1000), len(picked)).double() * num).long()  # (1000, L)
    return torch.stack([(draws == wanted).all(1).nonzero()[0, 0] for wanted in picked.T])


@pytest.mark.parametrize("case", ["model_two_levels", "model_one_level"])
def test_trajectory(case: str) -> None:
    file = {key.removeprefix(f"{case}/"): torch.tensor(OBOW[key]) for key in OBOW if key.startswith(f"{case}/")}
    names = {
        f"feature_extractor{t}._feature_blocks.": f"{t[1:]}{'.' * bool(t)}backbone.blocks." for t in ("", "_teacher")
    }
    layers = {"fc": "0", "bn": "1", "last_layer": "3"}
    names |= {
        f"bow_predictor.layers_w.{i}.b{i}_{ours}.": f"generators.{i}.{n}." for i in (0, 1) for ours, n in layers.items()
    }

    def named(stage: str) -> dict[str, Tensor]:
        found = {}
        for theirs, ours in names.items():
            start = f"{stage}.{theirs}"
            found |= {ours + key.removeprefix(start): x for key, x in file.items() if key.startswith(start)}
        kept = ("running_mean", "running_var", "num_batches_tracked")  # which our generators have not
        return {name: x for name, x in found.items() if not (name.startswith("gen") and name.endswith(kept))}

    levels = len(file["cfg.levels_of_map"])
    flow = OBoW(Blocks([4, 4, 8]), num_levels=levels, num_words=8)
    for level in range(levels):
        words = file[f"init.bow_extractor.bow_extractor.{level}._embedding"]
        flow.vocabularies[level] = Vocabulary(*words.shape, inverse_delta=15.0, pool="max")
        flow.vocabularies[level].queue.rows.copy_(words.flip(0))
    flow = flow.double()
    missing, unexpected = flow.load_state_dict(named("init"), strict=False)
    assert unexpected == []
    assert all(name.startswith("vocabularies") for name in missing)
    rate, momentum, decay = file["cfg.sgd"].tolist()
    learned = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, rate, momentum=momentum, weight_decay=decay)
    for step, alpha in enumerate(file["alpha_used_f64"].tolist()):
        flow.teacher.update(flow, alpha)
        pictures = file["img_orig"][step].double()
        crops = [file[f"crops{i}"][step].double().unflatten(0, (len(pictures), -1)) for i in (0, 1)]
        views = [pictures, *(view for crop in crops for view in crop.unbind(1))]
        output = flow.step(Batch(views=views, seed=places(file["picked"][step], 4)))
        assert output.terms["bow"].item() == pytest.approx(file["losses"][step].sum().item(), rel=1e-5)
        assert output.logs["words_batch"].item() == pytest.approx(
            file["perplexities"][step][levels - 1].item(), rel=1e-3
        )
        assert output.logs["words_image"].item() == pytest.approx(file["perplexities"][step][-1].item(), rel=1e-3)
        optimizer.zero_grad()
        output.terms["bow"].backward()
        if step == 0:
            for name, expected in named("step0.grad").items():
                close(flow.get_parameter(name).grad, expected.numpy(), grad=1e-4)
        optimizer.step()
    state = flow.state_dict()
    for name, expected in named("final").items():
        if "running" not in name and "num_batches" not in name:
            close(state[name], expected.numpy(), value=1e-4)
    num_words = [len(vocabulary.words) for vocabulary in flow.vocabularies]
    order = [slots(num, len(pictures), step + 1) for num in num_words]
    for level in range(levels):
        theirs = f"final.bow_extractor.bow_extractor.{level}."
        close(flow.vocabularies[level].words, file[f"{theirs}_embedding"][order[level]].numpy(), value=1e-4)
        close(flow.vocabularies[level].mean_distance.view(1), file[f"{theirs}_min_distance_mean"].numpy(), value=1e-4)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("case", ["extract_a", "extract_hard", "extract_avgpool"])
def test_the_vocabulary(case: str, chunk: int | None) -> None:
    file = {key.removeprefix(f"{case}/"): OBOW[key] for key in OBOW if key.startswith(f"{case}/")}
    inverse, pool = float(file["cfg.inv_delta"]), "mean" if str(file.get("cfg.bow_pool", "")) == "avg" else "max"
    num_words, dim = file["embedding_init"].shape
    options: Any = {"inverse_delta": None if inverse < 0 else inverse, "pool": pool, "chunk_size": chunk}
    vocabulary = Vocabulary(num_words, dim, **options)
    vocabulary.queue.rows.copy_(torch.tensor(file["embedding_init"]).flip(0))
    batch_size = file["features"].shape[1]
    for step, features in enumerate(torch.tensor(file["features"])[..., 1:-1, 1:-1]):
        before, after = (slots(num_words, batch_size, num) for num in (step, step + 1))
        close(vocabulary.bags(features), file["bow"][step][:, before])
        learn(vocabulary, features, torch.tensor(file["picked"][step]))
        close(vocabulary.words, file["embedding_after"][step][after])
        close(vocabulary.mean_distance, file["min_distance_mean_after"][step])
    kept = {name: x.clone() for name, x in vocabulary.state_dict().items()}
    maps = torch.tensor(file["eval_features"])[..., 1:-1, 1:-1]
    close(vocabulary.eval().bags(maps), file["eval_bow"][:, after])
    assert all(torch.equal(x, kept[name]) for name, x in vocabulary.state_dict().items())


def learn(vocabulary: Vocabulary, maps: Tensor, picked: Tensor) -> None:
    num = (maps.shape[2] - 2) * (maps.shape[3] - 2)
    vocabulary.learn(maps, (picked + 0.5) / num)


def two_processes() -> dict[str, Tensor]:
    vocabulary = Vocabulary(*TWO["obow/embedding_init"].shape, inverse_delta=15.0, pool="max")
    vocabulary.queue.rows.copy_(torch.tensor(TWO["obow/embedding_init"]).flip(0))
    found = {}
    for step, features in enumerate(torch.tensor(TWO["obow/features"])[rank()][..., 1:-1, 1:-1]):
        found[f"step{step}.bow"] = vocabulary.bags(features)
        learn(vocabulary, features, torch.tensor(TWO[f"obow/step{step}.picked.rank{rank()}"]))
        found[f"step{step}.embedding_after"] = vocabulary.words.clone()
        found[f"step{step}.min_distance_mean_after"] = vocabulary.mean_distance.view(1).clone()
    return found


def test_the_vocabulary_on_two_processes(tmp_path: Path) -> None:
    num_words = len(TWO["obow/embedding_init"])
    for index, record in enumerate(in_processes(two_processes, 2, tmp_path)):
        for name, ours in record.items():
            expected, step = TWO[f"obow/{name}.rank{index}"], int(name[4])
            if name.endswith("bow"):
                expected = expected[:, slots(num_words, 4, step)]
            if name.endswith("embedding_after"):
                expected = expected[slots(num_words, 4, step + 1)]
            close(ours, expected)


def flow_of(seed: int = 0, **options: Any) -> OBoW:
    torch.manual_seed(seed)
    return OBoW(backbone("test_resnet", output_stride=8), **{"num_words": 24, **options})


def test_steps_after_a_restart_are_those_without_it() -> None:
    """Words, mean distances and teacher are in the state."""
    flows = [flow_of(seed) for seed in (0, 1)]
    first, second = make_batch(8, seed=1), make_batch(8, seed=2)
    flows[0].step(first)
    flows[1].load_state_dict(flows[0].state_dict())
    values = [flow.step(second).terms["bow"] for flow in flows]
    assert torch.equal(*values)
    assert all(torch.equal(a, b) for a, b in zip(flows[0].buffers(), flows[1].buffers(), strict=True))
    assert not torch.equal(flows[0].vocabularies[1].words, flow_of().vocabularies[1].words)


def test_words_do_not_depend_on_the_order_of_the_samples_but_for_their_own() -> None:
    flows = [flow_of() for _ in range(2)]
    batch, turned = make_batch(8), make_batch(8)
    turned["views"] = [view.flip(0) for view in batch["views"]]
    turned["seed"] = batch["seed"].flip(0)
    values = [flow.step(rows).terms["bow"] for flow, rows in zip(flows, (batch, turned), strict=True)]
    torch.testing.assert_close(*values)
    new = [flow.vocabularies[0].words[:8] for flow in flows]
    torch.testing.assert_close(new[0], new[1].flip(0), rtol=1e-4, atol=1e-5)


def test_codes_are_nearest_words() -> None:
    flow = flow_of().eval()
    words = flow.vocabularies[-1].words
    maps = torch.rand(2, words.shape[1], 3, 4)
    expected = torch.cdist(maps.movedim(1, -1).flatten(0, 2), words).argmin(1)
    assert torch.equal(flow.codes(maps).flatten(), expected)


def test_what_does_not_fit_is_told() -> None:
    small = [
        "backbone=resnet",
        "backbone.name=test_resnet",
        "objective.num_words=100",
        "data.batch_size=64",
        "views=clip_small",
    ]
    with pytest.raises(ConfigError) as refused:
        check(compose(["objective=obow", "image_size=96", *small]))
    assert [re.sub(r"backbone.name=test_resnet ", "", fault)[:60] for fault in refused.value.faults] == [
        "OBoW needs a view for its teacher and others, and views has ",
        "objective.num_words=100 is not a multiple of the global batc",
        "makes a map of 3 x 3 cells of the teacher's view of 96 x 96 ",
    ]
    for options, told in (
        ({"pool": "sum"}, "pool=sum; set it to max or mean"),
        ({"num_words": 0}, "num_words=0; set it to a multiple"),
        ({"num_levels": 0}, "num_levels=0: ResNet has 5 feature maps; set it to 1 or more"),
        ({"num_levels": 9}, "num_levels=9: ResNet has 5 feature maps"),
    ):
        with pytest.raises(ValueError, match=told):
            flow_of(**options)
    with pytest.raises(ValueError, match="needs two views or more of a sample, and the seeds"):
        flow_of().step(Batch(views=make_batch(8)["views"]))
