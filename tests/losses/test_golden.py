"""Numbers of the authors' own code: align_uniform, contrastive-gap, open_clip, SLIP.

contrastive-gap and SLIP take raw features and are compared as they are. align_uniform and open_clip take
features of length 1 and do not normalise; the stored ones have that length to float32 only. Ours normalises
them, which moves float64 values by some 1e-8 and takes the radial part out of the gradient. So these are
compared in two steps, each at 1e-8 or better: the formula of ``naive.py`` on the stored features with the
golden number, then ours with that formula on features of exact length. (Directly they agree to some 1e-7.)
"""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repr.losses.blockwise import logsumexp
from repr.losses.contrastive import clip, nt_xent, sigmoid
from repr.losses.features import unit
from repr.losses.hypersphere import alignment, cross_uniformity, uniformity
from tests.golden import golden
from tests.losses import naive

ALIGN, GAP, OPEN, SLIP = (
    golden(name) for name in ("align_uniform", "contrastive_gap", "open_clip_loss", "slip_losses")
)
CASES = ["c0", "c1", "c3"]  # of align_uniform and contrastive_gap
OPEN_CASES = ["c0", "c1"]
CHUNKS = [None, 5]

Loss = Callable[..., Tensor]


def evaluate(loss: Loss, inputs: list[np.ndarray], dtype: torch.dtype = torch.float64) -> tuple[float, list[Tensor]]:
    leaves = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in inputs]
    value = loss(*leaves)
    value.backward()
    return value.item(), [x.grad.double() for x in leaves]


def tangent(grad: Tensor, x: np.ndarray) -> Tensor:
    """The part of a gradient that is left where the loss does not depend on the length of x."""
    direction = F.normalize(torch.tensor(x, dtype=torch.float64), dim=1)
    return grad - (grad * direction).sum(1, keepdim=True) * direction


def assert_close(ours: tuple[float, list[Tensor]], value: float, grads: list, tolerance: float) -> None:
    """Values relative to the value, gradients relative to their largest entry."""
    assert ours[0] == pytest.approx(float(value), rel=tolerance)
    for grad, expected in zip(ours[1], grads, strict=True):
        expected = torch.as_tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1e-3))


# Raw features: contrastive-gap --------------------------------------------------------------------------------------


def gap_terms(scale: float, chunk: int | None) -> dict[str, Loss]:
    return {
        "C": lambda x, y: clip(x, y, logit_scale=scale, chunk_size=chunk),
        "U": lambda x, y: (uniformity(x, chunk_size=chunk) + uniformity(y, chunk_size=chunk)) / 2,
        "XU": lambda x, y: cross_uniformity(x, y, chunk_size=chunk),
        "A": lambda x, y: alignment(x, y),
    }


GAP_SUMS = {
    "clip": ["C"],
    "clip_scaled_denominator": ["C"],  # the same less ln N
    "U": ["U"],
    "A": ["A"],
    "XU": ["XU"],
    "CU": ["C", "U"],
    "CA": ["C", "A"],
    "CXU": ["C", "XU"],
    "CUA": ["C", "U", "A"],
    "CUAXU": ["C", "U", "A", "XU"],
    "UA_nocontrastive": ["U", "A"],
    "UAXU_nocontrastive": ["U", "A", "XU"],
}
GAP_TERMS = {
    "term_inter_modality": "C",
    "term_uniformity": "U",
    "term_alignment": "A",
    "term_cross_uniformity": "XU",
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", GAP_SUMS)
@pytest.mark.parametrize("case", CASES)
def test_contrastive_gap(case, name, chunk):
    inputs = [GAP[f"{case}.img"], GAP[f"{case}.txt"]]
    terms = gap_terms(float(GAP[f"{case}.logit_scale_exp"]), chunk)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        total = sum(terms[term](x, y) for term in GAP_SUMS[name])
        return total - math.log(len(x)) if name == "clip_scaled_denominator" else total

    value, value32 = GAP[f"{case}.{name}.f64"], GAP[f"{case}.{name}.f32"]
    grads = [GAP[f"{case}.{name}.grad_img"], GAP[f"{case}.{name}.grad_txt"]]
    # the authors' ln N is a float32 number
    assert_close(evaluate(loss, inputs), value, grads, 1e-6 if name == "clip_scaled_denominator" else 1e-8)
    assert_close(evaluate(loss, inputs, torch.float32), value32, grads, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_contrastive_gap_parts(case):
    x, y = (torch.tensor(GAP[f"{case}.{name}"], dtype=torch.float64) for name in ("img", "txt"))
    scale = float(GAP[f"{case}.logit_scale_exp"])
    assert scale == pytest.approx(1 / float(GAP[f"{case}.temperature"]))
    for name, term in GAP_TERMS.items():
        assert gap_terms(scale, None)[term](x, y).item() == pytest.approx(float(GAP[f"{case}.{name}.f64"]), rel=1e-8)

    x, y = unit(x, y)
    torch.testing.assert_close(x, torch.tensor(GAP[f"{case}.image_embeds_normalised.f64"]), rtol=1e-12, atol=1e-12)
    logits = torch.tensor(GAP[f"{case}.logits_per_image.f64"])
    rows, columns, diagonal = logsumexp(x, y, scale, torch.zeros(len(x)), chunk_size=5)
    torch.testing.assert_close(rows, logits.logsumexp(1))
    torch.testing.assert_close(columns, logits.logsumexp(0))
    torch.testing.assert_close(diagonal, logits.diagonal())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_points_that_coincide(chunk):
    inputs = [GAP["coincident.img"], GAP["coincident.txt"]]
    grads = [GAP["coincident.XU.grad_img"], GAP["coincident.XU.grad_txt"]]
    loss = gap_terms(1.0, chunk)["XU"]
    assert_close(evaluate(loss, inputs), GAP["coincident.XU.f64"], grads, 1e-8)
    assert_close(evaluate(loss, inputs, torch.float32), GAP["coincident.XU.f32"], grads, 1e-5)


# Features of length 1: align_uniform, open_clip ---------------------------------------------------------------------

UNIT = {  # quantity -> inputs, the formula, ours
    "align_alpha2": (["x", "y"], lambda x, y: naive.alignment(x, y, 2), lambda x, y, chunk: alignment(x, y)),
    "align_alpha1": (["x", "y"], lambda x, y: naive.alignment(x, y, 1), lambda x, y, chunk: alignment(x, y, alpha=1)),
    "uniform_t2": (["x"], lambda x: naive.uniformity(x, 2), lambda x, chunk: uniformity(x, chunk_size=chunk)),
    "uniform_t2_y": (["y"], lambda y: naive.uniformity(y, 2), lambda y, chunk: uniformity(y, chunk_size=chunk)),
    "uniform_t1": (["x"], lambda x: naive.uniformity(x, 1), lambda x, chunk: uniformity(x, t=1, chunk_size=chunk)),
    "clip": (
        ["img", "txt", "logit_scale"],
        naive.clip,
        lambda x, y, scale, chunk: clip(x, y, logit_scale=scale, chunk_size=chunk),
    ),
    "clip_bias": (  # a bias changes nothing, so ours has none
        ["img", "txt", "logit_scale"],
        lambda x, y, scale: naive.clip(x, y, scale, bias=-7.0),
        lambda x, y, scale, chunk: clip(x, y, logit_scale=scale, chunk_size=chunk),
    ),
    "siglip_nobias": (
        ["img", "txt", "logit_scale"],
        lambda x, y, scale: naive.sigmoid(x, y, scale, 0.0),
        lambda x, y, scale, chunk: sigmoid(x, y, logit_scale=scale, logit_bias=0.0, chunk_size=chunk),
    ),
    "siglip": (
        ["img", "txt", "logit_scale", "logit_bias"],
        naive.sigmoid,
        lambda x, y, scale, bias, chunk: sigmoid(x, y, logit_scale=scale, logit_bias=bias, chunk_size=chunk),
    ),
}
UNIT["siglip_chunk5"] = UNIT["siglip"]
UNIT_CASES = [(ALIGN, case, name) for case in CASES for name in UNIT if name.startswith(("align", "uniform"))]
UNIT_CASES += [(OPEN, case, name) for case in OPEN_CASES for name in UNIT if name.startswith(("clip", "siglip"))]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("file", "case", "name"), UNIT_CASES, ids=[f"{case}-{name}" for _, case, name in UNIT_CASES])
def test_features_of_length_one(file, case, name, chunk):
    names, formula, loss = UNIT[name]
    inputs = [file[f"{case}.{x}"] for x in names]
    value, value32 = file[f"{case}.{name}.f64"], file[f"{case}.{name}.f32"]
    grads = [torch.tensor(file[f"{case}.{name}.grad_{x}"]) for x in names]
    directions = [tangent(g, x) if x.ndim else g for g, x in zip(grads, inputs, strict=True)]

    def normalised(*features: Tensor) -> Tensor:
        return formula(*[F.normalize(x, dim=1) if x.ndim else x for x in features])

    def ours(*features: Tensor) -> Tensor:
        return loss(*features, chunk=chunk)

    assert_close(evaluate(formula, inputs), value, grads, 1e-8)
    assert_close(evaluate(ours, inputs), *evaluate(normalised, inputs), 1e-10)
    assert_close(evaluate(ours, inputs), value, directions, 1e-6)
    assert_close(evaluate(ours, inputs, torch.float32), value32, directions, 1e-5)


@pytest.mark.parametrize("case", OPEN_CASES)
def test_bias_has_no_part_in_clip(case):
    assert float(OPEN[f"{case}.clip_bias.f64"]) == pytest.approx(float(OPEN[f"{case}.clip.f64"]), rel=1e-12)
    assert abs(float(OPEN[f"{case}.clip_bias.grad_logit_bias"])) < 1e-12


# Raw features: SLIP (float32 numbers) -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in SLIP}))
def test_slip(case, dtype, chunk):
    stored = {key.split("/")[1]: value for key, value in SLIP.items() if key.startswith(f"{case}/")}
    pairs, views = ("image_embed", "text_embed", "log_logit_scale"), ("aug1_embed", "aug2_embed")
    names = [name for name in (*pairs, *views) if name in stored]

    def loss(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        total = torch.zeros((), dtype=dtype)
        if "image_embed" in given:
            image, text, log_scale = (given[name] for name in pairs)
            total = clip(image, text, logit_scale=log_scale.exp(), chunk_size=chunk)
            if "clip_loss" in stored:
                assert total.item() == pytest.approx(float(stored["clip_loss"]), rel=1e-5)
        if "aug1_embed" in given:
            temperature = stored.get("temperature", stored.get("ssl_temperature"))
            ssl = nt_xent(given["aug1_embed"], given["aug2_embed"], temperature=float(temperature), chunk_size=chunk)
            total = total + float(stored.get("ssl_scale", 1.0)) * ssl
            if "ssl_loss" in stored:
                assert ssl.item() == pytest.approx(float(stored["ssl_loss"]), rel=1e-5)
        return total

    grads = [stored["grad_" + name.removesuffix("_embed")] for name in names]
    assert_close(evaluate(loss, [stored[name] for name in names], dtype), stored["loss"], grads, 1e-5)


# Nothing is left out by accident ------------------------------------------------------------------------------------

OUT_OF_SCOPE = {
    "align_uniform": [],
    "contrastive_gap": [
        r"c\d\.(cyclip_only|simclr_only|cosine_uniformity_only_asis|cosine_align_only)\..*",  # no loss of ours
        r"c\d\.term_(cyclic|cyclic_direction|uniform_cyclic)\.f64",
        r"clamp\..*",  # the clamp of the learned scale is the flow's
    ],
    "open_clip_loss": [
        r"c\d\.siglip_negative_only\..*",  # a rank's part of a ring; ours gathers
        r"c\d\.(coca_|distill|teacher_).*",  # no loss of ours
    ],
    "slip_losses": [r".*/(ssl_acc|clip_acc)"],  # accuracies
}


def compared() -> dict[str, set[str]]:
    """Keys that the tests above read."""
    names = ["img", "txt", "temperature", "logit_scale_exp", *(f"{name}.f64" for name in GAP_TERMS)]
    names += ["image_embeds_normalised.f64", "logits_per_image.f64"]
    names += [f"{name}.{part}" for name in GAP_SUMS for part in ("f32", "f64", "grad_img", "grad_txt")]
    gap = {f"{case}.{name}" for case in CASES for name in names}
    gap |= {f"coincident.{name}" for name in ("img", "txt", "XU.f32", "XU.f64", "XU.grad_img", "XU.grad_txt")}
    of_length_one: dict[int, set[str]] = {id(ALIGN): set(), id(OPEN): set()}
    for file, case, name in UNIT_CASES:
        inputs = UNIT[name][0]
        keys = [*inputs, f"{name}.f32", f"{name}.f64", *(f"{name}.grad_{x}" for x in inputs)]
        of_length_one[id(file)] |= {f"{case}.{key}" for key in keys}
    of_length_one[id(OPEN)] |= {f"{case}.clip_bias.grad_logit_bias" for case in OPEN_CASES}
    slip = {key for key in SLIP if not key.endswith("_acc")}
    return {
        "align_uniform": of_length_one[id(ALIGN)],
        "contrastive_gap": gap,
        "open_clip_loss": of_length_one[id(OPEN)],
        "slip_losses": slip,
    }


@pytest.mark.parametrize("name", OUT_OF_SCOPE)
def test_every_array_is_compared_or_out_of_scope(name):
    keys = set(golden(name))
    left_out = {key for key in keys if any(re.fullmatch(pattern, key) for pattern in OUT_OF_SCOPE[name])}
    assert not left_out & compared()[name]
    assert keys == left_out | compared()[name]
