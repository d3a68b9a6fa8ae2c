"""M3CoL: the authors' whole models, what is mixed when, and what is refused."""

import re
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.fit import main
from repr.losses.contrastive import clip
from repr.losses.mixup import draw_mix, mix, mixed_contrast, soft_clip
from repr.models.heads import plain_mlp
from repr.objectives.mixing import Mixing
from repr.objectives.mixup_contrast import MixupContrast
from tests.golden import golden
from tests.objectives.conftest import build, make_batch

DATA = {key: torch.as_tensor(value) for key, value in golden("m3col").items()}
PHASES = {"m3co": 1.0, "softclip": 0.0}  # name -> switch


class FirstToken(nn.Module):
    """The authors' stub of an encoder: what it is given are tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = self.output_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def load(module: nn.Module, case: str, names: list[str]) -> None:
    """The authors' parameters into the linear layers, in their order."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == len(names)
    with torch.no_grad():
        for layer, name in zip(layers, names, strict=True):
            for kind in ("weight", "bias"):
                getattr(layer, kind).copy_(DATA[f"{case}.param.{name}.clf.0.{kind}"])


def head(name: str, depth: int) -> list[str]:
    return [f"{name}.post_layer_{i + 1}" for i in range(depth)]


def official(perms: list[Tensor], lams: list[Tensor], switch: float, num_classes: int, width: list[int]) -> dict:
    """The options with which the authors' numbers were made: their draws, their aliasing, their overwritten targets."""
    return {
        "num_classes": num_classes,
        "head_widths": width,
        "mixing": Mixing(
            switch=switch,
            draw=lambda seed, stream: (perms[stream], lams[stream]),
            mixed_loss=partial(mixed_contrast, overwrite=True),
            mix_other=True,
        ),
    }


def two_views(case: str, phase: str) -> tuple[MixupContrast, Batch, list[Tensor]]:
    image, text = (DATA[f"{case}.{name}_tokens"].requires_grad_() for name in ("image", "text"))
    draws = [[DATA[f"{case}.{name}_{what}"] for name in ("image", "text")] for what in ("perm", "betas")]
    flow = MixupContrast(FirstToken(6), FirstToken(6), **official(*draws, PHASES[phase], 4, [7, 7]))
    load(flow.heads["image_head"], case, head("image_classfier", 3))
    load(flow.heads["text_head"], case, head("text_classfier", 3))
    theirs = flow.heads["fusion"]
    load(theirs, case, head("mm_classfier", 3))
    with torch.no_grad():  # text comes first in theirs, second in ours
        theirs[0].weight.copy_(theirs[0].weight.roll(6, 1))
    batch = Batch(views=[image], text=text, label=DATA[f"{case}.label"], seed=torch.arange(len(image)))
    return flow, batch, [text, image]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("case", ["mmc0", "mmc1"])
def test_the_image_text_flow_equals_the_authors_model(case: str, phase: str) -> None:
    flow, batch, leaves = two_views(case, phase)
    terms = flow.step(batch).terms
    total = flow.total(terms)
    expected = {
        "fusion": f"{phase}.fusion_ce",
        "contrast": "m3co.aliased_contrastive" if phase == "m3co" else "softclip.contrastive_times_lambda",
    }
    scale = 1.0 if phase == "m3co" else 0.1
    torch.testing.assert_close(terms["fusion"].double(), DATA[f"{case}.{expected['fusion']}.f64"], rtol=1e-5, atol=0)
    contrast = DATA[f"{case}.{expected['contrast']}.f64"]
    torch.testing.assert_close(terms["contrast"].double() * scale, contrast, rtol=1e-5, atol=0)
    ce = terms["fusion"] + terms["image_head"] + terms["text_head"]
    torch.testing.assert_close(ce.double(), DATA[f"{case}.ce_sum_three_heads.f64"], rtol=1e-5, atol=0)
    torch.testing.assert_close(total.double(), DATA[f"{case}.{phase}.total.f64"], rtol=1e-5, atol=0)
    grads = torch.autograd.grad(total, leaves)
    for grad, name in zip(grads, ("text", "image"), strict=True):
        torch.testing.assert_close(grad.double(), DATA[f"{case}.{phase}.grad_{name}_tokens"], rtol=1e-4, atol=1e-6)
    evaluated = flow.embed(Batch(image=batch["views"][0], text=batch["text"]))
    torch.testing.assert_close(evaluated.logits["fusion"].double(), DATA[f"{case}.fusion_logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["mmc0", "mmc1"])
def test_without_the_slip_the_contrast_is_the_papers(case: str) -> None:
    flow, batch, _ = two_views(case, "m3co")
    flow.mixing = replace(flow.mixing, mix_other=False)
    contrast = flow.step(batch).terms["contrast"]
    torch.testing.assert_close(contrast.double(), DATA[f"{case}.m3co.unaliased_contrastive.f64"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("case", ["med0", "med1"])
def test_the_flow_of_three_tables_equals_the_authors_model(case: str, phase: str) -> None:
    views = [DATA[f"{case}.view{i}"].requires_grad_() for i in (1, 2, 3)]
    draws = [[DATA[f"{case}.{what}{i}"] for i in (1, 2, 3)] for what in ("perm", "betas")]
    tables = {f"view{i}": plain_mlp([view.shape[1], 6, 6]) for i, view in enumerate(views, 1)}
    flow = MixupContrast(tables=tables, **official(*draws, PHASES[phase], 3, [5]))
    for i in (1, 2, 3):
        load(flow.tables[f"view{i}"], case, [f"fe_{i}.fe1", f"fe_{i}.fe2"])
        load(flow.heads[f"view{i}_head"], case, head(f"cl_{i}", 2))
    load(flow.heads["fusion"], case, head("mm_classfier", 2))
    total = flow.total(flow.step(Batch(tables=views, label=DATA[f"{case}.label"], seed=torch.arange(9))).terms)
    torch.testing.assert_close(total.double(), DATA[f"{case}.{phase}.mean_total.f64"], rtol=1e-5, atol=0)
    torch.testing.assert_close(total.double(), DATA[f"{case}.{phase}.per_sample_total.f64"].mean(), rtol=1e-5, atol=0)
    for i, grad in enumerate(torch.autograd.grad(total, views), 1):
        torch.testing.assert_close(grad.double(), DATA[f"{case}.{phase}.grad_view{i}"], rtol=1e-4, atol=1e-6)
    logits = flow.embed(Batch(tables=views)).logits["fusion"]
    torch.testing.assert_close(logits.double(), DATA[f"{case}.fusion_logits"], rtol=1e-5, atol=1e-6)


def test_the_terms_are_what_they_say() -> None:
    batch = make_batch(8)
    flow = build("m3col")
    terms = flow.step(batch).terms
    image, text = flow.backbone(batch["views"][0]), flow.text(batch["text"])
    draws = [draw_mix(batch["seed"], beta=0.15, fraction=0.5, stream=stream) for stream in (0, 1)]
    mixed = [mix(x, x[perm], lam=lam) for x, (perm, lam) in zip((image, text), draws, strict=True)]
    expected = [
        mixed_contrast(x, other, perm=perm, lam=lam, temperature=0.1)
        for x, other, (perm, lam) in zip(mixed, (text, image), draws, strict=True)
    ]
    torch.testing.assert_close(terms["contrast"], sum(expected))
    logits = flow.heads["fusion"](torch.cat([image, text], dim=1))
    torch.testing.assert_close(terms["fusion"], nn.functional.cross_entropy(logits, batch["label"][:, 0]))
    flow.mixing = replace(flow.mixing, switch=0.0)
    soft = soft_clip(image, text, temperature=0.125) + soft_clip(text, image, temperature=0.125)
    torch.testing.assert_close(flow.step(batch).terms["contrast"], soft)
    plain = build("m3col_clip").step(batch).terms["contrast"]
    torch.testing.assert_close(plain, 2 * clip(image, text, logit_scale=10.0))


def test_pixels_are_mixed_before_the_encoder() -> None:
    batch = make_batch(8)
    flow = build("m3col", "+objective.mixing.levels.image=input")
    seen: list[Tensor] = []
    hook = flow.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    flow.step(batch)
    hook.remove()
    perm, lam = draw_mix(batch["seed"], beta=0.15, fraction=0.5, stream=0)
    view = batch["views"][0]
    (pixels,) = seen  # one pass
    torch.testing.assert_close(pixels, torch.cat([view, mix(view, view[perm], lam=lam)]))


def test_ablations_leave_out_their_terms_and_heads() -> None:
    assert build("m3col_no_contrast").step(make_batch()).terms.keys() == {"fusion", "image_head", "text_head"}
    flow = build("m3col_no_heads")
    assert flow.step(make_batch()).terms.keys() == {"fusion", "contrast"}
    assert list(flow.heads) == ["fusion"]


def test_a_set_that_lacks_a_modality_is_judged_by_the_other_heads() -> None:
    outputs = build("m3col").embed(Batch(image=torch.randn(2, 3, 32, 32)))
    assert (outputs.text, outputs.poolings, outputs.projection) == (None, {}, None)
    assert outputs.logits.keys() == {"image_head"}
    assert outputs.logits["image_head"].shape == (2, 9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 3}, "has no modality"),
        ({"backbone": FirstToken(4), "num_classes": 3}, "two modalities or more, of equal widths"),
        ({"backbone": FirstToken(4), "text": FirstToken(5), "num_classes": 3}, "image 4, text 5. Set embed_dim"),
        ({"mixing": Mixing(levels={"sound": "input"})}, "the modalities are image, text"),
        ({"weights": {"fusion": 1, "sound_head": 1}}, "names sound_head"),
        ({"tables": {"a": nn.Identity()}}, "tables.a has no linear layer"),
        ({"tables": {"text": plain_mlp([3, 4])}}, "rename the block"),
    ],
)
def test_bad_options_are_refused(options: dict, words: str) -> None:
    both = {} if "num_classes" in options else {"backbone": FirstToken(4), "text": FirstToken(4), "num_classes": 3}
    with pytest.raises(ValueError, match=re.escape(words)):
        MixupContrast(**both, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": {"text": "input"}}, "token ids cannot be mixed"),
        ({"levels": {"image": "pixels"}}, "levels.image=pixels; set it to embedding or input"),
        ({"switch": 1.5}, "switch=1.5; set it to a share"),
    ],
)
def test_bad_options_of_the_mixing_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Mixing(**options)


@pytest.mark.parametrize(
    ("limits", "num_steps", "num_mixed"),
    [
        ({"max_epochs": 3}, 9, 6),  # 0.7 of three epochs: two whole ones of three steps
        ({"max_epochs": 1}, 9, 0),
        ({"max_steps": 9}, 9, 6),
        ({"max_epochs": 3, "max_steps": 6}, 6, 4),
    ],
)
def test_samples_are_mixed_in_a_share_of_whole_epochs(limits: dict, num_steps: int, num_mixed: int) -> None:
    flow = build("m3col", "objective.mixing.switch=0.7")
    flow.trainer = pl.Trainer(**limits, accelerator="cpu", logger=False, enable_checkpointing=False)
    flow.total_steps = num_steps
    mixed = []
    for flow.step_number in range(num_steps):
        mixed.append(flow.step(make_batch(4)).logs["mixed"])
    assert mixed == [1.0] * num_mixed + [0.0] * (num_steps - num_mixed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: batch.pop("text"), "the batch lacks text"),
        (lambda batch: batch.pop("label"), "the batch lacks label"),
        (lambda batch: batch["label"].fill_(-1), "8 rows of a batch have no label"),
        (lambda batch: batch.update(make_batch(1)), "this one has one"),
    ],
)
def test_bad_batches_are_refused(change: object, words: str) -> None:
    batch = make_batch()
    change(batch)
    with pytest.raises(ValueError, match=words):
        build("m3col").step(batch)


def test_a_batch_of_one_and_weights_of_absent_modalities_are_faults_of_the_config() -> None:
    cfg = compose(["experiment=m3col_emoji", "data.batch_size=1", "tokenizer=null", "run_folder=x"])
    with pytest.raises(ConfigError) as refused:
        check(cfg)
    assert [fault.partition(":")[0] for fault in refused.value.faults] == [
        "MixupContrast compares the samples of a batch",
        "objective.text has nothing to encode",
    ]
    with pytest.raises(ConfigError, match="did you mean 'view3_head'"):
        check(compose(["experiment=m3col_tabular", "+objective.weights.view9_head=1", "run_folder=x"]))
    with pytest.raises(InstantiationException, match=r"\nValueError.*weights\.text_head: there is no such modality"):
        instantiate(compose(["experiment=m3col_tabular", "objective.weights.text_head=1"]).objective)


TINY_TABLES = [
    "experiment=m3col_tabular", "smoke=true", "data.train.num_rows=40", "data.eval.val.num_rows=40",
    "eval.knn=null", "eval.ridge=null",
    *(f"objective.tables.view{i}.widths=[200,8,8]" for i in (1, 2, 3)), "objective.head_widths=[8]",
    "callbacks.progress=null",
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.num_classes=4"], "'class' has 5 classes: set objective.num_classes=5, not 4"),
        (["objective.attribute=species"], "the data lacks the attribute 'species'; it has class"),
        (["objective.tables.view2.widths=[100,8,8]"], "view2 (100), view3 (200), and the data has the blocks"),
        (["views=clip"], "data.train (DrawnTables) has no pictures: set views=none"),
        (["data.eval.val.widths=[200,200]"], "data.eval.val has blocks of numbers"),
    ],
)
def test_what_the_data_lacks_is_told_before_training(overrides: list[str], words: str, tmp_path: object) -> None:
    with pytest.raises(SystemExit) as refused:
        main([*TINY_TABLES, f"run_folder={tmp_path}", *overrides])
    assert str(refused.value).startswith("error: ")
    assert words in str(refused.value)
