"""The planner: what it predicts is what torch's allocator holds, what it counts, and what it refuses."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.plan import CASES, case, measured, predicted, steps
from repr.config import ConfigError
from repr.distributed import gather, world_size
from repr.losses.exchange import GATHER
from repr.plan.__main__ import config, main, options_of
from repr.training.forecast import BUCKETS, Planner
from repr.training.memory_trace import processes
from tools import scaling

ROOT = Path(__file__).parents[1]
TINY = [
    "image_size=32", "embed_dim=64", "text.layers=1", "text.width=64", "tokenizer=drawn", "text.vocab_size=500",
    "optim.warmup_steps=0", "backbone.name=vit_tiny_patch16_224", "+backbone.depth=2", "+backbone.embed_dim=64",
    "+backbone.num_heads=2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows", "precision"),
    [
        ("simclr, ResNet", 32, "32-true"),
        *(
            pytest.param(name, rows, precision, marks=pytest.mark.slow)
            for name, rows, precision in (
                ("clip, ViT, in slices and chunks", 48, "32-true"),
                ("clip, ViT, in slices and chunks", 48, "bf16-mixed"),
                ("swav, ResNet, multi-crop", 64, "32-true"),
                ("pixpro, ResNet", 64, "32-true"),
                ("pixpro, ResNet", 64, "bf16-mixed"),
                ("mae_clip, ViT", 64, "32-true"),
                ("mae_clip, ViT", 64, "bf16-mixed"),
                ("vicreg, ViT", 64, "32-true"),
            )
        ),
    ],
)
def test_prediction_is_what_the_allocator_held(name: str, rows: int, precision: str) -> None:
    """In three steps of Lightning's, but for what kernels take and give back inside, which differs between CPUs."""
    if precision == "bf16-mixed" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("oneDNN has no kernels of bfloat16 for this CPU, and those in their place keep other tensors")
    cfg = case(CASES[name], rows, precision)
    assert predicted(cfg) == pytest.approx(measured(cfg, kernels=False), rel=0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if "ResNet" not in name])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_prediction_is_what_cuda_held(name: str, precision: str) -> None:
    cfg = case(CASES[name], 256, precision)
    steps(cfg, "cuda")  # workspaces of cuBLAS stay; they are no part of the prediction
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps(cfg, "cuda")
    planned = Planner(cfg, gpus=1).at(256)[""].total
    assert planned == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


def test_processes_share_what_they_should_and_send_what_they_must() -> None:
    cfg, _ = config([*TINY, "objective=clip", "data.batch_size=2048"], 4)
    one, four = Planner(cfg, gpus=1), Planner(cfg, gpus=4)
    ddp, fsdp = four.at(512)["ddp"], four.at(512)["fsdp2"]
    alone = one.at(512)[""]
    assert ddp.memory["parameters"] == alone.memory["parameters"] == 4 * fsdp.memory["parameters"]
    assert ddp.memory[BUCKETS] == four.trained == one.trained
    embeddings = 2048 * 64 * 4  # of one modality, the global batch, 64 float32 numbers
    rows = 2048 * 4  # a number for each
    numbers = 3 * rows  # shifts, lengths and gradients
    assert ddp.sent["embeddings"] == pytest.approx((embeddings + numbers) * 3 / 4, rel=1e-3)
    sums = ddp.sent["their gradients, sums"] - embeddings * 3 / 4
    assert 2 * 2 * rows * 3 / 4 <= sums <= 2.1 * 2 * rows * 3 / 4  # maxima and sums, and a few scalars
    on_a_ring, _ = config([*TINY, "objective=clip", "data.batch_size=2048", "exchange=ring", "chunk_size=64"], 4)
    ring = Planner(on_a_ring, gpus=4).at(512)["ddp"]
    assert ring.sent["embeddings"] == pytest.approx((3 * embeddings + numbers) * 3 / 4, rel=0.01)
    square = 2 * 2048**2 * 64  # operations of the product of all pairs
    assert one.loss_operations(2048) == 3 * square
    assert four.loss_operations(512) == 3 * square / 4
    assert Planner(on_a_ring, gpus=4).loss_operations(512) == 4 * square / 4  # forward is computed again
    assert ddp.sent["gradients"] == 2 * four.trained * 3 / 4
    assert fsdp.sent["gradients"] < four.trained
    assert 1.9 < fsdp.sent["weights"] / (four.trained * 3 / 4) < 2.1  # once for forward, once for backward
    assert 2048 * 512 * 4 < ddp.memory["loss"] < 2048**2 * 4 < one.at(2048)[""].memory["loss"]  # of the pairs its share


@pytest.mark.slow
def test_slices_hold_less_and_extrapolate() -> None:
    """Of six slices two and four are traced; tracing all of them gives the same."""
    cfg, _ = config([*TINY, "objective=clip", "data.batch_size=192", "chunk_size=64"], 1)
    whole = Planner(cfg, gpus=1).at(192)[""]
    cfg.micro_batch = 32
    sliced = Planner(cfg, gpus=1)
    some, all_of_them = sliced.at(192)[""], sliced._traced(192, 1)[""]
    assert some.total == pytest.approx(all_of_them.total, rel=0.03)
    assert some.memory["activations"] < 0.4 * whole.memory["activations"]


@pytest.mark.slow
def test_largest_batch_fits_and_one_much_larger_does_not() -> None:
    cfg, _ = config([*TINY, "objective=clip", "data.batch_size=16"], 2)
    planner = Planner(cfg, gpus=2)
    budget = 1.5 * planner.at(64)["fsdp2"].total
    most = planner.largest("fsdp2", budget, 8)
    assert planner.at(most)["fsdp2"].total <= budget < planner.at(int(1.03 * most) + 1)["fsdp2"].total
    assert planner.largest("ddp", 1e6, 8) == 0


@pytest.mark.slow
def test_table_of_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main([*TINY, "objective=clip", "data.batch_size=64", "gpus=2", "memory=0.05", "chunk_size=64", "micro_batch=32"])
    shown = capsys.readouterr().out
    assert "64 samples a step, 32 on each of 2 GPUs" in shown
    assert re.search(r"largest batch +│ +[\d,]+ │ +[\d,]+ │\n", shown)


@pytest.mark.slow
def test_command_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^python -m repr\.plan (.*)$", (ROOT / "docs" / "scaling.md").read_text(), re.MULTILINE)
    main(shlex.split(command))
    assert "largest batch" in capsys.readouterr().out


@pytest.mark.slow
def test_scaling_has_a_row_in_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["m3col_no_heads"])  # it learns from labels, which a trace does not know
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in lines if line.startswith("| m3col_no_heads |")] == [12, 11]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=2"], "memory has no value"),
        (["gpus=two", "memory=80"], "gpus=two: set gpus to a whole number above 0"),
        (["gpus=2", "memory=-1"], "memory=-1: set memory to a number above 0"),
        (["gpu=2", "gpus=1", "memory=80"], "did you mean 'gpus'"),
        (["experiment=clip_vitb32", "gpus=2", "memory=80"], "did you mean 'clip_vit_b32'"),
        (["optim.lrr=1", "gpus=2", "memory=80"], "did you mean 'optim.lr'"),
        (["gpus=3", "memory=80"], "data.batch_size=256 is the global batch and 3 processes cannot share it"),
        (["gpus=2", "memory=80", "trainer.precision=64-true"], "trainer.precision=64-true cannot be planned"),
        ([*TINY, "micro_batch=8", "gpus=1", "memory=0.001"], "not even 2 samples a GPU fit into 0.0009 of 0.001 GB"),
    ],
)
def test_bad_input_is_one_message(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="error: ") as caught:
        main(words)
    assert message in str(caught.value)


def test_own_options_are_told_from_the_config() -> None:
    overrides, given = options_of(["objective=clip", "gpus=8", "memory=40", "bandwidth=25", "tflops=400"])
    assert overrides == ["objective=clip"]
    assert given == {"gpus": 8, "memory": 40, "bandwidth": 25, "tflops": 400}
    with pytest.raises(ConfigError, match="2 faults"):
        options_of([])


def test_a_group_that_counts_gives_torch_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GATHER, "_compared", False)
    with processes(4) as group:
        assert GATHER.spread(torch.ones(2, 3), None).shape == (4, 2, 3)
    assert not GATHER._compared  # or the first of real processes would not compare with the others, which wait for it
    with processes(4) as group:
        assert world_size() == 4
        assert gather(torch.ones(2, 3)).shape == (8, 3)
        assert group.gathered == 8 * 3 * 4
    assert world_size() == 1
