"""Encoders in slices: the gradient of the whole, what is held, and what must not change."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from repr.models.backbone import backbone, feature_map
from repr.models.decoder import Decoder
from repr.models.masking import encode_kept, mask_from_scores
from repr.models.slicing import (
    checkpoint_encoders,
    compile_encoders,
    compiler_fault,
    in_slices,
    is_compiled,
    slice_encoders,
    slice_rows,
)
from tests.objectives.conftest import build, make_batch

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
NUM = 7
Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def cases(**options: Any) -> dict[str, Case]:
    """Every way in which flows call a tower."""
    torch.manual_seed(0)
    images = torch.randn(NUM, 3, 32, 32)
    mask = mask_from_scores(torch.rand(NUM, 16), 5)
    tokens = open_clip.SimpleTokenizer(context_length=12)([f"a {i} of {i * i}" for i in range(NUM)])
    text = open_clip.transformer.TextTransformer(context_length=12, width=32, heads=2, layers=1, output_dim=8)
    kept = torch.randn(NUM, 1 + 5, 24)
    return {
        "image": (backbone(**VIT, **options), lambda vit: vit(images)),
        "kept": (backbone(**VIT, **options), lambda vit: vit.forward_head(encode_kept(vit, images, mask.ids_keep))),
        "map": (backbone(**VIT, **options), lambda vit: feature_map(vit, images)),
        "text": (text, lambda tower: tower(tokens)),
        "decoder": (
            Decoder(24, (4, 4), 12, dim=16, depth=1, num_heads=2),
            lambda decoder: decoder(kept, mask.ids_restore, mask.ids_remove),
        ),
    }


def gradients(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Of something that binds all rows together."""
    module.zero_grad()
    flat = call(module).flatten(1)
    (flat @ flat.T).logsumexp(1).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch", [1, 3, NUM - 1, NUM])
@pytest.mark.parametrize("name", cases())
def test_slices_have_the_gradient_of_the_whole(name: str, micro_batch: int) -> None:
    module, call = cases()[name]
    keys = module.state_dict().keys()
    output, whole = call(module), gradients(module, call)
    slice_rows(module, micro_batch)
    torch.testing.assert_close(call(module), output, rtol=1e-5, atol=1e-6)
    sliced = gradients(module, call)
    assert sliced.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(sliced[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
    assert module.state_dict().keys() == keys


def held(module: nn.Module, images: Tensor) -> int:
    """Bytes that wait for backward, outside of what is computed again."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = module(images)
    return sum(seen.values()) + output.nbytes


def test_input_and_output_are_held_and_no_activations() -> None:
    module, images = backbone(**VIT), torch.randn(NUM, 3, 32, 32)
    whole = held(module, images)
    slice_rows(module, 2)
    assert held(module, images) == images.nbytes + NUM * 24 * 4  # and (N, D) float32
    assert whole > 5 * images.nbytes


def test_dropout_draws_the_same_in_recomputation_under_autocast_too() -> None:
    module, images = backbone(**VIT, drop_path_rate=0.5, proj_drop_rate=0.3), torch.randn(NUM, 3, 32, 32)
    for dtype in (None, torch.bfloat16):

        def encode(vit: nn.Module, dtype: torch.dtype | None = dtype) -> Tensor:
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return in_slices(vit, vit, images)

        def by_hand(vit: nn.Module, dtype: torch.dtype | None = dtype) -> Tensor:
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return torch.cat([vit(part) for part in images.tensor_split(3)])

        expected = gradients(module, by_hand)
        sliced = copy.deepcopy(module)
        slice_rows(sliced, 3)
        assert_equal(gradients(sliced, encode), expected)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def test_batch_norm_is_warned_about_and_counts_each_slice_once() -> None:
    objective = build("simclr", backbone=["backbone.name=test_resnet"])
    other = copy.deepcopy(objective.backbone)
    with pytest.warns(UserWarning, match="BatchNorm layers of backbone see the statistics of 3 rows"):
        slice_encoders(objective, 3)
    images = torch.randn(NUM, 3, 32, 32)
    objective.backbone(images).sum().backward()
    for part in images.tensor_split(3):
        other(part).sum().backward()
    ours, theirs = objective.backbone.state_dict(), other.state_dict()
    assert_equal(ours, theirs)
    assert int(ours["bn1.num_batches_tracked"]) == 3


def test_slices_of_batch_norm_are_traced_without_memory() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        slice_rows(model, 2)
        model(torch.randn(6, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_an_encoder_without_batch_norm_is_not_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slice_encoders(build("clip"), 3)
        slice_encoders(build("simclr"), 3)  # its head is not sliced
        slice_encoders(build("simclr", backbone=["backbone.name=test_resnet"]), None)


def test_a_copy_runs_its_own_weights_and_evaluation_is_not_sliced() -> None:
    module = backbone(**VIT)
    slice_rows(module, 2)
    twin, images = copy.deepcopy(module), torch.randn(NUM, 3, 32, 32)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(images).any()
        assert module(images).any()
    seen: list[int] = []
    module.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        module(images)
        module.eval()
        module(images)
    assert seen == [2, 2, 2, 1, NUM]


@pytest.mark.parametrize(("micro_batch", "words"), [(0, "micro_batch=0"), (2, "micro_batch: Linear names no ENCODERS")])
def test_what_cannot_be_sliced_is_refused(micro_batch: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        slice_encoders(nn.Linear(2, 2), micro_batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "cuaxu", "siglip", "simclr", "align_uniform", "mae_clip", "cmae"])
def test_losses_in_chunks_are_reached_by_config(name: str) -> None:
    batch = make_batch()
    whole, chunked = build(name), build(name, "chunk_size=3")
    seen: list[int] = []
    for objective in (whole, chunked):

        def pack(x: Tensor) -> Tensor:
            seen[-1] += x.ndim == 2 and x.shape[0] == x.shape[1] == 8
            return x

        seen.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = objective.total(objective.step(batch).terms)
        loss.backward()
    assert seen[0] > seen[1] == 0
    for (key, a), b in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=key)


def test_a_loss_without_chunks_is_refused() -> None:
    losses = {"contrast": lambda image, text, logit_scale: (image * text).sum()}
    from repr.objectives.image_text import ImageText

    with pytest.raises(ValueError, match="the losses of contrast take none"):
        ImageText(nn.Identity(), nn.Identity(), losses=losses, chunk_size=2)


def test_checkpointed_layers_have_the_same_gradient_and_hold_less() -> None:
    objective, batch = build("mae_clip"), make_batch()
    other = copy.deepcopy(objective)
    checkpoint_encoders(other)
    sizes = []
    for flow in (objective, other):
        seen: dict[int, int] = {}
        weights = {p.data_ptr() for p in flow.parameters()}

        def pack(x: Tensor, seen: dict[int, int] = seen, weights: set[int] = weights) -> Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = flow.total(flow.step(batch).terms)
        loss.backward()
        sizes.append(sum(seen.values()))
    assert sizes[1] < 0.8 * sizes[0]
    for (key, a), b in zip(objective.named_parameters(), other.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=key)


def test_checkpointing_is_refused_where_nothing_has_it_and_warns_of_batch_norm() -> None:
    with pytest.raises(ValueError, match="grad_checkpointing: Linear names no ENCODERS"):
        checkpoint_encoders(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="running statistics of backbone's BatchNorm count each batch twice"):
        checkpoint_encoders(build("simclr", backbone=["backbone.name=test_resnet"]))


def test_no_compiler_is_told_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and there is no g\+\+: install one, or set"):
            compile_encoders(build("clip"))


@pytest.mark.slow
def test_compiled_layers_have_the_same_gradient() -> None:
    """Whole; tests/test_fit.py compiles them in slices."""
    if fault := compiler_fault():
        pytest.skip(fault)
    objective, batch = build("clip"), make_batch()
    other = copy.deepcopy(objective)
    compile_encoders(other)
    assert (is_compiled(objective), is_compiled(other)) == (False, True)
    assert other.state_dict().keys() == objective.state_dict().keys()
    for flow in (objective, other):
        flow.total(flow.step(batch).terms).backward()
    for (key, a), b in zip(objective.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=key)
